//! The ring as a whole: real streams over loopback, stored maps and statuses in memory.

mod rig;

use std::time::Duration;

use berth_crds::{
    ExpertPlacementStatus,
    expert_placement::{DecisionOutcome, ProductSpeed},
    model_deployment::Survive,
    model_profile::{Basis, LayerShares},
};
use berth_proto::v1;
use berth_types::TokensPerSecond;
use rig::{Rig, large, placement};

/// Longest wait for anything in these tests.
const LIMIT: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_lost_device_is_told_to_runners_replaced_and_freed() {
    let rig = Rig::start(7).await;
    let mut one = rig.agent("node-1", 2).await;
    let mut two = rig.agent("node-2", 2).await;
    rig.apply(&placement(4)).await;
    let mut runner = rig.runner("models/v3-0").await;

    rig::obey_both(&mut one, &mut two, &[1]).await;
    let routes = runner.routes_of(1).await;
    assert_eq!((routes.devices.len(), routes.epoch), (4, 7));
    assert!(rig::covers(&routes, 16), "every expert has a replica");
    runner.use_revision(1, 1).await;

    let lost = one.lose(0).await;
    assert_eq!(runner.gone().await, std::slice::from_ref(&lost), "runners are told before the repair is planned");
    rig::obey_both(&mut one, &mut two, &[1, 2]).await;
    let routes = runner.routes_of(2).await;
    assert!(routes.devices.iter().all(|device| device.device != lost) && rig::covers(&routes, 16));

    runner.use_revision(2, 2).await;
    rig::obey_both(&mut one, &mut two, &[2]).await;
    let status = rig.status_where(|status| status.serving_revision == 2 && status.draining_revision == 0).await;
    assert_eq!(status.assignment.as_ref().map(|assigned| (assigned.epoch, assigned.revision)), Some((7, 2)));
    assert!(rig::is_true(&status, "Ready") && status.experts_lost == 0, "{status:?}");
    assert!(status.why.starts_with("repair"), "{}", status.why);
    assert_eq!(rig.store.revisions(&"models/v3-0".parse().unwrap()), [1, 2]);
}

#[tokio::test]
async fn a_deposed_leader_stores_nothing_more() {
    let rig = Rig::start(3).await;
    let (mut one, _two) = rig.two_nodes(&placement(4)).await;
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
    rig::obey_both(&mut one, &mut two, &[1]).await;
    rig.status_where(|status| rig::is_true(status, "Ready")).await;
}

#[tokio::test]
async fn extra_replicas_that_find_no_room_are_said() {
    let rig = Rig::start(1).await;
    let mut object = placement(4);
    // 16 experts, two copies of each, and every device holds all of them: 64 replicas and no more.
    object.spec.redundancy.extra_replicas = 100;
    let (_one, _two) = rig.two_nodes(&object).await;
    let status = rig.status_where(|status| rig::is_true(status, "Ready")).await;
    let placed = rig::message(&status, "Placed");
    assert!(placed.contains("32 of 100 extra replicas"), "{placed}");
}

#[tokio::test]
async fn a_deleted_placement_leaves_no_shelf() {
    let rig = Rig::start(1).await;
    let (mut one, mut two) = rig.two_nodes(&placement(4)).await;
    rig.delete("models/v3-0").await;
    rig::obey_both(&mut one, &mut two, &[]).await;
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
    let _good = rig.two_nodes(&placement(4)).await;
}

#[tokio::test]
async fn a_new_leader_goes_on_with_what_is_stored() {
    let rig = Rig::start(1).await;
    let (_one, _two) = rig.two_nodes(&placement(4)).await;
    let status = rig.status_where(|status| status.serving_revision == 1).await;

    let next = rig.succeed(2).await;
    let mut object = placement(4);
    object.status = Some(status);
    next.apply(&object).await;
    let mut runner = next.runner("models/v3-0").await;
    let mut one = next.agent("node-1", 2).await;
    let mut two = next.agent("node-2", 2).await;
    rig::obey_both(&mut one, &mut two, &[1]).await;
    assert_eq!(runner.routes_of(1).await.epoch, 2);
    let claimed =
        next.status_where(|status| status.assignment.as_ref().is_some_and(|assigned| assigned.epoch == 2)).await;
    assert_eq!(claimed.assignment.unwrap().revision, 1, "the placement is claimed, not planned anew");
    assert_eq!(next.store.revisions(&"models/v3-0".parse().unwrap()), [1]);
}

