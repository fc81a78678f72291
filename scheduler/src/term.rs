//! Terms of leading: reads what is stored, takes the chair, walks the ring until the term is over, and
//! begins anew from nothing. It decides nothing about placements.

use std::{convert::Infallible, sync::Arc, time::Duration};

use berth_crds::ExpertPlacement;
use berth_runtime::{
    Clock, Leadership, Term,
    admin::{Check, Heartbeat},
    lease::next_term,
};
use berth_types::{Epoch, PlacementName};
use kube::{Api, Client, api::ListParams};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use crate::{
    commit::{ApiDoor, Writer, digest},
    index::Index,
    metrics::SchedulerMetrics,
    reports::{Chair, Seat},
    ring::Ring,
    store::{Metered, Store, StoreError, Stores},
    watches,
};

/// Facts that may wait for the ring.
const FACTS: usize = 4096;
/// Pause after the API server failed.
const PAUSE: Duration = Duration::from_millis(500);
/// A follower's sign of life.
const BEAT: Duration = Duration::from_secs(1);
/// Longest wait for a list.
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// What terms need.
pub struct Office {
    /// The API server.
    pub client: Client,
    /// Where maps are.
    pub stores: Stores,
    /// Who this process is: `<pod>@<ip:port>`.
    pub identity: String,
    /// The time.
    pub clock: Clock,
    /// The metrics.
    pub metrics: SchedulerMetrics,
    /// Who leads, for streams.
    pub chair: watch::Sender<Chair>,
    /// Passes once it is known who leads.
    pub ready: Check,
    /// How long a revision may load before it is planned around what is late.
    pub load_limit: Duration,
}

impl Office {
    /// The highest epoch in any placement and in the store: no term may be numbered lower, even if the Lease was
    /// deleted.
    pub async fn floor(&self, stopping: &CancellationToken) -> Epoch {
        let stored = self.stored_floor(stopping).await;
        let api: Api<ExpertPlacement> = Api::all(self.client.clone());
        while !stopping.is_cancelled() {
            match self.clock.timeout(CALL_LIMIT, api.list(&ListParams::default())).await {
                Ok(Ok(list)) => {
                    let epochs = list.items.iter().filter_map(|object| object.status.as_ref()?.assignment.as_ref());
                    return Epoch(epochs.map(|assignment| assignment.epoch).max().unwrap_or(0)).max(stored);
                }
                Ok(Err(error)) => tracing::warn!(%error, "placements not read, trying on"),
                Err(error) => tracing::warn!(%error, "placements not read, trying on"),
            }
            self.clock.sleep(PAUSE).await;
        }
        Epoch(0)
    }

    async fn stored_floor(&self, stopping: &CancellationToken) -> Epoch {
        while !stopping.is_cancelled() {
            match self.stores.floor().await {
                Ok(epoch) => return epoch,
                Err(error) => tracing::warn!(%error, "the store's leader not read, trying on"),
            }
            self.clock.sleep(PAUSE).await;
        }
        Epoch(0)
    }

    /// Serves one term after the other until `stopping`.
    ///
    /// # Errors
    /// None; the type is what tasks return.
    pub async fn serve(
        self,
        mut leadership: watch::Receiver<Leadership>,
        stopping: CancellationToken,
        heartbeat: Heartbeat,
    ) -> Result<(), Infallible> {
        while !stopping.is_cancelled() {
            self.follow(&leadership.borrow_and_update().clone());
            heartbeat.beat();
            // Both arms only look.
            let term = tokio::select! {
                term = next_term(&mut leadership, &stopping) => term,
                () = self.clock.sleep(BEAT) => continue,
            };
            let Some(term) = term else { break };
            self.lead(&term, &stopping, &heartbeat).await;
        }
        Ok(())
    }

    fn follow(&self, leadership: &Leadership) {
        if let Leadership::Following { leader } = leadership {
            if leader.is_some() {
                self.ready.pass();
            }
            self.chair.send_replace(Chair::Elsewhere(leader.clone()));
        }
    }

    /// One term, to its end.
    async fn lead(&self, term: &Term, stopping: &CancellationToken, heartbeat: &Heartbeat) {
        let ended = term.ended().child_token();
        let store: Arc<dyn Store> = Arc::new(self.metered(self.stores.of_term(term.epoch(), &self.identity)));
        let Some(index) = self.index(&*store, &ended, heartbeat).await else { return };
        let door = Arc::new(ApiDoor::new(self.client.clone(), self.clock.clone()));
        let writer = Writer::new(Arc::new(term.clone()), store, door);
        let (facts, taken) = mpsc::channel(FACTS);
        let mut watching = JoinSet::new();
        watching.spawn(watches::placements(self.client.clone(), self.clock.clone(), facts.clone(), ended.clone()));
        watching.spawn(watches::nodes(self.client.clone(), self.clock.clone(), facts.clone(), ended.clone()));
        let seat = Seat { epoch: term.epoch(), facts: facts.clone(), ended: ended.clone() };
        self.chair.send_replace(Chair::Taken(seat));
        self.ready.pass();
        tracing::info!(epoch = term.epoch().0, "took the chair");
        let ring = Ring::new(index, term.epoch(), writer, self.clock.clone(), self.metrics.clone(), facts);
        ring.with_load_limit(self.load_limit).run(taken, ended.clone(), || heartbeat.beat()).await;
        ended.cancel();
        self.chair.send_replace(Chair::Elsewhere(None));
        // The watches look at `ended` before anything else; nothing of theirs is worth keeping.
        while watching.join_next().await.is_some() {}
        tracing::info!(epoch = term.epoch().0, stopping = stopping.is_cancelled(), "left the chair");
    }

    fn metered(&self, store: Arc<dyn Store>) -> Metered {
        Metered::new(store, self.clock.clone(), self.metrics.clone())
    }

    /// A world that knows the stored revisions.
    async fn index(&self, store: &dyn Store, ended: &CancellationToken, heartbeat: &Heartbeat) -> Option<Index> {
        while !ended.is_cancelled() {
            heartbeat.beat();
            match load(store, self.clock.now()).await {
                Ok(index) => return Some(index),
                Err(error) => tracing::warn!(%error, "stored revisions not read, trying on"),
            }
            self.clock.sleep(PAUSE).await;
        }
        None
    }
}

/// A world at `now` that knows the maps in `store`.
///
/// # Errors
/// [`StoreError`] when they cannot be read.
pub async fn load(store: &dyn Store, now: Duration) -> Result<Index, StoreError> {
    let mut index = Index::new(now);
    for (uid, map) in store.list().await? {
        let namespace = map.metadata.namespace.clone().unwrap_or_default();
        let Ok(name) = PlacementName::new(&namespace, &map.spec.placement) else { continue };
        match digest(&name, &map.spec) {
            Ok(digest) => index.map(&name, &uid, &map, digest),
            Err(error) => tracing::warn!(%error, "stored revision skipped"),
        }
    }
    Ok(index)
}
