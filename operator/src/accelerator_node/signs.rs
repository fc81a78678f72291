//! A node's devices in Kubernetes' own terms: a condition and a taint of its Node, and events about its devices. Pure.
//!
//! The taint keeps other schedulers away from a node whose own entry is Barred. It never evicts: what runs there may
//! well run on devices that are well.

use std::collections::BTreeMap;

use berth_crds::{
    AcceleratorNode,
    accelerator_node::{DeviceStatus, NodeHealth},
};
use berth_types::{Admission, DeviceId, DeviceState, Health};
use k8s_openapi::{
    api::core::v1::{NodeCondition, Taint},
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use kube::ResourceExt as _;

/// Type of the condition.
pub const CONDITION: &str = "AcceleratorsHealthy";
/// Key of the taint, and of the taint of single devices where Kubernetes has one.
pub const TAINT: &str = "berth.dev/unhealthy";
/// Devices that the condition's message names.
const NAMED: usize = 4;

/// The condition that a Node should show; `before` is the one it shows.
#[must_use]
pub fn condition(object: &AcceleratorNode, before: Option<&NodeCondition>, now: Timestamp) -> NodeCondition {
    let (status, reason, message) = words(object);
    let since = before.filter(|before| before.status == status).and_then(|before| before.last_transition_time.clone());
    NodeCondition {
        type_: CONDITION.to_owned(),
        status: status.to_owned(),
        reason: Some(reason),
        message: Some(message),
        last_transition_time: since.or(Some(Time(now))),
        last_heartbeat_time: None,
    }
}

/// Whether two conditions say the same, their times left aside.
#[must_use]
pub fn says_the_same(one: Option<&NodeCondition>, other: &NodeCondition) -> bool {
    one.is_some_and(|one| (&one.status, &one.reason, &one.message) == (&other.status, &other.reason, &other.message))
}

fn words(object: &AcceleratorNode) -> (&'static str, String, String) {
    let unknown = |why: &str| ("Unknown", "AgentSilent".to_owned(), why.to_owned());
    let Some(status) = &object.status else { return unknown("no agent has reported this node's devices yet") };
    if status.conditions.iter().any(|condition| condition.type_ == "Reachable" && condition.status == "False") {
        return unknown("the node's agent is not heard");
    }
    if let Some(node) = status.node.as_ref().filter(|node| node.health != Health::Healthy) {
        let reason = node.reason.map_or_else(|| "NodeUnwell".to_owned(), |reason| reason.to_string());
        let word = if node.health == Health::Unknown { "Unknown" } else { "False" };
        return (word, reason, cut(&format!("the node is {}/{}: {}", node.health, node.admission, node.evidence)));
    }
    let mut unwell: Vec<&DeviceStatus> =
        status.devices.iter().filter(|device| device.health != Health::Healthy).collect();
    unwell.sort_by_key(|device| {
        (std::cmp::Reverse((device.health, device.admission, device.action)), device.device.clone())
    });
    let Some(worst) = unwell.first() else {
        return ("True", "AllHealthy".to_owned(), format!("{} devices are healthy", status.devices.len()));
    };
    let reason = worst.reason.map_or_else(|| "DevicesUnwell".to_owned(), |reason| reason.to_string());
    let named: Vec<String> = unwell.iter().take(NAMED).map(|device| sentence(device)).collect();
    let more = unwell.len().saturating_sub(NAMED);
    let more = if more == 0 { String::new() } else { format!("; {more} more") };
    ("False", reason, cut(&format!("{} of {} devices: {}{more}", unwell.len(), status.devices.len(), named.join("; "))))
}

fn sentence(device: &DeviceStatus) -> String {
    let DeviceStatus { device: id, health, admission, action, reason, evidence, .. } = device;
    let reason = reason.map(|reason| reason.as_str()).unwrap_or_default();
    let evidence: String = evidence.chars().take(160).collect();
    format!("{} {health}/{admission}/{action} {reason}: {evidence}", id.local())
}

fn cut(text: &str) -> String {
    text.chars().take(1000).collect()
}

/// The taint that a Node should carry. A node that nobody can see (its driver may just be missing) is only avoided:
/// what installs the driver must be able to land there.
#[must_use]
pub fn taint(object: &AcceleratorNode) -> Option<Taint> {
    let NodeHealth { health, admission, reason, .. } = object.status.as_ref()?.node.as_ref()?;
    let effect = if *health == Health::Unknown { "PreferNoSchedule" } else { "NoSchedule" };
    (*admission == Admission::Barred).then(|| Taint {
        key: TAINT.to_owned(),
        value: reason.map(|reason| reason.to_string()),
        effect: effect.to_owned(),
        time_added: None,
    })
}

/// A change of a device's words, to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Our reason; `Recovered` when nothing is wrong any more.
    pub reason: String,
    /// Whether somebody should look.
    pub warning: bool,
    /// The words, and the vendor's code.
    pub note: String,
}

/// What was said of devices last.
#[derive(Clone, Debug, Default)]
pub struct Spoken(BTreeMap<DeviceId, DeviceState>);

