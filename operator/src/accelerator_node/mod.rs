//! One pass over one node: its label becomes `spec.native` and a taint, its cordon a drain, its labels a
//! rack. Writes AcceleratorNode.spec and our own taint; never makes an AcceleratorNode (its agent does) and
//! touches no taint of others.

use std::{sync::Arc, time::Duration};

use berth_crds::{
    AcceleratorNode, AcceleratorNodeSpec, LABEL_MODE, LABEL_RACK, TAINT_NATIVE, accelerator_node::Holder, managers,
};
use k8s_openapi::api::core::v1::{Node, Pod, Taint};
use kube::{
    Resource, ResourceExt,
    api::ListParams,
    runtime::{
        controller::Action,
        events::{Event, EventType},
    },
};
use serde_json::{Value, json};

use crate::{
    Context,
    error::{Category, WriteError},
    model_deployment::RESYNC,
};

/// How often a node that is labelled, yet not free, is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(15);
/// Longest wait for the list of a node's pods.
const LIST_LIMIT: Duration = Duration::from_secs(10);
/// Extended resources by which other plugins give out devices that Berth could host on.
const DEVICE_RESOURCES: [&str; 2] = ["nvidia.com/", "huawei.com/"];

/// Why a pass did not reach its end.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The pods of the node could not be read.
    #[error("listing the pods of node {node}: {source}")]
    Pods {
        /// The node.
        node: String,
        /// Why.
        source: Box<kube::Error>,
    },
    /// The pods of the node were not listed in time.
    #[error("listing the pods of node {node}: no answer within {LIST_LIMIT:?}")]
    Late {
        /// The node.
        node: String,
    },
    /// A write was refused.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl NodeError {
    /// What to do about it.
    #[must_use]
    pub fn category(&self) -> Category {
        match self {
            Self::Pods { .. } | Self::Late { .. } => Category::Transient,
            Self::Write(error) => error.category(),
        }
    }
}

/// One pass over the node `node`; its AcceleratorNode may not exist yet.
///
/// # Errors
/// [`NodeError`].
pub async fn reconcile(node: &Arc<Node>, context: &Context) -> Result<Action, NodeError> {
    let name = node.name_any();
    let accelerators = context.stores.accelerators.find(|object| object.name_any() == name);
    let is_native = accelerators.as_ref().is_some_and(|object| object.spec.native);
    let holders = if wants_native(node) && !is_native { holders(&name, context).await? } else { Vec::new() };
    let (wanted, taints) = decide(node, accelerators.as_deref(), holders);
    if let Some(taints) = taints {
        let body = json!({
            "metadata": {"resourceVersion": node.resource_version()},
            "spec": {"taints": taints},
        });
        context.writes.merge(&context.writes.everywhere::<Node>(), &name, &body).await?;
    }
    let Some(accelerators) = accelerators else { return Ok(Action::await_change()) };
    if wanted != ours(&accelerators.spec) {
        write(&accelerators, &wanted, context).await?;
    }
    Ok(Action::requeue(if wanted.held_by.is_empty() { RESYNC } else { LOOK_AGAIN }))
}

/// The admin's opt-in.
fn wants_native(node: &Node) -> bool {
    node.labels().get(LABEL_MODE).is_some_and(|mode| mode == "native")
}

/// Pods that hold devices of the node through other plugins.
async fn holders(node: &str, context: &Context) -> Result<Vec<Holder>, NodeError> {
    let parameters = ListParams::default().fields(&format!("spec.nodeName={node}"));
    let pods = context.writes.everywhere::<Pod>();
    let listed = context.clock.timeout(LIST_LIMIT, pods.list(&parameters)).await;
    let listed = listed.map_err(|_| NodeError::Late { node: node.to_owned() })?;
    let listed = listed.map_err(|source| NodeError::Pods { node: node.to_owned(), source: Box::new(source) })?;
    Ok(held_by(&listed.items))
}

