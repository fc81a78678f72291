//! One layer from nothing. Its parts are apart: copies and slots in `construct` and `pairs`, improvement in
//! `search`.

use super::{
    board::{Board, EMPTY},
    construct,
    dice::Dice,
    divide,
    fleet::Fleet,
    leap, pairs, repair,
    replan::{self, Budget, Track},
    search::{self, Log, Rules},
};
use crate::{num, plan::Balance, problem::Effort};

/// What every layer of an instance must keep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Duty {
    /// Copies of each expert.
    pub copies: usize,
    /// Each in another failure domain, not only on another device.
    pub apart: bool,
}

/// Mean slots of a device up to which exchanges at random find what single improvements do not.
pub(super) const SHALLOW: f64 = 3.5;

/// Gap beyond which unlike devices are tried with fewer copies.
const FAR: f64 = 0.03;
/// Gap beyond which unlike devices are tried kind by kind, and any layer is polished; the rounds of that, and the work
/// of each.
const WORTH: f64 = 5e-3;
const ROUNDS: usize = 8;
const POLISH: u64 = 50_000;

/// The slots of a layer planned from nothing. `loads` are in units of the ideal time, `bound` is `Fleet::bound` of them; the duty can be kept,
/// which `Fleet::room` says before.
///
/// Unlike devices are first filled kind by kind where they have few slots, and else where the layer is not near its
/// bound without. An even share of a hot expert may be too much for the slow ones: where it is still far, experts get
/// no more copies than there are devices of the fastest kinds.
pub(super) fn fresh<'a>(fleet: &'a Fleet, loads: &'a [f64], bound: f64, duty: Duty, effort: Effort) -> Board<'a> {
    let improved = |slots: &[usize], left| improve(Board::of(fleet, loads, slots), bound, duty, effort, left);
    let divided = || {
        let half = Effort { units: effort.units / 2, ..effort };
        divide::slots(fleet, loads, duty, half).map(|slots| improved(&slots, half.units))
    };
    let together = |most: usize| {
        let mut left = effort.units;
        let slots = first(fleet, loads, duty, most, bound * (1.0 + effort.close), &mut left);
        improved(&slots, left)
    };
    if fleet.depth() <= SHALLOW {
        return divided().unwrap_or_else(|| together(usize::MAX));
    }
    let mut best = together(usize::MAX);
    let above = |board: &Board<'_>, gap: f64| board.slowest() > bound + gap;
    if fleet.classes.len() < 2 || !above(&best, WORTH) {
        return best;
    }
    let mut better = |other: Board<'a>| {
        if other.slowest() < best.slowest() {
            best = other;
        }
        !above(&best, FAR)
    };
    if !divided().is_some_and(&mut better) {
        mosts(fleet).map(together).any(better);
    }
    best
}

/// Numbers of copies to try: as many as there are devices of the fastest kinds, and a quarter and a half of the others.
fn mosts(fleet: &Fleet) -> impl Iterator<Item = usize> + '_ {
    let mut fast = 0;
    fleet.classes.iter().take(fleet.classes.len() - 1).flat_map(move |class| {
        fast += class.len();
        let (fast, slow) = (fast, fleet.devices() - fast);
        (0..3).map(move |quarters| fast + slow * quarters / 4)
    })
}

/// What single changes and exchanges at random make of a first board, with what is `left` of the effort.
fn improve<'a>(first: Board<'a>, bound: f64, duty: Duty, effort: Effort, left: u64) -> Board<'a> {
    let Duty { copies, apart } = duty;
    let fleet = first.fleet;
    let mut board = first;
    repair::scatter(&mut board, copies);
    repair::fill(&mut board);
    if fleet.sites.iter().all(|site| site.slots < 2) && fleet.classes.len() < 2 {
        // The largest copy is the slowest device, and the copies are best as they are.
        return board;
    }
    let target = bound * (1.0 + effort.close);
    let rules = Rules { least: copies, apart, target, copying: true };
    let (mut left, mut dice) = (left, Dice(num::count(board.loads.len())));
    search::descend(&mut board, rules, &mut left, &mut Log::new());
    if fleet.depth() <= SHALLOW && left > 0 && board.slowest() > target {
        let mut part = left - left / 8;
        left -= part;
        search::anneal(&mut board, &mut part, &mut dice);
        search::descend(&mut board, rules, &mut left, &mut Log::new());
    }
    search::shake(&mut board, rules, &mut left, &mut dice);
    board.weigh();
    polish(board, duty, bound, effort)
}

/// What a re-plan for the same loads would still do, so that it finds nothing to do: only where the slowest
/// device is so far from the bound that a re-plan would look at all.
fn polish(board: Board<'_>, duty: Duty, bound: f64, effort: Effort) -> Board<'_> {
    let target = bound * (1.0 + effort.close);
    let worth = Budget { moves: None, bytes: None, price: 0.0, least: WORTH / 8.0 };
    let mut board = board;
    for _ in 0..ROUNDS {
        repair::spread(&mut board, duty.copies);
        if board.slowest() <= target + WORTH {
            break;
        }
        let before = board.held();
        let mut track = [Track::new(board, before, duty, false)];
        track[0].advance(usize::MAX, usize::MAX, POLISH);
        let mut balance = replan::settle(&mut track, worth);
        if !matches!(balance, Balance::Paid { .. }) {
            let leap = leap::look(&track[0], bound, effort);
            balance = leap::settle(&mut track, vec![leap], worth, balance);
        }
        let [track] = track;
        board = track.board;
        board.weigh();
        if !matches!(balance, Balance::Paid { .. }) {
            break;
        }
    }
    repair::spread(&mut board, duty.copies);
    board
}

/// Copies and slots before any improvement.
fn first(fleet: &Fleet, loads: &[f64], duty: Duty, most: usize, target: f64, left: &mut u64) -> Vec<usize> {
    let Duty { copies, apart } = duty;
    let mut counts = construct::copies(fleet, loads, copies, most);
    if pairs::apply(fleet) && copies < 2 {
        pairs::recount(fleet, loads, &mut counts, copies, target, left);
        return pairs::seat(fleet, loads, &counts);
    }
    let placed = construct::place(fleet, loads, &counts, copies, apart);
    placed.unwrap_or_else(|| construct::wrap_around(fleet, loads.len(), copies, apart))
}

/// The expert that the slowest device spends most on, and the time of the slowest device if one more slot
/// elsewhere took a copy of it.
pub(super) fn limit(board: &Board<'_>) -> Option<(usize, f64)> {
    let slow = search::slowest(board)?;
    let held = board.slots[board.fleet.range(slow)].iter().copied().filter(|expert| *expert != EMPTY);
    let expert = held.max_by(|one, other| {
        let relief = |expert: usize| board.share[expert] / num::real_size(board.count[expert] + 1);
        relief(*one).total_cmp(&relief(*other)).then(other.cmp(one))
    })?;
    let less = board.loads[expert] / num::real_size(board.count[expert] + 1) - board.share[expert];
    let time = |device: usize| board.time(device, if board.holds(device, expert) { less } else { 0.0 });
    Some((expert, (0..board.fleet.devices()).map(time).fold(0.0, f64::max)))
}
