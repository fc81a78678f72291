//! What the files of a volume are to hold: fetched from ConfigMaps, Secrets, the downward API and the token
//! API, as relative path to content. Never touches a file.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, HostPathVolumeSource, KeyToPath, PersistentVolume, PersistentVolumeClaim, Pod,
    Secret, ServiceAccount, ServiceAccountTokenProjection, Volume, VolumeProjection,
};
use kube::api::PostParams;
use kube::{Api, Client};

use super::environment::downward;
use super::status::Addresses;

/// Files of a volume, by path relative to it.
pub(super) type Payload = BTreeMap<String, Vec<u8>>;

/// Every request has this long.
const DEADLINE: Duration = Duration::from_secs(10);
/// A kubelet's default life of a projected token.
const TOKEN_SECONDS: i64 = 3600;

/// Reads what one pod may refer to.
pub(super) struct Lookup {
    client: Client,
    pod: BoundPod,
    tokens: Mutex<BTreeMap<(String, String), Token>>,
}

/// What a token is bound to.
#[derive(Debug, Clone)]
pub(super) struct BoundPod {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    pub service_account: String,
}

struct Token {
    text: String,
    renew_at: Instant,
}

impl Lookup {
    pub(super) fn new(client: Client, pod: BoundPod) -> Self {
        Self { client, pod, tokens: Mutex::default() }
    }

    /// The data of a ConfigMap; of an optional one that does not exist, nothing.
    pub(super) async fn config_map(&self, name: &str, optional: bool) -> Result<Payload, String> {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), &self.pod.namespace);
        let Some(found) = within(api.get_opt(name)).await? else { return missing("configmap", name, optional) };
        let text = found.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.into_bytes()));
        let binary = found.binary_data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0));
        Ok(text.chain(binary).collect())
    }

    /// The data of a Secret; of an optional one that does not exist, nothing.
    pub(super) async fn secret(&self, name: &str, optional: bool) -> Result<Payload, String> {
        let api: Api<Secret> = Api::namespaced(self.client.clone(), &self.pod.namespace);
        let Some(found) = within(api.get_opt(name)).await? else { return missing("secret", name, optional) };
        Ok(found.data.unwrap_or_default().into_iter().map(|(k, v)| (k, v.0)).collect())
    }

    /// The folder of the node behind a claim: that of the hostPath volume it is bound to.
    pub(super) async fn claimed(&self, claim: &str) -> Result<HostPathVolumeSource, String> {
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), &self.pod.namespace);
        let found = within(claims.get(claim)).await?;
        let bound = found.spec.and_then(|spec| spec.volume_name).filter(|name| !name.is_empty());
        let bound = bound.ok_or_else(|| format!("persistentvolumeclaim {claim:?} is not bound"))?;
        let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
        let source = within(volumes.get(&bound)).await?.spec.and_then(|spec| spec.host_path);
        source.ok_or_else(|| format!("persistentvolume {bound:?}: only hostPath is supported by the process kubelet"))
    }

    /// A token of the pod's service account, bound to the pod; renewed after 80 % of its life.
    async fn token(&self, wanted: &ServiceAccountTokenProjection) -> Result<Vec<u8>, String> {
        let audience = wanted.audience.clone().unwrap_or_default();
        let key = (wanted.path.clone(), audience.clone());
        let lock = || self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(token) = lock().get(&key).filter(|t| Instant::now() < t.renew_at) {
            return Ok(token.text.clone().into_bytes());
        }
        let seconds = wanted.expiration_seconds.unwrap_or(TOKEN_SECONDS);
        let request = TokenRequest {
            spec: Some(TokenRequestSpec {
                audiences: (!audience.is_empty()).then(|| vec![audience]),
                expiration_seconds: Some(seconds),
                bound_object_ref: Some(BoundObjectReference {
                    api_version: Some("v1".into()),
                    kind: Some("Pod".into()),
                    name: Some(self.pod.name.clone()),
                    uid: Some(self.pod.uid.clone()),
                }),
            }),
            ..TokenRequest::default()
        };
        let api: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &self.pod.namespace);
        let params = PostParams::default();
        let asked = api.create_subresource("token", &self.pod.service_account, &params, &request);
        let answer: TokenRequest = within(asked).await?;
        let text = answer.status.and_then(|s| s.token).ok_or("the token API gave no token")?;
        let life = Duration::from_secs(u64::try_from(seconds).unwrap_or_default()) * 8 / 10;
        lock().insert(key, Token { text: text.clone(), renew_at: Instant::now() + life });
        Ok(text.into_bytes())
    }

    /// The files of a volume made of objects; `None` for a volume of another kind.
    pub(super) async fn volume(
        &self,
        volume: &Volume,
        pod: &Pod,
        addresses: &Addresses,
    ) -> Result<Option<Payload>, String> {
        if let Some(source) = &volume.config_map {
            let data = self.config_map(&source.name, source.optional == Some(true)).await?;
            return select(data, source.items.as_deref()).map(Some);
        }
        if let Some(source) = &volume.secret {
            let name = source.secret_name.as_deref().unwrap_or_default();
            let data = self.secret(name, source.optional == Some(true)).await?;
            return select(data, source.items.as_deref()).map(Some);
        }
        if let Some(source) = &volume.downward_api {
            return fields(source.items.as_deref(), pod, addresses).map(Some);
        }
        let Some(projected) = &volume.projected else { return Ok(None) };
        let mut all = Payload::new();
        for source in projected.sources.iter().flatten() {
            all.extend(self.projection(source, pod, addresses).await?);
        }
        Ok(Some(all))
    }

    async fn projection(&self, source: &VolumeProjection, pod: &Pod, addresses: &Addresses) -> Result<Payload, String> {
        if let Some(wanted) = &source.service_account_token {
            return Ok(Payload::from([(wanted.path.clone(), self.token(wanted).await?)]));
        }
        if let Some(map) = &source.config_map {
            let data = self.config_map(&map.name, map.optional == Some(true)).await?;
            return select(data, map.items.as_deref());
        }
        if let Some(secret) = &source.secret {
            let data = self.secret(&secret.name, secret.optional == Some(true)).await?;
            return select(data, secret.items.as_deref());
        }
        if let Some(downward) = &source.downward_api {
            return fields(downward.items.as_deref(), pod, addresses);
        }
        Err("this projection is not supported by the process kubelet".into())
    }
}