fn held_by(pods: &[Pod]) -> Vec<Holder> {
    let mut holders = Vec::new();
    for pod in pods {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
        if matches!(phase, "Succeeded" | "Failed") {
            continue;
        }
        let mut held = std::collections::BTreeMap::<&str, u64>::new();
        for container in pod.spec.iter().flat_map(|spec| &spec.containers) {
            let resources = container.resources.as_ref();
            let limits = resources.and_then(|resources| resources.limits.as_ref().or(resources.requests.as_ref()));
            for (resource, quantity) in limits.into_iter().flatten() {
                if DEVICE_RESOURCES.iter().any(|prefix| resource.starts_with(prefix)) {
                    // Extended resources are whole numbers.
                    *held.entry(resource).or_default() += quantity.0.parse::<u64>().unwrap_or(1);
                }
            }
        }
        let pod = format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any());
        let of = |(resource, devices): (&str, u64)| Holder { pod: pod.clone(), resource: resource.to_owned(), devices };
        holders.extend(held.into_iter().filter(|(_, devices)| *devices > 0).map(of));
    }
    holders.sort_by(|a, b| (&a.pod, &a.resource).cmp(&(&b.pod, &b.resource)));
    holders.truncate(256);
    holders
}

/// What the spec should say of the fields that this driver writes, and the node's taints, if they should
/// change. A node that hosts goes on hosting when a pod takes devices behind the taint's back.
fn decide(
    node: &Node,
    accelerators: Option<&AcceleratorNode>,
    holders: Vec<Holder>,
) -> (AcceleratorNodeSpec, Option<Vec<Taint>>) {
    let wants = wants_native(node);
    let hosts = accelerators.is_some_and(|object| object.spec.native);
    let label = |key: &str| node.labels().get(key).cloned();
    let wanted = AcceleratorNodeSpec {
        native: wants && (hosts || holders.is_empty()),
        drain: node.spec.as_ref().is_some_and(|spec| spec.unschedulable == Some(true)),
        rack: label(LABEL_RACK).or_else(|| label("topology.kubernetes.io/rack")).unwrap_or_default(),
        held_by: if wants && !hosts { holders } else { Vec::new() },
        cordoned_devices: Vec::new(),
        orders: Vec::new(),
    };
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
    let (ours, mut others): (Vec<Taint>, Vec<Taint>) = taints.into_iter().partition(|taint| taint.key == TAINT_NATIVE);
    if wants != ours.is_empty() {
        return (wanted, None);
    }
    if wants {
        others.push(Taint {
            key: TAINT_NATIVE.to_owned(),
            effect: "NoSchedule".to_owned(),
            value: None,
            time_added: None,
        });
    }
    (wanted, Some(others))
}

/// The fields of `spec` that this driver writes.
fn ours(spec: &AcceleratorNodeSpec) -> AcceleratorNodeSpec {
    let AcceleratorNodeSpec { native, drain, rack, held_by, cordoned_devices: _, orders: _ } = spec.clone();
    AcceleratorNodeSpec { native, drain, rack, held_by, ..AcceleratorNodeSpec::default() }
}

async fn write(
    accelerators: &AcceleratorNode,
    wanted: &AcceleratorNodeSpec,
    context: &Context,
) -> Result<(), NodeError> {
    let name = accelerators.name_any();
    let spec = serde_json::to_value(wanted).unwrap_or(Value::Null);
    // With the uid, a spec never makes the object again after it was deleted.
    let metadata = json!({"name": name, "uid": accelerators.uid()});
    let api = context.writes.everywhere::<AcceleratorNode>();
    context.writes.apply_value(&api, &name, json!({"metadata": metadata, "spec": spec})).await?;
    if wanted.held_by != accelerators.spec.held_by || wanted.native != accelerators.spec.native {
        let reference = accelerators.object_ref(&());
        context.writes.tell(&reference, &event(wanted)).await;
    }
    Ok(())
}

