//! One pod of a simulated node from its binding to its removal: volumes, init containers in order, containers,
//! status, termination within its grace, final deletion. It obeys what the API says last; a pod that is gone
//! from the API is never written to.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::events::{Event, EventType};
use tokio::sync::{Mutex, watch};

use super::container::{ContainerLife, Place};
use super::kubelet::Kubelet;
use super::node::Node;
use super::payload::{BoundPod, Lookup, within};
use super::status::{Addresses, ContainerFacts, PodFacts, State, pod_status, restart_policy};
use super::volumes::{HostFiles, Volumes};
use crate::address::Address;

/// What is to become of a pod.
#[derive(Debug, Clone)]
pub(super) enum Wanted {
    /// The API has it, like this.
    Present(Arc<Pod>),
    /// The API has it no more.
    Gone,
    /// Its node has no power: its processes end, and nobody tells the API.
    Dark,
}

/// What a container is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    No,
    /// Ask it to end, kill it after so long.
    Within(Duration),
    /// Kill it.
    Now,
}

impl Stop {
    pub(super) fn grace(self) -> Duration {
        match self {
            Self::Within(grace) => grace,
            Self::No | Self::Now => Duration::ZERO,
        }
    }
}

/// The status written last, and the version of the pod that has it.
struct Written {
    status: PodStatus,
    version: Option<u64>,
}

impl Written {
    /// True if the API still has our conditions, as far as we have heard. Others write them too: the node
    /// lifecycle controller does when a node is silent.
    fn still_holds(&self, pod: &Pod) -> bool {
        if version(pod) <= self.version {
            return true;
        }
        let theirs = pod.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
        let ours = self.status.conditions.as_deref().unwrap_or_default();
        ours.iter().all(|c| theirs.iter().any(|t| t.type_ == c.type_ && t.status == c.status))
    }
}

/// Versions of one kind of object are numbers that rise.
fn version(pod: &Pod) -> Option<u64> {
    pod.metadata.resource_version.as_ref()?.parse().ok()
}

/// What everything that serves one pod shares.
pub(super) struct PodContext {
    pub kubelet: Arc<Kubelet>,
    pub node: Arc<Node>,
    pub bound: BoundPod,
    pub addresses: Addresses,
    pub lookup: Lookup,
    pub volumes: Mutex<Volumes>,
    pub facts: watch::Sender<PodFacts>,
    pub work: PathBuf,
    logs: PathBuf,
    wanted: watch::Receiver<Wanted>,
    first: Arc<Pod>,
    written: Mutex<Option<Written>>,
    _address: Option<Address>,
}

impl PodContext {
    /// Takes an address and the folders for a pod.
    pub(super) fn new(
        kubelet: &Arc<Kubelet>,
        node: &Arc<Node>,
        pod: Arc<Pod>,
        wanted: watch::Receiver<Wanted>,
    ) -> crate::Result<Self> {
        let meta = &pod.metadata;
        let spec = pod.spec.clone().unwrap_or_default();
        let bound = BoundPod {
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
            service_account: spec.service_account_name.unwrap_or_else(|| "default".into()),
        };
        let address = if spec.host_network == Some(true) { None } else { Some(kubelet.addresses.take()?) };
        let host = node.ip().to_string();
        let ip = address.as_ref().map_or_else(|| host.clone(), |a| a.ip().to_string());
        let work = kubelet.dir.join("work").join(&bound.uid);
        let logs = kubelet.pod_logs(&bound.namespace, &bound.name);
        for dir in [&work, &logs] {
            std::fs::create_dir_all(dir).map_err(crate::Error::file("create", dir))?;
        }
        Ok(Self {
            lookup: Lookup::new(kubelet.client.clone(), bound.clone()),
            volumes: Mutex::new(Volumes::new(work.join("volumes"))),
            facts: watch::Sender::new(first_facts(&pod)),
            addresses: Addresses { pod: ip, host },
            kubelet: Arc::clone(kubelet),
            node: Arc::clone(node),
            first: pod,
            written: Mutex::default(),
            _address: address,
            bound,
            work,
            logs,
            wanted,
        })
    }

    /// The pod as the API had it last.
    pub(super) fn pod(&self) -> Arc<Pod> {
        match &*self.wanted.borrow() {
            Wanted::Present(pod) => Arc::clone(pod),
            Wanted::Gone | Wanted::Dark => Arc::clone(&self.first),
        }
    }

    pub(super) fn restart_policy(&self) -> &str {
        restart_policy(&self.first)
    }

    /// The pod's own grace, for what the kubelet itself ends.
    pub(super) fn grace(&self) -> Duration {
        let seconds = self.first.spec.as_ref().and_then(|s| s.termination_grace_period_seconds).unwrap_or(30);
        Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
    }

