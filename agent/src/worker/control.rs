//! Obeys the supervisor: one task that owns the board, starts and cancels loads, and publishes what is
//! ready. It decides nothing: what to hold is in the order, what to answer is in `forward`.

use std::{sync::Arc, time::Duration};

use berth_proto::v1::WorkerOrder;
use berth_runtime::Clock;
use berth_types::Bytes;
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::{
    load_error::LoadError,
    loader::{Claim, Loader},
    metrics::Metrics,
    shelf::{self, Board, Held, Load, LoadId, Shelves, View},
};

/// First wait before a failed load is tried again; it doubles up to [`RETRY_MOST`].
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest wait before a failed load is tried again.
const RETRY_MOST: Duration = Duration::from_secs(300);

/// What a load came to.
type Outcome = (LoadId, Result<Held, LoadError>);

/// What others may watch.
#[derive(Clone, Debug)]
pub(crate) struct Published {
    /// For calls.
    pub(crate) shelves: watch::Receiver<Arc<Shelves>>,
    /// For reports; changes with every transition.
    pub(crate) views: watch::Receiver<Vec<View>>,
}

/// Owner of the board.
#[derive(Debug)]
pub(crate) struct Control {
    board: Board,
    loader: Arc<Loader>,
    loads: JoinSet<()>,
    outcomes: (mpsc::Sender<Outcome>, mpsc::Receiver<Outcome>),
    /// Wakes failed loads when memory was freed.
    freed: Arc<Notify>,
    metrics: Arc<Metrics>,
    clock: Clock,
    shelves: watch::Sender<Arc<Shelves>>,
    views: watch::Sender<Vec<View>>,
}

impl Control {
    /// A control over an empty device.
    pub(crate) fn new(loader: Arc<Loader>, metrics: Arc<Metrics>, clock: Clock) -> (Self, Published) {
        let (shelves, see_shelves) = watch::channel(Arc::default());
        let (views, see_views) = watch::channel(Vec::new());
        let control = Self {
            board: Board::default(),
            loader,
            loads: JoinSet::new(),
            outcomes: mpsc::channel(16),
            freed: Arc::default(),
            metrics,
            clock,
            shelves,
            views,
        };
        (control, Published { shelves: see_shelves, views: see_views })
    }

    /// Obeys until `stop` is cancelled; loads are cancelled then.
    pub(crate) async fn run(mut self, mut orders: mpsc::Receiver<WorkerOrder>, stop: CancellationToken) {
        let mut open = true;
        loop {
            // Cancel-safe: `recv`, `join_next` and `cancelled` lose nothing when dropped.
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                order = orders.recv(), if open => match order {
                    Some(order) => self.obey(&order),
                    None => open = false,
                },
                Some((id, outcome)) = self.outcomes.1.recv() => self.settle(id, outcome),
                Some(ended) = self.loads.join_next(), if !self.loads.is_empty() => {
                    if let Err(error) = ended {
                        tracing::error!(%error, "a load broke off");
                    }
                }
            }
        }
    }

    fn obey(&mut self, order: &WorkerOrder) {
        let obeyed = self.board.desire(order);
        for load in obeyed.loads {
            let claim = self.loader.claim(&load.shelf);
            let (placement, revision) = (&load.shelf.placement, load.shelf.revision.0);
            tracing::info!(%placement, revision, slots = shelf::slots(&load.shelf), "loading a shelf");
            let stop = CancellationToken::new();
            self.board.started(load.id, stop.clone().drop_guard());
            let pursuit = Pursuit {
                loader: Arc::clone(&self.loader),
                load,
                freed: Arc::clone(&self.freed),
                outcomes: self.outcomes.0.clone(),
                stop,
                clock: self.clock.clone(),
            };
            self.loads.spawn(pursuit.run(claim));
        }
        self.publish();
        let freed = obeyed.freed.len();
        drop(obeyed.freed);
        if freed > 0 {
            tracing::info!(shelves = freed, "shelves let go");
            self.freed.notify_waiters();
        }
    }

    fn settle(&mut self, id: LoadId, outcome: Result<Held, LoadError>) {
        match &outcome {
            Ok(held) => {
                self.metrics.loaded(true);
                tracing::info!(bytes = held.bytes().get(), digest = held.digest, "a shelf is ready");
            }
            Err(LoadError::Cancelled) => return,
            Err(error) => {
                self.metrics.loaded(false);
                tracing::warn!(%error, "a shelf could not be loaded");
            }
        }
        self.board.settle(id, outcome.map_err(|error| error.to_string()));
        self.publish();
    }

    fn publish(&self) {
        let views = self.board.views();
        let bytes: Bytes = views.iter().filter_map(View::held).map(|held| held.bytes()).sum();
        self.metrics.ready_bytes.set(i64::try_from(bytes.get()).unwrap_or(i64::MAX));
        self.shelves.send_replace(Arc::new(self.board.snapshot()));
        self.views.send_replace(views);
    }
}

/// One load, tried until it is done or no longer wanted.
struct Pursuit {
    loader: Arc<Loader>,
    load: Load,
    freed: Arc<Notify>,
    outcomes: mpsc::Sender<Outcome>,
    stop: CancellationToken,
    clock: Clock,
}

impl Pursuit {
    async fn run(self, claim: Claim) {
        let Self { loader, load, freed, outcomes, stop, clock } = self;
        let (mut claim, mut wait) = (Some(claim), RETRY_FIRST);
        loop {
            let claim = claim.take().unwrap_or_default();
            let outcome = Arc::clone(&loader).load(load.clone(), claim, stop.clone()).await;
            let done = matches!(outcome, Ok(_) | Err(LoadError::Cancelled));
            if outcomes.send((load.id, outcome)).await.is_err() || done {
                return;
            }
            // Cancel-safe: all arms only wait.
            tokio::select! {
                () = stop.cancelled() => return,
                () = freed.notified() => {}
                () = clock.sleep(wait) => {}
            }
            wait = wait.saturating_mul(2).min(RETRY_MOST);
        }
    }
}
