//! `berth status`: what serves, what does not, and what wants attention, from objects alone. `view` and `text` are
//! pure; only `run` talks to a cluster, and it writes nothing.

mod attention;

use std::collections::BTreeSet;

use anyhow::bail;
use berth_crds::{
    AcceleratorNode, CapacityQueue, ExpertPlacement, LABEL_DEPLOYMENT, ModelDeployment,
    conditions::{ConditionType, is_true},
    expert_placement::{PlanCertificate, PlanDecision},
};
use clap::Args;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;
use serde::Serialize;

pub(crate) use attention::Attention;

use crate::{
    cluster::{Cluster, ClusterArgs},
    table::{Table, age, count},
    verdict::Verdict,
};

/// What serves, what does not, and what wants attention. Exit code 1 if anything does.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// One ModelDeployment, with its conditions; by default all.
    name: Option<String>,
    #[command(flatten)]
    cluster: ClusterArgs,
}

/// The objects that a status is made of.
#[derive(Debug, Default)]
pub(crate) struct Objects {
    /// Where deployments and placements were looked for; `None` = everywhere.
    pub(crate) namespace: Option<String>,
    pub(crate) deployments: Vec<ModelDeployment>,
    pub(crate) placements: Vec<ExpertPlacement>,
    pub(crate) nodes: Vec<AcceleratorNode>,
    pub(crate) queues: Vec<CapacityQueue>,
}

/// What `-o json` writes. Fields are only ever added.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct StatusView {
    schema: &'static str,
    /// Where was looked; `null` = everywhere.
    namespace: Option<String>,
    /// Nothing wants attention.
    pub(crate) healthy: bool,
    deployments: Vec<DeploymentRow>,
    instances: Vec<InstanceRow>,
    nodes: Vec<NodeRow>,
    queues: Vec<QueueRow>,
    attention: Vec<Attention>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct DeploymentRow {
    namespace: String,
    name: String,
    ready: String,
    instances: String,
    pools: String,
    phase: String,
    reason: String,
    message: String,
    age_seconds: Option<i64>,
    /// Only for a deployment that was asked for by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    conditions: Vec<ConditionRow>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct ConditionRow {
    kind: String,
    status: String,
    reason: String,
    message: String,
    age_seconds: i64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct InstanceRow {
    namespace: String,
    name: String,
    deployment: String,
    state: &'static str,
    revision: u64,
    serving_revision: u64,
    slots_ready: u64,
    slots_total: u64,
    balancedness: Option<f64>,
    experts_lost: u64,
    devices: usize,
    nodes: usize,
    why: String,
    certificate: Option<PlanCertificate>,
    /// The newest first.
    decisions: Vec<PlanDecision>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeRow {
    name: String,
    native: bool,
    vendor: String,
    product: String,
    devices: u32,
    healthy: u32,
    schedulable: u32,
    reachable: bool,
    action: String,
    reason: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct QueueRow {
    name: String,
    quota: u32,
    used: u32,
    borrowed: u32,
    waiting: u32,
    priority: i32,
}

/// Reads the objects and writes the status.
pub(crate) fn run(args: &StatusArgs) -> anyhow::Result<Verdict> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let cluster = Cluster::connect(&args.cluster).await?;
        let objects = Objects {
            namespace: cluster.namespace.clone(),
            deployments: cluster.list().await?,
            placements: cluster.list().await?,
            nodes: cluster.list_all().await?,
            queues: cluster.list_all().await?,
        };
        let known: Vec<String> = objects.deployments.iter().map(ResourceExt::name_any).collect();
        if let Some(name) = args.name.as_ref().filter(|name| !known.contains(name)) {
            let place =
                cluster.namespace.map_or_else(|| "any namespace".to_owned(), |name| format!("namespace {name}"));
            let others = if known.is_empty() { "none at all".to_owned() } else { known.join(", ") };
            bail!("no ModelDeployment {name:?} in {place} (there are: {others}): choose with -n, or see -A");
        }
        let view = view(&objects, args.name.as_deref(), cluster.now());
        args.cluster.output.write(&view, text)?;
        Ok(view.healthy.into())
    })
}

