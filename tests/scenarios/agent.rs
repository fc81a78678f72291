//! One agent on a real API server, as the chart starts it: doubled devices, a kernel log that grows, its own
//! worker processes. The scenario plays the scheduler and the operator.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use berth_crds::{AcceleratorNode, AcceleratorNodeStatus, accelerator_node::DeviceStatus};
use berth_proto::v1::{
    AgentMessage, AgentOrder, DesiredShelves, DeviceHealth, DeviceShelves, HealthReport, Hello, RunnerMessage,
    RunnerOrder, SchedulerHello, Shelf, ShelfPhase, Weights, WorkerPhase, WorkerState, WorkersReport,
    agent_message::Message,
    agent_order::Order,
    control_server::{Control, ControlServer},
};
use berth_tests::control_plane::{ControlPlane, ControlPlaneConfig, target_dir};
use futures::Stream;
use k8s_openapi::api::{coordination::v1::Lease, core::v1::Node};
use kube::{
    Api, Client, ResourceExt,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{cluster::eventually, crd_rules};

const LOST: &str = "0000:3b:00.0";
const OTHER: &str = "0000:9d:00.0";

/// A node with two devices, as its double's script lists them.
struct Kind {
    node: &'static str,
    devices: [&'static str; 2],
    header: Value,
    /// Where the agent finds the double.
    library: (&'static str, &'static str),
}

fn nvidia() -> Kind {
    let device = |pci: &str| json!({"pci": pci, "uuid": format!("GPU-{pci}"), "product": "NVIDIA H100 80GB HBM3", "memory_bytes": 85_899_345_920_u64});
    Kind {
        node: "gpu-07",
        devices: [LOST, OTHER],
        header: json!({"nvidia": [device(LOST), device(OTHER)]}),
        library: ("BERTH_NVML_LIBRARY", "libberth_double_nvml.so"),
    }
}

/// Both devices of one card.
fn ascend() -> Kind {
    let device = |device: u8| {
        json!({"card": 3, "device": device, "logic_id": 6 + device, "product": "Ascend910_9392",
        "hbm_bytes": 68_719_476_736_u64, "superpod": 7, "serial": "1023A", "pci": format!("0000:c{device}:00.0")})
    };
    Kind {
        node: "npu-12",
        devices: ["3.0", "3.1"],
        header: json!({"ascend": [device(0), device(1)]}),
        library: ("BERTH_DCMI_LIBRARY", "libberth_double_dcmi.so"),
    }
}

/// What the scheduler heard last, and when.
#[derive(Clone, Debug, Default)]
struct Heard {
    hosting: Option<bool>,
    health: Option<(Instant, HealthReport)>,
    workers: WorkersReport,
}

/// A scheduler that only listens, and says what the scenario wants.
struct Scheduler {
    heard: watch::Sender<Heard>,
    orders: watch::Receiver<Option<DesiredShelves>>,
}

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Control for Scheduler {
    type AgentStream = Out<AgentOrder>;
    type RunnerStream = Out<RunnerOrder>;

    async fn agent(&self, request: Request<Streaming<AgentMessage>>) -> Result<Response<Self::AgentStream>, Status> {
        let (mut messages, heard, mut orders) = (request.into_inner(), self.heard.clone(), self.orders.clone());
        tokio::spawn(async move {
            while let Ok(Some(AgentMessage { message })) = messages.message().await {
                heard.send_modify(|heard| match message {
                    Some(Message::Hello(hello)) => heard.hosting = Some(hello.hosting),
                    Some(Message::Health(report)) => heard.health = Some((Instant::now(), report)),
                    Some(Message::Workers(workers)) => heard.workers = workers,
                    Some(Message::Beat(_)) | None => {}
                });
            }
        });
        let (down, out) = mpsc::channel(4);
        tokio::spawn(async move {
            let hello = Hello { proto: 1, ..Hello::default() };
            let hello = Order::Hello(SchedulerHello { hello: Some(hello), epoch: 1 });
            let _ = down.send(Ok(AgentOrder { order: Some(hello) })).await;
            loop {
                let order = orders.borrow_and_update().clone();
                if let Some(order) = order {
                    let _ = down.send(Ok(AgentOrder { order: Some(Order::Desired(order)) })).await;
                }
                if orders.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(out))))
    }

    async fn runner(&self, _: Request<Streaming<RunnerMessage>>) -> Result<Response<Self::RunnerStream>, Status> {
        Err(Status::unimplemented("no runners here"))
    }
}

struct World {
    plane: ControlPlane,
    client: Client,
    heard: watch::Receiver<Heard>,
    orders: watch::Sender<Option<DesiredShelves>>,
    agent: Child,
    folder: tempfile::TempDir,
    kind: Kind,
}

fn built(name: &str) -> PathBuf {
    let path = target_dir().join("debug").join(name);
    assert!(
        path.exists(),
        "{} is missing: cargo build -p berth -p berth-double-nvml -p berth-double-dcmi",
        path.display()
    );
    path
}

impl World {
    async fn start(kind: Kind) -> Self {
        let plane = ControlPlane::start(ControlPlaneConfig::named(kind.node)).await.unwrap();
        let client = plane.client().unwrap();
        crd_rules::install(&client).await;
        let (hear, heard) = watch::channel(Heard::default());
        let (orders, see_orders) = watch::channel(None);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let scheduler = ControlServer::new(Scheduler { heard: hear, orders: see_orders });
        let server = tonic::transport::Server::builder().add_service(scheduler);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        set_up(&client, kind.node, address).await;
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("script"), format!("{}\n", kind.header)).unwrap();
        fs::write(folder.path().join("kmsg"), "6,1,0,-;Linux version 6.12\n").unwrap();
        let agent = start_agent(&plane, &kind, folder.path());
        Self { plane, client, heard, orders, agent, folder, kind }
    }

    fn node(&self) -> Api<AcceleratorNode> {
        Api::all(self.client.clone())
    }

    async fn host(&self) {
        let node = self.node();
        eventually("the AcceleratorNode", || async { node.get_opt(self.kind.node).await.unwrap() }).await;
        let spec = json!({"spec": {"native": true}});
        node.patch(self.kind.node, &PatchParams::default(), &Patch::Merge(&spec)).await.unwrap();
    }

    /// Waits until what was heard holds `check`.
    async fn hears<T>(&self, what: &str, check: impl Fn(&Heard) -> Option<T>) -> T {
        eventually(what, || async { check(&self.heard.borrow()) }).await
    }

    async fn serving(&self, device: &str) -> WorkerState {
        let what = format!("a worker that serves {device}");
        self.hears(&what, |heard| worker(heard, device).filter(|w| w.phase() == WorkerPhase::Serving)).await
    }

    /// Asks every device to hold one expert of each of two layers.
    fn order(&self, revision: u64) {
        let weights = Weights { uri: format!("file://{}", models().join("v3-tiny").display()), digest: String::new() };
        let layer = |layer| berth_proto::v1::LayerSlots { layer, experts: vec![0, 3] };
        let shelf = Shelf {
            placement: "models/v3-0".into(),
            placement_uid: "6c1f".into(),
            revision,
            weights: Some(weights),
            format: String::new(),
            layers: vec![layer(1), layer(2)],
        };
        let device =
            |local| DeviceShelves { device: format!("{}/{local}", self.kind.node), shelves: vec![shelf.clone()] };
        let order = DesiredShelves { epoch: 1, sequence: revision, devices: self.kind.devices.map(device).into() };
        self.orders.send_replace(Some(order));
    }

    fn append(&self, file: &str, line: &str) {
        let mut file = OpenOptions::new().append(true).open(self.folder.path().join(file)).unwrap();
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }
}

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/reference/models").canonicalize().unwrap()
}

