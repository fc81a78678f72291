//! Every metric of an agent, `berth_agent_…`.

use berth_runtime::telemetry;
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge};

/// Label sets; values are words of the health vocabulary or fixed names.
type Labels = Vec<(&'static str, String)>;

/// The metrics. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// Facts taken, by detector's kind of fact.
    pub facts: Family<Labels, Counter>,
    /// Transitions said, by reason.
    pub transitions: Family<Labels, Counter>,
    /// Notes said, by reason.
    pub notes: Family<Labels, Counter>,
    /// Notes that a storm swallowed.
    pub swallowed: Counter,
    /// Devices by admission.
    pub devices: Family<Labels, Gauge>,
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
}

impl Metrics {
    /// Registers all of them.
    #[must_use]
    pub fn register(metrics: &telemetry::Metrics) -> Self {
        let ours = Self::default();
        metrics.register(|to| {
            to.register("facts", "Facts taken by the ledger", ours.facts.clone());
            to.register("health_transitions", "Health transitions said", ours.transitions.clone());
            to.register("health_notes", "Notes that change no state", ours.notes.clone());
            to.register("health_notes_swallowed", "Notes dropped in a storm", ours.swallowed.clone());
            to.register("devices", "Devices by admission", ours.devices.clone());
            to.register("kernel_log_lost", "Times that kernel records were lost", ours.log_lost.clone());
            to.register("kernel_log_damaged", "Kernel records not understood", ours.log_damaged.clone());
            to.register("kernel_log_foreign", "Kernel records written by programs", ours.log_foreign.clone());
            to.register("scheduler_connected", "1 while the scheduler's stream is open", ours.connected.clone());
            to.register("orders_refused", "Orders refused", ours.refused_orders.clone());
            to.register("worker_deaths", "Workers that died unasked", ours.worker_deaths.clone());
            to.register("status_writes", "Writes of the AcceleratorNode", ours.status_writes.clone());
        });
        ours
    }
}
