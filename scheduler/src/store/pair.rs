//! Two stores while maps move from one to the other: what the store in use lacks is copied from the other when a
//! term begins, so that a switch moves no expert. Copies stay where they were until their revision is old, so that
//! a scheduler that still uses the other store finds them.

use std::collections::BTreeMap;

use async_trait::async_trait;
use berth_crds::PlacementMap;
use berth_types::{PlacementName, Revision};

use super::{Store, StoreError, object, placement_of};

/// The store in use, and the one that was or will be.
pub struct Pair<H, T> {
    here: H,
    there: T,
}

impl<H: Store, T: Store> Pair<H, T> {
    /// Writes go to `here`; what only `there` has is taken over.
    #[must_use]
    pub const fn new(here: H, there: T) -> Self {
        Self { here, there }
    }

    /// Copies a map; one that this store cannot take stays known and where it is.
    async fn take_over(&self, uid: &str, map: &PlacementMap) -> Result<bool, StoreError> {
        match self.here.create(uid, map).await {
            Ok(()) => Ok(true),
            // Without room nothing can be copied now, and a name may still be a gone placement's: the next term tries
            // again.
            Err(error @ (StoreError::TooLarge { .. } | StoreError::Full { .. } | StoreError::Exists { .. })) => {
                tracing::warn!(%error, "map not taken over, read from the other store");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

#[async_trait]
impl<H: Store, T: Store> Store for Pair<H, T> {
    async fn list(&self) -> Result<Vec<(String, PlacementMap)>, StoreError> {
        let key = |uid: &String, map: &PlacementMap| {
            (map.metadata.namespace.clone(), map.spec.placement.clone(), uid.clone(), map.spec.revision)
        };
        let here = self.here.list().await?;
        let mut maps: BTreeMap<_, _> = here.into_iter().map(|(uid, map)| (key(&uid, &map), map)).collect();
        let (mut copied, mut differing) = (0_u32, 0_u32);
        for (uid, map) in self.there.list().await? {
            let map = object(&placement_of("listing", &map)?, map.spec);
            match maps.get(&key(&uid, &map)) {
                None => copied += u32::from(self.take_over(&uid, &map).await?),
                Some(known) if known.spec == map.spec => continue,
                // Two leaders wrote the revision, one in each store: the later one's word is the status too.
                Some(known) if known.spec.epoch >= map.spec.epoch => {
                    differing += 1;
                    continue;
                }
                Some(_) => differing += 1,
            }
            maps.insert(key(&uid, &map), map);
        }
        if copied > 0 || differing > 0 {
            tracing::info!(copied, differing, "placement maps taken over from the other store");
        }
        Ok(maps.into_iter().map(|((_, _, uid, _), map)| (uid, map)).collect())
    }

    async fn create(&self, owner_uid: &str, map: &PlacementMap) -> Result<(), StoreError> {
        self.here.create(owner_uid, map).await
    }

    async fn delete(&self, name: &PlacementName, owner_uid: &str, revision: Revision) -> Result<(), StoreError> {
        self.there.delete(name, owner_uid, revision).await?;
        self.here.delete(name, owner_uid, revision).await
    }

    async fn forget(&self, name: &PlacementName, owner_uid: &str) -> Result<(), StoreError> {
        self.there.forget(name, owner_uid).await?;
        self.here.forget(name, owner_uid).await
    }
}
