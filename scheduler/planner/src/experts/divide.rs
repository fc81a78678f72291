//! Unlike devices with few slots: experts are divided over the kinds of devices so that each kind gets its
//! part of the load, and each kind is solved as a fleet of its own. Improves nothing across kinds.

use super::{
    board::EMPTY,
    fleet::{Fleet, Site},
    layer::{self, Duty},
};
use crate::{num, problem::Effort};

/// Devices of one kind: equal speed and slots.
struct Kind {
    devices: Vec<usize>,
    fleet: Fleet,
    /// Its part of the load.
    due: f64,
    /// Experts that it can take.
    room: usize,
    experts: Vec<usize>,
    load: f64,
}

impl Kind {
    fn ratio(&self, more: f64) -> f64 {
        (self.load + more) / self.due
    }
}

/// The slots of a layer, each kind of device by itself; `None` if there is one kind only, or one that a
/// single failure domain holds, or experts do not divide over the kinds.
pub(super) fn slots(fleet: &Fleet, loads: &[f64], duty: Duty, effort: Effort) -> Option<Vec<usize>> {
    let mut kinds = kinds(fleet, duty)?;
    deal(&mut kinds, loads)?;
    level(&mut kinds, loads);
    let fits = |kind: &Kind| {
        let experts = kind.experts.len();
        kind.fleet.room(experts, duty.copies, duty.apart) >= experts * duty.copies
    };
    if !kinds.iter().all(fits) {
        return None;
    }
    let mut slots = vec![EMPTY; fleet.slots()];
    for kind in &kinds {
        let ideal = kind.load / kind.fleet.speed;
        let own: Vec<f64> = kind.experts.iter().map(|expert| loads[*expert] / ideal.max(f64::MIN_POSITIVE)).collect();
        let units = effort.units * num::count(kind.fleet.slots()) / num::count(fleet.slots().max(1));
        let bound = kind.fleet.bound(&own).0;
        let board = layer::fresh(&kind.fleet, &own, bound, duty, Effort { units, ..effort });
        for (at, device) in kind.devices.iter().enumerate() {
            for (slot, held) in fleet.range(*device).zip(&board.slots[kind.fleet.range(at)]) {
                slots[slot] = kind.experts.get(*held).copied().unwrap_or(EMPTY);
            }
        }
    }
    Some(slots)
}

fn kinds(fleet: &Fleet, duty: Duty) -> Option<Vec<Kind>> {
    let mut devices: Vec<usize> = (0..fleet.devices()).filter(|device| fleet.sites[*device].slots > 0).collect();
    let key = |device: &usize| (fleet.inverse[*device].to_bits(), fleet.sites[*device].slots);
    devices.sort_by_key(|device| (key(device), *device));
    let groups: Vec<Vec<usize>> =
        devices.chunk_by(|one, other| key(one) == key(other)).map(<[usize]>::to_vec).collect();
    if groups.len() < 2 {
        return None;
    }
    let kind = |devices: Vec<usize>| {
        let sites: Vec<Site> = devices.iter().map(|device| fleet.sites[*device].clone()).collect();
        let own = Fleet::new(&sites);
        let room = own.room(usize::MAX / 4, duty.copies, duty.apart) / duty.copies.max(1);
        (own.nodes > 1 || fleet.nodes < 2).then(|| Kind {
            due: own.speed,
            room,
            devices,
            fleet: own,
            experts: Vec::new(),
            load: 0.0,
        })
    };
    groups.into_iter().map(kind).collect()
}

/// Heaviest first, each expert to the kind that still needs the heaviest ones: every kind gets experts in
/// proportion to its slots, so that each has as many copies to spare.
fn deal(kinds: &mut [Kind], loads: &[f64]) -> Option<()> {
    let slots: usize = kinds.iter().map(|kind| kind.fleet.slots()).sum();
    let mut quotas: Vec<usize> =
        kinds.iter().map(|kind| (loads.len() * kind.fleet.slots() / slots).min(kind.room)).collect();
    let mut short = loads.len().checked_sub(quotas.iter().sum())?;
    for (quota, kind) in quotas.iter_mut().zip(kinds.iter()) {
        let more = short.min(kind.room - *quota);
        *quota += more;
        short -= more;
    }
    let mut order: Vec<usize> = (0..loads.len()).collect();
    order.sort_unstable_by(|one, other| loads[*other].total_cmp(&loads[*one]).then(one.cmp(other)));
    for expert in order {
        let need = |(kind, quota): (&Kind, usize)| {
            let left = quota.checked_sub(kind.experts.len()).filter(|left| *left > 0)?;
            Some((kind.due - kind.load) / num::real_size(left))
        };
        let needs = kinds.iter().zip(&quotas).map(|(kind, quota)| need((kind, *quota))).enumerate();
        let best = needs.filter_map(|(at, need)| Some((at, need?)));
        let (at, _) = best.max_by(|(one, first), (other, second)| first.total_cmp(second).then(other.cmp(one)))?;
        kinds[at].experts.push(expert);
        kinds[at].load += loads[expert];
    }
    kinds.iter().all(|kind| !kind.experts.is_empty()).then_some(())
}

/// Exchanges experts between the fullest and the emptiest kind while that helps both.
fn level(kinds: &mut [Kind], loads: &[f64]) {
    for _ in 0..64 {
        let by = |one: &&usize, other: &&usize| kinds[**one].ratio(0.0).total_cmp(&kinds[**other].ratio(0.0));
        let order: Vec<usize> = (0..kinds.len()).collect();
        let (Some(full), Some(empty)) = (order.iter().max_by(by).copied(), order.iter().min_by(by).copied()) else {
            return;
        };
        let worst = kinds[full].ratio(0.0) - 1e-5;
        let mut best: Option<(f64, usize, usize)> = None;
        for (one, big) in kinds[full].experts.iter().enumerate() {
            for (other, small) in kinds[empty].experts.iter().enumerate() {
                let less = loads[*big] - loads[*small];
                let after = kinds[full].ratio(-less).max(kinds[empty].ratio(less));
                if less > 0.0 && after < best.map_or(worst, |(least, ..)| least) {
                    best = Some((after, one, other));
                }
            }
        }
        let Some((_, one, other)) = best else { return };
        let (big, small) = (kinds[full].experts[one], kinds[empty].experts[other]);
        kinds[full].experts[one] = small;
        kinds[empty].experts[other] = big;
        kinds[full].load += loads[small] - loads[big];
        kinds[empty].load += loads[big] - loads[small];
    }
}
