//! One layer: replica counts and slots. This function is the seam behind which a better solver goes.
//! It never moves a replica that may stay, unless it was given moves.

use super::{board::Board, improve::improve};

/// One device, as a layer sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    /// Its slots.
    pub slots: usize,
    /// Relative speed, above 0.
    pub speed: f64,
    /// Number of the failure domain that must be survivable.
    pub domain: usize,
    /// Number of its node (rack, when a rack must be survivable).
    pub node: usize,
    /// Number of its card.
    pub card: usize,
}

/// One layer to fill.
#[derive(Clone, Debug)]
pub struct LayerProblem<'a> {
    /// Experts of the layer.
    pub experts: usize,
    /// Tokens by expert, `experts` entries.
    pub loads: Vec<f64>,
    /// The devices.
    pub sites: &'a [Site],
    /// Copies of each expert, each in another `domain`.
    pub copies: usize,
    /// By device, what its slots held before; `None` = a first placement.
    pub previous: Option<Vec<Vec<Option<usize>>>>,
    /// Most replicas that may move for balance; `None` = no bound. A first placement is free.
    pub moves: Option<usize>,
    /// Work units for improvement.
    pub effort: u64,
}

/// A filled layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSolution {
    /// By device, the expert in each slot.
    pub rows: Vec<Vec<Option<usize>>>,
    /// Slowest device's load ÷ speed over an ideal split's.
    pub makespan: f64,
}

/// Why a layer cannot be filled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayerShort {
    /// Fewer slots than the copies that are required.
    #[error("{needed} slots are needed and {room} count: {short} short")]
    Slots {
        /// Required copies over all experts.
        needed: usize,
        /// Slots that can hold a copy in another domain.
        room: usize,
        /// The difference.
        short: usize,
    },
}

/// Fills a layer.
///
/// # Errors
/// [`LayerShort`] when the required copies do not fit; every other input gives a valid layer.
pub fn solve_layer(problem: &LayerProblem<'_>) -> Result<LayerSolution, LayerShort> {
    let room = room(problem);
    let needed = problem.experts * problem.copies;
    if room < needed {
        return Err(LayerShort::Slots { needed, room, short: needed - room });
    }
    let mut board = Board::new(problem.sites, &problem.loads);
    let fresh = match &problem.previous {
        Some(previous) => {
            keep(&mut board, previous);
            let kept = repair(&mut board, problem.copies);
            if !kept {
                board = Board::new(problem.sites, &problem.loads);
            }
            !kept
        }
        None => true,
    };
    if fresh && !spread_by_load(&mut board, problem.copies) {
        board = Board::new(problem.sites, &problem.loads);
        wrap_around(&mut board, problem.copies);
    }
    fill(&mut board, usize::MAX);
    let moves = if fresh { usize::MAX } else { problem.moves.unwrap_or(usize::MAX) };
    if moves > 0 {
        let left = improve(&mut board, problem.copies, moves, problem.effort);
        // A move may have left a slot behind that somebody can use.
        fill(&mut board, left);
    }
    if let (Some(previous), true) = (&problem.previous, fresh) {
        realign(&mut board, previous);
    }
    Ok(LayerSolution { makespan: board.makespan(), rows: board.rows })
}

/// Slots that can hold required copies: at most one of each expert in a domain.
fn room(problem: &LayerProblem<'_>) -> usize {
    if problem.copies < 2 {
        return problem.sites.iter().map(|site| site.slots.min(problem.experts)).sum();
    }
    let domains = problem.sites.iter().map(|site| site.domain).max().map_or(0, |last| last + 1);
    let slots =
        |domain| problem.sites.iter().filter(|site| site.domain == domain).map(|site| site.slots).sum::<usize>();
    (0..domains).map(|domain| slots(domain).min(problem.experts)).sum()
}

/// Puts replicas back where they were, in the same slots as far as these still exist.
fn keep(board: &mut Board<'_>, previous: &[Vec<Option<usize>>]) {
    for (device, row) in previous.iter().enumerate().take(board.sites.len()) {
        let slots = board.sites.get(device).map_or(0, |site| site.slots);
        let mut held: Vec<(usize, usize)> =
            row.iter().enumerate().filter_map(|(slot, expert)| Some((slot, (*expert)?))).collect();
        held.retain(|(_, expert)| *expert < board.loads.len());
        if held.len() > slots {
            // Those with copies elsewhere are the ones to give up, the least loaded first.
            let copies = |expert: usize| previous.iter().filter(|row| row.contains(&Some(expert))).count();
            held.sort_by(|one, other| {
                let key = |expert: usize| copies(expert);
                key(one.1)
                    .cmp(&key(other.1))
                    .then(board.load(other.1).total_cmp(&board.load(one.1)))
                    .then(one.1.cmp(&other.1))
            });
            held.truncate(slots);
        }
        for (slot, expert) in held {
            let place = if slot < slots { Some(slot) } else { None };
            let empty = |at: usize| board.rows.get(device).and_then(|row| row.get(at)) == Some(&None);
            let place = place.filter(|at| empty(*at)).or_else(|| board.free_slot(device));
            if let (Some(place), false) = (place, board.holds(device, expert)) {
                board.put(device, place, expert);
            }
        }
    }
}

