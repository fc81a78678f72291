//! Logs and metrics, set up once by `main`. Messages are fixed text, data goes into fields; prompts and
//! activations never get here.

use std::{
    io::{self, IsTerminal},
    sync::{Arc, Mutex, PoisonError},
};

use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::Registry,
};
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

impl LogFormat {
    /// Text when standard error is a terminal, else JSON.
    #[must_use]
    pub fn detect() -> Self {
        if io::stderr().is_terminal() { Self::Text } else { Self::Json }
    }
}

/// Why logs could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is not in the form of `EnvFilter`.
    #[error("log filter {filter:?} is invalid ({reason}): write it as info or berth_scheduler=debug,info")]
    Filter {
        /// As it was given.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Called twice.
    #[error("logs are already set up")]
    Again,
}

/// Sends logs to standard error.
///
/// # Errors
/// [`LogError`], when `filter` is malformed or logs were set up before.
pub fn init_logs(filter: &str, format: LogFormat) -> Result<(), LogError> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| LogError::Filter { filter: filter.to_owned(), reason: error.to_string() })?;
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let layer = match format {
        LogFormat::Json => layer.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed(),
        LogFormat::Text => layer.boxed(),
    };
    tracing_subscriber::registry().with(layer).with(filter).try_init().map_err(|_| LogError::Again)
}

/// The metrics of one process; every name starts with `berth_<part>_`. Clones share one registry.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Mutex<Registry>>);

impl Metrics {
    /// An empty registry for `part`, with `berth_<part>_build_info`.
    #[must_use]
    pub fn new(part: &str) -> Self {
        let mut registry = Registry::with_prefix(format!("berth_{part}"));
        registry.register("build", "Version of this process", Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]));
        Self(Arc::new(Mutex::new(registry)))
    }

    /// Lets `register` add metrics. Names and help are constants of the part's `metrics.rs`; a counter's
    /// name is given without `_total`.
    pub fn register<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        // Registration and encoding leave the registry whole even when a value's encoder panics.
        register(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// All metrics in the OpenMetrics text format.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.register(|registry| encode(&mut text, registry));
        text
    }
}

/// Label of a lease in [`LeaseMetrics`].
pub(crate) type LeaseLabel = Vec<(&'static str, String)>;

/// What a process tells about the Leases that it keeps.
#[derive(Clone, Debug, Default)]
pub(crate) struct LeaseMetrics {
    pub(crate) leading: Family<LeaseLabel, Gauge>,
    pub(crate) terms: Family<LeaseLabel, Counter>,
}

impl LeaseMetrics {
    pub(crate) fn register(metrics: &Metrics) -> Self {
        let lease = Self::default();
        metrics.register(|registry| {
            registry.register("lease_leading", "1 while this process holds the lease", lease.leading.clone());
            registry.register("lease_terms", "Terms that this process began", lease.terms.clone());
        });
        lease
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_carry_the_name_of_the_part() {
        let metrics = Metrics::new("scheduler");
        let plans: Counter = Counter::default();
        metrics.register(|registry| registry.register("plans", "Plans made", plans.clone()));
        plans.inc();
        let text = metrics.encode();
        assert!(text.contains("berth_scheduler_plans_total 1"), "{text}");
        assert!(text.contains("berth_scheduler_build_info{version="), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }

    #[test]
    fn a_malformed_filter_is_named_with_the_form_to_write() {
        let error = init_logs("berth=loud", LogFormat::Json).unwrap_err().to_string();
        assert!(error.contains("berth=loud") && error.contains("=debug"), "{error}");
    }
}
