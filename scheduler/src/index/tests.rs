//! The world under hand-driven time.

use std::{collections::BTreeMap, time::Duration};

use berth_crds::{AcceleratorNode, AcceleratorNodeSpec, AcceleratorNodeStatus, accelerator_node::DeviceStatus};
use berth_planner::Standing;
use berth_proto::convert::DeviceHealth;
use berth_types::{Action, Admission, Bytes, DeviceId, DeviceState, Health as Word, Vendor};

use super::{Health, Index, Worker};

const fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn device() -> DeviceId {
    "n1/0000:01:00.0".parse().unwrap()
}

fn report(sequence: u64, admission: Admission) -> Health {
    let state = DeviceState { admission, ..DeviceState::HEALTHY };
    let device = DeviceHealth {
        id: device(),
        state,
        evidence: String::new(),
        vendor: Vendor::Nvidia,
        product: "h200".to_owned(),
        memory: Bytes(1 << 30),
        interconnect_domain: None,
        card: String::new(),
        since_unix_ms: 0,
        traceparent: String::new(),
        computes: Vec::new(),
    };
    Health { boot_id: "b".to_owned(), sequence, state: DeviceState::HEALTHY, devices: vec![device] }
}

fn workers(serving: bool) -> BTreeMap<DeviceId, Worker> {
    let worker = Worker { serving, endpoint: String::new(), memory: Bytes(0), instance: 1, shelves: BTreeMap::new() };
    [(device(), worker)].into()
}

/// A node whose agent is heard at second 0.
fn heard() -> Index {
    let mut index = Index::new(at(0));
    index.agent_opened(at(0), 1, "n1", true);
    index.health(at(0), 1, report(5, Admission::Schedulable));
    index.workers(at(0), 1, workers(true));
    index
}

fn standing(index: &mut Index, seconds: u64) -> Standing {
    index.advance(at(seconds));
    index.standing(at(seconds), &device())
}

fn object(sequence: u64, admission: Admission, spec: AcceleratorNodeSpec) -> AcceleratorNode {
    let status = AcceleratorNodeStatus {
        boot_id: "b".to_owned(),
        sequence,
        devices: vec![DeviceStatus {
            device: device(),
            vendor: Vendor::Nvidia,
            product: "h200".to_owned(),
            uuid: String::new(),
            memory_bytes: Bytes(1 << 30),
            interconnect_domain: None,
            card: String::new(),
            reset_group: String::new(),
            health: Word::Healthy,
            admission,
            action: Action::None,
            scope: None,
            reason: None,
            evidence: String::new(),
            since: None,
            worker: String::new(),
            computes: Vec::new(),
            holds: Vec::new(),
        }],
        ..AcceleratorNodeStatus::default()
    };
    let mut object = AcceleratorNode::new("n1", AcceleratorNodeSpec { native: true, ..spec });
    object.status = Some(status);
    object
}

#[test]
fn a_silent_agent_takes_nothing_new_at_three_seconds_and_is_gone_at_ten() {
    let mut index = heard();
    assert_eq!(standing(&mut index, 2), Standing::Open);
    assert_eq!(standing(&mut index, 3), Standing::Frozen);
    assert_eq!(standing(&mut index, 9), Standing::Frozen);
    assert_eq!(standing(&mut index, 10), Standing::Gone);
    index.beat(at(11), 1);
    assert_eq!(standing(&mut index, 11), Standing::Open, "a late word brings it back");
}

#[test]
fn a_closed_stream_takes_nothing_new_at_once() {
    let mut index = heard();
    index.agent_closed(at(1), 1);
    assert_eq!(standing(&mut index, 1), Standing::Frozen);
    assert_eq!(standing(&mut index, 11), Standing::Gone);
}

#[test]
fn a_stream_that_was_replaced_has_nothing_to_say() {
    let mut index = heard();
    index.agent_opened(at(1), 2, "n1", true);
    index.health(at(1), 1, report(9, Admission::Barred));
    index.agent_closed(at(1), 1);
    assert_eq!(standing(&mut index, 1), Standing::Open);
    index.health(at(1), 2, report(1, Admission::Barred));
    assert_eq!(standing(&mut index, 1), Standing::Gone, "an agent that restarted counts anew");
}

#[test]
fn an_older_report_changes_nothing() {
    let mut index = heard();
    index.health(at(1), 1, report(6, Admission::Barred));
    index.health(at(1), 1, report(5, Admission::Schedulable));
    assert_eq!(standing(&mut index, 1), Standing::Gone);
}

#[test]
fn the_object_speaks_only_while_the_stream_does_not() {
    let mut index = heard();
    let spec = AcceleratorNodeSpec::default;
    index.node_object(at(1), "n1", &object(9, Admission::Barred, spec()));
    assert_eq!(standing(&mut index, 1), Standing::Open, "the stream is open");
    index.agent_closed(at(2), 1);
    index.node_object(at(2), "n1", &object(4, Admission::Barred, spec()));
    assert_eq!(standing(&mut index, 2), Standing::Frozen, "an older object is not believed");
    index.node_object(at(2), "n1", &object(9, Admission::Barred, spec()));
    assert_eq!(standing(&mut index, 2), Standing::Gone);
}

#[test]
fn a_drain_moves_replicas_away_without_losing_them() {
    let mut index = heard();
    let spec = AcceleratorNodeSpec { drain: true, ..AcceleratorNodeSpec::default() };
    index.node_object(at(1), "n1", &object(1, Admission::Schedulable, spec));
    assert_eq!(standing(&mut index, 1), Standing::Leaving);
}

#[test]
fn a_device_whose_worker_does_not_come_back_is_gone_after_ten_seconds() {
    let mut index = heard();
    index.workers(at(1), 1, workers(false));
    for second in 2..11 {
        index.beat(at(second), 1);
        assert_eq!(standing(&mut index, second), Standing::Frozen, "second {second}");
    }
    index.beat(at(11), 1);
    assert_eq!(standing(&mut index, 11), Standing::Gone);
    index.workers(at(12), 1, workers(true));
    assert_eq!(standing(&mut index, 12), Standing::Open);
}

#[test]
fn what_plans_depend_on_is_numbered() {
    let mut index = heard();
    let world = index.world();
    index.beat(at(1), 1);
    index.health(at(1), 1, report(6, Admission::Schedulable));
    assert_eq!(index.world(), world, "news that change no standing start no plan");
    index.health(at(1), 1, report(7, Admission::Barred));
    assert!(index.world() > world);
}