#[tokio::test]
async fn a_skewed_load_moves_what_pays_and_the_status_says_why() {
    let rig = Rig::start(1).await;
    let (mut one, mut two, mut runner, routes) = rig.served(&placement(4)).await;

    // All that one device holds is asked for, and hardly anything else.
    let hot = &routes.devices[0].layers[0].experts;
    let skewed: Vec<u64> = (0..16).map(|expert| if hot.contains(&expert) { 4000 } else { 10 }).collect();
    runner.load(1, &skewed, &routes).await;
    let before = rig.status_where(|status| status.balancedness.is_some()).await;
    let measured = before.balancedness.unwrap();
    rig::obey_both(&mut one, &mut two, &[1, 2]).await;
    let routes = runner.routes_of(2).await;
    runner.use_revision(2, 2).await;
    runner.load(2, &skewed, &routes).await;
    let after = rig.status_where(|status| status.serving_revision == 2 && status.balancedness > Some(0.95)).await;
    assert!(measured < 0.7, "{measured}");

    let decision = &after.decisions[0];
    assert_eq!((decision.outcome, decision.cause.as_str()), (DecisionOutcome::Moved, "rebalance"));
    assert_eq!((decision.from_revision, decision.revision), (1, 2));
    assert!(decision.balancedness_after > decision.balancedness_before && decision.pays_back_seconds.is_some());
    assert!(decision.moved_replicas > 0 && decision.moved_replicas < 3 * 32, "{decision:?}");
    assert!(after.why.starts_with("re-plan r1 -> r2 (the load has drifted): balance 0."), "{}", after.why);
    assert!(after.why.contains("pays back in"), "{}", after.why);
    let certificate = after.certificate.unwrap();
    assert_eq!((certificate.revision, certificate.loads.as_str()), (2, "1 load window"));
    assert!(certificate.bound >= 1.0 && certificate.makespan >= certificate.bound, "{certificate:?}");
}

#[tokio::test]
async fn an_even_load_and_a_thin_window_move_nothing() {
    let rig = Rig::start(1).await;
    let (_one, _two, mut runner, routes) = rig.served(&placement(4)).await;
    // Skewed, but too few tokens to know.
    let mut thin = vec![1; 16];
    thin[0] = 200;
    runner.load(1, &thin, &routes).await;
    runner.load(2, &[1000; 16], &routes).await;
    let kept = |status: &ExpertPlacementStatus| status.decisions.first().is_some_and(|one| one.cause == "rebalance");
    let status = rig.status_where(kept).await;
    assert_eq!(status.decisions[0].outcome, DecisionOutcome::Kept);
    let why = &status.decisions[0].why;
    // The thin window has its small part in what is expected.
    assert!(why.starts_with("kept r1: balance 0.98; nothing moves"), "{why}");
    assert_eq!(status.decisions[1].cause, "first");
    rig.wait_for("the look to be counted", |metrics| metrics.contains("berth_scheduler_balance_kept_total 1")).await;
    assert_eq!(rig.store.revisions(&"models/v3-0".parse().unwrap()), [1]);
}

#[tokio::test]
async fn a_plan_for_balance_is_passed_by_a_repair_and_dropped() {
    let rig = Rig::start(1).await;
    let (mut one, _two, mut runner, routes) = rig.served(&large(4)).await;
    runner.skew(1, &routes).await;
    // The plan for balance is being made, or is made: the loss is heard all the same, and what was planned for the world
    // before it never becomes a revision that names the device.
    let lost = one.lose(0).await;
    assert_eq!(runner.gone().await, std::slice::from_ref(&lost));
    let status = rig
        .status_where(|status| {
            let assigned = status.assignment.as_ref();
            assigned.is_some_and(|assigned| !assigned.devices.iter().any(|device| *device.to_string() == lost))
        })
        .await;
    let newest = &status.decisions[0];
    assert_eq!((newest.cause.as_str(), newest.outcome), ("repair", DecisionOutcome::Moved), "{status:?}");
}

