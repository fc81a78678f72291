//! Every metric of the scheduler: names and help are here and nowhere else.

use berth_runtime::telemetry::Metrics;
use prometheus_client::metrics::{
    counter::Counter,
    family::Family,
    gauge::Gauge,
    histogram::{Histogram, exponential_buckets},
};

type Label = Vec<(&'static str, &'static str)>;

/// The scheduler's metrics; clones share them.
#[derive(Clone, Debug)]
pub struct SchedulerMetrics {
    /// Plans by cause.
    plans: Family<Label, Counter>,
    /// Plans that could not be made or were refused, by what refused them.
    refused: Family<Label, Counter>,
    /// Seconds from a fact to the stored plan.
    commit_seconds: Histogram,
    /// Seconds of solving and checking.
    solve_seconds: Histogram,
    /// Bytes that plans made devices load.
    moved_bytes: Counter,
    /// Orders that found their line full.
    full: Family<Label, Counter>,
    /// Open streams by kind.
    streams: Family<Label, Gauge>,
    /// Placements known.
    placements: Gauge,
}

impl SchedulerMetrics {
    /// Registers all of them.
    #[must_use]
    pub fn register(metrics: &Metrics) -> Self {
        let own = Self {
            plans: Family::default(),
            refused: Family::default(),
            commit_seconds: Histogram::new(exponential_buckets(0.001, 2.0, 14)),
            solve_seconds: Histogram::new(exponential_buckets(0.0001, 2.0, 16)),
            moved_bytes: Counter::default(),
            full: Family::default(),
            streams: Family::default(),
            placements: Gauge::default(),
        };
        metrics.register(|registry| {
            registry.register("plans", "Plans stored, by cause", own.plans.clone());
            registry.register("plans_refused", "Plans not stored, by what refused them", own.refused.clone());
            registry.register("commit_seconds", "Time from plan to stored assignment", own.commit_seconds.clone());
            registry.register("solve_seconds", "Time to solve and check one plan", own.solve_seconds.clone());
            registry.register("moved_bytes", "Expert bytes that plans made devices load", own.moved_bytes.clone());
            registry.register("orders_delayed", "Orders that found their stream full", own.full.clone());
            registry.register("streams", "Open streams", own.streams.clone());
            registry.register("placements", "ExpertPlacements known to the leader", own.placements.clone());
        });
        own
    }

    /// A plan was stored.
    pub fn planned(&self, cause: &'static str, bytes: u64, seconds: f64) {
        self.plans.get_or_create(&vec![("cause", cause)]).inc();
        self.moved_bytes.inc_by(bytes);
        self.commit_seconds.observe(seconds);
    }

    /// A plan was made.
    pub fn solved(&self, seconds: f64) {
        self.solve_seconds.observe(seconds);
    }

    /// A plan was not stored.
    pub fn refused(&self, by: &'static str) {
        self.refused.get_or_create(&vec![("by", by)]).inc();
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

    /// Placements known.
    pub fn placements(&self, count: usize) {
        self.placements.set(i64::try_from(count).unwrap_or(i64::MAX));
    }
}
