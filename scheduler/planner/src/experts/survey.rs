//! What one step of a layer can gain: a further copy or an exchange that touches one of its slowest devices.
//! Everything that the many candidates share is worked out once, in rows without gaps. Changes nothing.

use super::{
    board::{Board, EMPTY},
    replan::{Track, rise},
    search::Change,
};
use crate::num;

/// Slowest devices that steps are looked for on. More would lower the sum of squares faster, and the peak
/// later.
const SLOW: usize = 6;
/// Least fall of the sum of squares per replica.
const LEAST: f64 = 1e-8;

/// What two ways to reckon a gain may differ by.
const ROUNDING: f64 = 1e-9;

/// The step that lowers Σ load² ÷ speed most per byte.
#[derive(Clone, Copy, Debug)]
pub(super) struct Best {
    /// The fall per moved byte, in units of the largest expert.
    pub(super) ratio: f64,
    pub(super) change: Change,
}

/// A slot that a copy may take.
#[derive(Clone, Copy, Debug)]
struct Spare {
    slot: usize,
    /// Load of what it holds; 0 where it is empty.
    share: f64,
    /// What Σ load² ÷ speed grows by when that has a copy less, as if this device grew too, and that part.
    growth: f64,
    own: f64,
}

/// A layer's devices and slots, side by side.
#[derive(Debug, Default)]
pub(super) struct Survey {
    /// Load ÷ speed by device.
    time: Vec<f64>,
    /// Devices with slots, the fastest first.
    order: Vec<usize>,
    /// Load by slot; 0 where it is empty.
    share: Vec<f64>,
    /// Slots that a copy may take, by device; of each device the first.
    spare: Vec<Spare>,
    first: Vec<usize>,
    /// By device, of these slots: the largest load, and the least that Σ load² ÷ speed grows by when one gives way
    /// to nothing.
    ease: Vec<(f64, f64)>,
    /// `growth` by expert, as far as it is known.
    growth: Vec<Option<f64>>,
}

impl Survey {
    /// The step that lowers Σ load² ÷ speed most per byte, among those that touch a slow device. Takes what it looks
    /// at off `effort`: the same however often it was looked at before.
    pub(super) fn best(&mut self, track: &Track<'_>, effort: &mut u64) -> Option<Best> {
        self.level(&track.board);
        self.vacate(track);
        let mut best = Best { ratio: LEAST, change: Change::Swap(0, 0) };
        let mut any = false;
        for slow in self.order.iter().rev().take(SLOW) {
            any |= self.best_swap(track, *slow, &mut best, effort);
            any |= self.best_copy(track, *slow, &mut best, effort);
            if any && track.hasty {
                break;
            }
        }
        any.then_some(best)
    }

    /// Times, the order of devices, loads of slots.
    fn level(&mut self, board: &Board<'_>) {
        let fleet = board.fleet;
        self.time.clear();
        self.time.extend((0..fleet.devices()).map(|device| board.time(device, 0.0)));
        if self.order.is_empty() {
            self.order.extend((0..fleet.devices()).filter(|device| !fleet.range(*device).is_empty()));
        }
        let time = &self.time;
        self.order.sort_unstable_by(|one, other| time[*one].total_cmp(&time[*other]).then(one.cmp(other)));
        self.share.clear();
        self.share.extend(board.slots.iter().map(|held| if *held == EMPTY { 0.0 } else { board.share[*held] }));
    }

    /// The slots that a copy may take.
    fn vacate(&mut self, track: &Track<'_>) {
        let (board, duty) = (&track.board, track.duty);
        self.growth.clear();
        self.growth.resize(board.loads.len(), None);
        self.spare.clear();
        self.first.clear();
        self.ease.clear();
        for device in 0..board.fleet.devices() {
            let first = self.spare.len();
            self.first.push(first);
            for slot in board.fleet.range(device) {
                let held = board.slots[slot];
                if held == EMPTY {
                    self.spare.push(Spare { slot, share: 0.0, growth: 0.0, own: 0.0 });
                } else if board.count[held] > 1 && board.may_lose(held, device, duty.copies, duty.apart) {
                    let (share, grown) = (board.share[held], board.grown(held));
                    let all = || board.homes(held).map(|home| rise(board, home, grown)).sum();
                    let growth = *self.growth[held].get_or_insert_with(all);
                    self.spare.push(Spare { slot, share, growth, own: rise(board, device, grown) });
                }
            }
            let ease = self.spare[first..].iter().fold((0.0, f64::INFINITY), |(share, least): (f64, f64), spare| {
                (share.max(spare.share), least.min(rise(board, device, -spare.share) + spare.growth - spare.own))
            });
            self.ease.push(ease);
        }
        self.first.push(self.spare.len());
    }

