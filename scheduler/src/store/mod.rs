//! Placement maps: one per revision, written once. Creating a map that is absent is the fence that lets
//! only one leader write a revision. Nothing here changes a map that exists.

mod api;
mod config;
pub mod conformance;
mod etcd;
#[cfg(test)]
pub(crate) mod memory;
mod metered;
mod pair;
#[cfg(test)]
mod tests;

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;
use berth_crds::{LABEL_PLACEMENT, PlacementMap, PlacementMapSpec};
use berth_runtime::Clock;
use berth_types::{Bytes, Epoch, PlacementName, Revision};
use kube::{Client, api::ObjectMeta};

pub use api::ApiStore;
pub use config::{ConfigError, Credentials, DEFAULT_PREFIX, EtcdConfig, Identity, StoreConfig, StoreKind, Tls};
pub use etcd::{Etcd, EtcdStore};
pub use metered::Metered;
pub use pair::Pair;

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
    /// The leader's key in the store belongs to another leader.
    #[error(
        "{action} placement maps: epoch {epoch} does not lead in etcd, its leader's key says {leader:?}: another \
         scheduler leads, or two clusters share one prefix (scheduler.store.etcd.prefix)"
    )]
    Deposed {
        /// What was being done.
        action: &'static str,
        /// The epoch of the writer.
        epoch: Epoch,
        /// What the leader's key holds: `<epoch> <holder>`.
        leader: String,
    },
    /// The map is larger than the store takes.
    #[error(
        "revision {revision} of {name} takes {bytes}, and the store takes {limit}: use fewer devices an instance, or, \
         if this is the API server, keep maps in etcd (scheduler.store.type)"
    )]
    TooLarge {
        /// The placement.
        name: PlacementName,
        /// The revision.
        revision: Revision,
        /// Its size.
        bytes: Bytes,
        /// What the store takes.
        limit: Bytes,
    },
    /// The store has no room.
    #[error(
        "{action} placement maps: etcd is out of space (alarm NOSPACE): compact and defragment it, or raise \
         --quota-backend-bytes, then disarm the alarm"
    )]
    Full {
        /// What was being done.
        action: &'static str,
    },
    /// The store does not let this user in, or not do this.
    #[error(
        "{action} placement maps: etcd refuses: {reason}: check the user's role on the prefix, and \
         scheduler.store.etcd.credentialsSecret"
    )]
    Refused {
        /// What was being done.
        action: &'static str,
        /// What it says.
        reason: String,
    },
    /// A file that the store is reached with cannot be read.
    #[error("reading {}: {source}: mount the Secret that scheduler.store.etcd names", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
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

impl StoreError {
    /// The word in metrics.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Exists { .. } => "fence",
            Self::Deposed { .. } => "deposed",
            Self::TooLarge { .. } => "too_large",
            Self::Full { .. } => "full",
            Self::Refused { .. } | Self::File { .. } | Self::Elapsed { .. } | Self::Unavailable { .. } => "transient",
        }
    }
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

    /// Deletes the map of a revision of the placement with this uid; one that is absent is no error.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be deleted.
    async fn delete(&self, name: &PlacementName, owner_uid: &str, revision: Revision) -> Result<(), StoreError>;

    /// Deletes all maps of a placement whose object is gone.
    ///
    /// # Errors
    /// [`StoreError`] when they cannot be deleted.
    async fn forget(&self, name: &PlacementName, owner_uid: &str) -> Result<(), StoreError>;
}

/// The map of `name` with this spec, as every store gives it: named as the fence wants it, and nothing more.
#[must_use]
pub fn object(name: &PlacementName, spec: PlacementMapSpec) -> PlacementMap {
    PlacementMap {
        metadata: ObjectMeta {
            namespace: Some(name.namespace().to_owned()),
            name: Some(format!("{}-{}", name.name(), spec.revision)),
            labels: Some([(LABEL_PLACEMENT.to_owned(), name.name().to_owned())].into()),
            ..ObjectMeta::default()
        },
        spec,
    }
}

/// The placement that a map belongs to.
///
/// # Errors
/// [`StoreError::Unavailable`] when its metadata name none.
pub(crate) fn placement_of(action: &'static str, map: &PlacementMap) -> Result<PlacementName, StoreError> {
    let namespace = map.metadata.namespace.as_deref().unwrap_or_default();
    PlacementName::new(namespace, &map.spec.placement)
        .map_err(|invalid| StoreError::Unavailable { action, source: invalid.into() })
}

/// The stores that were configured, for one term after the other.
pub struct Stores {
    api: ApiStore,
    etcd: Option<Etcd>,
    kind: StoreKind,
}

impl Stores {
    /// What `config` names. Nothing is connected yet.
    ///
    /// # Errors
    /// [`ConfigError`] when the config contradicts itself.
    pub fn new(config: StoreConfig, client: Client, clock: &Clock) -> Result<Self, ConfigError> {
        config.validate()?;
        let StoreConfig { kind, etcd } = config;
        let etcd = etcd.map(|etcd| Etcd::new(etcd, clock.clone()));
        Ok(Self { api: ApiStore::new(client, clock.clone()), etcd, kind })
    }

    /// The highest epoch that a store knows a leader of: no term may be numbered lower.
    ///
    /// # Errors
    /// [`StoreError`] when it cannot be read.
    pub async fn floor(&self) -> Result<Epoch, StoreError> {
        match &self.etcd {
            Some(etcd) => etcd.floor().await,
            None => Ok(Epoch(0)),
        }
    }

    /// The store of one term. Where both are known, maps of the one that is not in use are taken over.
    #[must_use]
    pub fn of_term(&self, epoch: Epoch, holder: &str) -> Arc<dyn Store> {
        let api = self.api.clone();
        match (&self.etcd, self.kind) {
            (None, _) => Arc::new(api),
            (Some(etcd), StoreKind::Etcd) => Arc::new(Pair::new(etcd.of_term(epoch, holder), api)),
            (Some(etcd), StoreKind::Api) => Arc::new(Pair::new(api, etcd.of_term(epoch, holder))),
        }
    }
}
