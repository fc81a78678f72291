//! What a layout must get before anything else: replicas put back where they were, experts without a copy,
//! copies that would all be lost together. Moves nothing for balance.

use super::{
    board::{Board, EMPTY},
    construct,
    replan::{displace, growth},
};

/// A layer's slots by device.
pub type Rows = Vec<Vec<Option<usize>>>;

/// Puts replicas back where they were, in the same slots as far as these still exist.
pub(super) fn keep(board: &mut Board<'_>, previous: &[Vec<Option<usize>>]) {
    let experts = board.loads.len();
    for (device, row) in previous.iter().enumerate().take(board.fleet.devices()) {
        let known = |(slot, expert): (usize, &Option<usize>)| Some((slot, expert.filter(|expert| *expert < experts)?));
        let held = row.iter().enumerate().filter_map(known);
        let room = board.fleet.range(device).len();
        if row.len() <= room {
            held.for_each(|(slot, expert)| lay(board, device, slot, expert));
            continue;
        }
        let mut held: Vec<(usize, usize)> = held.collect();
        if held.len() > room {
            // Those with copies elsewhere are the ones to give up, the least loaded first.
            let copies = |expert: usize| previous.iter().filter(|row| row.contains(&Some(expert))).count();
            held.sort_by(|(_, one), (_, other)| {
                let load = board.loads[*other].total_cmp(&board.loads[*one]);
                copies(*one).cmp(&copies(*other)).then(load).then(one.cmp(other))
            });
            held.truncate(room);
        }
        held.into_iter().for_each(|(slot, expert)| lay(board, device, slot, expert));
    }
    board.divide();
}

/// Notes `expert` in a device's slot, else in any empty one; nothing if the device has it.
fn lay(board: &mut Board<'_>, device: usize, slot: usize, expert: usize) {
    let slots = board.fleet.range(device);
    let same = Some(slots.start + slot).filter(|at| slots.contains(at) && board.slots[*at] == EMPTY);
    if let (Some(place), false) = (same.or_else(|| board.free_slot(device)), board.holds(device, expert)) {
        board.mark(place, expert);
    }
}

/// Gives every expert its required copies, each in another failure domain when `apart`, moving as little as
/// possible; experts without a copy come first, the heaviest of them first. Says whether it could.
pub(super) fn repair(board: &mut Board<'_>, least: usize, apart: bool) -> bool {
    let has = |board: &Board<'_>, expert: usize| {
        if apart { board.spread[expert] } else { board.count[expert] }
    };
    let mut short: Vec<usize> = (0..board.loads.len()).filter(|expert| has(board, *expert) < least).collect();
    short.sort_by(|one, other| {
        let copies = board.count[*one].cmp(&board.count[*other]);
        copies.then(board.loads[*other].total_cmp(&board.loads[*one])).then(one.cmp(other))
    });
    for expert in short {
        while has(board, expert) < least {
            if !add_copy(board, expert, least, apart) {
                return false;
            }
        }
    }
    true
}

/// One more copy of `expert`: where it costs least, into an empty slot or in place of a replica that is not
/// required; else after moving a replica out of the way.
fn add_copy(board: &mut Board<'_>, expert: usize, least: usize, apart: bool) -> bool {
    let fleet = board.fleet;
    let growth = growth(board);
    let share = board.loads[expert] / crate::num::real_size(board.count[expert] + 1);
    let mut best: Option<((bool, f64), usize)> = None;
    for device in 0..fleet.devices() {
        let met = board.in_node(expert, fleet.node[device]) > 0;
        if board.holds(device, expert) || (apart && met) || fleet.closed[device] {
            continue;
        }
        for slot in fleet.range(device) {
            let held = board.slots[slot];
            if held != EMPTY && !board.may_lose(held, device, least, apart) {
                continue;
            }
            let cost = (met || held != EMPTY, displace(board, &growth, held, device, share));
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, slot));
            }
        }
    }
    match best {
        Some((_, slot)) => {
            if board.slots[slot] != EMPTY {
                board.take(slot);
            }
            board.put(slot, expert);
            true
        }
        None => relocate(board, expert, apart),
    }
}

/// Moves one replica into an empty slot elsewhere so that `expert` can have its slot.
fn relocate(board: &mut Board<'_>, expert: usize, apart: bool) -> bool {
    let fleet = board.fleet;
    // A second copy in one failure domain is of no use to what must be survived: its slot serves the move.
    let doubled = board.homes(expert).find(|home| board.in_node(expert, fleet.node[*home]) > 1);
    if let (Some(slot), true) = (doubled.and_then(|home| board.slot_of(home, expert)), apart) {
        board.take(slot);
    }
    let targets: Vec<usize> = (0..fleet.devices()).filter_map(|device| board.free_slot(device)).collect();
    for device in 0..fleet.devices() {
        let met = apart && board.in_node(expert, fleet.node[device]) > 0;
        if board.holds(device, expert) || met || fleet.closed[device] {
            continue;
        }
        for slot in fleet.range(device).filter(|slot| board.slots[*slot] != EMPTY) {
            let held = board.slots[slot];
            let target = targets
                .iter()
                .find(|target| fleet.owner[**target] != device && board.may_go(held, device, fleet.owner[**target]));
            if let Some(target) = target {
                board.swap(slot, *target);
                board.put(slot, expert);
                return true;
            }
        }
    }
    false
}

