//! `berth placement`: which device holds what of one placement, and what a revision changed. `view` and `text` are
//! pure; only `run` talks to a cluster, and it writes nothing.

mod diff;
mod find;

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use berth_crds::{AcceleratorNode, ExpertPlacement, PlacementMap, expert_placement::PlanCertificate};
use berth_planner::Layout;
use berth_scheduler::index::from_map;
use berth_types::{Bytes, DeviceId, ExpertId, LayerId, Revision};
use clap::Args;
use kube::ResourceExt;
use serde::Serialize;

#[cfg(test)]
pub(crate) use diff::DiffView;
pub(crate) use diff::{diff, text as diff_text};
pub(crate) use find::find;

use crate::{
    cluster::{Cluster, ClusterArgs},
    store::StoreArgs,
    table::{Table, count},
    verdict::Verdict,
};

/// Which device holds what, and what a revision changed. With --diff, exit code 1 if anything did.
#[derive(Debug, Args)]
pub(crate) struct PlacementArgs {
    /// The ExpertPlacement, or a ModelDeployment with one instance.
    name: String,
    /// Shows what changed since this revision.
    #[arg(long, value_name = "REV")]
    diff: Option<u64>,
    /// Another revision than the assigned one.
    #[arg(long, value_name = "REV")]
    revision: Option<u64>,
    /// Shows the experts in every slot of this layer, or with --diff its moves.
    #[arg(long)]
    layer: Option<u32>,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    store: StoreArgs,
}

/// What `-o json` writes. Fields are only ever added.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PlacementView {
    schema: &'static str,
    namespace: String,
    name: String,
    model: String,
    /// The revision that is shown.
    revision: u64,
    assigned_revision: u64,
    serving_revision: u64,
    draining_revision: u64,
    epoch: u64,
    digest: String,
    layers: usize,
    experts: u32,
    replicas: usize,
    expert_bytes: u64,
    balancedness: Option<f64>,
    experts_lost: u64,
    why: String,
    /// How good the assigned revision is.
    certificate: Option<PlanCertificate>,
    devices: Vec<DeviceRow>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct DeviceRow {
    device: DeviceId,
    product: String,
    health: String,
    admission: String,
    slots_per_layer: u32,
    replicas: usize,
    expert_bytes: u64,
    /// Of the layer that was asked for; `null` = an empty slot.
    #[serde(skip_serializing_if = "Option::is_none")]
    slots: Option<Vec<Option<ExpertId>>>,
}

/// What is known of the nodes' devices.
pub(crate) type Devices = BTreeMap<DeviceId, berth_crds::accelerator_node::DeviceStatus>;

/// A revision of a placement.
pub(crate) struct Shown<'a> {
    pub(crate) placement: &'a ExpertPlacement,
    pub(crate) map: &'a PlacementMap,
    pub(crate) devices: &'a Devices,
}

/// Reads the objects and writes the placement, or the difference.
pub(crate) fn run(args: PlacementArgs) -> anyhow::Result<Verdict> {
    let PlacementArgs { name, diff: since, revision, layer, cluster: cluster_args, store } = args;
    let store = store.config()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let cluster = Cluster::connect(&cluster_args).await?;
        let placements: Vec<ExpertPlacement> = cluster.list().await?;
        let placement = find(&placements, &name, cluster.namespace.as_deref())?;
        let devices = devices(&cluster.list_all::<AcceleratorNode>().await?);
        let status = placement.status.clone().unwrap_or_default();
        let assigned = status.assignment.map(|assignment| assignment.revision);
        let wanted = revision.or(assigned).with_context(|| {
            let why = status.conditions.iter().find(|condition| condition.type_ == "Placed");
            format!("{name} is not placed yet: {}", why.map_or("no scheduler has looked at it", |why| &why.message))
        })?;
        let etcd = cluster.etcd(store);
        let map = async |revision: u64| match cluster.map(placement, Revision(revision), etcd.as_ref()).await? {
            Some(map) => Ok(map),
            None => bail!(
                "there is no map of revision {revision} of {name} at the API server{}: the last three revisions are \
                 kept; where the scheduler keeps maps in etcd, give --etcd-endpoints and its files",
                if etcd.is_some() { " or in etcd" } else { "" }
            ),
        };
        let shown = Shown { placement, map: &map(wanted).await?, devices: &devices };
        let Some(since) = since else {
            cluster_args.output.write(&view(&shown, layer), text)?;
            return Ok(Verdict::Pass);
        };
        let view = diff(&shown, &map(since).await?, layer);
        cluster_args.output.write(&view, diff_text)?;
        Ok(view.is_empty().into())
    })
}

/// The devices that nodes report.
pub(crate) fn devices(nodes: &[AcceleratorNode]) -> Devices {
    let all = nodes.iter().filter_map(|node| node.status.as_ref()).flat_map(|status| &status.devices);
    all.map(|device| (device.device.clone(), device.clone())).collect()
}

