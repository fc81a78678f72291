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
const HALF: usize = 512;
/// Part of the way to the goal by which T falls once it is reached, and the least fall.
const STEP: f64 = 0.2;
const LEAST: f64 = 2e-4;
/// Violations more that are taken with probability 1/e.
const HEAT: f64 = 0.25;
/// Work of looking at one exchange, in units of the search, and exchanges that a new T costs.
const COST: u64 = 40;
const RENEWAL: u64 = 10;
/// Slots up to which sums of bins stay in range.
const MOST: usize = 8_192;

/// Whether the search applies.
pub(super) fn apply(fleet: &Fleet) -> bool {
    fleet.classes.len() == 1 && fleet.sites.iter().all(|site| site.slots == 2)
}

/// Better copies by expert than `counts`, keeping `least` each. `loads` are in units of the ideal time;
/// `goal` is good enough.
pub(super) fn recount(fleet: &Fleet, loads: &[f64], counts: &mut [usize], least: usize, goal: f64, effort: &mut u64) {
    if fleet.slots() > MOST {
        return;
    }
    let most = fleet.devices();
    let mut now = counts.to_vec();
    let mut spare = Spare::new(&now, least);
    let mut best = fold(fleet, loads, counts);
    let mut target = nearer(best, goal);
    let mut bins = Bins::new(fleet, loads, &now, target);
    let mut violated = bins.violated();
    let mut dice = Dice(num::count(loads.len()));
    let mut tries = *effort / COST;
    *effort -= tries * COST;
    while tries > 0 && best > goal {
        if violated == 0 {
            let reached = fold(fleet, loads, &now);
            if reached < best {
                counts.copy_from_slice(&now);
                best = reached;
            }
            target = nearer(target.min(best), goal);
            bins = Bins::new(fleet, loads, &now, target);
            violated = bins.violated();
            tries = tries.saturating_sub(RENEWAL);
            continue;
        }
        tries -= 1;
        let more = dice.below(loads.len());
        let Some(fewer) = spare.draw(&mut dice) else { break };
        if more == fewer || now[more] >= most {
            continue;
        }
        let Some(marks) = bins.exchange((loads[more], now[more]), (loads[fewer], now[fewer])) else { continue };
        let worse = bins.rise(&marks);
        if worse <= 0 || dice.unit() < (-f64::from(worse) / HEAT).exp() {
            bins.add(&marks);
            violated += worse;
            now[more] += 1;
            now[fewer] -= 1;
            spare.note(more, now[more]);
            spare.note(fewer, now[fewer]);
        }
    }
}

/// The next target.
fn nearer(reached: f64, goal: f64) -> f64 {
    (reached - ((reached - goal) * STEP).max(LEAST)).max(goal)
}

/// Experts with more copies than they must have.
struct Spare {
    least: usize,
    experts: Vec<usize>,
    /// Where an expert is among them.
    at: Vec<Option<usize>>,
}

impl Spare {
    fn new(counts: &[usize], least: usize) -> Self {
        let mut spare = Self { least, experts: Vec::with_capacity(counts.len()), at: vec![None; counts.len()] };
        for (expert, count) in counts.iter().enumerate() {
            spare.note(expert, *count);
        }
        spare
    }

    fn draw(&self, dice: &mut Dice) -> Option<usize> {
        self.experts.get(dice.below(self.experts.len())).copied()
    }

    /// Notes that `expert` has `count` copies now.
    fn note(&mut self, expert: usize, count: usize) {
        match self.at[expert] {
            None if count > self.least => {
                self.at[expert] = Some(self.experts.len());
                self.experts.push(expert);
            }
            Some(at) if count <= self.least => {
                self.at[expert] = None;
                self.experts.swap_remove(at);
                if let Some(moved) = self.experts.get(at) {
                    self.at[*moved] = Some(at);
                }
            }
            _ => {}
        }
    }
}

