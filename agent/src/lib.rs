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
mod organs;
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

use berth_runtime::{Clock, Part, PartConfig, PartError, admin::Admin};
use berth_types::NodeName;
use futures::future::BoxFuture;
use kube::Client;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use executor::Tools;
use health::{device::Settings, fact::Local, incidents::Incidents, kmsg::KernelLog, ledger::Report, log, tail::Tail};
use host::Host;
use metrics::Metrics;
use node::{Keeper, Keeping, Snapshot};
use organs::{Means, Organs, Probing, Speech};
use probe::Prober;
use published::Publisher;
use state_file::{Here, Resumed};
use vendor::{Bells, Facts, dcmi, grip::Grip, nvml};
use vitals::{Board, Holder};
use workers::WorkerConfig;

/// Facts on their way to the ledger.
const FACT_ROOM: usize = 256;
/// Devices that wait for their validation.
const PROBE_ROOM: usize = 64;
/// How long workers may take to end.
const DRAIN_LIMIT: Duration = Duration::from_secs(20);

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
    let node = config.node;
    let host = Host::read().map_err(AgentError::Host)?;
    let uptime_ms = host::uptime_ms().map_err(AgentError::Host)?;
    let here = Here {
        node: node.to_string(),
        boot_id: host.boot_id.clone(),
        uptime: Duration::from_millis(uptime_ms),
        unix: clock.unix(),
    };
    let resumed =
        config.state.as_deref().map(|folder| state_file::open(folder, &here, config.health)).unwrap_or_default();
    // Times of an agent before this one lie in this one's past.
    let clock = clock.ahead(resumed.base);
    let began = clock.now();
    let part = PartConfig { name: "agent", admin_listen: config.admin_listen, drain_limit: DRAIN_LIMIT };
    let part = Part::start(part, clock.clone(), stop).await?;
    let metrics = Metrics::register(&part.metrics);
    config.compatible.serve(&part.admin, &metrics.board, &node);
    tracing::info!(%node, boot = host.boot_id, memory = host.memory_bytes, processors = host.processors, "host");
    let expected = expected_devices(&client, &clock, &node).await;
    let dcmi_library = config.dcmi_library;
    let tools = Tools { nvidia_smi: config.nvidia_smi, dcmi_library: dcmi_library.clone(), reboot: config.reboot };
    let grip = Grip::default();
    let (nvml, lingqu) = (config.nvml_library, config.lingqu_library);
    let libraries = Libraries { nvml, dcmi: dcmi_library, lingqu, grip: grip.clone() };
    let (nvml, dcmi) = libraries.vendors(&config.pci_devices, &expected);
    let (log, _log_stop) = open_log(config.kernel_log).map_err(AgentError::Host)?;
    // Workers end first; what tells of it stays until they have.
    let organs = Organs { tasks: part.tasks.clone(), admin: part.admin.clone(), last: CancellationToken::new() };
    let (probes, due) = mpsc::channel(PROBE_ROOM);
    let keep = |name, task| organs.keep(name, task);
    let keeping = config.state.map(|folder| {
        let (to, texts) = watch::channel(Arc::default());
        keep("state", Box::pin(state_file::keep(folder, texts, metrics.clone())));
        Keeping { to, here, began }
    });
    let probes = Some(probes);
    let eyes = Eyes { nvml, dcmi, log: Some(log), observer: None, probes, settings: config.health, resumed, keeping };
    let observation = observe(eyes, &clock, &metrics, &organs.last, keep).map_err(AgentError::Host)?;
    be_ready_once_seen(&part, observation.snapshots.clone());
    serve_faults(&part.admin, &node, observation.snapshots.clone());
    let prober = Prober {
        clock: clock.clone(),
        node: node.clone(),
        worker: config.worker.clone(),
        pci_devices: config.pci_devices,
        snapshots: observation.snapshots.clone(),
        due,
        facts: observation.facts.clone(),
        idle: None,
        resets: None,
    };
    let backend = config.worker.backend;
    let publisher =
        Publisher { clock: clock.clone(), node: node.clone(), boot_id: host.boot_id.clone(), uptime_ms, backend };
    let means = Means { tools, grip, boot_id: host.boot_id };
    let speech = Speech { clock, node, client, scheduler_lease: config.scheduler_lease, metrics, means };
    organs.join(speech, publisher, config.worker, observation, Probing { prober, idle: config.idle_probe });
    Ok(part.finish().await?)
}

/// How many devices the Node promises. Read once: a label that comes later needs no restart to be harmless.
async fn expected_devices(client: &Client, clock: &Clock, node: &NodeName) -> node_status::Expected {
    let expected = node_status::read_node(client, clock, node).await;
    expected.map(|node| node_status::expected_devices(&node)).unwrap_or_else(|error| {
        tracing::warn!(%error, "the Node cannot be read: the number of devices is not checked");
        node_status::Expected::default()
    })
}

fn be_ready_once_seen(part: &Part, mut seen: watch::Receiver<Option<Arc<Snapshot>>>) {
    let ready = part.admin.check("devices");
    part.tasks.spawn("ready", async move {
        if seen.wait_for(Option::is_some).await.is_ok() {
            ready.pass();
        }
        Ok::<_, Infallible>(())
    });
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
