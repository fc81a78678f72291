//! The order of moves. A device holds the slots it serves and those it loads at the same time; what does
//! not fit so is split into waves, each a revision of its own, none of which leaves an expert without a
//! replica. Changes no target.

use std::collections::{BTreeMap, BTreeSet};

use berth_types::{Bytes, DeviceId, ExpertId, LayerId};

use crate::{
    gang::Infeasible,
    num,
    plan::{DeviceSlots, Layout},
    problem::{Problem, Standing},
};

type Held = BTreeMap<DeviceId, BTreeSet<(LayerId, ExpertId)>>;
type Row = Vec<Option<ExpertId>>;

/// The layouts to go through so that no device ever holds more than it has room for. The last one is
/// `target`.
///
/// # Errors
/// [`Infeasible::NoTransition`] naming the device that cannot load a single expert.
pub(crate) fn order(
    problem: &Problem,
    target: &Layout,
    previous: Option<&Layout>,
    copies: usize,
) -> Result<Vec<Layout>, Infeasible> {
    let mut held = held(problem, previous);
    let Some(previous) = previous else { return Ok(vec![target.clone()]) };
    let goal = framed(problem, previous, target, target);
    let mut current = framed(problem, previous, target, previous);
    let mut waves = Vec::new();
    loop {
        let room = rooms(problem, &held, target.devices.len());
        if loads(&goal, &held).iter().all(|(device, new)| room.get(*device).is_none_or(|room| new <= room)) {
            waves.push(target.clone());
            return Ok(waves);
        }
        let next = step(&current, &goal, &held, &room, copies);
        if next == current {
            return Err(no_transition(problem, &goal, &held, &room));
        }
        held = owned(&next);
        waves.push(next.clone());
        current = next;
    }
}

/// What devices may still hold of this instance.
fn held(problem: &Problem, previous: Option<&Layout>) -> Held {
    let mut held = Held::new();
    for layout in problem.held.iter().chain(previous) {
        for (device, replicas) in layout.replicas() {
            held.entry(device.clone()).or_default().extend(replicas);
        }
    }
    held
}

fn owned(layout: &Layout) -> Held {
    layout.replicas().into_iter().map(|(device, replicas)| (device.clone(), replicas)).collect()
}

/// `layout` in a frame that has room for both layouts: their living devices, with the larger number of
/// slots.
fn framed(problem: &Problem, previous: &Layout, target: &Layout, layout: &Layout) -> Layout {
    let alive =
        |id: &DeviceId| problem.devices.iter().any(|device| device.id == *id && device.standing != Standing::Gone);
    let mut slots: BTreeMap<&DeviceId, u32> = BTreeMap::new();
    for entry in previous.devices.iter().filter(|entry| alive(&entry.device)).chain(&target.devices) {
        let most = slots.entry(&entry.device).or_default();
        *most = (*most).max(entry.slots);
    }
    let mut layers: BTreeMap<LayerId, Row> = target.layers.keys().map(|layer| (*layer, Row::new())).collect();
    let mut devices = Vec::new();
    for (device, slots) in slots {
        let own = layout.slots_of(device);
        for (layer, row) in &mut layers {
            let mut part = own.get(layer).cloned().unwrap_or_default();
            part.resize(num::index(slots), None);
            row.append(&mut part);
        }
        devices.push(DeviceSlots { device: device.clone(), slots });
    }
    Layout { devices, layers }
}

/// Experts that each device can load beside what it holds.
fn rooms(problem: &Problem, held: &Held, devices: usize) -> BTreeMap<DeviceId, u64> {
    let room = |device: &crate::problem::Device| {
        let expert = problem.instance.expert_bytes(device.vendor);
        let memory = problem.instance.memory(device, devices);
        let usable = memory.room();
        let full = expert.times(num::count(held.get(&device.id).map_or(0, BTreeSet::len)));
        usable.minus(full).get().checked_div(expert.get()).unwrap_or(u64::MAX)
    };
    problem.devices.iter().map(|device| (device.id.clone(), room(device))).collect()
}

/// Experts that each device must load for `layout`.
fn loads<'a>(layout: &'a Layout, held: &Held) -> BTreeMap<&'a DeviceId, u64> {
    let none = BTreeSet::new();
    let new = |device: &DeviceId, replicas: &BTreeSet<_>| {
        num::count(replicas.difference(held.get(device).unwrap_or(&none)).count())
    };
    layout.replicas().into_iter().map(|(device, replicas)| (device, new(device, &replicas))).collect()
}

/// One layer on its way.
#[derive(Clone, Copy)]
struct Change<'a> {
    layer: LayerId,
    old: &'a Row,
    new: &'a Row,
}

/// As much of the way from `current` to `goal` as fits at once: experts without a replica first, then whole
/// layers where possible, else a part of one.
fn step(current: &Layout, goal: &Layout, held: &Held, room: &BTreeMap<DeviceId, u64>, copies: usize) -> Layout {
    let mut next = current.clone();
    let mut room = room.clone();
    let mut changed = restore(current, goal, held, &mut room, &mut next);
    for (layer, row) in &goal.layers {
        if next.layers.get(layer) == Some(row) {
            continue;
        }
        let single = |row: &Row| Layout { devices: goal.devices.clone(), layers: [(*layer, row.clone())].into() };
        let (whole, part) = (single(row), next.layers.get(layer).map(single));
        let restored = part.as_ref().map(|part| loads(part, held)).unwrap_or_default();
        let mut new = loads(&whole, held);
        for (device, new) in &mut new {
            *new = new.saturating_sub(restored.get(device).copied().unwrap_or(0));
        }
        if new.iter().all(|(device, new)| room.get(*device).is_none_or(|room| new <= room)) {
            for (device, new) in new {
                if let Some(room) = room.get_mut(device) {
                    *room = room.saturating_sub(new);
                }
            }
            next.layers.insert(*layer, row.clone());
            changed = true;
        }
    }
    if changed {
        return next;
    }
    for (layer, row) in &goal.layers {
        let Some(old) = current.layers.get(layer).filter(|old| *old != row) else { continue };
        for least in [copies, 1] {
            let change = Change { layer: *layer, old, new: row };
            let part = partial(goal, change, held, &room, least, &|_| true);
            if part != *old {
                next.layers.insert(*layer, part);
                return next;
            }
        }
    }
    next
}

