//! One node: device health, workers, orders.
//!
//! ```text
//! nvml, dcmi, kernel log --facts--> node (ledger) --> published --> report (stream up), node_status (object)
//!                                         |                             |                    |
//!                                         v                             v                    v
//!                                      workers <--------------- orders (shelves)      orders (will)
//! ```
//!
//! The agent is a supervisor: it has no device context, plans nothing, and orders no reset. A vendor call
//! that hangs, a worker that dies and a scheduler that is away each cost what they are, and nothing else.

pub mod docket;
pub mod executor;
pub mod health;
pub mod host;
pub mod metrics;
pub mod node;
pub mod node_status;
pub mod orders;
pub mod probe;
pub mod published;
pub mod releases;
pub mod report;
pub mod state_file;
pub mod tend;
pub mod vendor;
pub mod vitals;
pub mod worker;
pub mod workers;

use std::{
    collections::BTreeSet, convert::Infallible, ffi::OsString, io, net::SocketAddr, path::PathBuf, sync::Arc,
    time::Duration,
};

use berth_runtime::{Clock, Part, PartConfig, PartError, Tasks, admin::Admin};
use berth_types::NodeName;
use futures::future::BoxFuture;
use kube::Client;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use executor::{Executor, Told, Tools};
use health::{device::Settings, fact::Local, incidents::Incidents, kmsg::KernelLog, ledger::Report, log, tail::Tail};
use host::Host;
use metrics::Metrics;
use node::{Keeper, Keeping, Snapshot};
use node_status::{NodeStatus, OrderBook};
use orders::{Desired, Wanted};
use probe::{Idle, Prober};
use published::Publisher;
use report::{Leader, Reporter};
use state_file::{Here, Resumed};
use vendor::{Bells, Facts, dcmi, grip::Grip, nvml};
use vitals::{Board, Holder};
use workers::{View, WorkerConfig, Workers};

/// Facts on their way to the ledger.
const FACT_ROOM: usize = 256;
/// Devices that wait for their validation.
const PROBE_ROOM: usize = 64;
/// How long workers may take to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(20);
/// A task without a turn for so long makes the process not live.
const ALIVE_WITHIN: Duration = Duration::from_secs(60);

/// What an agent is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its node.
    pub node: NodeName,
    /// Address of the admin endpoints.
    pub admin_listen: SocketAddr,
    /// The scheduler's Lease: namespace and name.
    pub scheduler_lease: (String, String),
    /// The kernel log: /dev/kmsg, or a file or pipe of such records.
    pub kernel_log: PathBuf,
    /// NVIDIA's management library; `None` = by its usual name.
    pub nvml_library: Option<OsString>,
    /// Ascend's management library; `None` = by its usual name.
    pub dcmi_library: Option<OsString>,
    /// The library of the switches of Ascend's scale-up fabric; `None` = by its usual name.
    pub lingqu_library: Option<OsString>,
    /// Where the kernel lists PCI devices.
    pub pci_devices: PathBuf,
    /// NVIDIA's program that resets a device: `nvidia-smi`.
    pub nvidia_smi: PathBuf,
    /// Program and arguments that boot the node again; empty = the agent may not.
    pub reboot: Vec<String>,
    /// How workers are started.
    pub worker: WorkerConfig,
    /// How health is judged.
    pub health: Settings,
    /// Under which names devices are told besides our own.
    pub compatible: Compatible,
    /// About so long between two validations of a device that is idle; `None` = idle devices are not validated.
    pub idle_probe: Option<Duration>,
    /// Folder of the node where what must outlive the agent is kept; `None` = a restart forgets.
    pub state: Option<PathBuf>,
}

/// Pages for boards that were made for vendors' exporters; see docs/compatible-metrics.md.
#[derive(Clone, Debug, Default)]
pub struct Compatible {
    /// `/metrics/dcgm`: NVIDIA devices as dcgm-exporter tells them.
    pub dcgm: bool,
    /// `/metrics/npu`: Ascend devices as npu-exporter tells them.
    pub npu: bool,
    /// The pod that this agent runs in, which holds the devices that it hosts; `None` = not known.
    pub holder: Option<Holder>,
}

impl Compatible {
    fn serve(self, admin: &Admin, board: &Board, node: &NodeName) {
        let Self { dcgm, npu, holder } = self;
        if dcgm {
            let (board, node, holder) = (board.clone(), node.clone(), holder.clone());
            admin.page("/metrics/dcgm", vitals::CONTENT_TYPE, move || {
                vitals::dcgm::render(&board.view(), &node, holder.as_ref())
            });
        }
        if npu {
            let board = board.clone();
            admin.page("/metrics/npu", vitals::CONTENT_TYPE, move || {
                vitals::npu::render(&board.view(), holder.as_ref())
            });
        }
    }
}

