//! A plan: the layouts to go through, in order, and the printed difference that a person reads. Its state
//! is part of its type: only the checker makes `Checked`, only `Checked` can be committed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    marker::PhantomData,
};

use berth_types::{Bytes, DeviceId, ExpertId, LayerId, PlacementName, Revision};
use serde::{Deserialize, Serialize};

use crate::{
    num,
    problem::{Sharing, Survive},
};

/// One device of a layout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSlots {
    /// The device.
    pub device: DeviceId,
    /// Its slots in each layer.
    pub slots: u32,
}

/// Which expert is in which slot: a row per expert layer, the slots of all devices in device order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The devices, in slot order.
    pub devices: Vec<DeviceSlots>,
    /// For each layer, as many entries as all devices have slots; `None` = empty.
    pub layers: BTreeMap<LayerId, Vec<Option<ExpertId>>>,
}

impl Layout {
    /// Each device with the range of its slots in a row.
    pub fn ranges(&self) -> impl Iterator<Item = (&DeviceId, std::ops::Range<usize>)> {
        let mut at = 0_usize;
        self.devices.iter().map(move |entry| {
            let start = at;
            at = at.saturating_add(num::index(entry.slots));
            (&entry.device, start..at)
        })
    }

    /// The slots of `device`, by layer; nothing if the layout does not name it.
    #[must_use]
    pub fn slots_of(&self, device: &DeviceId) -> BTreeMap<LayerId, Vec<Option<ExpertId>>> {
        let Some((_, range)) = self.ranges().find(|(id, _)| *id == device) else { return BTreeMap::new() };
        let part = |row: &Vec<Option<ExpertId>>| row.get(range.clone()).unwrap_or_default().to_vec();
        self.layers.iter().map(|(layer, row)| (*layer, part(row))).collect()
    }

    /// Every replica, by device.
    #[must_use]
    pub fn replicas(&self) -> BTreeMap<&DeviceId, BTreeSet<(LayerId, ExpertId)>> {
        let mut replicas = BTreeMap::new();
        for (device, range) in self.ranges() {
            let held: &mut BTreeSet<_> = replicas.entry(device).or_default();
            for (layer, row) in &self.layers {
                held.extend(
                    row.get(range.clone()).unwrap_or_default().iter().flatten().map(|expert| (*layer, *expert)),
                );
            }
        }
        replicas
    }

    /// Slots of all devices in one layer.
    #[must_use]
    pub fn width(&self) -> usize {
        self.devices.iter().map(|entry| num::index(entry.slots)).sum()
    }
}

/// By layer and slot of a layout, the part of its expert's tokens that a slot's replica takes, in 1 / 65,535.
/// The parts of an expert sum to 65,535 exactly; an empty slot has 0.
pub type Weights = BTreeMap<LayerId, Vec<u16>>;

/// A plan as `solve` made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Proposed;
/// A plan that the checker found nothing wrong with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checked;
/// A plan whose first layout is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed;

/// What was decided.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The placement.
    pub name: PlacementName,
    /// Revision of the first layout; each further one is one higher.
    pub revision: Revision,
    /// Layouts to go through; each is loaded, switched to and drained before the next. Never empty.
    pub waves: Vec<Layout>,
    /// The largest failure domain whose loss the last layout survives.
    pub survives: Survive,
    /// Replicas that devices must load over all waves.
    pub moves: u64,
    /// Bytes of those replicas.
    pub moved_bytes: Bytes,
    /// How good the last layout is, and what keeps it from being better.
    pub certificate: Certificate,
    /// How the certificate assumes that replicas share tokens.
    pub sharing: Sharing,
    /// When weighted, the weights of each of `waves`; else none.
    pub weights: Vec<Weights>,
    /// Why replicas moved for balance, or did not.
    pub balance: Balance,
}

/// Why replicas moved for balance, or did not. Gains and costs are shares of the time that experts take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Balance {
    /// It was not asked for: a first placement, or a repair.
    #[default]
    Unasked,
    /// The slowest device is so near its bound that no move can be worth it.
    Close {
        /// What it is above the bound, mean over layers.
        slack: f64,
    },
    /// What moves could gain does not pay them back.
    Unpaid {
        /// Fall of the slowest device, mean over layers, of the best steps found.
        gain: f64,
        /// What moving their bytes costs.
        cost: f64,
        /// Least gain less cost for which anything moves.
        least: f64,
    },
    /// Moves pay back.
    Paid {
        /// Fall of the slowest device, mean over layers.
        gain: f64,
        /// What moving the bytes costs.
        cost: f64,
    },
}

impl fmt::Display for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |share: f64| share * 100.0;
        match *self {
            Self::Unasked => f.write_str("balance not asked for"),
            Self::Close { slack } => {
                write!(f, "nothing moves: the slowest device is {:.2} % above its bound", percent(slack))
            }
            Self::Unpaid { gain, cost, least } => write!(
                f,
                "nothing moves: moves would gain {:.2} % of the experts' time and cost {:.2} %, and {:.2} % must be left",
                percent(gain),
                percent(cost),
                percent(least)
            ),
            Self::Paid { gain, cost } => write!(
                f,
                "moves pay back: they gain {:.2} % of the experts' time and cost {:.2} %",
                percent(gain),
                percent(cost)
            ),
        }
    }
}