#[tokio::test]
async fn a_runner_that_divides_by_weights_gets_them_and_another_does_not() {
    let rig = Rig::start(1).await;
    let (mut one, mut two) = rig.two_nodes(&placement(4)).await;
    let mut runner = rig.runner_with("models/v3-0", &[berth_proto::FEATURE_WEIGHTS]).await;
    let routes = runner.routes_of(1).await;
    assert!(routes.devices.iter().all(|device| device.weights.is_empty()), "nobody weighed when it was planned");
    runner.use_revision(1, 1).await;
    // Seven experts that weigh nothing alike: even halves of them cannot be levelled, parts can.
    let mut skewed = vec![20; 16];
    skewed[..7].copy_from_slice(&[9000, 5000, 3100, 2300, 1700, 900, 700]);
    runner.load(1, &skewed, &routes).await;
    rig::obey_both(&mut one, &mut two, &[1, 2]).await;
    let routes = runner.routes_of(2).await;
    let hot = |device: &v1::RouteDevice| {
        let slots = device.layers[0].experts.iter().zip(&device.weights[0].weights);
        slots.filter(|(expert, _)| **expert == 0).map(|(_, weight)| *weight).sum::<u32>()
    };
    assert_eq!(routes.devices.iter().map(hot).sum::<u32>(), 65_535, "the parts of an expert are all of it");
    let status = rig.status_where(|status| status.serving_revision == 2).await;
    let certificate = status.certificate.unwrap();
    assert_eq!(certificate.sharing, "by weight");
    assert!(certificate.makespan < 1.05, "{certificate:?}");
    let mut plain = rig.runner("models/v3-0").await;
    let routes = plain.routes_of(2).await;
    assert!(routes.devices.iter().all(|device| device.weights.is_empty()));
}

#[tokio::test]
async fn a_new_instance_starts_from_what_its_profile_knows_of_the_load() {
    let rig = Rig::start(1).await;
    let mut object = placement(4);
    object.spec.redundancy.extra_replicas = 4;
    let shares = (0..16).map(|expert| if expert == 5 { 900 } else { 10 }).collect::<Vec<u16>>();
    object.spec.expert_loads = (1..4).map(|layer| LayerShares { layer, shares: shares.clone() }).collect();
    let (_one, _two) = rig.two_nodes(&object).await;
    let routes = rig.runner("models/v3-0").await.routes_of(1).await;
    let holds = |device: &v1::RouteDevice| device.layers[0].experts.contains(&5);
    assert!(routes.devices.iter().all(holds), "the hot expert has a copy on every device: {routes:?}");
    let status = rig.status_where(|status| status.certificate.is_some()).await;
    let certificate = status.certificate.unwrap();
    assert_eq!(certificate.loads, "what its profile says of usual traffic");
    assert_eq!(certificate.speeds, "none declared: every device alike");
}

#[tokio::test]
async fn a_faster_product_gets_more_of_the_load() {
    let rig = Rig::start(1).await;
    let mut one = rig.agent("node-1", 2).await;
    let mut two = rig.agent_of("node-2", 2, "slow").await;
    let mut object = placement(4);
    let speed = |product: &str, rate: f64| ProductSpeed {
        product: product.to_owned(),
        tokens_per_second: TokensPerSecond::try_from(rate).unwrap(),
        basis: Basis::Measured,
    };
    object.spec.speeds = vec![speed("h200", 300.0), speed("slow", 100.0)];
    object.spec.redundancy.survive = Survive::None;
    rig.apply(&object).await;
    rig::obey_both(&mut one, &mut two, &[1]).await;
    let routes = rig.runner("models/v3-0").await.routes_of(1).await;
    let held = |node: &str| -> usize {
        let own = routes.devices.iter().filter(|device| device.device.starts_with(node));
        own.map(|device| device.layers[0].experts.iter().filter(|expert| **expert < 16).count()).sum()
    };
    assert_eq!((held("node-1"), held("node-2")), (12, 4), "{routes:?}");
    let status = rig.status_where(|status| status.certificate.is_some()).await;
    let speeds = status.certificate.unwrap().speeds;
    assert_eq!(speeds, "h200 300 tokens/s (measured), slow 100 tokens/s (measured)");
}
