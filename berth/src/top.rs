//! `berth top`: who holds how much, from objects and placement maps alone. `rows` and `text` are pure; only `run`
//! talks to a cluster, and it writes nothing.

use std::collections::{BTreeMap, BTreeSet};

use berth_crds::{AcceleratorNode, ExpertPlacement, PlacementMap};
use berth_scheduler::index::from_map;
use berth_types::{Bytes, DeviceId, ExpertId, LayerId, Revision};
use clap::{Args, ValueEnum};
use futures::{StreamExt as _, TryStreamExt as _};
use kube::ResourceExt;
use serde::Serialize;

use crate::{
    cluster::{Cluster, ClusterArgs},
    placement::{Devices, Shown, devices},
    status::deployment_of,
    store::StoreArgs,
    table::Table,
    verdict::Verdict,
};

/// Maps read at the same time.
const AT_ONCE: usize = 8;

/// Who holds how much. Loads and latencies are in the parts' metrics.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// What to list.
    #[arg(value_enum, default_value_t)]
    kind: Kind,
    /// Order of the rows.
    #[arg(long, value_enum, default_value_t)]
    sort: Sort,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    store: StoreArgs,
}

/// What is listed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Devices.
    #[default]
    Devices,
    /// Nodes.
    Nodes,
    /// ModelDeployments.
    Models,
}

/// The order of rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sort {
    /// Most expert bytes first.
    #[default]
    Bytes,
    /// By name.
    Name,
}

/// What `-o json` writes. Fields are only ever added.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct TopView {
    schema: &'static str,
    kind: &'static str,
    rows: Vec<Row>,
    /// Placements whose map was not found: they are not counted.
    missing: Vec<String>,
}

/// A device, a node or a model.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    name: String,
    product: String,
    domain: String,
    devices: usize,
    healthy: usize,
    health: String,
    admission: String,
    worker: String,
    /// Instances of models that have replicas here; of a model, its instances.
    instances: usize,
    replicas: usize,
    expert_bytes: u64,
    memory_bytes: u64,
    /// Least of the model's instances.
    #[serde(skip_serializing_if = "Option::is_none")]
    balancedness: Option<f64>,
    experts_lost: u64,
}

/// A placement with the maps of the revisions that devices hold.
pub(crate) struct Held {
    pub(crate) placement: ExpertPlacement,
    pub(crate) maps: Vec<PlacementMap>,
}

/// Reads the objects and writes the table.
pub(crate) fn run(args: TopArgs) -> anyhow::Result<Verdict> {
    let TopArgs { kind, sort, cluster: cluster_args, store } = args;
    let store = store.config()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let cluster = Cluster::connect(&cluster_args).await?;
        let etcd = cluster.etcd(store);
        let (placements, nodes) =
            (cluster.list::<ExpertPlacement>().await?, cluster.list_all::<AcceleratorNode>().await?);
        let held = placements.into_iter().map(async |placement| {
            let mut maps = Vec::new();
            for revision in revisions(&placement) {
                maps.extend(cluster.map(&placement, revision, etcd.as_ref()).await?);
            }
            anyhow::Ok(Held { placement, maps })
        });
        let held: Vec<Held> = futures::stream::iter(held).buffered(AT_ONCE).try_collect().await?;
        cluster_args.output.write(&view(kind, sort, &devices(&nodes), &held), text)?;
        Ok(Verdict::Pass)
    })
}

/// The revisions that devices hold: the assigned one, and the one that still serves.
fn revisions(placement: &ExpertPlacement) -> BTreeSet<Revision> {
    let status = placement.status.clone().unwrap_or_default();
    let assigned = status.assignment.map_or(0, |assignment| assignment.revision);
    [assigned, status.serving_revision].into_iter().filter(|revision| *revision > 0).map(Revision).collect()
}

/// What each device holds of one placement; a replica in two revisions is held once.
fn held_by(held: &Held) -> BTreeMap<DeviceId, BTreeSet<(LayerId, ExpertId)>> {
    let mut all: BTreeMap<DeviceId, BTreeSet<_>> = BTreeMap::new();
    for layout in held.maps.iter().map(from_map) {
        for (device, replicas) in layout.replicas() {
            all.entry(device.clone()).or_default().extend(replicas);
        }
    }
    all
}

