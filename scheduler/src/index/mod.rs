//! The world in memory: nodes, placements, runners, and which placements a change touches. Synchronous and
//! without a clock of its own: the time comes with each fact. It decides nothing and sends nothing.

mod node;
mod placement;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use berth_crds::{AcceleratorNode, ExpertPlacement, PlacementMap};
use berth_planner::{Layout, Standing};
use berth_types::{DeviceId, ExpertId, PlacementName, Revision};

pub use node::{GONE, Health, Node, Phase, SILENT, Shelf, Worker};
pub use placement::{LoadWindow, Memory, Pending, Placement, Stored, Ticket, Told, from_map, to_map, weights_of};

use crate::cutover::{Late, Progress};

/// What a plan depends on, as it was when it was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// What may be done with devices.
    pub world: u64,
    /// What placements hold or have been promised.
    pub claims: u64,
    /// The placement's spec.
    pub generation: i64,
    /// The revision that the plan starts from.
    pub assigned: Revision,
}

/// Everything known.
#[derive(Debug)]
pub struct Index {
    began: Duration,
    nodes: BTreeMap<String, Node>,
    placements: BTreeMap<PlacementName, Placement>,
    /// Which placement a runner's stream belongs to, and whether it divides tokens by weights.
    runners: BTreeMap<u64, (PlacementName, bool)>,
    /// Which node an agent's stream belongs to.
    agents: BTreeMap<u64, String>,
    standings: BTreeMap<DeviceId, Standing>,
    /// Rises when what may be done with a device changes.
    world: u64,
    /// Rises when what placements hold or have been promised changes.
    claims: u64,
    touched: BTreeSet<PlacementName>,
    stored: BTreeMap<(PlacementName, String), BTreeMap<Revision, Stored>>,
    /// Name and uid of placements that are gone and whose maps may be left.
    orphans: BTreeSet<(PlacementName, String)>,
}

impl Index {
    /// A world of which nothing is known at `now`.
    #[must_use]
    pub fn new(now: Duration) -> Self {
        Self {
            began: now,
            nodes: BTreeMap::new(),
            placements: BTreeMap::new(),
            runners: BTreeMap::new(),
            agents: BTreeMap::new(),
            standings: BTreeMap::new(),
            world: 1,
            claims: 0,
            touched: BTreeSet::new(),
            stored: BTreeMap::new(),
            orphans: BTreeSet::new(),
        }
    }

    /// A stored revision of the placement with this uid. Comes before the placement's object.
    pub fn map(&mut self, name: &PlacementName, uid: &str, map: &PlacementMap, digest: String) {
        let stored = Stored { layout: from_map(map).into(), weights: weights_of(map).map(Into::into), digest };
        let known = self.stored.entry((name.clone(), uid.to_owned())).or_default();
        known.insert(Revision(map.spec.revision), stored);
    }

    /// A placement's object.
    pub fn placement(&mut self, now: Duration, name: &PlacementName, object: &ExpertPlacement) {
        let uid = object.metadata.uid.clone().unwrap_or_default();
        if object.metadata.deletion_timestamp.is_some() {
            return self.placement_gone(name);
        }
        match self.placements.get_mut(name).filter(|known| known.uid == uid) {
            Some(known) => {
                // The status is ours: what we last wrote or adopted is as good as what comes back.
                let generation = object.metadata.generation.unwrap_or(0);
                if generation == known.generation {
                    return;
                }
                (known.generation, known.spec) = (generation, object.spec.clone());
            }
            None => {
                let revisions = self.stored.remove(&(name.clone(), uid)).unwrap_or_default();
                if let Some(other) = self.placements.insert(name.clone(), Placement::new(now, object, revisions)) {
                    self.orphans.insert((name.clone(), other.uid));
                }
                for (conn, (_, weighs)) in self.runners.iter().filter(|(_, (placement, _))| placement == name) {
                    if let Some(placement) = self.placements.get_mut(name) {
                        placement.runner_opened(now, *conn, *weighs);
                    }
                }
            }
        }
        self.touched.insert(name.clone());
    }