    /// The log of one of its containers, over all its runs.
    pub(super) fn log(&self, container: &str) -> PathBuf {
        self.logs.join(format!("{container}.log"))
    }

    /// Changes the facts of one container; the status follows.
    pub(super) fn update(&self, place: Place, change: impl FnOnce(&mut ContainerFacts)) {
        self.facts.send_modify(|facts| {
            change(match place {
                Place::Init(i) => &mut facts.init[i],
                Place::Main(i) => &mut facts.main[i],
            });
        });
    }

    /// Tells whoever looks at the pod's events; nothing waits for it.
    pub(super) fn warn(&self, reason: &str, note: &str) {
        let event = Event {
            type_: EventType::Warning,
            reason: reason.into(),
            note: Some(note.chars().take(1000).collect()),
            action: reason.into(),
            secondary: None,
        };
        let reference = kube::Resource::object_ref(&*self.first, &());
        let kubelet = Arc::clone(&self.kubelet);
        self.kubelet.tasks.spawn(async move {
            if let Err(why) = within(kubelet.recorder.publish(&event, &reference)).await {
                tracing::debug!(why, "event not written");
            }
        });
    }

    /// Serves the pod until the API has it no more, or its node goes dark.
    pub(super) async fn live(self: Arc<Self>) {
        let (stop, stopped) = watch::channel(Stop::No);
        let life = async {
            if !has_ended(&self.first) && !is_deleted(&self.first) {
                self.run_containers(stopped).await;
            }
            self.write_status().await;
            let mut wanted = self.wanted.clone();
            let leaves = |w: &Wanted| !matches!(w, Wanted::Present(pod) if !is_deleted(pod));
            // A closed channel is a kubelet that goes away.
            let _ = wanted.wait_for(leaves).await;
            self.remove().await;
        };
        tokio::select! {
            // The others only serve it, and never end before it.
            () = life => {}
            () = self.follow_orders(stop) => {}
            () = self.write_statuses() => {}
        }
        if let Err(error) = std::fs::remove_dir_all(&self.work) {
            tracing::debug!(%error, pod = self.bound.name, "work folder not removed");
        }
    }

    /// Turns what is wanted of the pod into what its containers are to do.
    async fn follow_orders(&self, stop: watch::Sender<Stop>) {
        let mut wanted = self.wanted.clone();
        loop {
            let order = match &*wanted.borrow_and_update() {
                Wanted::Present(pod) if is_deleted(pod) => {
                    let seconds = pod.metadata.deletion_grace_period_seconds.unwrap_or(30);
                    Stop::Within(Duration::from_secs(u64::try_from(seconds).unwrap_or(0)))
                }
                Wanted::Present(_) => Stop::No,
                Wanted::Gone | Wanted::Dark => Stop::Now,
            };
            stop.send_if_modified(|s| std::mem::replace(s, order) != order);
            if wanted.changed().await.is_err() {
                stop.send_replace(Stop::Now);
                return std::future::pending().await;
            }
        }
    }

    async fn run_containers(self: &Arc<Self>, mut stop: watch::Receiver<Stop>) {
        tokio::select! {
            // Half a volume is written again with the next try, or removed with the pod.
            () = self.prepare_volumes() => {}
            _ = stop.wait_for(|s| *s != Stop::No) => return,
        }
        let spec = self.first.spec.clone().unwrap_or_default();
        let life = |container, place| ContainerLife { context: Arc::clone(self), container, place, stop: stop.clone() };
        let containers = async {
            for (i, container) in spec.init_containers.into_iter().flatten().enumerate() {
                if !life(container, Place::Init(i)).run().await {
                    return;
                }
            }
            let main = spec.containers.into_iter().enumerate();
            futures::future::join_all(main.map(|(i, c)| life(c, Place::Main(i)).run())).await;
        };
        tokio::select! {
            // Volumes serve the containers; a half refresh is one version of a folder too many.
            () = containers => {}
            () = self.refresh_volumes() => {}
        }
    }