    /// The best exchange of a replica of `slow` for a smaller one, or for an empty slot.
    fn best_swap(&self, track: &Track<'_>, slow: usize, best: &mut Best, effort: &mut u64) -> bool {
        let (board, fleet) = (&track.board, track.board.fleet);
        let (time, inverse, own) = (self.time[slow], fleet.inverse[slow], fleet.range(slow));
        let (mut any, mut work) = (false, 1);
        for other in self.order.iter().copied() {
            let (apart, sum) = (time - self.time[other], inverse + fleet.inverse[other]);
            // Evening out the two is the most that any exchange gains; further ones are closer still.
            if apart <= 0.0 || apart * apart / sum <= best.ratio {
                if fleet.classes.len() == 1 || apart <= 0.0 {
                    break;
                }
                continue;
            }
            let range = fleet.range(other);
            work += range.len() * own.len();
            let (there, double) = (&self.share[range.clone()], 2.0 * apart);
            for from in own.clone() {
                let share = self.share[from];
                let gain = |held: f64| (share - held) * (double - (share - held) * sum);
                // Only what carries less gains here: `apart` is above 0.
                if !there.iter().fold(false, |any, held| any | (gain(*held) > best.ratio)) {
                    continue;
                }
                let expert = board.slots[from];
                for (to, share) in range.clone().zip(there) {
                    if gain(*share) <= best.ratio || expert == EMPTY {
                        continue;
                    }
                    let held = board.slots[to];
                    let ratio = gain(*share) / (track.weight(expert, other) + track.weight(held, slow)).max(1.0);
                    if ratio > best.ratio
                        && board.may_go(expert, slow, other)
                        && (held == EMPTY || board.may_go(held, other, slow))
                    {
                        *best = Best { ratio, change: Change::Swap(from, to) };
                        any = true;
                    }
                }
            }
        }
        *effort = effort.saturating_sub(num::count(work));
        any
    }

