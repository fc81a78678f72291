//! Every metric of a worker: names, labels and help in one place. The registry puts `berth_worker_` before
//! each name.

use berth_proto::v1::{ForwardResponse, ForwardStatus};
use berth_runtime::telemetry::Described;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// All of them.
pub const METRICS: &[Described] = &[CALLS, QUEUE_FULL, ABANDONED, TOKENS, CALL_SECONDS, REPEATED, LOADS, READY_BYTES];

const CALLS: Described = Described::counter("calls", &["status"], "Expert calls answered, by status");
const QUEUE_FULL: Described = Described::counter("queue_full", &[], "Expert calls refused by a full queue");
const ABANDONED: Described = Described::counter("abandoned", &[], "Expert calls given up before their turn");
const TOKENS: Described = Described::counter("tokens", &[], "Rows computed");
const CALL_SECONDS: Described = Described::histogram("call_seconds", &[], "Time from receipt to answer");
const REPEATED: Described = Described::counter("repeated", &[], "Calls answered from recent answers");
const LOADS: Described = Described::counter("loads", &["outcome"], "Shelves whose loading ended: done or failed");
const READY_BYTES: Described = Described::gauge("ready_bytes", &[], "Packed bytes of ready shelves");

/// How a load ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct OutcomeLabel {
    outcome: &'static str,
}

/// How a call ended; one of the words of `ForwardStatus`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct StatusLabel {
    status: &'static str,
}

/// The counters of one worker process.
#[derive(Debug)]
pub(crate) struct Metrics {
    /// Calls answered, by status.
    pub(crate) calls: Family<StatusLabel, Counter>,
    /// Calls refused because the queue was full.
    pub(crate) queue_full: Counter,
    /// Calls that nobody waited for any more when their turn came.
    pub(crate) abandoned: Counter,
    /// Rows computed.
    pub(crate) tokens: Counter,
    /// Seconds from receipt to answer.
    pub(crate) seconds: Histogram,
    /// Calls answered from the cache of recent answers.
    pub(crate) repeated: Counter,
    /// Loads that ended, by outcome.
    pub(crate) loads: Family<OutcomeLabel, Counter>,
    /// Packed bytes of ready shelves, each expert of a shelf counted once.
    pub(crate) ready_bytes: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let bounds = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0];
        Self {
            calls: Family::default(),
            queue_full: Counter::default(),
            abandoned: Counter::default(),
            tokens: Counter::default(),
            seconds: Histogram::new(bounds),
            repeated: Counter::default(),
            loads: Family::default(),
            ready_bytes: Gauge::default(),
        }
    }
}

impl Metrics {
    /// Names everything in `registry`.
    pub(crate) fn register(&self, registry: &mut Registry) {
        CALLS.add(registry, self.calls.clone());
        QUEUE_FULL.add(registry, self.queue_full.clone());
        ABANDONED.add(registry, self.abandoned.clone());
        TOKENS.add(registry, self.tokens.clone());
        CALL_SECONDS.add(registry, self.seconds.clone());
        REPEATED.add(registry, self.repeated.clone());
        LOADS.add(registry, self.loads.clone());
        READY_BYTES.add(registry, self.ready_bytes.clone());
    }

    /// Counts one load.
    pub(crate) fn loaded(&self, done: bool) {
        self.loads.get_or_create(&OutcomeLabel { outcome: if done { "done" } else { "failed" } }).inc();
    }

    /// Counts one answer.
    pub(crate) fn answered(&self, response: &ForwardResponse, seconds: f64) {
        let status = ForwardStatus::try_from(response.status).unwrap_or_default();
        self.calls.get_or_create(&StatusLabel { status: word(status) }).inc();
        self.seconds.observe(seconds);
    }

    /// Calls answered with rows, and calls refused, since the start.
    #[must_use]
    pub(crate) fn totals(&self) -> (u64, u64) {
        let count = |status| self.calls.get_or_create(&StatusLabel { status: word(status) }).get();
        let refused = [
            ForwardStatus::DeviceLost,
            ForwardStatus::NotHeld,
            ForwardStatus::Overloaded,
            ForwardStatus::Invalid,
            ForwardStatus::Deadline,
            ForwardStatus::Failed,
        ];
        (count(ForwardStatus::Ok), refused.into_iter().map(count).sum())
    }
}

const fn word(status: ForwardStatus) -> &'static str {
    match status {
        ForwardStatus::Unspecified => "unspecified",
        ForwardStatus::Ok => "ok",
        ForwardStatus::DeviceLost => "device_lost",
        ForwardStatus::NotHeld => "not_held",
        ForwardStatus::Overloaded => "overloaded",
        ForwardStatus::Invalid => "invalid",
        ForwardStatus::Deadline => "deadline",
        ForwardStatus::Failed => "failed",
    }
}
