//! How replicas of an expert share its tokens where the runner can weigh them: each layer's parts, so that
//! the slowest device is as fast as the layout allows. Moves nothing.
//!
//! Which tokens an expert gets is given; over its replicas they may be split at will. The device loads that
//! can be reached so are the bases of a polymatroid, on which the least Σ load² ÷ speed has the least slowest
//! device too (Fujishige, Mathematics of Operations Research 5, 1980). It is reached by splitting one expert
//! after the other as well as the others leave room: each level is filled as by water.

use std::collections::BTreeMap;

use berth_types::{DeviceId, ExpertId};

use crate::{
    num,
    plan::{Certificate, Layout, Limit, Weights},
    problem::Problem,
};

/// All tokens of an expert.
pub const WHOLE: u16 = u16::MAX;
/// Rounds over all experts of a layer.
const ROUNDS: usize = 200;
/// Change of a device's time, in units of the ideal, below which rounds end.
const STILL: f64 = 1e-7;

/// The weights of `layout` for the loads of `problem`; a layer without load is weighed as if evenly loaded.
#[must_use]
pub fn weights(problem: &Problem, layout: &Layout) -> Weights {
    let speeds = speeds(problem, layout);
    let owner = owners(layout);
    let row = |row: &Vec<Option<ExpertId>>, loads: &[f64]| {
        let (slots, homes) = homes(row, &owner, loads.len());
        let parts = split(&homes, loads, &speeds);
        let mut weights = vec![0_u16; row.len()];
        for (slots, parts) in slots.iter().zip(&parts) {
            for (slot, weight) in slots.iter().zip(round(parts)) {
                weights[*slot] = weight;
            }
        }
        weights
    };
    layout.layers.iter().map(|(layer, held)| (*layer, row(held, &ideal(problem, *layer, &speeds).0))).collect()
}

/// Puts into `certificate` what `layout` reaches with `weights`.
pub(crate) fn certify(problem: &Problem, layout: &Layout, weights: &Weights, certificate: &mut Certificate) {
    let speeds = speeds(problem, layout);
    let owner = owners(layout);
    let (mut sum, mut excess, mut worst): (f64, f64, Option<(f64, Limit)>) = (0.0, 0.0, None);
    for (layer, row) in &layout.layers {
        let (loads, known) = ideal(problem, *layer, &speeds);
        if !known {
            sum += 1.0;
            continue;
        }
        let mut times = vec![0.0; speeds.len()];
        let none = Vec::new();
        for ((held, weight), device) in row.iter().zip(weights.get(layer).unwrap_or(&none)).zip(&owner) {
            let load = held.and_then(|expert| loads.get(num::index(expert.0))).copied().unwrap_or(0.0);
            times[*device] += load * f64::from(*weight) / f64::from(WHOLE) / speeds[*device];
        }
        let makespan = times.iter().copied().fold(0.0, f64::max);
        sum += makespan;
        excess += makespan;
        if worst.as_ref().is_none_or(|(most, _)| makespan > *most)
            && let Some((expert, relieved)) = relief(row, &owner, &loads, &speeds, &times)
        {
            let expert = ExpertId(num::small(expert));
            let relieved = relieved.min(makespan);
            worst = Some((makespan, Limit { layer: *layer, expert, makespan, relieved }));
        }
    }
    let layers = num::real_size(layout.layers.len().max(1));
    certificate.makespan = if layout.layers.is_empty() { 1.0 } else { sum / layers };
    // Rounding to weights may end a hair above what the even split of the same layout was said to reach.
    certificate.gap = (certificate.makespan / certificate.bound - 1.0).max(0.0);
    certificate.limit = worst.map(|(_, limit)| limit).filter(|_| excess > 0.0);
}

/// The expert that the slowest device spends most on, and the slowest time with one more replica of it where
/// there is most room.
fn relief(
    row: &[Option<ExpertId>],
    owner: &[usize],
    loads: &[f64],
    speeds: &[f64],
    times: &[f64],
) -> Option<(usize, f64)> {
    let slow = (0..times.len()).max_by(|one, other| times[*one].total_cmp(&times[*other]).then(other.cmp(one)))?;
    let (_, mut homes) = homes(row, owner, loads.len());
    let held = (0..loads.len()).filter(|expert| homes[*expert].contains(&slow));
    let each = |expert: usize| loads[expert] / num::real_size(homes[expert].len());
    let expert = held.max_by(|one, other| each(*one).total_cmp(&each(*other)).then(other.cmp(one)))?;
    let other = (0..times.len())
        .filter(|device| !homes[expert].contains(device))
        .min_by(|one, other| times[*one].total_cmp(&times[*other]).then(one.cmp(other)));
    homes[expert].extend(other);
    let parts = split(&homes, loads, speeds);
    Some((expert, peak(&homes, loads, &parts, speeds)))
}

fn peak(homes: &[Vec<usize>], loads: &[f64], parts: &[Vec<f64>], speeds: &[f64]) -> f64 {
    let mut carried = vec![0.0; speeds.len()];
    for ((homes, load), parts) in homes.iter().zip(loads).zip(parts) {
        for (home, part) in homes.iter().zip(parts) {
            carried[*home] += load * part;
        }
    }
    carried.iter().zip(speeds).map(|(load, speed)| load / speed).fold(0.0, f64::max)
}