    /// A further copy of an expert of `slow`. Devices that hold both experts gain a little more than is
    /// counted.
    fn best_copy(&self, track: &Track<'_>, slow: usize, best: &mut Best, effort: &mut u64) -> bool {
        let (board, fleet) = (&track.board, track.board.fleet);
        let (mut any, mut work) = (false, 1);
        for from in fleet.range(slow) {
            let expert = board.slots[from];
            if expert == EMPTY {
                continue;
            }
            let share = board.loads[expert] / num::real_size(board.count[expert] + 1);
            let relief: f64 = board.homes(expert).map(|home| -rise(board, home, share - board.share[expert])).sum();
            if relief <= best.ratio {
                continue;
            }
            for other in self.order.iter().copied().filter(|other| board.may_gain(expert, *other)) {
                work += fleet.range(other).len();
                let (double, inverse) = (2.0 * self.time[other], fleet.inverse[other]);
                // The slot of the largest load, given up at the least price, would be the best of all.
                let (largest, least) = self.ease[other];
                if relief - share * (double + (share - 2.0 * largest) * inverse) - least < best.ratio - ROUNDING {
                    continue;
                }
                let mut weight = None;
                for spare in &self.spare[self.first[other]..self.first[other + 1]] {
                    let extra = share - spare.share;
                    let gain = relief - (extra * (double + extra * inverse) + spare.growth - spare.own);
                    if gain <= best.ratio {
                        continue;
                    }
                    let ratio = gain / *weight.get_or_insert_with(|| track.weight(expert, other).max(1.0));
                    if ratio > best.ratio {
                        *best = Best { ratio, change: Change::Copy(expert, spare.slot) };
                        any = true;
                    }
                }
            }
        }
        *effort = effort.saturating_sub(num::count(work));
        any
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            dice::Dice,
            fleet::{Fleet, Site},
            layer::Duty,
            replan::{displace, growth},
        },
        *,
    };

    fn fleet() -> Fleet {
        let site = |at: usize| Site {
            slots: 2 + at % 3,
            speed: if at.is_multiple_of(4) { 0.5 } else { 1.0 },
            node: at / 3,
            card: at,
            bytes: 1 + num::count(at % 2),
            closed: at == 5,
        };
        Fleet::new(&(0..12).map(site).collect::<Vec<_>>())
    }

    /// A board filled at random, every expert at least once.
    fn board<'a>(fleet: &'a Fleet, loads: &'a [f64], dice: &mut Dice) -> Board<'a> {
        let mut board = Board::new(fleet, loads);
        for expert in 0..loads.len() * 40 {
            let slot = dice.below(fleet.slots());
            let expert = if expert < loads.len() { expert } else { dice.below(loads.len()) };
            if board.slots[slot] == EMPTY && !board.holds(fleet.owner[slot], expert) && !slot.is_multiple_of(11) {
                board.put(slot, expert);
            }
        }
        board
    }

    /// The best of all steps there are, one by one; and of those that gain by what they take off slow devices,
    /// not by what gives way.
    fn plain(track: &Track<'_>) -> (f64, f64) {
        let (board, fleet, growth) = (&track.board, track.board.fleet, growth(&track.board));
        let mut slowest: Vec<usize> = (0..fleet.devices()).collect();
        slowest.sort_by(|one, other| board.time(*other, 0.0).total_cmp(&board.time(*one, 0.0)));
        let (mut most, mut least) = (LEAST, LEAST);
        let sum = |board: &Board<'_>| -> f64 {
            (0..fleet.devices()).map(|device| board.time(device, 0.0) * board.carried[device]).sum()
        };
        for slow in slowest.into_iter().take(SLOW) {
            for (from, to) in fleet.range(slow).flat_map(|from| (0..fleet.slots()).map(move |to| (from, to))) {
                let (expert, held, other) = (board.slots[from], board.slots[to], fleet.owner[to]);
                if expert == EMPTY || other == slow {
                    continue;
                }
                if board.may_go(expert, slow, other) && (held == EMPTY || board.may_go(held, other, slow)) {
                    let mut after = board.clone();
                    after.swap(from, to);
                    let weight = track.weight(expert, other) + track.weight(held, slow);
                    let slower = board.time(other, 0.0) < board.time(slow, 0.0);
                    let gain = if slower { (sum(board) - sum(&after)) / weight.max(1.0) } else { 0.0 };
                    (most, least) = (most.max(gain), least.max(gain));
                }
                let share = board.loads[expert] / num::real_size(board.count[expert] + 1);
                let relief: f64 = board.homes(expert).map(|home| -rise(board, home, share - board.share[expert])).sum();
                let spare = held == EMPTY || board.may_lose(held, other, track.duty.copies, track.duty.apart);
                if board.may_gain(expert, other) && spare {
                    let gain = relief - displace(board, &growth, held, other, share);
                    let gain = gain / track.weight(expert, other).max(1.0);
                    (most, least) = (most.max(gain), least.max(gain.min(relief)));
                }
            }
        }
        (most, least)
    }

    #[test]
    fn a_survey_misses_no_step() {
        let fleet = fleet();
        let (mut found, mut dice) = (0, Dice(7));
        for _ in 0..60 {
            let loads: Vec<f64> = (0..20).map(|_| dice.unit().powi(3)).collect();
            let duty = Duty { copies: 1, apart: false };
            let before = board(&fleet, &loads, &mut dice).held();
            let mut track = Track::new(board(&fleet, &loads, &mut dice), before, duty, false);
            let mut survey = Survey::default();
            for _ in 0..6 {
                let best = survey.best(&track, &mut 1_000_000).map_or(LEAST, |best| best.ratio);
                let (most, least) = plain(&track);
                assert!(best <= most + ROUNDING && best >= least - ROUNDING, "{best}: {least} to {most}");
                found += usize::from(best > LEAST);
                track.advance(1, 1, 1_000_000);
            }
        }
        assert!(found > 200, "{found}");
    }

    #[test]
    fn a_hasty_look_finds_a_step_whenever_there_is_one_for_less_work() {
        let fleet = fleet();
        let (mut dice, mut saved, mut found) = (Dice(11), 0, 0);
        for _ in 0..40 {
            let loads: Vec<f64> = (0..20).map(|_| dice.unit().powi(3)).collect();
            let board = board(&fleet, &loads, &mut dice);
            let before = board.held();
            let mut track = Track::new(board, before, Duty { copies: 1, apart: false }, false);
            let look = |track: &Track<'_>| {
                let mut left = 1_000_000;
                (Survey::default().best(track, &mut left).map(|best| best.ratio), 1_000_000 - left)
            };
            let (full, work) = look(&track);
            track.hasty = true;
            let (first, less) = look(&track);
            assert_eq!(first.is_some(), full.is_some());
            assert!(first <= full && less <= work, "{first:?} of {full:?} for {less} of {work}");
            (saved, found) = (saved + work - less, found + usize::from(first.is_some()));
        }
        assert!(saved > 0 && found > 20, "{saved} saved, {found} found");
    }

    #[test]
    fn steps_looked_for_later_are_those_looked_for_at_once() {
        let fleet = fleet();
        let mut dice = Dice(3);
        let loads: Vec<f64> = (0..20).map(|_| dice.unit().powi(3)).collect();
        let duty = Duty { copies: 1, apart: false };
        let start = board(&fleet, &loads, &mut dice);
        let budget = super::super::Budget { moves: Some(9), bytes: None, price: 0.0, least: 0.0 };
        let run = |now: usize, effort: u64| {
            let mut track = [Track::new(start.clone(), start.held(), duty, false)];
            track[0].advance(now, 30, effort);
            let balance = super::super::replan::settle(&mut track, budget);
            (track[0].board.slots.clone(), balance)
        };
        for effort in [500, 3_000, 100_000] {
            let at_once = run(30, effort);
            assert!(effort < 3_000 || at_once.0 != start.slots);
            assert_eq!(run(0, effort), at_once);
            assert_eq!(run(4, effort), at_once);
        }
    }
}
