//! A better layout from the one there is, for as little loading as possible: the steps that lower the load of
//! slow devices most per moved byte, across all layers by one queue, as long as they pay back. Changes
//! nothing that a step does not pay for.

use super::{
    board::{Board, EMPTY},
    layer::Duty,
    search::{Change, apply, undo},
    survey::Survey,
};
use crate::{num, plan::Balance};

/// What a re-plan may cost, beyond what it must repair.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Most replicas that may move for balance; `None` = no bound.
    pub moves: Option<usize>,
    /// Most bytes that may move for balance; `None` = no bound.
    pub bytes: Option<u64>,
    /// What a moved byte costs, as a share of the step time.
    pub price: f64,
    /// Least gain, as a share of the step time after costs, for which anything moves.
    pub least: f64,
}

impl Budget {
    /// Nothing moves but what must.
    pub const NONE: Self = Self { moves: Some(0), bytes: None, price: 0.0, least: 0.0 };

    /// Most replicas and bytes.
    pub(super) fn most(self) -> (i64, i64) {
        let bytes = self.bytes.map_or(i64::MAX, |bytes| i64::try_from(bytes).unwrap_or(i64::MAX));
        (self.moves.map_or(i64::MAX, num::whole), bytes)
    }
}

/// Steps that one layer may take.
const STEPS: usize = 4096;

/// One step of a layer.
#[derive(Clone, Copy, Debug)]
struct Step {
    /// Fall of Σ load² ÷ speed per moved byte, in units of the largest expert.
    ratio: f64,
    change: Change,
    /// What was in the slot that a copy took.
    held: usize,
    /// Replicas and bytes that it moves, net: a replica that goes back where it was counts as not moved.
    moves: i64,
    bytes: i64,
    /// By how much the layer's slowest device gets faster, in units of the ideal; may be negative.
    relief: f64,
}

/// A layer on its way.
pub(super) struct Track<'a> {
    pub(super) board: Board<'a>,
    /// What devices held at the beginning.
    before: Vec<u64>,
    pub(super) duty: Duty,
    heaviest: f64,
    steps: Vec<Step>,
    peak: f64,
    /// Experts had no replica left.
    pub(super) repaired: bool,
    /// Whether the slowest device that a step helps is enough to look at.
    pub(super) hasty: bool,
    /// Replicas that further steps may move, and the work that may be spent on looking for them.
    left: i64,
    effort: u64,
    survey: Survey,
}

impl<'a> Track<'a> {
    /// `before`: `Board::held` as devices hold it, before any repair.
    pub(super) fn new(board: Board<'a>, before: Vec<u64>, duty: Duty, repaired: bool) -> Self {
        let heaviest = board.fleet.sites.iter().map(|site| site.bytes).max().unwrap_or(1).max(1);
        let peak = board.slowest();
        Self {
            board,
            before,
            duty,
            heaviest: num::real(heaviest),
            steps: Vec::new(),
            peak,
            repaired,
            hasty: false,
            left: 0,
            effort: 0,
            survey: Survey::default(),
        }
    }

    /// Takes the best steps one after the other without regard to other layers, as many as `moves` replicas and
    /// `effort` allow: those for the first `now` replicas at once, the others when `settle` asks for them.
    pub(super) fn advance(&mut self, now: usize, moves: usize, effort: u64) {
        (self.left, self.effort) = (num::whole(moves), effort);
        let later = num::whole(moves.saturating_sub(now));
        while self.left > later && self.step() {}
    }

    /// Takes one step more, if there is one and it is allowed.
    pub(super) fn step(&mut self) -> bool {
        if self.left <= 0 || self.effort == 0 || self.steps.len() >= STEPS {
            return false;
        }
        let (mut survey, mut effort) = (std::mem::take(&mut self.survey), self.effort);
        let best = survey.best(self, &mut effort);
        (self.survey, self.effort) = (survey, effort);
        let Some(best) = best else {
            self.left = 0;
            return false;
        };
        let (moves, bytes) = self.cost(&self.board, best.change);
        let (change, held) = apply(&mut self.board, best.change);
        let peak = self.board.slowest();
        self.steps.push(Step { ratio: best.ratio, change, held, moves, bytes, relief: self.peak - peak });
        self.peak = peak;
        self.left -= moves.max(1);
        true
    }

    /// The layer's step number `at`, looked for where it was not yet.
    fn at(&mut self, at: usize) -> Option<Step> {
        while self.steps.len() <= at {
            if !self.step() {
                return None;
            }
        }
        self.steps.get(at).copied()
    }

    /// What the slowest device is above the bound: no step gains more.
    pub(super) fn slack(&self, bound: f64) -> f64 {
        self.peak - bound
    }

    /// Goes back to the first `steps` steps.
    fn retreat(&mut self, steps: usize) {
        if steps >= self.steps.len() {
            return;
        }
        for step in self.steps.drain(steps..).rev() {
            undo(&mut self.board, (step.change, step.held));
        }
        self.board.weigh();
        self.peak = self.board.slowest();
        self.left = 0;
    }

    /// Replicas and bytes that the steps taken move.
    pub(super) fn spent(&self) -> (i64, i64) {
        self.steps.iter().fold((0, 0), |sum, step| (sum.0 + step.moves, sum.1 + step.bytes))
    }

