//! Logs, metrics and traces, set up once by `main`. Messages are fixed text, data goes into fields; prompts and
//! activations never get here.

mod described;
mod gauges;
mod logs;
mod seconds;
pub mod trace;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use prometheus_client::{
    encoding::text::{encode_eof, encode_registry},
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::Registry,
};

pub use described::{Described, Kind};
pub use gauges::{Gauges, Labels, count, large};
pub use logs::{LogError, LogFormat};
pub use seconds::Seconds;

/// Which process this is: every log line and every exported span says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Name of the part: `operator`, `scheduler`, `agent`, `worker`, `runner`.
    pub part: &'static str,
    /// What else names it: `pod`, `node`, `device`, `placement`. Empty ones are left out.
    pub names: Vec<(&'static str, String)>,
    /// Hash of what it was told: equal in processes that were told the same.
    pub config: String,
}

static PROCESS: OnceLock<Process> = OnceLock::new();

/// Sends logs to standard error, and lets metrics say how the process is configured.
///
/// # Errors
/// [`LogError`], when `filter` is malformed or this was called before.
pub fn init(process: Process, filter: &str, format: LogFormat) -> Result<(), LogError> {
    logs::init(&process, filter, format)?;
    PROCESS.set(process).map_err(|_| LogError::Again)
}

/// Exports the steps of decisions to an OTLP endpoint (gRPC), if one is named. Call it after [`init`], within the
/// runtime.
///
/// # Errors
/// [`trace::TraceError`], when the endpoint is none.
pub fn export_traces(endpoint: &str) -> Result<(), trace::TraceError> {
    PROCESS.get().map_or(Ok(()), |process| trace::export_to(endpoint, process))
}

/// Metrics of the frame, which every part has.
pub const METRICS: &[Described] = &[BUILD, CONFIG, LEASE_LEADING, LEASE_TERMS];
const BUILD: Described = Described::info("build", &["version"], "Version of this process");
const CONFIG: Described =
    Described::info("config", &["hash"], "Hash of what this process was told, its own names apart");
const LEASE_LEADING: Described = Described::gauge("lease_leading", &["lease"], "1 while this process holds the lease");
const LEASE_TERMS: Described = Described::counter("lease_terms", &["lease"], "Terms that this process began");

/// The metrics of one process; every name starts with `berth_<part>_`, but for what is registered beside. Clones
/// share them.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Mutex<Registries>>);

#[derive(Debug)]
struct Registries {
    own: Registry,
    beside: Vec<Registry>,
}

impl Metrics {
    /// An empty registry for `part`, with `berth_<part>_build_info`.
    #[must_use]
    pub fn new(part: &str) -> Self {
        let mut registry = Registry::with_prefix(format!("berth_{part}"));
        BUILD.add(&mut registry, Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]));
        if let Some(process) = PROCESS.get().filter(|process| !process.config.is_empty()) {
            CONFIG.add(&mut registry, Info::new(vec![("hash", process.config.clone())]));
        }
        Self(Arc::new(Mutex::new(Registries { own: registry, beside: Vec::new() })))
    }

    /// Lets `register` add metrics. Names and help are constants of the part's `metrics.rs`; a counter's
    /// name is given without `_total`.
    pub fn register<T>(&self, register: impl FnOnce(&mut Registry) -> T) -> T {
        register(&mut self.lock().own)
    }

    /// Lets `register` add metrics whose names start with `<prefix>_`, for words that are not this part's alone.
    pub fn register_beside<T>(&self, prefix: &str, register: impl FnOnce(&mut Registry) -> T) -> T {
        let mut registry = Registry::with_prefix(prefix);
        let registered = register(&mut registry);
        self.lock().beside.push(registry);
        registered
    }

    fn lock(&self) -> MutexGuard<'_, Registries> {
        // Registration and encoding leave the registries whole even when a value's encoder panics.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All metrics in the OpenMetrics text format.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        let registries = self.lock();
        for registry in std::iter::once(&registries.own).chain(&registries.beside) {
            // Writing to a String cannot fail.
            let _ = encode_registry(&mut text, registry);
        }
        let _ = encode_eof(&mut text);
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
            LEASE_LEADING.add(registry, lease.leading.clone());
            LEASE_TERMS.add(registry, lease.terms.clone());
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
        let process = Process { part: "test", names: Vec::new(), config: String::new() };
        let error = init(process, "berth=loud", LogFormat::Json).unwrap_err().to_string();
        assert!(error.contains("berth=loud") && error.contains("=debug"), "{error}");
    }
}
