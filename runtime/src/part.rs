//! The frame of a part: it starts, serves its admin endpoints, keeps its Lease, and ends in order.
//!
//! A part's `run(Config)` starts a [`Part`], gives it tasks, and returns what [`Part::finish`] returns.
//! The order at the end is fixed here and nowhere else: not ready, accept nothing new, drain for a
//! bounded time, release the Lease, stop answering probes.

use std::{io, net::SocketAddr, time::Duration};

use kube::Client;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    Clock, Leadership, Tasks,
    admin::{self, Admin},
    lease::{self, ApiLease, LeaseConfig, LeaseStore},
    shutdown::TaskFailure,
    telemetry::{self, LeaseMetrics, Metrics},
};

/// What every part is told.
#[derive(Clone, Debug)]
pub struct PartConfig {
    /// Name of the part, in metrics and logs: `operator`, `scheduler`, `agent`, `runner`.
    pub name: &'static str,
    /// Address of the admin endpoints.
    pub admin_listen: SocketAddr,
    /// How long work in hand may take after the part was asked to stop; below the pod's grace period.
    pub drain_limit: Duration,
}

/// Why a part ended otherwise than by being asked to.
#[derive(Debug, thiserror::Error)]
pub enum PartError {
    /// The admin endpoints could not be served.
    #[error("admin endpoints: {0}")]
    Admin(#[source] io::Error),
    /// A task failed, and the part stopped because of it.
    #[error(transparent)]
    Task(#[from] TaskFailure),
    /// Tasks did not return in time; the Lease was left to expire.
    #[error("still busy {limit:?} after it was asked to stop: {tasks:?}")]
    Drain {
        /// The limit.
        limit: Duration,
        /// Tasks that still ran.
        tasks: Vec<String>,
    },
}

/// A running part.
#[derive(Debug)]
pub struct Part {
    /// Its name.
    pub name: &'static str,
    /// Its time.
    pub clock: Clock,
    /// Its tasks; hand clones to whatever spawns.
    pub tasks: Tasks,
    /// Its checks and heartbeats.
    pub admin: Admin,
    /// Its metrics.
    pub metrics: Metrics,
    /// Where the admin endpoints really listen (the port is known even when 0 was asked for).
    pub admin_address: SocketAddr,
    drain_limit: Duration,
    asked: CancellationToken,
    release: CancellationToken,
    admin_stop: CancellationToken,
    /// Lease keepers and the admin server: they outlive the part's own tasks.
    frame: Tasks,
    lease_metrics: LeaseMetrics,
}

impl Part {
    /// Binds the admin address and serves it. Cancelling `stop` asks the part to end.
    ///
    /// # Errors
    /// [`PartError::Admin`] when the address cannot be had.
    pub async fn start(config: PartConfig, clock: Clock, stop: CancellationToken) -> Result<Self, PartError> {
        let PartConfig { name, admin_listen, drain_limit } = config;
        let metrics = Metrics::new(name);
        let lease_metrics = LeaseMetrics::register(&metrics);
        let admin = Admin::new(clock.clone(), metrics.clone());
        let listener = admin::bind(admin_listen).await.map_err(PartError::Admin)?;
        let admin_address = listener.local_addr().map_err(PartError::Admin)?;
        let admin_stop = CancellationToken::new();
        let frame = Tasks::new(stop.clone(), admin_stop.clone());
        frame.keep("admin", admin.clone().serve(listener, admin_stop.clone()));
        let tasks = Tasks::new(stop.clone(), CancellationToken::new());
        tracing::info!(part = name, admin = %admin_address, version = env!("CARGO_PKG_VERSION"), "part started");
        Ok(Self {
            name,
            clock,
            tasks,
            admin,
            metrics,
            admin_address,
            drain_limit,
            asked: stop,
            release: CancellationToken::new(),
            admin_stop,
            frame,
            lease_metrics,
        })
    }

    /// Stands for the Lease of `config` until the part has drained, then gives it back. The receiver
    /// tells each change; use [`lease::next_term`] to work through the terms.
    pub fn lead(&self, client: Client, config: LeaseConfig) -> watch::Receiver<Leadership> {
        let store = ApiLease::new(client, &config.namespace, &config.name);
        self.lead_in(store, config)
    }

    /// As [`Self::lead`], with Leases kept elsewhere.
    pub fn lead_in<S: LeaseStore + 'static>(&self, store: S, config: LeaseConfig) -> watch::Receiver<Leadership> {
        let label = vec![("lease", config.name.clone())];
        let name = format!("lease {}", config.name);
        let stopping = self.tasks.stopping().clone();
        let (leadership, keeper) = lease::keep(store, config, self.clock.clone(), stopping, self.release.clone());
        let mut seen = leadership.clone();
        let metrics = self.lease_metrics.clone();
        self.frame.spawn(name, async move {
            let count = async {
                loop {
                    let leads = matches!(*seen.borrow_and_update(), Leadership::Leading(_));
                    metrics.leading.get_or_create(&label).set(i64::from(leads));
                    if leads {
                        metrics.terms.get_or_create(&label).inc();
                    }
                    if seen.changed().await.is_err() {
                        break;
                    }
                }
            };
            // The keeper returns when released; its sender is gone then, and so the count ends too.
            tokio::join!(keeper, count);
            Ok::<_, PartError>(())
        });
        leadership
    }

    /// Waits until the part is asked to stop or a task fails, then ends it in order.
    ///
    /// # Errors
    /// The first failure of a task, else [`PartError::Drain`].
    pub async fn finish(self) -> Result<(), PartError> {
        self.asked.cancelled().await;
        tracing::info!(part = self.name, "part stops: not ready");
        self.admin.stop();
        self.tasks.stopping().cancel();
        let drained = self.clock.timeout(self.drain_limit, self.tasks.wait()).await.is_ok();
        if drained {
            // Only now: a task that still runs might write after another process began to lead.
            self.release.cancel();
        } else {
            tracing::warn!(part = self.name, tasks = ?self.tasks.alive(), "part drained too long");
        }
        let failure = self.tasks.take_failure().or_else(|| self.frame.take_failure());
        if drained {
            self.admin_stop.cancel();
            let bound = Duration::from_secs(15);
            if self.clock.timeout(bound, self.frame.wait()).await.is_err() {
                tracing::warn!(part = self.name, tasks = ?self.frame.alive(), "part left its frame");
            }
        }
        tracing::info!(part = self.name, "part stopped");
        telemetry::trace::flush().await;
        match failure {
            Some(failure) => Err(failure.into()),
            None if drained => Ok(()),
            None => Err(PartError::Drain { limit: self.drain_limit, tasks: self.tasks.alive() }),
        }
    }
}
