//! The cluster as the commands for people see it: connects as kubectl does, lists objects with a deadline, and
//! says what to do when it cannot. It writes nothing and judges nothing.

use std::{fmt::Debug, path::PathBuf, time::Duration};

use anyhow::{Context, anyhow};
use berth_crds::{ExpertPlacement, PlacementMap};
use berth_runtime::Clock;
use berth_scheduler::store::{Etcd, StoreConfig};
use berth_types::{PlacementName, Revision};
use clap::Args;
use k8s_openapi::{ClusterResourceScope, NamespaceResourceScope};
use kube::{
    Api, Client, Config, Resource, ResourceExt,
    api::ListParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::de::DeserializeOwned;

use crate::{table::Output, verdict::NotAuthorised};

/// Longest wait for one answer.
const LIMIT: Duration = Duration::from_secs(10);
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
        let kind = format!("{}.{}", K::plural(&()), K::group(&()));
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