/// Why an agent could not run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Reports could not be ordered.
    #[error("host facts: {0}")]
    Host(#[source] io::Error),
    /// The part ended otherwise than asked.
    #[error(transparent)]
    Part(#[from] PartError),
}

/// What watches a node's devices.
#[derive(Default)]
pub struct Eyes {
    /// NVIDIA's library; `None` = nothing of NVIDIA is here.
    pub nvml: Option<nvml::watch::WatchConfig>,
    /// Ascend's library; `None` = nothing of Ascend is here.
    pub dcmi: Option<dcmi::watch::WatchConfig>,
    /// Opens the kernel log; `None` = there is none.
    pub log: Option<log::Open>,
    /// Told every report as it is said.
    pub observer: Option<mpsc::UnboundedSender<Report>>,
    /// Told every device that is due for validation; `None` = validations come as facts alone.
    pub probes: Option<mpsc::Sender<Local>>,
    /// How health is judged.
    pub settings: Settings,
    /// What an agent before this one knew.
    pub resumed: Resumed,
    /// Where what this one knows is kept.
    pub keeping: Option<Keeping>,
}

/// A node under watch.
#[derive(Debug)]
pub struct Observation {
    /// What is so; `None` until every detector has settled.
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    /// For facts that no detector tells: workers, resets, validation.
    pub facts: Facts,
}

/// Starts to watch: detectors, and the keeper of the ledger, as tasks given to `spawn`, until `stop` is
/// cancelled.
///
/// # Errors
/// When the system refuses a thread.
pub fn observe(
    eyes: Eyes,
    clock: &Clock,
    metrics: &Metrics,
    stop: &CancellationToken,
    mut spawn: impl FnMut(&'static str, BoxFuture<'static, ()>),
) -> io::Result<Observation> {
    let (facts, told) = Facts::line(FACT_ROOM);
    let bells = Bells::default();
    let mut detectors = BTreeSet::new();
    if let Some(log) = eyes.log {
        detectors.insert(log::NAME);
        log::follow(log, eyes.resumed.log_sequence, facts.clone(), metrics.clone(), clock)?;
    }
    if let Some(config) = eyes.nvml {
        detectors.insert(nvml::watch::NAME);
        let watch = nvml::watch::Watch::new(config, clock.clone(), facts.clone(), bells.clone(), metrics.board.clone());
        spawn("nvml", Box::pin(watch.run(stop.clone())));
    }
    if let Some(config) = eyes.dcmi {
        detectors.insert(dcmi::watch::NAME);
        let watch = dcmi::watch::Watch::new(config, clock.clone(), facts.clone(), bells.clone(), metrics.board.clone());
        spawn("dcmi", Box::pin(watch.run(stop.clone())));
    }
    let (shown, snapshots) = watch::channel(None);
    let keeper = Keeper {
        clock: clock.clone(),
        facts: told,
        bells,
        detectors,
        metrics: metrics.clone(),
        observer: eyes.observer,
        probes: eyes.probes,
        settings: eyes.settings,
        resumed: eyes.resumed,
        keeping: eyes.keeping,
    };
    spawn("ledger", Box::pin(keeper.run(shown, stop.clone())));
    Ok(Observation { snapshots, facts })
}

/// Runs an agent until `stop` is cancelled: not ready, workers ended, stream closed.
///
/// # Errors
/// [`AgentError`].
pub async fn run(config: Config, client: Client, clock: Clock, stop: CancellationToken) -> Result<(), AgentError> {
    let Config {
        node,
        admin_listen,
        scheduler_lease,
        kernel_log,
        nvml_library,
        dcmi_library,
        lingqu_library,
        pci_devices,
        nvidia_smi,
        reboot,
        worker,
        health,
        compatible,
        idle_probe,
        state,
    } = config;
    let host = Host::read().map_err(AgentError::Host)?;
    let uptime_ms = host::uptime_ms().map_err(AgentError::Host)?;
    let here = Here {
        node: node.to_string(),
        boot_id: host.boot_id.clone(),
        uptime: Duration::from_millis(uptime_ms),
        unix: clock.unix(),
    };
    let resumed = state.as_deref().map(|folder| state_file::open(folder, &here, health)).unwrap_or_default();
    // Times of an agent before this one lie in this one's past.
    let clock = clock.ahead(resumed.base);
    let began = clock.now();
    let part = PartConfig { name: "agent", admin_listen, drain_limit: DRAIN_LIMIT };
    let part = Part::start(part, clock.clone(), stop).await?;
    let metrics = Metrics::register(&part.metrics);
    compatible.serve(&part.admin, &metrics.board, &node);
    tracing::info!(%node, boot = host.boot_id, memory = host.memory_bytes, processors = host.processors, "host");
    // Read once: a label that comes later needs no restart to be harmless.
    let expected = node_status::read_node(&client, &clock, &node).await;
    let expected = expected.map(|node| node_status::expected_devices(&node)).unwrap_or_else(|error| {
        tracing::warn!(%error, "the Node cannot be read: the number of devices is not checked");
        node_status::Expected::default()
    });
    let tools = Tools { nvidia_smi, dcmi_library: dcmi_library.clone(), reboot };
    let grip = Grip::default();
    let libraries = Libraries { nvml: nvml_library, dcmi: dcmi_library, lingqu: lingqu_library, grip: grip.clone() };
    let (nvml, dcmi) = libraries.vendors(&pci_devices, &expected);
    let (log, _log_stop) = open_log(kernel_log).map_err(AgentError::Host)?;
    // Workers end first; what tells of it stays until they have.
    let organs = Organs { tasks: part.tasks.clone(), admin: part.admin.clone(), last: CancellationToken::new() };
    let (probes, due) = mpsc::channel(PROBE_ROOM);
    let keep = |name, task| organs.keep(name, task);
    let keeping = state.map(|folder| {
        let (to, texts) = watch::channel(Arc::default());
        keep("state", Box::pin(state_file::keep(folder, texts, metrics.clone())));
        Keeping { to, here, began }
    });
    let probes = Some(probes);
    let eyes = Eyes { nvml, dcmi, log: Some(log), observer: None, probes, settings: health, resumed, keeping };
    let observation = observe(eyes, &clock, &metrics, &organs.last, keep).map_err(AgentError::Host)?;
    let ready = part.admin.check("devices");
    serve_faults(&part.admin, &node, observation.snapshots.clone());
    let mut seen = observation.snapshots.clone();
    part.tasks.spawn("ready", async move {
        if seen.wait_for(Option::is_some).await.is_ok() {
            ready.pass();
        }
        Ok::<_, Infallible>(())
    });
    let prober = Prober {
        clock: clock.clone(),
        node: node.clone(),
        worker: worker.clone(),
        pci_devices: pci_devices.clone(),
        snapshots: observation.snapshots.clone(),
        due,
        facts: observation.facts.clone(),
        idle: None,
    };
    let backend = worker.backend;
    let publisher =
        Publisher { clock: clock.clone(), node: node.clone(), boot_id: host.boot_id.clone(), uptime_ms, backend };
    let means = Means { tools, grip, boot_id: host.boot_id };
    let speech = Speech { clock, node, client, scheduler_lease, metrics, means };
    organs.join(speech, publisher, worker, observation, Probing { prober, idle: idle_probe });
    Ok(part.finish().await?)
}

/// Vendors' libraries as they were configured.
struct Libraries {
    nvml: Option<OsString>,
    dcmi: Option<OsString>,
    lingqu: Option<OsString>,
    grip: Grip,
}

impl Libraries {
    /// What is watched: a vendor is when its library is named, the kernel lists a device of it, or the Node
    /// promises one. A node that shows neither is asked for NVIDIA's, and says what it lacks.
    fn vendors(
        self,
        pci_devices: &std::path::Path,
        expected: &node_status::Expected,
    ) -> (Option<nvml::watch::WatchConfig>, Option<dcmi::watch::WatchConfig>) {
        let Self { nvml, dcmi, lingqu, grip } = self;
        let kernel_lists = host::nvidia_devices(pci_devices);
        let ascend = dcmi.is_some() || expected.ascend.is_some() || !host::ascend_devices(pci_devices).is_empty();
        let nvidia = nvml.is_some() || expected.nvidia.is_some() || !kernel_lists.is_empty() || !ascend;
        let nvml = nvml::watch::WatchConfig { library: nvml, kernel_lists, expected: expected.nvidia, grip };
        let dcmi = dcmi::watch::WatchConfig { library: dcmi, switch_library: lingqu, expected: expected.ascend };
        (nvidia.then_some(nvml), ascend.then_some(dcmi))
    }
}

/// The tasks of an agent, each with a sign of life, and the token of those that end last.
struct Organs {
    tasks: Tasks,
    admin: Admin,
    last: CancellationToken,
}

/// What validates, and how often it looks at idle devices.
struct Probing {
    prober: Prober,
    idle: Option<Duration>,
}

/// What is needed to talk to the cluster.
struct Speech {
    clock: Clock,
    node: NodeName,
    client: Client,
    scheduler_lease: (String, String),
    metrics: Metrics,
    means: Means,
}

/// What orders are carried out with.
struct Means {
    tools: Tools,
    grip: Grip,
    boot_id: String,
}

impl Organs {
    fn keep(&self, name: &'static str, task: BoxFuture<'static, ()>) {
        let alive = self.admin.heartbeat(name, ALIVE_WITHIN);
        self.tasks.keep(name, async move {
            alive.during(task).await;
            Ok::<_, Infallible>(())
        });
    }

    /// Joins what watches, what speaks and what works by watch channels.
    fn join(
        &self,
        speech: Speech,
        publisher: Publisher,
        worker: WorkerConfig,
        observation: Observation,
        Probing { mut prober, idle }: Probing,
    ) {
        let Speech { clock, node, client, scheduler_lease: (namespace, name), metrics, means } = speech;
        let Observation { snapshots, facts } = observation;
        let (wanted, see_wanted) = watch::channel(Wanted::default());
        let (view, see_view) = watch::channel(View::default());
        let (desired, see_desired) = watch::channel(Arc::<Desired>::default());
        let (publish, published) = watch::channel(None);
        let last = &self.last;
        prober.idle = idle.map(|every| Idle::new(every, see_view.clone(), see_desired.clone(), see_wanted.clone()));
        self.keep("prober", Box::pin(prober.run(last.clone())));
        let publishing = publisher.run(snapshots.clone(), see_wanted.clone(), publish, last.clone());
        self.keep("published", Box::pin(publishing));
        let (emptied, see_emptied) = watch::channel(BTreeSet::new());
        let told = (see_wanted.clone(), snapshots.clone(), see_view.clone(), facts.clone());
        let orders = self.carry_out(&clock, &node, means, told, emptied);
        let status = NodeStatus {
            clock: clock.clone(),
            client: client.clone(),
            node: node.clone(),
            published: published.clone(),
            workers: see_view.clone(),
            wanted,
            orders,
            facts: facts.clone(),
            metrics: metrics.clone(),
        };
        self.keep("node status", Box::pin(status.run(last.clone())));
        let reporter = Reporter {
            clock: clock.clone(),
            node: node.clone(),
            leader: Leader::Lease { client, namespace, name },
            published,
            workers: see_view,
            desired,
            metrics: metrics.clone(),
            told: Duration::ZERO,
        };
        self.keep("report", Box::pin(reporter.run(last.clone())));
        let workers = Workers {
            clock,
            node,
            config: worker,
            snapshots,
            wanted: see_wanted,
            desired: see_desired,
            emptied: see_emptied,
            facts,
            view,
            metrics,
        };
        let (stopping, last) = (self.tasks.stopping().clone(), last.clone());
        let working = async move {
            workers.run(stopping.child_token()).await;
            stopping.cancelled().await;
            last.cancel();
        };
        self.keep("workers", Box::pin(working));
    }
}

/// What the executor of orders sees and tells.
type Seen = (watch::Receiver<Wanted>, watch::Receiver<Option<Arc<Snapshot>>>, watch::Receiver<View>, Facts);

impl Organs {
    /// Starts the executor of orders; answers the other ends of what it tells.
    fn carry_out(
        &self,
        clock: &Clock,
        node: &NodeName,
        Means { tools, grip, boot_id }: Means,
        (wanted, snapshots, workers, facts): Seen,
        emptied: watch::Sender<BTreeSet<Local>>,
    ) -> OrderBook {
        let (remember, remembered) = watch::channel(None);
        let (tell, fates) = watch::channel(None);
        let (record, recorded) = watch::channel(Arc::default());
        let executor = Executor {
            clock: clock.clone(),
            node: node.clone(),
            boot_id,
            tools,
            wanted,
            remembered,
            snapshots,
            workers,
            grip,
            facts,
            emptied,
            told: Told { fates: tell, recorded },
        };
        self.keep("executor", Box::pin(executor.run(self.last.clone())));
        OrderBook { fates, recorded: record, remembered: remember }
    }
}

/// Answers on the admin port who asks for the last incidents.
fn serve_faults(admin: &Admin, node: &NodeName, snapshots: watch::Receiver<Option<Arc<Snapshot>>>) {
    let node = node.to_string();
    admin.page("/faults", "application/json", move || {
        let incidents = snapshots.borrow().as_ref().map(|snapshot| Arc::clone(&snapshot.incidents)).unwrap_or_default();
        serde_json::to_string(&Faults { node: node.clone(), incidents: (*incidents).clone() }).unwrap_or_default()
    });
}

/// The last incidents of a node, as an agent tells them.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Faults {
    /// The node.
    pub node: String,
    /// Oldest first.
    pub incidents: Incidents,
}

/// Opens the kernel log, again and again if need be; dropping the second value ends the reading. An agent that may not
/// read it goes on by events and polling, and says so.
fn open_log(path: PathBuf) -> io::Result<(log::Open, io::PipeWriter)> {
    let (end, stop) = io::pipe()?;
    let open = move || {
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let tail = Tail::open(&path, end.try_clone()?).map_err(named)?;
        let log: Box<dyn KernelLog> = Box::new(tail);
        Ok(log)
    };
    Ok((Box::new(open), stop))
}
