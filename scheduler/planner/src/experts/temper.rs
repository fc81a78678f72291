//! A layer on devices with few slots, bettered by no more moves than it has: single steps that each lower the
//! sum of squares spend them where one after the other looked best. From where they led, copies and exchanges
//! that touch slow devices are tried at random, a little heat lets worse ones pass, and the best layout met
//! counts. Never loads more replicas than it may; breaks no rule that the layer keeps.

use super::{
    board::{Board, EMPTY},
    dice::Dice,
    layer::Duty,
    leap::Leap,
    replan::Track,
    search::{self, Change},
};
use crate::{num, problem::Effort};

/// Work of one try.
const TRY: u64 = 16;
/// Tries after which devices are put in order anew.
const ROUND: u64 = 128;
/// Heat at the beginning and at the end: what Σ (time ÷ bound)^32 may grow by with probability 1/e.
const HEAT: (f64, f64) = (0.02, 0.01);

/// Slots of all devices, in parts of which a layer may move at most one for it to be tempered: with more it is
/// better planned anew.
const PART: i64 = 5;

/// Whether a layer of `slots` slots that may move `moves` of them is to be tempered.
pub(super) fn apply(slots: usize, moves: i64) -> bool {
    moves <= num::whole(slots) / PART
}

/// What `track`'s layer could be with `spare` moves beyond those that it took; nothing if that is no better.
pub(super) fn look<'a>(track: &Track<'a>, bound: f64, spare: i64, effort: Effort) -> Option<Leap<'a>> {
    let fleet = track.board.fleet;
    let mut order: Vec<usize> = (0..fleet.devices()).filter(|device| !fleet.range(*device).is_empty()).collect();
    let tries = effort.units / TRY;
    let cooling = (HEAT.1 / HEAT.0).powf(1.0 / num::real(tries.div_ceil(ROUND).max(1)));
    let (loaded, _) = track.loaded(&track.board);
    let mut state = State { track, board: track.board.clone(), scale: 1.0 / bound, moves: 0, sum: 0.0 };
    let (mut dice, mut heat) = (Dice(num::count(track.board.loads.len())), HEAT.0);
    let (mut least, mut best) = (0.0, None);
    for at in 0..tries {
        if at.is_multiple_of(ROUND) {
            let time = |device: &usize| state.board.time(*device, 0.0);
            order.sort_by(|one, other| time(other).total_cmp(&time(one)).then(one.cmp(other)));
            heat *= cooling;
        }
        let Some((change, moves, worse)) = state.draw(&order, &mut dice, spare) else { continue };
        if worse.is_nan() || worse > 0.0 && (worse > heat * 16.0 || dice.unit() >= (-worse / heat).exp()) {
            continue;
        }
        search::apply(&mut state.board, change);
        (state.moves, state.sum) = (state.moves + moves, state.sum + worse);
        if state.sum < least {
            least = state.sum;
            best.get_or_insert_with(Vec::new).clone_from(&state.board.slots);
        }
    }
    let board = Board::of(fleet, track.board.loads, &best?);
    let (moves, bytes) = track.loaded(&board);
    let (_, before) = track.loaded(&track.board);
    let relief = track.board.slowest() - board.slowest();
    (relief > 0.0).then(|| Leap { board, moves: moves - loaded, bytes: bytes - before, relief })
}

/// A layer on its way.
struct State<'t, 'a> {
    track: &'t Track<'a>,
    board: Board<'a>,
    /// 1 ÷ the layer's bound.
    scale: f64,
    /// Moves more than `track`'s.
    moves: i64,
    /// By how much Σ (time ÷ bound)^32 grew.
    sum: f64,
}

impl State<'_, '_> {
    /// A copy or an exchange that is allowed, moves that it takes, and by how much Σ (time ÷ bound)^32 grows.
    /// Devices at the head of `order` are drawn most.
    fn draw(&self, order: &[usize], dice: &mut Dice, spare: i64) -> Option<(Change, i64, f64)> {
        let (board, fleet) = (&self.board, self.board.fleet);
        // The product of three even draws: a sixteenth of the devices on average.
        let rank = dice.below(order.len().div_ceil(2));
        let rank = dice.below(rank + 1);
        let here = *order.get(dice.below(rank + 1))?;
        let range = fleet.range(here);
        let (from, to) = (range.start + dice.below(range.len()), dice.below(board.slots.len()));
        let (expert, held, there) = (board.slots[from], board.slots[to], fleet.owner[to]);
        if here == there || expert == EMPTY || expert == held {
            return None;
        }
        // A copy moves one replica, an exchange two.
        let copy = dice.below(8) > 0;
        let change = if copy { Change::Copy(expert, to) } else { Change::Swap(from, to) };
        let (moves, _) = self.track.cost(board, change);
        if (moves > 0 && self.moves + moves > spare) || !self.lawful(change) {
            return None;
        }
        if copy {
            return Some((change, moves, self.copying(expert, held, there)));
        }
        let less = board.share[expert] - if held == EMPTY { 0.0 } else { board.share[held] };
        Some((change, moves, self.grown(here, -less) + self.grown(there, less)))
    }

