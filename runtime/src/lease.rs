//! Keeps one Lease for one part: the thin shell around [`Election`], and the [`Term`] that a leader
//! shows before each of its writes.
//!
//! Every write carries the resourceVersion that was read, so of two candidates that see the same
//! record one is refused. Nothing here forces, patches or deletes a Lease.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use berth_types::Epoch;
use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use rand::Rng;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    Clock,
    election::{Action, Election, Record, Timing},
};

/// Longest wait for one answer of the API server.
const CALL_LIMIT: Duration = Duration::from_secs(5);

/// Which Lease a part keeps, and under which name.
#[derive(Clone, Debug)]
pub struct LeaseConfig {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// `holderIdentity`: see [`crate::discovery::Holder`].
    pub identity: String,
    /// The durations.
    pub timing: Timing,
    /// Terms are numbered above this, also when somebody deleted the Lease. A part that fences by epoch
    /// gives the highest one found in its objects.
    pub floor: Epoch,
}

/// Whether this process leads.
#[derive(Clone, Debug)]
pub enum Leadership {
    /// It does, as long as the term's [`Term::check`] says so.
    Leading(Term),
    /// It does not. The holder's identity, where one was seen.
    Following {
        /// `holderIdentity` as it was last read; `None` when released, absent or not yet read.
        leader: Option<String>,
    },
}

/// The term of this process is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the term of epoch {epoch} is over: another process may lead")]
pub struct Deposed {
    /// The epoch of the term.
    pub epoch: Epoch,
}

/// One time of leading, from taking the Lease to losing or releasing it. Clones share it.
#[derive(Clone, Debug)]
pub struct Term {
    epoch: Epoch,
    clock: Clock,
    /// End of the term in microseconds of the clock; raised by each renewal, 0 when over.
    until_us: Arc<AtomicU64>,
    ended: CancellationToken,
}

impl Term {
    fn begin(epoch: u64, until: Duration, clock: &Clock, stop: &CancellationToken) -> Self {
        let until_us = Arc::new(AtomicU64::new(micros(until)));
        Self { epoch: Epoch(epoch), clock: clock.clone(), until_us, ended: stop.child_token() }
    }

    /// The number of the term: `leaseTransitions` of the Lease. Every later term has a higher one.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether the term still runs. Ask right before each write.
    ///
    /// # Errors
    /// [`Deposed`] once the deadline for renewing has passed, or the Lease was lost or released.
    pub fn check(&self) -> Result<Epoch, Deposed> {
        if micros(self.clock.now()) < self.until_us.load(Ordering::Acquire) {
            Ok(self.epoch)
        } else {
            Err(Deposed { epoch: self.epoch })
        }
    }

    /// Cancelled when the term is over, and when the part stops. In the latter case work in hand may
    /// still be finished while [`Self::check`] allows it.
    #[must_use]
    pub fn ended(&self) -> &CancellationToken {
        &self.ended
    }

    fn extend(&self, until: Duration) {
        self.until_us.store(micros(until), Ordering::Release);
    }