/// Where all of several copies share one failure domain: those beyond the `least` required go, from the
/// devices with most to do, and one of several required changes places with a replica elsewhere that may.
/// Says whether any went or changed places.
pub(super) fn scatter(board: &mut Board<'_>, least: usize) -> bool {
    let mut any = false;
    if board.fleet.nodes < 2 {
        return any;
    }
    for expert in 0..board.loads.len() {
        while board.count[expert] > least.max(1) && board.spread[expert] < 2 {
            let Some(slot) = busiest(board, expert) else { break };
            board.take(slot);
            any = true;
        }
        if board.count[expert] > 1 && board.spread[expert] < 2 {
            any |= exchange(board, expert);
        }
    }
    any
}

/// The slot of the copy whose device has most to do.
fn busiest(board: &Board<'_>, expert: usize) -> Option<usize> {
    let time = |device: usize| board.time(device, 0.0);
    let home = board.homes(expert).max_by(|one, other| time(*one).total_cmp(&time(*other)).then(other.cmp(one)))?;
    board.slot_of(home, expert)
}

/// Exchanges a copy, the busiest that can, with the replica nearest in load in another failure domain that may go.
fn exchange(board: &mut Board<'_>, expert: usize) -> bool {
    let mut homes: Vec<usize> = board.homes(expert).collect();
    let time = |device: usize| board.time(device, 0.0);
    homes.sort_by(|one, other| time(*other).total_cmp(&time(*one)).then(one.cmp(other)));
    let slots = homes.into_iter().filter_map(|home| board.slot_of(home, expert));
    let pair = slots.filter_map(|slot| Some((slot, partner(board, slot)?))).next();
    if let Some((slot, other)) = pair {
        board.swap(slot, other);
    }
    pair.is_some()
}

/// The slot in another failure domain whose replica may change places with that of `slot`, the nearest in load.
fn partner(board: &Board<'_>, slot: usize) -> Option<usize> {
    let (fleet, expert) = (board.fleet, board.slots[slot]);
    let (home, share) = (fleet.owner[slot], board.share[expert]);
    let fits = |other: &usize| {
        let (device, held) = (fleet.owner[*other], board.slots[*other]);
        fleet.node[device] != fleet.node[home]
            && !board.holds(device, expert)
            && !fleet.closed[device]
            && (held == EMPTY || board.may_go(held, device, home))
    };
    let apart = |other: usize| {
        let held = board.slots[other];
        (share - if held == EMPTY { 0.0 } else { board.share[held] }).abs()
    };
    (0..board.slots.len()).filter(fits).min_by(|one, other| apart(*one).total_cmp(&apart(*other)).then(one.cmp(other)))
}

/// Scatters and fills until neither changes anything: a later plan for the same loads finds nothing to do.
pub(super) fn spread(board: &mut Board<'_>, least: usize) {
    fill(board);
    while scatter(board, least) {
        fill(board);
    }
}

/// Fills empty slots, then those that only a failure domain with a copy can use, until nothing changes: what
/// is filled here needs no filling later. The slowest device becomes no slower.
pub(super) fn fill(board: &mut Board<'_>) {
    let open = |board: &Board<'_>| board.free.iter().sum::<usize>();
    let peak = board.slowest() * (1.0 + 1e-9);
    while open(board) > 0 {
        let before = open(board);
        // A device may pass the peak on the way: the copies that follow take from those before.
        let mut bold = board.clone();
        for strict in [true, false] {
            construct::fill(&mut bold, strict, f64::INFINITY);
        }
        if bold.slowest() <= peak {
            *board = bold;
        } else {
            for strict in [true, false] {
                construct::fill(board, strict, peak);
            }
        }
        if open(board) == before {
            return;
        }
    }
}

/// The board's slots by device, replicas that a device held before in the slots where they were.
pub(super) fn rows(board: &Board<'_>, previous: Option<&Rows>) -> Rows {
    let held = |slot: &usize| Some(*slot).filter(|expert| *expert != EMPTY);
    let mut rows: Rows = (0..board.fleet.devices())
        .map(|device| board.slots[board.fleet.range(device)].iter().map(held).collect())
        .collect();
    for (row, old) in rows.iter_mut().zip(previous.into_iter().flatten()) {
        for (slot, expert) in old.iter().enumerate().take(row.len()) {
            if row[slot] == *expert {
                continue;
            }
            if let Some(at) = expert.and_then(|expert| row.iter().position(|held| *held == Some(expert))) {
                row.swap(at, slot);
            }
        }
    }
    rows
}
