//! The cluster as the commands for people see it: connects as kubectl does, lists objects with a deadline, and
//! says what to do when it cannot. It writes nothing and judges nothing.

use std::{fmt::Debug, path::PathBuf, time::Duration};

use anyhow::{Context, anyhow};
use berth_crds::{ExpertPlacement, PlacementMap};
use berth_runtime::Clock;
use berth_scheduler::store::{Etcd, StoreConfig};
use berth_types::{PlacementName, Revision};
use clap::Args;
use k8s_openapi::{ClusterResourceScope, NamespaceResourceScope, api::core::v1::Pod};
use kube::{
    Api, Client, Config, Resource, ResourceExt,
    api::{GetParams, ListParams, Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::de::DeserializeOwned;

use crate::{table::Output, verdict::NotAuthorised};

/// Longest wait for one answer.
const LIMIT: Duration = Duration::from_secs(10);
/// Times that an object is read and written while others write it too.
const TRIES: u32 = 5;
/// HTTP's answer to a write of what was changed meanwhile.
const CONFLICT: u16 = 409;
/// Objects in one answer.
const PAGE: u32 = 500;

/// Which cluster, which namespace, and how to write what is found.
#[derive(Debug, Args)]
pub(crate) struct ClusterArgs {
    /// Kubeconfig file; by default as kubectl finds it.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig.
    #[arg(long)]
    context: Option<String>,
    /// Namespace; by default the context's.
    #[arg(short, long, conflicts_with = "all_namespaces")]
    namespace: Option<String>,
    /// All namespaces.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Tables for people, or one document for programs.
    #[arg(short, long, value_enum, default_value_t)]
    pub(crate) output: Output,
}

impl ClusterArgs {
    /// Of all namespaces, for a command that writes in its own way.
    pub(crate) fn of(kubeconfig: Option<PathBuf>, context: Option<String>) -> Self {
        Self { kubeconfig, context, namespace: None, all_namespaces: true, output: Output::default() }
    }
}

/// A connection.
pub(crate) struct Cluster {
    client: Client,
    clock: Clock,
    url: String,
    /// `None` = all.
    pub(crate) namespace: Option<String>,
}

impl Cluster {
    /// Connects as the flags say.
    pub(crate) async fn connect(args: &ClusterArgs) -> anyhow::Result<Self> {
        let options = KubeConfigOptions { context: args.context.clone(), ..KubeConfigOptions::default() };
        let config = match &args.kubeconfig {
            Some(path) => {
                let file = Kubeconfig::read_from(path).with_context(|| format!("--kubeconfig {}", path.display()))?;
                Config::from_custom_kubeconfig(file, &options).await.map_err(anyhow::Error::from)
            }
            None if args.context.is_some() => Config::from_kubeconfig(&options).await.map_err(anyhow::Error::from),
            None => Config::infer().await.map_err(anyhow::Error::from),
        };
        // The error's text holds its causes already.
        let config = config
            .map_err(|error| anyhow!("no cluster: set KUBECONFIG, or give --kubeconfig or --context ({error})"))?;
        let namespace = match &args.namespace {
            _ if args.all_namespaces => None,
            Some(namespace) => Some(namespace.clone()),
            None => Some(config.default_namespace.clone()),
        };
        let url = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        let client = Client::try_from(config).with_context(|| format!("connecting to {url}"))?;
        Ok(Self { client, clock: Clock::real(), url, namespace })
    }

    /// The time, seconds since 1970.
    pub(crate) fn now(&self) -> i64 {
        i64::try_from(self.clock.unix_ms() / 1000).unwrap_or(i64::MAX)
    }

    /// The time, milliseconds since 1970.
    pub(crate) fn now_ms(&self) -> u64 {
        self.clock.unix_ms()
    }

    /// One object of a kind that belongs to the whole cluster.
    pub(crate) async fn get<K>(&self, name: &str) -> anyhow::Result<K>
    where
        K: Resource<Scope = ClusterResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let found = self.call::<K, _>("get", Api::all(self.client.clone()).get_opt(name)).await?;
        found.ok_or_else(|| anyhow!("there is no {} {name:?}", K::plural(&())))
    }

    /// Sets one annotation of an object to what `say` makes of it. When somebody writes in between it is read and said
    /// anew, so that two people never undo each other's word.
    pub(crate) async fn annotate<K>(
        &self,
        name: &str,
        key: &str,
        say: impl Fn(&K) -> anyhow::Result<String>,
    ) -> anyhow::Result<()>
    where
        K: Resource<Scope = ClusterResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let api: Api<K> = Api::all(self.client.clone());
        for left in (0..TRIES).rev() {
            let object = self.get::<K>(name).await?;
            let version = object.meta().resource_version.as_deref().context("an object without a version")?;
            let value = say(&object)?;
            let patch = serde_json::json!({"metadata": {"resourceVersion": version, "annotations": {key: value}}});
            let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
            let write = async {
                match api.patch(name, &params, &patch).await {
                    Err(kube::Error::Api(status)) if status.code == CONFLICT && left > 0 => Ok(false),
                    written => written.map(|_| true),
                }
            };
            if self.call::<K, _>("patch", write).await? {
                break;
            }
        }
        Ok(())
    }

    /// What the agent of `node` answers on `page` of its admin port, asked through the API server.
    pub(crate) async fn ask_agent(&self, node: &str, page: &str) -> anyhow::Result<String> {
        let params = ListParams::default().labels("berth.dev/component=agent").fields(&format!("spec.nodeName={node}"));
        let pods = self.call::<Pod, _>("list", Api::<Pod>::all(self.client.clone()).list(&params)).await?;
        let pod = pods.items.first().ok_or_else(|| {
            anyhow!("no agent runs on {node:?}: see kubectl get pods -A -l berth.dev/component=agent -o wide")
        })?;
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let ports = pod.spec.iter().flat_map(|spec| &spec.containers).flat_map(|of| of.ports.iter().flatten());
        let port = ports.into_iter().find(|port| port.name.as_deref() == Some("admin"));
        let port = port.map(|port| port.container_port).context("the agent's pod names no port `admin`")?;
        let pods = kube::core::Request::new(format!("/api/v1/namespaces/{namespace}/pods"));
        let request = pods.get(&format!("{name}:{port}/proxy/{page}"), &GetParams::default())?;
        self.call::<Pod, _>("proxy to", self.client.request_text(request)).await
    }

    /// The objects of a kind in the chosen namespaces.
    pub(crate) async fn list<K>(&self) -> anyhow::Result<Vec<K>>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let api = match &self.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        };
        self.pages(&api).await
    }

    /// The objects of a kind that belongs to the whole cluster.
    pub(crate) async fn list_all<K>(&self) -> anyhow::Result<Vec<K>>
    where
        K: Resource<Scope = ClusterResourceScope, DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        self.pages(&Api::all(self.client.clone())).await
    }

    async fn pages<K>(&self, api: &Api<K>) -> anyhow::Result<Vec<K>>
    where
        K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned,
    {
        let mut params = ListParams::default().limit(PAGE);
        let mut found = Vec::new();
        loop {
            let page = self.call::<K, _>("list", api.list(&params)).await?;
            found.extend(page.items);
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params = params.continue_token(&token),
                None => return Ok(found),
            }
        }
    }

    async fn call<K, T>(&self, verb: &str, call: impl Future<Output = Result<T, kube::Error>>) -> anyhow::Result<T>
    where
        K: Resource<DynamicType = ()>,
    {
        let (plural, group) = (K::plural(&()), K::group(&()));
        let kind = if group.is_empty() { plural.into_owned() } else { format!("{plural}.{group}") };
        match self.clock.timeout(LIMIT, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(explain(verb, &kind, &self.url, error)),
            Err(_) => Err(anyhow!("{}: no answer within {LIMIT:?}: is the API server well?", self.url)),
        }
    }

    /// The map of a revision: from the API server, else from etcd where `store` says how to reach it.
    pub(crate) async fn map(
        &self,
        placement: &ExpertPlacement,
        revision: Revision,
        etcd: Option<&Etcd>,
    ) -> anyhow::Result<Option<PlacementMap>> {
        let name = name_of(placement)?;
        let uid = placement.metadata.uid.clone().unwrap_or_default();
        let api: Api<PlacementMap> = Api::namespaced(self.client.clone(), name.namespace());
        let object = format!("{}-{revision}", name.name());
        let found = self.call::<PlacementMap, _>("get", api.get_opt(&object)).await?;
        // A map of that name may be left of another placement.
        let own = found.filter(|map| map.owner_references().iter().all(|owner| owner.uid == uid));
        match (own, etcd) {
            (None, Some(etcd)) => Ok(etcd.map(&name, &uid, revision).await?),
            (own, _) => Ok(own),
        }
    }

    /// etcd, if the flags name it.
    pub(crate) fn etcd(&self, store: StoreConfig) -> Option<Etcd> {
        store.etcd.map(|config| Etcd::new(config, self.clock.clone()))
    }
}