    /// A placement's object is gone: what it held is free.
    pub fn placement_gone(&mut self, name: &PlacementName) {
        self.orphan(|known| known == name);
        if let Some(gone) = self.placements.remove(name) {
            self.orphans.insert((name.clone(), gone.uid));
            // Its bytes are free for others.
            self.world += 1;
            self.touched.insert(name.clone());
            self.touched.extend(self.placements.keys().cloned());
        }
    }

    /// Only these placements exist.
    pub fn only_placements(&mut self, names: &BTreeSet<PlacementName>) {
        let gone: Vec<_> = self.placements.keys().filter(|name| !names.contains(name)).cloned().collect();
        for name in gone {
            self.placement_gone(&name);
        }
        // A map that was stored, and that no placement took.
        let others: BTreeSet<_> = self.placements.keys().cloned().collect();
        self.orphan(|name| !names.contains(name) || others.contains(name));
    }

    fn orphan(&mut self, is: impl Fn(&PlacementName) -> bool) {
        let gone = self.stored.extract_if(.., |(name, _), _| is(name)).map(|(key, _)| key);
        self.orphans.extend(gone);
    }

    /// Placements (name, uid) that went since the last call.
    pub fn take_orphans(&mut self) -> BTreeSet<(PlacementName, String)> {
        std::mem::take(&mut self.orphans)
    }

    /// A node's object.
    pub fn node_object(&mut self, now: Duration, name: &str, object: &AcceleratorNode) {
        let node = self.nodes.entry(name.to_owned()).or_insert_with(|| Node::new(now));
        if node.object(now, object) {
            self.touch_node(now, name);
        }
    }

    /// A node's object is gone.
    pub fn node_gone(&mut self, now: Duration, name: &str) {
        if let Some(node) = self.nodes.get_mut(name) {
            node.forget_object();
            self.touch_node(now, name);
        }
    }

    /// Only these nodes have objects.
    pub fn only_nodes(&mut self, now: Duration, names: &BTreeSet<String>) {
        let gone: Vec<_> = self.nodes.keys().filter(|name| !names.contains(*name)).cloned().collect();
        for name in gone {
            self.node_gone(now, &name);
        }
    }

    /// An agent's stream opened.
    pub fn agent_opened(&mut self, now: Duration, conn: u64, node: &str, hosting: bool) {
        self.agents.insert(conn, node.to_owned());
        self.nodes.entry(node.to_owned()).or_insert_with(|| Node::new(now)).open(now, conn, hosting);
        self.touch_node(now, node);
    }

    /// An agent's stream ended.
    pub fn agent_closed(&mut self, now: Duration, conn: u64) {
        let Some(name) = self.agents.remove(&conn) else { return };
        if self.nodes.get_mut(&name).is_some_and(|node| node.close(now, conn)) {
            self.touch_node(now, &name);
        }
    }

    /// An agent is heard.
    pub fn beat(&mut self, now: Duration, conn: u64) {
        self.agent_said(now, conn, |_| false);
    }

    /// A health report.
    pub fn health(&mut self, now: Duration, conn: u64, health: Health) {
        self.agent_said(now, conn, |node| node.health(now, health));
    }

    /// All workers of a node.
    pub fn workers(&mut self, now: Duration, conn: u64, workers: BTreeMap<DeviceId, Worker>) {
        self.agent_said(now, conn, |node| node.set_workers(now, workers));
    }

    fn agent_said(&mut self, now: Duration, conn: u64, say: impl FnOnce(&mut Node) -> bool) {
        let Some(name) = self.agents.get(&conn).cloned() else { return };
        let Some(node) = self.nodes.get_mut(&name) else { return };
        let before = node.reachable();
        // A stream that was replaced by a later one has nothing to say.
        if node.hear(now, conn) && (say(node) || !before) {
            self.touch_node(now, &name);
        }
    }

    /// A runner's stream opened.
    pub fn runner_opened(&mut self, now: Duration, conn: u64, placement: PlacementName, weighs: bool) {
        if let Some(known) = self.placements.get_mut(&placement) {
            known.runner_opened(now, conn, weighs);
        }
        self.touched.insert(placement.clone());
        self.runners.insert(conn, (placement, weighs));
    }

