//! Local search on one layer: takes load off devices above a target by swapping, moving or replacing
//! replicas. Keeps every rule that the layer already keeps; stops at the target, when nothing helps, or when
//! the effort is spent.

use super::{
    board::{Board, EMPTY},
    dice::Dice,
};
use crate::num;

/// A change of the board.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Change {
    /// What two slots hold changes places; one of them may be empty.
    Swap(usize, usize),
    /// A slot's replica gives way to one more copy of an expert.
    Copy(usize, usize),
    /// A slot's replica goes.
    Drop(usize),
}

/// What the search may do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Copies that each expert keeps.
    pub(super) least: usize,
    /// In as many failure domains.
    pub(super) apart: bool,
    /// Time above which a device is too slow, in units of the ideal.
    pub(super) target: f64,
    /// Whether copies may be exchanged for copies of other experts.
    pub(super) copying: bool,
}

/// Slowest devices for which further copies are looked for.
const COPIES: usize = 4;
/// Devices passed over for the work of one exchange looked at.
const GLANCES: usize = 8;
/// Gain below which a change is not worth making.
const LEAST: f64 = 1e-9;

struct Found {
    gain: f64,
    change: Change,
}

#[inline]
fn over(time: f64, target: f64) -> f64 {
    (time - target).max(0.0)
}

/// Sum of what devices are above the target.
pub(super) fn excess(board: &Board<'_>, target: f64) -> f64 {
    (0..board.fleet.devices()).map(|device| over(board.time(device, 0.0), target)).sum()
}

/// What was done to a board, so that it can be undone: the change, and what a copy displaced.
pub(super) type Log = Vec<(Change, usize)>;

/// Lowers the excess until no single change does or the effort is spent.
pub(super) fn descend(board: &mut Board<'_>, rules: Rules, effort: &mut u64, log: &mut Log) {
    let mut slow: Vec<(f64, usize)> = Vec::new();
    while *effort > 0 {
        slow.clear();
        slow.extend((0..board.fleet.devices()).filter_map(|device| {
            let time = board.time(device, 0.0);
            (time > rules.target + LEAST).then_some((time, device))
        }));
        slow.sort_unstable_by(|one, other| other.0.total_cmp(&one.0).then(one.1.cmp(&other.1)));
        let mut left = *effort;
        let swap = slow.iter().find_map(|(_, device)| best_swap(board, *device, rules, &mut left));
        let copies = slow.iter().take(if swap.is_none() && rules.copying { COPIES } else { 0 });
        let found =
            swap.or_else(|| copies.into_iter().find_map(|(_, device)| best_copy(board, *device, rules, &mut left)));
        *effort = left;
        let Some(found) = found else { return };
        log.push(apply(board, found.change));
    }
}

/// Leaves a local optimum: exchanges two replicas, of a slow device and of any other, descends again, and
/// goes back unless that was better. Until nothing is slow or the effort is spent.
pub(super) fn shake(board: &mut Board<'_>, rules: Rules, effort: &mut u64, dice: &mut Dice) {
    let mut log = Log::new();
    let mut best = excess(board, rules.target);
    let calm = Rules { copying: false, ..rules };
    while *effort > 0 && best > LEAST {
        *effort = effort.saturating_sub(num::count(board.fleet.devices()));
        let Some(slow) = slowest(board) else { return };
        let (from, to) = (pick(board, slow, dice), dice.below(board.slots.len()));
        let other = board.fleet.owner[to];
        let (expert, held) = (board.slots[from], board.slots[to]);
        let lawful = other != slow
            && expert != EMPTY
            && board.may_go(expert, slow, other)
            && (held == EMPTY || board.may_go(held, other, slow));
        if !lawful {
            continue;
        }
        log.clear();
        log.push(apply(board, Change::Swap(from, to)));
        descend(board, calm, effort, &mut log);
        let now = excess(board, rules.target);
        if now < best - LEAST {
            best = now;
        } else {
            while let Some(done) = log.pop() {
                undo(board, done);
            }
        }
    }
}

