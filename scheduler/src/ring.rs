//! One turn of the ring: facts into the index, gone devices to runners, cutovers, plans, orders, status.
//! Every decision is taken elsewhere; this file keeps their order.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use berth_crds::ExpertPlacementStatus;
use berth_planner::{Checked, Plan, Problem, Proposed, check, diff, problem::Survive, solve};
use berth_runtime::Clock;
use berth_types::{Bytes, Epoch, PlacementName, Revision};
use k8s_openapi::jiff::Timestamp;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    commit::{CommitError, Order, Receipt, Writer},
    cutover::Next,
    facts::{AgentSaid, Fact, RunnerSaid},
    index::{Index, Memory, Placement},
    metrics::SchedulerMetrics,
    orders::Post,
    replan::{self, Cause},
    snapshot::{snapshot, survive},
    status,
};

/// Longest time between two turns.
const TICK: Duration = Duration::from_millis(100);
/// Facts taken in one turn.
const BATCH: usize = 256;
/// Least time between two status writes of a placement that tell of progress only.
const STATUS_PAUSE: Duration = Duration::from_millis(500);
/// First and last pause after a refused write.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// What is known of the status writes of one object.
#[derive(Debug, Default)]
struct Written {
    last: Option<ExpertPlacementStatus>,
    in_flight: bool,
    /// The last write was refused: the object says something else.
    failed: bool,
    not_before: Duration,
}

/// What is known of the writes of one node's condition.
#[derive(Debug, Default)]
struct NodeWritten {
    last: Option<bool>,
    in_flight: Option<bool>,
    not_before: Duration,
}

/// The leader's loop.
pub struct Ring {
    index: Index,
    post: Post,
    epoch: Epoch,
    writer: Writer,
    clock: Clock,
    metrics: SchedulerMetrics,
    facts: mpsc::Sender<Fact>,
    jobs: JoinSet<()>,
    listed: (bool, bool),
    grace: bool,
    /// Placements to look at again at the next tick.
    later: BTreeSet<PlacementName>,
    written: BTreeMap<PlacementName, Written>,
    nodes_written: BTreeMap<String, NodeWritten>,
}

impl Ring {
    /// A ring over `index`, which holds the stored maps. `facts` is where the outcomes of writes come back.
    #[must_use]
    pub fn new(
        index: Index,
        epoch: Epoch,
        writer: Writer,
        clock: Clock,
        metrics: SchedulerMetrics,
        facts: mpsc::Sender<Fact>,
    ) -> Self {
        let post = Post::new(epoch, metrics.clone());
        Self {
            index,
            post,
            epoch,
            writer,
            clock,
            metrics,
            facts,
            jobs: JoinSet::new(),
            listed: (false, false),
            grace: true,
            later: BTreeSet::new(),
            written: BTreeMap::new(),
            nodes_written: BTreeMap::new(),
        }
    }

    /// Turns until the term ends, then waits for the writes in hand (each has a deadline).
    pub async fn run(mut self, mut facts: mpsc::Receiver<Fact>, ended: CancellationToken, beat: impl Fn() + Send) {
        let mut tick = self.clock.now();
        loop {
            // All arms only wait; a fact that was not taken is still in the channel.
            let first = tokio::select! {
                () = ended.cancelled() => break,
                () = self.clock.sleep_until(tick) => None,
                fact = facts.recv() => match fact {
                    Some(fact) => Some(fact),
                    None => break,
                },
            };
            let now = self.clock.now();
            let mut taken = 0;
            let mut next = first;
            while let Some(fact) = next {
                self.take(now, fact);
                taken += 1;
                next = if taken < BATCH { facts.try_recv().ok() } else { None };
            }
            if now >= tick {
                tick = now.saturating_add(TICK);
                self.tick(now);
            }
            self.turn(now);
            beat();
        }
        // Writes in hand report to a channel that nobody reads: let them through.
        drop(facts);
        while self.jobs.join_next().await.is_some() {}
    }

