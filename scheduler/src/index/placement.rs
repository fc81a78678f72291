//! One placement in memory: its spec, its revisions, its runners, its loads, and how far it is. Decides
//! nothing.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use berth_crds::{
    ExpertPlacement, ExpertPlacementSpec, ExpertPlacementStatus, PlacementMap,
    expert_placement::{PlanCertificate, PlanDecision},
    placement_map::{MapDevice, MapLayer},
};
use berth_planner::{DeviceSlots, Layout, Plan, Proposed, Sharing, Survive, Weights, problem::Loads};
use berth_types::{Bytes, DeviceId, ExpertId, LayerId, Revision};

use crate::{
    balance::DeviceLoads,
    cutover::{Cutover, HOLD},
    replan::Cause,
};

/// Load windows kept of each runner.
const WINDOWS: usize = 16;
/// Length of a load window whose runner does not say it.
const WINDOW: Duration = Duration::from_secs(10);
/// Windows of a runner that the measured balance speaks of.
const MEASURED: usize = 3;

/// A runner's load window.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadWindow {
    /// Rises by one with every window.
    pub number: u64,
    /// Revision that devices computed.
    pub revision: Revision,
    /// Tokens by layer and expert.
    pub layers: BTreeMap<LayerId, Vec<u64>>,
    /// What devices answered of the revision.
    pub devices: DeviceLoads,
    /// How long it was; zero = not known.
    pub length: Duration,
}

/// A stored revision.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its layout.
    pub layout: Arc<Layout>,
    /// What part of its expert's tokens each slot takes; `None` = replicas share evenly.
    pub weights: Option<Arc<Weights>>,
    /// `sha256:<hex>` of the map's spec.
    pub digest: String,
}

/// One runner's stream.
#[derive(Clone, Debug)]
pub struct Runner {
    /// When the stream opened.
    opened: Duration,
    /// When it ended, if it has.
    ended: Option<Duration>,
    /// It divides tokens by weights.
    weighs: bool,
    /// Oldest revision with steps, once it has said so.
    oldest: Option<Revision>,
    /// Its last windows.
    windows: VecDeque<LoadWindow>,
}

/// A plan that is being made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// Tells it from others.
    pub number: u64,
    /// What made it due.
    pub cause: Cause,
}

/// A plan that is being stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// Its revision.
    pub revision: Revision,
    /// What made it due.
    pub cause: Cause,
    /// Until its gain has paid for its moves.
    pub pays_back: Duration,
}

/// What the status tells of plans.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    /// Why the last revision was made.
    pub why: String,
    /// Bytes it made devices load.
    pub moved: Bytes,
    /// How good it is.
    pub certificate: Option<PlanCertificate>,
    /// The last decisions, the newest first.
    pub decisions: Vec<PlanDecision>,
}

impl Told {
    /// What a status tells.
    #[must_use]
    pub fn of(status: &ExpertPlacementStatus) -> Self {
        Self {
            why: status.why.clone(),
            moved: status.moved_bytes,
            certificate: status.certificate.clone(),
            decisions: status.decisions.clone(),
        }
    }
}

/// What is remembered of plans.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// World and generation of the spec as the last plan saw them.
    pub seen: Option<(u64, i64)>,
    /// Something else that plans depend on changed since.
    pub stale: bool,
    /// When the assigned revision was assigned, or taken over.
    pub settled_at: Duration,
    /// Nothing moves for balance before: the last moves have not paid back yet.
    pub balance_at: Duration,
    /// Load windows that had been heard when the balance was looked at last.
    pub looked: u64,
    /// The plan that is being made.
    pub planning: Option<Ticket>,
    /// Not before.
    pub retry_at: Duration,
    /// Refusals in a row.
    pub refused: u32,
    /// What is being committed.
    pub pending: Option<Pending>,
    /// Its layout, promised to the placement.
    pub promised: Option<Arc<Layout>>,
    /// Further waves.
    pub rest: Option<Plan<Proposed>>,
    /// Why it cannot be placed as asked.
    pub problem: Option<String>,
    /// What the status tells of plans.
    pub told: Told,
    /// Largest failure domain whose loss it survives; `None` = another leader planned it.
    pub survives: Option<Survive>,
    /// Highest revision whose map exists without being ours.
    pub burned: Revision,
}

/// One placement.
#[derive(Clone, Debug)]
pub struct Placement {
    /// Uid of the object.
    pub uid: String,
    /// Generation of the spec.
    pub generation: i64,
    /// Another leader assigned a revision: runners that it knew may still come back.
    pub inherited: bool,
    /// What is asked for.
    pub spec: ExpertPlacementSpec,
    /// The status as it was adopted or last written.
    pub status: ExpertPlacementStatus,
    /// Stored revisions.
    pub revisions: BTreeMap<Revision, Stored>,
    /// Between which revisions it stands.
    pub cutover: Cutover,
    /// What is remembered of plans.
    pub memory: Memory,
    /// Devices that did not load in time, with the instance of the worker that failed.
    pub avoided: BTreeMap<DeviceId, u64>,
    /// Its runners, by stream.
    pub runners: BTreeMap<u64, Runner>,
    /// Load windows heard, those sent again not counted.
    pub heard: u64,
    /// Trace of the decision that made the serving revision; empty = not known.
    pub traceparent: String,
}

