//! The stream to the scheduler's leader: routes and gone devices come in; revisions in use, load windows and beats go
//! out. Level-triggered: whatever is missed is said again on the next stream. While there is none, the runner keeps
//! serving with the routes it has.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use berth_proto::{
    FEATURE_WEIGHTS, MESSAGE_LIMIT, PROTO, convert,
    v1::{
        self, Beat, Hello, RevisionsInUse, RunnerHello, RunnerMessage, RunnerOrder, control_client::ControlClient,
        runner_message::Message, runner_order::Order,
    },
};
use berth_runtime::{
    Clock,
    admin::Heartbeat,
    telemetry::trace::{Step, TraceContext},
};
use futures::future::BoxFuture;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use crate::{
    experts::{Experts, InUse},
    load::LoadCounter,
    routes::RouteTable,
};

/// Messages on their way out; a stream that takes no more of them is given up.
const OUTGOING: usize = 64;
/// Bound of each outside call.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Pause between streams: from half of this to all of it.
const PAUSE: Duration = Duration::from_secs(1);

/// Finds the scheduler's leader; asked before every stream.
pub trait FindScheduler: Send + Sync + std::fmt::Debug {
    /// Address of the leader's `Control` service, or why there is none now.
    fn find(&self) -> BoxFuture<'_, Result<SocketAddr, String>>;
}

/// A scheduler at a fixed address.
impl FindScheduler for SocketAddr {
    fn find(&self) -> BoxFuture<'_, Result<SocketAddr, String>> {
        Box::pin(std::future::ready(Ok(*self)))
    }
}

/// Closes a load window every `window` until `stop`, stream or no stream, and tells its number.
pub(crate) async fn count(
    load: Arc<LoadCounter>,
    experts: Experts,
    clock: Clock,
    window: Duration,
    closed: watch::Sender<u64>,
    stop: CancellationToken,
) -> Result<(), std::io::Error> {
    let mut next = clock.now() + window;
    loop {
        // Cancel-safe: both arms only wait.
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = clock.sleep_until(next) => {
                closed.send_replace(load.close(window, |revision| experts.close_window(revision)).window);
                next += window;
            }
        }
    }
}

/// Everything that the stream is about.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) clock: Clock,
    pub(crate) scheduler: Arc<dyn FindScheduler>,
    pub(crate) placement: String,
    pub(crate) runner: String,
    pub(crate) experts: Experts,
    pub(crate) load: Arc<LoadCounter>,
    pub(crate) beat: Duration,
    /// Changes when a load window was closed.
    pub(crate) closed: watch::Receiver<u64>,
    pub(crate) alive: Heartbeat,
    /// Highest epoch that a scheduler has named.
    pub(crate) epoch: u64,
    /// Why there was no stream, as last logged: a scheduler that stays away is said once.
    pub(crate) said: String,
    /// The revision that was taken last.
    pub(crate) switch: Option<Switch>,
}

/// A revision on its way into use, as a step of the decision that made it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Switch {
    revision: u64,
    /// None = there is none, or it was told.
    trace: Option<TraceContext>,
    taken: Duration,
}

