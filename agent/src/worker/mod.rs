//! One device: a child process that holds expert weights and computes with them.
//!
//! ```text
//! supervisor --orders--> server -> control -> loader -> kernels      (bytes to slots)
//!            <-reports--           shelf  <---'
//! runner ----calls-----> server -> calls -> queue -> forward -> kernels
//! ```
//!
//! A process per device, because a sticky device error, a fault that kills its process or a call that
//! hangs must end one worker and nothing else. It plans nothing, writes no object, and never outlives its
//! supervisor. Activations never reach logs, metrics or errors.

mod calls;
mod codec;
mod control;
mod forward;
mod life;
mod load_error;
mod loader;
mod metrics;
mod model;
mod presence;
mod probe;
mod queue;
mod server;
mod shelf;
mod tally;

#[cfg(test)]
mod tests;

use std::{
    io::{self, Write},
    net::SocketAddr,
    num::NonZeroUsize,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use berth_kernels::{Backend, BackendKind, KernelError, Roots, backend, cpu};
use berth_runtime::{Clock, Part, PartConfig, PartError};
use berth_types::{Bytes, DeviceId};
use tokio::{net::TcpListener, sync::mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use calls::Door;
use control::{Control, Published};
use loader::Loader;
pub use metrics::METRICS;

use metrics::Metrics;
use presence::Presence;
pub use probe::{ProbeConfig, ProbeError, probe};
use queue::{Bench, Queue, QueueLimits};
use server::Services;
use tally::Tally;

/// Threads that compute calls; the backend's own threads share out each call.
const COMPUTING: usize = 2;
/// How long calls in hand may take once the worker was asked to stop.
const DRAIN: Duration = Duration::from_secs(3);

/// What a worker is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// The device it owns.
    pub device: DeviceId,
    /// What computes.
    pub backend: BackendKind,
    /// Where it serves; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where it serves metrics and probes; port 0 takes a free one.
    pub admin: SocketAddr,
    /// Bytes of the device. Usable are 92 % less the workspace, by the formula of `berth_types::memory`.
    pub memory: Bytes,
    /// Folders that weights may be read from.
    pub roots: Roots,
    /// Threads for loading and, on the CPU backend, for computing; `None` = as many as the process may use.
    pub threads: Option<NonZeroUsize>,
    /// Longest time a call may take, and the time of a call that names none.
    pub call_limit: Duration,
    /// Its address on the bus; `None` = what the device is called on its node.
    pub pci: Option<String>,
    /// Where the kernel lists PCI devices: `/sys/bus/pci/devices`.
    pub pci_devices: PathBuf,
}

/// Why a worker could not run.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The backend cannot be opened.
    #[error("device {device}: {cause}")]
    Backend {
        /// The device.
        device: DeviceId,
        /// What the backend said.
        cause: KernelError,
    },
    /// Plaintext is for loopback only.
    #[error("listen {0}: a worker without certificates serves loopback only: use 127.0.0.1")]
    NotLoopback(SocketAddr),
    /// The address cannot be had.
    #[error("listen {address}: {cause}: use a free port, or port 0")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// The system's words.
        cause: io::Error,
    },
    /// The system refused a thread, a handler or standard output.
    #[error("{doing}: {cause}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// The system's words.
        cause: io::Error,
    },
    /// The frame of the process.
    #[error(transparent)]
    Part(#[from] PartError),
    /// The transport broke.
    #[error("serving expert calls")]
    Serve(#[from] tonic::transport::Error),
}

/// Runs a worker as the child of its supervisor: prints `{"endpoint":"ip:port","admin":"ip:port"}` on
/// standard output when it serves, and ends when the supervisor's stream or standard input ends, the parent
/// dies, or `stop` is cancelled.
///
/// # Errors
/// [`WorkerError`].
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), WorkerError> {
    let system = |doing| move |cause| WorkerError::System { doing, cause };
    life::tie_to_parent(&stop).map_err(system("tying the worker to its parent"))?;
    let listener = listen(config.listen).await?;
    let frame = PartConfig { name: "worker", admin_listen: config.admin, drain_limit: DRAIN.saturating_mul(2) };
    let clock = Clock::real();
    let worker = Worker::open(config, clock.clone())?;
    let part = Part::start(frame, clock, stop.clone()).await?;
    part.metrics.register(|registry| worker.metrics.register(registry));
    announce(&listener, part.admin_address).map_err(system("telling the endpoint on standard output"))?;
    let stopping = part.tasks.stopping().clone();
    part.tasks.keep("worker", worker.serve(listener, stop, stopping));
    Ok(part.finish().await?)
}

