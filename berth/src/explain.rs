//! `berth explain`: why a deployment's experts are where they are: devices and what was asked of them, how good the
//! revision is and what keeps it from being better, what was decided last, what waits. From objects and placement maps
//! alone; `view` and `text` are pure, only `run` talks to a cluster, and it writes nothing.

mod copies;

use std::collections::{BTreeMap, BTreeSet};

use anyhow::bail;
use berth_crds::{
    AcceleratorNode, ExpertPlacement, ModelDeployment,
    conditions::ConditionType,
    expert_placement::{DecisionOutcome, PlanCertificate, PlanDecision},
};
use berth_types::{Bytes, Revision};
use clap::Args;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;
use serde::Serialize;

pub(crate) use copies::{Copies, copies};

use crate::{
    cluster::{Cluster, ClusterArgs},
    placement::{Devices, devices},
    status::deployment_of,
    store::StoreArgs,
    table::{age, count},
    verdict::Verdict,
};

/// Why a placement is as it is, how good it is, and what waits. Exit code 1 if anything waits.
#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// A ModelDeployment, or one ExpertPlacement.
    name: String,
    /// With --expert: where the copies of one expert of this layer are.
    #[arg(long, requires = "expert")]
    layer: Option<u32>,
    /// The expert of --layer.
    #[arg(long, requires = "layer")]
    expert: Option<u32>,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    store: StoreArgs,
}

/// What `-o json` writes. Fields are only ever added.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ExplainView {
    schema: &'static str,
    namespace: String,
    name: String,
    /// What is true of the whole, in one sentence.
    summary: String,
    /// What is not as it should be, the dominant reason first.
    waits: Vec<Wait>,
    instances: Vec<InstanceView>,
}

/// Something that is not as it should be.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Wait {
    object: String,
    condition: String,
    reason: String,
    message: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct InstanceView {
    name: String,
    revision: u64,
    serving_revision: u64,
    /// By node: devices used, of those it has.
    nodes: Vec<NodeShare>,
    /// What the devices were chosen by.
    asked: Vec<String>,
    expert_bytes: u64,
    /// As measured.
    balancedness: Option<f64>,
    certificate: Option<PlanCertificate>,
    /// The newest first.
    decisions: Vec<DecisionRow>,
    /// Copies of the expert that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    copies: Option<Copies>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeShare {
    node: String,
    product: String,
    used: usize,
    of: usize,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct DecisionRow {
    age_seconds: i64,
    #[serde(flatten)]
    decision: PlanDecision,
}

/// What an explanation is made of.
#[derive(Debug, Default)]
pub(crate) struct Subject {
    pub(crate) deployment: Option<ModelDeployment>,
    /// With the copies that were asked for.
    pub(crate) placements: Vec<(ExpertPlacement, Option<Copies>)>,
    pub(crate) devices: Devices,
}

/// Reads the objects and writes the explanation.
pub(crate) fn run(args: ExplainArgs) -> anyhow::Result<Verdict> {
    let ExplainArgs { name, layer, expert, cluster: cluster_args, store } = args;
    let store = store.config()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let cluster = Cluster::connect(&cluster_args).await?;
        let (deployments, placements) = (cluster.list().await?, cluster.list().await?);
        let (deployment, chosen) = choose(deployments, placements, &name, cluster.namespace.as_deref())?;
        let etcd = cluster.etcd(store);
        let mut held = Vec::new();
        for placement in chosen {
            let assigned = placement.status.as_ref().and_then(|status| status.assignment.as_ref());
            let copies = match (layer.zip(expert), assigned) {
                (Some(asked), Some(assigned)) => {
                    let map = cluster.map(&placement, Revision(assigned.revision), etcd.as_ref()).await?;
                    map.map(|map| copies(&map, asked)).transpose()?
                }
                _ => None,
            };
            held.push((placement, copies));
        }
        let devices = devices(&cluster.list_all::<AcceleratorNode>().await?);
        let view = view(&Subject { deployment, placements: held, devices }, cluster.now());
        cluster_args.output.write(&view, text)?;
        Ok(view.waits.is_empty().into())
    })
}

/// The deployment of that name with its instances, or the one placement of that name.
pub(crate) fn choose(
    deployments: Vec<ModelDeployment>,
    placements: Vec<ExpertPlacement>,
    name: &str,
    namespace: Option<&str>,
) -> anyhow::Result<(Option<ModelDeployment>, Vec<ExpertPlacement>)> {
    let (space, plain) = name.split_once('/').map_or((None, name), |(space, plain)| (Some(space), plain));
    let here = |found: Option<String>| space.is_none_or(|space| found.as_deref() == Some(space));
    let mut named: Vec<_> =
        deployments.into_iter().filter(|one| here(one.namespace()) && one.name_any() == plain).collect();
    if named.len() > 1 {
        let all = named.iter().map(|one| format!("{}/{plain}", one.namespace().unwrap_or_default()));
        bail!("{name:?} may be any of {}: name one", all.collect::<Vec<_>>().join(", "));
    }
    if let Some(deployment) = named.pop() {
        let own = |one: &ExpertPlacement| one.namespace() == deployment.namespace() && deployment_of(one) == plain;
        let instances = placements.into_iter().filter(own).collect();
        return Ok((Some(deployment), instances));
    }
    let one = crate::placement::find(&placements, name, namespace)?.clone();
    Ok((None, vec![one]))
}

