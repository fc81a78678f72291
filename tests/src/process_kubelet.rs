//! Registers simulated nodes and runs the pods bound to them as local processes, in mount and process
//! namespaces of their own: an image is a binary of this machine, each pod has its own address of 127.0.0.0/8,
//! and what a pod mounts is where it expects it. A test tool: it uses the admin's rights, enforces no limits and
//! must never be in the chart. Needs root with CAP_SYS_ADMIN; a pod's status says so where that is missing.

mod attempt;
mod backoff;
mod container;
mod environment;
mod folder;
mod image;
mod kubelet;
mod node;
mod payload;
mod pod;
mod probe;
mod status;
mod volumes;

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use k8s_openapi::api::core::v1::Taint;
use kube::Client;
use kube::runtime::events::{Recorder, Reporter};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use backoff::Backoff;
use kubelet::Kubelet;
use node::{LOG_PORT, Node};

use crate::tied_process::TiedProcess;
use crate::{ControlPlane, Error, Result};

/// A node to pretend.
#[derive(Debug, Clone, Default)]
pub struct SimulatedNode {
    /// Its name, also its host name.
    pub name: String,
    /// Labels beside hostname, os and arch.
    pub labels: BTreeMap<String, String>,
    /// Taints it registers with.
    pub taints: Vec<Taint>,
    /// Resources beside 64 CPUs, 512Gi of memory, 1Ti of disk and 110 pods, or instead of them.
    pub capacity: BTreeMap<String, String>,
    /// Variables of every container on it; a container's own win.
    pub env: BTreeMap<String, String>,
    /// Its paths, as hostPath volumes name them, to paths of this machine; each counts for all below it.
    /// `…OrCreate` paths that are not named here are created in the node's own folder.
    pub host_paths: BTreeMap<PathBuf, PathBuf>,
}

impl SimulatedNode {
    /// A plain node.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self { name: name.into(), ..Self::default() }
    }
}

/// What a process kubelet is to do.
#[derive(Debug, Clone)]
pub struct KubeletConfig {
    /// Its nodes.
    pub nodes: Vec<SimulatedNode>,
    /// Images to binaries. A key is a whole reference (`berth:dev`), a repository, or its end after a slash
    /// (`berth`). A pod's command of that name means the binary, another command is looked up on this machine.
    pub images: BTreeMap<String, PathBuf>,
    /// Where its files go; `<control plane's folder>/kubelet` by default.
    pub dir: Option<PathBuf>,
    /// How long to wait between restarts.
    pub restart_backoff: Backoff,
    /// How often leases are renewed; 2 s by default.
    pub heartbeat: Duration,
    /// How often ConfigMap, Secret and token volumes are brought up to date; 2 s by default.
    pub volume_refresh: Duration,
}

impl Default for KubeletConfig {
    fn default() -> Self {
        Self {
            nodes: Vec::new(),
            images: BTreeMap::new(),
            dir: None,
            restart_backoff: Backoff::default(),
            heartbeat: Duration::from_secs(2),
            volume_refresh: Duration::from_secs(2),
        }
    }
}

/// A running process kubelet. When it is dropped, all its containers end; its Node objects stay.
#[derive(Debug)]
pub struct ProcessKubelet {
    kubelet: Arc<Kubelet>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
    /// Answers `kubectl logs`.
    _logs: TiedProcess,
}

/// Containers that are to end have this long before they are killed by dropping them.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