    fn tick(&mut self, now: Duration) {
        self.index.advance(now);
        if self.grace && !self.index.grace(now) {
            self.grace = false;
            self.later.extend(self.index.placements().keys().cloned());
        }
        for name in std::mem::take(&mut self.later) {
            self.index.touch(&name);
        }
        while self.jobs.try_join_next().is_some() {}
    }

    fn take(&mut self, now: Duration, fact: Fact) {
        match fact {
            Fact::AgentOpened { conn, node, hosting, line } => {
                self.post.agent(conn, &node, line);
                self.index.agent_opened(now, conn, &node, hosting);
            }
            Fact::Agent { conn, said: AgentSaid::Health(health) } => self.index.health(now, conn, health),
            Fact::Agent { conn, said: AgentSaid::Workers(workers) } => self.index.workers(now, conn, workers),
            Fact::Agent { conn, said: AgentSaid::Beat } => self.index.beat(now, conn),
            Fact::RunnerOpened { conn, placement, line } => {
                self.post.runner(conn, &placement, line);
                self.index.runner_opened(now, conn, placement);
            }
            Fact::Runner { conn, said: RunnerSaid::InUse { oldest, current } } => {
                self.index.in_use(conn, oldest, current);
            }
            Fact::Runner { conn, said: RunnerSaid::Load { window, layers } } => self.index.load(conn, window, layers),
            Fact::Runner { said: RunnerSaid::Beat, .. } => {}
            Fact::Closed { conn } => {
                self.post.forget(conn);
                self.index.agent_closed(now, conn);
                self.index.runner_closed(now, conn);
            }
            Fact::Placement(name, object) => self.index.placement(now, &name, &object),
            Fact::PlacementGone(name) => self.index.placement_gone(&name),
            Fact::PlacementsListed(names) => {
                self.index.only_placements(&names);
                self.listed.0 = true;
            }
            Fact::Node(name, object) => self.index.node_object(now, &name, &object),
            Fact::NodeGone(name) => self.index.node_gone(now, &name),
            Fact::NodesListed(names) => {
                self.index.only_nodes(now, &names);
                self.listed.1 = true;
            }
            Fact::Committed { name, uid, outcome } => self.committed(now, &name, &uid, *outcome),
            Fact::Written { name, outcome } => self.status_written(now, &name, outcome),
            Fact::NodeWritten { node, outcome } => self.node_written(now, &node, outcome),
        }
    }

    fn turn(&mut self, now: Duration) {
        let touched = self.index.take_touched();
        self.post.tell_gone(&self.index, now, &touched);
        for name in &touched {
            self.cut(now, name);
        }
        if self.listed == (true, true) {
            for name in self.by_priority(&touched) {
                self.plan(now, &name);
            }
        }
        self.post.send(&self.index, now, &touched);
        for name in &touched {
            self.tell(now, name);
        }
        self.tell_nodes(now);
        self.metrics.placements(self.index.placements().len());
    }

    /// The most important first, for it may take what others then lack.
    fn by_priority(&self, names: &BTreeSet<PlacementName>) -> Vec<PlacementName> {
        let mut known: Vec<_> =
            names.iter().filter_map(|name| Some((self.index.placements().get(name)?.spec.priority, name))).collect();
        known.sort_by_key(|(priority, name)| (std::cmp::Reverse(*priority), *name));
        known.into_iter().map(|(_, name)| name.clone()).collect()
    }

    /// Moves a placement on between two revisions.
    fn cut(&mut self, now: Duration, name: &PlacementName) {
        let progress = self.index.progress(now, name);
        let grace = self.index.grace(now);
        let instances: BTreeMap<_, _> = progress
            .late
            .iter()
            .map(|device| {
                let worker = self.index.nodes().get(device.node()).and_then(|node| node.worker(device));
                (device.clone(), worker.map_or(0, |worker| worker.instance))
            })
            .collect();
        let Some(placement) = self.index.placement_mut(name) else { return };
        let late = match placement.cutover.step(now, &progress) {
            Next::Wait => Vec::new(),
            Next::Switch(revision, late) => {
                tracing::info!(placement = %name, revision = revision.0, late = late.len(), "revision serves");
                late
            }
            Next::Around(late) => {
                tracing::warn!(placement = %name, ?late, "workers did not load in time, planning around them");
                late
            }
        };
        if !late.is_empty() {
            placement.memory.stale = true;
        }
        placement.avoided.extend(late.into_iter().filter_map(|device| {
            instances.get_key_value(&device).map(|(device, instance)| (device.clone(), *instance))
        }));
        if placement.drain(now, grace && placement.inherited) {
            tracing::info!(placement = %name, serving = placement.cutover.serving().0, "older revisions drained");
        }
        if placement.cutover.loading() || placement.cutover.draining().0 > 0 {
            self.later.insert(name.clone());
        }
    }

