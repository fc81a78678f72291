//! How many slots each device of an instance gives it.

use std::collections::BTreeMap;

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
        let full = |at: &usize| (sum(at), slots.get(*at).copied(), std::cmp::Reverse(*at));
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
    for _ in 0..wanted {
        let next = (0..slots.len())
            .filter(|at| slots.get(*at) < room.get(*at))
            .map(|at| {
                let filled = num::real_size(slots.get(at).copied().unwrap_or(0) + 1);
                (filled / devices.get(at).map_or(1.0, |device| device.speed.max(f64::MIN_POSITIVE)), at)
            })
            .min_by(|one, other| one.0.total_cmp(&other.0).then(one.1.cmp(&other.1)));
        match next.and_then(|(_, at)| slots.get_mut(at)) {
            Some(slot) => *slot += 1,
            None => break,
        }
    }
    slots
}
