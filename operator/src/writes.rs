//! The operator's only door to the API server for writing: server-side apply under one field manager,
//! never by force, each call within a deadline and only while this process leads.
//!
//! It decides nothing, and never writes what is already so.

use std::{fmt::Debug, sync::Arc, time::Duration};

use berth_crds::managers;
use berth_runtime::{Clock, lease::Deposed};
use k8s_openapi::{NamespaceResourceScope, api::core::v1::ObjectReference};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions},
    runtime::events::{Event, Recorder, Reporter},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{error::WriteError, metrics::OperatorMetrics};

/// Longest wait for one answer.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// Hash of what was applied last, so that a field that is no longer wanted is noticed.
const ANNOTATION_APPLIED: &str = "berth.dev/applied";

/// Says whether this process may still write.
pub type MayWrite = Arc<dyn Fn() -> Result<(), Deposed> + Send + Sync>;

/// The door.
#[derive(Clone)]
pub struct Writes {
    client: Client,
    clock: Clock,
    metrics: OperatorMetrics,
    may_write: MayWrite,
    recorder: Recorder,
}

impl Writes {
    /// A door through `client`, open while `may_write` says so. Events name `instance` as their writer.
    #[must_use]
    pub fn new(
        client: Client,
        clock: Clock,
        metrics: OperatorMetrics,
        may_write: MayWrite,
        instance: Option<String>,
    ) -> Self {
        let reporter = Reporter { controller: managers::OPERATOR.to_owned(), instance };
        let recorder = Recorder::new(client.clone(), reporter);
        Self { client, clock, metrics, may_write, recorder }
    }

    /// The objects of kind `K` in `namespace`.
    #[must_use]
    pub fn within<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// The objects of kind `K` of the whole cluster.
    #[must_use]
    pub fn everywhere<K: Resource<DynamicType = ()>>(&self) -> Api<K> {
        Api::all(self.client.clone())
    }

    /// For reading what no cache holds.
    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Makes the object as `wanted` says; `live` is what the cache holds. Returns what is then there;
    /// calls nobody when it is there already.
    ///
    /// # Errors
    /// [`WriteError`]; a field that another manager owns with another value is a conflict.
    pub async fn apply<K>(&self, api: &Api<K>, wanted: &K, live: Option<&Arc<K>>) -> Result<Arc<K>, WriteError>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned,
    {
        let (name, kind) = (wanted.name_any(), K::kind(&()));
        let what = || format!("{kind} {name}");
        let mut body = to_value(&what(), wanted)?;
        let hash = hash_of(&body);
        body["apiVersion"] = json!(K::api_version(&()));
        body["kind"] = json!(kind);
        body["metadata"]["annotations"][ANNOTATION_APPLIED] = json!(hash);
        if let Some(live) = live
            && live.annotations().get(ANNOTATION_APPLIED) == Some(&hash)
            && covers(&to_value(&what(), live.as_ref())?, &body)
        {
            return Ok(Arc::clone(live));
        }
        let parameters = PatchParams::apply(managers::OPERATOR);
        let body = Patch::Apply(&body);
        let call = api.patch(&name, &parameters, &body);
        self.call("apply", &kind, what(), call).await.map(Arc::new)
    }

