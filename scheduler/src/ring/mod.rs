//! One turn of the ring: facts into the index, gone devices to runners, cutovers, plans, orders, status.
//! Every decision is taken elsewhere; this file keeps their order.

mod planning;
mod sweeping;
mod telling;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use berth_runtime::Clock;
use berth_types::{Epoch, PlacementName};
use k8s_openapi::jiff::Timestamp;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use self::{
    sweeping::Sweep,
    telling::{NodeWritten, Written},
};
use crate::{
    commit::Writer,
    cutover::{LOAD_LIMIT, Next},
    decisions::Decisions,
    facts::{AgentSaid, Fact, RunnerSaid},
    index::{Index, Placement},
    metrics::SchedulerMetrics,
    orders::Post,
    replan::{Lane, SETTLE},
};

/// Longest time between two turns.
const TICK: Duration = Duration::from_millis(100);
/// Between two showings of the world to whoever scrapes.
const SHOW: Duration = Duration::from_secs(1);
/// Facts taken in one turn.
const BATCH: usize = 256;
/// First and last pause after a refused write.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// The leader's loop.
pub struct Ring {
    index: Index,
    post: Post,
    epoch: Epoch,
    writer: Writer,
    clock: Clock,
    metrics: SchedulerMetrics,
    decisions: Decisions,
    facts: mpsc::Sender<Fact>,
    jobs: JoinSet<()>,
    listed: (bool, bool),
    grace: bool,
    load_limit: Duration,
    settle: Duration,
    /// When the world is shown again.
    shown: Duration,
    /// Placements to look at again at the next tick.
    later: BTreeSet<PlacementName>,
    written: BTreeMap<PlacementName, Written>,
    nodes_written: BTreeMap<String, NodeWritten>,
    sweep: Sweep,
    /// Lanes in which a plan is being made.
    lanes: BTreeSet<Lane>,
    /// Plans begun so far.
    tickets: u64,
    /// Placements whose plan is due and whose lane was taken.
    waiting: BTreeSet<PlacementName>,
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
        let decisions = Decisions::new(clock.clone(), metrics.clone());
        Self {
            index,
            post,
            epoch,
            writer,
            clock,
            metrics,
            decisions,
            facts,
            jobs: JoinSet::new(),
            listed: (false, false),
            grace: true,
            load_limit: LOAD_LIMIT,
            settle: SETTLE,
            shown: Duration::ZERO,
            later: BTreeSet::new(),
            written: BTreeMap::new(),
            nodes_written: BTreeMap::new(),
            sweep: Sweep::default(),
            lanes: BTreeSet::new(),
            tickets: 0,
            waiting: BTreeSet::new(),
        }
    }

    /// Revisions may take so long to load.
    #[must_use]
    pub fn with_load_limit(self, load_limit: Duration) -> Self {
        Self { load_limit, ..self }
    }

    /// Balance is left alone for so long after any other revision.
    #[must_use]
    pub fn with_settle(self, settle: Duration) -> Self {
        Self { settle, ..self }
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
            self.metrics.turned(self.clock.now().saturating_sub(now));
            beat();
        }
        self.metrics.resigned();
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
        self.sweep(now);
        while self.jobs.try_join_next().is_some() {}
        if now >= self.shown {
            self.shown = now.saturating_add(SHOW);
            self.metrics.show(&self.index, now);
        }
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
            Fact::RunnerOpened { conn, placement, weighs, line } => {
                self.post.runner(conn, &placement, weighs, line);
                self.index.runner_opened(now, conn, placement, weighs);
            }
            Fact::Runner { conn, said: RunnerSaid::InUse { oldest, current } } => {
                self.index.in_use(conn, oldest, current);
            }
            Fact::Runner { conn, said: RunnerSaid::Load(window) } => self.index.load(conn, window),
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
            Fact::Planned { name, uid, made } => self.planned(now, &name, &uid, *made),
            Fact::Committed { name, uid, outcome } => self.committed(now, &name, &uid, *outcome),
            Fact::Written { name, outcome } => self.status_written(now, &name, outcome),
            Fact::Swept(left) => self.swept(now, left),
            Fact::NodeWritten { node, outcome } => self.node_written(now, &node, outcome),
        }
    }

    fn turn(&mut self, now: Duration) {
        let touched = self.index.take_touched();
        self.post.tell_gone(&self.index, now, &touched);
        for name in &touched {
            self.decisions.watch(&self.index, now, name);
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
            .keys()
            .map(|device| {
                let worker = self.index.nodes().get(device.node()).and_then(|node| node.worker(device));
                (device.clone(), worker.map_or(0, |worker| worker.instance))
            })
            .collect();
        let Some(placement) = self.index.placement_mut(name) else { return };
        let late = match placement.cutover.step(now, self.load_limit, &progress) {
            Next::Wait => Vec::new(),
            Next::Switch(revision, late) => {
                let trace = self.decisions.loaded(name, revision);
                let trace_id = trace.map(|trace| trace.trace_id());
                tracing::info!(placement = %name, revision = revision.0, plan = %format_args!("{name}-{revision}"),
                    trace_id, late = late.len(), "revision serves");
                placement.traceparent = trace.map(|trace| trace.to_string()).unwrap_or_default();
                late
            }
            Next::Around(late) => {
                tracing::warn!(placement = %name, ?late, "workers did not load in time, planning around them");
                late
            }
        };
        // A device that has loaded after all may be used again.
        let avoided = placement.avoided.len();
        placement.avoided.retain(|device, _| !progress.ready.contains(device));
        if !late.is_empty() || placement.avoided.len() < avoided {
            placement.memory.stale = true;
        }
        placement.avoided.extend(late.into_iter().filter_map(|device| {
            instances.get_key_value(&device).map(|(device, instance)| (device.clone(), *instance))
        }));
        if placement.drain(now, grace && placement.inherited) {
            tracing::info!(placement = %name, serving = placement.cutover.serving().0, "older revisions drained");
            self.index.claim();
        }
        if self.index.placements().get(name).is_some_and(Placement::is_cutting) {
            self.later.insert(name.clone());
        }
    }

    fn wall(&self) -> Timestamp {
        let millis = i64::try_from(self.clock.unix_ms()).unwrap_or(i64::MAX);
        Timestamp::from_millisecond(millis).unwrap_or(Timestamp::UNIX_EPOCH)
    }
}
