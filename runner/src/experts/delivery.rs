//! One layer's call, brought to an answer whatever happens to workers (design.md, "Cutover").
//!
//! The entries are divided among usable replicas, one call per worker. A call that is refused or breaks is made again on
//! other replicas at once; one that is slow is asked elsewhere as well, within a budget, and the first answer counts.
//! When nobody usable has an expert, it waits for new routes or for a worker to come back; only waiting longer than the
//! deadline is an error. Calls are idempotent, so an answer too many is harmless.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use berth_types::{DeviceId, ExpertId, LayerId};
use futures::{
    FutureExt,
    future::{BoxFuture, try_join_all},
};

use super::{
    message::{self, Kind, Refusal},
    remote::{Shared, StepState},
};
use crate::{
    error::ExpertsError,
    num::{millis_of, usize_of},
    routes::Routes,
};

/// First pause when nobody can be asked; doubles up to the longest, ends early when something changes.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const PAUSE_DOUBLINGS: u32 = 4;

/// One expert that one row wants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) row: u32,
    pub(crate) expert: ExpertId,
    pub(crate) weight: f32,
    pub(crate) spread: u64,
}

/// What one worker answered: its part of the sums of some rows.
struct Partial {
    device: DeviceId,
    rows: Vec<u32>,
    values: Vec<f32>,
}

/// What was tried before for the same entries.
#[derive(Clone, Debug, Default)]
struct Tried {
    /// Not to be asked now.
    devices: BTreeSet<DeviceId>,
    /// Since when nobody could be asked.
    since: Option<Duration>,
    pauses: u32,
    /// The last refusal.
    last: String,
    /// Whether this is another try: it may use newer routes than the step's.
    again: bool,
}

impl Tried {
    fn after(mut self, device: &DeviceId, refusal: &Refusal) -> Self {
        self.devices.insert(device.clone());
        self.last = format!("{device}: {}", refusal.detail);
        self.again = true;
        if refusal.kind == Kind::Overloaded {
            // It lives: a request never fails for that.
            self.since = None;
        }
        self
    }
}

type Answered = Result<Vec<Partial>, ExpertsError>;

/// A call of one layer.
pub(crate) struct Delivery {
    pub(crate) shared: Arc<Shared>,
    pub(crate) step: Arc<StepState>,
    pub(crate) layer: LayerId,
    pub(crate) hidden: usize,
    /// [T × hidden].
    pub(crate) rows: Vec<f32>,
    /// Whether a worker was lost or broke off, whoever answered its entries in the end.
    pub(crate) lost: AtomicBool,
}

impl Delivery {
    /// The weighted sum over `entries` of every row, [T × hidden]. Parts are added in the order of device ids, so that
    /// the same replicas give the same bits.
    pub(crate) async fn answer(self: Arc<Self>, entries: Vec<Entry>) -> Result<Vec<f32>, ExpertsError> {
        let mut partials = self.serve(entries, Tried::default()).await?;
        if self.lost.load(Ordering::Relaxed) {
            self.shared.rerouted();
        }
        partials.sort_by(|a, b| a.device.cmp(&b.device));
        let mut out = vec![0.0; self.rows.len()];
        for partial in &partials {
            for (row, values) in partial.rows.iter().zip(partial.values.chunks_exact(self.hidden)) {
                crate::model::maths::add(&mut out[usize_of(*row) * self.hidden..][..self.hidden], values);
            }
        }
        Ok(out)
    }