    /// A runner's stream ended.
    pub fn runner_closed(&mut self, now: Duration, conn: u64) {
        self.runner_said(conn, |placement| placement.runner_closed(now, conn));
        self.runners.remove(&conn);
    }

    /// Which revisions a runner uses.
    pub fn in_use(&mut self, conn: u64, oldest: Revision, current: Revision) {
        self.runner_said(conn, |placement| placement.in_use(conn, oldest, current));
    }

    /// A runner's load window.
    pub fn load(&mut self, conn: u64, window: LoadWindow) {
        self.runner_said(conn, |placement| placement.load(conn, window));
    }

    fn runner_said(&mut self, conn: u64, say: impl FnOnce(&mut Placement)) {
        let Some((name, _)) = self.runners.get(&conn) else { return };
        if let Some(placement) = self.placements.get_mut(name) {
            say(placement);
            self.touched.insert(name.clone());
        }
    }

    /// Lets time pass: silent streams are lost, lost nodes are gone. Touches what changes by it.
    pub fn advance(&mut self, now: Duration) {
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        for name in names {
            let Some(node) = self.nodes.get_mut(&name) else { continue };
            if node.is_forgotten(now) {
                self.nodes.remove(&name);
                self.touch_node(now, &name);
                continue;
            }
            let silent = node.advance(now);
            if silent || self.standings_changed(now, &name) {
                self.touch_node(now, &name);
            }
        }
    }

    fn standings_changed(&self, now: Duration, name: &str) -> bool {
        self.nodes.get(name).is_some_and(|node| {
            node.devices().keys().any(|device| self.standings.get(device) != Some(&node.standing(now, device)))
        })
    }

    /// Notes what may now be done with the node's devices, and touches whom it concerns.
    fn touch_node(&mut self, now: Duration, name: &str) {
        let now_standing: BTreeMap<DeviceId, Standing> = self.nodes.get(name).map_or_else(BTreeMap::new, |node| {
            node.devices().keys().map(|device| (device.clone(), node.standing(now, device))).collect()
        });
        let before: BTreeMap<_, _> = self.standings.iter().filter(|(device, _)| device.node() == name).collect();
        let changed = before.len() != now_standing.len()
            || now_standing.iter().any(|(device, standing)| before.get(device) != Some(&standing));
        if changed {
            self.standings.retain(|device, _| device.node() != name);
            self.standings.extend(now_standing);
            self.world += 1;
        }
        for (placement, known) in &self.placements {
            if changed || known.touches(name) {
                self.touched.insert(placement.clone());
            }
        }
    }

    /// The placements that were touched since the last call.
    pub fn take_touched(&mut self) -> BTreeSet<PlacementName> {
        std::mem::take(&mut self.touched)
    }

    /// Touches a placement.
    pub fn touch(&mut self, name: &PlacementName) {
        self.touched.insert(name.clone());
    }

    /// Rises when what may be done with a device changes.
    #[must_use]
    pub const fn world(&self) -> u64 {
        self.world
    }

    /// What a plan for `name` depends on, for a plan that is made while the world goes on.
    #[must_use]
    pub fn stamp(&self, name: &PlacementName) -> Stamp {
        let placement = self.placements.get(name);
        Stamp {
            world: self.world,
            claims: self.claims,
            generation: placement.map_or(0, |placement| placement.generation),
            assigned: placement.map_or(Revision(0), |placement| placement.cutover.assigned()),
        }
    }

    /// Placements hold or have been promised something else than before.
    pub const fn claim(&mut self) {
        self.claims += 1;
    }

    /// Whether others may still come back, because this scheduler began only now.
    #[must_use]
    pub fn grace(&self, now: Duration) -> bool {
        now.saturating_sub(self.began) < GONE
    }

