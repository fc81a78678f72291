//! Counts and times the calls of another store, whichever it is.

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use berth_crds::PlacementMap;
use berth_runtime::Clock;
use berth_types::{PlacementName, Revision};

use super::{Store, StoreError};
use crate::metrics::SchedulerMetrics;

/// A store whose calls are counted.
#[derive(Clone)]
pub struct Metered {
    store: Arc<dyn Store>,
    clock: Clock,
    metrics: SchedulerMetrics,
}

impl fmt::Debug for Metered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metered")
    }
}

impl Metered {
    /// Counts the calls of `store`.
    #[must_use]
    pub fn new(store: Arc<dyn Store>, clock: Clock, metrics: SchedulerMetrics) -> Self {
        Self { store, clock, metrics }
    }

    async fn counted<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let began = self.clock.now();
        let answer = answer.await;
        let outcome = match &answer {
            Ok(_) => "done",
            Err(StoreError::Exists { .. }) => "exists",
            Err(StoreError::Deposed { .. }) => "deposed",
            Err(StoreError::Full { .. } | StoreError::TooLarge { .. }) => "full",
            Err(_) => "failed",
        };
        self.metrics.stored(call, outcome, self.clock.now().saturating_sub(began));
        answer
    }
}

#[async_trait]
impl Store for Metered {
    async fn list(&self) -> Result<Vec<(String, PlacementMap)>, StoreError> {
        self.counted("list", self.store.list()).await
    }

    async fn create(&self, owner_uid: &str, map: &PlacementMap) -> Result<(), StoreError> {
        self.counted("create", self.store.create(owner_uid, map)).await
    }

    async fn delete(&self, name: &PlacementName, owner_uid: &str, revision: Revision) -> Result<(), StoreError> {
        self.counted("delete", self.store.delete(name, owner_uid, revision)).await
    }

    async fn forget(&self, name: &PlacementName, owner_uid: &str) -> Result<(), StoreError> {
        self.counted("forget", self.store.forget(name, owner_uid)).await
    }
}
