//! Everything a plan depends on: devices, one instance, what devices hold, the time and the seed. Holds
//! values only and decides nothing.

use std::collections::BTreeMap;

use berth_types::{Bytes, DeviceId, DeviceMemory, Geometry, LayerId, PlacementName, Revision, Vendor, WeightFormat};
use serde::{Deserialize, Serialize};

use crate::{num, plan::Layout};

/// What may be done with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Standing {
    /// New replicas may be placed.
    Open,
    /// Keeps what it holds, takes nothing new: its agent has not been heard for a moment.
    Frozen,
    /// Takes nothing new; what it holds is moved away while it still serves.
    Leaving,
    /// Its replicas count as gone.
    Gone,
}

/// A failure domain whose loss must leave every expert with a replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Survive {
    /// Nothing: one replica is enough.
    #[default]
    Nothing,
    /// Any one device.
    Device,
    /// Any one node.
    Node,
    /// Any one rack.
    Rack,
}

impl Survive {
    /// The levels from this one down to none.
    pub(crate) fn downwards(self) -> impl Iterator<Item = Self> {
        [Self::Rack, Self::Node, Self::Device, Self::Nothing].into_iter().filter(move |level| *level <= self)
    }

    /// Replicas, each in another failure domain, that the level needs of every expert.
    #[must_use]
    pub const fn copies(self) -> usize {
        match self {
            Self::Nothing => 1,
            Self::Device | Self::Node | Self::Rack => 2,
        }
    }

    /// The word in sentences.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Device => "device",
            Self::Node => "node",
            Self::Rack => "rack",
        }
    }
}

/// How the replicas of an expert share its tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Sharing {
    /// Evenly: each takes as many as the others.
    #[default]
    Even,
    /// By weights that the plan carries: a slower or fuller device takes a smaller part.
    Weighted,
}

impl Sharing {
    /// The word in sentences.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Even => "even",
            Self::Weighted => "weighted",
        }
    }
}

/// One device, as the planner sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// Which device.
    pub id: DeviceId,
    /// Its rack; `None` = its node is its rack.
    pub rack: Option<String>,
    /// Its interconnect domain; `None` = its node.
    pub domain: Option<String>,
    /// Devices of a node with the same card fail together; empty = alone.
    pub card: String,
    /// Who made it.
    pub vendor: Vendor,
    /// Product, as its agent reports it.
    pub product: String,
    /// Bytes on the device.
    pub memory: Bytes,
    /// Bytes the kernels need beside weights.
    pub workspace: Bytes,
    /// Bytes that other instances hold or have been promised.
    pub committed: Bytes,
    /// Tokens per second relative to other devices; above 0. `speed::relative` makes it from what was
    /// measured and declared.
    pub speed: f64,
    /// Weight formats that its kernels compute with; none = not said, as if all.
    #[serde(default)]
    pub computes: Vec<WeightFormat>,
    /// Works below its nominal speed or safety: taken last.
    pub degraded: bool,
    /// What may be done with it.
    pub standing: Standing,
}

impl Device {
    /// The name of its failure domain at `level`.
    #[must_use]
    pub fn failure_domain(&self, level: Survive) -> &str {
        match (level, &self.rack) {
            (Survive::Nothing | Survive::Device, _) => self.id.as_str(),
            (Survive::Rack, Some(rack)) => rack,
            (Survive::Node | Survive::Rack, _) => self.id.node(),
        }
    }

    /// The name of its interconnect domain.
    #[must_use]
    pub fn interconnect(&self) -> &str {
        self.domain.as_deref().unwrap_or_else(|| self.id.node())
    }
}

/// Tokens by expert for each layer; a layer that is absent counts as evenly loaded.
pub type Loads = BTreeMap<LayerId, Vec<u64>>;

/// One full copy of a model, to be placed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Instance {
    /// The placement.
    pub name: PlacementName,
    /// The revision that the plan will be.
    pub revision: Revision,
    /// The model.
    pub geometry: Geometry,
    /// Formats that differ from the checkpoint's.
    pub formats: BTreeMap<Vendor, WeightFormat>,
    /// Non-expert and cache bytes of the runner, shared evenly by the instance's devices.
    pub reserve: Bytes,
    /// Allowed vendors; empty = all.
    pub vendors: Vec<Vendor>,
    /// Allowed products; empty = all.
    pub products: Vec<String>,
    /// Devices wanted; `None` = the least that memory and `survive` allow.
    pub devices: Option<u32>,
    /// Most devices that it may take; `None` = no bound.
    pub granted: Option<u32>,
    /// It may span both vendors.
    pub cross_vendor: bool,
    /// Largest share of its devices in one failure domain, percent.
    pub blast_radius_percent: Option<u32>,
    /// What must be survived.
    pub survive: Survive,
    /// Slots per layer beyond what `survive` needs.
    pub extra_replicas: u32,
    /// What its experts were asked for.
    pub loads: Loads,
    /// How its runner can share an expert's tokens over replicas.
    #[serde(default)]
    pub sharing: Sharing,
}

