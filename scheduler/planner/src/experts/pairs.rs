//! Replica counts where every device has two slots and the same speed. There the best slots for given
//! counts are known (the largest copy with the smallest), so that the search can go over counts alone.
//! Places nothing.
//!
//! With copies sorted, pairing the i-th largest with the i-th smallest minimises the largest pair. All pairs
//! fit under T exactly when, for every u from T/2 to T, the copies above u are no more than those of at most
//! T − u (Hall's condition for nested sets). Copies are counted in bins of T ÷ (2·HALF), rounded up, so that
//! what fits in bins fits. The search changes one copy of one expert for one of another while the sum of
//! violations does not grow, with a little heat, and lowers T whenever nothing is violated.

use super::{board::EMPTY, dice::Dice, fleet::Fleet};
use crate::num;

/// Bins up to T/2.
const HALF: usize = 256;
/// Step by which the target falls once it is reached.
const STEP: f64 = 0.002;
/// Work of looking at one exchange, in units of the search.
const COST: u64 = 40;

/// Whether the search applies.
pub(super) fn apply(fleet: &Fleet) -> bool {
    fleet.classes.len() == 1 && fleet.sites.iter().all(|site| site.slots == 2)
}

/// Better copies by expert than `counts`, keeping `least` each. `loads` are in units of the ideal time;
/// `bound` is the least that can be reached.
pub(super) fn recount(fleet: &Fleet, loads: &[f64], counts: &mut [usize], least: usize, bound: f64, effort: &mut u64) {
    let most = fleet.devices();
    let mut now = counts.to_vec();
    let mut target = fold(fleet, loads, counts) * (1.0 - STEP);
    let mut bins = Bins::new(fleet, loads, &now, target);
    let mut violated = bins.violated();
    let mut dice = Dice(num::count(loads.len()));
    let mut tries = *effort / COST;
    *effort -= tries * COST;
    while tries > 0 && target > bound {
        if violated == 0 {
            counts.copy_from_slice(&now);
            target = target.min(fold(fleet, loads, counts)) * (1.0 - STEP);
            bins = Bins::new(fleet, loads, &now, target);
            violated = bins.violated();
            continue;
        }
        tries -= 1;
        let (more, fewer) = (dice.below(loads.len()), dice.below(loads.len()));
        if more == fewer || now[fewer] <= least || now[more] >= most {
            continue;
        }
        let change = bins.exchange((loads[more], now[more]), (loads[fewer], now[fewer]));
        let new = bins.violated_after(&change);
        // Heat of one bin: a violation more is taken with probability 1/e.
        if new <= violated || dice.unit() < (-f64::from(new - violated)).exp() {
            bins.add(&change);
            violated = new;
            now[more] += 1;
            now[fewer] -= 1;
        }
    }
}

/// The largest pair when the largest copy goes with the smallest.
fn fold(fleet: &Fleet, loads: &[f64], counts: &[usize]) -> f64 {
    let mut items: Vec<f64> = Vec::with_capacity(fleet.slots());
    for (load, count) in loads.iter().zip(counts) {
        items.extend(std::iter::repeat_n(load / num::real_size((*count).max(1)), *count));
    }
    items.resize(fleet.slots().max(items.len()), 0.0);
    items.sort_unstable_by(f64::total_cmp);
    items.iter().zip(items.iter().rev()).map(|(one, other)| one + other).fold(0.0, f64::max)
}