impl ProcessKubelet {
    /// Registers the nodes and starts to serve their pods, on a thread and a runtime of its own. At most one for
    /// a control plane at a time.
    ///
    /// # Errors
    /// When a node cannot be registered or a folder not made.
    pub async fn start(plane: &ControlPlane, config: KubeletConfig) -> Result<Self> {
        let stop = CancellationToken::new();
        let (tell, told) = oneshot::channel();
        let (client_config, stopped) = (client_config(plane), stop.clone());
        let seed = Seed::of(plane, config)?;
        let logs = seed.serve_logs()?;
        let thread = std::thread::Builder::new()
            .name("process-kubelet".into())
            .spawn(move || run(client_config, seed, stopped, tell))
            .map_err(|source| Error::Start { program: "process kubelet".into(), source })?;
        match told.await {
            Ok(Ok(kubelet)) => Ok(Self { kubelet, stop, thread: Some(thread), _logs: logs }),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::Unknown { what: "answer of the", name: "process kubelet's thread".into() }),
        }
    }

    /// Stops a node's heartbeats and all else it tells the API; its pods run on, as those of a node that has
    /// lost the API server, and with their own connections to it.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn stop_heartbeats(&self, node: &str) -> Result<()> {
        self.node(node)?.reachable.send_replace(false);
        Ok(())
    }

    /// Sends a node's heartbeats again, the first at once, and tells what happened meanwhile.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn resume_heartbeats(&self, node: &str) -> Result<()> {
        self.node(node)?.reachable.send_replace(true);
        Ok(())
    }

    /// Ends a node as a power cut does: all its processes die at once and the API hears nothing more of it.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn power_off(&self, node: &str) -> Result<()> {
        self.node(node)?.powered.send_replace(false);
        self.kubelet.darken(Some(node));
        Ok(())
    }

    /// Boots a node again: heartbeats, and the pods that are still bound to it start anew.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn power_on(&self, node: &str) -> Result<()> {
        let node = Arc::clone(self.node(node)?);
        node.powered.send_replace(true);
        self.kubelet.light(&node);
        Ok(())
    }

    /// The `InternalIP` of a node.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn node_ip(&self, node: &str) -> Result<Ipv4Addr> {
        Ok(self.node(node)?.ip())
    }

    /// The folder a node's `…OrCreate` hostPath volumes are made in, as if it were the node's root.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn node_root(&self, node: &str) -> Result<PathBuf> {
        Ok(self.kubelet.dir.join("nodes").join(&self.node(node)?.wanted.name))
    }

    /// The pid, on this machine, of a running container's first process.
    ///
    /// # Errors
    /// When it does not run.
    pub fn container_pid(&self, namespace: &str, pod: &str, container: &str) -> Result<i32> {
        self.kubelet.container_pid(namespace, pod, container)
    }

    /// The pids of everything in a running container, its first process first.
    ///
    /// # Errors
    /// When it does not run.
    pub fn container_pids(&self, namespace: &str, pod: &str, container: &str) -> Result<Vec<i32>> {
        let first = self.container_pid(namespace, pod, container)?;
        Ok(processes_beside(first))
    }

    /// Sends a signal to a running container's first process and returns its pid. That process is number 1 in
    /// its namespace, so that the kernel drops signals it has no handler for, but for SIGKILL and SIGSTOP.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill_pod_container(&self, namespace: &str, pod: &str, container: &str, signal: Signal) -> Result<i32> {
        let pid = self.container_pid(namespace, pod, container)?;
        kill(Pid::from_raw(pid), signal).map_err(|_| Error::Unknown {
            what: "running container",
            name: format!("{namespace}/{pod}/{container}"),
        })?;
        Ok(pid)
    }

    /// Every running container as (namespace, pod, container, pid).
    #[must_use]
    pub fn running(&self) -> Vec<(String, String, String, i32)> {
        self.kubelet.running()
    }

    /// Where a container's output goes, over all its runs and after its end.
    #[must_use]
    pub fn log_path(&self, namespace: &str, pod: &str, container: &str) -> PathBuf {
        self.kubelet.pod_logs(namespace, pod).join(format!("{container}.log"))
    }

    /// What a container wrote so far.
    ///
    /// # Errors
    /// When it never started.
    pub fn log(&self, namespace: &str, pod: &str, container: &str) -> Result<String> {
        let path = self.log_path(namespace, pod, container);
        let bytes = fs::read(&path).map_err(Error::file("read", &path))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn node(&self, name: &str) -> Result<&Arc<Node>> {
        self.kubelet.nodes.get(name).ok_or_else(|| Error::Unknown { what: "node", name: name.into() })
    }
}

impl Drop for ProcessKubelet {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // Its panic, if it had one, was printed by itself.
            let _ = thread.join();
        }
    }
}

/// What the kubelet's thread is made from.
struct Seed {
    config: KubeletConfig,
    tool: crate::ClusterTool,
    apiserver: (String, String),
    addresses: Arc<crate::address::AddressPool>,
    dir: PathBuf,
    nodes: BTreeMap<String, Arc<Node>>,
}

