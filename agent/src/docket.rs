//! The operator's orders to this node and what became of each. Pure: objects and times in, the next step out.
//!
//! An order is carried out at most once, whatever restarts: what ended is remembered in the object's status, and one
//! that was under way when the agent ended is not begun again. Nothing is touched while a worker serves replicas there,
//! unless the device is Barred.

use std::collections::{BTreeMap, BTreeSet};

use berth_crds::accelerator_node::{Order, OrderPhase, OrderStatus};
use berth_types::{Action, Admission, NodeName};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::{health::fact::Local, node::Snapshot};

/// Orders that ended and are no longer in the spec, kept for people to see and so that their ids stay known.
const KEPT: usize = 16;

/// What the object knew of orders when this agent first saw it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Remembered {
    /// The orders.
    pub orders: Vec<OrderStatus>,
    /// The boot that it spoke of.
    pub boot_id: String,
}

/// What is so on the node when orders are looked at.
#[derive(Debug)]
pub struct Scene<'a> {
    /// The time of day.
    pub now: Timestamp,
    /// This node.
    pub node: &'a NodeName,
    /// Devices and their health.
    pub snapshot: &'a Snapshot,
    /// Placements whose experts the worker of a device holds, by device.
    pub holds: BTreeMap<Local, Vec<String>>,
}

/// An order that may be carried out now.
#[derive(Clone, Debug, PartialEq)]
pub struct Due {
    /// The order.
    pub order: Order,
    /// Every device that it takes with it, the ordered one included.
    pub members: BTreeSet<Local>,
}

/// Orders and their fates.
#[derive(Clone, Debug, Default)]
pub struct Docket {
    orders: Vec<Order>,
    fates: Vec<OrderStatus>,
}

impl Docket {
    /// A docket that goes on where the last agent of this node ended. `boot_id` is this boot's.
    #[must_use]
    pub fn resume(remembered: &Remembered, boot_id: &str, now: Timestamp) -> Self {
        let rebooted = remembered.boot_id != boot_id;
        let resume = |fate: &OrderStatus| {
            let mut fate = fate.clone();
            match (fate.phase, fate.action) {
                (OrderPhase::Started, Action::RebootNode) if rebooted => {
                    end(&mut fate, OrderPhase::Succeeded, "the node was booted again", now);
                }
                // The reboot may still come; the deadline says when it has not.
                (OrderPhase::Started, Action::RebootNode) => {}
                (OrderPhase::Started, _) => {
                    let why = "the agent ended while it was under way: its outcome is not known";
                    end(&mut fate, OrderPhase::Failed, why, now);
                    fate.outcome_unknown = true;
                }
                _ => {}
            }
            fate
        };
        Self { orders: Vec::new(), fates: remembered.orders.iter().map(resume).collect() }
    }

    /// Devices whose reset was under way when the last agent ended.
    #[must_use]
    pub fn left(&self, remembered: &Remembered) -> Vec<Local> {
        let under_way = remembered.orders.iter().filter(|fate| fate.phase == OrderPhase::Started);
        let left = |fate: &&OrderStatus| self.fates.iter().any(|now| now.id == fate.id && now.outcome_unknown);
        under_way.filter(left).map(|fate| fate.device.local().to_owned()).collect()
    }

    /// Takes the orders of the spec: new ones wait, those that are gone before they began are cancelled, those whose
    /// time is over have ended.
    pub fn take(&mut self, orders: &[Order], now: Timestamp) {
        self.orders = orders.to_vec();
        for order in orders {
            if !self.fates.iter().any(|fate| fate.id == order.id) {
                self.fates.push(OrderStatus {
                    id: order.id.clone(),
                    device: order.device.clone(),
                    action: order.action,
                    phase: OrderPhase::Pending,
                    started: None,
                    finished: None,
                    message: String::new(),
                    outcome_unknown: false,
                });
            }
        }
        for fate in &mut self.fates {
            let order = orders.iter().find(|order| order.id == fate.id);
            match (fate.phase, order) {
                (OrderPhase::Pending, None) => {
                    end(fate, OrderPhase::Cancelled, "taken out of the spec before it started", now);
                }
                (OrderPhase::Pending, Some(order)) if order.deadline.0 <= now => {
                    let waited = std::mem::take(&mut fate.message);
                    let why = if waited.is_empty() {
                        "its deadline passed".to_owned()
                    } else {
                        format!("its deadline passed: {waited}")
                    };
                    end(fate, OrderPhase::Expired, &why, now);
                }
                (OrderPhase::Started, Some(order)) if order.action == Action::RebootNode && order.deadline.0 <= now => {
                    end(fate, OrderPhase::Failed, "the node was not booted again by the deadline", now);
                }
                _ => {}
            }
        }
        self.forget();
    }

