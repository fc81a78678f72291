//! A layer from nothing: how many copies each expert gets, then slots, the heaviest copies first. Improves
//! nothing afterwards.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, binary_heap::PeekMut},
};

use super::{
    board::{Board, EMPTY},
    fleet::Fleet,
};
use crate::num;

/// Copies by expert: `least` each, and each further slot goes to the expert whose copies carry most (the
/// divisor method, which minimises the largest share). Never more copies than `most`, nor than devices.
pub(super) fn copies(fleet: &Fleet, loads: &[f64], least: usize, most: usize) -> Vec<usize> {
    let mut counts = vec![least; loads.len()];
    let room = fleet.room(loads.len(), 1, false);
    let most = fleet.sites.iter().filter(|site| site.slots > 0).count().min(most.max(least));
    // Loads are never negative, so that their bits order as they do.
    let key = |expert: usize, count: usize| ((loads[expert] / num::real_size(count)).to_bits(), usize::MAX - expert);
    let mut heap: BinaryHeap<(u64, usize)> = (0..loads.len()).map(|expert| key(expert, least.max(1))).collect();
    for _ in 0..room.saturating_sub(loads.len() * least) {
        let expert = loop {
            match heap.pop() {
                Some((_, expert)) if counts[usize::MAX - expert] < most => break Some(usize::MAX - expert),
                Some(_) => {}
                None => break None,
            }
        };
        let Some(expert) = expert else { break };
        counts[expert] += 1;
        heap.push(key(expert, counts[expert]));
    }
    counts
}

/// Slots for `counts` copies, the first `least` of each expert without fail; `None` if these did not find
/// their places. Copies go where the device stays fastest, in a failure domain without one while there is
/// room in any.
pub(super) fn place(fleet: &Fleet, loads: &[f64], counts: &[usize], least: usize, apart: bool) -> Option<Vec<usize>> {
    let shares: Vec<f64> = loads.iter().zip(counts).map(|(load, n)| load / num::real_size((*n).max(1))).collect();
    let mut order: Vec<usize> = (0..loads.len()).collect();
    order.sort_unstable_by(|one, other| shares[*other].total_cmp(&shares[*one]).then(one.cmp(other)));
    let entry = |device: &usize| Reverse((0, fleet.turn[*device], *device));
    let mut ground = Ground {
        fleet,
        slots: vec![EMPTY; fleet.slots()],
        next: fleet.first.clone(),
        open: (0..fleet.devices()).filter(|device| !fleet.range(*device).is_empty()).collect(),
        carried: vec![0.0; fleet.devices()],
        room: vec![0; fleet.nodes],
        met: vec![false; fleet.nodes],
        heaps: fleet.classes.iter().map(|class| class.iter().map(entry).collect()).collect(),
    };
    for (device, site) in fleet.sites.iter().enumerate() {
        ground.room[fleet.node[device]] += site.slots;
    }
    let mut homes = Vec::new();
    for expert in order {
        homes.drain(..).for_each(|home: usize| ground.met[fleet.node[home]] = false);
        for copy in 0..counts[expert] {
            let strict = copy < least && apart;
            match ground.lightest(&homes, shares[expert], strict) {
                // A second copy beside the first is worth little: its slot waits for somebody else.
                Some((device, alone)) if alone || copy != 1 || fleet.nodes < 2 => {
                    ground.put(device, expert, shares[expert]);
                    ground.met[fleet.node[device]] = true;
                    homes.push(device);
                }
                _ if copy < least => return None,
                _ => break,
            }
        }
    }
    Some(ground.slots)
}

struct Ground<'a> {
    fleet: &'a Fleet,
    slots: Vec<usize>,
    /// The next empty slot of each device.
    next: Vec<usize>,
    /// Devices with an empty slot.
    open: Vec<usize>,
    carried: Vec<f64>,
    /// Empty slots by failure domain.
    room: Vec<usize>,
    /// Whether a failure domain has a copy of the expert in hand.
    met: Vec<bool>,
    /// By speed: the bits of what a device carried once, its turn, the device.
    heaps: Vec<BinaryHeap<Reverse<(u64, usize, usize)>>>,
}

/// Whether a copy is in the failure domain and on the card, the time, the domain's empty slots, the device.
type Choice = ((bool, bool), f64, Reverse<usize>, usize);

