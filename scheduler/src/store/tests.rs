//! The suite on the store in memory, and what happens while maps move from one store to another.

use std::sync::Arc;

use async_trait::async_trait;
use berth_crds::PlacementMap;
use berth_types::{Bytes, PlacementName, Revision};

use super::{
    Pair, Store, StoreError,
    conformance::{Subject, conform},
    memory::MemoryStore,
};

fn subject() -> Subject {
    Subject { name: "models/v3-0".parse().unwrap(), uid: "u-1".to_owned() }
}

/// A store that others hold too.
#[derive(Clone, Default)]
struct Shared {
    store: Arc<MemoryStore>,
    /// Takes no map.
    small: bool,
}

#[async_trait]
impl Store for Shared {
    async fn list(&self) -> Result<Vec<(String, PlacementMap)>, StoreError> {
        self.store.list().await
    }

    async fn create(&self, owner_uid: &str, map: &PlacementMap) -> Result<(), StoreError> {
        if self.small {
            let (name, revision) = (subject().name, Revision(map.spec.revision));
            return Err(StoreError::TooLarge { name, revision, bytes: Bytes(2), limit: Bytes(1) });
        }
        self.store.create(owner_uid, map).await
    }

    async fn delete(&self, name: &PlacementName, owner_uid: &str, revision: Revision) -> Result<(), StoreError> {
        self.store.delete(name, owner_uid, revision).await
    }

    async fn forget(&self, name: &PlacementName, owner_uid: &str) -> Result<(), StoreError> {
        self.store.forget(name, owner_uid).await
    }
}

async fn revisions(store: &dyn Store) -> Vec<u64> {
    store.list().await.unwrap().into_iter().map(|(_, map)| map.spec.revision).collect()
}

#[tokio::test]
async fn memory_conforms() {
    conform(&MemoryStore::default(), &subject()).await.unwrap();
}

#[tokio::test]
async fn a_pair_conforms_and_leaves_nothing_in_either() {
    let (here, there) = (Shared::default(), Shared::default());
    conform(&Pair::new(here.clone(), there.clone()), &subject()).await.unwrap();
    assert!(revisions(&here).await.is_empty() && revisions(&there).await.is_empty());
}

#[tokio::test]
async fn a_switch_and_the_way_back_keep_every_map() {
    let (api, etcd) = (Shared::default(), Shared::default());
    for revision in [1, 2] {
        api.create("u-1", &subject().map(1, revision).unwrap()).await.unwrap();
    }
    let switched = Pair::new(etcd.clone(), api.clone());
    assert_eq!(revisions(&switched).await, [1, 2]);
    assert_eq!(revisions(&etcd).await, [1, 2], "what only the other had is taken over");
    switched.create("u-1", &subject().map(2, 3).unwrap()).await.unwrap();
    switched.delete(&subject().name, "u-1", Revision(1)).await.unwrap();
    assert_eq!(revisions(&api).await, [2], "a copy goes with its revision");
    let back = Pair::new(api.clone(), etcd.clone());
    assert_eq!(revisions(&back).await, [2, 3]);
    assert_eq!(revisions(&api).await, [2, 3]);
    back.forget(&subject().name, "u-1").await.unwrap();
    assert!(revisions(&api).await.is_empty() && revisions(&etcd).await.is_empty());
}

#[tokio::test]
async fn of_two_maps_of_one_revision_the_later_leaders_counts() {
    let (here, there) = (Shared::default(), Shared::default());
    for (store, epochs) in [(&here, [5, 5]), (&there, [6, 4])] {
        for (revision, epoch) in (1..).zip(epochs) {
            store.create("u-1", &subject().map(epoch, revision).unwrap()).await.unwrap();
        }
    }
    let maps = Pair::new(here, there).list().await.unwrap();
    let epochs: Vec<_> = maps.into_iter().map(|(_, map)| map.spec.epoch).collect();
    assert_eq!(epochs, [6, 5]);
}

#[tokio::test]
async fn a_map_that_is_too_large_to_move_stays_known() {
    let there = Shared::default();
    there.create("u-1", &subject().map(1, 4).unwrap()).await.unwrap();
    let pair = Pair::new(Shared { small: true, ..Shared::default() }, there.clone());
    assert_eq!(revisions(&pair).await, [4]);
    assert_eq!(revisions(&there).await, [4]);
}
