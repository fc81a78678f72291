//! Objects in the words of `remediate`: nothing is decided here.

use std::collections::BTreeMap;

use berth_crds::{AcceleratorNode, ExpertPlacement, accelerator_node::DeviceStatus};
use k8s_openapi::api::core::v1::Node;
use kube::ResourceExt as _;

use super::{
    book::CORDON,
    remediate::{DeviceFacts, NodeFacts, PlacementFacts, World},
};

/// Values of another remediator's label that say that it is done.
const DONE: [&str; 3] = ["", "upgrade-done", "remediation-succeeded"];

/// What is so. `others` are the labels by which other remediators say that they have a node in hand.
#[must_use]
pub fn world<'a>(
    accelerators: impl IntoIterator<Item = &'a AcceleratorNode>,
    nodes: &BTreeMap<String, impl AsRef<Node>>,
    placements: impl IntoIterator<Item = &'a ExpertPlacement>,
    others: &[String],
) -> World {
    let node = |object: &AcceleratorNode| {
        let name = object.name_any();
        let facts = node_facts(object, nodes.get(&name).map(AsRef::as_ref), others);
        (name, facts)
    };
    World {
        nodes: accelerators.into_iter().map(node).collect(),
        placements: placements.into_iter().map(placement).collect(),
    }
}

/// One node.
#[must_use]
pub fn node_facts(object: &AcceleratorNode, node: Option<&Node>, others: &[String]) -> NodeFacts {
    let spec = &object.spec;
    let status = object.status.as_ref();
    let devices = status.map(|status| status.devices.as_slice()).unwrap_or_default();
    let conditions = status.map(|status| status.conditions.as_slice()).unwrap_or_default();
    let fates = status.map(|status| status.orders.as_slice()).unwrap_or_default();
    let ours = spec.cordoned_devices.iter().filter(|cordoned| cordoned.reason.starts_with(CORDON));
    NodeFacts {
        native: spec.native && spec.held_by.is_empty(),
        domain: if spec.rack.is_empty() { object.name_any() } else { spec.rack.clone() },
        other: node.and_then(|node| in_hand(node, others)),
        silent: conditions.iter().any(|condition| condition.type_ == "Reachable" && condition.status == "False"),
        devices: devices.iter().map(|device| (device.device.clone(), device_facts(device))).collect(),
        cordons: ours.map(|cordoned| cordoned.device.clone()).collect(),
        orders: spec.orders.iter().map(|order| order.id.clone()).collect(),
        fates: fates.iter().map(|fate| (fate.id.clone(), (fate.phase, fate.message.clone()))).collect(),
        unclear: fates.iter().filter(|fate| fate.outcome_unknown).map(|fate| fate.id.clone()).collect(),
    }
}

/// Who else has a node in hand: another remediator by its label, or a person by Kubernetes' own cordon.
fn in_hand(node: &Node, others: &[String]) -> Option<String> {
    let label = |key: &String| {
        let value = node.labels().get(key).filter(|value| !DONE.contains(&value.as_str()))?;
        Some(format!("{key}={value}"))
    };
    let cordoned = node.spec.as_ref().is_some_and(|spec| spec.unschedulable == Some(true));
    others.iter().find_map(label).or_else(|| cordoned.then(|| "it is cordoned (spec.unschedulable)".to_owned()))
}

fn device_facts(device: &DeviceStatus) -> DeviceFacts {
    let DeviceStatus { vendor, product, reset_group, health, admission, action, reason, evidence, holds, .. } = device;
    let reason = reason.map(|reason| reason.as_str()).unwrap_or_default();
    DeviceFacts {
        pool: format!("{vendor}/{product}"),
        group: reset_group.clone(),
        health: *health,
        admission: *admission,
        action: *action,
        why: format!("{reason} ({})", evidence.chars().take(200).collect::<String>()),
        holds: !holds.is_empty(),
    }
}

fn placement(object: &ExpertPlacement) -> PlacementFacts {
    let assignment = object.status.as_ref().and_then(|status| status.assignment.as_ref());
    PlacementFacts {
        name: format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any()),
        paused: object.spec.paused,
        devices: assignment.map(|assignment| assignment.devices.iter().cloned().collect()).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_types::{Action, Admission};
    use serde_json::json;

    fn object() -> AcceleratorNode {
        serde_json::from_value(json!({
            "metadata": {"name": "npu-12"},
            "spec": {"native": true, "rack": "r7",
                "cordonedDevices": [{"device": "npu-12/0.0", "reason": "remediation a: x"}, {"device": "npu-12/0.1", "reason": "swap"}],
                "orders": [{"id": "a", "device": "npu-12/0.0", "action": "ResetGroup", "deadline": "2026-01-01T00:00:00Z"}]},
            "status": {"bootId": "b", "sequence": 1,
                "orders": [{"id": "a", "device": "npu-12/0.0", "action": "ResetGroup", "phase": "Started"}],
                "devices": [{"device": "npu-12/0.0", "vendor": "ascend", "product": "910_9392", "memoryBytes": 1, "resetGroup": "module 0",
                    "health": "Unhealthy", "admission": "Barred", "action": "ResetGroup", "reason": "DeviceLost",
                    "evidence": "0x40F84E00", "holds": ["models/a"]}]},
        }))
        .unwrap()
    }

    #[test]
    fn objects_become_facts() {
        let facts = node_facts(&object(), None, &[]);
        assert!(facts.native && facts.domain == "r7" && facts.other.is_none() && !facts.silent);
        assert_eq!(facts.cordons.len(), 1, "a person's cordon is none of ours");
        assert_eq!(facts.fates["a"].0, berth_crds::accelerator_node::OrderPhase::Started);
        let device = facts.devices.values().next().unwrap();
        assert_eq!(
            (device.pool.as_str(), device.admission, device.action),
            ("ascend/910_9392", Admission::Barred, Action::ResetGroup)
        );
        assert!(device.holds && device.why == "DeviceLost (0x40F84E00)");
    }

    #[test]
    fn another_remediator_s_label_counts_until_it_says_that_it_is_done() {
        let node = |value: &str| -> Node {
            serde_json::from_value(
                json!({"metadata": {"name": "n", "labels": {"dgxc.nvidia.com/nvsentinel-state": value}}}),
            )
            .unwrap()
        };
        let others = ["dgxc.nvidia.com/nvsentinel-state".to_owned()];
        assert!(in_hand(&node("draining"), &others).unwrap().contains("nvsentinel-state=draining"));
        assert_eq!(in_hand(&node("remediation-succeeded"), &others), None);
        let cordoned: Node =
            serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": {"unschedulable": true}})).unwrap();
        assert!(in_hand(&cordoned, &[]).unwrap().contains("unschedulable"));
    }
}