impl Shown<'_> {
    /// Bytes of one replica on a device; one that no node reports counts in the checkpoint's format.
    pub(crate) fn expert_bytes(&self, device: &DeviceId) -> Bytes {
        let spec = &self.placement.spec;
        let vendor = self.devices.get(device).map(|known| known.vendor);
        spec.geometry.expert_bytes(spec.geometry.format_on(&spec.vendor_formats, vendor))
    }

    /// `count` replicas on a device, bytes.
    pub(crate) fn bytes(&self, device: &DeviceId, count: usize) -> Bytes {
        self.expert_bytes(device).times(u64::try_from(count).unwrap_or(u64::MAX))
    }
}

/// One revision, with the slots of `layer` if one is asked for.
pub(crate) fn view(shown: &Shown<'_>, layer: Option<u32>) -> PlacementView {
    let Shown { placement, map, devices } = shown;
    let status = placement.status.clone().unwrap_or_default();
    let layout: Layout = from_map(map);
    let replicas = layout.replicas();
    let row = |entry: &berth_planner::DeviceSlots| {
        let known = devices.get(&entry.device);
        let held = replicas.get(&entry.device).map_or(0, |held| held.len());
        let slots = |layer| layout.slots_of(&entry.device).remove(&LayerId(layer)).unwrap_or_default();
        DeviceRow {
            device: entry.device.clone(),
            product: known.map(|device| device.product.clone()).unwrap_or_default(),
            health: known.map_or_else(|| "not reported".to_owned(), |device| device.health.to_string()),
            admission: known.map(|device| device.admission.to_string()).unwrap_or_default(),
            slots_per_layer: entry.slots,
            replicas: held,
            expert_bytes: shown.bytes(&entry.device, held).get(),
            slots: layer.map(slots),
        }
    };
    let devices: Vec<DeviceRow> = layout.devices.iter().map(row).collect();
    let assignment = status.assignment;
    PlacementView {
        schema: "berth.dev/placement/v1",
        namespace: placement.namespace().unwrap_or_default(),
        name: placement.name_any(),
        model: placement.spec.model.clone(),
        revision: map.spec.revision,
        assigned_revision: assignment.as_ref().map_or(0, |assignment| assignment.revision),
        serving_revision: status.serving_revision,
        draining_revision: status.draining_revision,
        epoch: map.spec.epoch,
        digest: assignment.filter(|one| one.revision == map.spec.revision).map(|one| one.digest).unwrap_or_default(),
        layers: layout.layers.len(),
        experts: placement.spec.geometry.experts,
        replicas: devices.iter().map(|row| row.replicas).sum(),
        expert_bytes: devices.iter().map(|row| row.expert_bytes).sum(),
        balancedness: status.balancedness,
        experts_lost: status.experts_lost,
        why: status.why,
        certificate: status.certificate,
        devices,
    }
}

/// A certificate in one line.
pub(crate) fn certified(certificate: &PlanCertificate) -> String {
    let PlanCertificate { makespan, bound, gap, limit, .. } = certificate;
    let limit = if limit.is_empty() { String::new() } else { format!("; {limit}") };
    format!("slowest device {makespan:.3} of the ideal, bound {bound:.3}, gap {:.1} %{limit}", gap * 100.0)
}

/// A revision for people.
pub(crate) fn text(view: &PlacementView) -> String {
    let PlacementView { namespace, name, model, revision, epoch, layers, experts, replicas, expert_bytes, .. } = view;
    let mut lines = vec![
        format!("{namespace}/{name}   model {model}   revision {revision}   epoch {epoch}"),
        format!("{layers} layers x {experts} experts: {replicas} replicas, {}", Bytes(*expert_bytes)),
    ];
    if view.assigned_revision == *revision {
        let state = match (view.serving_revision, view.draining_revision) {
            (serving, 0) if serving == *revision => "serving".to_owned(),
            (serving, draining) if serving == *revision => format!("serving; {draining} is being drained"),
            (0, _) => "loading; nothing serves yet".to_owned(),
            (serving, _) => format!("loading; {serving} serves"),
        };
        let balance =
            view.balancedness.map_or_else(|| "no load seen".to_owned(), |share| format!("balance {share:.2}"));
        lines.push(format!("{state}; {balance}; {} experts without a live replica", view.experts_lost));
        if !view.why.is_empty() {
            lines.push(format!("why: {}", view.why));
        }
        lines.extend(view.certificate.as_ref().map(certified));
    } else {
        lines.push(format!("assigned is revision {}", view.assigned_revision));
    }
    let mut table =
        Table::new(&["DEVICE", "PRODUCT", "HEALTH", "ADMISSION", "SLOTS A LAYER", "REPLICAS", "EXPERT BYTES"]);
    for row in &view.devices {
        table.row([
            row.device.to_string(),
            row.product.clone(),
            row.health.clone(),
            row.admission.clone(),
            row.slots_per_layer.to_string(),
            row.replicas.to_string(),
            Bytes(row.expert_bytes).to_string(),
        ]);
    }
    let mut text = format!("{}\n\n{table}", lines.join("\n"));
    for row in &view.devices {
        if let Some(slots) = &row.slots {
            let experts = slots.iter().map(|slot| slot.map_or_else(|| "-".to_owned(), |expert| expert.to_string()));
            text.push_str(&format!("\n{}: {}", row.device, experts.collect::<Vec<_>>().join(" ")));
        }
    }
    if view.devices.is_empty() {
        text.push_str(&count(0, "device"));
    }
    text
}