    /// Replicas and bytes on `board` that devices did not hold at the beginning.
    pub(super) fn loaded(&self, board: &Board<'_>) -> (i64, i64) {
        let owned = board.slots.iter().zip(&board.fleet.owner);
        let new = owned.filter(|(held, device)| **held != EMPTY && !self.was(**held, **device));
        new.fold((0, 0), |(moves, bytes), (_, device)| {
            (moves + 1, bytes + i64::try_from(board.fleet.sites[*device].bytes).unwrap_or(i64::MAX / 4))
        })
    }

    /// Another layout in place of all steps.
    pub(super) fn replace(&mut self, board: Board<'a>) {
        self.steps.clear();
        self.board = board;
        self.peak = self.board.slowest();
    }

    pub(super) fn was(&self, expert: usize, device: usize) -> bool {
        self.board.holds_in(&self.before, device, expert)
    }

    /// Bytes for `expert` to come to `device`, in units of the largest expert.
    pub(super) fn weight(&self, expert: usize, device: usize) -> f64 {
        if expert == EMPTY || self.was(expert, device) {
            0.0
        } else {
            num::real(self.board.fleet.sites[device].bytes) / self.heaviest
        }
    }

    /// Replicas and bytes that a change of `board` moves, net.
    pub(super) fn cost(&self, board: &Board<'_>, change: Change) -> (i64, i64) {
        let owner = |slot: usize| board.fleet.owner[slot];
        let mut sum = (0, 0);
        let mut count = |expert: usize, device: usize, sign: i64| {
            if expert != EMPTY && !self.was(expert, device) {
                sum.0 += sign;
                sum.1 += sign * i64::try_from(board.fleet.sites[device].bytes).unwrap_or(i64::MAX / 4);
            }
        };
        match change {
            Change::Swap(one, other) => {
                for (slot, target) in [(one, other), (other, one)] {
                    count(board.slots[slot], owner(target), 1);
                    count(board.slots[slot], owner(slot), -1);
                }
            }
            Change::Copy(expert, slot) => {
                count(expert, owner(slot), 1);
                count(board.slots[slot], owner(slot), -1);
            }
            Change::Drop(slot) => count(board.slots[slot], owner(slot), -1),
        }
        sum
    }
}

/// What load² ÷ speed of a device grows by with `extra` load.
#[inline]
pub(super) fn rise(board: &Board<'_>, device: usize, extra: f64) -> f64 {
    extra * (2.0 * board.time(device, 0.0) + extra * board.fleet.inverse[device])
}

/// By expert: what Σ load² ÷ speed grows by when it has a copy less, as if that copy's device grew too.
pub(super) fn growth(board: &Board<'_>) -> Vec<f64> {
    let growth = |expert: usize| {
        if board.count[expert] < 2 {
            return f64::INFINITY;
        }
        let grown = board.grown(expert);
        board.homes(expert).map(|home| rise(board, home, grown)).sum()
    };
    (0..board.loads.len()).map(growth).collect()
}

/// What Σ load² ÷ speed grows by when `held` on `device` (or nothing) gives way to a replica of load
/// `share`.
pub(super) fn displace(board: &Board<'_>, growth: &[f64], held: usize, device: usize, share: f64) -> f64 {
    if held == EMPTY {
        return rise(board, device, share);
    }
    if board.count[held] < 2 {
        return f64::INFINITY;
    }
    rise(board, device, share - board.share[held]) + growth[held] - rise(board, device, board.grown(held))
}

/// The steps of all layers in the order of what they gain per byte, a layer's own in their order, as far as
/// the budget reaches; then back to where gain less cost was largest, or to the beginning. Every track keeps
/// exactly the steps that were taken. Says what they gain and cost, or what the best would have.
pub(super) fn settle(tracks: &mut [Track<'_>], budget: Budget) -> Balance {
    let layers = num::real_size(tracks.len().max(1));
    let mut taken = vec![0_usize; tracks.len()];
    let mut best = (budget.least, taken.clone());
    let (mut paid, mut most_net) = (None, (f64::NEG_INFINITY, 0.0, 0.0));
    let (mut moves, mut bytes, mut relief) = (0_i64, 0_i64, 0.0);
    let (most, most_bytes) = budget.most();
    let mut heads: std::collections::BinaryHeap<(u64, std::cmp::Reverse<usize>)> = tracks
        .iter_mut()
        .enumerate()
        .filter_map(|(at, track)| Some((track.at(0)?.ratio.to_bits(), std::cmp::Reverse(at))))
        .collect();
    while let Some((_, std::cmp::Reverse(at))) = heads.pop() {
        let Some(step) = tracks[at].at(taken[at]) else { continue };
        if moves + step.moves > most || bytes + step.bytes > most_bytes {
            continue;
        }
        (moves, bytes, relief) = (moves + step.moves, bytes + step.bytes, relief + step.relief);
        taken[at] += 1;
        let (gain, cost) = (relief / layers, budget.price * num::signed_real(bytes));
        if gain - cost > most_net.0 {
            most_net = (gain - cost, gain, cost);
        }
        if gain - cost > best.0 {
            best = (gain - cost, taken.clone());
            paid = Some(Balance::Paid { gain, cost });
        }
        if let Some(next) = tracks[at].at(taken[at]) {
            heads.push((next.ratio.to_bits(), std::cmp::Reverse(at)));
        }
    }
    for (track, steps) in tracks.iter_mut().zip(best.1) {
        track.retreat(steps);
    }
    let (_, gain, cost) = most_net;
    paid.unwrap_or(Balance::Unpaid { gain, cost, least: budget.least })
}
