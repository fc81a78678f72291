//! One layer's slots while they are being filled: keeps loads, copies and failure domains up to date.
//! Takes no decision.

use super::fleet::Fleet;
use crate::num;

/// A slot without an expert.
pub(super) const EMPTY: usize = usize::MAX;

/// Slots of one layer. An expert's load is shared evenly by its copies; loads are in units of the ideal
/// time, so that 1 is what every device would take if the layer were split perfectly.
#[derive(Clone, Debug)]
pub(super) struct Board<'a> {
    pub(super) fleet: &'a Fleet,
    pub(super) loads: &'a [f64],
    /// Expert of each slot, or `EMPTY`.
    pub(super) slots: Vec<usize>,
    /// Copies by expert.
    pub(super) count: Vec<usize>,
    /// Load that each copy of an expert carries.
    pub(super) share: Vec<f64>,
    /// Load by device.
    pub(super) carried: Vec<f64>,
    /// Failure domains by expert.
    pub(super) spread: Vec<usize>,
    /// Empty slots by device.
    pub(super) free: Vec<usize>,
    /// Copies by expert and failure domain.
    at_node: Vec<u16>,
    /// Whether a device holds an expert: bits by expert and device.
    held: Vec<u64>,
    words: usize,
}

impl<'a> Board<'a> {
    pub(super) fn new(fleet: &'a Fleet, loads: &'a [f64]) -> Self {
        let (experts, words) = (loads.len(), fleet.devices().div_ceil(64));
        Self {
            fleet,
            loads,
            slots: vec![EMPTY; fleet.slots()],
            count: vec![0; experts],
            share: loads.to_vec(),
            carried: vec![0.0; fleet.devices()],
            spread: vec![0; experts],
            free: fleet.sites.iter().map(|site| site.slots).collect(),
            at_node: vec![0; experts * fleet.nodes],
            held: vec![0; experts * words],
            words,
        }
    }

    /// The board with these slots.
    pub(super) fn of(fleet: &'a Fleet, loads: &'a [f64], slots: &[usize]) -> Self {
        let mut board = Self::new(fleet, loads);
        for (slot, expert) in slots.iter().enumerate().filter(|(_, expert)| **expert != EMPTY) {
            board.mark(slot, *expert);
        }
        board.divide();
        board
    }

    /// Shares and what devices carry, after slots were marked.
    pub(super) fn divide(&mut self) {
        for ((share, load), count) in self.share.iter_mut().zip(self.loads).zip(&self.count) {
            *share = load / num::real_size((*count).max(1));
        }
        self.weigh();
    }

    /// Adds up what devices carry anew, so that rounding does not pile up.
    pub(super) fn weigh(&mut self) {
        for device in 0..self.fleet.devices() {
            let row = &self.slots[self.fleet.range(device)];
            self.carried[device] = row.iter().filter(|held| **held != EMPTY).map(|held| self.share[*held]).sum();
        }
    }

    /// Notes `expert` in an empty slot and nothing of loads: `divide` makes them true again.
    pub(super) fn mark(&mut self, slot: usize, expert: usize) {
        let device = self.fleet.owner[slot];
        self.slots[slot] = expert;
        self.free[device] -= 1;
        self.count[expert] += 1;
        self.held[expert * self.words + device / 64] |= 1 << (device % 64);
        let at_node = &mut self.at_node[expert * self.fleet.nodes + self.fleet.node[device]];
        self.spread[expert] += usize::from(*at_node == 0);
        *at_node += 1;
    }

    fn unmark(&mut self, slot: usize) -> usize {
        let device = self.fleet.owner[slot];
        let expert = std::mem::replace(&mut self.slots[slot], EMPTY);
        self.free[device] += 1;
        self.count[expert] -= 1;
        self.held[expert * self.words + device / 64] &= !(1 << (device % 64));
        let at_node = &mut self.at_node[expert * self.fleet.nodes + self.fleet.node[device]];
        *at_node -= 1;
        self.spread[expert] -= usize::from(*at_node == 0);
        expert
    }

    /// Puts `expert` into an empty slot; its other copies carry less.
    pub(super) fn put(&mut self, slot: usize, expert: usize) {
        self.mark(slot, expert);
        let device = self.fleet.owner[slot];
        let share = self.loads[expert] / num::real_size(self.count[expert]);
        let less = share - self.share[expert];
        if self.count[expert] > 1 {
            self.each_home(expert, |carried| *carried += less);
            self.carried[device] -= less;
        }
        self.carried[device] += share;
        self.share[expert] = share;
    }

    /// Empties a slot and says what was in it; the other copies carry more.
    pub(super) fn take(&mut self, slot: usize) -> usize {
        let device = self.fleet.owner[slot];
        let expert = self.unmark(slot);
        self.carried[device] -= self.share[expert];
        if self.count[expert] > 0 {
            let share = self.loads[expert] / num::real_size(self.count[expert]);
            let more = share - self.share[expert];
            self.each_home(expert, |carried| *carried += more);
            self.share[expert] = share;
        }
        expert
    }