    fn end(&self) {
        self.until_us.store(0, Ordering::Release);
        self.ended.cancel();
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Awaits the next term of this process; `None` when the part stops.
pub async fn next_term(leadership: &mut watch::Receiver<Leadership>, stopping: &CancellationToken) -> Option<Term> {
    // Both arms only look.
    tokio::select! {
        () = stopping.cancelled() => None,
        state = leadership.wait_for(|state| matches!(state, Leadership::Leading(term) if term.check().is_ok())) => {
            match &*state.ok()? {
                Leadership::Leading(term) => Some(term.clone()),
                Leadership::Following { .. } => None,
            }
        }
    }
}

/// Where Leases are. The API server in production.
#[async_trait]
pub trait LeaseStore: Send + Sync {
    /// The Lease as it is; `None` when there is none.
    async fn read(&self) -> Result<Option<Lease>, kube::Error>;
    /// Makes the Lease; refused with 409 if it exists.
    async fn create(&self, lease: &Lease) -> Result<(), kube::Error>;
    /// Replaces the Lease; refused with 409 if it is not at the resourceVersion that `lease` carries.
    async fn replace(&self, lease: &Lease) -> Result<(), kube::Error>;
}

/// One Lease at the API server.
#[derive(Clone, Debug)]
pub struct ApiLease {
    api: Api<Lease>,
    name: String,
}

impl ApiLease {
    /// The Lease `name` of `namespace`.
    #[must_use]
    pub fn new(client: Client, namespace: &str, name: &str) -> Self {
        Self { api: Api::namespaced(client, namespace), name: name.to_owned() }
    }
}

#[async_trait]
impl LeaseStore for ApiLease {
    async fn read(&self) -> Result<Option<Lease>, kube::Error> {
        self.api.get_opt(&self.name).await
    }

    async fn create(&self, lease: &Lease) -> Result<(), kube::Error> {
        self.api.create(&PostParams::default(), lease).await.map(|_| ())
    }

    async fn replace(&self, lease: &Lease) -> Result<(), kube::Error> {
        self.api.replace(&self.name, &PostParams::default(), lease).await.map(|_| ())
    }
}

/// Keeps the Lease in `store` until `release` is cancelled, then gives it back and returns. `stop` only
/// tells the terms' owners to finish. What happens is told through the receiver.
pub fn keep<S: LeaseStore>(
    store: S,
    config: LeaseConfig,
    clock: Clock,
    stop: CancellationToken,
    release: CancellationToken,
) -> (watch::Receiver<Leadership>, impl Future<Output = ()> + Send) {
    let (told, leadership) = watch::channel(Leadership::Following { leader: None });
    let election = Election::new(config.identity.clone(), config.timing, config.floor.0);
    let keeper = Keeper { store, config, election, clock, stop, told, failing: false };
    (leadership, keeper.run(release))
}

struct Keeper<S> {
    store: S,
    config: LeaseConfig,
    election: Election,
    clock: Clock,
    stop: CancellationToken,
    told: watch::Sender<Leadership>,
    failing: bool,
}

/// Why a round came to nothing.
#[derive(Debug, thiserror::Error)]
enum RoundError {
    #[error("the API server gave {0}")]
    Elapsed(#[from] crate::clock::Elapsed),
    #[error(transparent)]
    Api(#[from] kube::Error),
    #[error("leaseTransitions {0} does not fit the field: delete the Lease")]
    Worn(u64),
}

impl<S: LeaseStore> Keeper<S> {
    async fn run(mut self, release: CancellationToken) {
        loop {
            let outcome = self.round().await;
            self.report(outcome);
            self.tell();
            let wake = self.next_round();
            // Both arms only wait; no write is ever dropped half-way.
            tokio::select! {
                () = release.cancelled() => break,
                () = self.clock.sleep_until(wake) => self.tell(),
            }
        }
        self.give_back().await;
    }

    /// When to try again: after the pause, but no later than the end of the term, ours or another's.
    fn next_round(&mut self) -> Duration {
        let now = self.clock.now();
        let pause = self.config.timing.retry.mul_f64(rand::rng().random_range(1.0..1.2));
        let next = now.saturating_add(pause);
        let ends = match self.election.term(now) {
            Some((_, until)) => Some(until),
            None => self.election.expires().filter(|expires| *expires > now),
        };
        ends.map_or(next, |ends| next.min(ends))
    }

    async fn round(&mut self) -> Result<(), RoundError> {
        let lease = self.clock.timeout(self.limit(), self.store.read()).await??;
        self.election.observe(self.clock.now(), lease.as_ref().map(record_of));
        self.tell();
        let record = match self.election.decide(self.clock.now(), self.unix_us()) {
            Action::Wait => return Ok(()),
            // A part that ends begins no term; and it does not bring back a Lease that was removed with it.
            Action::Acquire(_) if self.stop.is_cancelled() => return Ok(()),
            Action::Acquire(record) | Action::Renew(record) => record,
        };
        let started = self.clock.now();
        self.election.attempt(started, &record);
        self.write(lease, &record).await?;
        self.election.confirm(started, self.clock.now(), &record);
        Ok(())
    }

    async fn write(&self, lease: Option<Lease>, record: &Record) -> Result<(), RoundError> {
        let limit = self.limit();
        match lease {
            Some(mut lease) => {
                lease.spec = Some(spec_of(record, lease.spec.take().unwrap_or_default())?);
                self.clock.timeout(limit, self.store.replace(&lease)).await??;
            }
            None => {
                let metadata = ObjectMeta {
                    name: Some(self.config.name.clone()),
                    namespace: Some(self.config.namespace.clone()),
                    ..ObjectMeta::default()
                };
                let lease = Lease { metadata, spec: Some(spec_of(record, LeaseSpec::default())?) };
                self.clock.timeout(limit, self.store.create(&lease)).await??;
            }
        }
        Ok(())
    }

    /// A leader's call never outlasts its term, so that the loss is told on time.
    fn limit(&self) -> Duration {
        let left = match &*self.told.borrow() {
            Leadership::Leading(term) => {
                Duration::from_micros(term.until_us.load(Ordering::Acquire)).saturating_sub(self.clock.now())
            }
            Leadership::Following { .. } => CALL_LIMIT,
        };
        left.min(CALL_LIMIT)
    }

    fn unix_us(&self) -> u64 {
        self.clock.unix_ms().saturating_mul(1000)
    }

    /// Makes what is told equal to what is so. Watchers wake on transitions only.
    fn tell(&mut self) {
        let term = self.election.term(self.clock.now());
        let leader = self.election.leader().map(str::to_owned);
        self.told.send_if_modified(|told| match (&*told, term) {
            (Leadership::Leading(ours), Some((epoch, until))) if ours.epoch.0 == epoch => {
                ours.extend(until);
                false
            }
            (_, Some((epoch, until))) => {
                tracing::info!(lease = %self.config.name, epoch, "leading");
                replace(told, Leadership::Leading(Term::begin(epoch, until, &self.clock, &self.stop)));
                true
            }
            (Leadership::Following { leader: known }, None) if *known == leader => false,
            (_, None) => {
                tracing::info!(lease = %self.config.name, leader, "following");
                replace(told, Leadership::Following { leader });
                true
            }
        });
    }

    fn report(&mut self, outcome: Result<(), RoundError>) {
        let failed = match outcome {
            // Another candidate was faster; the next round sees who.
            Err(RoundError::Api(kube::Error::Api(status))) if status.code == 409 => false,
            Err(error) => {
                if !self.failing {
                    tracing::warn!(lease = %self.config.name, %error, "lease round failed, trying on");
                }
                true
            }
            Ok(()) => false,
        };
        if self.failing && !failed {
            tracing::info!(lease = %self.config.name, "lease rounds succeed again");
        }
        self.failing = failed;
    }

    async fn give_back(mut self) {
        let now = self.clock.now();
        let held = self.election.term(now).is_some();
        let record = self.election.release(self.unix_us());
        self.tell();
        if let (true, Some(record)) = (held, record) {
            let outcome = async {
                let lease = self.clock.timeout(CALL_LIMIT, self.store.read()).await??;
                let ours = lease.as_ref().map(record_of).is_some_and(|seen| {
                    seen.holder.as_deref() == Some(&self.config.identity) && seen.transitions == record.transitions
                });
                if ours { self.write(lease, &record).await } else { Ok(()) }
            };
            match outcome.await {
                Ok(()) => tracing::info!(lease = %self.config.name, "lease released"),
                Err(error) => tracing::warn!(lease = %self.config.name, %error, "lease left to expire"),
            }
        }
    }
}

fn replace(told: &mut Leadership, next: Leadership) {
    if let Leadership::Leading(term) = std::mem::replace(told, next) {
        term.end();
    }
}

fn record_of(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    let micros =
        |time: Option<MicroTime>| time.map_or(0, |MicroTime(at)| u64::try_from(at.as_microsecond()).unwrap_or(0));
    Record {
        holder: spec.holder_identity.filter(|holder| !holder.is_empty()),
        transitions: spec.lease_transitions.and_then(|count| u64::try_from(count).ok()).unwrap_or(0),
        lease: Duration::from_secs(
            spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or(0),
        ),
        acquired_us: micros(spec.acquire_time),
        renewed_us: micros(spec.renew_time),
    }
}

/// `record` as the API server keeps it; fields of a Lease that an election does not use stay as they are.
fn spec_of(record: &Record, kept: LeaseSpec) -> Result<LeaseSpec, RoundError> {
    let time = |micros: u64| {
        let micros = i64::try_from(micros).unwrap_or(i64::MAX);
        Some(MicroTime(Timestamp::from_microsecond(micros).unwrap_or(Timestamp::MAX)))
    };
    Ok(LeaseSpec {
        holder_identity: Some(record.holder.clone().unwrap_or_default()),
        lease_transitions: Some(i32::try_from(record.transitions).map_err(|_| RoundError::Worn(record.transitions))?),
        lease_duration_seconds: Some(i32::try_from(record.lease.as_secs()).unwrap_or(i32::MAX).max(1)),
        acquire_time: time(record.acquired_us),
        renew_time: time(record.renewed_us),
        ..kept
    })
}
