//! Every metric of an agent, `berth_agent_…`. Labels are words of the health vocabulary, fixed names, and the devices
//! of one node. What is told of the devices themselves is `accelerator_…`, in `vitals`.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use berth_proto::v1;
use berth_runtime::telemetry::{self, Described, Gauges, Seconds, count, large};
use berth_types::{Health, Reason, Vendor};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
    },
};

use crate::{
    health::{fact::Local, ledger::Standing},
    node::Shown,
    vitals::{Board, accelerator},
};

/// Label sets; values are words of the health vocabulary or fixed names.
type Labels = Vec<(&'static str, String)>;

/// All of them.
pub const METRICS: &[Described] = &[
    FACTS,
    ACTION_SECONDS,
    TRANSITIONS,
    NOTES,
    SWALLOWED,
    DEVICES,
    HEALTHY,
    LOG_LOST,
    LOG_DAMAGED,
    LOG_FOREIGN,
    CONNECTED,
    REFUSED,
    DEATHS,
    STATUS_WRITES,
    STATE_WRITES,
    WORKER_CALLS,
    WORKER_REFUSED,
    WORKER_BYTES,
];

const FACTS: Described = Described::counter("facts", &["kind"], "Facts taken by the ledger");
const ACTION_SECONDS: Described = Described::histogram(
    "fault_to_action_seconds",
    &["vendor"],
    "Time from a fact that made a device worse until the scheduler's stream was given the report",
);
const TRANSITIONS: Described = Described::counter("health_transitions", &["reason"], "Health transitions said");
const NOTES: Described = Described::counter("health_notes", &["reason"], "Notes that change no state");
const SWALLOWED: Described = Described::counter("health_notes_swallowed", &[], "Notes dropped in a storm");
const DEVICES: Described =
    Described::gauge("devices", &["vendor", "pool", "health", "admission"], "Devices of this node by their state");
const HEALTHY: Described =
    Described::gauge("device_healthy", &["device", "vendor", "pool"], "1 while the device is Healthy, else 0");
const LOG_LOST: Described = Described::counter("kernel_log_lost", &[], "Times that kernel records were lost");
const LOG_DAMAGED: Described = Described::counter("kernel_log_damaged", &[], "Kernel records not understood");
const LOG_FOREIGN: Described = Described::counter("kernel_log_foreign", &[], "Kernel records written by programs");
const CONNECTED: Described = Described::gauge("scheduler_connected", &[], "1 while the scheduler's stream is open");
const REFUSED: Described = Described::counter("orders_refused", &["why"], "Orders of the scheduler that were refused");
const DEATHS: Described = Described::counter("worker_deaths", &[], "Workers that died unasked");
const STATUS_WRITES: Described = Described::counter("status_writes", &["outcome"], "Writes of the AcceleratorNode");
const STATE_WRITES: Described =
    Described::counter("state_writes", &["outcome"], "Writes of the agent's own state file");
const WORKER_CALLS: Described =
    Described::counter("worker_calls", &["device"], "Expert calls that the device's worker answered, its life long");
const WORKER_REFUSED: Described =
    Described::counter("worker_calls_refused", &["device"], "Of these, calls that it refused");
const WORKER_BYTES: Described =
    Described::gauge("worker_held_bytes", &["device"], "Packed bytes of the shelves on the device");

/// The metrics. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// Facts taken, by detector's kind of fact.
    pub facts: Family<Labels, Counter>,
    /// From fact to report.
    action: Seconds,
    /// Transitions said, by reason.
    pub transitions: Family<Labels, Counter>,
    /// Notes said, by reason.
    pub notes: Family<Labels, Counter>,
    /// Notes that a storm swallowed.
    pub swallowed: Counter,
    devices: Gauges,
    healthy: Gauges,
    /// Kernel log: times that records were overwritten before they were read.
    pub log_lost: Counter,
    /// Kernel log: records that could not be parsed.
    pub log_damaged: Counter,
    /// Kernel log: records that programs wrote.
    pub log_foreign: Counter,
    /// 1 while the scheduler's stream is open.
    pub connected: Gauge,
    /// Orders refused, by why.
    pub refused_orders: Family<Labels, Counter>,
    /// Workers that died without being asked to.
    pub worker_deaths: Counter,
    /// Writes to the API server, by outcome.
    pub status_writes: Family<Labels, Counter>,
    /// Writes of the state file, by outcome.
    pub state_writes: Family<Labels, Counter>,
    workers: Workers,
    /// Vital signs of the devices.
    pub board: Board,
}