impl Instance {
    /// How devices of `vendor` hold experts.
    #[must_use]
    pub fn format(&self, vendor: Vendor) -> WeightFormat {
        self.geometry.format_on(&self.formats, vendor)
    }

    /// Bytes of one expert on devices of `vendor`.
    #[must_use]
    pub fn expert_bytes(&self, vendor: Vendor) -> Bytes {
        self.geometry.expert_bytes(self.format(vendor))
    }

    /// Whether the spec's vendors and products let it on `device`.
    #[must_use]
    pub fn allows(&self, device: &Device) -> bool {
        (self.vendors.is_empty() || self.vendors.contains(&device.vendor))
            && (self.products.is_empty() || self.products.contains(&device.product))
    }

    /// Whether `device` computes with experts as it would hold them.
    #[must_use]
    pub fn is_computed_on(&self, device: &Device) -> bool {
        self.format(device.vendor).is_in(&device.computes)
    }

    /// Memory of `device` when the instance spans `devices` devices.
    #[must_use]
    pub fn memory(&self, device: &Device, devices: usize) -> DeviceMemory {
        let share = self.reserve.get().div_ceil(num::count(devices.max(1)));
        DeviceMemory {
            device: device.memory,
            workspace: device.workspace.plus(Bytes(share)),
            committed: device.committed,
        }
    }

    /// Slots per layer that `device` has room for when the instance spans `devices` devices. More slots
    /// than experts are of no use, for copies never share a device.
    #[must_use]
    pub fn capacity(&self, device: &Device, devices: usize) -> usize {
        let slots = self.memory(device, devices).slots_per_layer(&self.geometry, self.expert_bytes(device.vendor));
        num::index64(slots.unwrap_or(0)).min(num::index(self.geometry.experts))
    }
}

/// What a plan should achieve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Goal {
    /// Place what is not placed and nothing else: the first placement, or a repair.
    Repair,
    /// Move replicas for balance, if that pays back.
    Rebalance {
        /// Most replicas that may move; `None` = no bound.
        moves: Option<u32>,
        /// Most bytes that may move; `None` = no bound.
        bytes: Option<Bytes>,
    },
}

/// How much work goes into a layer: units, never time, so that plans are the same on every machine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Effort {
    /// Most units; one is about one exchange of replicas looked at.
    pub units: u64,
    /// A slowest device this close to its bound is good enough.
    pub close: f64,
}

impl Effort {
    /// A plan at once.
    pub const FAST: Self = Self { units: 20_000, close: 4e-3 };
    /// A good plan.
    pub const DEFAULT: Self = Self { units: 400_000, close: 3e-4 };
    /// The best that minutes of work would hardly better.
    pub const BEST: Self = Self { units: 5_000_000, close: 2e-5 };
}

/// What moving replicas costs beside what it saves.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Payback {
    /// Seconds for which a gain is expected to last: until the load changes again.
    pub lasts_s: f64,
    /// Bytes per second that a device loads.
    pub bytes_per_s: f64,
    /// Share of a device's throughput that is lost while it loads.
    pub disturbance: f64,
    /// Share of the step time that experts take.
    pub experts: f64,
}

impl Default for Payback {
    fn default() -> Self {
        Self { lasts_s: 600.0, bytes_per_s: 1e9, disturbance: 0.3, experts: 0.5 }
    }
}

impl Payback {
    /// What one moved byte costs, as a share of the time that experts take: `devices` load side by side for
    /// 1 ÷ (devices × rate) seconds, losing `disturbance` of their work, and the gain lasts `lasts_s`.
    #[must_use]
    pub fn price(&self, devices: usize) -> f64 {
        let seconds = 1.0 / (self.bytes_per_s.max(1.0) * num::real_size(devices.max(1)));
        self.disturbance.max(0.0) * seconds / (self.lasts_s.max(1e-3) * self.experts.clamp(1e-3, 1.0))
    }
}

/// Everything known when a plan is made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Problem {
    /// Milliseconds on the scheduler's clock.
    pub now_ms: u64,
    /// Decides between equals.
    pub seed: u64,
    /// What the plan should achieve.
    pub goal: Goal,
    /// Work for each layer.
    pub effort: Effort,
    /// Threads; plans do not depend on it.
    pub threads: usize,
    /// What moving costs.
    pub payback: Payback,
    /// What to place.
    pub instance: Instance,
    /// All devices that the scheduler knows, in order of their ids.
    pub devices: Vec<Device>,
    /// Layouts of this instance whose slots devices may still hold.
    pub held: Vec<Layout>,
}

impl Problem {
    /// What a plan gets unless the caller says otherwise.
    pub const EFFORT: Effort = Effort::DEFAULT;
}