fn start_agent(plane: &ControlPlane, kind: &Kind, folder: &Path) -> Child {
    let log = fs::File::create(plane.dir().join("agent.log")).unwrap();
    Command::new(built("berth"))
        .arg("agent")
        .env("KUBECONFIG", plane.kubeconfig())
        .env("BERTH_NODE_NAME", kind.node)
        .env("BERTH_POD_IP", "127.0.0.1")
        .env("BERTH_ADMIN_LISTEN", "127.0.0.1:0")
        .env("BERTH_SCHEDULER_LEASE", "default/berth-scheduler")
        .env("BERTH_WEIGHTS_ROOTS", models())
        .env("BERTH_KMSG", folder.join("kmsg"))
        .env(kind.library.0, built(kind.library.1))
        .env("BERTH_DOUBLE_SCRIPT", folder.join("script"))
        .env("BERTH_WORKER_MEMORY", "64MB")
        .env("BERTH_WORKER_THREADS", "1")
        .env("BERTH_STATE_DIR", folder)
        .stdin(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

async fn set_up(client: &Client, name: &str, scheduler: SocketAddr) {
    let node: Node =
        serde_json::from_value(json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})).unwrap();
    Api::<Node>::all(client.clone()).create(&PostParams::default(), &node).await.unwrap();
    let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": "berth-scheduler"}, "spec": {"holderIdentity": format!("scheduler-0@{scheduler}")}});
    let lease: Lease = serde_json::from_value(lease).unwrap();
    Api::<Lease>::default_namespaced(client.clone()).create(&PostParams::default(), &lease).await.unwrap();
}