/// Namespace and name of a placement's object.
pub(crate) fn name_of(placement: &ExpertPlacement) -> anyhow::Result<PlacementName> {
    Ok(PlacementName::new(&placement.namespace().unwrap_or_default(), &placement.name_any())?)
}

/// What an answer of the API server means for whoever asked, and what to do.
fn explain(verb: &str, kind: &str, url: &str, error: kube::Error) -> anyhow::Error {
    let refused = |remedy: String| NotAuthorised { what: format!("{verb} {kind}"), remedy }.into();
    match error {
        kube::Error::Api(status) if status.code == 401 => {
            refused(format!("{url} does not know you: log in again, or choose another --context"))
        }
        kube::Error::Api(status) if status.code == 403 => refused(format!(
            "{}: ask for get and list on {kind}, and see kubectl auth can-i {verb} {kind}",
            status.message
        )),
        kube::Error::Api(status) if status.code == 404 && verb == "list" => anyhow!(
            "{url} knows no {kind}: install Berth first (helm install berth charts/berth), or choose another --context"
        ),
        kube::Error::Api(status) => anyhow!("{verb} {kind}: {}", status.message),
        other => anyhow::Error::from(other).context(format!("{url} does not answer: is it the right --context?")),
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    fn said(code: u16) -> anyhow::Error {
        let status = Status { code, message: "the reason".to_owned(), ..Status::default() };
        explain("list", "modeldeployments.berth.dev", "https://k:6443", kube::Error::Api(Box::new(status)))
    }

    #[test]
    fn every_refusal_says_what_to_do() {
        for (code, remedy) in [
            (401, "log in again"),
            (403, "kubectl auth can-i list modeldeployments.berth.dev"),
            (404, "helm install berth"),
            (500, "the reason"),
        ] {
            let error = said(code);
            assert!(format!("{error:#}").contains(remedy), "{code}: {error:#}");
            assert_eq!(error.is::<NotAuthorised>(), [401, 403].contains(&code), "{code}");
        }
    }
}
