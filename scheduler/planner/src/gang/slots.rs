//! How many slots each device of an instance gives it.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use crate::{
    num,
    problem::{Device, Instance, Survive},
};

/// Slots per layer of each device, `wanted` in all: in proportion to speed, within its memory, and such that two
/// copies of each expert find different failure domains where that is needed. `None` if there are too few.
pub(super) fn share(instance: &Instance, level: Survive, wanted: usize, devices: &[&Device]) -> Option<Vec<usize>> {
    let experts = num::index(instance.geometry.experts);
    let room: Vec<usize> = devices.iter().map(|device| instance.capacity(device, devices.len())).collect();
    let needed = experts * level.copies();
    let by_domain = |slots: &[usize]| {
        let mut sums: BTreeMap<&str, usize> = BTreeMap::new();
        for (device, slots) in devices.iter().zip(slots) {
            *sums.entry(device.failure_domain(level)).or_default() += slots;
        }
        sums
    };
    let counted = |slots: &[usize]| by_domain(slots).values().map(|sum| (*sum).min(experts)).sum::<usize>();
    let single = level == Survive::Nothing;
    let enough = |slots: &[usize]| if single { slots.iter().sum::<usize>() } else { counted(slots) } >= needed;
    if !enough(&room) {
        return None;
    }
    let mut slots = apportion(wanted.min(room.iter().sum()), devices, &room);
    while !enough(&slots) {
        // A domain with more slots than experts gives one to a domain with fewer: its fullest device to
        // the emptiest there.
        let sums = by_domain(&slots);
        let sum = |at: &usize| sums.get(devices.get(*at)?.failure_domain(level)).copied();
        let full = |at: &usize| (sum(at), slots.get(*at).copied(), Reverse(*at));
        let from =
            (0..slots.len()).filter(|at| sum(at) > Some(experts) && slots.get(*at) > Some(&0)).max_by_key(full)?;
        let to = (0..slots.len())
            .filter(|at| sum(at) < Some(experts) && slots.get(*at) < room.get(*at))
            .min_by_key(|at| (sum(at), slots.get(*at).copied(), *at))?;
        *slots.get_mut(from)? -= 1;
        *slots.get_mut(to)? += 1;
    }
    Some(slots)
}

/// `wanted` slots over devices in proportion to their speed, none above its room: each slot goes where
/// slots ÷ speed is least. The sum is `wanted` if the room allows it.
fn apportion(wanted: usize, devices: &[&Device], room: &[usize]) -> Vec<usize> {
    let mut slots = vec![0_usize; devices.len()];
    // The key is above 0, so that its bits order as it does.
    let key = |at: usize, slots: usize| {
        let speed = devices.get(at).map_or(1.0, |device| device.speed.max(f64::MIN_POSITIVE));
        Reverse(((num::real_size(slots + 1) / speed).to_bits(), at))
    };
    let mut next: BinaryHeap<_> = (0..slots.len()).filter(|at| room.get(*at) > Some(&0)).map(|at| key(at, 0)).collect();
    for _ in 0..wanted {
        let Some(Reverse((_, at))) = next.pop() else { break };
        let Some(held) = slots.get_mut(at) else { break };
        *held += 1;
        if room.get(at) > Some(&*held) {
            next.push(key(at, *held));
        }
    }
    slots
}
