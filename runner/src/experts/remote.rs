//! The client of a placement's workers. Routes and gone devices come from the scheduler (or from `berth generate`);
//! steps take the revision that is current when they begin.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use berth_runtime::Clock;
use berth_types::{DeviceId, ExpertId, LayerId, Revision};
use tokio::{runtime::Handle, sync::watch};
use tokio_util::task::AbortOnDropHandle;

use super::{
    CallCounts, ExpertCalls, LayerCall, Pending, StepCalls,
    delivery::{Delivery, Entry},
    directory::{Directory, InUse},
    link::Link,
    message::{Kind, Refusal},
    pace::Pace,
};
use crate::{
    error::ExpertsError,
    num::{u32_of, u64_of},
    routes::{Place, RouteTable, Routes},
    served::{DeviceLoads, Served},
};

/// Bounds of the client.
#[derive(Clone, Debug)]
pub struct ExpertsConfig {
    /// Time.
    pub clock: Clock,
    /// How long an expert may be without a live replica before the step fails. Longer than a scheduler's failover.
    pub deadline: Duration,
    /// How long connecting to a worker may take.
    pub connect: Duration,
}

impl Default for ExpertsConfig {
    fn default() -> Self {
        Self { clock: Clock::real(), deadline: Duration::from_secs(60), connect: Duration::from_secs(1) }
    }
}

/// What the client has seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExpertsStats {
    /// Calls made, refused and retried.
    pub counts: CallCounts,
    /// Wall clock at which the first call was refused; 0 = none was.
    pub first_refused_unix_ms: u64,
    /// Wall clock at which a call that a lost device refused was last answered by another; 0 = none was.
    pub rerouted_unix_ms: u64,
    /// Epoch of the current routes.
    pub epoch: u64,
    /// Which revisions steps are on.
    pub in_use: InUse,
    /// Wall clock at which the first step on the current revision ended; 0 = none did.
    pub revision_since_unix_ms: u64,
    /// Devices that are not called.
    pub gone: Vec<DeviceId>,
    /// Devices that are passed over for now, because they did not answer in time.
    pub slow: Vec<DeviceId>,
}

/// The client. Clones share it.
#[derive(Clone, Debug)]
pub struct Experts {
    shared: Arc<Shared>,
    runtime: Handle,
}

/// State that steps and their calls share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: ExpertsConfig,
    directory: Mutex<Directory>,
    pace: Mutex<Pace>,
    stats: Mutex<ExpertsStats>,
    /// Rises when routes, gone devices or lost devices change.
    changed: watch::Sender<u64>,
    in_use: watch::Sender<InUse>,
    /// The newest revision on which a step ended, and when (wall clock).
    ended_on: Mutex<(Revision, u64)>,
    calls: AtomicU64,
    served: Mutex<Served>,
}

impl Experts {
    /// A client without routes, whose calls run on `runtime`.
    #[must_use]
    pub fn new(config: ExpertsConfig, runtime: Handle) -> Self {
        let shared = Shared {
            config,
            directory: Mutex::default(),
            pace: Mutex::default(),
            stats: Mutex::default(),
            changed: watch::Sender::default(),
            in_use: watch::Sender::default(),
            ended_on: Mutex::default(),
            calls: AtomicU64::new(1),
            served: Mutex::default(),
        };
        Self { shared: Arc::new(shared), runtime }
    }

    /// Takes routes; steps that begin from now on are on them. False if they are older than the current ones, which
    /// then stay.
    pub fn set_routes(&self, table: RouteTable) -> bool {
        let (epoch, revision) = (table.epoch, table.revision);
        let uid = table.placement_uid.clone();
        let anew = self.shared.routes().is_some_and(|routes| routes.placement_uid != uid);
        let taken = lock(&self.shared.directory).set_routes(table);
        if taken && anew {
            // Its revisions begin at 1 again.
            *lock(&self.shared.served) = Served::default();
        }
        if taken {
            tracing::info!(epoch = epoch.0, revision = revision.0, "routes taken");
            self.shared.publish();
        }
        taken
    }

