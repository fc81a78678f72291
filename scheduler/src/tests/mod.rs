//! The ring as a whole: real streams over loopback, stored maps and statuses in memory.

mod rig;

use std::time::Duration;

use berth_proto::v1;
use rig::{Rig, placement};

/// Longest wait for anything in these tests.
const LIMIT: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_lost_device_is_told_to_runners_replaced_and_freed() {
    let rig = Rig::start(7).await;
    let mut one = rig.agent("node-1", 2).await;
    let mut two = rig.agent("node-2", 2).await;
    rig.apply(&placement(4)).await;
    let mut runner = rig.runner("models/v3-0").await;

    one.obey_until(|desired| desired.revisions() == [1]).await;
    two.obey_until(|desired| desired.revisions() == [1]).await;
    let routes = runner.routes_of(1).await;
    assert_eq!((routes.devices.len(), routes.epoch), (4, 7));
    assert!(rig::covers(&routes, 16), "every expert has a replica");
    runner.use_revision(1, 1).await;

    let lost = one.lose(0).await;
    assert_eq!(runner.gone().await, std::slice::from_ref(&lost), "runners are told before the repair is planned");
    one.obey_until(|desired| desired.revisions() == [1, 2]).await;
    two.obey_until(|desired| desired.revisions() == [1, 2]).await;
    let routes = runner.routes_of(2).await;
    assert!(routes.devices.iter().all(|device| device.device != lost) && rig::covers(&routes, 16));

    runner.use_revision(2, 2).await;
    one.obey_until(|desired| desired.revisions() == [2]).await;
    two.obey_until(|desired| desired.revisions() == [2]).await;
    let status = rig.status_where(|status| status.serving_revision == 2 && status.draining_revision == 0).await;
    assert_eq!(status.assignment.as_ref().map(|assigned| (assigned.epoch, assigned.revision)), Some((7, 2)));
    assert!(rig::is_true(&status, "Ready") && status.experts_lost == 0, "{status:?}");
    assert!(status.why.starts_with("repair"), "{}", status.why);
    assert_eq!(rig.store.revisions(&"models/v3-0".parse().unwrap()), [1, 2]);
}

#[tokio::test]
async fn a_deposed_leader_stores_nothing_more() {
    let rig = Rig::start(3).await;
    let mut one = rig.agent("node-1", 2).await;
    let mut two = rig.agent("node-2", 2).await;
    rig.apply(&placement(4)).await;
    one.obey_until(|desired| desired.revisions() == [1]).await;
    two.obey_until(|desired| desired.revisions() == [1]).await;
    rig.status_where(|status| status.serving_revision == 1).await;
    rig.depose();
    let writes = rig.writes();
    one.lose(0).await;
    rig.wait_for("a refused plan", |metrics| metrics.contains(r#"berth_scheduler_plans_refused_total{by="deposed"}"#))
        .await;
    assert_eq!(rig.store.revisions(&"models/v3-0".parse().unwrap()), [1]);
    assert_eq!(rig.writes(), writes, "no status is written either");
}

#[tokio::test]
async fn a_placement_that_does_not_fit_says_what_is_missing_and_heals() {
    let rig = Rig::start(1).await;
    let mut one = rig.agent("node-1", 2).await;
    rig.apply(&placement(4)).await;
    let status = rig.status_where(|status| rig::message(status, "Placed").contains("missing")).await;
    assert!(rig::message(&status, "Placed").contains("4 devices are wanted and 2 are usable"), "{status:?}");
    let mut two = rig.agent("node-2", 2).await;
    one.obey_until(|desired| desired.revisions() == [1]).await;
    two.obey_until(|desired| desired.revisions() == [1]).await;
    rig.status_where(|status| rig::is_true(status, "Ready")).await;
}

#[tokio::test]
async fn extra_replicas_that_find_no_room_are_said() {
    let rig = Rig::start(1).await;
    let mut one = rig.agent("node-1", 2).await;
    let mut two = rig.agent("node-2", 2).await;
    let mut object = placement(4);
    // 16 experts, two copies of each, and every device holds all of them: 64 replicas and no more.
    object.spec.redundancy.extra_replicas = 100;
    rig.apply(&object).await;
    one.obey_until(|desired| desired.revisions() == [1]).await;
    two.obey_until(|desired| desired.revisions() == [1]).await;
    let status = rig.status_where(|status| rig::is_true(status, "Ready")).await;
    let placed = rig::message(&status, "Placed");
    assert!(placed.contains("32 of 100 extra replicas"), "{placed}");
}

#[tokio::test]
async fn a_deleted_placement_leaves_no_shelf() {
    let rig = Rig::start(1).await;
    let mut one = rig.agent("node-1", 2).await;
    let mut two = rig.agent("node-2", 2).await;
    rig.apply(&placement(4)).await;
    one.obey_until(|desired| desired.revisions() == [1]).await;
    two.obey_until(|desired| desired.revisions() == [1]).await;
    rig.delete("models/v3-0").await;
    one.obey_until(|desired| desired.revisions().is_empty()).await;
    two.obey_until(|desired| desired.revisions().is_empty()).await;
}

#[tokio::test]
async fn nonsense_ends_the_stream_and_nobody_else_notices() {
    let rig = Rig::start(1).await;
    let mut bad = rig.agent("node-1", 1).await;
    let report = v1::HealthReport {
        devices: vec![v1::DeviceHealth { device: "node-2/0000:01:00.0".to_owned(), ..Default::default() }],
        ..Default::default()
    };
    bad.say(v1::agent_message::Message::Health(report)).await;
    bad.ends().await;
    let mut good = rig.agent("node-1", 2).await;
    let mut two = rig.agent("node-2", 2).await;
    rig.apply(&placement(4)).await;
    good.obey_until(|desired| desired.revisions() == [1]).await;
    two.obey_until(|desired| desired.revisions() == [1]).await;
}

#[tokio::test]
async fn a_new_leader_goes_on_with_what_is_stored() {
    let rig = Rig::start(1).await;
    let mut one = rig.agent("node-1", 2).await;
    let mut two = rig.agent("node-2", 2).await;
    rig.apply(&placement(4)).await;
    one.obey_until(|desired| desired.revisions() == [1]).await;
    two.obey_until(|desired| desired.revisions() == [1]).await;
    let status = rig.status_where(|status| status.serving_revision == 1).await;

    let next = rig.succeed(2).await;
    let mut object = placement(4);
    object.status = Some(status);
    next.apply(&object).await;
    let mut runner = next.runner("models/v3-0").await;
    let mut one = next.agent("node-1", 2).await;
    let mut two = next.agent("node-2", 2).await;
    one.obey_until(|desired| desired.revisions() == [1]).await;
    two.obey_until(|desired| desired.revisions() == [1]).await;
    assert_eq!(runner.routes_of(1).await.epoch, 2);
    let claimed =
        next.status_where(|status| status.assignment.as_ref().is_some_and(|assigned| assigned.epoch == 2)).await;
    assert_eq!(claimed.assignment.unwrap().revision, 1, "the placement is claimed, not planned anew");
    assert_eq!(next.store.revisions(&"models/v3-0".parse().unwrap()), [1]);
}
