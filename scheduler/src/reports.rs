//! In: what agents and runners say. Serves Control while this process leads, checks every message once and
//! turns it into a fact. It answers nothing by itself: orders come from `orders`.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use berth_proto::{FEATURE_WEIGHTS, WireError, convert, v1};
use berth_runtime::Clock;
use berth_types::{Bytes, DeviceId, Epoch, LayerId, PlacementName, Revision};
use futures::Stream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    balance::DeviceLoads,
    facts::{AgentSaid, Fact, RunnerSaid},
    index::{Health, LoadWindow, Phase, Shelf, Worker},
    metrics::SchedulerMetrics,
    orders,
};

/// Longest wait for a stream's first message.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// Orders that may wait on one stream; each replaces those before, so few are enough.
const LINE: usize = 8;
/// Most devices, workers or shelves in one report.
const MOST: usize = 4096;

/// The seat of the leader: what a stream needs to take part.
#[derive(Clone, Debug)]
pub struct Seat {
    /// The leader's epoch.
    pub epoch: Epoch,
    /// Where facts go.
    pub facts: mpsc::Sender<Fact>,
    /// Cancelled when the term is over: every stream ends then.
    pub ended: CancellationToken,
}

/// Who leads, as streams see it.
#[derive(Clone, Debug)]
pub enum Chair {
    /// This process.
    Taken(Seat),
    /// Another one, as far as is known.
    Elsewhere(Option<String>),
}

/// The Control service.
#[derive(Clone, Debug)]
pub struct Reports {
    chair: watch::Receiver<Chair>,
    clock: Clock,
    metrics: SchedulerMetrics,
    next: Arc<AtomicU64>,
}