/// The rows of a kind.
pub(crate) fn view(kind: Kind, sort: Sort, devices: &Devices, held: &[Held]) -> TopView {
    let by_device = device_rows(devices, held);
    let mut rows = match kind {
        Kind::Devices => by_device.into_values().collect(),
        Kind::Nodes => node_rows(&by_device, held),
        Kind::Models => model_rows(devices, held),
    };
    if sort == Sort::Bytes {
        rows.sort_by_key(|row| std::cmp::Reverse(row.expert_bytes));
    }
    let missing = held.iter().filter(|held| held.maps.len() < revisions(&held.placement).len());
    TopView {
        schema: "berth.dev/top/v1",
        kind: match kind {
            Kind::Devices => "devices",
            Kind::Nodes => "nodes",
            Kind::Models => "models",
        },
        rows,
        missing: missing.map(|held| full_name(&held.placement)).collect(),
    }
}

fn full_name(placement: &ExpertPlacement) -> String {
    format!("{}/{}", placement.namespace().unwrap_or_default(), placement.name_any())
}

fn device_rows(devices: &Devices, held: &[Held]) -> BTreeMap<DeviceId, Row> {
    let row = |device: &berth_crds::accelerator_node::DeviceStatus| Row {
        name: device.device.to_string(),
        product: device.product.clone(),
        domain: device.interconnect_domain.clone().unwrap_or_default(),
        devices: 1,
        healthy: usize::from(device.health == berth_types::Health::Healthy),
        health: device.health.to_string(),
        admission: device.admission.to_string(),
        worker: device.worker.clone(),
        memory_bytes: device.memory_bytes.get(),
        ..Row::default()
    };
    let mut rows: BTreeMap<DeviceId, Row> = devices.iter().map(|(id, device)| (id.clone(), row(device))).collect();
    for one in held {
        for (device, replicas) in held_by(one) {
            let unknown =
                || Row { name: device.to_string(), devices: 1, health: "not reported".to_owned(), ..Row::default() };
            let row = rows.entry(device.clone()).or_insert_with(unknown);
            row.instances += usize::from(!replicas.is_empty());
            row.replicas += replicas.len();
            row.expert_bytes += bytes(one, devices, &device, replicas.len());
        }
    }
    rows
}

fn bytes(held: &Held, devices: &Devices, device: &DeviceId, replicas: usize) -> u64 {
    let Some(map) = held.maps.first() else { return 0 };
    Shown { placement: &held.placement, map, devices }.bytes(device, replicas).get()
}

fn node_rows(devices: &BTreeMap<DeviceId, Row>, held: &[Held]) -> Vec<Row> {
    let mut rows: BTreeMap<&str, Row> = BTreeMap::new();
    for (device, one) in devices {
        let row = rows.entry(device.node()).or_default();
        row.name = device.node().to_owned();
        if !row.product.split(", ").any(|product| product == one.product) {
            row.product =
                if row.product.is_empty() { one.product.clone() } else { format!("{}, {}", row.product, one.product) };
        }
        row.domain.clone_from(&one.domain);
        row.devices += 1;
        row.healthy += one.healthy;
        row.replicas += one.replicas;
        row.expert_bytes += one.expert_bytes;
        row.memory_bytes += one.memory_bytes;
    }
    for one in held {
        let nodes: BTreeSet<String> = held_by(one)
            .into_iter()
            .filter(|(_, replicas)| !replicas.is_empty())
            .map(|(device, _)| device.node().to_owned())
            .collect();
        for node in nodes {
            if let Some(row) = rows.get_mut(node.as_str()) {
                row.instances += 1;
            }
        }
    }
    rows.into_values().collect()
}

