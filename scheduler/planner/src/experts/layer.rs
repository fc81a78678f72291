//! One layer from nothing. Its parts are apart: copies and slots in `construct` and `pairs`, improvement in
//! `search`.

use super::{
    board::{Board, EMPTY},
    construct,
    dice::Dice,
    fleet::Fleet,
    pairs, repair,
    search::{self, Log, Rules},
};
use crate::{num, problem::Effort};

/// What every layer of an instance must keep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Duty {
    /// Copies of each expert.
    pub copies: usize,
    /// Each in another failure domain, not only on another device.
    pub apart: bool,
}

/// Mean slots of a device up to which exchanges at random find what single improvements do not.
const SHALLOW: f64 = 3.5;

/// The slots of a layer planned from nothing. `loads` are in units of the ideal time; the duty can be kept,
/// which `Fleet::room` says before.
pub(super) fn fresh<'a>(fleet: &'a Fleet, loads: &'a [f64], duty: Duty, effort: Effort) -> Board<'a> {
    let Duty { copies, apart } = duty;
    let bound = fleet.bound(loads).0;
    let target = bound * (1.0 + effort.close);
    let mut counts = construct::copies(fleet, loads, copies);
    let mut left = effort.units;
    let placed = if pairs::apply(fleet) && copies < 2 {
        pairs::recount(fleet, loads, &mut counts, copies, target, &mut left);
        Some(pairs::seat(fleet, loads, &counts))
    } else {
        construct::place(fleet, loads, &counts, copies, apart)
    };
    let slots = placed.unwrap_or_else(|| construct::wrap_around(fleet, loads.len(), copies, apart));
    let mut board = Board::of(fleet, loads, &slots);
    repair::scatter(&mut board, copies);
    repair::fill(&mut board);
    let rules = Rules { least: copies, apart, target, copying: true };
    let mut dice = Dice(num::count(loads.len()));
    search::descend(&mut board, rules, &mut left, &mut Log::new());
    if fleet.depth() <= SHALLOW && left > 0 && board.slowest() > target {
        let mut part = left * 3;
        left = left.saturating_sub(part);
        search::anneal(&mut board, &mut part, &mut dice);
        search::descend(&mut board, rules, &mut left, &mut Log::new());
    }
    search::shake(&mut board, rules, &mut left, &mut dice);
    board.weigh();
    board
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
