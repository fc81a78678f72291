//! What a metric is: its name, kind, labels and help in one constant, from which it is registered and of which
//! the documentation speaks, so that the two cannot part.

use prometheus_client::{encoding::EncodeMetric, registry::Registry};

/// What a metric counts or shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only rises; its name ends with `_total`.
    Counter,
    /// Rises and falls.
    Gauge,
    /// Observations in buckets: `_bucket`, `_sum` and `_count`.
    Histogram,
    /// Always 1; its labels tell. Its name ends with `_info`.
    Info,
}

/// One metric of a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Described {
    /// Without `berth_<part>_` before it and without the ending of its kind.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Its labels. Each takes few values: never a pod, a request or an expert.
    pub labels: &'static [&'static str],
    /// One line, without a full stop at its end.
    pub help: &'static str,
}

impl Described {
    /// A counter.
    #[must_use]
    pub const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self { name, kind: Kind::Counter, labels, help }
    }

    /// A gauge.
    #[must_use]
    pub const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self { name, kind: Kind::Gauge, labels, help }
    }

    /// A histogram.
    #[must_use]
    pub const fn histogram(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self { name, kind: Kind::Histogram, labels, help }
    }

    /// An info.
    #[must_use]
    pub const fn info(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self { name, kind: Kind::Info, labels, help }
    }

    /// The name that a scraper sees; a histogram's without the endings of its series.
    #[must_use]
    pub fn series(&self, part: &str) -> String {
        self.named(&format!("berth_{part}"))
    }

    /// As [`Self::series`], of a metric that is registered beside the part's own under another prefix.
    #[must_use]
    pub fn named(&self, prefix: &str) -> String {
        let ending = match self.kind {
            Kind::Counter => "_total",
            Kind::Info => "_info",
            Kind::Gauge | Kind::Histogram => "",
        };
        format!("{prefix}_{}{ending}", self.name)
    }

    /// The word for its kind.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
            Kind::Info => "info",
        }
    }

    /// Registers `metric` under its name and help.
    pub fn add(&self, registry: &mut Registry, metric: impl EncodeMetric + std::fmt::Debug + Send + Sync + 'static) {
        registry.register(self.name, self.help, metric);
    }
}