fn worker(heard: &Heard, device: &str) -> Option<WorkerState> {
    heard.workers.workers.iter().find(|worker| worker.device.ends_with(device)).cloned()
}

fn device(report: &HealthReport, pci: &str) -> DeviceHealth {
    report.devices.iter().find(|device| device.device.ends_with(pci)).cloned().unwrap()
}

fn ready(worker: &WorkerState, revision: u64) -> bool {
    worker.shelves.iter().any(|shelf| shelf.revision == revision && shelf.phase() == ShelfPhase::Ready)
}

fn exists(process: u32) -> bool {
    Path::new("/proc").join(process.to_string()).exists()
}

/// Worker processes of this agent, by their parent.
fn children(parent: u32) -> Vec<u32> {
    let tasks = Path::new("/proc").join(parent.to_string()).join("task");
    let folders = fs::read_dir(tasks).map(|tasks| tasks.filter_map(Result::ok).collect::<Vec<_>>()).unwrap_or_default();
    let text = folders.iter().filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    text.flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}

fn signal(process: u32, signal: nix::sys::signal::Signal) {
    let process = nix::unistd::Pid::from_raw(i32::try_from(process).unwrap());
    nix::sys::signal::kill(process, signal).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_hosts_loses_a_device_and_a_worker_and_ends_in_order() {
    let mut world = World::start(nvidia()).await;
    world.hears("a node that hosts nothing yet", |heard| heard.hosting.filter(|hosting| !hosting)).await;
    let first = world.hears("health", |heard| heard.health.clone()).await.1;
    assert_eq!(
        (device(&first, LOST).health, device(&first, OTHER).admission),
        ("Healthy".into(), "Schedulable".into())
    );
    assert!(world.heard.borrow().workers.workers.is_empty(), "a node that is not native has no workers");

    world.host().await;
    world.hears("a node that hosts", |heard| heard.hosting.filter(|hosting| *hosting)).await;
    world.serving(LOST).await;
    world.serving(OTHER).await;
    world.order(1);
    for pci in [LOST, OTHER] {
        world.hears("experts", |heard| worker(heard, pci).filter(|worker| ready(worker, 1))).await;
    }

    loses_a_device(&world).await;
    loses_a_worker(&world).await;
    forgets_nothing(&mut world).await;

    let workers = children(world.agent.id());
    assert!(!workers.is_empty());
    signal(world.agent.id(), nix::sys::signal::Signal::SIGTERM);
    let status = tokio::task::spawn_blocking(move || world.agent.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
    assert!(workers.iter().all(|worker| !exists(*worker)), "no worker outlives its agent");
    drop(world.plane);
}

async fn loses_a_device(world: &World) {
    let written = Instant::now();
    world.append(
        "kmsg",
        "4,2,1000000,-;NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
    );
    let (at, report) = world
        .hears("the loss", |heard| {
            heard.health.clone().filter(|(_, report)| device(report, LOST).admission == "Barred")
        })
        .await;
    let lost = device(&report, LOST);
    assert_eq!(
        (lost.health.as_str(), lost.action.as_str(), lost.reason.as_str()),
        ("Unhealthy", "RebootNode", "DeviceLost")
    );
    assert!(lost.evidence.contains("Xid 79"), "{}", lost.evidence);
    assert_eq!(device(&report, OTHER).health, "Healthy");
    let took = at.duration_since(written);
    assert!(took < Duration::from_millis(500), "the loss took {took:?} to reach the scheduler");
    let node = world.node();
    let object = eventually("the loss in the object", || async {
        let object = node.get(world.kind.node).await.unwrap();
        object.status.as_ref().is_some_and(|status| status.summary.schedulable == 1).then_some(object)
    })
    .await;
    let status = object.status.clone().unwrap();
    assert_eq!(status.boot_id, report.boot_id);
    assert_eq!(status.summary.reason, "DeviceLost");
    assert_eq!(object.owner_references().first().map(|owner| owner.kind.as_str()), Some("Node"));
    assert!(status.conditions.iter().all(|condition| condition.type_ == "Ready"), "Reachable is the scheduler's");
}

/// The agent is killed and started again: the device that was lost stays so, since then, and the incident is kept.
async fn forgets_nothing(world: &mut World) {
    let node = world.node();
    let before = node.get(world.kind.node).await.unwrap().status.unwrap();
    let lost = |status: &AcceleratorNodeStatus| {
        status.devices.iter().find(|device| device.device.local() == LOST).cloned().unwrap()
    };
    let file = world.folder.path().join("agent-state.json");
    eventually("the state file", || async { fs::read_to_string(&file).ok().filter(|text| text.contains("Xid 79")) })
        .await;
    world.agent.kill().unwrap();
    world.agent.wait().unwrap();
    world.agent = start_agent(&world.plane, &world.kind, world.folder.path());
    let after = eventually("the next agent's word", || async {
        let status = node.get(world.kind.node).await.unwrap().status.unwrap();
        (status.sequence > before.sequence + 1000).then_some(status)
    })
    .await;
    let (before, after) = (lost(&before), lost(&after));
    assert_eq!((after.admission, after.reason, &after.evidence), (before.admission, before.reason, &before.evidence));
    let since = |status: &DeviceStatus| status.since.as_ref().unwrap().0.as_millisecond();
    assert!((since(&after) - since(&before)).abs() < 2_000, "{:?} is not {:?}", after.since, before.since);
    let output = Command::new(built("berth"))
        .args(["faults", "-o", "csv", "--state-dir"])
        .arg(world.folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().nth(1).unwrap_or_default();
    assert!(output.status.success() && line.contains("Xid 79") && line.contains("NVIDIA H100"), "{text}");
    world.serving(OTHER).await;
}

async fn loses_a_worker(world: &World) {
    let before = world.serving(OTHER).await;
    for process in children(world.agent.id()) {
        let line = fs::read_to_string(format!("/proc/{process}/cmdline")).unwrap_or_default();
        if line.contains(OTHER) {
            signal(process, nix::sys::signal::Signal::SIGKILL);
        }
    }
    let after = world
        .hears("another worker", |heard| {
            worker(heard, OTHER).filter(|worker| worker.instance != before.instance && ready(worker, 1))
        })
        .await;
    assert_ne!(after.endpoint, before.endpoint);
    let note = world.hears("the note", |heard| heard.health.clone()).await.1;
    assert_eq!(device(&note, OTHER).health, "Healthy", "a worker's death is not its device's");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ascend_agent_hosts_on_both_devices_of_a_card_and_loses_one_with_the_other_drained() {
    let mut world = World::start(ascend()).await;
    let [lost, sibling] = world.kind.devices;
    world.host().await;
    for local in world.kind.devices {
        world.serving(local).await;
    }
    world.order(1);
    for local in world.kind.devices {
        world.hears("experts", |heard| worker(heard, local).filter(|worker| ready(worker, 1))).await;
    }
    let node = world.node();
    let object = eventually("two devices in the object", || async {
        let object = node.get(world.kind.node).await.unwrap();
        object.status.as_ref().is_some_and(|status| status.summary.schedulable == 2).then_some(object)
    })
    .await;
    let status = object.status.unwrap();
    assert_eq!((status.summary.vendor.as_str(), status.summary.domain.as_str()), ("ascend", "superpod-7"));
    for device in &status.devices {
        assert_eq!((device.product.as_str(), device.card.as_str()), ("Ascend910_9392", "1023A"));
    }

    let calls = r#"{"dcmi_get_device_health":-8012,"dcmi_get_device_errorcode_v2":-8012}"#;
    let written = Instant::now();
    world.append(
        "script",
        &format!(r#"{{"dcmi":[3,0],"set":{{"return":{calls}}},"fault":{{"id":"0x40F84E00","severity":3}}}}"#),
    );
    let (at, report) = world
        .hears("the loss", |heard| {
            heard.health.clone().filter(|(_, report)| device(report, lost).admission == "Barred")
        })
        .await;
    let (gone, drained) = (device(&report, lost), device(&report, sibling));
    assert_eq!((gone.action.as_str(), gone.reason.as_str()), ("ResetGroup", "DeviceLost"));
    assert!(gone.evidence.contains("0x40F84E00"), "{}", gone.evidence);
    assert_eq!(
        (drained.health.as_str(), drained.admission.as_str(), drained.scope.as_str()),
        ("Healthy", "Draining", "card")
    );
    let took = at.duration_since(written);
    assert!(took < Duration::from_millis(500), "the loss took {took:?} to reach the scheduler");
    let status = tokio::task::spawn_blocking(move || {
        signal(world.agent.id(), nix::sys::signal::Signal::SIGTERM);
        world.agent.wait()
    });
    assert!(status.await.unwrap().unwrap().success());
}
