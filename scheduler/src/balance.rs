//! How evenly devices are loaded: as runners measured it, and as a layout would spread expected loads. Pure arithmetic
//! over one layout; it neither plans nor judges.

use std::collections::BTreeMap;

use berth_planner::{Layout, Weights, problem::Loads};
use berth_runtime::telemetry::{count, large};
use berth_types::{DeviceId, LayerId};

/// Entries (token, expert) that devices answered, by layer.
pub type DeviceLoads = BTreeMap<DeviceId, BTreeMap<LayerId, u64>>;

/// How loads lie on devices, each device's load divided by its speed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// Ideal ÷ slowest device, mean over layers with load; 1 is perfect.
    pub balancedness: f64,
    /// Slowest device ÷ ideal, mean over layers with load; 1 is perfect.
    pub makespan: f64,
}

/// The spread that was measured on the devices of `layout`; `None` where nothing was.
#[must_use]
pub fn measured(layout: &Layout, loads: &DeviceLoads, speed: impl Fn(&DeviceId) -> f64) -> Option<Spread> {
    let used: Vec<_> = layout.devices.iter().filter(|entry| entry.slots > 0).map(|entry| &entry.device).collect();
    let layer = |layer: &LayerId| {
        let load = |device: &DeviceId| loads.get(device).and_then(|layers| layers.get(layer)).copied().unwrap_or(0);
        ratio(used.iter().map(|device| (large(load(device)), speed(device))))
    };
    mean(layout.layers.keys().filter_map(layer))
}

/// The spread of `loads` where replicas of an expert share its tokens by `weights`, or evenly; `None` without load.
#[must_use]
pub fn expected(
    layout: &Layout,
    weights: Option<&Weights>,
    loads: &Loads,
    speed: impl Fn(&DeviceId) -> f64,
) -> Option<Spread> {
    let devices: Vec<_> = layout.ranges().map(|(device, range)| (speed(device), range)).collect();
    let layer = |(layer, row): (&LayerId, &Vec<Option<berth_types::ExpertId>>)| {
        let tokens = loads.get(layer)?;
        let index = |expert: berth_types::ExpertId| usize::try_from(expert.0).unwrap_or(usize::MAX);
        let mut copies = vec![0_usize; tokens.len()];
        for expert in row.iter().flatten() {
            if let Some(copies) = copies.get_mut(index(*expert)) {
                *copies += 1;
            }
        }
        let weights = weights.and_then(|weights| weights.get(layer));
        let share = |slot: usize| {
            let Some(Some(expert)) = row.get(slot) else { return 0.0 };
            let tokens = large(tokens.get(index(*expert)).copied().unwrap_or(0));
            match weights.and_then(|weights| weights.get(slot)) {
                Some(weight) => tokens * f64::from(*weight) / f64::from(u16::MAX),
                None => tokens / count(copies.get(index(*expert)).copied().unwrap_or(1).max(1)),
            }
        };
        let load = |range: &std::ops::Range<usize>| range.clone().map(share).sum::<f64>();
        ratio(devices.iter().filter(|(_, range)| !range.is_empty()).map(|(speed, range)| (load(range), *speed)))
    };
    mean(layout.layers.iter().filter_map(layer))
}

/// Ideal ÷ slowest over devices, each (load, speed).
fn ratio(devices: impl Iterator<Item = (f64, f64)>) -> Option<f64> {
    let (mut load, mut speed, mut slowest) = (0.0, 0.0, 0.0_f64);
    for (device_load, device_speed) in devices {
        load += device_load;
        speed += device_speed;
        slowest = slowest.max(device_load / device_speed);
    }
    (slowest > 0.0).then(|| load / speed / slowest)
}

fn mean(ratios: impl Iterator<Item = f64>) -> Option<Spread> {
    let (mut balancedness, mut makespan, mut layers) = (0.0, 0.0, 0.0);
    for ratio in ratios {
        balancedness += ratio;
        makespan += 1.0 / ratio;
        layers += 1.0;
    }
    (layers > 0.0).then(|| Spread { balancedness: balancedness / layers, makespan: makespan / layers })
}

#[cfg(test)]
mod tests {
    use berth_planner::DeviceSlots;
    use berth_types::ExpertId;

    use super::*;

    fn id(device: &str) -> DeviceId {
        device.parse().unwrap()
    }

    /// Two devices of two slots: expert 0 on both, 1 and 2 on one each.
    fn layout() -> Layout {
        let row = [0, 1, 0, 2].map(|expert| Some(ExpertId(expert))).to_vec();
        Layout {
            devices: ["a/0", "b/0"].map(|device| DeviceSlots { device: id(device), slots: 2 }).to_vec(),
            layers: [(LayerId(1), row.clone()), (LayerId(2), row)].into(),
        }
    }

    #[test]
    fn copies_share_their_expert_and_layers_without_load_do_not_count() {
        let loads = [(LayerId(1), vec![40, 20, 0]), (LayerId(2), vec![0, 0, 0])].into();
        let spread = expected(&layout(), None, &loads, |_| 1.0).unwrap();
        assert!((spread.balancedness - 30.0 / 40.0).abs() < 1e-9, "{spread:?}");
        // A quarter of expert 0 beside expert 1, the rest on the other device.
        let weights = [(LayerId(1), vec![16_384, 65_535, 49_151, 65_535])].into();
        let weighted = expected(&layout(), Some(&weights), &loads, |_| 1.0).unwrap();
        assert!((weighted.balancedness - 1.0).abs() < 1e-3, "{weighted:?}");
        assert_eq!(expected(&layout(), None, &Loads::new(), |_| 1.0), None);
    }

    #[test]
    fn what_was_measured_is_divided_by_speed() {
        let loads = [(id("a/0"), [(LayerId(1), 60)].into()), (id("b/0"), [(LayerId(1), 30)].into())].into();
        let even = measured(&layout(), &loads, |_| 1.0).unwrap();
        assert!((even.balancedness - 45.0 / 60.0).abs() < 1e-9 && (even.makespan - 60.0 / 45.0).abs() < 1e-9);
        let unlike = measured(&layout(), &loads, |device| if *device == id("a/0") { 2.0 } else { 1.0 }).unwrap();
        assert!((unlike.balancedness - 1.0).abs() < 1e-9, "{unlike:?}");
        let one = [(id("a/0"), [(LayerId(1), 60)].into())].into();
        let idle = measured(&layout(), &one, |_| 1.0).unwrap();
        assert!((idle.balancedness - 0.5).abs() < 1e-9, "a device that answered nothing counts: {idle:?}");
        assert_eq!(measured(&layout(), &DeviceLoads::new(), |_| 1.0), None);
    }
}
