//! What all nodes of a process kubelet share, and the one watch that hands each pod to its own task. Pods of
//! nodes that are not ours are never touched.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::TryStreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::events::Recorder;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use super::KubeletConfig;
use super::node::Node;
use super::pod::{PodContext, Wanted, has_ended};
use crate::address::AddressPool;
use crate::{ClusterTool, Error, Result};

/// The shared parts.
pub(super) struct Kubelet {
    pub client: Client,
    pub config: KubeletConfig,
    pub tool: ClusterTool,
    /// Host and port of the API server, for the pods.
    pub apiserver: (String, String),
    pub addresses: Arc<AddressPool>,
    pub dir: PathBuf,
    pub nodes: BTreeMap<String, Arc<Node>>,
    pub recorder: Recorder,
    /// Every task of every pod.
    pub tasks: TaskTracker,
    pub pods: Mutex<Pods>,
}

/// Pods by uid.
#[derive(Default)]
pub(super) struct Pods {
    /// As the API has them, on our nodes.
    seen: BTreeMap<String, Arc<Pod>>,
    served: BTreeMap<String, Served>,
}

/// A pod that a task serves.
struct Served {
    wanted: watch::Sender<Wanted>,
    context: Arc<PodContext>,
}

impl std::fmt::Debug for Kubelet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kubelet").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl Kubelet {
    /// Serves pods for ever.
    pub(super) async fn follow_pods(self: Arc<Self>) {
        let api: Api<Pod> = Api::all(self.client.clone());
        let config = watcher::Config::default().fields("spec.nodeName!=");
        let mut events = Box::pin(watcher(api, config).default_backoff());
        let mut listed: Option<Vec<String>> = None;
        loop {
            match events.try_next().await {
                Ok(None) => return,
                // The watch goes on by itself after its back-off.
                Err(error) => tracing::debug!(%error, "watch of pods"),
                Ok(Some(watcher::Event::Init)) => listed = Some(Vec::new()),
                Ok(Some(watcher::Event::InitApply(pod))) => {
                    listed.get_or_insert_default().extend(pod.metadata.uid.clone());
                    self.see(pod);
                }
                Ok(Some(watcher::Event::InitDone)) => self.forget_all_but(&listed.take().unwrap_or_default()),
                Ok(Some(watcher::Event::Apply(pod))) => self.see(pod),
                Ok(Some(watcher::Event::Delete(pod))) => self.forget(&pod.metadata.uid.unwrap_or_default()),
            }
        }
    }

    /// Takes note of a pod and sees that it is served.
    fn see(self: &Arc<Self>, pod: Pod) {
        let name = pod.spec.as_ref().and_then(|s| s.node_name.clone()).unwrap_or_default();
        let (Some(node), Some(uid)) = (self.nodes.get(&name), pod.metadata.uid.clone()) else { return };
        let pod = Arc::new(pod);
        let mut pods = self.pods();
        pods.seen.insert(uid.clone(), Arc::clone(&pod));
        self.serve(&mut pods, node, uid, pod);
    }

    fn serve(self: &Arc<Self>, pods: &mut Pods, node: &Arc<Node>, uid: String, pod: Arc<Pod>) {
        if !*node.powered.borrow() {
            return;
        }
        if let Some(served) = pods.served.get(&uid) {
            served.wanted.send_replace(Wanted::Present(pod));
            return;
        }
        if has_ended(&pod) && pod.metadata.deletion_timestamp.is_none() {
            return;
        }
        let (wanted, orders) = watch::channel(Wanted::Present(Arc::clone(&pod)));
        let context = match PodContext::new(self, node, pod, orders) {
            Ok(context) => Arc::new(context),
            Err(error) => {
                tracing::error!(%error, uid, "pod not served");
                return;
            }
        };
        pods.served.insert(uid.clone(), Served { wanted, context: Arc::clone(&context) });
        let kubelet = Arc::clone(self);
        self.tasks.spawn(async move {
            Arc::clone(&context).live().await;
            let mut pods = kubelet.pods();
            if pods.served.get(&uid).is_some_and(|s| Arc::ptr_eq(&s.context, &context)) {
                pods.served.remove(&uid);
            }
        });
    }

    fn forget(&self, uid: &str) {
        let mut pods = self.pods();
        pods.seen.remove(uid);
        if let Some(served) = pods.served.get(uid) {
            served.wanted.send_replace(Wanted::Gone);
        }
    }

    /// A watch that starts anew lists what there is: the rest went while it was not looking.
    fn forget_all_but(&self, listed: &[String]) {
        let gone: Vec<String> = self.pods().seen.keys().filter(|uid| !listed.contains(uid)).cloned().collect();
        gone.iter().for_each(|uid| self.forget(uid));
    }

    /// Ends every process of a node (of all with `None`) without a word to the API.
    pub(super) fn darken(&self, node: Option<&str>) {
        let mut pods = self.pods();
        let dark = |served: &Served| node.is_none_or(|n| n == served.context.node.wanted.name);
        let gone: Vec<String> = pods.served.iter().filter(|(_, s)| dark(s)).map(|(uid, _)| uid.clone()).collect();
        for served in gone.iter().filter_map(|uid| pods.served.remove(uid)) {
            served.wanted.send_replace(Wanted::Dark);
        }
    }

    /// Serves the pods of a node again, as a machine that has booted.
    pub(super) fn light(self: &Arc<Self>, node: &Arc<Node>) {
        let mut pods = self.pods();
        let on_it = |pod: &Pod| pod.spec.as_ref().and_then(|s| s.node_name.as_ref()) == Some(&node.wanted.name);
        let bound: Vec<_> = pods.seen.iter().filter(|(_, p)| on_it(p)).map(|(u, p)| (u.clone(), p.clone())).collect();
        for (uid, pod) in bound {
            self.serve(&mut pods, node, uid, pod);
        }
    }

    /// The pid of a running container's first process.
    pub(super) fn container_pid(&self, namespace: &str, pod: &str, container: &str) -> Result<i32> {
        let pods = self.pods();
        let named = |s: &&Served| s.context.bound.namespace == namespace && s.context.bound.name == pod;
        let facts = pods.served.values().filter(named).map(|s| s.context.facts.borrow().clone());
        let pids = facts.flat_map(|f| f.main.into_iter().chain(f.init)).filter(|c| c.name == container);
        let running = pids.filter_map(|c| c.pid).next();
        running
            .ok_or_else(|| Error::Unknown { what: "running container", name: format!("{namespace}/{pod}/{container}") })
    }

    /// Every running container as (namespace, pod, container, pid).
    pub(super) fn running(&self) -> Vec<(String, String, String, i32)> {
        let pods = self.pods();
        let of_pod = |s: &Served| {
            let (bound, facts) = (s.context.bound.clone(), s.context.facts.borrow().clone());
            let containers = facts.init.into_iter().chain(facts.main);
            containers
                .filter_map(move |c| Some((bound.namespace.clone(), bound.name.clone(), c.name, c.pid?)))
                .collect::<Vec<_>>()
        };
        pods.served.values().flat_map(of_pod).collect()
    }

    /// Where a pod's logs are: a file for each container.
    pub(super) fn pod_logs(&self, namespace: &str, pod: &str) -> PathBuf {
        self.dir.join("pods").join(format!("{namespace}_{pod}"))
    }

    fn pods(&self) -> MutexGuard<'_, Pods> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
