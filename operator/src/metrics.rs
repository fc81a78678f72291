//! Every metric of the operator. Labels take a fixed set of values (kinds, verbs, categories), or one per object
//! that an administrator makes (queues, deployments, device products).

use std::{collections::BTreeMap, time::Duration};

use berth_runtime::{
    Clock,
    telemetry::{Described, Gauges, Seconds},
};
use berth_types::Action;
use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use crate::{
    accelerator_node::{
        book::{BUDGETS, Book, Phase},
        remediation::TOLD,
    },
    error::Category,
    survey::Survey,
};

type Labels = Vec<(&'static str, &'static str)>;

/// All of them.
pub const METRICS: &[Described] = &[
    RECONCILES,
    ERRORS,
    SECONDS,
    IN_FLIGHT,
    WRITES,
    WRITE_SECONDS,
    DEVICES,
    CAPACITY_TOTAL,
    CAPACITY_ALLOCATABLE,
    CAPACITY_USED,
    CAPACITY_TOTAL_BYTES,
    CAPACITY_ALLOCATABLE_BYTES,
    DEMAND_INSTANCES,
    DEMAND_DEVICES,
    GRANTED_INSTANCES,
    READY_INSTANCES,
    WAITING,
    QUEUE_QUOTA,
    QUEUE_USED,
    QUEUE_BORROWED,
    QUEUE_WAITING,
    REMEDIATION_OPERATIONS,
    REMEDIATION_WAITING,
    REMEDIATION_EVENTS,
    EVENTS_HELD_BACK,
];

const POOL: &[&str] = &["vendor", "pool"];
const DEPLOYMENT: &[&str] = &["namespace", "deployment"];
const QUEUE: &[&str] = &["queue"];

const RECONCILES: Described =
    Described::counter("reconciles", &["kind", "outcome"], "Passes over one object: done, failed or abandoned");
const ERRORS: Described =
    Described::counter("reconcile_errors", &["kind", "category"], "Passes that failed, by category");
const SECONDS: Described = Described::histogram("reconcile_seconds", &["kind"], "Duration of passes");
const IN_FLIGHT: Described = Described::gauge("reconciles_in_flight", &["kind"], "Passes that are under way");
const WRITES: Described = Described::counter(
    "writes",
    &["verb", "kind", "outcome"],
    "Writing calls to the API server: done, refused or late",
);
const WRITE_SECONDS: Described =
    Described::histogram("write_seconds", &["verb"], "Duration of writing calls to the API server");
const DEVICES: Described = Described::gauge(
    "devices",
    &["vendor", "pool", "health", "admission"],
    "Devices by their state, as agents report it",
);
const CAPACITY_TOTAL: Described = Described::gauge("capacity_total_devices", POOL, "Devices that exist");
const CAPACITY_ALLOCATABLE: Described =
    Described::gauge("capacity_allocatable_devices", POOL, "Devices that new replicas may go to");
const CAPACITY_USED: Described =
    Described::gauge("capacity_used_devices", POOL, "Devices that a placement is assigned to");
const CAPACITY_TOTAL_BYTES: Described =
    Described::gauge("capacity_total_bytes", POOL, "Memory of the devices that exist");
const CAPACITY_ALLOCATABLE_BYTES: Described =
    Described::gauge("capacity_allocatable_bytes", POOL, "Memory of the devices that new replicas may go to");
const DEMAND_INSTANCES: Described =
    Described::gauge("demand_instances", DEPLOYMENT, "Instances that a deployment wants");
const DEMAND_DEVICES: Described = Described::gauge(
    "demand_devices",
    DEPLOYMENT,
    "Devices that the wanted instances need; absent while that is unknown",
);
const GRANTED_INSTANCES: Described =
    Described::gauge("granted_instances", DEPLOYMENT, "Instances that a deployment may have");
const READY_INSTANCES: Described = Described::gauge("ready_instances", DEPLOYMENT, "Instances that answer requests");
const WAITING: Described =
    Described::gauge("waiting_deployments", &["reason"], "Deployments that get less than they want, by why");
const QUEUE_QUOTA: Described = Described::gauge("queue_quota_devices", QUEUE, "Devices that a queue is sure of");
const QUEUE_USED: Described = Described::gauge("queue_used_devices", QUEUE, "Devices granted in a queue");
const QUEUE_BORROWED: Described = Described::gauge("queue_borrowed_devices", QUEUE, "Of these, beyond its quota");
const QUEUE_WAITING: Described =
    Described::gauge("queue_waiting_deployments", QUEUE, "Deployments that wait in a queue");

