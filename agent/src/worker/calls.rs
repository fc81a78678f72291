//! The calls of one stream: answered in any order, each id computed once, given up when the stream ends.
//! It knows requests and responses but no transport.
//!
//! Everything is bounded: calls in flight, recent answers, and how long a call may take. Activations stay
//! in their messages and are never logged.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use berth_proto::v1::{ForwardRequest, ForwardResponse, ForwardStatus};
use berth_runtime::Clock;
use futures::{Stream, StreamExt, stream::FuturesUnordered};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{forward::Refusal, metrics::Metrics, queue::Queue, shelf::Shelves};

/// Calls of one stream that may be in flight; beyond them the stream is not read, and the sender waits.
const IN_FLIGHT: usize = 64;
/// Recent answers of a stream that are kept for repeated ids.
const RECENT: usize = 64;
/// Bytes of recent answers of a stream that are kept.
const RECENT_BYTES: usize = 16 << 20;

/// Where every stream's calls go in.
#[derive(Clone)]
pub(crate) struct Door {
    /// Calls that wait for the device.
    pub(crate) queue: Arc<Queue>,
    /// Tells at once when the device is barred.
    pub(crate) shelves: watch::Receiver<Arc<Shelves>>,
    /// Counts calls.
    pub(crate) metrics: Arc<Metrics>,
    /// The time that deadlines are in.
    pub(crate) clock: Clock,
    /// How long a call may take at most, and when it says nothing.
    pub(crate) limit: Duration,
}

impl Door {
    /// Answers one call: with rows, or by its deadline with the reason.
    pub(crate) async fn call(self, request: ForwardRequest) -> ForwardResponse {
        let received = self.clock.now();
        let call_id = request.call_id;
        let response = match self.queued(request, received).await {
            Ok(response) => response,
            Err(refusal) => refusal.into_wire(call_id),
        };
        self.metrics.answered(&response, self.clock.now().saturating_sub(received).as_secs_f64());
        response
    }

    async fn queued(&self, request: ForwardRequest, received: Duration) -> Result<ForwardResponse, Refusal> {
        let mut shelves = self.shelves.clone();
        if let Some(reason) = shelves.borrow().barred() {
            return Err(Refusal::lost(reason));
        }
        let limit = match request.deadline_ms {
            0 => self.limit,
            wanted => self.limit.min(Duration::from_millis(wanted.into())),
        };
        let answer = self.queue.offer(request).map_err(|_| {
            self.metrics.queue_full.inc();
            Refusal::new(ForwardStatus::Overloaded, "the queue of this device is full: use another replica, or wait")
        })?;
        // Every arm only waits; dropping the answer's receiver takes the call out of the queue.
        tokio::select! {
            biased;
            barred = shelves.wait_for(|shelves| shelves.barred().is_some()) => Err(match barred {
                Ok(shelves) => Refusal::lost(shelves.barred().map_or("", |reason| reason)),
                Err(_) => Refusal::lost("the worker is ending"),
            }),
            answer = answer => answer.map_err(|_| Refusal::lost("the worker is ending")),
            () = self.clock.sleep_until(received.saturating_add(limit)) => {
                let detail = format!("not computed within {} ms: use another replica", limit.as_millis());
                Err(Refusal::new(ForwardStatus::Deadline, detail))
            }
        }
    }
}

/// What must be equal in two requests with the same id.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Print {
    placement_uid: String,
    revision: u64,
    layer: u32,
    tokens: u32,
    experts: usize,
}

impl From<&ForwardRequest> for Print {
    fn from(request: &ForwardRequest) -> Self {
        Self {
            placement_uid: request.placement_uid.clone(),
            revision: request.revision,
            layer: request.layer,
            tokens: request.tokens,
            experts: request.experts.len(),
        }
    }
}

/// Recent answers with rows, oldest first out.
#[derive(Default)]
struct Recent {
    answers: HashMap<u64, (Print, ForwardResponse)>,
    order: VecDeque<u64>,
    bytes: usize,
}