/// By expert, the part of its load that each of its homes takes. `loads` are in units of the ideal time of a
/// device of speed 1.
pub(crate) fn split(homes: &[Vec<usize>], loads: &[f64], speeds: &[f64]) -> Vec<Vec<f64>> {
    let mut parts: Vec<Vec<f64>> =
        homes.iter().map(|homes| vec![1.0 / num::real_size(homes.len().max(1)); homes.len()]).collect();
    let mut carried = vec![0.0; speeds.len()];
    for ((homes, load), parts) in homes.iter().zip(loads).zip(&parts) {
        for (home, part) in homes.iter().zip(parts) {
            carried[*home] += load * part;
        }
    }
    let mut shared: Vec<usize> = (0..homes.len()).filter(|at| homes[*at].len() > 1 && loads[*at] > 0.0).collect();
    shared.sort_by(|one, other| loads[*other].total_cmp(&loads[*one]).then(one.cmp(other)));
    for _ in 0..ROUNDS {
        let mut moved = 0.0_f64;
        for expert in &shared {
            moved = moved.max(pour(&homes[*expert], loads[*expert], speeds, &mut carried, &mut parts[*expert]));
        }
        if moved < STILL {
            break;
        }
    }
    parts
}

/// Splits one expert's load over its homes so that those that take some are equally slow; by how much a
/// device's time changed.
fn pour(homes: &[usize], load: f64, speeds: &[f64], carried: &mut [f64], parts: &mut [f64]) -> f64 {
    for (home, part) in homes.iter().zip(parts.iter()) {
        carried[*home] = (carried[*home] - load * part).max(0.0);
    }
    let mut order: Vec<usize> = (0..homes.len()).collect();
    let time = |at: usize| carried[homes[at]] / speeds[homes[at]];
    order.sort_by(|one, other| time(*one).total_cmp(&time(*other)).then(one.cmp(other)));
    let (mut base, mut speed, mut level) = (0.0, 0.0, f64::INFINITY);
    for at in &order {
        if time(*at) >= level {
            break;
        }
        base += carried[homes[*at]];
        speed += speeds[homes[*at]];
        level = (load + base) / speed;
    }
    let mut moved = 0.0_f64;
    for (home, part) in homes.iter().zip(parts.iter_mut()) {
        let new = ((level * speeds[*home] - carried[*home]) / load).clamp(0.0, 1.0);
        moved = moved.max((new - *part).abs() * load / speeds[*home]);
        *part = new;
        carried[*home] += load * new;
    }
    moved
}

/// Parts in 1 / 65,535, summing to that exactly: what rounding down leaves goes to the largest remainders.
fn round(parts: &[f64]) -> Vec<u16> {
    let sum: f64 = parts.iter().sum();
    let scaled: Vec<f64> = parts.iter().map(|part| part / sum.max(f64::MIN_POSITIVE) * f64::from(WHOLE)).collect();
    let mut weights: Vec<u16> = scaled.iter().map(|part| num::fixed(*part)).collect();
    let given: u32 = weights.iter().copied().map(u32::from).sum();
    let mut order: Vec<usize> = (0..parts.len()).collect();
    let remainder = |at: usize| scaled[at] - f64::from(weights[at]);
    order.sort_by(|one, other| remainder(*other).total_cmp(&remainder(*one)).then(one.cmp(other)));
    let left = num::index(u32::from(WHOLE).saturating_sub(given));
    for at in order.iter().cycle().take(if parts.is_empty() { 0 } else { left }) {
        weights[*at] = weights[*at].saturating_add(1);
    }
    weights
}

/// By expert, its slots and their devices.
fn homes(row: &[Option<ExpertId>], owner: &[usize], experts: usize) -> (Vec<Vec<usize>>, Vec<Vec<usize>>) {
    let (mut slots, mut homes) = (vec![Vec::new(); experts], vec![Vec::new(); experts]);
    for (slot, (held, device)) in row.iter().zip(owner).enumerate() {
        let Some(expert) = held.map(|expert| num::index(expert.0)).filter(|expert| *expert < experts) else { continue };
        slots[expert].push(slot);
        homes[expert].push(*device);
    }
    (slots, homes)
}

/// Device of each slot of a row.
fn owners(layout: &Layout) -> Vec<usize> {
    let slots = layout.devices.iter().enumerate();
    slots.flat_map(|(at, entry)| std::iter::repeat_n(at, num::index(entry.slots))).collect()
}

/// Speeds by device of a layout; the least there is for one that is no number above 0, or not known.
fn speeds(problem: &Problem, layout: &Layout) -> Vec<f64> {
    let known: BTreeMap<&DeviceId, f64> = problem.devices.iter().map(|device| (&device.id, device.speed)).collect();
    let speed = |id: &DeviceId| known.get(id).copied().filter(|speed| speed.is_finite()).unwrap_or(1.0).max(1e-9);
    layout.devices.iter().map(|entry| speed(&entry.device)).collect()
}

/// A layer's loads in units of the ideal time of a device of speed 1, and whether they say anything.
fn ideal(problem: &Problem, layer: berth_types::LayerId, speeds: &[f64]) -> (Vec<f64>, bool) {
    let tokens = problem.instance.loads.get(&layer).map(Vec::as_slice).unwrap_or_default();
    let experts = num::index(problem.instance.geometry.experts);
    let loads: Vec<f64> = (0..experts).map(|expert| num::real(tokens.get(expert).copied().unwrap_or(0))).collect();
    let total: f64 = loads.iter().sum();
    let (loads, total, known) =
        if total > 0.0 { (loads, total, true) } else { (vec![1.0; experts], num::real_size(experts), false) };
    let unit = (total / speeds.iter().sum::<f64>().max(f64::MIN_POSITIVE)).max(f64::MIN_POSITIVE);
    (loads.iter().map(|load| load / unit).collect(), known)
}
