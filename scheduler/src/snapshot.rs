//! The index as a planner's problem. Leaves nothing out that a plan depends on, and adds nothing.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use berth_crds::{model_deployment::Survive as Declared, model_profile::LayerShares};
use berth_planner::{
    Device, Forecast, Goal, Instance, Layout, Payback, Problem, Sharing, Standing, Survive, Weights, problem::Loads,
};
use berth_types::{Bytes, DeviceId, Geometry, Health, LayerId, PlacementName, Vendor};

use crate::{
    index::{Index, Placement, Stamp},
    replan::Cause,
    speeds::{self, speeds},
};

/// Everything that a plan is made from, apart from the world that goes on.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The problem, without loads.
    pub problem: Problem,
    /// The layout that the plan starts from.
    pub previous: Option<Arc<Layout>>,
    /// Its weights; `None` = its replicas share evenly.
    pub weights: Option<Arc<Weights>>,
    /// What made the plan due.
    pub cause: Cause,
    /// What it depends on.
    pub stamp: Stamp,
    /// Load windows, oldest first.
    windows: Vec<Loads>,
    /// Their length.
    length: Duration,
    /// Whose they are.
    source: String,
    /// Which speeds of devices it says, in words.
    pub speeds: String,
}

impl Snapshot {
    /// The problem with the loads that are expected next, the layout that the plan starts from, and which loads those are
    /// in words. Takes a while where there are many windows of many experts.
    #[must_use]
    pub fn complete(self) -> (Problem, Option<Arc<Layout>>, String) {
        let Self { mut problem, previous, windows, length, source, .. } = self;
        if let Some((loads, lasts)) = forecast(&problem.instance.geometry, &windows) {
            problem.instance.loads = loads;
            problem.payback.lasts_s = lasts * length.as_secs_f64();
        }
        (problem, previous, source)
    }
}

/// What a plan for `name` at `now` is made from.
#[must_use]
pub fn snapshot(index: &Index, now: Duration, name: &PlacementName, cause: Cause) -> Option<Snapshot> {
    let placement = index.placements().get(name)?;
    let committed = committed(index, name);
    let speeds = speeds(index, &placement.spec.speeds);
    let mut devices = Vec::new();
    for node in index.nodes().values() {
        for (id, known) in node.devices() {
            let standing = standing(index, now, placement, id);
            let budget = node.worker(id).map_or(Bytes::ZERO, |worker| worker.memory);
            devices.push(Device {
                id: id.clone(),
                rack: node.rack().map(str::to_owned),
                domain: known.interconnect_domain.clone(),
                card: known.card.clone(),
                vendor: known.vendor,
                product: known.product.clone(),
                memory: if budget > Bytes::ZERO { known.memory.min(budget) } else { known.memory },
                workspace: Bytes::ZERO,
                committed: committed.get(id).copied().unwrap_or_default(),
                speed: speeds.get(id).copied().unwrap_or(1.0),
                computes: known.computes.clone(),
                degraded: known.state.health >= Health::Degraded,
                standing,
            });
        }
    }
    devices.sort_by(|one, other| one.id.cmp(&other.id));
    let problem = Problem {
        now_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
        seed: 0,
        goal: if cause == Cause::Rebalance { Goal::Rebalance { moves: None, bytes: None } } else { Goal::Repair },
        effort: Problem::EFFORT,
        threads: 1,
        payback: Payback::default(),
        instance: instance(name, placement),
        devices,
        held: placement.held().map(|layout| Layout::clone(layout)).collect(),
    };
    let (windows, source) = windows(index, name, placement);
    let (previous, stamp) = (placement.assigned().cloned(), index.stamp(name));
    let weights = placement.revisions.get(&placement.cutover.assigned()).and_then(|stored| stored.weights.clone());
    let length = placement.window_length();
    Some(Snapshot {
        problem,
        previous,
        weights,
        cause,
        stamp,
        windows,
        length,
        source,
        speeds: speeds::words(&placement.spec.speeds),
    })
}

/// What `placement` may do with a device: one that did not load in time is left, until its worker is another.
fn standing(index: &Index, now: Duration, placement: &Placement, device: &DeviceId) -> Standing {
    let standing = index.standing(now, device);
    let instance = index.nodes().get(device.node()).and_then(|node| node.worker(device)).map(|worker| worker.instance);
    let avoided = placement.avoided.get(device).is_some_and(|failed| Some(*failed) == instance);
    if standing == Standing::Open && avoided { Standing::Leaving } else { standing }
}

/// The survivable domain as the planner names it.
#[must_use]
pub fn survive(declared: Declared) -> Survive {
    match declared {
        Declared::None => Survive::Nothing,
        Declared::Device => Survive::Device,
        Declared::Node => Survive::Node,
        Declared::Rack => Survive::Rack,
    }
}

