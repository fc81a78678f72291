//! The API server as store: PlacementMap objects, owned by their ExpertPlacement, so that they vanish
//! with it.

use std::time::Duration;

use async_trait::async_trait;
use berth_crds::PlacementMap;
use berth_runtime::Clock;
use berth_types::{Bytes, PlacementName, Revision};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, PostParams},
};

use super::{Store, StoreError, placement_of};

/// Longest wait for one answer; a map may be large.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// Maps per answer: each may hold a megabyte.
const PAGE: u32 = 50;
/// What the API server's etcd takes in one request, by its default.
const LIMIT: Bytes = Bytes(3 << 19);

/// Maps at the API server.
#[derive(Clone)]
pub struct ApiStore {
    client: Client,
    clock: Clock,
}

impl ApiStore {
    /// The API server that `client` speaks to.
    #[must_use]
    pub const fn new(client: Client, clock: Clock) -> Self {
        Self { client, clock }
    }

    fn maps(&self, namespace: &str) -> Api<PlacementMap> {
        Api::namespaced(self.client.clone(), namespace)
    }

    async fn call<T>(
        &self,
        action: &'static str,
        call: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, StoreError> {
        let answer = self.clock.timeout(CALL_LIMIT, call).await.map_err(|_| StoreError::Elapsed { action })?;
        answer.map_err(|error| StoreError::Unavailable { action, source: error.into() })
    }
}

#[async_trait]
impl Store for ApiStore {
    async fn list(&self) -> Result<Vec<(String, PlacementMap)>, StoreError> {
        let api: Api<PlacementMap> = Api::all(self.client.clone());
        let mut params = ListParams::default().limit(PAGE);
        let mut maps = Vec::new();
        loop {
            let page = self.call("listing", api.list(&params)).await?;
            for map in page.items {
                let owner =
                    map.metadata.owner_references.iter().flatten().find(|owner| owner.kind == "ExpertPlacement");
                if let Some(uid) = owner.map(|owner| owner.uid.clone()) {
                    maps.push((uid, map));
                }
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(maps),
            }
        }
    }

    async fn create(&self, owner_uid: &str, map: &PlacementMap) -> Result<(), StoreError> {
        let mut map = map.clone();
        map.metadata.owner_references = Some(vec![OwnerReference {
            api_version: format!("{}/v1alpha1", berth_crds::GROUP),
            kind: "ExpertPlacement".to_owned(),
            name: map.spec.placement.clone(),
            uid: owner_uid.to_owned(),
            controller: Some(true),
            block_owner_deletion: None,
        }]);
        let namespace = map.metadata.namespace.clone().unwrap_or_default();
        let api = self.maps(&namespace);
        match self.call("creating", api.create(&PostParams::default(), &map)).await {
            Ok(_) => Ok(()),
            Err(StoreError::Unavailable { source, .. }) if code(&*source) == Some(409) => {
                Err(StoreError::Exists { name: placement_of("creating", &map)?, revision: Revision(map.spec.revision) })
            }
            Err(StoreError::Unavailable { source, .. }) if is_too_large(&*source) => {
                let bytes = serde_json::to_vec(&map).map_or(0, |text| text.len());
                Err(StoreError::TooLarge {
                    name: placement_of("creating", &map)?,
                    revision: Revision(map.spec.revision),
                    bytes: Bytes(u64::try_from(bytes).unwrap_or(u64::MAX)),
                    limit: LIMIT,
                })
            }
            Err(error) => Err(error),
        }
    }

    async fn delete(&self, name: &PlacementName, _: &str, revision: Revision) -> Result<(), StoreError> {
        let object = format!("{}-{revision}", name.name());
        let api = self.maps(name.namespace());
        match self.call("deleting", api.delete(&object, &DeleteParams::default())).await {
            Ok(_) => Ok(()),
            Err(StoreError::Unavailable { source, .. }) if code(&*source) == Some(404) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The garbage collector follows the maps' owner; a map of that name may be another placement's by now.
    async fn forget(&self, _: &PlacementName, _: &str) -> Result<(), StoreError> {
        Ok(())
    }
}

fn code(error: &(dyn std::error::Error + Send + Sync + 'static)) -> Option<u16> {
    match error.downcast_ref::<kube::Error>()? {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// The API server's own limit (3 MiB) has a code; its etcd client's (2 MiB) and its etcd's (1.5 MiB) have words.
fn is_too_large(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    let said = error.to_string();
    code(error) == Some(413) || said.contains("request is too large") || said.contains("message larger than max")
}
