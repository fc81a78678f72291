//! Unlike devices: experts are divided over the kinds of devices so that each kind gets its part of the load, and each
//! kind is solved as a fleet of its own. Improves nothing across kinds.

use super::{
    board::EMPTY,
    fleet::{Fleet, Site},
    layer::{self, Duty},
};
use crate::{num, problem::Effort};

/// How much more experts than copies go to kinds with few slots for their speed: the power of speed ÷ slots by which a
/// kind's part of the experts grows beyond its part of the slots. What such devices need most are heavy experts, and a
/// copy takes a slot from one.
const LEANS: [f64; 6] = [0.0, 0.125, 0.25, 0.5, 1.0, 4.0];

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

    /// Speed for each slot.
    fn pull(&self) -> f64 {
        self.due / num::real_size(self.fleet.slots())
    }

    /// The least time of its slowest device with these experts.
    fn estimate(&self, experts: &[usize], loads: &[f64]) -> f64 {
        let own: Vec<f64> = experts.iter().map(|expert| loads[*expert]).collect();
        self.fleet.bound(&own).0 * own.iter().sum::<f64>() / self.due
    }
}

/// The slots of a layer, each kind of device by itself; `None` if there is one kind only, or one that a single failure
/// domain holds although copies must be apart, or experts do not divide over the kinds. Copies of a kind that one
/// domain holds are for the caller to scatter.
pub(super) fn slots(fleet: &Fleet, loads: &[f64], duty: Duty, effort: Effort) -> Option<Vec<usize>> {
    let mut kinds = kinds(fleet, duty)?;
    let leans = if alike(&kinds) { LEANS.get(..1)? } else { &LEANS };
    let dealt = leans.iter().filter_map(|lean| {
        let experts = deal(&kinds, loads, *lean)?;
        let slowest = kinds.iter().zip(&experts).map(|(kind, own)| kind.estimate(own, loads)).fold(0.0, f64::max);
        Some((slowest, experts))
    });
    let (_, experts) = dealt.min_by(|one, other| one.0.total_cmp(&other.0))?;
    for (kind, own) in kinds.iter_mut().zip(experts) {
        kind.load = own.iter().map(|expert| loads[*expert]).sum();
        kind.experts = own;
    }
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
        (duty.copies < 2 || own.nodes > 1 || fleet.nodes < 2).then(|| Kind {
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

/// Whether all kinds have as many slots for their speed.
fn alike(kinds: &[Kind]) -> bool {
    let pulls = || kinds.iter().map(Kind::pull);
    pulls().fold(0.0, f64::max) < pulls().fold(f64::INFINITY, f64::min) * 1.01
}

/// How many experts each kind gets: in proportion to slots × pull to the power of `lean`, as far as it has room.
fn quotas(kinds: &[Kind], experts: usize, lean: f64) -> Option<Vec<usize>> {
    let weight = |kind: &Kind| num::real_size(kind.fleet.slots()) * kind.pull().powf(lean);
    let mut order: Vec<usize> = (0..kinds.len()).collect();
    order.sort_by(|one, other| kinds[*other].pull().total_cmp(&kinds[*one].pull()).then(one.cmp(other)));
    let mut quotas = vec![0; kinds.len()];
    let mut left = experts;
    let mut weights: f64 = kinds.iter().map(weight).sum();
    for at in order {
        let part = num::real_size(left) * weight(&kinds[at]) / weights;
        weights -= weight(&kinds[at]);
        quotas[at] = num::ceil(part - 0.5).min(kinds[at].room).min(left);
        left -= quotas[at];
    }
    for (quota, kind) in quotas.iter_mut().zip(kinds) {
        let more = left.min(kind.room - *quota);
        *quota += more;
        left -= more;
    }
    (left == 0).then_some(quotas)
}

/// The experts of each kind: heaviest first, each to the kind that still needs the heaviest ones.
fn deal(kinds: &[Kind], loads: &[f64], lean: f64) -> Option<Vec<Vec<usize>>> {
    let mut left = quotas(kinds, loads.len(), lean)?;
    let mut due: Vec<f64> = kinds.iter().map(|kind| kind.due).collect();
    let mut experts: Vec<Vec<usize>> = vec![Vec::new(); kinds.len()];
    let mut order: Vec<usize> = (0..loads.len()).collect();
    order.sort_unstable_by(|one, other| loads[*other].total_cmp(&loads[*one]).then(one.cmp(other)));
    for expert in order {
        let need = |at: usize| due[at] / num::real_size(left[at]);
        let open = (0..kinds.len()).filter(|at| left[*at] > 0);
        let at = open.max_by(|one, other| need(*one).total_cmp(&need(*other)).then(other.cmp(one)))?;
        left[at] -= 1;
        due[at] -= loads[expert];
        experts[at].push(expert);
    }
    experts.iter().all(|own| !own.is_empty()).then_some(experts)
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