    fn due(&self, now: Duration, name: &PlacementName) -> Option<Cause> {
        let placement = self.index.placements().get(name)?;
        let facts = facts(&self.index, now, name, placement);
        replan::decide(now, &facts)
    }

    /// Makes a plan if one is due, and hands it to the writer.
    fn plan(&mut self, now: Duration, name: &PlacementName) {
        let adopted = self.index.adopted(now, name);
        if !adopted || self.index.placements().get(name).is_some_and(|known| now < known.memory.retry_at) {
            self.later.insert(name.clone());
        }
        let Some(cause) = self.due(now, name) else { return };
        let world = self.index.world();
        let Some((problem, previous)) = snapshot(&self.index, now, name, cause) else { return };
        let Some(placement) = self.index.placement_mut(name) else { return };
        placement.memory.seen = Some((world, placement.generation));
        placement.memory.stale = false;
        placement.memory.planned_at = now;
        let began = self.clock.now();
        let rest = placement.memory.rest.take().filter(|_| cause == Cause::Wave);
        let outcome = propose(&problem, previous.as_deref(), rest);
        self.metrics.solved(self.clock.now().saturating_sub(began).as_secs_f64());
        match outcome {
            Ok((plan, survives)) => {
                placement.memory.problem = None;
                placement.memory.survives = Some(survives);
                let changed = plan.decision().waves.len() > 1 || plan.first() != previous.as_deref();
                if changed {
                    tracing::info!(placement = %name, %cause, %plan, "planned");
                    if let Some(layout) = plan.first() {
                        tracing::debug!(placement = %name, changes = diff(previous.as_deref(), layout), "moves");
                    }
                    self.commit(now, name, cause, plan);
                }
            }
            Err(reason) => {
                self.metrics.refused("planner");
                tracing::warn!(placement = %name, %cause, reason, "cannot be planned");
                placement.memory.problem = Some(reason);
            }
        }
    }

    fn commit(&mut self, now: Duration, name: &PlacementName, cause: Cause, plan: Plan<Checked>) {
        let wall = self.wall();
        let why = format!("{cause}: {} moves, {}", plan.decision().moves, plan.decision().moved_bytes);
        let before = self.index.placements().get(name).map(|placement| placement.memory.clone());
        let Some(placement) = self.index.placement_mut(name) else { return };
        let uid = placement.uid.clone();
        let retained = placement.cutover.retained();
        let spare: Vec<Revision> =
            placement.revisions.keys().filter(|revision| !retained.contains(revision)).copied().collect();
        placement.memory.pending = Some(plan.decision().revision);
        placement.memory.promised = plan.first().cloned().map(Arc::new);
        // The status that goes with the plan speaks of the plan.
        (placement.memory.why, placement.memory.moved) = (why, plan.decision().moved_bytes);
        let told = status::status(&self.index, now, wall, name).unwrap_or_default();
        if let (Some(before), Some(placement)) = (before, self.index.placement_mut(name)) {
            let Memory { why, moved, .. } = before;
            (placement.memory.why, placement.memory.moved) = (why, moved);
        }
        let (writer, facts, name) = (self.writer.clone(), self.facts.clone(), name.clone());
        let (clock, metrics) = (self.clock.clone(), self.metrics.clone());
        self.jobs.spawn(async move {
            let bytes = plan.decision().moved_bytes;
            let outcome = writer.commit(Order { uid: uid.clone(), plan, status: told, spare }).await;
            match &outcome {
                Ok(_) => {
                    metrics.planned(cause.as_str(), bytes.get(), clock.now().saturating_sub(now).as_secs_f64());
                }
                Err(error) => metrics.refused(error.as_str()),
            }
            // The ring may have ended meanwhile; the next leader reads what was stored.
            let _ = facts.send(Fact::Committed { name, uid, outcome: outcome.into() }).await;
        });
    }