/// The chosen keys under their paths, or everything.
fn select(mut data: Payload, items: Option<&[KeyToPath]>) -> Result<Payload, String> {
    let Some(items) = items else { return Ok(data) };
    let take = |item: &KeyToPath| {
        let value = data.remove(&item.key).ok_or_else(|| format!("references non-existent key: {}", item.key))?;
        Ok((item.path.clone(), value))
    };
    items.iter().map(take).collect()
}

fn fields(items: Option<&[DownwardAPIVolumeFile]>, pod: &Pod, addresses: &Addresses) -> Result<Payload, String> {
    let one = |item: &DownwardAPIVolumeFile| {
        let field = item.field_ref.as_ref().ok_or("resourceFieldRef is not supported by the process kubelet")?;
        Ok((item.path.clone(), downward(pod, addresses, &field.field_path)?.into_bytes()))
    };
    items.unwrap_or_default().iter().map(one).collect()
}

fn missing(kind: &str, name: &str, optional: bool) -> Result<Payload, String> {
    if optional { Ok(Payload::new()) } else { Err(format!("{kind} {name:?} not found")) }
}

/// Gives a request its deadline and its error a sentence.
pub(super) async fn within<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match tokio::time::timeout(DEADLINE, request).await {
        Ok(answer) => answer.map_err(|e| e.to_string()),
        Err(_) => Err(format!("the API server did not answer within {DEADLINE:?}")),
    }
}