/// Slots for `counts` copies: pairs as in `fold`, none of one expert alone, then pairs onto devices such
/// that the copies of an expert meet as few others of it in a failure domain as they must.
pub(super) fn seat(fleet: &Fleet, loads: &[f64], counts: &[usize]) -> Vec<usize> {
    let mut order: Vec<(f64, usize)> =
        loads.iter().zip(counts).enumerate().map(|(at, (load, n))| (load / num::real_size((*n).max(1)), at)).collect();
    order.sort_unstable_by(|one, other| other.0.total_cmp(&one.0).then(one.1.cmp(&other.1)));
    let mut items: Vec<usize> =
        order.into_iter().flat_map(|(_, expert)| std::iter::repeat_n(expert, counts[expert])).collect();
    items.resize(fleet.slots(), EMPTY);
    let small = items.split_off(fleet.devices());
    let mut pairs: Vec<(usize, usize)> = items.into_iter().zip(small.into_iter().rev()).collect();
    part(&mut pairs);
    // Experts with many copies are the hardest to keep apart.
    let copies = |expert: usize| counts.get(expert).copied().unwrap_or(0);
    pairs.sort_by_key(|(one, other)| std::cmp::Reverse(copies(*one).max(copies(*other))));
    let mut devices: Vec<Vec<usize>> = vec![Vec::new(); fleet.nodes];
    for device in (0..fleet.devices()).rev() {
        devices[fleet.node[device]].push(device);
    }
    let mut there = vec![false; loads.len() * fleet.nodes];
    let mut slots = vec![EMPTY; fleet.slots()];
    for (one, other) in pairs {
        let met = |node: usize| {
            let meets = |expert: usize| expert != EMPTY && there[expert * fleet.nodes + node];
            usize::from(meets(one)) + usize::from(meets(other))
        };
        let node = (0..fleet.nodes)
            .filter(|node| !devices[*node].is_empty())
            .min_by_key(|node| (met(*node), std::cmp::Reverse(devices[*node].len()), *node));
        let Some((node, device)) = node.and_then(|node| Some((node, devices[node].pop()?))) else { break };
        for (slot, expert) in fleet.range(device).zip([one, other]) {
            slots[slot] = expert;
            if expert != EMPTY {
                there[expert * fleet.nodes + node] = true;
            }
        }
    }
    slots
}

/// Exchanges the smaller halves of pairs until none has both from one expert.
fn part(pairs: &mut [(usize, usize)]) {
    for at in 0..pairs.len() {
        let (one, other) = pairs[at];
        if one != other || one == EMPTY {
            continue;
        }
        let near = (1..pairs.len()).flat_map(|step| [at.checked_sub(step), Some(at + step)]).flatten();
        let partner = near.filter(|near| *near < pairs.len()).find(|near| {
            let (big, small) = pairs[*near];
            big != one && small != one
        });
        if let Some(partner) = partner {
            pairs[at].1 = pairs[partner].1;
            pairs[partner].1 = other;
        }
    }
}

type Row = [i32; HALF + 1];

/// By bin j: copies of at most j bins, less copies above 2·HALF − j bins. Negative = violated.
struct Bins {
    slack: Row,
    scale: f64,
}

impl Bins {
    fn new(fleet: &Fleet, loads: &[f64], counts: &[usize], target: f64) -> Self {
        let scale = num::real_size(2 * HALF) / target.max(f64::MIN_POSITIVE);
        let mut bins = Self { slack: [0; HALF + 1], scale };
        let mut row = [0; HALF + 1];
        for (load, count) in loads.iter().zip(counts) {
            bins.mark(&mut row, *load, *count, 1);
        }
        row[0] += num::signed(fleet.slots()) - num::signed(counts.iter().sum());
        sum_up(&mut row);
        bins.slack = row;
        bins
    }

    /// Notes `sign` times the copies of an expert in a row of differences.
    #[inline]
    fn mark(&self, row: &mut Row, load: f64, count: usize, sign: i32) {
        if count == 0 {
            return;
        }
        let bin = num::ceil(load / num::real_size(count) * self.scale);
        let (at, each) = if bin <= HALF {
            (bin, 1)
        } else if bin <= 2 * HALF {
            (2 * HALF + 1 - bin, -1)
        } else {
            // Larger than the target: never worth it.
            (0, -64)
        };
        row[at] += sign * each * num::signed(count);
    }

    fn exchange(&self, more: (f64, usize), fewer: (f64, usize)) -> Row {
        let mut row = [0; HALF + 1];
        self.mark(&mut row, more.0, more.1, -1);
        self.mark(&mut row, more.0, more.1 + 1, 1);
        self.mark(&mut row, fewer.0, fewer.1, -1);
        self.mark(&mut row, fewer.0, fewer.1 - 1, 1);
        sum_up(&mut row);
        row
    }

    fn violated(&self) -> i32 {
        self.slack.iter().map(|slack| (-slack).max(0)).sum()
    }

    fn violated_after(&self, change: &Row) -> i32 {
        self.slack.iter().zip(change).map(|(slack, change)| (-(slack + change)).max(0)).sum()
    }

    fn add(&mut self, change: &Row) {
        for (slack, change) in self.slack.iter_mut().zip(change) {
            *slack += change;
        }
    }
}

fn sum_up(row: &mut Row) {
    let mut sum = 0;
    for entry in row {
        sum += *entry;
        *entry = sum;
    }
}