    /// Divides the entries and makes the calls; waits while they cannot be divided.
    fn serve(self: &Arc<Self>, entries: Vec<Entry>, mut tried: Tried) -> BoxFuture<'static, Answered> {
        let this = Arc::clone(self);
        async move {
            let (routes, groups) = loop {
                // Before looking, so that no change is missed.
                let mut changed = this.shared.changed();
                let routes = if tried.again { this.shared.routes() } else { None };
                let routes = routes.unwrap_or_else(|| Arc::clone(&this.step.routes));
                match this.shared.split(&routes, this.layer, &entries, &tried.devices) {
                    Ok(groups) => break (routes, groups),
                    Err(expert) => {
                        let pause = this.pause(&mut tried, expert)?;
                        // Either is fine: a change is looked at at once, and a pause ends by itself.
                        let _ = this.shared.clock().timeout(pause, changed.changed()).await;
                    }
                }
            };
            let attempt =
                |(device, entries)| Arc::clone(&this).attempt(Arc::clone(&routes), device, entries, tried.clone());
            Ok(try_join_all(groups.into_iter().map(attempt)).await?.into_iter().flatten().collect())
        }
        .boxed()
    }

    /// How long to wait until `expert` is looked for again, with everybody allowed.
    fn pause(&self, tried: &mut Tried, expert: ExpertId) -> Result<Duration, ExpertsError> {
        let now = self.shared.clock().now();
        let waited = now.saturating_sub(*tried.since.get_or_insert(now));
        if waited >= self.shared.config.deadline {
            let last = if tried.last.is_empty() { "none is routed".to_owned() } else { tried.last.clone() };
            return Err(ExpertsError::NoReplica { layer: self.layer, expert, waited, last });
        }
        let pause = FIRST_PAUSE * (1 << tried.pauses.min(PAUSE_DOUBLINGS));
        tried.pauses += 1;
        tried.devices.clear();
        tried.again = true;
        Ok(pause)
    }

    /// One call to one device, and whatever it takes if that gives no answer.
    async fn attempt(
        self: Arc<Self>,
        routes: Arc<Routes>,
        index: usize,
        entries: Vec<Entry>,
        tried: Tried,
    ) -> Answered {
        let device = routes.place(index).device.clone();
        let (clock, deadline) = (self.shared.clock().clone(), self.shared.config.deadline);
        let started = clock.now();
        let mut call = Arc::clone(&self).call(Arc::clone(&routes), index, entries.clone(), tried.again).boxed();
        let patience = self.shared.patience(entries.len());
        if let Ok(outcome) = clock.timeout(patience, &mut call).await {
            return self.conclude(outcome, &device, entries, tried).await;
        }
        let elsewhere = || self.shared.split(&routes, self.layer, &entries, &BTreeSet::from([device.clone()])).is_ok();
        if !(elsewhere() && self.shared.may_hedge()) {
            let rest = (deadline / 4).saturating_sub(clock.now().saturating_sub(started));
            if let Ok(outcome) = clock.timeout(rest, &mut call).await {
                return self.conclude(outcome, &device, entries, tried).await;
            }
        }
        self.shared.suspect(&device);
        let late = Refusal { kind: Kind::Other, detail: format!("no answer within {patience:?}") };
        let mut other = self.serve(entries, tried.after(&device, &late));
        // Both arms only wait, and what is dropped is a call whose answer nobody needs.
        tokio::select! {
            biased;
            outcome = &mut call => match outcome {
                Ok(partial) => Ok(vec![partial]),
                Err(refusal) => {
                    self.refused(&device, &refusal)?;
                    other.await
                }
            },
            answered = &mut other => answered,
        }
    }

    /// Takes an answer, or makes the calls again elsewhere after a refusal.
    async fn conclude(
        self: &Arc<Self>,
        outcome: Result<Partial, Refusal>,
        device: &DeviceId,
        entries: Vec<Entry>,
        tried: Tried,
    ) -> Answered {
        let refusal = match outcome {
            Ok(partial) => return Ok(vec![partial]),
            Err(refusal) => refusal,
        };
        self.refused(device, &refusal)?;
        self.serve(entries, tried.after(device, &refusal)).await
    }

    /// Remembers a refusal.
    fn refused(&self, device: &DeviceId, refusal: &Refusal) -> Result<(), ExpertsError> {
        self.step.refused();
        self.shared.refused(device, refusal);
        if matches!(refusal.kind, Kind::Lost | Kind::Broken) {
            self.lost.store(true, Ordering::Relaxed);
        }
        if refusal.kind == Kind::Invalid {
            let (device, detail) = (device.to_string(), refusal.detail.clone());
            return Err(ExpertsError::Invalid { layer: self.layer, device, detail });
        }
        Ok(())
    }

    /// Sends one call and takes its answer apart.
    async fn call(
        self: Arc<Self>,
        routes: Arc<Routes>,
        index: usize,
        entries: Vec<Entry>,
        again: bool,
    ) -> Result<Partial, Refusal> {
        let place = routes.place(index);
        let deadline_ms = millis_of(self.shared.config.deadline / 4);
        let (rows, mut request) = message::encode(&routes, self.layer, self.hidden, &self.rows, &entries, deadline_ms);
        request.call_id = self.shared.next_call();
        self.step.called(again);
        self.shared.called(again);
        let started = self.shared.clock().now();
        let broken = |broken: super::link::Broken| Refusal { kind: Kind::Broken, detail: broken.0 };
        let answer = self.shared.link(place).call(request).await.map_err(broken)?;
        let values = message::decode(&answer, rows.len(), self.hidden)?;
        let took = self.shared.clock().now().saturating_sub(started);
        self.shared.answered(routes.revision, self.layer, &place.device, entries.len(), took);
        Ok(Partial { device: place.device.clone(), rows, values })
    }
}
