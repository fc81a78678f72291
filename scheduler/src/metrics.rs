//! Every metric of the scheduler: names, labels and help are here and nowhere else. What is told of placements and
//! devices is told by the leader alone.

use std::{collections::BTreeMap, time::Duration};

use berth_planner::Standing;
use berth_runtime::telemetry::{Described, Gauges, Labels, Metrics, Seconds, count, large};
use berth_types::PlacementName;
use prometheus_client::metrics::{counter::Counter, family::Family, gauge::Gauge};

use crate::{
    index::{Index, Placement},
    replan::Cause,
};

type Label = Vec<(&'static str, &'static str)>;

/// All of them.
pub const METRICS: &[Described] = &[
    PLANS,
    KEPT,
    REFUSED,
    COMMIT,
    SOLVE,
    MOVED,
    REPAIR,
    REPAIRS_OPEN,
    DELAYED,
    STREAMS,
    TURN,
    STORE_CALLS,
    STORE_SECONDS,
    STATUS_WRITES,
    PLACEMENTS,
    DEVICES,
    ASSIGNED,
    SERVING,
    BALANCEDNESS,
    LOST,
    READY_SLOTS,
    SLOTS,
    PLACED_DEVICES,
    PLACED_BYTES,
];

const OF: &[&str] = &["namespace", "placement"];

const PLANS: Described = Described::counter("plans", &["cause"], "Plans stored, by cause");
const KEPT: Described = Described::counter(
    "balance_kept",
    &[],
    "Looks at a placement's balance after which nothing moved: it would not pay",
);
const REFUSED: Described =
    Described::counter("plans_refused", &["by"], "Plans and statuses not stored, by what refused them");
const COMMIT: Described = Described::histogram("commit_seconds", &[], "Time from plan to stored assignment");
const SOLVE: Described = Described::histogram("solve_seconds", &[], "Time to solve and check one plan");
const MOVED: Described = Described::counter("moved_bytes", &[], "Expert bytes that plans made devices load");
const REPAIR: Described = Described::histogram(
    "repair_seconds",
    &["stage"],
    "Time from hearing that a device is gone: until runners were told, a plan was made, stored, and served",
);
const REPAIRS_OPEN: Described =
    Described::gauge("repairs_open", &[], "Placements whose loss of a device is not repaired yet");
const DELAYED: Described = Described::counter("orders_delayed", &["order"], "Orders that found their stream full");
const STREAMS: Described = Described::gauge("streams", &["kind"], "Open streams of agents and runners");
const TURN: Described = Described::histogram("turn_seconds", &[], "Duration of one turn of the ring");
const STORE_CALLS: Described = Described::counter(
    "store_calls",
    &["call", "outcome"],
    "Calls of the placement store: done, exists, deposed, full or failed",
);
const STORE_SECONDS: Described =
    Described::histogram("store_call_seconds", &["call"], "Duration of calls of the placement store");
const STATUS_WRITES: Described =
    Described::counter("status_writes", &["object", "outcome"], "Writes of a placement's status or a node's condition");
const PLACEMENTS: Described = Described::gauge("placements", &[], "ExpertPlacements known to the leader");
const DEVICES: Described = Described::gauge(
    "devices",
    &["vendor", "standing"],
    "Devices by what may be done with them: open, frozen, leaving, gone",
);
const ASSIGNED: Described =
    Described::gauge("placement_assigned_revision", OF, "Revision that a placement should be at");
const SERVING: Described = Described::gauge("placement_serving_revision", OF, "Revision that runners start steps on");
const BALANCEDNESS: Described = Described::gauge(
    "placement_balancedness_ratio",
    OF,
    "Mean load of a placement's devices over that of the slowest, 1 is perfect; absent until load was seen",
);
const LOST: Described = Described::gauge("placement_lost_experts", OF, "Experts without a live replica");
const READY_SLOTS: Described =
    Described::gauge("placement_ready_slots", OF, "Slots of the assigned revision that are loaded");
const SLOTS: Described = Described::gauge("placement_slots", OF, "Slots of the assigned revision");
const PLACED_DEVICES: Described = Described::gauge("placement_devices", OF, "Devices of the assigned revision");
const PLACED_BYTES: Described = Described::gauge("placement_bytes", OF, "Expert bytes of the assigned revision");

/// The scheduler's metrics; clones share them.
#[derive(Clone, Debug, Default)]
pub struct SchedulerMetrics {
    plans: Family<Label, Counter>,
    kept: Counter,
    refused: Family<Label, Counter>,
    commit: Seconds,
    solve: Seconds,
    moved_bytes: Counter,
    repair: Seconds,
    repairs_open: Gauge,
    full: Family<Label, Counter>,
    streams: Family<Label, Gauge>,
    turn: Seconds,
    store_calls: Family<Label, Counter>,
    store_seconds: Seconds,
    status_writes: Family<Label, Counter>,
    placements: Gauge,
    devices: Gauges,
    /// By placement, in the order of [`Self::PLACED`].
    placed: [Gauges; 8],
}

impl SchedulerMetrics {
    const PLACED: [Described; 8] =
        [ASSIGNED, SERVING, BALANCEDNESS, LOST, READY_SLOTS, SLOTS, PLACED_DEVICES, PLACED_BYTES];