impl Recent {
    fn keep(&mut self, print: Print, response: &ForwardResponse) {
        if response.status != i32::from(ForwardStatus::Ok) || response.rows.len() > RECENT_BYTES {
            return;
        }
        if self.answers.insert(response.call_id, (print, response.clone())).is_none() {
            self.order.push_back(response.call_id);
            self.bytes = self.bytes.saturating_add(response.rows.len());
        }
        while self.order.len() > RECENT || self.bytes > RECENT_BYTES {
            let Some(oldest) = self.order.pop_front() else { break };
            if let Some((_, gone)) = self.answers.remove(&oldest) {
                self.bytes = self.bytes.saturating_sub(gone.rows.len());
            }
        }
    }
}

/// Serves one stream until it ends, its answers are no longer wanted, or `stop` is cancelled: then no new
/// call is read and those in flight are answered.
pub(crate) async fn serve<S, E>(
    inbound: S,
    outbound: mpsc::Sender<ForwardResponse>,
    door: Door,
    stop: CancellationToken,
) where
    S: Stream<Item = Result<ForwardRequest, E>> + Unpin,
{
    let mut inbound = inbound;
    let mut calls = FuturesUnordered::new();
    let mut session = Session::default();
    let mut open = true;
    while open || !calls.is_empty() {
        // Cancel-safe: `next` of both streams, `closed` and `cancelled` lose nothing when dropped.
        tokio::select! {
            biased;
            () = outbound.closed() => return,
            Some(response) = calls.next(), if !calls.is_empty() => {
                for response in session.finish(response) {
                    if outbound.send(response).await.is_err() {
                        return;
                    }
                }
            }
            () = stop.cancelled(), if open => open = false,
            next = inbound.next(), if open && session.in_flight < IN_FLIGHT => match next {
                Some(Ok(request)) => match session.begin(&request) {
                    Begin::Compute => calls.push(door.clone().call(request)),
                    Begin::Wait => {}
                    Begin::Answer(response) => {
                        door.metrics.repeated.inc();
                        if outbound.send(response).await.is_err() {
                            return;
                        }
                    }
                },
                Some(Err(_)) => return,
                None => open = false,
            },
        }
    }
}

/// What to do with a request that came in.
enum Begin {
    /// A new id.
    Compute,
    /// An id that is being computed: it is answered once more then.
    Wait,
    /// The answer is known.
    Answer(ForwardResponse),
}

/// What one stream has in flight and has had answered.
#[derive(Default)]
struct Session {
    /// By id: the request, and how many answers are owed.
    waiting: HashMap<u64, (Print, usize)>,
    /// Answers owed in all.
    in_flight: usize,
    recent: Recent,
}

impl Session {
    fn begin(&mut self, request: &ForwardRequest) -> Begin {
        let print = Print::from(request);
        let known = self.recent.answers.get(&request.call_id);
        let other = |first: &Print| *first != print;
        let reused = known.is_some_and(|(first, _)| other(first))
            || self.waiting.get(&request.call_id).is_some_and(|(first, _)| other(first));
        if reused {
            let detail = "call_id was used for another request on this stream: give each call its own";
            return Begin::Answer(Refusal::new(ForwardStatus::Invalid, detail).into_wire(request.call_id));
        }
        if let Some((_, response)) = known {
            return Begin::Answer(response.clone());
        }
        self.in_flight = self.in_flight.saturating_add(1);
        match self.waiting.get_mut(&request.call_id) {
            Some((_, owed)) => {
                *owed = owed.saturating_add(1);
                Begin::Wait
            }
            None => {
                self.waiting.insert(request.call_id, (print, 1));
                Begin::Compute
            }
        }
    }

    /// The answers that a finished call owes.
    fn finish(&mut self, response: ForwardResponse) -> Vec<ForwardResponse> {
        let Some((print, owed)) = self.waiting.remove(&response.call_id) else { return Vec::new() };
        self.in_flight = self.in_flight.saturating_sub(owed);
        self.recent.keep(print, &response);
        vec![response; owed]
    }
}