const REMEDIATION_OPERATIONS: Described =
    Described::gauge("remediation_operations", &["action", "phase"], "Operations of remediation that are under way");
const REMEDIATION_WAITING: Described = Described::gauge(
    "remediation_waiting_devices",
    &["budget"],
    "Devices that want an action and wait because a budget of remediation is spent: cluster, pool or domain",
);
const REMEDIATION_EVENTS: Described =
    Described::counter("remediation_events", &["reason"], "What remediation told, by the reason of the event");
const EVENTS_HELD_BACK: Described =
    Described::counter("events_held_back", &[], "Events about devices that were too many to be told");

/// The operator's metrics; clones share them.
#[derive(Clone, Debug, Default)]
pub struct OperatorMetrics {
    reconciles: Family<Labels, Counter>,
    errors: Family<Labels, Counter>,
    seconds: Seconds,
    in_flight: Family<Labels, Gauge>,
    writes: Family<Labels, Counter>,
    write_seconds: Seconds,
    devices: Gauges,
    total: Gauges,
    allocatable: Gauges,
    used: Gauges,
    total_bytes: Gauges,
    allocatable_bytes: Gauges,
    demand: Gauges,
    demand_devices: Gauges,
    granted: Gauges,
    ready: Gauges,
    waiting: Gauges,
    queue_quota: Gauges,
    queue_used: Gauges,
    queue_borrowed: Gauges,
    queue_waiting: Gauges,
    operations: Gauges,
    remediation_waiting: Gauges,
    remediation_events: Family<Labels, Counter>,
    held_back: Counter,
}

impl OperatorMetrics {
    /// Registers them under `berth_operator_`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        // What may happen for the first time is there from the start, so that its first time is seen.
        for kind in ["ModelDeployment", "Node", "Remediation"] {
            for category in Category::ALL {
                drop(metrics.errors.get_or_create(&vec![("kind", kind), ("category", category.as_str())]));
            }
        }
        for reason in TOLD {
            drop(metrics.remediation_events.get_or_create(&vec![("reason", reason)]));
        }
        RECONCILES.add(registry, metrics.reconciles.clone());
        ERRORS.add(registry, metrics.errors.clone());
        SECONDS.add(registry, metrics.seconds.clone());
        IN_FLIGHT.add(registry, metrics.in_flight.clone());
        WRITES.add(registry, metrics.writes.clone());
        WRITE_SECONDS.add(registry, metrics.write_seconds.clone());
        REMEDIATION_EVENTS.add(registry, metrics.remediation_events.clone());
        EVENTS_HELD_BACK.add(registry, metrics.held_back.clone());
        for (described, gauges) in metrics.surveyed() {
            described.add(registry, gauges.clone());
        }
        metrics
    }

    fn surveyed(&self) -> [(Described, &Gauges); 17] {
        [
            (DEVICES, &self.devices),
            (CAPACITY_TOTAL, &self.total),
            (CAPACITY_ALLOCATABLE, &self.allocatable),
            (CAPACITY_USED, &self.used),
            (CAPACITY_TOTAL_BYTES, &self.total_bytes),
            (CAPACITY_ALLOCATABLE_BYTES, &self.allocatable_bytes),
            (DEMAND_INSTANCES, &self.demand),
            (DEMAND_DEVICES, &self.demand_devices),
            (GRANTED_INSTANCES, &self.granted),
            (READY_INSTANCES, &self.ready),
            (WAITING, &self.waiting),
            (QUEUE_QUOTA, &self.queue_quota),
            (QUEUE_USED, &self.queue_used),
            (QUEUE_BORROWED, &self.queue_borrowed),
            (QUEUE_WAITING, &self.queue_waiting),
            (REMEDIATION_OPERATIONS, &self.operations),
            (REMEDIATION_WAITING, &self.remediation_waiting),
        ]
    }

    /// A pass over an object of `kind` begins. Unless it is [finished](Pass::finish), it counts as abandoned.
    pub(crate) fn begin(&self, kind: &'static str, clock: &Clock) -> Pass {
        self.in_flight.get_or_create(&vec![("kind", kind)]).inc();
        Pass { metrics: self.clone(), kind, clock: clock.clone(), began: clock.now(), outcome: "abandoned" }
    }

    pub(crate) fn failed(&self, kind: &'static str, category: &'static str) {
        self.errors.get_or_create(&vec![("kind", kind), ("category", category)]).inc();
    }

    pub(crate) fn wrote(&self, verb: &'static str, kind: &'static str, outcome: &'static str, took: Duration) {
        self.writes.get_or_create(&vec![("verb", verb), ("kind", kind), ("outcome", outcome)]).inc();
        self.write_seconds.observe(&[("verb", verb)], took);
    }

    /// Shows what a pass over everything found.
    pub(crate) fn survey(&self, survey: Survey) {
        let Survey {
            devices,
            total,
            allocatable,
            used,
            total_bytes,
            allocatable_bytes,
            demand,
            demand_devices,
            granted,
            ready,
            waiting,
            queue_quota,
            queue_used,
            queue_borrowed,
            queue_waiting,
        } = survey;
        self.devices.replace(devices);
        self.total.replace(total);
        self.allocatable.replace(allocatable);
        self.used.replace(used);
        self.total_bytes.replace(total_bytes);
        self.allocatable_bytes.replace(allocatable_bytes);
        self.demand.replace(demand);
        self.demand_devices.replace(demand_devices);
        self.granted.replace(granted);
        self.ready.replace(ready);
        self.waiting.replace(waiting);
        self.queue_quota.replace(queue_quota);
        self.queue_used.replace(queue_used);
        self.queue_borrowed.replace(queue_borrowed);
        self.queue_waiting.replace(queue_waiting);
    }

    /// Shows the operations that are under way, and who waits for the end of one.
    pub(crate) fn remediating(&self, book: &Book, waiting: &BTreeMap<&'static str, u32>) {
        let mut gauges = BTreeMap::<Vec<(&'static str, String)>, f64>::new();
        for action in [Action::ResetDevice, Action::ResetGroup, Action::RebootNode] {
            for phase in [Phase::Emptying, Phase::Ordered, Phase::Validating] {
                gauges.insert(vec![("action", action.to_string()), ("phase", format!("{phase:?}"))], 0.0);
            }
        }
        for operation in book.operations.values() {
            let labels = vec![("action", operation.action.to_string()), ("phase", format!("{:?}", operation.phase))];
            *gauges.entry(labels).or_default() += 1.0;
        }
        self.operations.replace(gauges);
        let waits = |budget: &str| waiting.get(budget).copied().unwrap_or(0);
        let gauges = BUDGETS.map(|budget| (vec![("budget", budget.to_owned())], f64::from(waits(budget))));
        self.remediation_waiting.replace(gauges);
    }

    pub(crate) fn remediated(&self, reason: &'static str) {
        self.remediation_events.get_or_create(&vec![("reason", reason)]).inc();
    }

    pub(crate) fn unspoken(&self) {
        self.held_back.inc();
    }

    /// This process leads no more: what it found is for the next leader to say.
    pub(crate) fn resigned(&self) {
        self.surveyed().into_iter().for_each(|(_, gauges)| gauges.clear());
    }
}