fn instance(name: &PlacementName, placement: &Placement) -> Instance {
    let spec = &placement.spec;
    // A revision that is stored is never written again, whoever wrote it.
    let last = placement.revisions.keys().next_back().copied().unwrap_or_default();
    Instance {
        name: name.clone(),
        revision: last.max(placement.cutover.assigned()).max(placement.memory.burned).next(),
        geometry: spec.geometry.clone(),
        formats: spec.vendor_formats.clone(),
        reserve: spec.non_expert_bytes.plus(spec.kv_budget_bytes),
        vendors: spec.devices.vendors.clone(),
        products: spec.devices.products.clone(),
        devices: spec.devices.per_instance,
        granted: spec.granted_devices,
        cross_vendor: spec.devices.cross_vendor,
        blast_radius_percent: spec.devices.blast_radius_percent,
        survive: survive(spec.redundancy.survive),
        extra_replicas: spec.redundancy.extra_replicas,
        loads: Loads::new(),
        sharing: sharing(placement),
    }
}

/// Most slots of all layers together whose map the API server takes with weights beside experts.
const WEIGHED_SLOTS: usize = 250_000;

/// By weights, where the runner can and the map has room for them.
fn sharing(placement: &Placement) -> Sharing {
    let slots = placement.assigned().map_or(0, |layout| layout.width().saturating_mul(layout.layers.len()));
    if slots > WEIGHED_SLOTS { Sharing::Even } else { placement.sharing() }
}

/// Load windows to expect the next one from, and whose they are: the placement's own; before it has any, those of another
/// instance of the same model; without any, what its profile says.
fn windows(index: &Index, name: &PlacementName, placement: &Placement) -> (Vec<Loads>, String) {
    let same =
        |other: &Placement| other.spec.model == placement.spec.model && other.spec.geometry == placement.spec.geometry;
    let others = || index.placements().iter().filter(|(other, known)| *other != name && same(known));
    let loaded = |windows: &Vec<Loads>| windows.iter().any(|window| !window.is_empty());
    let count = |windows: &Vec<Loads>| match windows.len() {
        1 => "1 load window".to_owned(),
        many => format!("{many} load windows"),
    };
    if let Some(own) = Some(placement.windows()).filter(&loaded) {
        let source = count(&own);
        return (own, source);
    }
    let other = others().find_map(|(other, known)| Some((other, Some(known.windows()).filter(&loaded)?)));
    match other {
        Some((other, windows)) => {
            let source = format!("{} of {other}", count(&windows));
            (windows, source)
        }
        None if placement.spec.expert_loads.is_empty() => (Vec::new(), "none: every expert alike".to_owned()),
        None => (vec![known_skew(&placement.spec.expert_loads)], "what its profile says of usual traffic".to_owned()),
    }
}

/// The profile's shares as a window of loads.
fn known_skew(layers: &[LayerShares]) -> Loads {
    let row = |layer: &LayerShares| layer.shares.iter().map(|share| u64::from(*share)).collect();
    layers.iter().map(|layer| (LayerId(layer.layer), row(layer))).collect()
}

/// What windows say of the next one, and how many windows that is expected to last; nothing without windows.
fn forecast(geometry: &Geometry, windows: &[Loads]) -> Option<(Loads, f64)> {
    let layers: Vec<LayerId> = geometry.expert_layer_ids().collect();
    let experts = usize::try_from(geometry.experts).unwrap_or(usize::MAX);
    let mut forecast = Forecast::new(vec![experts; layers.len()]);
    let count = |tokens: u64| f64::from(u32::try_from(tokens).unwrap_or(u32::MAX));
    for window in windows {
        let row = |layer: &LayerId| {
            let tokens = window.get(layer).map(Vec::as_slice).unwrap_or_default();
            (0..experts).map(|expert| count(tokens.get(expert).copied().unwrap_or(0))).collect()
        };
        forecast.observe(&layers.iter().map(row).collect::<Vec<Vec<f64>>>());
    }
    Some((layers.into_iter().zip(forecast.tokens()?).collect(), forecast.lasts()))
}

/// Bytes that the other placements hold or have been promised, by device.
fn committed(index: &Index, name: &PlacementName) -> BTreeMap<DeviceId, Bytes> {
    let mut committed: BTreeMap<DeviceId, Bytes> = BTreeMap::new();
    for (_, other) in index.placements().iter().filter(|(other, _)| *other != name) {
        for (device, replicas) in other.footprint() {
            let vendor = index.nodes().get(device.node()).and_then(|node| node.devices().get(device));
            let Some(vendor) = vendor.map(|known| known.vendor) else { continue };
            let count = u64::try_from(replicas.len()).unwrap_or(u64::MAX);
            let bytes = expert_bytes(&other.spec.geometry, &other.spec.vendor_formats, vendor).times(count);
            let sum = committed.entry(device.clone()).or_default();
            *sum = sum.plus(bytes);
        }
    }
    committed
}

/// Bytes of one expert on devices of `vendor`.
#[must_use]
pub fn expert_bytes(
    geometry: &Geometry,
    formats: &BTreeMap<Vendor, berth_types::WeightFormat>,
    vendor: Vendor,
) -> Bytes {
    geometry.expert_bytes(geometry.format_on(formats, vendor))
}