/// Gives every expert its required copies, each in another domain, moving as little as possible; experts
/// without a copy come first. Says whether it could.
fn repair(board: &mut Board<'_>, copies: usize) -> bool {
    let mut short: Vec<usize> =
        (0..board.loads.len()).filter(|expert| board.domains(*expert, None, None) < copies).collect();
    short.sort_by(|one, other| {
        let copies = board.copies(*one).cmp(&board.copies(*other));
        copies.then(board.load(*other).total_cmp(&board.load(*one))).then(one.cmp(other))
    });
    for expert in short {
        while board.domains(expert, None, None) < copies {
            if !add_copy(board, expert, copies) {
                return false;
            }
        }
    }
    true
}

/// One more copy of `expert` in a domain that has none: into a free slot, else in place of a replica that
/// is not required, else after moving a replica out of the way.
fn add_copy(board: &mut Board<'_>, expert: usize, copies: usize) -> bool {
    if let Some((device, slot)) = best_free(board, expert, true) {
        board.put(device, slot, expert);
        return true;
    }
    if let Some((device, slot)) = best_victim(board, expert, copies) {
        board.take(device, slot);
        board.put(device, slot, expert);
        return true;
    }
    relocate(board, expert, copies)
}

/// The best device with an empty slot for a copy of `expert`: in a domain, on a node and on a card without
/// one, then where the device stays fastest. `strict`: only in a domain without one.
fn best_free(board: &Board<'_>, expert: usize, strict: bool) -> Option<(usize, usize)> {
    let share = board.share(expert, board.copies(expert) + 1);
    (0..board.sites.len())
        .filter(|device| !board.holds(*device, expert))
        .filter_map(|device| Some((device, board.free_slot(device)?, board.company(expert, device))))
        .filter(|(_, _, company)| !(strict && company.0))
        .min_by(|one, other| {
            let time = |device: usize| board.time(device, share);
            one.2.cmp(&other.2).then(time(one.0).total_cmp(&time(other.0))).then(one.0.cmp(&other.0))
        })
        .map(|(device, slot, _)| (device, slot))
}

/// The slot whose replica may go so that `expert` finds a place in a new domain: the one whose loss adds
/// least load to its other copies.
fn best_victim(board: &Board<'_>, expert: usize, copies: usize) -> Option<(usize, usize)> {
    let mut best: Option<(f64, (usize, usize))> = None;
    for device in 0..board.sites.len() {
        if board.company(expert, device).0 {
            continue;
        }
        for (slot, victim) in board.rows.get(device)?.iter().enumerate() {
            let Some(victim) = *victim else { continue };
            let held = board.copies(victim);
            if victim == expert || held < 2 || board.domains(victim, Some(device), None) < copies {
                continue;
            }
            let cost = board.share(victim, held - 1);
            if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                best = Some((cost, (device, slot)));
            }
        }
    }
    best.map(|(_, place)| place)
}

/// Moves one replica into a free slot elsewhere so that `expert` can have its slot.
fn relocate(board: &mut Board<'_>, expert: usize, copies: usize) -> bool {
    // A second copy in one domain is of no use to what must be survived: its slot is free for the move.
    let homes = board.homes.get(expert).cloned().unwrap_or_default();
    let doubled = homes
        .iter()
        .copied()
        .find(|home| homes.len() > 1 && board.domains(expert, Some(*home), None) == board.domains(expert, None, None));
    if let Some(device) = doubled
        && let Some(slot) = board.rows.get(device).and_then(|row| row.iter().position(|held| *held == Some(expert)))
    {
        board.take(device, slot);
    }
    let targets: Vec<(usize, usize)> =
        (0..board.sites.len()).filter_map(|device| Some((device, board.free_slot(device)?))).collect();
    for device in 0..board.sites.len() {
        if board.company(expert, device).0 {
            continue;
        }
        let row = board.rows.get(device).cloned().unwrap_or_default();
        for (slot, held) in row.iter().enumerate().filter_map(|(slot, held)| Some((slot, (*held)?))) {
            for (target, place) in &targets {
                let fits = *target != device && !board.holds(*target, held) && held != expert;
                if fits
                    && board.domains(held, Some(device), Some(*target)) >= copies.min(board.domains(held, None, None))
                {
                    board.take(device, slot);
                    board.put(*target, *place, held);
                    board.put(device, slot, expert);
                    return true;
                }
            }
        }
    }
    false
}