    /// Whether a copy or an exchange is allowed.
    fn lawful(&self, change: Change) -> bool {
        let (board, Duty { copies, apart }) = (&self.board, self.track.duty);
        let owner = |slot: usize| board.fleet.owner[slot];
        let goes = |slot: usize, to: usize| {
            let held = board.slots[slot];
            held == EMPTY || board.may_go(held, owner(slot), owner(to))
        };
        match change {
            Change::Swap(one, other) => goes(one, other) && goes(other, one),
            Change::Copy(expert, slot) => {
                let held = board.slots[slot];
                let spare = held == EMPTY || board.count[held] > 1 && board.may_lose(held, owner(slot), copies, apart);
                spare && board.may_gain(expert, owner(slot))
            }
            Change::Drop(_) => false,
        }
    }

    /// By how much (time ÷ bound)^32 of a device grows with `extra` load.
    #[inline]
    fn grown(&self, device: usize, extra: f64) -> f64 {
        let power = |time: f64| (0..5).fold(time * self.scale, |power, _| power * power);
        power(self.board.time(device, extra)) - power(self.board.time(device, 0.0))
    }

    /// By how much the sum grows when `held` on `device`, or nothing, gives way to a copy of `expert`.
    fn copying(&self, expert: usize, held: usize, device: usize) -> f64 {
        let board = &self.board;
        let share = board.loads[expert] / num::real_size(board.count[expert] + 1);
        let (less, mut own, mut more) = (share - board.share[expert], share, 0.0);
        let mut sum = 0.0;
        if held != EMPTY {
            own -= board.share[held];
            more = board.grown(held);
            let alone = |home: &usize| *home != device && !board.holds(*home, expert);
            sum += board.homes(held).filter(alone).map(|home| self.grown(home, more)).sum::<f64>();
        }
        let both = |home: usize| if held != EMPTY && board.holds(home, held) { more } else { 0.0 };
        sum += board.homes(expert).map(|home| self.grown(home, less + both(home))).sum::<f64>();
        sum + self.grown(device, own)
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            Budget, Rows, Task, arrange,
            fleet::{Fleet, Site},
            replan,
        },
        *,
    };

    const DUTY: Duty = Duty { copies: 1, apart: false };

    fn fleet() -> Fleet {
        let site = |at: usize| Site { slots: 2, speed: 1.0, node: at / 8, card: at, bytes: 1, closed: false };
        Fleet::new(&(0..64).map(site).collect::<Vec<_>>())
    }

    /// Loads of 80 experts, in units of the ideal.
    fn loads(fleet: &Fleet, seed: u64) -> Vec<f64> {
        let mut dice = Dice(seed);
        let loads: Vec<f64> = (0..80).map(|_| (1.6 * (dice.unit() + dice.unit() + dice.unit())).exp()).collect();
        let ideal = fleet.ideal(&loads);
        loads.into_iter().map(|load| load / ideal).collect()
    }

    fn task<'a>(fleet: &'a Fleet, loads: &'a [Vec<f64>], previous: Option<&'a [Rows]>, moves: usize) -> Task<'a> {
        let budget = Budget { moves: Some(moves), bytes: None, price: 0.0, least: 0.0 };
        Task { fleet, duty: DUTY, loads, previous, budget, effort: Effort::DEFAULT, threads: 1 }
    }

    #[test]
    fn the_same_moves_go_further_than_single_steps_take_them() {
        let fleet = fleet();
        let mut relief = 0.0;
        for seed in 0..24 {
            let (old, new) = (vec![loads(&fleet, seed)], loads(&fleet, seed + 100));
            let rows = arrange(&task(&fleet, &old, None, 0)).unwrap().remove(0).rows;
            let slots: Vec<usize> = rows.into_iter().flatten().map(|held| held.unwrap_or(EMPTY)).collect();
            let board = Board::of(&fleet, &new, &slots);
            let before = board.held();
            let mut track = [Track::new(board, before, DUTY, false)];
            track[0].advance(12, 12, Effort::DEFAULT.units);
            replan::settle(&mut track, Budget { moves: Some(12), bytes: None, price: 0.0, least: 0.0 });
            let Some(leap) = look(&track[0], fleet.bound(&new).0, 0, Effort::DEFAULT) else { continue };
            assert!(leap.moves <= 0 && !leap.board.count.contains(&0), "{} more", leap.moves);
            assert!((track[0].board.slowest() - leap.board.slowest() - leap.relief).abs() < 1e-9);
            relief += leap.relief / 24.0;
        }
        assert!(relief > 0.005, "{relief} of the ideal time");
    }

    #[test]
    fn tempered_layers_move_no_more_than_all_may() {
        let fleet = fleet();
        let layers = |from: u64| (from..from + 3).map(|seed| loads(&fleet, seed)).collect::<Vec<_>>();
        let (old, new) = (layers(0), layers(100));
        let before: Vec<Rows> =
            arrange(&task(&fleet, &old, None, 0)).unwrap().into_iter().map(|layer| layer.rows).collect();
        for moves in [1, 7, 30, 60] {
            let after = arrange(&task(&fleet, &new, Some(&before), moves)).unwrap();
            let rows = after.iter().zip(&before).flat_map(|(layer, old)| layer.rows.iter().zip(old));
            let moved: usize =
                rows.map(|(row, old)| row.iter().filter(|held| held.is_some() && !old.contains(held)).count()).sum();
            assert!(moved <= moves && moved + 6 >= moves.min(30), "{moved} of {moves}");
        }
    }
}