impl Placement {
    /// A placement as its object says it is.
    #[must_use]
    pub fn new(now: Duration, object: &ExpertPlacement, revisions: BTreeMap<Revision, Stored>) -> Self {
        let status = object.status.clone().unwrap_or_default();
        let assigned = status.assignment.as_ref().map_or(0, |assignment| assignment.revision);
        let [assigned, serving, draining] = [assigned, status.serving_revision, status.draining_revision].map(Revision);
        let mut cutover = Cutover::adopt(now, assigned, serving, draining);
        for (revision, _) in revisions.range(draining.max(Revision(1))..).take_while(|(one, _)| **one <= serving) {
            cutover.hold(*revision);
        }
        let memory = Memory {
            // A spec that this status speaks of is no change.
            seen: status.observed_generation.map(|generation| (0, generation)),
            told: Told::of(&status),
            settled_at: now,
            ..Memory::default()
        };
        Self {
            uid: object.metadata.uid.clone().unwrap_or_default(),
            generation: object.metadata.generation.unwrap_or(0),
            inherited: assigned.0 > 0,
            spec: object.spec.clone(),
            status,
            revisions,
            cutover,
            memory,
            avoided: BTreeMap::new(),
            runners: BTreeMap::new(),
            heard: 0,
            traceparent: String::new(),
        }
    }

    /// The layout of `revision`, if it is known.
    #[must_use]
    pub fn layout(&self, revision: Revision) -> Option<&Arc<Layout>> {
        self.revisions.get(&revision).map(|stored| &stored.layout)
    }

    /// The weights of `revision`, if it is known and has any.
    #[must_use]
    pub fn weights(&self, revision: Revision) -> Option<&Weights> {
        self.revisions.get(&revision)?.weights.as_deref()
    }

    /// How its runners share an expert's tokens over replicas: by weights, if all that are connected can.
    #[must_use]
    pub fn sharing(&self) -> Sharing {
        let mut open = self.runners.values().filter(|runner| runner.ended.is_none()).peekable();
        if open.peek().is_some() && open.all(|runner| runner.weighs) { Sharing::Weighted } else { Sharing::Even }
    }

    /// The layout of the assigned revision.
    #[must_use]
    pub fn assigned(&self) -> Option<&Arc<Layout>> {
        self.layout(self.cutover.assigned())
    }

    /// Whether the assigned revision loads, or an older one drains.
    #[must_use]
    pub fn is_cutting(&self) -> bool {
        self.cutover.loading() || self.cutover.draining().0 > 0
    }

    /// Layouts that devices hold or have been promised.
    pub fn held(&self) -> impl Iterator<Item = &Arc<Layout>> {
        let retained = self.cutover.retained().into_iter().filter_map(|revision| self.layout(revision));
        retained.chain(self.memory.promised.as_ref())
    }

    /// Replicas that each device holds or was promised.
    #[must_use]
    pub fn footprint(&self) -> BTreeMap<&DeviceId, BTreeSet<(LayerId, ExpertId)>> {
        let mut footprint: BTreeMap<&DeviceId, BTreeSet<_>> = BTreeMap::new();
        let retained = self.cutover.retained();
        let layouts = self.revisions.iter().filter(|(revision, _)| retained.contains(revision));
        for layout in layouts.map(|(_, stored)| &stored.layout).chain(self.memory.promised.as_ref()) {
            for (device, replicas) in layout.replicas() {
                footprint.entry(device).or_default().extend(replicas);
            }
        }
        footprint
    }

    /// Whether one of its layouts names a device of `node`.
    #[must_use]
    pub fn touches(&self, node: &str) -> bool {
        self.held().any(|layout| layout.devices.iter().any(|entry| entry.device.node() == node))
    }

    /// A runner's stream opened.
    pub fn runner_opened(&mut self, now: Duration, conn: u64, weighs: bool) {
        let runner = Runner { opened: now, ended: None, weighs, oldest: None, windows: VecDeque::new() };
        self.runners.insert(conn, runner);
    }

    /// A runner's stream ended: its hold ends a little later.
    pub fn runner_closed(&mut self, now: Duration, conn: u64) {
        if let Some(runner) = self.runners.get_mut(&conn) {
            runner.ended.get_or_insert(now);
        }
    }

    /// What a runner has steps on.
    pub fn in_use(&mut self, conn: u64, oldest: Revision, current: Revision) {
        if let Some(runner) = self.runners.get_mut(&conn) {
            runner.oldest = Some(oldest);
            self.cutover.observe(oldest, current);
        }
    }

    /// A runner's load window; one sent again replaces itself.
    pub fn load(&mut self, conn: u64, window: LoadWindow) {
        let Some(runner) = self.runners.get_mut(&conn) else { return };
        match runner.windows.iter_mut().find(|known| known.number == window.number) {
            Some(known) => *known = window,
            None => {
                runner.windows.push_back(window);
                self.heard += 1;
            }
        }
        while runner.windows.len() > WINDOWS {
            runner.windows.pop_front();
        }
    }

