//! Findings about single rows: experts without a replica, replicas twice on a device.

use std::collections::BTreeSet;

use berth_types::{ExpertId, LayerId};

use super::{Finding, each_slot};
use crate::{num, plan::Layout, problem::Problem};

/// Every layer is there with a slot for each slot of the devices, every expert (or every one of `living`) is in it,
/// none twice on a device.
pub(super) fn rows(
    problem: &Problem,
    layout: &Layout,
    wave: usize,
    living: Option<&BTreeSet<(LayerId, ExpertId)>>,
    found: &mut Vec<Finding>,
) {
    let geometry = &problem.instance.geometry;
    let width: usize = layout.devices.iter().map(|entry| num::index(entry.slots)).sum();
    let expected: BTreeSet<LayerId> = (geometry.dense_layers..geometry.layers).map(LayerId).collect();
    for layer in layout.layers.keys().filter(|layer| !expected.contains(layer)) {
        found.push(Finding::Row { wave, layer: *layer, what: "it has no experts in this model".to_owned() });
    }
    for layer in expected {
        let Some(row) = layout.layers.get(&layer) else {
            found.push(Finding::Row { wave, layer, what: "it is missing".to_owned() });
            continue;
        };
        if row.len() != width {
            let what = format!("{} slots, the devices have {width}", row.len());
            found.push(Finding::Row { wave, layer, what });
        }
        let present: BTreeSet<u32> = row.iter().flatten().map(|expert| expert.0).collect();
        for beyond in present.range(geometry.experts..) {
            let what = format!("expert {beyond} of {}", geometry.experts);
            found.push(Finding::Row { wave, layer, what });
        }
        let missing = (0..geometry.experts).filter(|expert| !present.contains(expert)).map(ExpertId);
        let missing = missing.filter(|expert| living.is_none_or(|living| living.contains(&(layer, *expert))));
        found.extend(missing.map(|expert| Finding::Missing { wave, layer, expert }));
    }
    let mut seen = BTreeSet::new();
    for (device, layer, expert) in each_slot(layout) {
        if !seen.insert((device, layer, expert)) {
            found.push(Finding::Doubled { wave, layer, expert, device: device.clone() });
        }
    }
}