/// The status at `now` (seconds since 1970), of one deployment and what it uses if `name` is given.
pub(crate) fn view(objects: &Objects, name: Option<&str>, now: i64) -> StatusView {
    let asked = |object: &str| name.is_none_or(|name| name == object);
    let deployments: Vec<_> = objects.deployments.iter().filter(|one| asked(&one.name_any())).collect();
    let placements: Vec<_> = objects.placements.iter().filter(|one| asked(&deployment_of(one))).collect();
    let used: BTreeSet<&str> = placements.iter().flat_map(|one| devices_of(one)).map(|device| device.node()).collect();
    let nodes: Vec<_> =
        objects.nodes.iter().filter(|node| name.is_none() || used.contains(node.name_any().as_str())).collect();
    let attention = attention::attention(&deployments, &placements, &nodes);
    StatusView {
        schema: "berth.dev/status/v1",
        namespace: objects.namespace.clone(),
        healthy: attention.is_empty(),
        deployments: deployments.iter().map(|one| deployment_row(one, name.is_some(), now)).collect(),
        instances: placements.iter().map(|one| instance_row(one)).collect(),
        nodes: nodes.iter().map(|node| node_row(node)).collect(),
        queues: objects.queues.iter().filter(|_| name.is_none()).map(queue_row).collect(),
        attention,
    }
}

/// The status for people.
pub(crate) fn text(view: &StatusView) -> String {
    let StatusView { schema: _, namespace, healthy: _, deployments, instances, nodes, queues, attention } = view;
    let ready = deployments.iter().filter(|row| row.ready == "True").count();
    let (devices, well) = nodes.iter().fold((0, 0), |(all, well), row| (all + row.devices, well + row.healthy));
    let lost: u64 = instances.iter().map(|row| row.experts_lost).sum();
    let mut head = match (deployments.len(), namespace) {
        (0, None) => "no ModelDeployment: apply one".to_owned(),
        (0, Some(namespace)) => format!("no ModelDeployment in namespace {namespace}: see -A, or apply one"),
        (all, _) => format!("{ready} of {} ready, {lost} experts without a live replica", count(all, "deployment")),
    };
    if devices > 0 {
        head.push_str(&format!("; {well} of {devices} devices healthy"));
    }
    let mut sections = vec![head + "\n"];
    if !deployments.is_empty() {
        sections.push(deployment_table(deployments));
    }
    sections.extend(deployments.iter().filter(|row| !row.conditions.is_empty()).map(condition_table));
    if !instances.is_empty() {
        sections.push(instance_table(instances));
    }
    if !nodes.is_empty() {
        sections.push(node_table(nodes));
    }
    if !queues.is_empty() {
        sections.push(queue_table(queues));
    }
    sections.push(attention::text(attention));
    sections.join("\n")
}

fn deployment_table(rows: &[DeploymentRow]) -> String {
    let mut table = Table::new(&["DEPLOYMENT", "READY", "INSTANCES", "POOLS", "PHASE", "REASON", "AGE"]);
    for row in rows {
        let DeploymentRow { namespace, name, ready, instances, pools, phase, reason, age_seconds, .. } = row;
        let cells = [ready, instances, pools, phase, reason].map(Clone::clone);
        let [ready, instances, pools, phase, reason] = cells;
        let age = age_seconds.map_or_else(String::new, age);
        table.row([format!("{namespace}/{name}"), ready, instances, pools, phase, reason, age]);
    }
    table.to_string()
}

fn condition_table(row: &DeploymentRow) -> String {
    let mut table = Table::new(&["CONDITION", "STATUS", "SINCE", "REASON", "MESSAGE"]);
    for ConditionRow { kind, status, reason, message, age_seconds } in &row.conditions {
        table.row([kind.clone(), status.clone(), age(*age_seconds), reason.clone(), message.clone()]);
    }
    table.to_string()
}

fn instance_table(rows: &[InstanceRow]) -> String {
    let head = ["INSTANCE", "STATE", "REV", "SLOTS", "BALANCE", "LOST", "DEVICES", "NODES", "WHY THIS REVISION"];
    let mut table = Table::new(&head);
    for row in rows {
        table.row([
            format!("{}/{}", row.namespace, row.name),
            row.state.to_owned(),
            revisions(row.revision, row.serving_revision),
            format!("{}/{}", row.slots_ready, row.slots_total),
            row.balancedness.map_or_else(String::new, |share| format!("{share:.2}")),
            row.experts_lost.to_string(),
            row.devices.to_string(),
            row.nodes.to_string(),
            row.why.clone(),
        ]);
    }
    table.to_string()
}

/// `7`, or `6 -> 7` while 7 is not served yet.
fn revisions(assigned: u64, serving: u64) -> String {
    match (assigned, serving) {
        (0, _) => String::new(),
        (assigned, serving) if assigned == serving => assigned.to_string(),
        (assigned, serving) => format!("{serving} -> {assigned}"),
    }
}