    /// Takes the devices that count as gone; what is not named is there again.
    pub fn set_gone(&self, gone: BTreeSet<DeviceId>) {
        lock(&self.shared.directory).set_gone(gone);
        self.shared.publish();
    }

    /// Which revisions steps are on, as it changes.
    #[must_use]
    pub fn in_use(&self) -> watch::Receiver<InUse> {
        self.shared.in_use.subscribe()
    }

    /// Begins a load window; gives what devices answered of `revision` in the last.
    #[must_use]
    pub fn close_window(&self, revision: Revision) -> DeviceLoads {
        lock(&self.shared.served).close(revision)
    }

    /// Every device of the current revision, with what it has answered since that was first used.
    #[must_use]
    pub fn served(&self) -> DeviceLoads {
        let Some(routes) = self.shared.routes() else { return DeviceLoads::new() };
        let mut loads = lock(&self.shared.served).total(routes.revision);
        for place in routes.places() {
            loads.entry(place.device.clone()).or_default();
        }
        loads
    }

    /// What was seen so far.
    #[must_use]
    pub fn stats(&self) -> ExpertsStats {
        let mut stats = lock(&self.shared.stats).clone();
        let directory = lock(&self.shared.directory);
        stats.in_use = directory.in_use();
        stats.gone = directory.not_called();
        stats.slow = directory.passed_over(self.shared.clock().now());
        let (revision, since) = *lock(&self.shared.ended_on);
        stats.revision_since_unix_ms = if revision == stats.in_use.current { since } else { 0 };
        stats.epoch = directory.routes().map_or(0, |routes| routes.epoch.0);
        stats
    }
}

impl ExpertCalls for Experts {
    fn ready(&self) -> bool {
        lock(&self.shared.directory).routes().is_some()
    }

    fn begin(&self) -> Result<Box<dyn StepCalls>, ExpertsError> {
        let mut directory = lock(&self.shared.directory);
        let routes = directory.routes().ok_or(ExpertsError::NoRoutes)?;
        directory.start_step(routes.revision);
        drop(directory);
        self.shared.publish_in_use();
        Ok(Box::new(RemoteStep {
            shared: Arc::clone(&self.shared),
            runtime: self.runtime.clone(),
            state: Arc::new(StepState { routes, counts: Mutex::default() }),
        }))
    }
}

/// One step's view.
#[derive(Debug)]
pub(crate) struct StepState {
    /// The revision that the step began on.
    pub(crate) routes: Arc<Routes>,
    counts: Mutex<CallCounts>,
}

impl StepState {
    pub(crate) fn called(&self, again: bool) {
        let mut counts = lock(&self.counts);
        counts.calls += 1;
        counts.retried += u64::from(again);
    }

    pub(crate) fn refused(&self) {
        lock(&self.counts).refused += 1;
    }
}

struct RemoteStep {
    shared: Arc<Shared>,
    runtime: Handle,
    state: Arc<StepState>,
}

impl StepCalls for RemoteStep {
    fn start(&mut self, call: &LayerCall<'_>) -> Result<Pending, ExpertsError> {
        let chosen = call.experts.chunks_exact(call.top_k.max(1)).zip(call.weights.chunks_exact(call.top_k.max(1)));
        let mut entries = Vec::with_capacity(call.experts.len());
        for (row, ((experts, weights), spread)) in chosen.zip(call.spread).enumerate() {
            let entry = |(expert, weight): (&u32, &f32)| Entry {
                row: u32_of(row),
                expert: ExpertId(*expert),
                weight: *weight,
                spread: *spread,
            };
            entries.extend(experts.iter().zip(weights).map(entry));
        }
        let delivery = Arc::new(Delivery {
            shared: Arc::clone(&self.shared),
            step: Arc::clone(&self.state),
            layer: call.layer,
            hidden: call.hidden,
            rows: call.rows.to_vec(),
            lost: AtomicBool::new(false),
        });
        let (give, pending) = Pending::channel();
        let task = self.runtime.spawn(async move {
            // The channel holds one answer; a step that was given up does not listen.
            let _ = give.try_send(delivery.answer(entries).await);
        });
        Ok(pending.held_by(AbortOnDropHandle::new(task)))
    }