    /// The first order that may be carried out; what the others wait for is written down, and what cannot be is refused.
    pub fn next(&mut self, scene: &Scene<'_>) -> Option<Due> {
        if self.fates.iter().any(|fate| fate.phase == OrderPhase::Started) {
            return None;
        }
        for order in &self.orders {
            let Some(fate) = self.fates.iter_mut().find(|fate| fate.id == order.id) else { continue };
            if fate.phase != OrderPhase::Pending {
                continue;
            }
            match members(order, scene) {
                Err(why) => end(fate, OrderPhase::Failed, &why, scene.now),
                Ok(members) => match hindrance(&members, scene) {
                    Some(why) => fate.message = why,
                    None => return Some(Due { order: order.clone(), members }),
                },
            }
        }
        None
    }

    /// It begins: from here on it cannot be cancelled.
    pub fn begin(&mut self, id: &str, message: &str, now: Timestamp) {
        if let Some(fate) = self.fates.iter_mut().find(|fate| fate.id == id) {
            (fate.phase, fate.started) = (OrderPhase::Started, Some(Time(now)));
            message.clone_into(&mut fate.message);
        }
    }

    /// It ended.
    pub fn finish(&mut self, id: &str, outcome: Result<&str, &str>, now: Timestamp) {
        let Some(fate) = self.fates.iter_mut().find(|fate| fate.id == id) else { return };
        match outcome {
            Ok(message) => end(fate, OrderPhase::Succeeded, message, now),
            Err(why) => end(fate, OrderPhase::Failed, why, now),
        }
    }

    /// When something happens without a change: the next deadline.
    #[must_use]
    pub fn deadline(&self) -> Option<Timestamp> {
        let open = |order: &&Order| self.fates.iter().any(|fate| fate.id == order.id && !fate.phase.is_final());
        self.orders.iter().filter(open).map(|order| order.deadline.0).min()
    }

    /// What became of each.
    #[must_use]
    pub fn fates(&self) -> &[OrderStatus] {
        &self.fates
    }

    fn forget(&mut self) {
        let wanted = |fate: &OrderStatus| self.orders.iter().any(|order| order.id == fate.id);
        let old = self.fates.iter().filter(|fate| fate.phase.is_final() && !wanted(fate)).count();
        let mut surplus = old.saturating_sub(KEPT);
        let orders = std::mem::take(&mut self.orders);
        self.fates.retain(|fate| {
            let drop = surplus > 0 && fate.phase.is_final() && !orders.iter().any(|order| order.id == fate.id);
            surplus = surplus.saturating_sub(usize::from(drop));
            !drop
        });
        self.orders = orders;
    }
}

fn end(fate: &mut OrderStatus, phase: OrderPhase, message: &str, now: Timestamp) {
    (fate.phase, fate.finished) = (phase, Some(Time(now)));
    fate.message = message.chars().take(512).collect();
}

/// Every device that an order takes with it.
fn members(order: &Order, scene: &Scene<'_>) -> Result<BTreeSet<Local>, String> {
    if order.device.node() != scene.node.as_str() {
        return Err(format!("{} is not on this node", order.device));
    }
    let devices = &scene.snapshot.devices;
    let shown = devices.get(order.device.local()).ok_or_else(|| format!("{} is not known here", order.device))?;
    match order.action {
        Action::RebootNode => Ok(devices.keys().cloned().collect()),
        Action::ResetDevice | Action::ResetGroup => {
            let group = shown.info.reset_group.as_ref();
            let along = |info: &crate::health::fact::DeviceInfo| group.is_some() && info.reset_group.as_ref() == group;
            let along = devices.iter().filter(|(_, shown)| along(&shown.info)).map(|(local, _)| local.clone());
            Ok(along.chain([order.device.local().to_owned()]).collect())
        }
        other => Err(format!("{other} is nothing that an agent carries out")),
    }
}

