//! How fast devices are beside each other: what was measured where that is enough, else what was declared
//! for the product, else 1. Steps are coarse so that noise of a measurement never moves a replica.

use std::collections::BTreeMap;

use berth_types::DeviceId;

use crate::num;

/// Least measured tokens for a measurement to count.
pub const ENOUGH: u64 = 10_000;
/// Speeds are powers of this: a device must differ by half a step to count as another speed.
const STEP: f64 = 1.08;
/// Fastest over slowest beyond which a speed is not believed.
const RANGE: f64 = 16.0;

/// What is known of one device.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known {
    /// Expert rows it computed (one token for one expert is a row), and the seconds of computing them, over
    /// windows in which it had work.
    pub measured: Option<(u64, f64)>,
    /// What is declared for its product, in any unit that all declared products share.
    pub declared: Option<f64>,
    /// Its product: devices of one product count as equal where too few of them are measured.
    pub product: String,
}

/// Relative speeds, 1 = the median device, each a power of 1.08 within 1/16 to 16. A device counts by its own
/// measurement, else by the median of its product's, else by what is declared for the product beside
/// products that were measured or declared, else as 1.
#[must_use]
pub fn relative(devices: &BTreeMap<DeviceId, Known>) -> BTreeMap<DeviceId, f64> {
    let good = |value: f64| value.is_finite() && value > 0.0;
    let own = |known: &Known| {
        let (rows, seconds) = known.measured.filter(|(rows, _)| *rows >= ENOUGH)?;
        Some(num::real(rows) / seconds).filter(|rate| good(*rate))
    };
    let mut products: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for known in devices.values() {
        if let Some(rate) = own(known) {
            products.entry(&known.product).or_default().push(rate);
        }
    }
    let products: BTreeMap<&str, f64> =
        products.into_iter().filter_map(|(product, rates)| Some((product, median(rates)?))).collect();
    // Rows per second for one unit of what is declared, by products that have both.
    let declared = |known: &Known| known.declared.filter(|declared| good(*declared));
    let both = devices.values().filter_map(|known| Some(products.get(known.product.as_str())? / declared(known)?));
    let unit = median(both.collect());
    let rate = |known: &Known| {
        own(known)
            .or_else(|| products.get(known.product.as_str()).copied())
            .or_else(|| Some(declared(known)? * unit.or_else(|| products.is_empty().then_some(1.0))?))
    };
    let rates: BTreeMap<&DeviceId, Option<f64>> = devices.iter().map(|(id, known)| (id, rate(known))).collect();
    let middle = median(rates.values().copied().flatten().collect()).unwrap_or(1.0);
    let step = |rate: Option<f64>| {
        let ratio = (rate.unwrap_or(middle) / middle).clamp(1.0 / RANGE, RANGE);
        STEP.powf((ratio.ln() / STEP.ln()).round())
    };
    rates.into_iter().map(|(id, rate)| (id.clone(), step(rate))).collect()
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len().checked_sub(1)? / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(product: &str, measured: Option<(u64, f64)>, declared: Option<f64>) -> Known {
        Known { measured, declared, product: product.to_owned() }
    }

    fn of(devices: &[Known]) -> Vec<f64> {
        let id = |at: usize| format!("n/0000:{at:02x}:00.0").parse().unwrap();
        relative(&devices.iter().cloned().enumerate().map(|(at, known)| (id(at), known)).collect())
            .into_values()
            .collect()
    }

    #[test]
    fn nothing_known_is_all_alike() {
        assert_eq!(of(&[known("a", None, None), known("b", None, None)]), [1.0, 1.0]);
    }

    #[test]
    fn what_is_measured_counts_before_what_is_declared() {
        let fast = known("a", Some((20_000, 1.0)), Some(1.0));
        let slow = known("b", Some((20_000, 2.0)), Some(1.0));
        let speeds = of(&[fast.clone(), fast, slow]);
        assert!((speeds[2] / speeds[0] - 0.5).abs() < 0.03, "{speeds:?}");
    }

    #[test]
    fn a_product_stands_in_for_its_devices_and_a_declaration_for_a_product() {
        let speeds = of(&[
            known("a", Some((20_000, 1.0)), Some(100.0)),
            known("a", Some((5, 100.0)), Some(100.0)),
            known("b", None, Some(50.0)),
        ]);
        assert_eq!(speeds[0], speeds[1]);
        assert!((speeds[2] / speeds[0] - 0.5).abs() < 0.03, "{speeds:?}");
    }

    #[test]
    fn noise_of_a_few_percent_is_no_difference() {
        let near = |rows| known("a", Some((rows, 1.0)), None);
        assert_eq!(of(&[near(100_000), near(102_500), near(97_500)]), [1.0, 1.0, 1.0]);
    }

    #[test]
    fn what_is_no_speed_is_not_believed() {
        let speeds = of(&[
            known("a", Some((100_000, 0.0)), Some(f64::NAN)),
            known("a", Some((100_000, 1.0)), None),
            known("c", Some((100_000, 1e9)), Some(-3.0)),
        ]);
        assert_eq!((speeds[0], speeds[1]), (1.0, 1.0));
        assert!(speeds[2] >= 1.0 / 17.0, "{speeds:?}");
    }
}
