//! One idle agent as its node runs it: a process of its own on doubled libraries, its workers beside it, an API server,
//! and the scheduler's stream. What the supervisor costs then.

use std::{
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use berth_crds::AcceleratorNode;
use berth_proto::v1::control_server::ControlServer;
use berth_runtime::Clock;
use berth_scheduler::{
    facts::{AgentSaid, Fact},
    metrics::SchedulerMetrics,
    reports::{Chair, Reports, Seat},
};
use berth_types::Epoch;
use k8s_openapi::api::{coordination::v1::Lease, core::v1::Node};
use kube::{
    Api,
    api::{Patch, PatchParams, PostParams},
};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;

use super::process::{Cost, Sample};
use crate::{ControlPlane, Error, Result, control_plane::ControlPlaneConfig};

const NODE: &str = "idle-01";
/// All workers serve within this.
const READY_LIMIT: Duration = Duration::from_secs(120);
/// Threads of the doubles are not the agent's.
const DOUBLES: &str = "double";
/// As the scheduler keeps its streams alive.
const SILENCE: Duration = Duration::from_secs(1);

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// NVIDIA devices.
    pub nvidia: u32,
    /// Ascend devices, two to a card.
    pub ascend: u32,
    /// Whether the node hosts: one worker process for each device.
    pub workers: bool,
    /// Rest before it is measured.
    pub settle: Duration,
    /// How long it is measured.
    pub window: Duration,
    /// The binary.
    pub berth: PathBuf,
    /// Folder of the doubles.
    pub doubles: PathBuf,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// NVIDIA devices.
    pub nvidia: u32,
    /// Ascend devices.
    pub ascend: u32,
    /// Workers that served.
    pub workers: usize,
    /// What the supervisor cost.
    pub supervisor: Cost,
}

/// A process that ends with this value.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended by itself; its workers end with it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Measures on a control plane of its own.
///
/// # Errors
/// When something does not start, or the workers do not serve in time.
pub async fn run(options: &Options) -> Result<Report> {
    let plane = ControlPlane::start(ControlPlaneConfig::named("bench-supervisor")).await?;
    let client = plane.client()?;
    super::install_definitions(&client).await?;
    let (address, mut serving) = listen().await?;
    let node: Node = object(json!({"metadata": {"name": NODE}}))?;
    Api::<Node>::all(client.clone()).create(&PostParams::default(), &node).await.map_err(Error::api("make a Node"))?;
    let spec = json!({"holderIdentity": format!("scheduler-0@{address}")});
    let lease: Lease = object(json!({"metadata": {"name": "berth-scheduler"}, "spec": spec}))?;
    let leases: Api<Lease> = Api::default_namespaced(client.clone());
    leases.create(&PostParams::default(), &lease).await.map_err(Error::api("make the scheduler's Lease"))?;
    let objects: Api<AcceleratorNode> = Api::all(client);
    let native = json!({"metadata": {"name": NODE}, "spec": {"native": options.workers}});
    let hosts: AcceleratorNode = object(native)?;
    objects.create(&PostParams::default(), &hosts).await.map_err(Error::api("make an AcceleratorNode"))?;
    let agent = start(options, &plane)?;
    let wanted =
        if options.workers { usize::try_from(options.nvidia.saturating_add(options.ascend)).unwrap_or(0) } else { 0 };
    let all_serve = serving.wait_for(|told| told.0 && told.1 >= wanted);
    if !matches!(tokio::time::timeout(READY_LIMIT, all_serve).await, Ok(Ok(_))) {
        let state = format!("{:?}, see {}", *serving.borrow(), plane.dir().display());
        return Err(Error::Wait { what: "all workers to serve".into(), waited: READY_LIMIT, state });
    }
    tokio::time::sleep(options.settle).await;
    let before = Sample::of(agent.0.id())?;
    tokio::time::sleep(options.window).await;
    let supervisor = Sample::of(agent.0.id())?.since(&before, DOUBLES);
    let workers = serving.borrow().1;
    // Workers end in order before their agent is killed.
    let patch = Patch::Merge(json!({"spec": {"native": false}}));
    objects.patch(NODE, &PatchParams::default(), &patch).await.map_err(Error::api("end the workers"))?;
    let ended = matches!(tokio::time::timeout(READY_LIMIT, serving.wait_for(|told| told.1 == 0)).await, Ok(Ok(_)));
    if !ended {
        let state = format!("see {}", plane.dir().display());
        return Err(Error::Wait { what: "all workers to end".into(), waited: READY_LIMIT, state });
    }
    drop(agent);
    Ok(Report { nvidia: options.nvidia, ascend: options.ascend, workers, supervisor })
}