    async fn prepare_volumes(&self) {
        loop {
            let (pod, host) = (self.pod(), self.host_files());
            let made = self.volumes.lock().await.prepare(&pod, &self.addresses, &host, &self.lookup).await;
            match made {
                Ok(()) => break,
                Err(why) => self.warn("FailedMount", &why),
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        self.facts.send_modify(|facts| facts.prepared = true);
    }

    async fn refresh_volumes(&self) {
        loop {
            tokio::time::sleep(self.kubelet.config.volume_refresh).await;
            let (pod, host) = (self.pod(), self.host_files());
            let made = self.volumes.lock().await.prepare(&pod, &self.addresses, &host, &self.lookup).await;
            if let Err(why) = made {
                self.warn("FailedMount", &why);
            }
        }
    }

    fn host_files(&self) -> HostFiles {
        let wanted = &self.node.wanted;
        HostFiles { root: self.kubelet.dir.join("nodes").join(&wanted.name), remapped: wanted.host_paths.clone() }
    }

    /// Writes every change of the facts as it comes; a burst becomes one write.
    async fn write_statuses(&self) {
        let mut facts = self.facts.subscribe();
        let mut wanted = self.wanted.clone();
        let mut reachable = self.node.reachable.subscribe();
        facts.mark_changed();
        loop {
            tokio::select! {
                // All only mark what was seen.
                _ = facts.changed() => {}
                _ = reachable.changed() => {}
                changed = wanted.changed() => if changed.is_err() { return std::future::pending().await },
            }
            self.write_status().await;
        }
    }

    /// Brings the status in the API up to the facts; tries again until it is, or the pod is gone, or its node
    /// does not reach the API.
    async fn write_status(&self) {
        let api: Api<Pod> = Api::namespaced(self.kubelet.client.clone(), &self.bound.namespace);
        loop {
            let Wanted::Present(pod) = self.wanted.borrow().clone() else { return };
            if !*self.node.reachable.borrow() {
                return;
            }
            let mut written = self.written.lock().await;
            let facts = self.facts.borrow().clone();
            let before = written.as_ref().map(|w| &w.status);
            let status = pod_status(&pod, &facts, &self.addresses, before, Timestamp::now());
            if written.as_ref().is_some_and(|w| w.status == status && w.still_holds(&pod)) {
                return;
            }
            let patch = Patch::Strategic(self.status_patch(&status));
            let params = PatchParams::default();
            let asked = api.patch_status(&self.bound.name, &params, &patch);
            match tokio::time::timeout(Duration::from_secs(10), asked).await {
                Ok(Ok(answer)) => {
                    *written = Some(Written { status, version: version(&answer) });
                    return;
                }
                Ok(Err(kube::Error::Api(answer))) if matches!(answer.code, 404 | 409 | 422) => {
                    tracing::warn!(pod = self.bound.name, why = answer.message, "status refused");
                    return;
                }
                Ok(Err(error)) => tracing::debug!(%error, pod = self.bound.name, "status not written"),
                Err(_) => tracing::debug!(pod = self.bound.name, "status not written in time"),
            }
            drop(written);
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    fn status_patch(&self, status: &PodStatus) -> serde_json::Value {
        // The uid keeps this from a later pod of the same name.
        let mut patch = serde_json::json!({ "metadata": { "uid": self.bound.uid }, "status": status });
        for list in ["podIPs", "hostIPs"] {
            // A patch adds to a list whose elements have a key, unless it says otherwise.
            if let Some(addresses) = patch["status"][list].as_array_mut() {
                addresses.push(serde_json::json!({ "$patch": "replace" }));
            }
        }
        patch
    }

    /// Tells the API that the processes of a deleted pod are gone.
    async fn remove(&self) {
        let api: Api<Pod> = Api::namespaced(self.kubelet.client.clone(), &self.bound.namespace);
        let uid = Some(self.bound.uid.clone());
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid, resource_version: None }),
            ..DeleteParams::default()
        };
        let mut reachable = self.node.reachable.subscribe();
        while matches!(&*self.wanted.borrow(), Wanted::Present(_)) && reachable.wait_for(|r| *r).await.is_ok() {
            match tokio::time::timeout(Duration::from_secs(10), api.delete(&self.bound.name, &params)).await {
                Ok(Ok(_)) => return,
                Ok(Err(kube::Error::Api(answer))) if matches!(answer.code, 404 | 409) => return,
                _ => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }
}

/// What is known of a pod that was just bound, or that an earlier kubelet ran.
fn first_facts(pod: &Pod) -> PodFacts {
    let spec = pod.spec.clone().unwrap_or_default();
    let status = pod.status.clone().unwrap_or_default();
    let earlier: Vec<_> =
        status.init_container_statuses.into_iter().chain(status.container_statuses).flatten().collect();
    let has_init = spec.init_containers.as_ref().is_some_and(|c| !c.is_empty());
    let facts = |container: k8s_openapi::api::core::v1::Container| {
        let before = earlier.iter().find(|s| s.name == container.name && s.container_id.is_some());
        let restarts = before.map_or(0, |s| s.restart_count + 1);
        ContainerFacts::new(&container.name, container.image.as_deref().unwrap_or_default(), restarts)
    };
    let init: Vec<_> = spec.init_containers.into_iter().flatten().map(facts).collect();
    let mut main: Vec<_> = spec.containers.into_iter().map(facts).collect();
    if has_init {
        main.iter_mut().for_each(|c| c.state = State::waiting("PodInitializing"));
    }
    let start_time = status.start_time.map_or_else(Timestamp::now, |t| t.0);
    PodFacts { init, main, prepared: false, start_time }
}

fn is_deleted(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Its phase is a last one.
pub(super) fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}