type Orders<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Reports {
    /// A service that takes streams while the chair is taken.
    #[must_use]
    pub fn new(chair: watch::Receiver<Chair>, clock: Clock, metrics: SchedulerMetrics) -> Self {
        Self { chair, clock, metrics, next: Arc::new(AtomicU64::new(1)) }
    }

    fn seat(&self) -> Result<Seat, Status> {
        match &*self.chair.borrow() {
            Chair::Taken(seat) if !seat.ended.is_cancelled() => Ok(seat.clone()),
            Chair::Taken(_) | Chair::Elsewhere(None) => {
                Err(Status::unavailable("this replica does not lead: read the lease"))
            }
            Chair::Elsewhere(Some(leader)) => {
                Err(Status::unavailable(format!("this replica does not lead: {leader} does")))
            }
        }
    }

    async fn first<T>(&self, stream: &mut Streaming<T>) -> Result<T, Status> {
        let first = self.clock.timeout(HELLO_LIMIT, stream.message()).await;
        first
            .map_err(|_| Status::deadline_exceeded("no hello within 5 s"))??
            .ok_or_else(|| Status::invalid_argument("the stream ended before its hello"))
    }

    /// Reads a stream to its end and tells the ring; a message that is nonsense ends it.
    async fn read<T>(
        &self,
        kind: &'static str,
        seat: Seat,
        conn: u64,
        mut stream: Streaming<T>,
        fact: impl Fn(T) -> Result<Option<Fact>, WireError> + Send,
    ) {
        self.metrics.stream(kind, 1);
        loop {
            // Both arms only wait: a message that was not read is the next leader's to hear again.
            let message = tokio::select! {
                () = seat.ended.cancelled() => break,
                message = stream.message() => message,
            };
            let said = match message {
                Ok(Some(message)) => fact(message),
                Ok(None) => break,
                Err(status) => {
                    tracing::debug!(kind, conn, %status, "stream broke");
                    break;
                }
            };
            match said {
                Ok(Some(fact)) => {
                    if seat.facts.send(fact).await.is_err() {
                        break;
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(kind, conn, %error, "message refused, stream ended");
                    break;
                }
            }
        }
        self.metrics.stream(kind, -1);
        // The ring may be gone with its term.
        let _ = seat.facts.send(Fact::Closed { conn }).await;
    }
}

fn invalid(error: &WireError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// Orders until the term ends.
fn until_ended<T: Send + 'static>(line: mpsc::Receiver<Result<T, Status>>, ended: CancellationToken) -> Orders<T> {
    Box::pin(futures::StreamExt::take_until(ReceiverStream::new(line), async move { ended.cancelled().await }))
}

#[tonic::async_trait]
impl v1::control_server::Control for Reports {
    type AgentStream = Orders<v1::AgentOrder>;
    type RunnerStream = Orders<v1::RunnerOrder>;

    async fn agent(
        &self,
        request: Request<Streaming<v1::AgentMessage>>,
    ) -> Result<Response<Self::AgentStream>, Status> {
        let seat = self.seat()?;
        let mut stream = request.into_inner();
        let Some(v1::agent_message::Message::Hello(hello)) = self.first(&mut stream).await?.message else {
            return Err(Status::invalid_argument("a stream opens with hello"));
        };
        let node = hello.node;
        if node.parse::<berth_types::NodeName>().is_err() {
            return Err(invalid(&WireError::new("hello.node", &node, "the name of a node")));
        }
        let conn = self.next.fetch_add(1, Ordering::Relaxed);
        let (line, orders) = mpsc::channel(LINE);
        let first = v1::agent_order::Order::Hello(orders::hello(seat.epoch));
        // A new line has room.
        let _ = line.try_send(Ok(v1::AgentOrder { order: Some(first) }));
        tracing::info!(node, conn, boot_id = hello.boot_id, hosting = hello.hosting, "agent connected");
        let opened = Fact::AgentOpened { conn, node: node.clone(), hosting: hello.hosting, line };
        seat.facts.send(opened).await.map_err(|_| Status::unavailable("the term is over"))?;
        let ended = seat.ended.clone();
        let reports = self.clone();
        tokio::spawn(async move {
            let fact = |message: v1::AgentMessage| {
                let said = message.message.map(|message| agent_said(&node, message)).transpose()?.flatten();
                Ok(said.map(|said| Fact::Agent { conn, said }))
            };
            reports.read("agent", seat, conn, stream, fact).await;
        });
        Ok(Response::new(until_ended(orders, ended)))
    }

    async fn runner(
        &self,
        request: Request<Streaming<v1::RunnerMessage>>,
    ) -> Result<Response<Self::RunnerStream>, Status> {
        let seat = self.seat()?;
        let mut stream = request.into_inner();
        let Some(v1::runner_message::Message::Hello(hello)) = self.first(&mut stream).await?.message else {
            return Err(Status::invalid_argument("a stream opens with hello"));
        };
        let placement: PlacementName = convert::placement(&hello.placement).map_err(|error| invalid(&error))?;
        let conn = self.next.fetch_add(1, Ordering::Relaxed);
        let (line, orders) = mpsc::channel(LINE);
        let first = v1::runner_order::Order::Hello(orders::hello(seat.epoch));
        // A new line has room.
        let _ = line.try_send(Ok(v1::RunnerOrder { order: Some(first) }));
        tracing::info!(%placement, runner = hello.runner, conn, "runner connected");
        let weighs = hello.hello.is_some_and(|hello| hello.features.iter().any(|feature| feature == FEATURE_WEIGHTS));
        let opened = Fact::RunnerOpened { conn, placement, weighs, line };
        seat.facts.send(opened).await.map_err(|_| Status::unavailable("the term is over"))?;
        let ended = seat.ended.clone();
        let reports = self.clone();
        tokio::spawn(async move {
            let fact = |message: v1::RunnerMessage| {
                let said = message.message.map(runner_said).transpose()?.flatten();
                Ok(said.map(|said| Fact::Runner { conn, said }))
            };
            reports.read("runner", seat, conn, stream, fact).await;
        });
        Ok(Response::new(until_ended(orders, ended)))
    }
}

fn agent_said(node: &str, message: v1::agent_message::Message) -> Result<Option<AgentSaid>, WireError> {
    use v1::agent_message::Message;
    Ok(Some(match message {
        Message::Hello(_) => return Ok(None),
        Message::Beat(v1::Beat {}) => AgentSaid::Beat,
        Message::Health(report) => AgentSaid::Health(health(node, &report)?),
        Message::Workers(report) => AgentSaid::Workers(workers(node, &report)?),
    }))
}

fn own(node: &str, field: &str, device: &str) -> Result<DeviceId, WireError> {
    let id = convert::device(device)?;
    if id.node() == node { Ok(id) } else { Err(WireError::new(field, device, "a device of the sender's node")) }
}

fn at_most(field: &str, count: usize) -> Result<(), WireError> {
    if count <= MOST { Ok(()) } else { Err(WireError::new(field, &count.to_string(), "at most 4096 entries")) }
}

fn health(node: &str, report: &v1::HealthReport) -> Result<Health, WireError> {
    at_most("devices", report.devices.len())?;
    let state = report.node.as_ref().map(convert::state_from_wire).transpose()?.unwrap_or_default();
    let mut devices = Vec::with_capacity(report.devices.len());
    for device in &report.devices {
        own(node, "devices.device", &device.device)?;
        devices.push(convert::DeviceHealth::try_from(device)?);
    }
    Ok(Health { boot_id: report.boot_id.clone(), sequence: report.sequence, state, devices })
}

fn workers(node: &str, report: &v1::WorkersReport) -> Result<BTreeMap<DeviceId, Worker>, WireError> {
    at_most("workers", report.workers.len())?;
    let mut workers = BTreeMap::new();
    for worker in &report.workers {
        at_most("workers.shelves", worker.shelves.len())?;
        let device = own(node, "workers.device", &worker.device)?;
        let serving = worker.phase() == v1::WorkerPhase::Serving;
        if serving && worker.endpoint.parse::<std::net::SocketAddr>().is_err() {
            return Err(WireError::new("workers.endpoint", &worker.endpoint, "ip:port"));
        }
        let shelves = worker.shelves.iter().map(|shelf| {
            let phase = match shelf.phase() {
                v1::ShelfPhase::Ready => Phase::Ready,
                v1::ShelfPhase::Failed => Phase::Failed(shelf.error.chars().take(400).collect()),
                v1::ShelfPhase::Loading | v1::ShelfPhase::Unspecified => Phase::Loading,
            };
            let key = (shelf.placement_uid.clone(), Revision(shelf.revision));
            let read = shelf.loaded_bytes.saturating_add(shelf.digested_bytes);
            (key, Shelf { phase, slots_ready: shelf.slots_ready, read: Bytes(read) })
        });
        let entry = Worker {
            serving,
            endpoint: worker.endpoint.clone(),
            memory: Bytes(worker.memory_bytes),
            instance: worker.instance,
            shelves: shelves.collect(),
        };
        workers.insert(device, entry);
    }
    Ok(workers)
}

fn runner_said(message: v1::runner_message::Message) -> Result<Option<RunnerSaid>, WireError> {
    use v1::runner_message::Message;
    Ok(Some(match message {
        Message::Hello(_) => return Ok(None),
        Message::Beat(v1::Beat {}) => RunnerSaid::Beat,
        Message::InUse(v1::RevisionsInUse { oldest, current }) => {
            RunnerSaid::InUse { oldest: Revision(oldest), current: Revision(current) }
        }
        Message::Load(window) => {
            at_most("load.layers", window.layers.len())?;
            let mut layers = BTreeMap::new();
            for layer in window.layers {
                if layer.tokens.len() > 65_535 {
                    let count = layer.tokens.len().to_string();
                    return Err(WireError::new("load.layers.tokens", &count, "at most 65535 experts"));
                }
                layers.insert(LayerId(layer.layer), layer.tokens);
            }
            let devices = device_loads(&window.devices)?;
            let (number, revision) = (window.window, Revision(window.revision));
            let length = Duration::from_millis(window.length_ms.into());
            RunnerSaid::Load(LoadWindow { number, revision, layers, devices, length })
        }
    }))
}

fn device_loads(wire: &[v1::DeviceLoad]) -> Result<DeviceLoads, WireError> {
    at_most("load.devices", wire.len())?;
    let mut loads = DeviceLoads::new();
    for device in wire {
        at_most("load.devices.layers", device.layers.len())?;
        let layers = device.layers.iter().map(|layer| (LayerId(layer.layer), layer.tokens)).collect();
        loads.insert(convert::device(&device.device)?, layers);
    }
    Ok(loads)
}