fn object<K: serde::de::DeserializeOwned>(text: Value) -> Result<K> {
    serde_json::from_value(text).map_err(|error| Error::Unknown { what: "form of an object", name: error.to_string() })
}

/// The script that both doubles read.
fn header(options: &Options) -> Value {
    let gpu = |number: u32| {
        json!({"pci": format!("0000:{:02x}:00.0", number.saturating_add(0x10)), "uuid": format!("GPU-{number:08x}"),
        "product": "NVIDIA H100 80GB HBM3", "memory_bytes": 85_899_345_920_u64})
    };
    let npu = |number: u32| {
        json!({"card": number / 2, "device": number % 2, "logic_id": number, "product": "Ascend910_9392",
        "hbm_bytes": 68_719_476_736_u64, "superpod": 7})
    };
    let nvidia: Vec<Value> = (0..options.nvidia).map(gpu).collect();
    let ascend: Vec<Value> = (0..options.ascend).map(npu).collect();
    json!({"nvidia": nvidia, "ascend": ascend})
}

fn start(options: &Options, plane: &ControlPlane) -> Result<Ended> {
    let file = |name: &str| plane.dir().join(name);
    let write = |path: &Path, text: &str| fs::write(path, text).map_err(Error::file("write", path));
    let (script, kmsg, pci, weights) = (file("script"), file("kmsg"), file("pci"), file("weights"));
    write(&script, &format!("{}\n", header(options)))?;
    write(&kmsg, "6,1,0,-;Linux version 6.12\n")?;
    for folder in [&pci, &weights] {
        fs::create_dir_all(folder).map_err(Error::file("make", folder))?;
    }
    let log = file("agent.log");
    let mut command = Command::new(&options.berth);
    command
        .arg("agent")
        .env("KUBECONFIG", plane.kubeconfig())
        .env("BERTH_NODE_NAME", NODE)
        .env("BERTH_POD_IP", "127.0.0.1")
        .env("BERTH_ADMIN_LISTEN", "127.0.0.1:0")
        .env("BERTH_SCHEDULER_LEASE", "default/berth-scheduler")
        .env("BERTH_WEIGHTS_ROOTS", &weights)
        .env("BERTH_KMSG", &kmsg)
        .env("BERTH_PCI_DEVICES", &pci)
        .env("BERTH_DOUBLE_SCRIPT", &script)
        .env("BERTH_WORKER_MEMORY", "64MB")
        .env("BERTH_WORKER_THREADS", "1")
        .stdin(Stdio::null())
        .stderr(File::create(&log).map_err(Error::file("create", &log))?);
    if options.nvidia > 0 {
        command.env("BERTH_NVML_LIBRARY", options.doubles.join("libberth_double_nvml.so"));
    }
    if options.ascend > 0 {
        command.env("BERTH_DCMI_LIBRARY", options.doubles.join("libberth_double_dcmi.so"));
    }
    let program = || options.berth.display().to_string();
    command.spawn().map(Ended).map_err(|source| Error::Start { program: program(), source })
}

/// The scheduler's own stream service. Answers where it is, and a view of whether an agent spoke of its health and how
/// many workers serve.
async fn listen() -> Result<(SocketAddr, watch::Receiver<(bool, usize)>)> {
    let refused = |source| Error::Start { program: "the scheduler's stream service".into(), source };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.map_err(refused)?;
    let address = listener.local_addr().map_err(refused)?;
    let (facts, mut heard) = mpsc::channel(256);
    let (chair, seen) = watch::channel(Chair::Taken(Seat { epoch: Epoch(1), facts, ended: CancellationToken::new() }));
    let service = ControlServer::new(Reports::new(seen, Clock::real(), SchedulerMetrics::default()));
    let server = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(SILENCE))
        .http2_keepalive_timeout(Some(SILENCE * 2))
        .tcp_nodelay(true)
        .add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    let (tell, told) = watch::channel((false, 0));
    tokio::spawn(async move {
        let mut lines = Vec::new();
        while let Some(fact) = heard.recv().await {
            match fact {
                // Whoever lets go of an orders' line ends its stream.
                Fact::AgentOpened { line, .. } => lines.push(line),
                Fact::Agent { said: AgentSaid::Health(_), .. } => tell.send_modify(|told| told.0 = true),
                Fact::Agent { said: AgentSaid::Workers(workers), .. } => {
                    tell.send_modify(|told| told.1 = workers.values().filter(|worker| worker.serving).count());
                }
                _ => {}
            }
        }
        drop(chair);
    });
    Ok((address, told))
}