/// Gives experts without a replica one in `next`, in every layer, as far as there is room, which is taken off
/// `room`. Says whether any got one.
fn restore(
    current: &Layout,
    goal: &Layout,
    held: &Held,
    room: &mut BTreeMap<DeviceId, u64>,
    next: &mut Layout,
) -> bool {
    let mut any = false;
    for (layer, row) in &goal.layers {
        let Some(old) = current.layers.get(layer) else { continue };
        let there: BTreeSet<ExpertId> = old.iter().flatten().copied().collect();
        let lost = |expert: ExpertId| !there.contains(&expert);
        if !row.iter().flatten().any(|expert| lost(*expert)) {
            continue;
        }
        let part = partial(goal, Change { layer: *layer, old, new: row }, held, room, 1, &lost);
        if part == *old {
            continue;
        }
        let single = Layout { devices: goal.devices.clone(), layers: [(*layer, part.clone())].into() };
        for (device, new) in loads(&single, held) {
            if let Some(room) = room.get_mut(device) {
                *room = room.saturating_sub(new);
            }
        }
        next.layers.insert(*layer, part);
        any = true;
    }
    any
}

/// A part of one layer's changes, of those that bring an expert that is `wanted` or empty a slot: as many as there is
/// room for, less those that would leave an expert with fewer than `least` replicas (or than it had).
fn partial(
    goal: &Layout,
    change: Change<'_>,
    held: &Held,
    room: &BTreeMap<DeviceId, u64>,
    least: usize,
    wanted: &dyn Fn(ExpertId) -> bool,
) -> Row {
    let Change { layer, old, new } = change;
    let mut row = old.clone();
    for (device, range) in goal.ranges() {
        let mut left = room.get(device).copied().unwrap_or(0);
        for at in range {
            let (Some(slot), Some(target)) = (row.get_mut(at), new.get(at)) else { continue };
            let has = |expert: ExpertId| held.get(device).is_some_and(|held| held.contains(&(layer, expert)));
            let cost = u64::from(target.is_some_and(|expert| !has(expert)));
            if slot != target && cost <= left && target.is_none_or(wanted) {
                left -= cost;
                *slot = *target;
            }
        }
    }
    let copies = |row: &Row, expert: ExpertId| row.iter().filter(|slot| **slot == Some(expert)).count();
    let missing = |row: &Row| {
        old.iter().enumerate().find(|(at, expert)| {
            row.get(*at) != Some(*expert)
                && expert.is_some_and(|expert| {
                    copies(row, expert) < least.min(copies(old, expert)).min(copies(new, expert).max(1))
                })
        })
    };
    while let Some((at, expert)) = missing(&row) {
        if let Some(slot) = row.get_mut(at) {
            *slot = *expert;
        }
    }
    without_doubles(goal, old, row)
}

/// Takes back changes on devices that would hold an expert twice.
fn without_doubles(goal: &Layout, old: &Row, mut row: Row) -> Row {
    for (_, range) in goal.ranges() {
        let part = row.get(range.clone()).unwrap_or_default();
        let held: Vec<_> = part.iter().flatten().collect();
        if held.iter().collect::<BTreeSet<_>>().len() < held.len()
            && let (Some(slots), Some(before)) = (row.get_mut(range.clone()), old.get(range))
        {
            slots.clone_from_slice(before);
        }
    }
    row
}

fn no_transition(problem: &Problem, goal: &Layout, held: &Held, room: &BTreeMap<DeviceId, u64>) -> Infeasible {
    let tight = loads(goal, held)
        .into_iter()
        .filter(|(_, new)| *new > 0)
        .min_by_key(|(device, _)| room.get(*device).copied().unwrap_or(0))
        .map(|(device, _)| device.clone());
    let device = tight.and_then(|id| problem.devices.iter().find(|device| device.id == id));
    match device {
        Some(device) => {
            Infeasible::NoTransition { device: device.id.clone(), short: problem.instance.expert_bytes(device.vendor) }
        }
        None => Infeasible::Arrangement { layer: 0, devices: room.len(), why: "no wave makes progress".to_owned() },
    }
}

/// Replicas and bytes that devices load over all `waves`.
pub(crate) fn moved(problem: &Problem, waves: &[Layout], previous: Option<&Layout>) -> (u64, Bytes) {
    let mut held = held(problem, previous);
    let (mut moves, mut bytes) = (0_u64, Bytes::ZERO);
    for wave in waves {
        for (device, new) in loads(wave, &held) {
            let vendor = problem.devices.iter().find(|known| known.id == *device).map(|known| known.vendor);
            moves = moves.saturating_add(new);
            bytes = bytes.plus(vendor.map_or(Bytes::ZERO, |vendor| problem.instance.expert_bytes(vendor)).times(new));
        }
        held = owned(wave);
    }
    (moves, bytes)
}