/// The explanation at `now` (seconds since 1970).
pub(crate) fn view(subject: &Subject, now: i64) -> ExplainView {
    let Subject { deployment, placements, devices } = subject;
    let first = placements.first().map(|(placement, _)| placement);
    let status = deployment.as_ref().map(|one| one.status.clone().unwrap_or_default());
    let (namespace, name) = match (deployment, first) {
        (Some(one), _) => (one.namespace(), one.name_any()),
        (None, one) => (one.and_then(ResourceExt::namespace), one.map(ResourceExt::name_any).unwrap_or_default()),
    };
    let placement_status = |one: &ExpertPlacement| one.status.clone().unwrap_or_default();
    let summary = match (&status, first) {
        (Some(status), _) => format!("{}: {}", status.phase, status.summary.message),
        (None, Some(one)) => message(&placement_status(one).conditions, ConditionType::Ready),
        (None, None) => "not placed".to_owned(),
    };
    let mut waits: Vec<Wait> = status.iter().flat_map(|status| waiting(&name, &status.conditions)).collect();
    for (placement, _) in placements {
        waits.extend(waiting(&placement.name_any(), &placement_status(placement).conditions));
    }
    // A sentence that a deployment takes over from its placement is said once.
    let mut said = BTreeSet::new();
    waits.retain(|wait| said.insert(wait.message.clone()));
    ExplainView {
        schema: "berth.dev/explain/v1",
        namespace: namespace.unwrap_or_default(),
        name,
        summary: summary.trim_end_matches(": ").to_owned(),
        waits,
        instances: placements.iter().map(|(one, copies)| instance(one, copies.clone(), devices, now)).collect(),
    }
}

fn message(conditions: &[Condition], kind: ConditionType) -> String {
    let found = conditions.iter().find(|condition| condition.type_ == kind.as_str());
    found.map_or_else(|| "no part has looked at it yet".to_owned(), |condition| condition.message.clone())
}

/// Conditions that are not as they should be, causes before what follows from them.
fn waiting<'a>(object: &'a str, conditions: &'a [Condition]) -> impl Iterator<Item = Wait> + 'a {
    use ConditionType::{Accepted, CapacityAvailable, Degraded, Placed, Serving, Stalled, WeightsLoaded};
    let good = [(Accepted, "True"), (CapacityAvailable, "True"), (Placed, "True"), (WeightsLoaded, "True")];
    let more = [(Serving, "True"), (Degraded, "False"), (Stalled, "False")];
    good.into_iter().chain(more).filter_map(move |(kind, well)| {
        let found = conditions.iter().find(|condition| condition.type_ == kind.as_str())?;
        (found.status != well).then(|| Wait {
            object: object.to_owned(),
            condition: found.type_.clone(),
            reason: found.reason.clone(),
            message: found.message.clone(),
        })
    })
}

fn instance(placement: &ExpertPlacement, copies: Option<Copies>, devices: &Devices, now: i64) -> InstanceView {
    let status = placement.status.clone().unwrap_or_default();
    let assigned = status.assignment.clone().map(|assignment| assignment.devices).unwrap_or_default();
    let mut nodes: BTreeMap<&str, NodeShare> = BTreeMap::new();
    for device in &assigned {
        let product = devices.get(device).map(|known| known.product.clone()).unwrap_or_default();
        let of = devices.keys().filter(|other| other.node() == device.node()).count();
        let share = NodeShare { node: device.node().to_owned(), product, used: 0, of };
        nodes.entry(device.node()).or_insert(share).used += 1;
    }
    let row =
        |decision: PlanDecision| DecisionRow { age_seconds: now.saturating_sub(decision.time.0.as_second()), decision };
    InstanceView {
        name: placement.name_any(),
        revision: status.assignment.as_ref().map_or(0, |assignment| assignment.revision),
        serving_revision: status.serving_revision,
        nodes: nodes.into_values().collect(),
        asked: asked(placement),
        expert_bytes: status.expert_bytes.get(),
        balancedness: status.balancedness,
        certificate: status.certificate,
        decisions: status.decisions.into_iter().map(row).collect(),
        copies,
    }
}