impl Ground<'_> {
    /// The device that stays fastest with `share` more, of equal ones that in the failure domain with most
    /// empty slots, and whether no copy is in its failure domain yet; such a device comes first, and is the
    /// only one when `strict`.
    fn lightest(&mut self, homes: &[usize], share: f64, strict: bool) -> Option<(usize, bool)> {
        if homes.is_empty() {
            return self.emptiest(share).map(|device| (device, true));
        }
        let mut best: Option<Choice> = None;
        for device in self.open.iter().copied() {
            let node = self.fleet.node[device];
            let time = (self.carried[device] + share) * self.fleet.inverse[device];
            let (met, room) = (self.met[node], Reverse(self.room[node]));
            // What would be worse even alone on its card needs no further look.
            let worse =
                best.is_some_and(|(company, least, full, _)| ((met, false), time, room) >= (company, least, full));
            if worse || (strict && met) || homes.contains(&device) {
                continue;
            }
            let card = self.fleet.sites[device].card;
            let paired = homes.iter().any(|home| self.fleet.sites[*home].card == card);
            if best.is_none_or(|(company, least, full, _)| ((met, paired), time, room) < (company, least, full)) {
                best = Some(((met, paired), time, room, device));
            }
        }
        best.map(|(company, _, _, device)| (device, !company.0))
    }

    /// The same where no copy is placed yet, failure domains taking turns between equals. Most copies are placed by
    /// this, so that it is the hot path of a plan: it costs the logarithm of the devices of each speed.
    fn emptiest(&mut self, share: f64) -> Option<usize> {
        let mut best: Option<(f64, usize, usize)> = None;
        for class in 0..self.heaps.len() {
            let Some(device) = self.top(class) else { continue };
            let time = (self.carried[device] + share) * self.fleet.inverse[device];
            let choice = (time, self.fleet.turn[device], device);
            if best.is_none_or(|best| choice < best) {
                best = Some(choice);
            }
        }
        best.map(|(_, _, device)| device)
    }

    /// The device of a class that carries least. What a device carries only grows: an entry that is out of date is put
    /// right when it comes to the top.
    fn top(&mut self, class: usize) -> Option<usize> {
        let heap = &mut self.heaps[class];
        loop {
            let mut top = heap.peek_mut()?;
            let Reverse((carried, turn, device)) = *top;
            if self.next[device] == self.fleet.first[device + 1] {
                PeekMut::pop(top);
                continue;
            }
            let now = self.carried[device].to_bits();
            if now == carried {
                return Some(device);
            }
            *top = Reverse((now, turn, device));
        }
    }

    fn put(&mut self, device: usize, expert: usize, share: f64) {
        self.slots[self.next[device]] = expert;
        self.next[device] += 1;
        self.carried[device] += share;
        self.room[self.fleet.node[device]] -= 1;
        if self.next[device] == self.fleet.first[device + 1] {
            self.open.retain(|open| *open != device);
        }
    }
}

/// The required copies for certain: the sequence of all experts, repeated `least` times, is laid over the
/// failure domains in order. A run of at most `experts` entries names each expert once, so no domain gets
/// two copies of one (McNaughton's wrap-around rule).
pub(super) fn wrap_around(fleet: &Fleet, experts: usize, least: usize, apart: bool) -> Vec<usize> {
    let mut slots = vec![EMPTY; fleet.slots()];
    let mut order: Vec<usize> = (0..fleet.devices()).collect();
    order.sort_by_key(|device| (fleet.node[*device], *device));
    let mut used = vec![0_usize; fleet.devices().max(fleet.nodes)];
    let mut next = 0_usize;
    for device in order {
        let domain = if apart && least > 1 { fleet.node[device] } else { device };
        for slot in fleet.range(device) {
            if next >= experts * least || used[domain] >= experts {
                break;
            }
            slots[slot] = next % experts;
            next += 1;
            used[domain] += 1;
        }
    }
    slots
}

/// Gives empty slots to the experts whose copies carry most, as long as they find a device: in a failure
/// domain without a copy when `strict`, else in any as long as not all copies share one. No device becomes
/// slower than `peak` for it.
pub(super) fn fill(board: &mut Board<'_>, strict: bool, peak: f64) {
    let mut open: usize = board.free.iter().sum();
    if open == 0 {
        return;
    }
    let mut heap: BinaryHeap<(u64, usize)> =
        (0..board.loads.len()).map(|expert| (board.share[expert].to_bits(), usize::MAX - expert)).collect();
    while open > 0 {
        let Some((_, expert)) = heap.pop() else { break };
        let expert = usize::MAX - expert;
        let share = board.loads[expert] / num::real_size(board.count[expert] + 1);
        let enough = board.spread[expert] >= board.fleet.nodes.min(2);
        let fits =
            |device: usize| board.may_gain(expert, device) || (!strict && enough && !board.holds(device, expert));
        let fits = |device: usize| !board.fleet.closed[device] && fits(device);
        let best = (0..board.fleet.devices())
            .filter(|device| board.free[*device] > 0 && fits(*device) && board.time(*device, share) <= peak)
            .min_by(|one, other| board.time(*one, share).total_cmp(&board.time(*other, share)).then(one.cmp(other)));
        if let Some(slot) = best.and_then(|device| board.free_slot(device)) {
            board.put(slot, expert);
            heap.push((board.share[expert].to_bits(), usize::MAX - expert));
            open -= 1;
        }
    }
}
