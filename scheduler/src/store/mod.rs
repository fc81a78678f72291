//! Placement maps: one per revision, written once. Creating a map that is absent is the fence that lets
//! only one leader write a revision.

mod api;
#[cfg(test)]
pub(crate) mod memory;

use async_trait::async_trait;
use berth_crds::PlacementMap;
use berth_types::{PlacementName, Revision};

pub use api::ApiStore;

/// Why a map could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The revision exists: somebody else wrote it.
    #[error("revision {revision} of {name} exists already: another leader wrote it")]
    Exists {
        /// The placement.
        name: PlacementName,
        /// The revision.
        revision: Revision,
    },
    /// No answer in time.
    #[error("{action} placement maps: no answer in time")]
    Elapsed {
        /// What was being done.
        action: &'static str,
    },
    /// The store refused, or was not reached.
    #[error("{action} placement maps: {source}")]
    Unavailable {
        /// What was being done.
        action: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Where maps are.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// All maps there are, each with the uid of the placement that owns it.
    ///
    /// # Errors
    /// [`StoreError`] when they cannot be read.
    async fn list(&self) -> Result<Vec<(String, PlacementMap)>, StoreError>;

    /// Creates a map owned by the placement with this uid; its namespace and name are in its metadata.
    ///
    /// # Errors
    /// [`StoreError::Exists`] if there is one of that name, else why it could not be written.
    async fn create(&self, owner_uid: &str, map: &PlacementMap) -> Result<(), StoreError>;

    /// Deletes a revision's map; one that is absent is no error.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be deleted.
    async fn delete(&self, name: &PlacementName, revision: Revision) -> Result<(), StoreError>;
}