fn node_table(rows: &[NodeRow]) -> String {
    let head = ["NODE", "HOSTS", "VENDOR", "PRODUCT", "DEVICES", "HEALTHY", "SCHEDULABLE", "HEARD", "ACTION", "REASON"];
    let mut table = Table::new(&head);
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    for row in rows {
        table.row([
            row.name.clone(),
            yes(row.native),
            row.vendor.clone(),
            row.product.clone(),
            row.devices.to_string(),
            row.healthy.to_string(),
            row.schedulable.to_string(),
            yes(row.reachable),
            row.action.clone(),
            row.reason.clone(),
        ]);
    }
    table.to_string()
}

fn queue_table(rows: &[QueueRow]) -> String {
    let mut table = Table::new(&["QUEUE", "QUOTA", "USED", "BORROWED", "WAITING", "PRIORITY"]);
    for QueueRow { name, quota, used, borrowed, waiting, priority } in rows {
        let [quota, used, borrowed, waiting] = [quota, used, borrowed, waiting].map(ToString::to_string);
        table.row([name.clone(), quota, used, borrowed, waiting, priority.to_string()]);
    }
    table.to_string()
}

fn deployment_row(object: &ModelDeployment, conditions: bool, now: i64) -> DeploymentRow {
    let status = object.status.clone().unwrap_or_default();
    let row = |condition: &Condition| ConditionRow {
        kind: condition.type_.clone(),
        status: condition.status.clone(),
        reason: condition.reason.clone(),
        message: condition.message.clone(),
        age_seconds: now.saturating_sub(condition.last_transition_time.0.as_second()),
    };
    DeploymentRow {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
        ready: state_of(&status.conditions, ConditionType::Ready),
        instances: status.summary.instances,
        pools: status.summary.pools,
        phase: status.phase,
        reason: status.summary.reason,
        message: status.summary.message,
        age_seconds: object.creation_timestamp().map(|then| now.saturating_sub(then.0.as_second())),
        conditions: if conditions { status.conditions.iter().map(row).collect() } else { Vec::new() },
    }
}

fn instance_row(object: &ExpertPlacement) -> InstanceRow {
    let status = object.status.clone().unwrap_or_default();
    let revision = status.assignment.as_ref().map_or(0, |assignment| assignment.revision);
    let devices = devices_of(object);
    let nodes: BTreeSet<&str> = devices.iter().map(|device| device.node()).collect();
    let state = match () {
        () if status.experts_lost > 0 && status.serving_revision > 0 => "experts lost",
        () if revision == 0 => "not placed",
        () if status.serving_revision != revision => "loading",
        () if status.draining_revision > 0 => "draining",
        () if is_true(&status.conditions, ConditionType::Ready) => "serving",
        () => "not ready",
    };
    InstanceRow {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
        deployment: deployment_of(object),
        state,
        revision,
        serving_revision: status.serving_revision,
        slots_ready: status.slots_ready,
        slots_total: status.slots_total,
        balancedness: status.balancedness,
        experts_lost: status.experts_lost,
        devices: devices.len(),
        nodes: nodes.len(),
        why: status.why,
        certificate: status.certificate,
        decisions: status.decisions,
    }
}

fn node_row(object: &AcceleratorNode) -> NodeRow {
    let status = object.status.clone().unwrap_or_default();
    let summary = status.summary;
    NodeRow {
        name: object.name_any(),
        native: object.spec.native,
        vendor: summary.vendor,
        product: summary.product,
        devices: summary.devices,
        healthy: summary.healthy,
        schedulable: summary.schedulable,
        reachable: is_true(&status.conditions, ConditionType::Reachable),
        action: summary.action,
        reason: summary.reason,
    }
}

fn queue_row(object: &CapacityQueue) -> QueueRow {
    let status = object.status.clone().unwrap_or_default();
    QueueRow {
        name: object.name_any(),
        quota: object.spec.quota_devices,
        used: status.used_devices,
        borrowed: status.borrowed_devices,
        waiting: status.waiting,
        priority: object.spec.priority,
    }
}

/// The deployment that a placement is an instance of.
pub(crate) fn deployment_of(placement: &ExpertPlacement) -> String {
    placement.labels().get(LABEL_DEPLOYMENT).cloned().unwrap_or_default()
}

/// Devices of the assigned revision.
fn devices_of(placement: &ExpertPlacement) -> &[berth_types::DeviceId] {
    let assignment = placement.status.as_ref().and_then(|status| status.assignment.as_ref());
    assignment.map_or(&[], |assignment| &assignment.devices)
}

/// `True`, `False` or `Unknown`.
fn state_of(conditions: &[Condition], kind: ConditionType) -> String {
    let found = conditions.iter().find(|condition| condition.type_ == kind.as_str());
    found.map_or_else(|| "Unknown".to_owned(), |condition| condition.status.clone())
}
