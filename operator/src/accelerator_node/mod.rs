//! One pass over one node: its label becomes `spec.native` and a taint, its cordon a drain, its labels a
//! rack, what remediation remembers its device cordons and orders, its agent's report a condition and a taint. Writes
//! AcceleratorNode.spec, our own condition and our own taints; never makes an AcceleratorNode (its agent does) and touches
//! no taint, condition or cordon of others.

pub mod book;
pub mod device_taints;
pub mod facts;
pub mod remediate;
#[cfg(test)]
mod remediate_tests;
pub mod remediation;
pub mod signs;
pub mod world;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use berth_crds::{
    AcceleratorNode, AcceleratorNodeSpec, LABEL_MODE, LABEL_RACK, TAINT_NATIVE,
    accelerator_node::{CordonedDevice, Holder, Order},
    managers,
};
use berth_types::{Action as Step, DeviceId};
use k8s_openapi::{
    api::core::v1::{Node, Pod, Taint},
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use kube::{
    Resource, ResourceExt,
    api::ListParams,
    runtime::{
        controller::Action,
        events::{Event, EventType},
    },
};
use serde_json::{Value, json};

use book::{Book, CORDON, Phase};
use world::NodeFacts;

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
    let (mut wanted, taints) = decide(node, accelerators.as_deref(), holders, context.remediation.signs);
    if let Some(taints) = taints {
        let body = json!({
            "metadata": {"resourceVersion": node.resource_version()},
            "spec": {"taints": taints},
        });
        context.writes.merge(&context.writes.everywhere::<Node>(), &name, &body).await?;
    }
    let Some(accelerators) = accelerators else { return Ok(Action::await_change()) };
    let book = context.book.borrow().clone();
    let facts = facts::node_facts(&accelerators, Some(node), &context.remediation.others);
    (wanted.cordoned_devices, wanted.orders) = remedies(&accelerators, &facts, book.as_deref());
    let needs = needs(&accelerators);
    if wanted != ours(&accelerators.spec)
        || NEEDS.iter().any(|(key, _)| accelerators.annotations().get(*key) != needs.get(*key))
    {
        write(&accelerators, &wanted, &needs, context).await?;
    }
    if context.remediation.signs {
        sign(node, &accelerators, context).await?;
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
        let mut held = BTreeMap::<&str, u64>::new();
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
    signs: bool,
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
    let (ours, mut others): (Vec<Taint>, Vec<Taint>) =
        taints.into_iter().partition(|taint| [TAINT_NATIVE, signs::TAINT].contains(&taint.key.as_str()));
    let native = wants.then(|| Taint {
        key: TAINT_NATIVE.to_owned(),
        effect: "NoSchedule".to_owned(),
        value: None,
        time_added: None,
    });
    let unhealthy = accelerators.filter(|_| signs).and_then(signs::taint);
    let should: Vec<Taint> = native.into_iter().chain(unhealthy).collect();
    let same =
        |one: &Taint, other: &Taint| (&one.key, &one.value, &one.effect) == (&other.key, &other.value, &other.effect);
    let as_it_should =
        ours.len() == should.len() && should.iter().all(|taint| ours.iter().any(|there| same(there, taint)));
    if as_it_should {
        return (wanted, None);
    }
    others.extend(should);
    (wanted, Some(others))
}

/// Device cordons and orders that follow from what remediation remembers. A person's own cordon is left as it is. While a
/// new leader has not read the book yet, what the last one wrote stays: an order that vanished would count as taken back.
fn remedies(object: &AcceleratorNode, facts: &NodeFacts, book: Option<&Book>) -> (Vec<CordonedDevice>, Vec<Order>) {
    let Some(book) = book else {
        let AcceleratorNodeSpec { cordoned_devices, orders, .. } = ours(&object.spec);
        return (cordoned_devices, orders);
    };
    let name = object.name_any();
    let (mut cordons, mut orders) = (Vec::new(), Vec::new());
    for (id, operation) in book.operations.iter().filter(|(_, operation)| operation.node() == name) {
        let by_hand = |device: &DeviceId| {
            let mut others = object.spec.cordoned_devices.iter().filter(|other| !other.reason.starts_with(CORDON));
            others.any(|other| other.device == *device)
        };
        let reason = format!("{CORDON}{id}: {} for {}", operation.action, operation.why);
        let reason: String = reason.chars().take(500).collect();
        let cordoned = operation.cordons(facts).filter(|device| !by_hand(device));
        cordons.extend(cordoned.map(|device| CordonedDevice { device: device.clone(), reason: reason.clone() }));
        let deadline = Timestamp::from_second(operation.deadline);
        if let (Phase::Ordered, false, Ok(deadline)) = (operation.phase, operation.recalled(id, facts), deadline) {
            orders.push(Order {
                id: id.clone(),
                device: operation.device.clone(),
                action: operation.action,
                deadline: Time(deadline),
                reason: operation.why.chars().take(500).collect(),
            });
        }
    }
    cordons.sort_by(|one, other| one.device.cmp(&other.device));
    (cordons, orders)
}

/// Annotations by which a person, or what does such things in the cluster, sees what Berth cannot do.
const NEEDS: [(&str, Step); 2] =
    [("berth.dev/service-needed", Step::ServiceHardware), ("berth.dev/reboot-needed", Step::RebootNode)];

/// What devices need that no order brings: device, reason and code.
fn needs(object: &AcceleratorNode) -> BTreeMap<String, String> {
    let devices = object.status.as_ref().map(|status| status.devices.as_slice()).unwrap_or_default();
    let text = |step: Step| {
        let wanting = devices.iter().filter(|device| device.action == step).map(|device| {
            let reason = device.reason.map(|reason| reason.as_str()).unwrap_or_default();
            let evidence: String = device.evidence.chars().take(120).collect();
            format!("{} {reason} ({evidence})", device.device.local())
        });
        wanting.collect::<Vec<_>>().join("; ")
    };
    let all = NEEDS.iter().map(|(key, step)| ((*key).to_owned(), text(*step)));
    all.filter(|(_, text)| !text.is_empty()).collect()
}

/// Shows the node's devices as a condition of the Node.
async fn sign(node: &Node, object: &AcceleratorNode, context: &Context) -> Result<(), NodeError> {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    let before = conditions.and_then(|all| all.iter().find(|condition| condition.type_ == signs::CONDITION));
    let wanted = signs::condition(object, before, crate::timestamp(&context.clock));
    if signs::says_the_same(before, &wanted) {
        return Ok(());
    }
    let body = json!({"status": {"conditions": [wanted]}});
    Ok(context.writes.merge_status(&context.writes.everywhere::<Node>(), &node.name_any(), &body).await?)
}

/// The fields of `spec` that this driver writes.
fn ours(spec: &AcceleratorNodeSpec) -> AcceleratorNodeSpec {
    let AcceleratorNodeSpec { native, drain, rack, held_by, mut cordoned_devices, orders } = spec.clone();
    cordoned_devices.retain(|cordoned| cordoned.reason.starts_with(CORDON));
    cordoned_devices.sort_by(|one, other| one.device.cmp(&other.device));
    AcceleratorNodeSpec { native, drain, rack, held_by, cordoned_devices, orders }
}

async fn write(
    accelerators: &AcceleratorNode,
    wanted: &AcceleratorNodeSpec,
    needs: &BTreeMap<String, String>,
    context: &Context,
) -> Result<(), NodeError> {
    let name = accelerators.name_any();
    let spec = serde_json::to_value(wanted).unwrap_or(Value::Null);
    // With the uid, a spec never makes the object again after it was deleted.
    let metadata = json!({"name": name, "uid": accelerators.uid(), "annotations": needs});
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
        let (wanted, taints) = decide(&labelled, None, Vec::new(), true);
        assert!(wanted.native && !wanted.drain && wanted.rack == "r7");
        let keys: Vec<_> = taints.unwrap().into_iter().map(|taint| taint.key).collect();
        assert_eq!(keys, ["other", TAINT_NATIVE]);
    }

    #[test]
    fn a_labelled_node_that_is_not_free_is_tainted_but_hosts_nothing() {
        let labelled = node(json!({"metadata": {"name": "n1", "labels": {LABEL_MODE: "native"}}}));
        let (wanted, taints) = decide(&labelled, None, vec![holder()], true);
        assert!(!wanted.native && wanted.held_by == [holder()] && taints.is_some());
        assert!(event(&wanted).note.unwrap().contains("ml/train-0 4 of nvidia.com/gpu"));
    }

    #[test]
    fn removing_the_label_removes_only_our_taint() {
        let plain = node(json!({"metadata": {"name": "n1"},
            "spec": {"taints": [{"key": TAINT_NATIVE, "effect": "NoSchedule"}, {"key": "other", "effect": "NoExecute"}]}}));
        let (wanted, taints) = decide(&plain, Some(&hosting()), Vec::new(), true);
        assert!(!wanted.native);
        assert_eq!(taints.unwrap().len(), 1);
    }

    #[test]
    fn a_cordoned_node_drains_and_an_uncordoned_one_does_not() {
        for unschedulable in [true, false] {
            let cordoned = node(json!({"metadata": {"name": "n1", "labels": {LABEL_MODE: "native"}},
                "spec": {"unschedulable": unschedulable, "taints": [{"key": TAINT_NATIVE, "effect": "NoSchedule"}]}}));
            let (wanted, taints) = decide(&cordoned, Some(&hosting()), Vec::new(), true);
            assert_eq!((wanted.drain, wanted.native, taints), (unschedulable, true, None));
        }
    }

    #[test]
    fn a_leader_that_has_not_read_the_book_leaves_what_the_last_one_ordered() {
        let mut object = hosting();
        let by_hand = CordonedDevice { device: "n1/1".parse().unwrap(), reason: "swap".to_owned() };
        let ordered = CordonedDevice { device: "n1/0".parse().unwrap(), reason: format!("{CORDON}a: x") };
        object.spec.cordoned_devices = vec![by_hand, ordered.clone()];
        let deadline = Time(Timestamp::UNIX_EPOCH);
        let device = ordered.device.clone();
        object.spec.orders =
            vec![Order { id: "a".to_owned(), device, action: Step::ResetDevice, deadline, reason: String::new() }];
        let facts = facts::node_facts(&object, None, &[]);
        let unread = remedies(&object, &facts, None);
        assert_eq!(unread, (vec![ordered], object.spec.orders.clone()));
        assert_eq!(remedies(&object, &facts, Some(&Book::default())), (Vec::new(), Vec::new()), "read, and it is over");
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