/// Binds the address, loopback only.
async fn listen(address: SocketAddr) -> Result<TcpListener, WorkerError> {
    if !address.ip().is_loopback() {
        return Err(WorkerError::NotLoopback(address));
    }
    TcpListener::bind(address).await.map_err(|cause| WorkerError::Listen { address, cause })
}

fn announce(listener: &TcpListener, admin: SocketAddr) -> io::Result<()> {
    let line = serde_json::json!({"endpoint": listener.local_addr()?.to_string(), "admin": admin.to_string()});
    let mut output = io::stdout().lock();
    writeln!(output, "{line}")?;
    output.flush()
}

/// A device that is open and not yet served.
struct Worker {
    device: DeviceId,
    control: Control,
    published: Published,
    door: Door,
    tally: Arc<Tally>,
    metrics: Arc<Metrics>,
}

impl Worker {
    /// Opens the backend and starts the threads that compute.
    fn open(config: Config, clock: Clock) -> Result<Self, WorkerError> {
        let Config { device, backend, listen: _, admin: _, memory, roots, threads, call_limit, pci, pci_devices } =
            config;
        let backend =
            open_backend(backend, threads).map_err(|cause| WorkerError::Backend { device: device.clone(), cause })?;
        let metrics = Arc::new(Metrics::default());
        let reading = threads.or_else(|| std::thread::available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN);
        let loader = Arc::new(Loader::new(Arc::clone(&backend), roots, memory, reading));
        let (control, published) = Control::new(loader, Arc::clone(&metrics), clock.clone());
        let queue = Arc::new(Queue::new(QueueLimits::default()));
        let (tally, shelves) = (Arc::<Tally>::default(), published.shelves.clone());
        let door = Door { queue: Arc::clone(&queue), shelves, metrics: Arc::clone(&metrics), clock, limit: call_limit };
        let (tally_of_bench, shelves) = (Arc::clone(&tally), published.shelves.clone());
        let presence = Arc::new(Presence::of(pci.as_deref().unwrap_or(device.local()), &pci_devices));
        let bench = Bench { queue, shelves, backend, presence, tally: tally_of_bench, metrics: Arc::clone(&metrics) };
        bench.start(COMPUTING).map_err(|cause| WorkerError::System { doing: "starting computing threads", cause })?;
        Ok(Self { device, control, published, door, tally, metrics })
    }

    /// Serves on `listener` until `stopping` is cancelled, then ends in order: accept nothing new, answer
    /// what is in hand, free the shelves. The end of the supervisor's stream cancels `ask_to_stop`.
    async fn serve(
        self,
        listener: TcpListener,
        ask_to_stop: CancellationToken,
        stopping: CancellationToken,
    ) -> Result<(), WorkerError> {
        let Self { device, control, published, door, tally, metrics: _ } = self;
        let (orders, inbox) = mpsc::channel(4);
        let (obeying, streams) = (CancellationToken::new(), TaskTracker::new());
        let control = tokio::spawn(control.run(inbox, obeying.clone()));
        let (queue, clock) = (Arc::clone(&door.queue), door.clock.clone());
        let services = Services {
            orders,
            published,
            door,
            tally,
            ask_to_stop,
            stopping: stopping.clone(),
            streams: streams.clone(),
        };
        tracing::info!(%device, "worker serves");
        // Cancel-safe: what is dropped here are connections whose calls had their time.
        let served = tokio::select! {
            served = services.serve(listener) => served,
            () = drained(&stopping, &streams, &clock) => Ok(()),
        };
        queue.close();
        obeying.cancel();
        if let Err(error) = control.await {
            tracing::error!(%error, "the control task broke off");
        }
        tracing::info!(%device, "worker ends");
        Ok(served?)
    }
}

/// Returns when `stopping` was cancelled and every stream is done, or has had [`DRAIN`] for it.
async fn drained(stopping: &CancellationToken, streams: &TaskTracker, clock: &Clock) {
    stopping.cancelled().await;
    streams.close();
    if clock.timeout(DRAIN, streams.wait()).await.is_err() {
        tracing::warn!(streams = streams.len(), "calls in hand were given up");
    }
}

fn open_backend(kind: BackendKind, threads: Option<NonZeroUsize>) -> Result<Arc<dyn Backend>, KernelError> {
    match kind {
        BackendKind::Cpu => {
            let options = cpu::CpuOptions { threads: threads.map(NonZeroUsize::get), level: None };
            Ok(Arc::new(cpu::CpuBackend::with(options)?))
        }
        BackendKind::Cuda | BackendKind::Ascend => backend::open(kind),
    }
}