/// Heat of `anneal` at its beginning and its end, in squares of the ideal time.
const HEAT: (f64, f64) = (1e-3, 3e-6);
/// Work of looking at one exchange at random.
const TRY: u64 = 8;

/// Exchanges replicas at random, at falling heat, for a smaller sum of squared loads ÷ speed. May end worse
/// than it began for the slowest device; the caller descends afterwards.
pub(super) fn anneal(board: &mut Board<'_>, effort: &mut u64, dice: &mut Dice) {
    let fleet = board.fleet;
    let before = board.slots.clone();
    let peak = board.slowest();
    let tries = *effort / TRY;
    *effort = 0;
    let rounds = tries.div_ceil(64).max(1);
    let cooling = (HEAT.1 / HEAT.0).powf(1.0 / num::real(rounds));
    let mut heat = HEAT.0;
    for at in 0..tries {
        if at % 64 == 0 {
            heat *= cooling;
        }
        let (from, to) = (dice.below(board.slots.len()), dice.below(board.slots.len()));
        let (here, there) = (fleet.owner[from], fleet.owner[to]);
        let (expert, held) = (board.slots[from], board.slots[to]);
        if here == there || expert == EMPTY {
            continue;
        }
        let less = board.share[expert] - if held == EMPTY { 0.0 } else { board.share[held] };
        let apart = board.time(here, 0.0) - board.time(there, 0.0);
        let worse = less * (less * (fleet.inverse[here] + fleet.inverse[there]) - 2.0 * apart);
        if worse > 0.0 && (worse > heat * 16.0 || dice.unit() >= (-worse / heat).exp()) {
            continue;
        }
        if board.may_go(expert, here, there) && (held == EMPTY || board.may_go(held, there, here)) {
            board.swap(from, to);
        }
    }
    board.weigh();
    // Far from where single steps can repair it, the old slots are better.
    if board.slowest() > peak * 1.05 {
        *board = Board::of(fleet, board.loads, &before);
    }
}

fn pick(board: &Board<'_>, device: usize, dice: &mut Dice) -> usize {
    let range = board.fleet.range(device);
    range.start + dice.below(range.len())
}

/// The slowest device that has slots.
pub(super) fn slowest(board: &Board<'_>) -> Option<usize> {
    let time = |device: usize| board.time(device, 0.0);
    (0..board.fleet.devices())
        .filter(|device| !board.fleet.range(*device).is_empty())
        .max_by(|one, other| time(*one).total_cmp(&time(*other)).then(other.cmp(one)))
}

/// The swap or move that lowers the excess of `slow` and the other device most.
fn best_swap(board: &Board<'_>, slow: usize, rules: Rules, effort: &mut u64) -> Option<Found> {
    let fleet = board.fleet;
    let (load, inverse, pace) = (board.carried[slow], fleet.inverse[slow], fleet.pace[slow]);
    let own = over(load * inverse, rules.target);
    let mut best = Found { gain: LEAST, change: Change::Swap(0, 0) };
    let mut any = false;
    let mut work = fleet.devices() / GLANCES;
    for other in 0..fleet.devices() {
        let (carried, back) = (board.carried[other], fleet.inverse[other]);
        let both = own + over(carried * back, rules.target);
        // Even evened out the two would gain no more.
        let even = (load + carried) / (pace + fleet.pace[other]);
        if other == slow || both - over(even, rules.target) <= best.gain {
            continue;
        }
        let range = fleet.range(other);
        work += range.len() * fleet.range(slow).len();
        for from in fleet.range(slow) {
            let expert = board.slots[from];
            if expert == EMPTY {
                continue;
            }
            let share = board.share[expert];
            for to in range.clone() {
                let held = board.slots[to];
                let less = share - if held == EMPTY { 0.0 } else { board.share[held] };
                let gain =
                    both - over((load - less) * inverse, rules.target) - over((carried + less) * back, rules.target);
                if gain > best.gain
                    && less > 0.0
                    && board.may_go(expert, slow, other)
                    && (held == EMPTY || board.may_go(held, other, slow))
                {
                    best = Found { gain, change: Change::Swap(from, to) };
                    any = true;
                }
            }
        }
        if any && best.gain >= own - LEAST {
            break;
        }
    }
    *effort = effort.saturating_sub(num::count(work.max(1)));
    any.then_some(best)
}

