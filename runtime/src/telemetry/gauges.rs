//! Gauges that are replaced as a whole: what is no longer so vanishes from the next scrape, instead of standing
//! there with its last value.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder},
    metrics::MetricType,
};

/// Labels of one gauge, in the order in which they are written.
pub type Labels = Vec<(&'static str, String)>;

/// A gauge per set of labels. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Gauges(Arc<Mutex<BTreeMap<Labels, f64>>>);

impl Gauges {
    /// From now on there are these and no others.
    pub fn replace(&self, values: impl IntoIterator<Item = (Labels, f64)>) {
        *self.lock() = values.into_iter().collect();
    }

    /// From now on there are none: this process has nothing to say.
    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Labels, f64>> {
        // A map of plain values is whole between statements.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EncodeMetric for Gauges {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        for (labels, value) in self.lock().iter() {
            encoder.encode_family(labels)?.encode_gauge(value)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Gauge
    }

    fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }
}

/// A count as a gauge's value.
#[must_use]
pub fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX))
}

/// Bytes, or anything else that may be large, as a gauge's value: exact below 2^53, rounded above.
#[must_use]
pub fn large(number: u64) -> f64 {
    let (high, low) = (number >> 32, number & u64::from(u32::MAX));
    let part = |half: u64| f64::from(u32::try_from(half).unwrap_or(u32::MAX));
    part(high).mul_add(4_294_967_296.0, part(low))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{Described, Metrics};

    #[test]
    fn what_is_no_longer_so_is_not_scraped() {
        const DEVICES: Described = Described::gauge("devices", &["vendor"], "Devices");
        let metrics = Metrics::new("test");
        let gauges = Gauges::default();
        metrics.register(|registry| DEVICES.add(registry, gauges.clone()));
        assert!(!metrics.encode().contains("berth_test_devices"));
        gauges.replace([(vec![("vendor", "nvidia".to_owned())], 4.0), (vec![("vendor", "ascend".to_owned())], 2.0)]);
        assert!(metrics.encode().contains("berth_test_devices{vendor=\"ascend\"} 2.0"), "{}", metrics.encode());
        gauges.replace([(vec![("vendor", "nvidia".to_owned())], 3.0)]);
        let text = metrics.encode();
        assert!(text.contains("{vendor=\"nvidia\"} 3.0") && !text.contains("ascend"), "{text}");
        gauges.clear();
        assert!(!metrics.encode().contains("berth_test_devices"));
    }

    #[test]
    fn large_numbers_keep_their_size() {
        assert_eq!(large(85_899_345_920).to_string(), "85899345920");
        assert_eq!(large(7).to_string(), "7");
    }
}
