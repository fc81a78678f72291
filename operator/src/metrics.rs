//! Every metric of the operator. Labels take a fixed set of values: kinds, verbs, categories.

use prometheus_client::{
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

type Labels = Vec<(&'static str, &'static str)>;

/// The operator's metrics.
#[derive(Clone, Debug, Default)]
pub struct OperatorMetrics {
    /// Passes over objects, by kind.
    reconciles: Family<Labels, Counter>,
    /// Passes that failed, by kind and category.
    errors: Family<Labels, Counter>,
    /// Calls that write, by verb and kind.
    writes: Family<Labels, Counter>,
    /// Passes over all queues and deployments.
    admission_passes: Counter,
}

impl OperatorMetrics {
    /// Registers them under `berth_operator_`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("reconciles", "Passes over one object", metrics.reconciles.clone());
        registry.register("reconcile_errors", "Passes that failed", metrics.errors.clone());
        registry.register("writes", "Writing calls to the API server", metrics.writes.clone());
        registry.register("admission_passes", "Passes over all queues", metrics.admission_passes.clone());
        metrics
    }

    pub(crate) fn reconciled(&self, kind: &'static str) {
        self.reconciles.get_or_create(&vec![("kind", kind)]).inc();
    }

    pub(crate) fn failed(&self, kind: &'static str, category: &'static str) {
        self.errors.get_or_create(&vec![("kind", kind), ("category", category)]).inc();
    }

    pub(crate) fn wrote(&self, verb: &'static str, kind: &'static str) {
        self.writes.get_or_create(&vec![("verb", verb), ("kind", kind)]).inc();
    }

    pub(crate) fn admitted(&self) {
        self.admission_passes.inc();
    }
}