    /// Registers all of them.
    #[must_use]
    pub fn register(metrics: &Metrics) -> Self {
        let own = Self::default();
        // What may happen for the first time is there from the start, so that its first time is seen.
        for cause in Cause::ALL {
            drop(own.plans.get_or_create(&vec![("cause", cause.as_str())]));
        }
        for stage in ["told", "planned", "stored", "served"] {
            own.repair.start(&[("stage", stage)]);
        }
        metrics.register(|registry| {
            PLANS.add(registry, own.plans.clone());
            KEPT.add(registry, own.kept.clone());
            REFUSED.add(registry, own.refused.clone());
            COMMIT.add(registry, own.commit.clone());
            SOLVE.add(registry, own.solve.clone());
            MOVED.add(registry, own.moved_bytes.clone());
            REPAIR.add(registry, own.repair.clone());
            REPAIRS_OPEN.add(registry, own.repairs_open.clone());
            DELAYED.add(registry, own.full.clone());
            STREAMS.add(registry, own.streams.clone());
            TURN.add(registry, own.turn.clone());
            STORE_CALLS.add(registry, own.store_calls.clone());
            STORE_SECONDS.add(registry, own.store_seconds.clone());
            STATUS_WRITES.add(registry, own.status_writes.clone());
            PLACEMENTS.add(registry, own.placements.clone());
            DEVICES.add(registry, own.devices.clone());
            for (described, gauges) in Self::PLACED.iter().zip(&own.placed) {
                described.add(registry, gauges.clone());
            }
        });
        own
    }

    /// A plan was stored.
    pub fn planned(&self, cause: &'static str, bytes: u64, took: Duration) {
        self.plans.get_or_create(&vec![("cause", cause)]).inc();
        self.moved_bytes.inc_by(bytes);
        self.commit.observe(&[], took);
    }

    /// A plan was made.
    pub fn solved(&self, took: Duration) {
        self.solve.observe(&[], took);
    }

    /// A look at the balance moved nothing.
    pub fn kept(&self) {
        self.kept.inc();
    }

    /// A plan was not stored.
    pub fn refused(&self, by: &'static str) {
        self.refused.get_or_create(&vec![("by", by)]).inc();
    }

    /// A repair reached a stage so long after the loss was heard.
    pub fn repaired(&self, stage: &'static str, took: Duration) {
        self.repair.observe(&[("stage", stage)], took);
    }

    /// Repairs that are under way.
    pub fn repairs_open(&self, open: usize) {
        self.repairs_open.set(i64::try_from(open).unwrap_or(i64::MAX));
    }

    /// Whether an order was sent; one that was not is counted.
    pub fn sent(&self, kind: &'static str, sent: bool) -> bool {
        if !sent {
            self.full.get_or_create(&vec![("order", kind)]).inc();
        }
        sent
    }

    /// A stream of `kind` opened (1) or ended (-1).
    pub fn stream(&self, kind: &'static str, change: i64) {
        self.streams.get_or_create(&vec![("kind", kind)]).inc_by(change);
    }

    /// A turn of the ring ended.
    pub fn turned(&self, took: Duration) {
        self.turn.observe(&[], took);
    }

    /// A call of the store ended.
    pub fn stored(&self, call: &'static str, outcome: &'static str, took: Duration) {
        self.store_calls.get_or_create(&vec![("call", call), ("outcome", outcome)]).inc();
        self.store_seconds.observe(&[("call", call)], took);
    }

    /// A status was written, or not.
    pub fn told(&self, object: &'static str, outcome: &'static str) {
        self.status_writes.get_or_create(&vec![("object", object), ("outcome", outcome)]).inc();
    }

    /// Shows the world as the leader knows it.
    pub fn show(&self, index: &Index, now: Duration) {
        self.placements.set(i64::try_from(index.placements().len()).unwrap_or(i64::MAX));
        let mut devices: BTreeMap<Labels, f64> = BTreeMap::new();
        for node in index.nodes().values() {
            for (id, known) in node.devices() {
                let standing = word(node.standing(now, id)).to_owned();
                let labels = vec![("vendor", known.vendor.to_string()), ("standing", standing)];
                *devices.entry(labels).or_default() += 1.0;
            }
        }
        self.devices.replace(devices);
        let all: Vec<_> = index.placements().iter().map(|(name, one)| (labels(name), placed(one))).collect();
        for (at, gauges) in self.placed.iter().enumerate() {
            let value =
                |(labels, values): &(Labels, [Option<f64>; 8])| Some((labels.clone(), values.get(at).copied()??));
            gauges.replace(all.iter().filter_map(value));
        }
    }

    /// This process leads no more: the world is for the next leader to show.
    pub fn resigned(&self) {
        self.placements.set(0);
        self.repairs_open.set(0);
        self.devices.clear();
        self.placed.iter().for_each(Gauges::clear);
    }
}

fn labels(name: &PlacementName) -> Labels {
    vec![("namespace", name.namespace().to_owned()), ("placement", name.name().to_owned())]
}

/// What is shown of a placement, in the order of [`SchedulerMetrics::PLACED`].
fn placed(placement: &Placement) -> [Option<f64>; 8] {
    let status = &placement.status;
    let devices = placement.assigned().map_or(0, |layout| layout.devices.len());
    [
        Some(large(placement.cutover.assigned().0)),
        Some(large(placement.cutover.serving().0)),
        status.balancedness,
        Some(large(status.experts_lost)),
        Some(large(status.slots_ready)),
        Some(large(status.slots_total)),
        Some(count(devices)),
        Some(large(status.expert_bytes.get())),
    ]
}

const fn word(standing: Standing) -> &'static str {
    match standing {
        Standing::Open => "open",
        Standing::Frozen => "frozen",
        Standing::Leaving => "leaving",
        Standing::Gone => "gone",
    }
}