    fn revision(&self) -> Revision {
        self.state.routes.revision
    }

    fn counts(&self) -> CallCounts {
        *lock(&self.state.counts)
    }

    fn complete(&mut self) {
        self.shared.completed(self.revision());
    }
}

impl Drop for RemoteStep {
    fn drop(&mut self) {
        lock(&self.shared.directory).end_step(self.state.routes.revision);
        self.shared.publish_in_use();
    }
}

impl Shared {
    pub(crate) fn clock(&self) -> &Clock {
        &self.config.clock
    }

    /// Rises with every change that may give an expert a replica.
    pub(crate) fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(crate) fn routes(&self) -> Option<Arc<Routes>> {
        lock(&self.directory).routes()
    }

    pub(crate) fn split(
        &self,
        routes: &Routes,
        layer: LayerId,
        entries: &[Entry],
        avoid: &BTreeSet<DeviceId>,
    ) -> Result<BTreeMap<usize, Vec<Entry>>, ExpertId> {
        lock(&self.directory).split(routes, layer, entries, avoid, self.clock().now())
    }

    pub(crate) fn link(&self, place: &Place) -> Arc<Link> {
        let make = || Link::new(&place.endpoint, self.config.connect, self.clock().clone());
        lock(&self.directory).link(&place.endpoint, make)
    }

    pub(crate) fn patience(&self, entries: usize) -> Duration {
        lock(&self.pace).patience(entries, self.config.deadline)
    }

    pub(crate) fn may_hedge(&self) -> bool {
        lock(&self.pace).may_hedge(self.clock().now())
    }

    pub(crate) fn suspect(&self, device: &DeviceId) {
        tracing::info!(%device, "a call is late, another replica is asked");
        lock(&self.directory).suspect(device, self.clock().now());
    }

    pub(crate) fn next_call(&self) -> u64 {
        self.calls.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn called(&self, again: bool) {
        lock(&self.pace).called(self.clock().now(), again);
        let mut stats = lock(&self.stats);
        stats.counts.calls += 1;
        stats.counts.retried += u64::from(again);
    }

    pub(crate) fn answered(
        &self,
        revision: Revision,
        layer: LayerId,
        device: &DeviceId,
        entries: usize,
        took: Duration,
    ) {
        lock(&self.pace).answered(entries, took);
        lock(&self.directory).trust(device);
        lock(&self.served).count(revision, device, layer, u64_of(entries));
    }

    pub(crate) fn refused(&self, device: &DeviceId, refusal: &Refusal) {
        let mut stats = lock(&self.stats);
        stats.counts.refused += 1;
        if stats.first_refused_unix_ms == 0 {
            stats.first_refused_unix_ms = self.clock().unix_ms();
        }
        drop(stats);
        if refusal.kind == Kind::Lost {
            tracing::info!(%device, "a worker says that its device is lost");
            lock(&self.directory).lose(device);
        }
    }

    pub(crate) fn rerouted(&self) {
        lock(&self.stats).rerouted_unix_ms = self.clock().unix_ms();
    }

    fn completed(&self, revision: Revision) {
        let mut ended_on = lock(&self.ended_on);
        if revision > ended_on.0 {
            *ended_on = (revision, self.clock().unix_ms());
        }
    }

    fn publish(&self) {
        self.changed.send_modify(|version| *version += 1);
        self.publish_in_use();
    }

    fn publish_in_use(&self) {
        let directory = lock(&self.directory);
        let now = directory.in_use();
        // Under the lock, so that the last word is the newest.
        self.in_use.send_if_modified(|seen| std::mem::replace(seen, now) != now);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values, whole between statements: a panic elsewhere cannot tear them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