    /// Exchanges what two slots of different devices hold; either may be empty.
    pub(super) fn swap(&mut self, one: usize, other: usize) {
        let (first, second) = (self.slots[one], self.slots[other]);
        let (here, there) = (self.fleet.owner[one], self.fleet.owner[other]);
        for (slot, expert, from, to) in [(one, first, here, there), (other, second, there, here)] {
            if expert != EMPTY {
                self.unmark(slot);
                self.carried[from] -= self.share[expert];
                self.carried[to] += self.share[expert];
            }
        }
        if first != EMPTY {
            self.mark(other, first);
        }
        if second != EMPTY {
            self.mark(one, second);
        }
    }

    fn each_home(&mut self, expert: usize, change: impl Fn(&mut f64)) {
        for word in 0..self.words {
            let mut bits = self.held[expert * self.words + word];
            while bits != 0 {
                change(&mut self.carried[word * 64 + num::index(bits.trailing_zeros())]);
                bits &= bits - 1;
            }
        }
    }

    /// Devices that hold `expert`.
    pub(super) fn homes(&self, expert: usize) -> impl Iterator<Item = usize> + '_ {
        let bits = self.held[expert * self.words..(expert + 1) * self.words].iter();
        bits.enumerate().flat_map(|(word, bits)| {
            std::iter::successors(Some(*bits), |bits| Some(bits & bits.wrapping_sub(1)))
                .take_while(|bits| *bits != 0)
                .map(move |bits| word * 64 + num::index(bits.trailing_zeros()))
        })
    }

    #[inline]
    pub(super) fn holds(&self, device: usize, expert: usize) -> bool {
        self.held[expert * self.words + device / 64] & (1 << (device % 64)) != 0
    }

    /// What devices hold, for `holds_in`.
    pub(super) fn held(&self) -> Vec<u64> {
        self.held.clone()
    }

    /// Whether a device held an expert when `held` was asked for.
    #[inline]
    pub(super) fn holds_in(&self, held: &[u64], device: usize, expert: usize) -> bool {
        held[expert * self.words + device / 64] & (1 << (device % 64)) != 0
    }

    #[inline]
    pub(super) fn in_node(&self, expert: usize, node: usize) -> usize {
        usize::from(self.at_node[expert * self.fleet.nodes + node])
    }

    /// Load ÷ speed of a device if it carried `extra` more.
    #[inline]
    pub(super) fn time(&self, device: usize, extra: f64) -> f64 {
        (self.carried[device] + extra) * self.fleet.inverse[device]
    }

    /// What each other copy of `expert` carries more when one goes; nothing if it is the only one.
    #[inline]
    pub(super) fn grown(&self, expert: usize) -> f64 {
        self.loads[expert] / num::real_size((self.count[expert] - 1).max(1)) - self.share[expert]
    }

    /// The first empty slot of a device.
    pub(super) fn free_slot(&self, device: usize) -> Option<usize> {
        if self.free[device] == 0 {
            return None;
        }
        self.fleet.range(device).find(|slot| self.slots[*slot] == EMPTY)
    }

    /// The slot of `device` that holds `expert`.
    pub(super) fn slot_of(&self, device: usize, expert: usize) -> Option<usize> {
        self.fleet.range(device).find(|slot| self.slots[*slot] == expert)
    }

    /// The slowest device's time; 0 without load.
    pub(super) fn slowest(&self) -> f64 {
        (0..self.fleet.devices()).map(|device| self.time(device, 0.0)).fold(0.0, f64::max)
    }

    /// Whether the copy of `expert` on `from` may go to `to`: no copy there, and in as many failure domains
    /// as before.
    #[inline]
    pub(super) fn may_go(&self, expert: usize, from: usize, to: usize) -> bool {
        if self.holds(to, expert) || self.fleet.closed[to] {
            return false;
        }
        let (old, new) = (self.fleet.node[from], self.fleet.node[to]);
        self.count[expert] == 1 || old == new || self.in_node(expert, new) == 0 || self.in_node(expert, old) > 1
    }

    /// Whether `device` may take one more copy of `expert`: in a failure domain without one while there are
    /// any.
    #[inline]
    pub(super) fn may_gain(&self, expert: usize, device: usize) -> bool {
        !self.holds(device, expert)
            && !self.fleet.closed[device]
            && (self.spread[expert] >= self.fleet.nodes || self.in_node(expert, self.fleet.node[device]) == 0)
    }

    /// Whether the copy of `expert` on `device` may go: `least` copies stay (in as many failure domains when
    /// `apart`), those that stay are in as many as they can be if they were before, and never all of several
    /// in one.
    #[inline]
    pub(super) fn may_lose(&self, expert: usize, device: usize, least: usize, apart: bool) -> bool {
        let left = self.count[expert].saturating_sub(1);
        let lonely = self.in_node(expert, self.fleet.node[device]) == 1;
        let spread = self.spread[expert] - usize::from(lonely);
        let nodes = self.fleet.nodes;
        let wide = self.spread[expert] >= self.count[expert].min(nodes);
        left >= least && (!apart || spread >= least) && spread >= left.min(if wide { nodes } else { nodes.min(2) })
    }
}
