//! Findings about failure domains: what the loss of one would take.

use std::collections::{BTreeMap, BTreeSet};

use berth_types::{DeviceId, ExpertId, LayerId};

use super::{Finding, each_slot};
use crate::{
    num,
    plan::Layout,
    problem::{Device, Problem, Survive},
};

/// No expert of the final layout lives in one failure domain alone.
pub(super) fn fragile(problem: &Problem, layout: &Layout, level: Survive, found: &mut Vec<Finding>) {
    if level == Survive::Nothing {
        return;
    }
    let domain = |device: &Device| match level {
        Survive::Rack => device.rack.clone().unwrap_or_else(|| device.id.node().to_owned()),
        Survive::Node => device.id.node().to_owned(),
        Survive::Device | Survive::Nothing => device.id.to_string(),
    };
    let domains: BTreeMap<&DeviceId, String> =
        problem.devices.iter().map(|device| (&device.id, domain(device))).collect();
    let mut homes: BTreeMap<(LayerId, ExpertId), BTreeSet<&str>> = BTreeMap::new();
    for (device, layer, expert) in each_slot(layout) {
        if let Some(domain) = domains.get(device) {
            homes.entry((layer, expert)).or_default().insert(domain);
        }
    }
    for ((layer, expert), homes) in homes {
        if homes.len() < 2 {
            let domain = homes.first().copied().unwrap_or_default().to_owned();
            found.push(Finding::Fragile { layer, expert, domain });
        }
    }
}

/// Several copies of an expert are not on one node (in one rack, where the loss of a rack is survived) while
/// another has an empty slot.
pub(super) fn gathered(problem: &Problem, layout: &Layout, level: Survive, found: &mut Vec<Finding>) {
    let level = if level == Survive::Rack { Survive::Rack } else { Survive::Node };
    let known: BTreeMap<&DeviceId, &str> =
        problem.devices.iter().map(|device| (&device.id, device.failure_domain(level))).collect();
    let domain = |id: &DeviceId| known.get(id).copied().unwrap_or_default();
    for (layer, row) in &layout.layers {
        let owners =
            layout.devices.iter().flat_map(|entry| std::iter::repeat_n(&entry.device, num::index(entry.slots)));
        let mut copies: BTreeMap<ExpertId, Vec<&str>> = BTreeMap::new();
        let mut empty = BTreeSet::new();
        for (device, held) in owners.zip(row) {
            match held {
                Some(expert) => copies.entry(*expert).or_default().push(domain(device)),
                None => _ = empty.insert(domain(device)),
            }
        }
        for (expert, nodes) in copies.into_iter().filter(|(_, nodes)| nodes.len() > 1) {
            let node = nodes.first().copied().unwrap_or_default();
            if nodes.iter().all(|other| *other == node) && empty.iter().any(|other| *other != node) {
                found.push(Finding::Gathered { layer: *layer, expert, node: node.to_owned() });
            }
        }
    }
}