impl Control {
    /// Keeps a stream until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        loop {
            // Cancel-safe: what is dropped is a stream, and the next one says everything again.
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                ended = self.stream() => ended,
            };
            if ended != self.said {
                tracing::info!(reason = %ended, "no stream to the scheduler");
                self.said = ended;
            }
            self.alive.beat();
            let pause = PAUSE.mul_f64(rand::random_range(0.5..1.0));
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.clock.sleep(pause) => {}
            }
        }
    }

    /// One stream, to its end; gives the reason.
    async fn stream(&mut self) -> String {
        match self.open().await {
            Ok((outgoing, orders)) => match self.converse(outgoing, orders).await {
                Ok(()) => "the scheduler ended it".to_owned(),
                Err(reason) => reason,
            },
            Err(reason) => reason,
        }
    }

    async fn open(&mut self) -> Result<(mpsc::Sender<RunnerMessage>, tonic::Streaming<RunnerOrder>), String> {
        let late = |what: &'static str| move |elapsed: berth_runtime::clock::Elapsed| format!("{what}: {elapsed}");
        let address = self.clock.timeout(CALL_LIMIT, self.scheduler.find()).await.map_err(late("finding it"))??;
        if !address.ip().is_loopback() {
            return Err(format!("{address} is not on loopback: plaintext goes nowhere else, set up certificates"));
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|error| error.to_string())?
            .connect_timeout(CALL_LIMIT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(self.beat)
            .keep_alive_timeout(CALL_LIMIT);
        let channel = self.clock.timeout(CALL_LIMIT, endpoint.connect()).await.map_err(late("connecting"))?;
        let mut client = ControlClient::new(channel.map_err(|error| format!("connecting to {address}: {error}"))?)
            .max_decoding_message_size(MESSAGE_LIMIT);
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        self.introduce(&outgoing)?;
        let orders = self.clock.timeout(CALL_LIMIT, client.runner(ReceiverStream::new(messages))).await;
        let orders = orders.map_err(late("opening"))?.map_err(|status| status.message().to_owned())?;
        tracing::info!(scheduler = %address, "stream to the scheduler opened");
        self.said.clear();
        Ok((outgoing, orders.into_inner()))
    }

    /// What a scheduler that knows nothing must hear first.
    fn introduce(&self, outgoing: &mpsc::Sender<RunnerMessage>) -> Result<(), String> {
        let features = vec![FEATURE_WEIGHTS.to_owned()];
        let hello = Hello { build: env!("CARGO_PKG_VERSION").to_owned(), proto: PROTO, features };
        let hello = RunnerHello { hello: Some(hello), placement: self.placement.clone(), runner: self.runner.clone() };
        send(outgoing, Message::Hello(hello))?;
        send(outgoing, in_use(*self.experts.in_use().borrow()))?;
        self.load.kept().into_iter().try_for_each(|window| send(outgoing, Message::Load(window)))
    }

    async fn converse(
        &mut self,
        outgoing: mpsc::Sender<RunnerMessage>,
        mut orders: tonic::Streaming<RunnerOrder>,
    ) -> Result<(), String> {
        let mut changes = self.experts.in_use();
        let mut closed = self.closed.clone();
        let mut next_beat = self.clock.now();
        loop {
            let clock = self.clock.clone();
            // Cancel-safe: a message stays in the stream, a change stays marked, a time stays due.
            tokio::select! {
                order = orders.message() => match order {
                    Ok(Some(order)) => self.obey(order)?,
                    Ok(None) => return Ok(()),
                    Err(status) => return Err(status.message().to_owned()),
                },
                changed = changes.changed() => {
                    changed.map_err(|_| "the engine is gone".to_owned())?;
                    let now = *changes.borrow_and_update();
                    send(&outgoing, in_use(now))?;
                }
                () = clock.sleep_until(next_beat) => {
                    self.alive.beat();
                    self.served();
                    send(&outgoing, Message::Beat(Beat {}))?;
                    next_beat = clock.now() + self.beat;
                }
                changed = closed.changed() => {
                    changed.map_err(|_| "nobody counts any more".to_owned())?;
                    if let Some(window) = self.load.kept().pop() {
                        send(&outgoing, Message::Load(window))?;
                    }
                }
            }
        }
    }

    /// Routes were taken: from now on steps start on their revision.
    fn taken(&mut self, routes: &v1::Routes) {
        // Routes without a trace, or of a build that knows none, are taken all the same.
        let trace: Option<TraceContext> = routes.traceparent.parse().ok();
        tracing::info!(placement = self.placement, revision = routes.revision,
            plan = %format_args!("{}-{}", self.placement, routes.revision),
            trace_id = trace.map(|trace| trace.trace_id()), "revision taken");
        // Later routes of the same revision only name more devices.
        if self.switch.is_none_or(|known| known.revision != routes.revision) {
            self.switch = Some(Switch { revision: routes.revision, trace, taken: self.clock.unix() });
        }
    }

    /// Tells once that a step has ended on the revision that was taken.
    fn served(&mut self) {
        let Some(Switch { revision, trace: Some(trace), taken }) = self.switch else { return };
        let stats = self.experts.stats();
        if stats.in_use.current.0 == revision && stats.revision_since_unix_ms > 0 {
            let served = Duration::from_millis(stats.revision_since_unix_ms).max(taken);
            let plan = format!("{}-{revision}", self.placement);
            let attributes = vec![("placement", self.placement.clone()), ("plan", plan)];
            Step { name: "placement.served", parent: Some(trace), at: (taken, served), attributes }.tell();
            self.switch = Some(Switch { revision, trace: None, taken });
        }
    }

    /// Does what the scheduler says. What makes no sense ends the stream with its reason.
    fn obey(&mut self, order: RunnerOrder) -> Result<(), String> {
        match order.order {
            Some(Order::Hello(hello)) => {
                if hello.epoch < self.epoch {
                    return Err(format!("epoch {} is over: {} leads", hello.epoch, self.epoch));
                }
                self.epoch = hello.epoch;
            }
            Some(Order::Routes(routes)) => {
                let table = RouteTable::try_from(&routes).map_err(|error| format!("routes: {error}"))?;
                if self.experts.set_routes(table) {
                    self.taken(&routes);
                } else {
                    tracing::warn!(epoch = routes.epoch, revision = routes.revision, "older routes refused");
                }
            }
            Some(Order::Gone(gone)) => {
                let devices = gone.devices.iter().map(|device| convert::device(device)).collect::<Result<_, _>>();
                self.experts.set_gone(devices.map_err(|error| format!("gone: {error}"))?);
            }
            // A newer scheduler may say more than this build knows.
            None => {}
        }
        Ok(())
    }
}

fn in_use(now: InUse) -> Message {
    Message::InUse(RevisionsInUse { oldest: now.oldest.0, current: now.current.0 })
}

fn send(outgoing: &mpsc::Sender<RunnerMessage>, message: Message) -> Result<(), String> {
    let message = RunnerMessage { message: Some(message) };
    outgoing.try_send(message).map_err(|_| "it takes no messages: the scheduler hangs or is gone".to_owned())
}