fn model_rows(devices: &Devices, held: &[Held]) -> Vec<Row> {
    let mut rows: BTreeMap<String, Row> = BTreeMap::new();
    for one in held {
        let status = one.placement.status.clone().unwrap_or_default();
        let name = format!("{}/{}", one.placement.namespace().unwrap_or_default(), deployment_of(&one.placement));
        let row = rows.entry(name.clone()).or_insert_with(|| Row { name, ..Row::default() });
        row.product.clone_from(&one.placement.spec.model);
        row.instances += 1;
        row.experts_lost += status.experts_lost;
        row.balancedness = match (row.balancedness, status.balancedness) {
            (Some(least), Some(other)) => Some(least.min(other)),
            (one, other) => one.or(other),
        };
        for (device, replicas) in held_by(one) {
            let known = devices.get(&device);
            row.devices += 1;
            row.healthy += usize::from(known.is_some_and(|device| device.health == berth_types::Health::Healthy));
            row.memory_bytes += known.map_or(0, |device| device.memory_bytes.get());
            row.replicas += replicas.len();
            row.expert_bytes += bytes(one, devices, &device, replicas.len());
        }
    }
    rows.into_values().collect()
}

/// A column: its head, and what it says of a row.
type Column = (&'static str, fn(&Row) -> String);

const PRODUCT: Column = ("PRODUCT", |row| row.product.clone());
const DOMAIN: Column = ("DOMAIN", |row| row.domain.clone());
const INSTANCES: Column = ("INSTANCES", |row| row.instances.to_string());
const REPLICAS: Column = ("REPLICAS", |row| row.replicas.to_string());
const EXPERT_BYTES: Column = ("EXPERT BYTES", |row| Bytes(row.expert_bytes).to_string());
const MEMORY: Column = ("MEMORY", |row| Bytes(row.memory_bytes).to_string());
const USED: Column = ("USED", used);

const DEVICES: [Column; 11] = [
    ("DEVICE", |row| row.name.clone()),
    PRODUCT,
    DOMAIN,
    ("HEALTH", |row| row.health.clone()),
    ("ADMISSION", |row| row.admission.clone()),
    ("WORKER", |row| row.worker.clone()),
    INSTANCES,
    REPLICAS,
    EXPERT_BYTES,
    MEMORY,
    USED,
];

const NODES: [Column; 9] = [
    ("NODE", |row| row.name.clone()),
    PRODUCT,
    DOMAIN,
    ("HEALTHY", |row| format!("{}/{}", row.healthy, row.devices)),
    INSTANCES,
    REPLICAS,
    EXPERT_BYTES,
    MEMORY,
    USED,
];

const MODELS: [Column; 8] = [
    ("MODEL DEPLOYMENT", |row| row.name.clone()),
    ("MODEL", |row| row.product.clone()),
    INSTANCES,
    ("DEVICES", |row| row.devices.to_string()),
    REPLICAS,
    EXPERT_BYTES,
    ("BALANCE", |row| row.balancedness.map_or_else(String::new, |share| format!("{share:.2}"))),
    ("LOST", |row| row.experts_lost.to_string()),
];

/// Expert bytes as a share of memory, to a tenth of a percent.
fn used(row: &Row) -> String {
    match row.memory_bytes {
        0 => String::new(),
        memory => {
            let tenths = u128::from(row.expert_bytes) * 1000 / u128::from(memory);
            format!("{}.{}%", tenths / 10, tenths % 10)
        }
    }
}

/// The rows for people.
pub(crate) fn text(view: &TopView) -> String {
    let columns: &[Column] = match view.kind {
        "devices" => &DEVICES,
        "nodes" => &NODES,
        _ => &MODELS,
    };
    let mut table = Table::new(&columns.iter().map(|(head, _)| *head).collect::<Vec<_>>());
    for row in &view.rows {
        table.row(columns.iter().map(|(_, cell)| cell(row)));
    }
    let mut text = table.to_string();
    if !view.missing.is_empty() {
        text.push_str(&format!(
            "\nnot counted, for their maps are not at the API server: {}\nwhere the scheduler keeps maps in etcd, give \
             --etcd-endpoints and its files\n",
            view.missing.join(", ")
        ));
    }
    text
}