impl Spoken {
    /// Changes since the last call. Of a device that is seen for the first time, what began before `since` is not told.
    pub fn changes(&mut self, object: &AcceleratorNode, since: Timestamp) -> Vec<Change> {
        let Some(status) = &object.status else { return Vec::new() };
        let name = object.name_any();
        self.0.retain(|device, _| device.node() != name || status.devices.iter().any(|known| known.device == *device));
        let mut changes = Vec::new();
        for device in &status.devices {
            let DeviceStatus { health, admission, action, scope, reason, .. } = device;
            let state =
                DeviceState { health: *health, admission: *admission, action: *action, scope: *scope, reason: *reason };
            let before = self.0.insert(device.device.clone(), state);
            let old = before.is_none() && device.since.as_ref().is_none_or(|at| at.0 < since);
            if before == Some(state) || (before.is_none() && (old || state == DeviceState::HEALTHY)) {
                continue;
            }
            let well = *health == Health::Healthy && reason.is_none();
            let reason = if well {
                "Recovered".to_owned()
            } else {
                reason.map_or_else(|| "Changed".to_owned(), |reason| reason.to_string())
            };
            changes.push(Change { reason, warning: *health > Health::Degraded, note: sentence(device) });
        }
        changes
    }
}

/// Lets through so many at once, and so many a second in the long run.
#[derive(Clone, Debug)]
pub struct Bucket {
    room: f64,
    at: std::time::Duration,
}

impl Bucket {
    /// Tokens that a full bucket holds.
    const ROOM: f64 = 50.0;
    /// Tokens that come back in a second.
    const RATE: f64 = 2.0;

    /// A full one.
    #[must_use]
    pub fn full(now: std::time::Duration) -> Self {
        Self { room: Self::ROOM, at: now }
    }

    /// Takes one, if there is one.
    pub fn take(&mut self, now: std::time::Duration) -> bool {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        (self.room, self.at) = ((self.room + passed * Self::RATE).min(Self::ROOM), now);
        let may = self.room >= 1.0;
        self.room -= if may { 1.0 } else { 0.0 };
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::time::Duration;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).unwrap()
    }

    fn object(node: Value, device: Value) -> AcceleratorNode {
        let mut full = json!({"device": "n1/0000:3b:00.0", "vendor": "nvidia", "product": "H100", "memoryBytes": 1,
            "since": "2023-11-14T22:13:20Z", "health": "Healthy", "admission": "Schedulable", "action": "None"});
        full.as_object_mut().unwrap().extend(device.as_object().unwrap().clone());
        let mut status = json!({"bootId": "b", "sequence": 1, "devices": [full]});
        if !node.is_null() {
            status["node"] = node;
        }
        serde_json::from_value(json!({"metadata": {"name": "n1"}, "spec": {}, "status": status})).unwrap()
    }

    fn broken() -> AcceleratorNode {
        object(
            Value::Null,
            json!({"health": "Unhealthy", "admission": "Draining", "action": "ResetDevice", "scope": "Device",
            "reason": "MemoryUncorrectable", "evidence": "Xid 48"}),
        )
    }

    #[test]
    fn the_condition_names_the_worst_and_its_time_moves_with_its_status_alone() {
        let well = condition(&object(Value::Null, json!({})), None, at(0));
        assert_eq!((well.status.as_str(), well.reason.as_deref()), ("True", Some("AllHealthy")));
        let unwell = condition(&broken(), Some(&well), at(9));
        assert_eq!((unwell.status.as_str(), unwell.reason.as_deref()), ("False", Some("MemoryUncorrectable")));
        assert!(
            unwell
                .message
                .as_ref()
                .unwrap()
                .contains("0000:3b:00.0 Unhealthy/Draining/ResetDevice MemoryUncorrectable: Xid 48")
        );
        assert_eq!(unwell.last_transition_time, Some(Time(at(9))));
        let again = condition(&broken(), Some(&unwell), at(20));
        assert!(says_the_same(Some(&unwell), &again) && again.last_transition_time == Some(Time(at(9))));
    }

    #[test]
    fn only_a_barred_node_is_tainted_and_one_that_nobody_can_see_is_merely_avoided() {
        assert_eq!(taint(&broken()), None, "a device alone taints no node");
        let barred = |health: &str, reason: &str| {
            object(json!({"health": health, "admission": "Barred", "action": "None", "reason": reason}), json!({}))
        };
        let lost = taint(&barred("Unhealthy", "FabricLinkDown")).unwrap();
        assert_eq!((lost.effect.as_str(), lost.value.as_deref()), ("NoSchedule", Some("FabricLinkDown")));
        assert_eq!(taint(&barred("Unknown", "AgentBlind")).unwrap().effect, "PreferNoSchedule");
    }

    #[test]
    fn each_change_is_told_once_and_what_was_so_before_is_not() {
        let mut spoken = Spoken::default();
        assert!(spoken.changes(&broken(), at(5)).is_empty(), "it began before");
        assert!(spoken.changes(&broken(), at(5)).is_empty());
        let back = spoken.changes(&object(Value::Null, json!({})), at(5));
        assert_eq!((back[0].reason.as_str(), back[0].warning), ("Recovered", false));
        let told = spoken.changes(&broken(), at(5));
        assert_eq!((told.len(), told[0].reason.as_str(), told[0].warning), (1, "MemoryUncorrectable", true));
        assert!(told[0].note.contains("Xid 48"));
        assert_eq!(Spoken::default().changes(&broken(), at(-5)).len(), 1, "it began after the last leader");
    }

    #[test]
    fn a_storm_of_events_is_let_through_slowly() {
        let mut bucket = Bucket::full(Duration::ZERO);
        let taken = (0..200).filter(|_| bucket.take(Duration::ZERO)).count();
        assert_eq!(taken, 50);
        let later = (0..200).filter(|_| bucket.take(Duration::from_secs(10))).count();
        assert_eq!(later, 20);
    }
}
