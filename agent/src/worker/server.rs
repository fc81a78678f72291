//! The transport: tonic services around `control` and `calls`. Nothing is decided here.

use std::{sync::Arc, time::Duration};

use berth_proto::{
    MESSAGE_LIMIT,
    v1::{
        ForwardRequest, ForwardResponse, WorkerOrder, WorkerReport,
        expert_server::{Expert, ExpertServer},
        worker_server::{Worker, WorkerServer},
    },
};
use futures::{Stream, StreamExt, stream::BoxStream};
use tokio::{
    net::TcpListener,
    sync::{Mutex, mpsc},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{
    Request, Response, Status, Streaming,
    transport::server::{Server, TcpIncoming},
};

use super::{
    calls::{self, Door},
    control::Published,
    tally::Tally,
};

/// A report goes out at least this often, so that a supervisor notices a worker that hangs.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// While shelves load, reports follow their progress this closely.
const REPORT_PROGRESS: Duration = Duration::from_millis(200);
/// Answers of one stream that may wait for the network.
const OUTBOUND: usize = 16;
/// What one stream and one connection may have under way: one prefill chunk of activations fits.
const WINDOW: u32 = 32 << 20;

/// Everything the services need.
pub(crate) struct Services {
    /// Where orders go.
    pub(crate) orders: mpsc::Sender<WorkerOrder>,
    /// What is ready and how far loads are.
    pub(crate) published: Published,
    /// Where calls go in.
    pub(crate) door: Door,
    /// Tokens since the last report.
    pub(crate) tally: Arc<Tally>,
    /// Cancelled here when the supervisor is gone.
    pub(crate) ask_to_stop: CancellationToken,
    /// Cancelled when nothing new is to be accepted.
    pub(crate) stopping: CancellationToken,
    /// Streams that are being served.
    pub(crate) streams: TaskTracker,
}

impl Services {
    /// Serves both services on `listener` until `stop` is cancelled and the open streams are done.
    ///
    /// # Errors
    /// What the transport says.
    pub(crate) async fn serve(self, listener: TcpListener) -> Result<(), tonic::transport::Error> {
        let Self { orders, published, door, tally, ask_to_stop, stopping, streams } = self;
        let expert = ExpertService { door: door.clone(), stopping: stopping.clone(), streams: streams.clone() };
        let report = Reporter { published, door, tally };
        let worker = WorkerService {
            first: Mutex::new(Some((orders, report))),
            ask_to_stop,
            stopping: stopping.clone(),
            streams,
        };
        Server::builder()
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .http2_keepalive_interval(Some(Duration::from_secs(5)))
            .http2_keepalive_timeout(Some(Duration::from_secs(5)))
            .add_service(
                ExpertServer::new(expert)
                    .max_decoding_message_size(MESSAGE_LIMIT)
                    .max_encoding_message_size(MESSAGE_LIMIT),
            )
            .add_service(WorkerServer::new(worker).max_decoding_message_size(MESSAGE_LIMIT))
            .serve_with_incoming_shutdown(
                TcpIncoming::from(listener).with_nodelay(Some(true)),
                stopping.cancelled_owned(),
            )
            .await
    }
}

/// Runner to worker.
struct ExpertService {
    door: Door,
    stopping: CancellationToken,
    streams: TaskTracker,
}

#[tonic::async_trait]
impl Expert for ExpertService {
    type ForwardStream =
        futures::stream::Map<ReceiverStream<ForwardResponse>, fn(ForwardResponse) -> Result<ForwardResponse, Status>>;

    async fn forward(
        &self,
        request: Request<Streaming<ForwardRequest>>,
    ) -> Result<Response<Self::ForwardStream>, Status> {
        let (outbound, answers) = mpsc::channel(OUTBOUND);
        let serve = calls::serve(request.into_inner(), outbound, self.door.clone(), self.stopping.clone());
        self.streams.spawn(serve);
        Ok(Response::new(ReceiverStream::new(answers).map(Ok)))
    }
}

/// Supervisor to worker.
struct WorkerService {
    /// Taken by the first stream.
    first: Mutex<Option<(mpsc::Sender<WorkerOrder>, Reporter)>>,
    ask_to_stop: CancellationToken,
    stopping: CancellationToken,
    streams: TaskTracker,
}

#[tonic::async_trait]
impl Worker for WorkerService {
    type SuperviseStream = BoxStream<'static, Result<WorkerReport, Status>>;

    async fn supervise(
        &self,
        request: Request<Streaming<WorkerOrder>>,
    ) -> Result<Response<Self::SuperviseStream>, Status> {
        let taken = self.first.lock().await.take();
        let Some((orders, reporter)) = taken else {
            return Err(Status::already_exists("this worker has its supervisor: start another worker"));
        };
        self.streams.spawn(take_orders(request.into_inner(), orders, self.ask_to_stop.clone()));
        Ok(Response::new(reporter.reports(self.stopping.clone()).map(Ok).boxed()))
    }
}

/// Passes orders on until the supervisor's stream ends; then the worker ends.
async fn take_orders<E: std::fmt::Display>(
    mut inbound: impl Stream<Item = Result<WorkerOrder, E>> + Unpin,
    orders: mpsc::Sender<WorkerOrder>,
    ask_to_stop: CancellationToken,
) {
    let pass = async {
        while let Some(order) = inbound.next().await {
            match order {
                Ok(order) => {
                    if orders.send(order).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::info!(%error, "the supervisor's stream broke");
                    return;
                }
            }
        }
    };
    // Cancel-safe: an order that is not passed on any more is for a worker that ends.
    tokio::select! {
        () = ask_to_stop.cancelled() => {}
        () = pass => {
            tracing::info!("the supervisor is gone, the worker ends");
            ask_to_stop.cancel();
        }
    }
}

/// Makes reports.
struct Reporter {
    published: Published,
    door: Door,
    tally: Arc<Tally>,
}

impl Reporter {
    /// A report at once, on every transition, closely while something loads, and at least every second.
    fn reports(self, stop: CancellationToken) -> impl Stream<Item = WorkerReport> + Send + 'static {
        let (send, reports) = mpsc::channel(4);
        tokio::spawn(async move {
            let Self { mut published, door, tally } = self;
            let clock = door.clock.clone();
            let mut last: Option<(Duration, Vec<_>)> = None;
            loop {
                let shelves: Vec<_> =
                    published.views.borrow_and_update().iter().map(super::shelf::View::to_wire).collect();
                let due = last
                    .as_ref()
                    .is_none_or(|(at, sent)| *sent != shelves || clock.now().saturating_sub(*at) >= REPORT_EVERY);
                if due {
                    let (calls, refused) = door.metrics.totals();
                    let report = WorkerReport { shelves: shelves.clone(), calls, refused, loads: tally.take() };
                    if send.send(report).await.is_err() {
                        return;
                    }
                    last = Some((clock.now(), shelves));
                }
                // Cancel-safe: all arms only wait.
                tokio::select! {
                    () = stop.cancelled() => return,
                    changed = published.views.changed() => if changed.is_err() { return },
                    () = clock.sleep(REPORT_PROGRESS) => {}
                }
            }
        });
        ReceiverStream::new(reports)
    }
}