/// A pass that is under way.
#[derive(Debug)]
pub(crate) struct Pass {
    metrics: OperatorMetrics,
    kind: &'static str,
    clock: Clock,
    began: Duration,
    outcome: &'static str,
}

impl Pass {
    /// It came to its end.
    pub(crate) fn finish(mut self, done: bool) {
        self.outcome = if done { "done" } else { "failed" };
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let kind = vec![("kind", self.kind)];
        self.metrics.in_flight.get_or_create(&kind).dec();
        let took = self.clock.now().saturating_sub(self.began);
        self.metrics.seconds.observe(&kind, took);
        self.metrics.reconciles.get_or_create(&vec![("kind", self.kind), ("outcome", self.outcome)]).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_runtime::telemetry::Metrics;

    #[test]
    fn a_pass_that_is_dropped_half_way_counts_as_abandoned() {
        let all = Metrics::new("operator");
        let metrics = all.register(OperatorMetrics::register);
        let clock = Clock::discrete();
        metrics.begin("Node", &clock).finish(true);
        metrics.begin("Node", &clock).finish(false);
        let open = metrics.begin("Node", &clock);
        assert!(all.encode().contains("berth_operator_reconciles_in_flight{kind=\"Node\"} 1"));
        drop(open);
        let text = all.encode();
        for outcome in ["done", "failed", "abandoned"] {
            let line = format!("berth_operator_reconciles_total{{kind=\"Node\",outcome=\"{outcome}\"}} 1");
            assert!(text.contains(&line), "{line} in {text}");
        }
        assert!(text.contains("berth_operator_reconciles_in_flight{kind=\"Node\"} 0"), "{text}");
        assert!(text.contains("berth_operator_reconcile_seconds_count{kind=\"Node\"} 3"), "{text}");
    }
}
