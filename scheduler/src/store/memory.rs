//! Maps in memory, for tests.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;
use berth_crds::PlacementMap;
use berth_types::{PlacementName, Revision};

use super::{Store, StoreError};

#[derive(Debug, Default)]
pub(crate) struct MemoryStore(Mutex<BTreeMap<(String, u64), (String, PlacementMap)>>);

impl MemoryStore {
    pub(crate) fn revisions(&self, name: &PlacementName) -> Vec<u64> {
        let maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        maps.keys().filter(|(known, _)| *known == name.to_string()).map(|(_, revision)| *revision).collect()
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn list(&self) -> Result<Vec<(String, PlacementMap)>, StoreError> {
        Ok(self.0.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect())
    }

    async fn create(&self, owner_uid: &str, map: &PlacementMap) -> Result<(), StoreError> {
        let name: PlacementName =
            format!("{}/{}", map.metadata.namespace.as_deref().unwrap(), map.spec.placement).parse().unwrap();
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (name.to_string(), map.spec.revision);
        if maps.contains_key(&key) {
            return Err(StoreError::Exists { name, revision: Revision(map.spec.revision) });
        }
        maps.insert(key, (owner_uid.to_owned(), map.clone()));
        Ok(())
    }

    async fn delete(&self, name: &PlacementName, owner_uid: &str, revision: Revision) -> Result<(), StoreError> {
        let key = (name.to_string(), revision.0);
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|known, (uid, _)| *known != key || uid != owner_uid);
        Ok(())
    }

    async fn forget(&self, name: &PlacementName, owner_uid: &str) -> Result<(), StoreError> {
        let name = name.to_string();
        let mut maps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        maps.retain(|(known, _), (uid, _)| *known != name || uid != owner_uid);
        Ok(())
    }
}