fn event(wanted: &AcceleratorNodeSpec) -> Event {
    let (type_, reason, note) = match (wanted.native, wanted.held_by.first()) {
        (true, _) => (EventType::Normal, "Hosting", "the node hosts experts".to_owned()),
        (false, Some(first)) => {
            let note = format!(
                "labelled {LABEL_MODE}=native, but not free: {} pods hold devices, {} {} of {}: end them, and it hosts",
                wanted.held_by.len(),
                first.pod,
                first.devices,
                first.resource
            );
            (EventType::Warning, "NotFree", note)
        }
        (false, None) => (EventType::Normal, "NotHosting", "the node hosts no experts".to_owned()),
    };
    let action = managers::OPERATOR.to_owned();
    Event { type_, reason: reason.to_owned(), note: Some(note), action, secondary: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(value: Value) -> Node {
        serde_json::from_value(value).unwrap()
    }

    fn hosting() -> AcceleratorNode {
        AcceleratorNode::new("n1", AcceleratorNodeSpec { native: true, ..AcceleratorNodeSpec::default() })
    }

    fn holder() -> Holder {
        Holder { pod: "ml/train-0".to_owned(), resource: "nvidia.com/gpu".to_owned(), devices: 4 }
    }

    #[test]
    fn label_makes_a_free_node_native_and_adds_only_our_taint() {
        let labelled = node(json!({"metadata": {"name": "n1", "labels": {LABEL_MODE: "native", LABEL_RACK: "r7"}},
            "spec": {"taints": [{"key": "other", "effect": "NoExecute"}]}}));
        let (wanted, taints) = decide(&labelled, None, Vec::new());
        assert!(wanted.native && !wanted.drain && wanted.rack == "r7");
        let keys: Vec<_> = taints.unwrap().into_iter().map(|taint| taint.key).collect();
        assert_eq!(keys, ["other", TAINT_NATIVE]);
    }

    #[test]
    fn a_labelled_node_that_is_not_free_is_tainted_but_hosts_nothing() {
        let labelled = node(json!({"metadata": {"name": "n1", "labels": {LABEL_MODE: "native"}}}));
        let (wanted, taints) = decide(&labelled, None, vec![holder()]);
        assert!(!wanted.native && wanted.held_by == [holder()] && taints.is_some());
        assert!(event(&wanted).note.unwrap().contains("ml/train-0 4 of nvidia.com/gpu"));
    }

    #[test]
    fn removing_the_label_removes_only_our_taint() {
        let plain = node(json!({"metadata": {"name": "n1"},
            "spec": {"taints": [{"key": TAINT_NATIVE, "effect": "NoSchedule"}, {"key": "other", "effect": "NoExecute"}]}}));
        let (wanted, taints) = decide(&plain, Some(&hosting()), Vec::new());
        assert!(!wanted.native);
        assert_eq!(taints.unwrap().len(), 1);
    }

    #[test]
    fn a_cordoned_node_drains_and_an_uncordoned_one_does_not() {
        for unschedulable in [true, false] {
            let cordoned = node(json!({"metadata": {"name": "n1", "labels": {LABEL_MODE: "native"}},
                "spec": {"unschedulable": unschedulable, "taints": [{"key": TAINT_NATIVE, "effect": "NoSchedule"}]}}));
            let (wanted, taints) = decide(&cordoned, Some(&hosting()), Vec::new());
            assert_eq!((wanted.drain, wanted.native, taints), (unschedulable, true, None));
        }
    }

    #[test]
    fn only_pods_that_run_and_hold_devices_are_holders() {
        let pod = |name: &str, phase: &str, resource: &str| -> Pod {
            serde_json::from_value(json!({"metadata": {"name": name, "namespace": "ml"}, "status": {"phase": phase},
                "spec": {"containers": [{"name": "c", "resources": {"limits": {resource: "4"}}}]}}))
            .unwrap()
        };
        let pods = [
            pod("train-0", "Running", "nvidia.com/gpu"),
            pod("done", "Succeeded", "nvidia.com/gpu"),
            pod("web", "Running", "cpu"),
        ];
        assert_eq!(held_by(&pods), [holder()]);
    }
}
