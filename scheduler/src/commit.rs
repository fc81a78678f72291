//! The only writer: a checked plan becomes a stored map, then the placement's assignment; progress and
//! reachability become status. Everything is refused once the term is over. It decides nothing.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use berth_crds::{
    AcceleratorNode, ExpertPlacement, ExpertPlacementStatus, PlacementMap, PlacementMapSpec,
    expert_placement::Assignment, managers,
};
use berth_planner::{Checked, Layout, Plan, Weights};
use berth_runtime::{Clock, lease::Deposed};
use berth_types::{Epoch, PlacementName, Revision};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::{
    index::to_map,
    store::{self, Store, StoreError},
};

/// Longest wait for one answer.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// Maps kept before the newest.
const KEPT: u64 = 2;

/// Why something was not written.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Another process may lead.
    #[error(transparent)]
    Deposed(#[from] Deposed),
    /// The map could not be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The placement is gone, another one of that name exists, or its rules refuse the write.
    #[error("writing {what}: the API server refuses: {reason}")]
    Refused {
        /// The object.
        what: String,
        /// What it says.
        reason: String,
    },
    /// The API server did not answer, or cannot now.
    #[error("writing {what}: {reason}")]
    Transient {
        /// The object.
        what: String,
        /// Why.
        reason: String,
    },
    /// The plan has no layout.
    #[error("the plan for {0} has no layout")]
    Empty(PlacementName),
    /// The map cannot be written down.
    #[error("the map of {name} cannot be encoded: {source}")]
    Encode {
        /// The placement.
        name: PlacementName,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

impl CommitError {
    /// The word in metrics.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Deposed(_) => "deposed",
            Self::Store(error) => error.as_str(),
            Self::Transient { .. } => "transient",
            Self::Refused { .. } => "refused",
            Self::Empty(_) | Self::Encode { .. } => "bug",
        }
    }
}

/// The right to write: a term of leading.
pub trait Fence: Send + Sync + 'static {
    /// The epoch, as long as it may write.
    ///
    /// # Errors
    /// [`Deposed`] once another process may lead.
    fn check(&self) -> Result<Epoch, Deposed>;
}

impl Fence for berth_runtime::Term {
    fn check(&self) -> Result<Epoch, Deposed> {
        Self::check(self)
    }
}

/// Where status goes.
#[async_trait]
pub trait Door: Send + Sync + 'static {
    /// Applies the scheduler's whole status of a placement, if it still is the one with this uid.
    ///
    /// # Errors
    /// [`CommitError`] when it was not written.
    async fn placement(
        &self,
        name: &PlacementName,
        uid: &str,
        status: &ExpertPlacementStatus,
    ) -> Result<(), CommitError>;

    /// Applies the `Reachable` condition of a node.
    ///
    /// # Errors
    /// [`CommitError`] when it was not written.
    async fn reachable(&self, node: &str, condition: &Condition) -> Result<(), CommitError>;
}

/// A plan to store.
#[derive(Debug)]
pub struct Order {
    /// Uid of the placement.
    pub uid: String,
    /// The plan.
    pub plan: Plan<Checked>,
    /// The status that tells of it; the assignment is filled in here.
    pub status: ExpertPlacementStatus,
    /// Stored revisions that nobody needs, to be deleted if they are old enough.
    pub spare: Vec<Revision>,
}

/// A plan that was stored.
#[derive(Debug)]
pub struct Receipt {
    /// Its revision.
    pub revision: Revision,
    /// Its layout.
    pub layout: Arc<Layout>,
    /// What part of its expert's tokens each slot takes; `None` = replicas share evenly.
    pub weights: Option<Arc<Weights>>,
    /// Digest of its map.
    pub digest: String,
    /// The status as written.
    pub status: ExpertPlacementStatus,
    /// Revisions whose maps were deleted.
    pub deleted: Vec<Revision>,
    /// What is left of the plan.
    pub rest: Option<Plan<berth_planner::Proposed>>,
}

/// Writes, as long as the fence allows it.
#[derive(Clone)]
pub struct Writer {
    fence: Arc<dyn Fence>,
    store: Arc<dyn Store>,
    door: Arc<dyn Door>,
}

impl Writer {
    /// A writer for one term.
    #[must_use]
    pub fn new(fence: Arc<dyn Fence>, store: Arc<dyn Store>, door: Arc<dyn Door>) -> Self {
        Self { fence, store, door }
    }

    /// Stores the first layout of a plan: the map, then the assignment.
    ///
    /// # Errors
    /// [`CommitError`]; a map that was created stays and its revision is never used again.
    pub async fn commit(&self, order: Order) -> Result<Receipt, CommitError> {
        let Order { uid, plan, mut status, spare } = order;
        let epoch = self.fence.check()?;
        let (name, revision) = (plan.decision().name.clone(), plan.decision().revision);
        let layout = plan.first().cloned().ok_or_else(|| CommitError::Empty(name.clone()))?;
        let weights = plan.weights().cloned();
        let map = map(&name, revision, epoch, &layout, weights.as_ref());
        let digest = digest(&name, &map.spec)?;
        self.store.create(&uid, &map).await?;
        self.fence.check()?;
        let devices = layout.devices.iter().map(|entry| entry.device.clone()).collect();
        status.assignment = Some(Assignment { epoch: epoch.0, revision: revision.0, digest: digest.clone(), devices });
        self.door.placement(&name, &uid, &status).await?;
        let deleted = self.delete(&name, &uid, revision, spare).await;
        let rest = plan.committed().rest();
        Ok(Receipt { revision, layout: layout.into(), weights: weights.map(Into::into), digest, status, deleted, rest })
    }