/// The further copy, or copy less, of an expert of `slow` that lowers the excess most.
fn best_copy(board: &Board<'_>, slow: usize, rules: Rules, effort: &mut u64) -> Option<Found> {
    let fleet = board.fleet;
    let mut best = Found { gain: LEAST, change: Change::Swap(0, 0) };
    let mut any = false;
    let mut work = 0_usize;
    for from in fleet.range(slow) {
        let expert = board.slots[from];
        if expert == EMPTY {
            continue;
        }
        if board.may_lose(expert, slow, rules.least, rules.apart) {
            let gain = drop_gain(board, expert, slow, rules.target);
            if gain > best.gain {
                best = Found { gain, change: Change::Drop(from) };
                any = true;
            }
        }
        for other in 0..fleet.devices() {
            if !board.may_gain(expert, other) {
                continue;
            }
            for to in fleet.range(other) {
                let held = board.slots[to];
                if held != EMPTY && !board.may_lose(held, other, rules.least, rules.apart) {
                    continue;
                }
                work += 4;
                let gain = copy_gain(board, expert, held, other, rules.target);
                if gain > best.gain {
                    best = Found { gain, change: Change::Copy(expert, to) };
                    any = true;
                }
            }
        }
    }
    *effort = effort.saturating_sub(num::count(work.max(1)));
    any.then_some(best)
}

/// How much the excess falls when the copy of `expert` on `device` goes.
fn drop_gain(board: &Board<'_>, expert: usize, device: usize, target: f64) -> f64 {
    let grown = board.grown(expert);
    let change = |home: usize| {
        let extra = if home == device { -board.share[expert] } else { grown };
        over(board.time(home, 0.0), target) - over(board.time(home, extra), target)
    };
    board.homes(expert).map(change).sum()
}

/// How much the excess falls when `held` on `device` (or nothing) gives way to one more copy of `expert`.
fn copy_gain(board: &Board<'_>, expert: usize, held: usize, device: usize, target: f64) -> f64 {
    let share = board.loads[expert] / num::real_size(board.count[expert] + 1);
    let relief = share - board.share[expert];
    let (lost, grown) = if held == EMPTY { (0.0, 0.0) } else { (board.share[held], board.grown(held)) };
    let change =
        |device: usize, extra: f64| over(board.time(device, 0.0), target) - over(board.time(device, extra), target);
    let mut gain = change(device, share - lost);
    for home in board.homes(expert) {
        let both = held != EMPTY && board.holds(home, held);
        gain += change(home, relief + if both { grown } else { 0.0 });
    }
    if held != EMPTY {
        for home in board.homes(held) {
            if home != device && !board.holds(home, expert) {
                gain += change(home, grown);
            }
        }
    }
    gain
}

/// Makes a change and says how to undo it.
pub(super) fn apply(board: &mut Board<'_>, change: Change) -> (Change, usize) {
    match change {
        Change::Swap(one, other) => {
            board.swap(one, other);
            (change, EMPTY)
        }
        Change::Copy(expert, slot) => {
            let held = board.slots[slot];
            if held != EMPTY {
                board.take(slot);
            }
            board.put(slot, expert);
            (change, held)
        }
        Change::Drop(slot) => (change, board.take(slot)),
    }
}

/// Takes back what `apply` did, the last first.
pub(super) fn undo(board: &mut Board<'_>, (change, held): (Change, usize)) {
    match change {
        Change::Swap(one, other) => board.swap(one, other),
        Change::Copy(_, slot) => {
            board.take(slot);
            if held != EMPTY {
                board.put(slot, held);
            }
        }
        Change::Drop(slot) => board.put(slot, held),
    }
}
