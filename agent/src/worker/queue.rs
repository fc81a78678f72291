//! Calls that wait for the device, and the threads that compute them. Bounded in calls and in bytes: what
//! does not fit is refused at once, so that a caller can go to another replica while there is time.
//!
//! The threads never look at a clock: whoever waits for an answer decides how long, and a call that nobody
//! waits for any more is skipped.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

use berth_kernels::Backend;
use berth_proto::v1::{ForwardRequest, ForwardResponse, ForwardStatus};
use tokio::sync::{oneshot, watch};

use super::{
    forward::{self, Refusal},
    metrics::Metrics,
    presence::Presence,
    shelf::Shelves,
    tally::Tally,
};

/// Bounds of the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueueLimits {
    /// Most calls that wait.
    pub(crate) calls: usize,
    /// Most bytes of activations that wait; a single call may be larger when nothing else waits.
    pub(crate) bytes: usize,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self { calls: 256, bytes: 512 << 20 }
    }
}

/// The queue had no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Full;

struct Job {
    request: ForwardRequest,
    reply: oneshot::Sender<ForwardResponse>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    bytes: usize,
    closed: bool,
}

/// Calls in order of arrival.
pub(crate) struct Queue {
    state: Mutex<State>,
    ready: Condvar,
    limits: QueueLimits,
}

impl Queue {
    /// An empty queue.
    #[must_use]
    pub(crate) fn new(limits: QueueLimits) -> Self {
        Self { state: Mutex::default(), ready: Condvar::new(), limits }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a call; its answer comes through the receiver. Dropping the receiver takes the call back.
    ///
    /// # Errors
    /// [`Full`] when it would exceed a limit or the queue is closed.
    pub(crate) fn offer(&self, request: ForwardRequest) -> Result<oneshot::Receiver<ForwardResponse>, Full> {
        let mut state = self.lock();
        // Calls that were given up make room first.
        let abandoned = |job: &Job| job.reply.is_closed();
        if state.jobs.iter().any(abandoned) {
            state.jobs.retain(|job| !abandoned(job));
            state.bytes = state.jobs.iter().map(|job| job.request.rows.len()).sum();
        }
        let bytes = state.bytes.saturating_add(request.rows.len());
        let over = state.jobs.len() >= self.limits.calls || (bytes > self.limits.bytes && !state.jobs.is_empty());
        if state.closed || over {
            return Err(Full);
        }
        let (reply, answer) = oneshot::channel();
        state.jobs.push_back(Job { request, reply });
        state.bytes = bytes;
        drop(state);
        self.ready.notify_one();
        Ok(answer)
    }

    /// Takes no more calls; threads end when what waits is done.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.ready.notify_all();
    }

    /// The next call; waits for one. `None` when the queue is closed and empty.
    fn take(&self) -> Option<Job> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                state.bytes = state.bytes.saturating_sub(job.request.rows.len());
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What a computing thread works with.
#[derive(Clone)]
pub(crate) struct Bench {
    /// Where calls come from.
    pub(crate) queue: Arc<Queue>,
    /// What is ready.
    pub(crate) shelves: watch::Receiver<Arc<Shelves>>,
    /// What computes.
    pub(crate) backend: Arc<dyn Backend>,
    /// Whether the device is there.
    pub(crate) presence: Arc<Presence>,
    /// Where tokens are counted.
    pub(crate) tally: Arc<Tally>,
    /// Where calls are counted.
    pub(crate) metrics: Arc<Metrics>,
}

impl Bench {
    /// Starts `count` threads that compute until the queue is closed. Two let one call's bytes be read
    /// while another computes.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(crate) fn start(&self, count: usize) -> std::io::Result<Vec<JoinHandle<()>>> {
        let thread = |index| {
            let bench = self.clone();
            std::thread::Builder::new().name(format!("forward-{index}")).spawn(move || bench.run())
        };
        (0..count).map(thread).collect()
    }

    fn run(&self) {
        while let Some(job) = self.queue.take() {
            if job.reply.is_closed() {
                self.metrics.abandoned.inc();
                continue;
            }
            // Nobody listens if the call was given up meanwhile.
            drop(job.reply.send(self.compute(&job.request)));
        }
    }

    fn compute(&self, request: &ForwardRequest) -> ForwardResponse {
        let lost = || Refusal::lost("it left the bus").into_wire(request.call_id);
        if self.presence.lost() {
            return lost();
        }
        let shelves = Arc::clone(&self.shelves.borrow());
        // A panic in a kernel is a bug of ours, but not a reason to lose the other calls of this device.
        let outcome = catch_unwind(AssertUnwindSafe(|| forward::answer(request, &shelves, &*self.backend)));
        match outcome {
            // What a device computed while it left cannot be trusted.
            Ok(Ok(_)) if self.presence.lost() => lost(),
            Ok(Ok((response, counted))) => {
                self.metrics.tokens.inc_by(request.tokens.into());
                self.tally.count(&counted);
                response
            }
            Ok(Err(refusal)) => refusal.into_wire(request.call_id),
            Err(_) => {
                tracing::error!(layer = request.layer, revision = request.revision, "a kernel panicked");
                let detail = "the kernel broke off: use another replica and look at this worker's log";
                Refusal::new(ForwardStatus::Failed, detail).into_wire(request.call_id)
            }
        }
    }
}