    /// Deletes maps older than the previous two; one that cannot be deleted now is tried with the next plan.
    async fn delete(&self, name: &PlacementName, uid: &str, newest: Revision, spare: Vec<Revision>) -> Vec<Revision> {
        let mut deleted = Vec::new();
        for old in spare.into_iter().filter(|old| old.0.saturating_add(KEPT) < newest.0) {
            if self.fence.check().is_err() {
                break;
            }
            match self.store.delete(name, uid, old).await {
                Ok(()) => deleted.push(old),
                Err(error) => tracing::warn!(placement = %name, revision = old.0, %error, "old map kept"),
            }
        }
        deleted
    }

    /// Deletes the maps of a placement whose object is gone.
    ///
    /// # Errors
    /// [`CommitError`] when they are still there.
    pub async fn forget(&self, name: &PlacementName, uid: &str) -> Result<(), CommitError> {
        self.fence.check()?;
        Ok(self.store.forget(name, uid).await?)
    }

    /// Writes the status of a placement.
    ///
    /// # Errors
    /// [`CommitError`] when it was not written.
    pub async fn status(
        &self,
        name: &PlacementName,
        uid: &str,
        mut status: ExpertPlacementStatus,
    ) -> Result<ExpertPlacementStatus, CommitError> {
        let epoch = self.fence.check()?;
        // Every write carries the epoch, so that the API server itself refuses those of an earlier leader.
        if let Some(assignment) = &mut status.assignment {
            assignment.epoch = assignment.epoch.max(epoch.0);
        }
        self.door.placement(name, uid, &status).await?;
        Ok(status)
    }

    /// Writes the `Reachable` condition of a node.
    ///
    /// # Errors
    /// [`CommitError`] when it was not written.
    pub async fn reachable(&self, node: &str, condition: &Condition) -> Result<(), CommitError> {
        self.fence.check()?;
        self.door.reachable(node, condition).await
    }
}

/// The map of a revision.
#[must_use]
pub fn map(
    name: &PlacementName,
    revision: Revision,
    epoch: Epoch,
    layout: &Layout,
    weights: Option<&Weights>,
) -> PlacementMap {
    let (devices, layers) = to_map(layout, weights);
    let placement = name.name().to_owned();
    store::object(name, PlacementMapSpec { placement, revision: revision.0, epoch: epoch.0, devices, layers })
}

/// `sha256:<hex>` of a map's spec.
///
/// # Errors
/// [`CommitError::Encode`] when the spec cannot be written as JSON.
pub fn digest(name: &PlacementName, spec: &PlacementMapSpec) -> Result<String, CommitError> {
    let text = serde_json::to_vec(spec).map_err(|source| CommitError::Encode { name: name.clone(), source })?;
    let hex: String = Sha256::digest(&text).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("sha256:{hex}"))
}

/// The API server: server-side apply of the status, by the scheduler's field manager, never by force.
#[derive(Clone)]
pub struct ApiDoor {
    client: Client,
    clock: Clock,
}

impl ApiDoor {
    /// The API server that `client` speaks to.
    #[must_use]
    pub const fn new(client: Client, clock: Clock) -> Self {
        Self { client, clock }
    }

    async fn call<T>(
        &self,
        what: String,
        call: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<(), CommitError> {
        match self.clock.timeout(CALL_LIMIT, call).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(kube::Error::Api(status))) if (400..500).contains(&status.code) && status.code != 429 => {
                Err(CommitError::Refused { what, reason: status.message })
            }
            Ok(Err(error)) => Err(CommitError::Transient { what, reason: error.to_string() }),
            Err(elapsed) => Err(CommitError::Transient { what, reason: elapsed.to_string() }),
        }
    }
}

#[async_trait]
impl Door for ApiDoor {
    async fn placement(
        &self,
        name: &PlacementName,
        uid: &str,
        status: &ExpertPlacementStatus,
    ) -> Result<(), CommitError> {
        let api: Api<ExpertPlacement> = Api::namespaced(self.client.clone(), name.namespace());
        let patch = json!({
            "apiVersion": format!("{}/v1alpha1", berth_crds::GROUP),
            "kind": "ExpertPlacement",
            "metadata": {"name": name.name(), "namespace": name.namespace(), "uid": uid},
            "status": status,
        });
        let params = PatchParams::apply(managers::SCHEDULER);
        self.call(format!("the status of {name}"), api.patch_status(name.name(), &params, &Patch::Apply(&patch))).await
    }

    async fn reachable(&self, node: &str, condition: &Condition) -> Result<(), CommitError> {
        let api: Api<AcceleratorNode> = Api::all(self.client.clone());
        let patch = json!({
            "apiVersion": format!("{}/v1alpha1", berth_crds::GROUP),
            "kind": "AcceleratorNode",
            "metadata": {"name": node},
            "status": {"conditions": [condition]},
        });
        let params = PatchParams::apply(managers::SCHEDULER);
        self.call(format!("Reachable of {node}"), api.patch_status(node, &params, &Patch::Apply(&patch))).await
    }
}
