//! A layer that single steps cannot better, on devices with few slots: there most experts have one copy, and
//! every way to a good layout leads over worse ones. So the copies that a plan from nothing would make are
//! made at once, where they are least in the way, and slots are exchanged until the slowest device is near its
//! bound. All or nothing: the layer is better for it by more than it costs, or stays.

use super::{
    board::{Board, EMPTY},
    construct,
    dice::Dice,
    layer::{Duty, SHALLOW},
    pairs,
    replan::{Budget, Track, rise},
    search::{self, Log, Rules},
};
use crate::{num, plan::Balance, problem::Effort};

/// Slack beyond which a layer is looked at, and by how much its slowest device must get faster.
const WORTH: f64 = 0.03;
/// Most work on one layer.
const UNITS: u64 = 150_000;

/// A layer planned anew.
pub(super) struct Leap<'a> {
    pub(super) board: Board<'a>,
    /// Replicas and bytes that it moves beyond the track's steps; may be negative.
    pub(super) moves: i64,
    pub(super) bytes: i64,
    /// By how much the layer's slowest device gets faster.
    pub(super) relief: f64,
}

/// Whether a layer is to be looked at: its devices have few slots, and its slowest is far above the bound.
pub(super) fn worth(track: &Track<'_>, bound: f64) -> bool {
    track.board.fleet.depth() <= SHALLOW && track.board.slowest() >= bound + WORTH
}

/// What `track`'s layer could be; nothing if that is not much better.
pub(super) fn look<'a>(track: &Track<'a>, bound: f64, effort: Effort) -> Option<Leap<'a>> {
    if !worth(track, bound) {
        return None;
    }
    let (fleet, peak) = (track.board.fleet, track.board.slowest());
    let Duty { copies, apart } = track.duty;
    let target = bound * (1.0 + effort.close);
    let mut left = effort.units.min(UNITS);
    let mut counts = construct::copies(fleet, track.board.loads, copies, usize::MAX);
    if pairs::apply(fleet) && copies < 2 {
        let mut half = left / 2;
        left -= half;
        pairs::recount(fleet, track.board.loads, &mut counts, copies, target, &mut half);
    }
    let mut board = track.board.clone();
    recount(&mut board, &counts, track.duty);
    let rules = Rules { least: copies, apart, target: bound * (1.0 + WORTH / 3.0), copying: true };
    let mut dice = Dice(num::count(track.board.loads.len()));
    search::descend(&mut board, rules, &mut left, &mut Log::new());
    search::shake(&mut board, rules, &mut left, &mut dice);
    board.weigh();
    let relief = peak - board.slowest();
    let ((moves, bytes), (before, before_bytes)) = (track.loaded(&board), track.loaded(&track.board));
    (relief > WORTH / 3.0).then(|| Leap { board, moves: moves - before, bytes: bytes - before_bytes, relief })
}

/// Gives experts `counts` copies as far as that goes: each further copy in place of one too many, where
/// Σ load² ÷ speed grows least.
fn recount(board: &mut Board<'_>, counts: &[usize], duty: Duty) {
    let mut short: Vec<usize> = (0..counts.len()).filter(|expert| board.count[*expert] < counts[*expert]).collect();
    short.sort_by(|one, other| board.share[*other].total_cmp(&board.share[*one]).then(one.cmp(other)));
    for expert in short {
        while board.count[expert] < counts[expert] {
            let share = board.loads[expert] / num::real_size(board.count[expert] + 1);
            let cost = |slot: usize| {
                let (device, held) = (board.fleet.owner[slot], board.slots[slot]);
                let spare = held == EMPTY
                    || (board.count[held] > counts[held] && board.may_lose(held, device, duty.copies, duty.apart));
                let freed = if held == EMPTY { 0.0 } else { board.share[held] };
                (spare && held != expert && board.may_gain(expert, device))
                    .then(|| (rise(board, device, share - freed), slot))
            };
            let best = (0..board.slots.len())
                .filter_map(cost)
                .min_by(|one, other| one.0.total_cmp(&other.0).then(one.1.cmp(&other.1)));
            let Some((_, slot)) = best else { break };
            search::apply(board, search::Change::Copy(expert, slot));
        }
    }
}

/// Takes the leaps that gain more than they cost beside the steps that `tracks` took, as far as the budget
/// reaches, those first that gain most for a move; nothing unless all together gain the least worth moving.
pub(super) fn settle<'a>(
    tracks: &mut [Track<'a>],
    leaps: Vec<Option<Leap<'a>>>,
    budget: Budget,
    so_far: Balance,
) -> Balance {
    let layers = num::real_size(tracks.len().max(1));
    let (mut moves, mut bytes) = tracks.iter().map(Track::spent).fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1));
    let (most, most_bytes) = budget.most();
    let mut all: Vec<(usize, Leap<'a>)> =
        leaps.into_iter().enumerate().filter_map(|(at, leap)| Some((at, leap?))).collect();
    let ratio = |leap: &Leap<'_>| leap.relief / num::signed_real(leap.moves.max(1));
    all.sort_by(|(at, one), (other_at, other)| ratio(other).total_cmp(&ratio(one)).then(at.cmp(other_at)));
    let (mut chosen, mut gain, mut cost) = (Vec::new(), 0.0, 0.0);
    for (at, leap) in all {
        let (relief, price) = (leap.relief / layers, budget.price * num::signed_real(leap.bytes));
        if moves + leap.moves > most || bytes + leap.bytes > most_bytes || relief <= price {
            continue;
        }
        (moves, bytes, gain, cost) = (moves + leap.moves, bytes + leap.bytes, gain + relief, cost + price);
        chosen.push((at, leap));
    }
    if gain - cost <= budget.least {
        return so_far;
    }
    for (at, leap) in chosen {
        tracks[at].replace(leap.board);
    }
    match so_far {
        Balance::Paid { gain: before, cost: paid } => Balance::Paid { gain: gain + before, cost: cost + paid },
        _ => Balance::Paid { gain, cost },
    }
}