/// What the devices were chosen by, from the spec.
fn asked(placement: &ExpertPlacement) -> Vec<String> {
    let spec = &placement.spec;
    let choice = &spec.devices;
    let mut asked = vec![match (choice.per_instance, spec.granted_devices) {
        (Some(wanted), Some(granted)) if granted < wanted => {
            format!("{wanted} devices wanted, its queue grants {granted}")
        }
        (Some(wanted), _) => format!("{} wanted", count(usize::try_from(wanted).unwrap_or(usize::MAX), "device")),
        (None, Some(granted)) => format!("the least that memory and redundancy allow, at most {granted}"),
        (None, None) => "the least devices that memory and redundancy allow".to_owned(),
    }];
    let named = |what: &str, names: Vec<String>| (!names.is_empty()).then(|| format!("{what} {}", names.join(", ")));
    asked.extend(named("vendors", choice.vendors.iter().map(ToString::to_string).collect()));
    asked.extend(named("products", choice.products.clone()));
    asked.push(if choice.cross_vendor { "may span vendors" } else { "within one vendor" }.to_owned());
    asked.extend(choice.blast_radius_percent.map(|share| format!("at most {share} % in one failure domain")));
    let survive = format!("{:?}", spec.redundancy.survive).to_lowercase();
    asked.push(match survive.as_str() {
        "none" => "one copy of an expert is enough".to_owned(),
        domain => format!("survives the loss of any one {domain}"),
    });
    if spec.redundancy.extra_replicas > 0 {
        asked.push(format!("{} extra replicas a layer", spec.redundancy.extra_replicas));
    }
    if spec.paused {
        asked.push("paused: nothing is planned".to_owned());
    }
    asked
}

/// The explanation for people.
pub(crate) fn text(view: &ExplainView) -> String {
    let ExplainView { schema: _, namespace, name, summary, waits, instances } = view;
    let mut lines = vec![format!("{namespace}/{name}   {summary}")];
    match waits.as_slice() {
        [] => lines.push("WAITS       for nothing".to_owned()),
        [first, rest @ ..] => {
            lines.push(format!("WAITS       {} {}: {}", first.object, first.reason, first.message));
            lines.extend(
                rest.iter().map(|wait| format!("            {} {}: {}", wait.object, wait.reason, wait.message)),
            );
        }
    }
    for one in instances {
        lines.push(String::new());
        lines.extend(instance_lines(one));
    }
    if instances.is_empty() {
        lines.push("no instance was made yet".to_owned());
    }
    lines.join("\n")
}

fn instance_lines(view: &InstanceView) -> Vec<String> {
    let InstanceView { name, revision, serving_revision, nodes, asked, balancedness, certificate, decisions, .. } =
        view;
    let state = match (revision, serving_revision) {
        (0, _) => "not placed".to_owned(),
        (revision, serving) if revision == serving => format!("revision {revision} serves"),
        (revision, serving) => format!("revision {revision} loads, {serving} serves"),
    };
    let mut lines = vec![format!("{name}   {state}   {}", Bytes(view.expert_bytes))];
    let share = |node: &NodeShare| format!("{} {} of {} ({})", node.node, node.used, node.of, node.product);
    if !nodes.is_empty() {
        lines.push(format!("  devices   {}", nodes.iter().map(share).collect::<Vec<_>>().join("; ")));
    }
    lines.push(format!("  asked     {}", asked.join("; ")));
    let balance = balancedness.map_or_else(
        || "no load seen yet".to_owned(),
        |share| format!("{share:.3} (mean device over the slowest, 1 is perfect)"),
    );
    lines.push(format!("  balance   {balance}"));
    if let Some(certificate) = certificate {
        let PlanCertificate { makespan, bound, gap, limit, loads, survives, speeds, sharing, .. } = certificate;
        lines.push(format!(
            "  bound     slowest device planned at {makespan:.3} of the ideal, none below {bound:.3}: gap {:.1} %",
            gap * 100.0
        ));
        let limit = if limit.is_empty() { "nothing: the ideal is reached, or no load is known" } else { limit };
        lines.push(format!("  limit     {limit}"));
        lines.push(format!("  loads     {loads}; speeds {speeds}"));
        lines.push(format!("  replicas  share tokens {sharing}; survives the loss of {survives}"));
    }
    for (at, DecisionRow { age_seconds, decision }) in decisions.iter().enumerate() {
        let head = if at == 0 { "  decided " } else { "          " };
        let mark = match decision.outcome {
            DecisionOutcome::Moved => "moved",
            DecisionOutcome::Kept => "kept",
            DecisionOutcome::Refused => "refused",
        };
        lines.push(format!("{head}  {:>4} ago  {mark:<7}  {}", age(*age_seconds), decision.why));
    }
    lines.extend(view.copies.as_ref().map(|copies| copies.to_string()));
    lines
}