/// A first placement: copies by load (each further one goes to the expert whose copies carry most), then
/// slots, the heaviest copies first. Says whether the required copies found their domains.
fn spread_by_load(board: &mut Board<'_>, copies: usize) -> bool {
    let experts = board.loads.len();
    let spare = board.free().saturating_sub(experts * copies);
    let mut counts = vec![copies; experts];
    for _ in 0..spare {
        let next = (0..experts).filter(|expert| counts.get(*expert) < Some(&board.sites.len())).max_by(|one, other| {
            let share = |expert: usize| board.share(expert, counts.get(expert).copied().unwrap_or(1));
            let fewer = |expert: usize| counts.get(expert).copied().unwrap_or(0);
            share(*one).total_cmp(&share(*other)).then(fewer(*other).cmp(&fewer(*one))).then(other.cmp(one))
        });
        match next.and_then(|expert| counts.get_mut(expert)) {
            Some(count) => *count += 1,
            None => break,
        }
    }
    let share = |expert: usize| board.share(expert, counts.get(expert).copied().unwrap_or(1));
    let mut order: Vec<usize> = (0..experts).collect();
    order.sort_by(|one, other| share(*other).total_cmp(&share(*one)).then(one.cmp(other)));
    let shares: Vec<f64> = (0..experts).map(share).collect();
    // Devices carry the final shares while they fill, not those of the copies placed so far.
    let mut carried = vec![0.0; board.sites.len()];
    for expert in order {
        for copy in 0..counts.get(expert).copied().unwrap_or(0) {
            let weight = shares.get(expert).copied().unwrap_or(0.0);
            let place = lightest(board, &carried, expert, weight, copy < copies);
            match place {
                Some((device, slot)) => {
                    board.put(device, slot, expert);
                    if let Some(load) = carried.get_mut(device) {
                        *load += weight;
                    }
                }
                None if copy < copies && !relocate(board, expert, copies) => return false,
                None => {}
            }
        }
    }
    true
}

fn lightest(board: &Board<'_>, carried: &[f64], expert: usize, weight: f64, strict: bool) -> Option<(usize, usize)> {
    (0..board.sites.len())
        .filter(|device| !board.holds(*device, expert))
        .filter_map(|device| Some((device, board.free_slot(device)?, board.company(expert, device))))
        .filter(|(_, _, company)| !(strict && company.0))
        .min_by(|one, other| {
            let time = |device: usize| (carried.get(device).copied().unwrap_or(0.0) + weight) / board.speed(device);
            let alone = |company: (bool, bool, bool)| (company.0, company.1, company.2);
            alone(one.2).cmp(&alone(other.2)).then(time(one.0).total_cmp(&time(other.0))).then(one.0.cmp(&other.0))
        })
        .map(|(device, slot, _)| (device, slot))
}

/// The required copies for certain: the sequence of all experts, repeated `copies` times, is laid over the
/// domains in order. A run of at most `experts` entries names each expert once, so no domain gets two
/// copies of one (McNaughton's wrap-around rule).
fn wrap_around(board: &mut Board<'_>, copies: usize) {
    let experts = board.loads.len();
    let mut order: Vec<usize> = (0..board.sites.len()).collect();
    order.sort_by_key(|device| (board.sites.get(*device).map_or(0, |site| site.domain), *device));
    let mut used = vec![0_usize; board.sites.len()];
    let mut next = 0_usize;
    for device in order {
        let Some(site) = board.sites.get(device) else { continue };
        for slot in 0..site.slots {
            let full = used.get(if copies < 2 { device } else { site.domain }).is_some_and(|used| *used >= experts);
            if next >= experts * copies || full {
                break;
            }
            board.put(device, slot, next % experts);
            next += 1;
            if let Some(used) = used.get_mut(if copies < 2 { device } else { site.domain }) {
                *used += 1;
            }
        }
    }
}

/// Gives at most `most` empty slots to the experts whose copies carry most, as long as they find a device.
fn fill(board: &mut Board<'_>, most: usize) {
    let mut stuck = vec![false; board.loads.len()];
    let mut left = most;
    while board.free() > 0 && left > 0 {
        let next = (0..board.loads.len()).filter(|expert| stuck.get(*expert) == Some(&false)).max_by(|one, other| {
            let share = |expert: usize| board.share(expert, board.copies(expert));
            let copies = |expert: usize| board.copies(expert);
            share(*one).total_cmp(&share(*other)).then(copies(*other).cmp(&copies(*one))).then(other.cmp(one))
        });
        let Some(expert) = next else { break };
        match best_free(board, expert, false) {
            Some((device, slot)) => {
                board.put(device, slot, expert);
                left -= 1;
            }
            None => {
                if let Some(stuck) = stuck.get_mut(expert) {
                    *stuck = true;
                }
            }
        }
    }
}

/// Puts replicas that a device held before into the slots where they were.
fn realign(board: &mut Board<'_>, previous: &[Vec<Option<usize>>]) {
    for (row, old) in board.rows.iter_mut().zip(previous) {
        for (slot, expert) in old.iter().enumerate().take(row.len()) {
            if let Some(at) = expert.and_then(|expert| row.iter().position(|held| *held == Some(expert))) {
                row.swap(at, slot);
            }
        }
    }
}
