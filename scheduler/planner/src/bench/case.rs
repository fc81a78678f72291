//! A case of a placement benchmark: its devices, its load windows, what happens between them. Solves nothing.

use std::collections::BTreeSet;

use serde::Deserialize;

use crate::experts::Site;

/// A file of cases.
#[derive(Clone, Debug, Deserialize)]
pub struct Manifest {
    /// The cases.
    pub cases: Vec<Case>,
}

/// One case. Fields that only describe how its loads were made are ignored.
#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    /// Names the case and its load file.
    pub id: String,
    /// Expert layers.
    pub layers: usize,
    /// Experts of each layer.
    pub experts: usize,
    /// Bytes of one expert.
    pub expert_bytes: u64,
    /// Load windows.
    #[serde(default = "one")]
    pub windows: usize,
    /// The devices.
    pub pools: Vec<Pool>,
    /// What happens between windows.
    #[serde(default)]
    pub events: Vec<Event>,
}

const fn one() -> usize {
    1
}

/// Devices of one kind. Devices are numbered pool by pool, node by node.
#[derive(Clone, Debug, Deserialize)]
pub struct Pool {
    /// Nodes.
    pub nodes: usize,
    /// Devices of each node.
    pub devices_per_node: usize,
    /// Slots of each device in each layer.
    pub slots_per_layer: usize,
    /// Relative speed.
    pub speed: f64,
}

/// A node is lost or comes back empty before a window.
#[derive(Clone, Debug, Deserialize)]
pub struct Event {
    /// The window before which it applies.
    pub window: usize,
    /// Node that is lost, numbered pool by pool.
    #[serde(default)]
    pub remove_node: Option<usize>,
    /// Node that comes back.
    #[serde(default)]
    pub return_node: Option<usize>,
}

/// Why a case cannot be solved.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum BenchError {
    /// Fewer slots than experts.
    #[error(
        "case {case}, window {window}: {experts} experts a layer and {slots} slots on {devices} living devices: {short} short; \
         raise slots_per_layer or add devices"
    )]
    Slots {
        /// The case.
        case: String,
        /// The window.
        window: usize,
        /// Experts.
        experts: usize,
        /// Slots that count.
        slots: usize,
        /// Living devices.
        devices: usize,
        /// The difference.
        short: usize,
    },
    /// The load file is not windows × layers × experts counts.
    #[error("case {case}: the load file has {found} bytes, {expected} are windows x layers x experts x 4")]
    Loads {
        /// The case.
        case: String,
        /// Bytes found.
        found: usize,
        /// Bytes expected.
        expected: usize,
    },
    /// A field that cannot be right.
    #[error("case {case}: field {field}: {remedy}")]
    Field {
        /// The case.
        case: String,
        /// The field.
        field: &'static str,
        /// What to write instead.
        remedy: &'static str,
    },
}

/// A device of a case.
pub(super) struct Spot {
    pub(super) node: usize,
    pub(super) site: Site,
}

/// Tokens by window, layer and expert.
pub(super) fn windows(case: &Case, loads: &[u8]) -> Result<Vec<Vec<Vec<f64>>>, BenchError> {
    let field = |field, remedy| Err(BenchError::Field { case: case.id.clone(), field, remedy });
    if case.layers == 0 || case.experts == 0 || case.windows == 0 {
        return field("layers, experts, windows", "must be above 0");
    }
    if case.experts >= usize::from(u16::MAX) {
        return field("experts", "must be below 65535");
    }
    let size = case.windows.saturating_mul(case.layers).saturating_mul(case.experts);
    let expected = size.saturating_mul(4);
    if loads.len() != expected {
        return Err(BenchError::Loads { case: case.id.clone(), found: loads.len(), expected });
    }
    let (counts, _) = loads.as_chunks::<4>();
    let counts: Vec<f64> = counts.iter().map(|count| f64::from(u32::from_le_bytes(*count))).collect();
    let layers = |window: &[f64]| window.chunks(case.experts).map(<[f64]>::to_vec).collect();
    Ok(counts.chunks(case.layers * case.experts).map(layers).collect())
}

/// The devices, pool by pool, node by node.
pub(super) fn spots(case: &Case) -> Result<Vec<Spot>, BenchError> {
    let field = |field, remedy| BenchError::Field { case: case.id.clone(), field, remedy };
    let mut spots: Vec<Spot> = Vec::new();
    let mut node = 0;
    for pool in &case.pools {
        if !(pool.speed.is_finite() && pool.speed > 0.0) {
            return Err(field("pools.speed", "must be a number above 0"));
        }
        for _ in 0..pool.nodes {
            for _ in 0..pool.devices_per_node {
                let card = spots.len();
                let slots = pool.slots_per_layer;
                let bytes = case.expert_bytes;
                let site = Site { slots, speed: pool.speed, node, card, bytes, closed: false };
                spots.push(Spot { node, site });
            }
            node += 1;
        }
    }
    let beyond = |named: &Option<usize>| named.is_some_and(|named| named >= node);
    if case.events.iter().any(|event| beyond(&event.remove_node) || beyond(&event.return_node)) {
        return Err(field("events", "must name nodes of the pools, numbered from 0"));
    }
    Ok(spots)
}

/// Nodes that are lost by the time of a window.
pub(super) fn gone(case: &Case, window: usize) -> BTreeSet<usize> {
    let mut events: Vec<&Event> = case.events.iter().filter(|event| event.window <= window).collect();
    events.sort_by_key(|event| event.window);
    let mut gone = BTreeSet::new();
    for event in events {
        gone.extend(event.remove_node);
        if let Some(back) = event.return_node {
            gone.remove(&back);
        }
    }
    gone
}

/// Whether the living devices have a slot for every expert.
pub(super) fn feasible(case: &Case, window: usize, spots: &[Spot], alive: &[bool]) -> Result<(), BenchError> {
    let living = || spots.iter().zip(alive).filter(|(_, alive)| **alive);
    let slots = living().map(|(spot, _)| spot.site.slots.min(case.experts)).sum();
    if slots >= case.experts {
        return Ok(());
    }
    let (experts, devices, short) = (case.experts, living().count(), case.experts - slots);
    Err(BenchError::Slots { case: case.id.clone(), window, experts, slots, devices, short })
}