    /// Makes the object `name` as `body` says, which holds metadata and what the operator owns.
    ///
    /// # Errors
    /// [`WriteError`].
    pub async fn apply_value<K>(&self, api: &Api<K>, name: &str, mut body: Value) -> Result<(), WriteError>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let kind = K::kind(&());
        body["apiVersion"] = json!(K::api_version(&()));
        body["kind"] = json!(kind);
        let parameters = PatchParams::apply(managers::OPERATOR);
        let body = Patch::Apply(&body);
        let call = api.patch(name, &parameters, &body);
        self.call("apply", &kind, format!("{kind} {name}"), call).await.map(drop)
    }

    /// Makes the status of `object` as `status` says.
    ///
    /// # Errors
    /// [`WriteError`].
    pub async fn apply_status<K, S>(&self, api: &Api<K>, object: &K, status: &S) -> Result<(), WriteError>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
        S: Serialize + Sync,
    {
        let (name, kind) = (object.name_any(), K::kind(&()));
        let what = format!("status of {kind} {name}");
        // With the uid, a status never makes the object again after it was deleted.
        let body = json!({
            "apiVersion": K::api_version(&()), "kind": kind, "metadata": {"name": name, "uid": object.uid()},
            "status": to_value(&what, status)?,
        });
        let parameters = PatchParams::apply(managers::OPERATOR);
        let body = Patch::Apply(&body);
        let call = api.patch_status(&name, &parameters, &body);
        self.call("status", &kind, what, call).await.map(drop)
    }

    /// Changes the object by a merge patch; give the resourceVersion in it where it replaces a list.
    ///
    /// # Errors
    /// [`WriteError`].
    pub async fn merge<K>(&self, api: &Api<K>, name: &str, body: &Value) -> Result<(), WriteError>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let kind = K::kind(&());
        let parameters = PatchParams { field_manager: Some(managers::OPERATOR.to_owned()), ..PatchParams::default() };
        let body = Patch::Merge(body);
        let call = api.patch(name, &parameters, &body);
        self.call("merge", &kind, format!("{kind} {name}"), call).await.map(drop)
    }

    /// Replaces the object, which must be as it was read: its resourceVersion says so. Returns what is then there.
    ///
    /// # Errors
    /// [`WriteError`]; a conflict when somebody wrote in between.
    pub async fn replace<K>(&self, api: &Api<K>, object: &K) -> Result<K, WriteError>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + Serialize + DeserializeOwned,
    {
        let (name, kind) = (object.name_any(), K::kind(&()));
        let parameters = PostParams { field_manager: Some(managers::OPERATOR.to_owned()), ..PostParams::default() };
        let call = api.replace(&name, &parameters, object);
        self.call("replace", &kind, format!("{kind} {name}"), call).await
    }

    /// Changes the status by a strategic merge patch: in lists of Kubernetes' own kinds, one entry by its key.
    ///
    /// # Errors
    /// [`WriteError`].
    pub async fn merge_status<K>(&self, api: &Api<K>, name: &str, body: &Value) -> Result<(), WriteError>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let kind = K::kind(&());
        let parameters = PatchParams { field_manager: Some(managers::OPERATOR.to_owned()), ..PatchParams::default() };
        let body = Patch::Strategic(body);
        let call = api.patch_status(name, &parameters, &body);
        self.call("status", &kind, format!("status of {kind} {name}"), call).await.map(drop)
    }

    /// Makes an object of a kind that not every API server has.
    ///
    /// # Errors
    /// [`WriteError`].
    pub async fn apply_dynamic(
        &self,
        api: &Api<DynamicObject>,
        kind: &ApiResource,
        name: &str,
        body: &Value,
    ) -> Result<(), WriteError> {
        let parameters = PatchParams::apply(managers::OPERATOR);
        let body = Patch::Apply(body);
        let call = api.patch(name, &parameters, &body);
        self.call("apply", &kind.kind, format!("{} {name}", kind.kind), call).await.map(drop)
    }

    /// Deletes an object of a kind that not every API server has; one that is gone already is no error.
    ///
    /// # Errors
    /// [`WriteError`].
    pub async fn delete_dynamic(
        &self,
        api: &Api<DynamicObject>,
        kind: &ApiResource,
        live: &DynamicObject,
    ) -> Result<(), WriteError> {
        let name = live.name_any();
        let preconditions = Preconditions { uid: live.uid(), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        let call = api.delete(&name, &parameters);
        match self.call("delete", &kind.kind, format!("{} {name}", kind.kind), call).await {
            Err(WriteError::Api { source, .. }) if matches!(&*source, kube::Error::Api(s) if s.code == 404) => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// Deletes exactly the object `live`; one that is gone already is no error. What it owns goes with it.
    ///
    /// # Errors
    /// [`WriteError`].
    pub async fn delete<K>(&self, api: &Api<K>, live: &K) -> Result<(), WriteError>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let (name, kind) = (live.name_any(), K::kind(&()));
        let preconditions = Preconditions { uid: live.uid(), resource_version: None };
        let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::background() };
        let call = api.delete(&name, &parameters);
        match self.call("delete", &kind, format!("{kind} {name}"), call).await {
            Err(WriteError::Api { source, .. }) if matches!(&*source, kube::Error::Api(s) if s.code == 404) => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    /// Tells an event about `reference`. An event that cannot be told is logged and forgotten: the status
    /// says the same.
    pub async fn tell(&self, reference: &ObjectReference, event: &Event) {
        if (self.may_write)().is_err() {
            return;
        }
        let began = self.clock.now();
        let outcome = match self.clock.timeout(CALL_LIMIT, self.recorder.publish(event, reference)).await {
            Ok(Ok(())) => "done",
            Ok(Err(error)) => {
                tracing::warn!(%error, reason = event.reason, "event not told");
                "refused"
            }
            Err(error) => {
                tracing::warn!(%error, reason = event.reason, "event not told");
                "late"
            }
        };
        self.metrics.wrote("event", "Event", outcome, self.clock.now().saturating_sub(began));
    }

    async fn call<T>(
        &self,
        verb: &'static str,
        kind: &str,
        what: String,
        call: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, WriteError> {
        (self.may_write)().map_err(|source| WriteError::Deposed { what: what.clone(), source })?;
        let began = self.clock.now();
        let (outcome, answer) = match self.clock.timeout(CALL_LIMIT, call).await {
            Ok(Ok(done)) => ("done", Ok(done)),
            Ok(Err(source)) => ("refused", Err(WriteError::Api { what, source: Box::new(source) })),
            Err(_) => ("late", Err(WriteError::Late { what, limit: CALL_LIMIT })),
        };
        self.metrics.wrote(verb, known_kind(kind), outcome, self.clock.now().saturating_sub(began));
        answer
    }
}

/// Metric labels are a fixed set.
fn known_kind(kind: &str) -> &'static str {
    const KINDS: [&str; 8] = [
        "ModelDeployment",
        "ExpertPlacement",
        "Deployment",
        "CapacityQueue",
        "AcceleratorNode",
        "Node",
        "ConfigMap",
        "DeviceTaintRule",
    ];
    KINDS.into_iter().find(|known| *known == kind).unwrap_or("other")
}

fn to_value<T: Serialize>(what: &str, object: &T) -> Result<Value, WriteError> {
    serde_json::to_value(object)
        .map_err(|source| WriteError::Api { what: what.to_owned(), source: Box::new(kube::Error::SerdeError(source)) })
}

/// Hash of a value, whatever the order of its keys: 16 hexadecimal digits.
#[must_use]
pub fn hash_of(value: &Value) -> String {
    let mut hasher = Sha256::new();
    feed(&mut hasher, value);
    hasher.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

fn feed(hasher: &mut Sha256, value: &Value) {
    match value {
        Value::Object(fields) => {
            let mut keys: Vec<_> = fields.keys().collect();
            keys.sort();
            hasher.update("{");
            for key in keys {
                hasher.update(json!(key).to_string());
                feed(hasher, &fields[key]);
            }
            hasher.update("}");
        }
        Value::Array(items) => {
            hasher.update("[");
            items.iter().for_each(|item| feed(hasher, item));
            hasher.update("]");
        }
        leaf => {
            hasher.update(leaf.to_string());
            hasher.update(",");
        }
    }
}

/// Whether everything `wanted` says is so in `live`, which may say more: defaults, other managers' fields.
fn covers(live: &Value, wanted: &Value) -> bool {
    match (live, wanted) {
        (Value::Object(live), Value::Object(wanted)) => {
            wanted.iter().all(|(key, value)| value.is_null() || live.get(key).is_some_and(|found| covers(found, value)))
        }
        (Value::Array(live), Value::Array(wanted)) => {
            live.len() == wanted.len() && live.iter().zip(wanted).all(|(live, wanted)| covers(live, wanted))
        }
        _ => live == wanted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Category;
    use berth_crds::{ModelProfile, ModelProfileSpec};
    use berth_types::Epoch;
    use http::{Request, Response};
    use kube::client::Body;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A door to an API server that answers everything with `code`, and the number of calls it got.
    fn door(code: u16, may_write: bool) -> (Writes, Arc<AtomicUsize>) {
        let calls = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&calls);
        let service = tower::service_fn(move |_: Request<Body>| {
            counter.fetch_add(1, Ordering::Relaxed);
            async move {
                if code == 0 {
                    return Err(std::io::Error::other("connection refused"));
                }
                let status = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code,
                                    "reason": "Played", "message": "played"});
                Ok(Response::builder().status(code).body(Body::from(status.to_string().into_bytes())).unwrap())
            }
        });
        let client = Client::new(service, "default");
        let may_write: MayWrite = Arc::new(move || if may_write { Ok(()) } else { Err(Deposed { epoch: Epoch(1) }) });
        (Writes::new(client, Clock::real(), OperatorMetrics::default(), may_write, None), calls)
    }

    fn profile() -> ModelProfile {
        let spec: ModelProfileSpec = crate::fleet::tests::profile();
        ModelProfile::new("v3-tiny", spec)
    }

    #[tokio::test]
    async fn each_refusal_has_its_category() {
        for (code, expected) in [
            (409, Category::Conflict),
            (422, Category::Invalid),
            (503, Category::Transient),
            (429, Category::Transient),
            (0, Category::Transient),
        ] {
            let (writes, calls) = door(code, true);
            let error = writes.apply(&writes.everywhere(), &profile(), None).await.unwrap_err();
            assert_eq!(error.category(), expected, "{code}: {error}");
            assert_eq!(calls.load(Ordering::Relaxed), 1, "nothing is retried behind the caller's back");
        }
    }

    #[tokio::test]
    async fn a_deposed_leader_calls_nobody() {
        let (writes, calls) = door(200, false);
        let error = writes.apply(&writes.everywhere(), &profile(), None).await.unwrap_err();
        assert!(matches!(error, WriteError::Deposed { .. }));
        writes.delete(&writes.everywhere(), &profile()).await.unwrap_err();
        assert_eq!(calls.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn what_is_so_already_is_not_written_and_what_is_gone_is_deleted() {
        let (writes, calls) = door(404, true);
        let hash = hash_of(&serde_json::to_value(profile()).unwrap());
        let mut live = profile();
        live.metadata.annotations = Some([(ANNOTATION_APPLIED.to_owned(), hash)].into());
        live.metadata.uid = Some("u".to_owned());
        let live = Arc::new(live);
        let kept = writes.apply(&writes.everywhere(), &profile(), Some(&live)).await.unwrap();
        assert_eq!((kept.metadata.uid.as_deref(), calls.load(Ordering::Relaxed)), (Some("u"), 0));
        writes.delete(&writes.everywhere(), live.as_ref()).await.unwrap();
        assert_eq!(calls.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn defaults_of_the_server_are_no_change_but_a_drifted_field_is() {
        let wanted = json!({"spec": {"replicas": 1, "list": [{"name": "a"}]}});
        let live = json!({"spec": {"replicas": 1, "list": [{"name": "a", "port": 1}], "more": true}, "status": {}});
        assert!(covers(&live, &wanted));
        assert!(!covers(&json!({"spec": {"replicas": 2, "list": [{"name": "a"}]}}), &wanted));
        assert!(!covers(&json!({"spec": {"replicas": 1, "list": []}}), &wanted));
    }

    #[test]
    fn hashes_do_not_depend_on_the_order_of_keys() {
        assert_eq!(hash_of(&json!({"a": 1, "b": 2})), hash_of(&json!({"b": 2, "a": 1})));
        assert_ne!(hash_of(&json!({"a": 1})), hash_of(&json!({"a": 2})));
    }
}