    fn committed(&mut self, now: Duration, name: &PlacementName, uid: &str, outcome: Result<Receipt, CommitError>) {
        let Some(placement) = self.index.placement_mut(name).filter(|known| known.uid == uid) else { return };
        placement.memory.pending = None;
        placement.memory.promised = None;
        match outcome {
            Ok(Receipt { revision, layout, digest, status, deleted, rest }) => {
                tracing::info!(placement = %name, revision = revision.0, why = status.why, "revision assigned");
                placement.revisions.retain(|known, _| !deleted.contains(known));
                placement.revisions.insert(revision, crate::index::Stored { layout, digest });
                placement.cutover.assign(now, revision);
                let memory = &mut placement.memory;
                (memory.rest, memory.refused) = (rest, 0);
                (memory.why, memory.moved) = (status.why.clone(), Bytes(status.moved_bytes.get()));
                placement.status = status.clone();
                self.written.entry(name.clone()).or_default().last = Some(status);
            }
            Err(error) => {
                tracing::warn!(placement = %name, %error, "plan not stored");
                if let CommitError::Store(crate::store::StoreError::Exists { revision, .. }) = error {
                    placement.memory.burned = placement.memory.burned.max(revision);
                }
                let memory = &mut placement.memory;
                memory.stale = true;
                memory.rest = None;
                memory.retry_at = now.saturating_add(pause(memory.refused));
                memory.refused = memory.refused.saturating_add(1);
            }
        }
        self.index.touch(name);
    }

    fn wall(&self) -> Timestamp {
        let millis = i64::try_from(self.clock.unix_ms()).unwrap_or(i64::MAX);
        Timestamp::from_millisecond(millis).unwrap_or(Timestamp::UNIX_EPOCH)
    }

    /// Writes a placement's status if it changed: news at once, progress now and then.
    fn tell(&mut self, now: Duration, name: &PlacementName) {
        let Some(mut status) = status::status(&self.index, now, self.wall(), name) else {
            self.written.remove(name);
            return;
        };
        if let Some(assignment) = &mut status.assignment {
            assignment.epoch = self.epoch.0;
        }
        let Some(placement) = self.index.placements().get(name) else { return };
        let written = self.written.entry(name.clone()).or_default();
        // A placement of an earlier leader differs by its epoch at least: it is written once to claim it.
        let known = written.last.as_ref().unwrap_or(&placement.status);
        if *known == status && !written.failed {
            return;
        }
        let wait = written.in_flight
            || placement.memory.pending.is_some()
            || (now < written.not_before && (written.failed || known.conditions == status.conditions))
            || !self.index.adopted(now, name);
        if wait {
            self.later.insert(name.clone());
            return;
        }
        written.in_flight = true;
        written.failed = false;
        written.not_before = now.saturating_add(STATUS_PAUSE);
        let (writer, facts, name, uid) = (self.writer.clone(), self.facts.clone(), name.clone(), placement.uid.clone());
        written.last = Some(status.clone());
        if let Some(placement) = self.index.placement_mut(&name) {
            placement.status = status.clone();
        }
        self.jobs.spawn(async move {
            let outcome = writer.status(&name, &uid, status).await.map(|_| ());
            // As above.
            let _ = facts.send(Fact::Written { name, outcome }).await;
        });
    }

    fn status_written(&mut self, now: Duration, name: &PlacementName, outcome: Result<(), CommitError>) {
        let Some(written) = self.written.get_mut(name) else { return };
        written.in_flight = false;
        if let Err(error) = outcome {
            tracing::warn!(placement = %name, %error, "status not written");
            self.metrics.refused(error.as_str());
            written.failed = true;
            written.not_before = now.saturating_add(RETRY.1 / 10);
            self.later.insert(name.clone());
        }
    }