/// The largest pair when the largest copy goes with the smallest.
fn fold(fleet: &Fleet, loads: &[f64], counts: &[usize]) -> f64 {
    let mut groups: Vec<(f64, usize)> =
        loads.iter().zip(counts).map(|(load, count)| (load / num::real_size((*count).max(1)), *count)).collect();
    let copies: usize = counts.iter().sum();
    groups.push((0.0, fleet.slots().saturating_sub(copies)));
    groups.sort_unstable_by(|one, other| one.0.total_cmp(&other.0));
    let (mut small, mut large) = (0, groups.len() - 1);
    let (mut of_small, mut of_large, mut peak) = (groups[small].1, groups[large].1, 0.0_f64);
    while small < large {
        if of_small == 0 {
            small += 1;
            of_small = groups[small].1;
        } else if of_large == 0 {
            large -= 1;
            of_large = groups[large].1;
        } else {
            peak = peak.max(groups[small].0 + groups[large].0);
            let pairs = of_small.min(of_large);
            (of_small, of_large) = (of_small - pairs, of_large - pairs);
        }
    }
    // One group is left, with what neither end has taken of it.
    if of_small.min(of_large) > 1 { peak.max(2.0 * groups[small].0) } else { peak }
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

/// From a bin on, so many more; in the order of bins.
type Marks = [(usize, i16); 4];

/// By bin j: copies of at most j bins, less copies above 2·HALF − j bins. Negative = violated.
struct Bins {
    slack: [i16; HALF + 1],
    scale: f64,
}

impl Bins {
    fn new(fleet: &Fleet, loads: &[f64], counts: &[usize], target: f64) -> Self {
        let scale = num::real_size(2 * HALF) / target.max(f64::MIN_POSITIVE);
        let mut bins = Self { slack: [0; HALF + 1], scale };
        for (load, count) in loads.iter().zip(counts) {
            // A copy above the target is above every bin, twice.
            let (at, copies) = bins.mark(*load, *count).unwrap_or((0, -2 * num::short(*count)));
            bins.slack[at] += copies;
        }
        bins.slack[0] += num::short(fleet.slots()) - num::short(counts.iter().sum());
        let mut sum = 0;
        for slack in &mut bins.slack {
            sum += *slack;
            *slack = sum;
        }
        bins
    }

    /// The bin from which on the `count` copies of an expert count, and how: nothing if they are above the target.
    #[inline]
    fn mark(&self, load: f64, count: usize) -> Option<(usize, i16)> {
        let bin = num::ceil(load / num::real_size(count.max(1)) * self.scale);
        match bin {
            0..=HALF => Some((bin, num::short(count))),
            _ if bin <= 2 * HALF => Some((2 * HALF + 1 - bin, -num::short(count))),
            _ => None,
        }
    }

    /// What changes when a copy of one expert takes the place of one of another; nothing if the other's would
    /// be above the target.
    fn exchange(&self, more: (f64, usize), fewer: (f64, usize)) -> Option<Marks> {
        let gone = |load: f64, count: usize| {
            let (at, copies) = self.mark(load, count).unwrap_or((0, -2 * num::short(count)));
            (at, -copies)
        };
        let mut marks = [
            gone(more.0, more.1),
            self.mark(more.0, more.1 + 1)?,
            gone(fewer.0, fewer.1),
            self.mark(fewer.0, fewer.1 - 1)?,
        ];
        marks.sort_unstable_by_key(|mark| mark.0);
        Some(marks)
    }

    fn violated(&self) -> i32 {
        self.slack.iter().map(|slack| -i32::from((*slack).min(0))).sum()
    }

    /// By how much the sum of violations grows.
    fn rise(&self, marks: &Marks) -> i32 {
        let (mut more, mut rise) = (0, 0);
        for (at, mark) in marks.iter().enumerate() {
            more += mark.1;
            let end = marks.get(at + 1).map_or(HALF + 1, |next| next.0);
            if more != 0 {
                let grown = |slack: &i16| i32::from((*slack).min(0) - slack.saturating_add(more).min(0));
                rise += self.slack[mark.0..end].iter().map(grown).sum::<i32>();
            }
        }
        rise
    }

    fn add(&mut self, marks: &Marks) {
        let mut more = 0;
        for (at, mark) in marks.iter().enumerate() {
            more += mark.1;
            let end = marks.get(at + 1).map_or(HALF + 1, |next| next.0);
            for slack in &mut self.slack[mark.0..end] {
                *slack += more;
            }
        }
    }
}