/// What keeps an order from being carried out now.
fn hindrance(members: &BTreeSet<Local>, scene: &Scene<'_>) -> Option<String> {
    members.iter().find_map(|local| {
        let shown = scene.snapshot.devices.get(local)?;
        if shown.standing.state.admission == Admission::Barred {
            return None;
        }
        let holds = scene.holds.get(local).filter(|holds| !holds.is_empty())?;
        Some(format!("{local} still serves {}", holds.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::time::Duration;

    use berth_types::{DeviceState, Vendor};
    use proptest::prelude::*;

    use super::*;
    use crate::{
        health::{fact::DeviceInfo, ledger::Standing},
        node::Shown,
    };

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).unwrap()
    }

    fn order(id: &str, device: &str, action: Action, until: i64) -> Order {
        let device = format!("n1/{device}").parse().unwrap();
        Order { id: id.to_owned(), device, action, deadline: Time(at(until)), reason: String::new() }
    }

    fn snapshot(devices: &[(&str, Option<&str>, Admission)]) -> Snapshot {
        let shown = |(local, group, admission): &(&str, Option<&str>, Admission)| {
            let info = DeviceInfo {
                local: (*local).to_owned(),
                vendor: Vendor::Ascend,
                product: String::new(),
                uuid: String::new(),
                memory_bytes: 1,
                interconnect_domain: None,
                card: String::new(),
                pci: None,
                reset_group: group.map(str::to_owned),
                driver_branch: None,
            };
            let state = DeviceState { admission: *admission, ..DeviceState::HEALTHY };
            let standing = Standing { state, evidence: String::new(), since: Duration::ZERO };
            ((*local).to_owned(), Shown { info, standing, trace: None })
        };
        let node = Standing { state: DeviceState::HEALTHY, evidence: String::new(), since: Duration::ZERO };
        Snapshot {
            sequence: 1,
            devices: devices.iter().map(shown).collect::<BTreeMap<_, _>>(),
            node,
            notes: VecDeque::new(),
            incidents: Default::default(),
        }
    }

    fn next(docket: &mut Docket, snapshot: &Snapshot, busy: &[&str], now: i64) -> Option<Due> {
        let holds = busy.iter().map(|local| ((*local).to_owned(), vec!["models/v3-0".to_owned()])).collect();
        let node = "n1".parse().unwrap();
        docket.next(&Scene { now: at(now), node: &node, snapshot, holds })
    }

    fn phase(docket: &Docket, id: &str) -> OrderPhase {
        docket.fates().iter().find(|fate| fate.id == id).unwrap().phase
    }

    #[test]
    fn a_reset_waits_while_a_worker_serves_there_and_expires_saying_so() {
        let devices = snapshot(&[("0.0", None, Admission::Draining)]);
        let mut docket = Docket::default();
        docket.take(&[order("a", "0.0", Action::ResetDevice, 60)], at(0));
        assert_eq!(next(&mut docket, &devices, &["0.0"], 1), None);
        assert!(docket.fates()[0].message.contains("0.0 still serves models/v3-0"));
        let due = next(&mut docket, &devices, &[], 2).unwrap();
        assert_eq!(due.members, BTreeSet::from(["0.0".to_owned()]));
        docket.take(&[order("a", "0.0", Action::ResetDevice, 60)], at(60));
        assert_eq!(phase(&docket, "a"), OrderPhase::Expired);
        assert!(docket.fates()[0].message.contains("still serves"), "{:?}", docket.fates());
        assert_eq!(next(&mut docket, &devices, &[], 61), None);
    }

    #[test]
    fn a_barred_device_serves_nothing_and_its_siblings_are_emptied_first() {
        let devices = snapshot(&[("0.0", Some("m"), Admission::Barred), ("0.1", Some("m"), Admission::Draining)]);
        let mut docket = Docket::default();
        docket.take(&[order("a", "0.0", Action::ResetGroup, 60)], at(0));
        assert_eq!(next(&mut docket, &devices, &["0.0", "0.1"], 1), None);
        let due = next(&mut docket, &devices, &["0.0"], 1).unwrap();
        assert_eq!(due.members.len(), 2);
    }

    #[test]
    fn an_order_that_is_taken_out_before_it_started_is_cancelled_and_one_that_started_is_not() {
        let mut docket = Docket::default();
        let orders = [order("a", "0.0", Action::ResetDevice, 60), order("b", "0.0", Action::ResetDevice, 60)];
        docket.take(&orders, at(0));
        docket.begin("a", "", at(1));
        docket.take(&[], at(2));
        assert_eq!((phase(&docket, "a"), phase(&docket, "b")), (OrderPhase::Started, OrderPhase::Cancelled));
        docket.finish("a", Ok("done"), at(3));
        assert_eq!(phase(&docket, "a"), OrderPhase::Succeeded);
    }

    #[test]
    fn what_was_under_way_when_the_agent_ended_is_not_begun_again() {
        let devices = snapshot(&[("0.0", None, Admission::Barred)]);
        let orders = [order("a", "0.0", Action::ResetDevice, 600), order("b", "0.0", Action::RebootNode, 600)];
        let mut docket = Docket::default();
        docket.take(&orders, at(0));
        docket.begin("a", "", at(1));
        let remembered = Remembered { orders: docket.fates().to_vec(), boot_id: "one".to_owned() };
        let mut again = Docket::resume(&remembered, "one", at(2));
        again.take(&orders, at(2));
        assert_eq!(phase(&again, "a"), OrderPhase::Failed);
        assert!(again.fates()[0].outcome_unknown && !again.fates()[1].outcome_unknown);
        assert_eq!(again.left(&remembered), ["0.0"]);
        assert_eq!(next(&mut again, &devices, &[], 3).unwrap().order.id, "b");
        again.begin("b", "", at(4));
        let remembered = Remembered { orders: again.fates().to_vec(), boot_id: "one".to_owned() };
        assert_eq!(phase(&Docket::resume(&remembered, "one", at(5)), "b"), OrderPhase::Started);
        assert_eq!(phase(&Docket::resume(&remembered, "two", at(5)), "b"), OrderPhase::Succeeded);
    }

    #[test]
    fn what_cannot_be_done_is_refused_with_its_reason() {
        let devices = snapshot(&[("0.0", None, Admission::Barred)]);
        let mut docket = Docket::default();
        let elsewhere = Order { device: "n2/0.0".parse().unwrap(), ..order("c", "0.0", Action::ResetDevice, 60) };
        docket.take(
            &[order("a", "0.1", Action::ResetDevice, 60), order("b", "0.0", Action::ServiceHardware, 60), elsewhere],
            at(0),
        );
        assert_eq!(next(&mut docket, &devices, &[], 1), None);
        assert!(docket.fates().iter().all(|fate| fate.phase == OrderPhase::Failed), "{:?}", docket.fates());
    }

    proptest! {
        /// Whatever comes in whatever order, restarts included, no order begins twice.
        #[test]
        fn no_order_is_carried_out_twice(steps in proptest::collection::vec((0u8..6, 0usize..4), 0..60)) {
            let devices = snapshot(&[("0.0", None, Admission::Barred)]);
            let all: Vec<Order> = (0..4).map(|at| order(&format!("o{at}"), "0.0", Action::ResetDevice, 40)).collect();
            let mut docket = Docket::default();
            let mut wanted: Vec<Order> = Vec::new();
            let mut begun: Vec<String> = Vec::new();
            for (now, (step, which)) in (0..).zip(steps) {
                match step {
                    0 if !wanted.iter().any(|order| order.id == all[which].id) => wanted.push(all[which].clone()),
                    1 => wanted.retain(|order| order.id != all[which].id),
                    2 => docket = Docket::resume(&Remembered { orders: docket.fates().to_vec(), boot_id: "b".to_owned() }, "b", at(now)),
                    3 => docket.finish(&all[which].id.clone(), Ok("done"), at(now)),
                    _ => {}
                }
                docket.take(&wanted, at(now));
                if let Some(due) = next(&mut docket, &devices, &[], now) {
                    prop_assert!(!begun.contains(&due.order.id), "{} twice", due.order.id);
                    docket.begin(&due.order.id, "", at(now));
                    begun.push(due.order.id);
                }
            }
        }
    }
}