/// How good a layout is. Times are load ÷ speed over the ideal, which is total load ÷ total speed; a layer
/// without load counts 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// Slowest device, mean over layers.
    pub makespan: f64,
    /// The least that any layout reaches, mean over layers.
    pub bound: f64,
    /// Makespan ÷ bound − 1, mean over layers.
    pub gap: f64,
    /// What limits the slowest layer; `None` without load.
    pub limit: Option<Limit>,
}

/// What limits the slowest layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// The layer.
    pub layer: LayerId,
    /// The expert that its slowest device spends most on.
    pub expert: ExpertId,
    /// Its slowest device.
    pub makespan: f64,
    /// What that would be with one more slot for a copy of the expert.
    pub relieved: f64,
}

impl fmt::Display for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { makespan, bound, gap, limit } = self;
        write!(f, "slowest device at {makespan:.3} of the ideal, bound {bound:.3}, gap {:.1} %", gap * 100.0)?;
        match limit {
            Some(limit) if limit.makespan > 1.0005 => write!(f, "; {limit}"),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, expert, makespan, relieved } = self;
        write!(f, "layer {layer} limits at {makespan:.3}: expert {expert}, one more slot for it would ")?;
        if *relieved < makespan - 5e-4 {
            write!(f, "make that {relieved:.3}")
        } else {
            f.write_str("not be enough: other devices are as slow")
        }
    }
}

/// A plan in state `S`.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan<S> {
    decision: Decision,
    state: PhantomData<S>,
}

impl<S> Plan<S> {
    /// What was decided.
    #[must_use]
    pub const fn decision(&self) -> &Decision {
        &self.decision
    }

    /// The layout of the plan's revision.
    #[must_use]
    pub fn first(&self) -> Option<&Layout> {
        self.decision.waves.first()
    }

    /// The weights of the plan's revision; `None` = replicas share evenly.
    #[must_use]
    pub fn weights(&self) -> Option<&Weights> {
        self.decision.weights.first()
    }

    fn into<T>(self) -> Plan<T> {
        Plan { decision: self.decision, state: PhantomData }
    }
}

impl Plan<Proposed> {
    /// A plan to be checked. Anybody may propose.
    #[must_use]
    pub const fn propose(decision: Decision) -> Self {
        Self { decision, state: PhantomData }
    }

    /// For the checker alone.
    pub(crate) fn checked(self) -> Plan<Checked> {
        self.into()
    }
}

impl Plan<Checked> {
    /// The same plan once its first layout is stored.
    #[must_use]
    pub fn committed(self) -> Plan<Committed> {
        self.into()
    }
}

impl Plan<Committed> {
    /// What is left after the first layout: to be checked again when its turn comes.
    #[must_use]
    pub fn rest(self) -> Option<Plan<Proposed>> {
        let mut decision = self.decision;
        if decision.waves.len() < 2 {
            return None;
        }
        decision.waves.remove(0);
        if !decision.weights.is_empty() {
            decision.weights.remove(0);
        }
        decision.revision = decision.revision.next();
        Some(Plan::propose(decision))
    }
}

/// Prints what `after` changes in `before`, for people.
#[must_use]
pub fn diff(before: Option<&Layout>, after: &Layout) -> String {
    let empty = Layout::default();
    let before = before.unwrap_or(&empty);
    let (old, new) = (before.replicas(), after.replicas());
    let slots = |layout: &Layout, device: &DeviceId| {
        layout.devices.iter().find(|entry| entry.device == *device).map_or(0, |entry| entry.slots)
    };
    let none = BTreeSet::new();
    let devices: BTreeSet<_> = old.keys().chain(new.keys()).copied().collect();
    let mut text = String::new();
    for device in devices {
        let (held, wanted) = (old.get(device).unwrap_or(&none), new.get(device).unwrap_or(&none));
        if held == wanted && slots(before, device) == slots(after, device) {
            continue;
        }
        let sign = match (old.contains_key(device), new.contains_key(device)) {
            (false, _) => '+',
            (true, false) => '-',
            (true, true) => '~',
        };
        let (from, to) = (slots(before, device), slots(after, device));
        let _ = writeln!(text, "{sign} {device}  slots a layer {from} -> {to}");
        let mut lines: BTreeMap<LayerId, String> = BTreeMap::new();
        for (mark, one, other) in [('+', wanted, held), ('-', held, wanted)] {
            for (layer, expert) in one.difference(other) {
                let _ = write!(lines.entry(*layer).or_default(), " {mark}{expert}");
            }
        }
        for (layer, line) in lines {
            let _ = writeln!(text, "    layer {layer}:{line}");
        }
    }
    if text.is_empty() { "no change\n".to_owned() } else { text }
}

impl<S> fmt::Display for Plan<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Decision { name, revision, waves, survives, moves, moved_bytes, certificate, sharing, balance, .. } =
            &self.decision;
        write!(
            f,
            "{name} revision {revision}: {moves} moves, {moved_bytes}, {} wave(s), survives {}, {certificate}",
            waves.len(),
            survives.as_str()
        )?;
        if *sharing == Sharing::Weighted {
            f.write_str("; replicas share tokens by weight")?;
        }
        if *balance == Balance::Unasked { Ok(()) } else { write!(f, "; {balance}") }
    }
}
