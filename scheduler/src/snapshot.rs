//! The index as a planner's problem. Leaves nothing out that a plan depends on, and adds nothing.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use berth_crds::model_deployment::Survive as Declared;
use berth_planner::{
    Device, Forecast, Goal, Instance, Layout, Payback, Problem, Sharing, Standing, Survive, problem::Loads,
};
use berth_types::{Bytes, DeviceId, Geometry, Health, LayerId, PlacementName, Vendor};

use crate::{
    index::{Index, Placement},
    replan::Cause,
};

/// The problem of planning `name` at `now`, and the layout that the plan starts from.
#[must_use]
pub fn snapshot(
    index: &Index,
    now: Duration,
    name: &PlacementName,
    cause: Cause,
) -> Option<(Problem, Option<Arc<Layout>>)> {
    let placement = index.placements().get(name)?;
    let committed = committed(index, name);
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
                speed: 1.0,
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
        instance: instance(index, name, placement),
        devices,
        held: placement.held().map(|layout| Layout::clone(layout)).collect(),
    };
    Some((problem, placement.assigned().cloned()))
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

fn instance(index: &Index, name: &PlacementName, placement: &Placement) -> Instance {
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
        loads: expected(index, name, placement),
        sharing: Sharing::Even,
    }
}

/// The loads expected next, from the placement's own windows; before it has any, from those of another
/// instance of the same model.
fn expected(index: &Index, name: &PlacementName, placement: &Placement) -> Loads {
    let own = forecast(&placement.spec.geometry, &placement.windows());
    let same =
        |other: &Placement| other.spec.model == placement.spec.model && other.spec.geometry == placement.spec.geometry;
    let others = || index.placements().iter().filter(|(other, known)| *other != name && same(known));
    own.or_else(|| others().find_map(|(_, other)| forecast(&other.spec.geometry, &other.windows()))).unwrap_or_default()
}

/// What windows say of the next one; nothing without windows.
fn forecast(geometry: &Geometry, windows: &[Loads]) -> Option<Loads> {
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
    Some(layers.into_iter().zip(forecast.tokens()?).collect())
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
    geometry.expert_bytes(formats.get(&vendor).copied().unwrap_or(geometry.format))
}