    fn tell_nodes(&mut self, now: Duration) {
        let wall = self.wall();
        self.nodes_written.retain(|name, _| self.index.nodes().contains_key(name));
        for (name, node) in self.index.nodes().iter().filter(|(_, node)| node.has_status()) {
            let heard = node.reachable();
            let written = self.nodes_written.entry(name.clone()).or_default();
            let waits = written.in_flight.is_some() || now < written.not_before || node.awaited(now);
            if written.last == Some(heard) || waits {
                continue;
            }
            let Some(condition) = status::reachable(heard, wall) else { continue };
            written.in_flight = Some(heard);
            let (writer, facts, node) = (self.writer.clone(), self.facts.clone(), name.clone());
            self.jobs.spawn(async move {
                let outcome = writer.reachable(&node, &condition).await;
                // As above.
                let _ = facts.send(Fact::NodeWritten { node, outcome }).await;
            });
        }
    }

    fn node_written(&mut self, now: Duration, node: &str, outcome: Result<(), CommitError>) {
        let Some(written) = self.nodes_written.get_mut(node) else { return };
        let told = written.in_flight.take();
        match outcome {
            Ok(()) => written.last = told,
            Err(error) => {
                tracing::warn!(node, %error, "reachability not written");
                written.not_before = now.saturating_add(RETRY.1);
            }
        }
    }
}

/// Pause after so many refusals in a row.
fn pause(refused: u32) -> Duration {
    RETRY.0.saturating_mul(1 << refused.min(10)).min(RETRY.1)
}

/// A checked plan, from the rest of the last one or from the solver, and what it survives; else a sentence.
fn propose(
    problem: &Problem,
    previous: Option<&berth_planner::Layout>,
    rest: Option<Plan<Proposed>>,
) -> Result<(Plan<Checked>, Survive), String> {
    if let Some(rest) = rest {
        let survives = rest.decision().survives;
        // What no longer holds is planned anew.
        if let Ok(plan) = check(problem, previous, rest) {
            return Ok((plan, survives));
        }
    }
    let plan = solve(problem, previous).map_err(|infeasible| infeasible.to_string())?;
    let survives = plan.decision().survives;
    let plan = check(problem, previous, plan).map_err(|rejected| {
        tracing::error!(findings = ?rejected.findings, "the checker refused a plan: this is a bug");
        format!("the planner made a plan that its checker refuses, please report this: {rejected}")
    })?;
    Ok((plan, survives))
}

fn facts(index: &Index, now: Duration, name: &PlacementName, placement: &Placement) -> replan::Facts {
    let layout = placement.assigned();
    let devices = || layout.iter().flat_map(|layout| layout.devices.iter().map(|entry| &entry.device));
    let count = |standing| devices().filter(|device| index.standing(now, device) == standing).count();
    let memory = &placement.memory;
    let late = devices().filter(|device| {
        let worker = index.nodes().get(device.node()).and_then(|node| node.worker(device));
        placement.avoided.get(*device).is_some_and(|failed| worker.is_some_and(|worker| worker.instance == *failed))
    });
    let wanted =
        placement.spec.devices.per_instance.unwrap_or(0).min(placement.spec.granted_devices.unwrap_or(u32::MAX));
    let fewer = devices().count() < usize::try_from(wanted).unwrap_or(usize::MAX);
    let declared = survive(placement.spec.redundancy.survive);
    replan::Facts {
        paused: placement.spec.paused,
        adopted: index.adopted(now, name),
        pending: memory.pending.is_some(),
        retry_at: memory.retry_at,
        changed: memory.stale || memory.seen != Some((index.world(), placement.generation)),
        assigned: placement.cutover.assigned().0 > 0,
        cutting: placement.cutover.loading() || placement.cutover.draining().0 > 0,
        gone: count(berth_planner::Standing::Gone),
        leaving: count(berth_planner::Standing::Leaving),
        late: late.count(),
        spec_changed: memory.seen.is_none_or(|(_, generation)| generation != placement.generation),
        short: fewer || memory.survives.is_none_or(|survives| survives < declared),
        waves: memory.rest.is_some(),
        balancedness: status::balancedness(placement),
        planned_at: memory.planned_at,
    }
}