impl Seed {
    fn of(plane: &ControlPlane, config: KubeletConfig) -> Result<Self> {
        let dir = config.dir.clone().unwrap_or_else(|| plane.dir().join("kubelet"));
        let dir = std::path::absolute(&dir).map_err(Error::file("find", &dir))?;
        fs::create_dir_all(&dir).map_err(Error::file("create", &dir))?;
        let mut nodes = BTreeMap::new();
        for wanted in &config.nodes {
            let node = Node::new(wanted.clone(), plane.addresses().take()?);
            nodes.insert(wanted.name.clone(), Arc::new(node));
        }
        let address = plane.url().trim_start_matches("https://");
        let (host, port) = address.split_once(':').unwrap_or((address, "443"));
        Ok(Self {
            apiserver: (host.into(), port.into()),
            tool: plane.tool().clone(),
            addresses: Arc::clone(plane.addresses()),
            config,
            dir,
            nodes,
        })
    }

    /// Starts the server that `kubectl logs` asks, at every node's address.
    fn serve_logs(&self) -> Result<TiedProcess> {
        let addresses = self.nodes.values().map(|node| format!("{}:{LOG_PORT}", node.ip()));
        let mut command = std::process::Command::new(self.tool.container());
        command.arg("serve-logs").arg(self.dir.join("pods")).args(addresses);
        TiedProcess::spawn("serve-logs", command, &self.dir)
    }

    fn grow(self, client: Client) -> Kubelet {
        let reporter = Reporter { controller: "kubelet".into(), instance: None };
        Kubelet {
            recorder: Recorder::new(client.clone(), reporter),
            client,
            config: self.config,
            tool: self.tool,
            apiserver: self.apiserver,
            addresses: self.addresses,
            dir: self.dir,
            nodes: self.nodes,
            tasks: TaskTracker::new(),
            pods: Default::default(),
        }
    }
}

/// The admin's rights under a name of its own, so that an audit log can tell the kubelet's requests.
fn client_config(plane: &ControlPlane) -> kube::Config {
    let mut config = plane.client_config().clone();
    config.headers.push((http::header::USER_AGENT, http::HeaderValue::from_static("process-kubelet")));
    config
}

/// The kubelet's thread: serves until told to stop, then ends every container before it returns.
fn run(config: kube::Config, seed: Seed, stop: CancellationToken, tell: oneshot::Sender<Result<Arc<Kubelet>>>) {
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(source) => {
            let _ = tell.send(Err(Error::Start { program: "process kubelet".into(), source }));
            return;
        }
    };
    runtime.block_on(async {
        let kubelet = match begin(config, seed).await {
            Ok(kubelet) => kubelet,
            Err(error) => {
                let _ = tell.send(Err(error));
                return;
            }
        };
        let _ = tell.send(Ok(Arc::clone(&kubelet)));
        tokio::select! {
            // Pods are told to end below, whatever they were doing.
            () = stop.cancelled() => {}
            () = Arc::clone(&kubelet).follow_pods() => {}
        }
        kubelet.darken(None);
        kubelet.tasks.close();
        if tokio::time::timeout(STOP_DEADLINE, kubelet.tasks.wait()).await.is_err() {
            tracing::error!("containers did not end in time; they are killed with their tasks");
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
}

async fn begin(config: kube::Config, seed: Seed) -> Result<Arc<Kubelet>> {
    let client = Client::try_from(config).map_err(Error::api("set up a client"))?;
    let kubelet = Arc::new(seed.grow(client.clone()));
    for node in kubelet.nodes.values() {
        let object = node.register(&client).await?;
        let (node, client, every) = (Arc::clone(node), client.clone(), kubelet.config.heartbeat);
        // Not among the pods' tasks: it ends with the runtime.
        tokio::spawn(async move { node.beat(client, object, every).await });
    }
    Ok(kubelet)
}

/// The processes in the same process namespace as `first`, itself first.
fn processes_beside(first: i32) -> Vec<i32> {
    let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let Some(ours) = namespace(first) else { return Vec::new() };
    let numbers = fs::read_dir("/proc").into_iter().flatten().flatten();
    let all = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut found: Vec<i32> = all.filter(|pid| *pid != first && namespace(*pid).as_ref() == Some(&ours)).collect();
    found.sort_unstable();
    found.insert(0, first);
    found
}