    /// Whether `name` may be planned: every node of its assignment, or every native node if it has none,
    /// has been heard of or was waited for.
    #[must_use]
    pub fn adopted(&self, now: Duration, name: &PlacementName) -> bool {
        if !self.grace(now) {
            return true;
        }
        let assignment = self.placements.get(name).and_then(|placement| placement.status.assignment.as_ref());
        match assignment {
            Some(assignment) => {
                let heard = |device: &DeviceId| {
                    self.nodes.get(device.node()).is_some_and(|node| node.reachable() && !node.devices().is_empty())
                };
                assignment.devices.iter().all(heard)
            }
            None => !self.nodes.values().any(|node| node.awaited(now)),
        }
    }

    /// The placements.
    #[must_use]
    pub const fn placements(&self) -> &BTreeMap<PlacementName, Placement> {
        &self.placements
    }

    /// One placement, to change.
    pub fn placement_mut(&mut self, name: &PlacementName) -> Option<&mut Placement> {
        self.placements.get_mut(name)
    }

    /// The nodes.
    #[must_use]
    pub const fn nodes(&self) -> &BTreeMap<String, Node> {
        &self.nodes
    }

    /// What may be done with `device` at `now`.
    #[must_use]
    pub fn standing(&self, now: Duration, device: &DeviceId) -> Standing {
        match self.nodes.get(device.node()) {
            Some(node) => node.standing(now, device),
            None if self.grace(now) => Standing::Frozen,
            None => Standing::Gone,
        }
    }

    /// The worker that answers calls for a replica of this revision on `device`: the shelf is ready and the
    /// device is not gone.
    #[must_use]
    pub fn live(&self, now: Duration, uid: &str, revision: Revision, device: &DeviceId) -> Option<&Worker> {
        if self.standing(now, device) == Standing::Gone {
            return None;
        }
        let worker = self.nodes.get(device.node())?.worker(device)?;
        let shelf = worker.shelves.get(&(uid.to_owned(), revision))?;
        (shelf.phase == Phase::Ready).then_some(worker)
    }

    /// How far the assigned revision of `name` is.
    #[must_use]
    pub fn progress(&self, now: Duration, name: &PlacementName) -> Progress {
        let Some(placement) = self.placements.get(name) else { return Progress::default() };
        let revision = placement.cutover.assigned();
        let Some(layout) = placement.layout(revision) else { return Progress::default() };
        let mut progress = Progress::default();
        for entry in layout.devices.iter().filter(|entry| entry.slots > 0) {
            let device = &entry.device;
            if self.standing(now, device) == Standing::Gone {
                continue;
            }
            if self.live(now, &placement.uid, revision, device).is_some() {
                progress.ready.insert(device.clone());
                continue;
            }
            let worker = self.nodes.get(device.node()).and_then(|node| node.worker(device));
            let shelf = worker.and_then(|worker| worker.shelves.get(&(placement.uid.clone(), revision)));
            let failed = shelf.is_some_and(|shelf| matches!(shelf.phase, Phase::Failed(_)));
            // A worker loads one shelf after the other: one that waits for its turn does not hang.
            let read = worker.into_iter().flat_map(|worker| worker.shelves.values()).map(|shelf| shelf.read).sum();
            let late = if failed { Late::Failed } else { Late::Loading(read) };
            progress.late.insert(device.clone(), late);
        }
        progress.covered = self.lost(now, placement, revision) == Some(0);
        progress
    }

    /// Experts (layer, expert) of `revision` without a live replica; `None` if the revision is not known.
    #[must_use]
    pub fn lost(&self, now: Duration, placement: &Placement, revision: Revision) -> Option<u64> {
        let layout: &Layout = placement.layout(revision)?;
        let live: Vec<_> = layout
            .ranges()
            .filter(|(device, _)| self.live(now, &placement.uid, revision, device).is_some())
            .map(|(_, range)| range)
            .collect();
        let mut lost = 0_u64;
        for row in layout.layers.values() {
            let held: BTreeSet<ExpertId> =
                live.iter().flat_map(|range| row.get(range.clone()).unwrap_or_default()).flatten().copied().collect();
            let missing = (0..placement.spec.geometry.experts).filter(|expert| !held.contains(&ExpertId(*expert)));
            lost = lost.saturating_add(u64::try_from(missing.count()).unwrap_or(u64::MAX));
        }
        Some(lost)
    }
}
