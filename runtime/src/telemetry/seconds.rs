//! Durations in buckets, one histogram per set of labels, with the same buckets everywhere so that they can be
//! compared: from a quarter of a millisecond, doubling, to a little over two minutes.

use std::{fmt, time::Duration};

use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder},
    metrics::{
        MetricType,
        family::Family,
        histogram::{Histogram, exponential_buckets},
    },
};

/// Labels of one histogram: names and words of a fixed set.
type Words = Vec<(&'static str, &'static str)>;

/// A histogram of seconds per set of labels. Clones share them.
#[derive(Clone, Debug)]
pub struct Seconds(Family<Words, Histogram, fn() -> Histogram>);

impl Default for Seconds {
    fn default() -> Self {
        Self(Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.000_25, 2.0, 20))))
    }
}

impl Seconds {
    /// From now on there is a histogram of these labels, be it empty: the first observation is then a rise that a
    /// query over time sees.
    pub fn start(&self, labels: &[(&'static str, &'static str)]) {
        drop(self.0.get_or_create(&labels.to_vec()));
    }

    /// Counts one duration.
    pub fn observe(&self, labels: &[(&'static str, &'static str)], took: Duration) {
        self.0.get_or_create(&labels.to_vec()).observe(took.as_secs_f64());
    }
}

impl EncodeMetric for Seconds {
    fn encode(&self, encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        self.0.encode(encoder)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }

    fn is_empty(&self) -> bool {
        EncodeMetric::is_empty(&self.0)
    }
}