    /// Forgets runners whose hold is over, and lets go of what nobody holds. `grace`: other runners may
    /// still come back, so nothing is let go. Says whether something became free.
    pub fn drain(&mut self, now: Duration, grace: bool) -> bool {
        let over = |since: Duration| now.saturating_sub(since) >= HOLD;
        self.runners.retain(|_, runner| !runner.ended.is_some_and(over));
        let silent = self.runners.values().any(|runner| runner.oldest.is_none() && !over(runner.opened));
        if grace || silent {
            return false;
        }
        let oldest: Vec<_> = self.runners.values().filter_map(|runner| runner.oldest).collect();
        self.cutover.drain(oldest.into_iter())
    }

    /// Tokens by layer and expert over the last windows of all runners.
    #[must_use]
    pub fn loads(&self) -> Loads {
        let mut loads = Loads::new();
        for window in self.runners.values().flat_map(|runner| &runner.windows) {
            add(&mut loads, &window.layers);
        }
        loads
    }

    /// What devices answered of the serving revision in the last windows of all runners.
    #[must_use]
    pub fn answered(&self) -> DeviceLoads {
        let serving = self.cutover.serving();
        let mut sum = DeviceLoads::new();
        for runner in self.runners.values() {
            let windows = runner.windows.iter().rev().take(MEASURED).filter(|window| window.revision == serving);
            for (device, layers) in windows.flat_map(|window| &window.devices) {
                let known = sum.entry(device.clone()).or_default();
                for (layer, tokens) in layers {
                    let entry = known.entry(*layer).or_insert(0);
                    *entry = entry.saturating_add(*tokens);
                }
            }
        }
        sum
    }

    /// How long its load windows are.
    #[must_use]
    pub fn window_length(&self) -> Duration {
        let last = self.runners.values().filter_map(|runner| runner.windows.back()).map(|window| window.length);
        last.max().filter(|length| !length.is_zero()).unwrap_or(WINDOW)
    }

    /// Tokens of all experts in the last windows of all runners, of the layer with the most.
    #[must_use]
    pub fn last_tokens(&self) -> u64 {
        let mut last = Loads::new();
        self.runners.values().filter_map(|runner| runner.windows.back()).for_each(|one| add(&mut last, &one.layers));
        last.values().map(|tokens| tokens.iter().fold(0_u64, |sum, more| sum.saturating_add(*more))).max().unwrap_or(0)
    }

    /// The last windows, oldest first, each the sum of what all runners saw in it. Runners count windows for
    /// themselves: their last ones go together, and so on backwards.
    #[must_use]
    pub fn windows(&self) -> Vec<Loads> {
        let most = self.runners.values().map(|runner| runner.windows.len()).max().unwrap_or(0);
        let mut windows = vec![Loads::new(); most];
        for runner in self.runners.values() {
            for (window, sum) in runner.windows.iter().rev().zip(windows.iter_mut().rev()) {
                add(sum, &window.layers);
            }
        }
        windows
    }
}

/// Adds tokens by layer and expert.
fn add(loads: &mut Loads, layers: &BTreeMap<LayerId, Vec<u64>>) {
    for (layer, tokens) in layers {
        let sum = loads.entry(*layer).or_default();
        sum.resize(sum.len().max(tokens.len()), 0);
        for (sum, tokens) in sum.iter_mut().zip(tokens) {
            *sum = sum.saturating_add(*tokens);
        }
    }
}

/// A layout and its weights as a map holds them.
#[must_use]
pub fn to_map(layout: &Layout, weights: Option<&Weights>) -> (Vec<MapDevice>, Vec<MapLayer>) {
    let device = |entry: &DeviceSlots| MapDevice { device: entry.device.clone(), slots: entry.slots };
    let weights = |layer: &LayerId| weights.and_then(|weights| weights.get(layer)).cloned();
    let layer = |(layer, row): (&LayerId, &Vec<Option<ExpertId>>)| MapLayer {
        layer: layer.0,
        experts: row.clone(),
        weights: weights(layer),
    };
    (layout.devices.iter().map(device).collect(), layout.layers.iter().map(layer).collect())
}

/// The layout that a map holds.
#[must_use]
pub fn from_map(map: &PlacementMap) -> Layout {
    let device = |entry: &MapDevice| DeviceSlots { device: entry.device.clone(), slots: entry.slots };
    Layout {
        devices: map.spec.devices.iter().map(device).collect(),
        layers: map.spec.layers.iter().map(|layer| (LayerId(layer.layer), layer.experts.clone())).collect(),
    }
}

/// The weights that the map holds; `None` = replicas share evenly.
#[must_use]
pub fn weights_of(map: &PlacementMap) -> Option<Weights> {
    let layer = |layer: &MapLayer| Some((LayerId(layer.layer), layer.weights.clone()?));
    let weights: Weights = map.spec.layers.iter().filter_map(layer).collect();
    (!weights.is_empty()).then_some(weights)
}