impl Metrics {
    /// Registers all of them.
    #[must_use]
    pub fn register(metrics: &telemetry::Metrics) -> Self {
        let ours = Self::default();
        // What may happen for the first time is there from the start, so that its first time is seen.
        for reason in Reason::ALL.iter().map(|reason| reason.as_str()).chain(["none"]) {
            drop(ours.transitions.get_or_create(&vec![("reason", reason.to_owned())]));
        }
        for vendor in [Vendor::Nvidia, Vendor::Ascend] {
            ours.action.start(&[("vendor", vendor.as_str())]);
        }
        metrics.register(|to| {
            FACTS.add(to, ours.facts.clone());
            ACTION_SECONDS.add(to, ours.action.clone());
            TRANSITIONS.add(to, ours.transitions.clone());
            NOTES.add(to, ours.notes.clone());
            SWALLOWED.add(to, ours.swallowed.clone());
            DEVICES.add(to, ours.devices.clone());
            HEALTHY.add(to, ours.healthy.clone());
            LOG_LOST.add(to, ours.log_lost.clone());
            LOG_DAMAGED.add(to, ours.log_damaged.clone());
            LOG_FOREIGN.add(to, ours.log_foreign.clone());
            CONNECTED.add(to, ours.connected.clone());
            REFUSED.add(to, ours.refused_orders.clone());
            DEATHS.add(to, ours.worker_deaths.clone());
            STATUS_WRITES.add(to, ours.status_writes.clone());
            STATE_WRITES.add(to, ours.state_writes.clone());
            to.register_collector(Box::new(ours.workers.clone()));
        });
        accelerator::register(metrics, &ours.board);
        ours
    }

    /// The report of a device that became worse was given to the scheduler's stream, so long after the fact.
    pub fn acted(&self, vendor: Vendor, took: Duration) {
        self.action.observe(&[("vendor", vendor.as_str())], took);
    }

    /// Shows this node and its devices as they are now said to be.
    pub fn show(&self, devices: &BTreeMap<Local, Shown>, node: &Standing) {
        self.board.show(devices, node);
        let mut states: BTreeMap<Labels, f64> = BTreeMap::new();
        let mut healthy = Vec::with_capacity(devices.len());
        for (local, shown) in devices {
            let pool = || [("vendor", shown.info.vendor.to_string()), ("pool", shown.info.product.clone())];
            let state = shown.standing.state;
            let words = [("health", state.health.to_string()), ("admission", state.admission.to_string())];
            *states.entry(pool().into_iter().chain(words).collect()).or_default() += 1.0;
            let labels: Labels = [("device", local.clone())].into_iter().chain(pool()).collect();
            healthy.push((labels, count(usize::from(state.health == Health::Healthy))));
        }
        self.devices.replace(states);
        self.healthy.replace(healthy);
    }

    /// What the worker of a device reports.
    pub fn worker(&self, local: &str, report: &v1::WorkerReport) {
        let bytes = report.shelves.iter().map(|shelf| shelf.bytes).sum();
        let totals = Totals { calls: report.calls, refused: report.refused, bytes };
        self.workers.lock().insert(local.to_owned(), totals);
        self.board.host(local, true);
    }

    /// The device has no worker any more.
    pub fn worker_gone(&self, local: &str) {
        self.workers.lock().remove(local);
        self.board.host(local, false);
    }
}

/// What one worker has told.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    calls: u64,
    refused: u64,
    bytes: u64,
}

/// What the workers told last: they count themselves, this only says it again, since nobody scrapes a worker's own
/// port.
#[derive(Clone, Debug, Default)]
struct Workers(Arc<Mutex<BTreeMap<Local, Totals>>>);

impl Workers {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<Local, Totals>> {
        // A map of plain values is whole between statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collector for Workers {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let workers = self.lock().clone();
        if workers.is_empty() {
            return Ok(());
        }
        for (described, refused) in [(WORKER_CALLS, false), (WORKER_REFUSED, true)] {
            let mut family = encoder.encode_descriptor(described.name, described.help, None, MetricType::Counter)?;
            for (local, totals) in &workers {
                let labels = [("device", local.as_str())];
                let value = if refused { totals.refused } else { totals.calls };
                ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
            }
        }
        let bytes = WORKER_BYTES;
        let mut family = encoder.encode_descriptor(bytes.name, bytes.help, None, MetricType::Gauge)?;
        for (local, totals) in &workers {
            let labels = [("device", local.as_str())];
            ConstGauge::new(large(totals.bytes)).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_is_gone_is_not_scraped() {
        let all = telemetry::Metrics::new("agent");
        let metrics = Metrics::register(&all);
        let shelf = v1::ShelfState { bytes: 70, ..Default::default() };
        let report = v1::WorkerReport { shelves: vec![shelf], calls: 5, refused: 2, loads: Vec::new() };
        metrics.worker("0000:3b:00.0", &report);
        let text = all.encode();
        for line in [
            "berth_agent_worker_calls_total{device=\"0000:3b:00.0\"} 5\n",
            "berth_agent_worker_calls_refused_total{device=\"0000:3b:00.0\"} 2\n",
            "berth_agent_worker_held_bytes{device=\"0000:3b:00.0\"} 70.0\n",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
        metrics.worker_gone("0000:3b:00.0");
        assert!(!all.encode().contains("0000:3b:00.0"));
    }
}
