//! Local search on one layer: takes load off the slowest device by swapping, moving or replacing replicas.
//! Keeps every rule that the layer already keeps; stops when nothing helps or the effort is spent.

use super::board::Board;

/// A change of the board.
#[derive(Clone, Copy, Debug)]
enum Change {
    /// The replicas in two slots change places.
    Swap { from: (usize, usize), to: (usize, usize) },
    /// A replica goes to an empty slot.
    Move { from: (usize, usize), to: (usize, usize) },
    /// A slot's replica is replaced by one more copy of an expert.
    Copy { expert: usize, to: (usize, usize) },
}

impl Change {
    /// Replicas that must be loaded for it.
    const fn cost(self) -> usize {
        match self {
            Self::Swap { .. } => 2,
            Self::Move { .. } | Self::Copy { .. } => 1,
        }
    }
}

/// Relative gain below which a change is not worth making.
const LEAST: f64 = 1e-6;

/// Improves the board with at most `moves` loads and `effort` units of work; answers with the moves left.
pub(super) fn improve(board: &mut Board<'_>, copies: usize, moves: usize, effort: u64) -> usize {
    let mut left = moves;
    let mut effort = effort;
    while effort > 0 && left > 0 {
        let Some(slowest) = slowest(board) else { break };
        let limit = board.time(slowest, 0.0) * (1.0 - LEAST);
        let Some(change) = best(board, slowest, copies, limit, left, &mut effort) else { break };
        left = left.saturating_sub(change.cost());
        apply(board, change);
    }
    left
}

fn slowest(board: &Board<'_>) -> Option<usize> {
    (0..board.sites.len())
        .max_by(|one, other| board.time(*one, 0.0).total_cmp(&board.time(*other, 0.0)).then(other.cmp(one)))
}

/// The change after which the slowest of the touched devices is fastest, below `limit`.
fn best(board: &Board<'_>, slowest: usize, copies: usize, limit: f64, left: usize, effort: &mut u64) -> Option<Change> {
    let mut best: Option<(f64, Change)> = None;
    let mut offer = |time: f64, change: Change| {
        if time < best.as_ref().map_or(limit, |(least, _)| *least) && change.cost() <= left {
            best = Some((time, change));
        }
    };
    let row = board.rows.get(slowest)?;
    for (slot, expert) in row.iter().enumerate().filter_map(|(slot, expert)| Some((slot, (*expert)?))) {
        let share = board.share(expert, board.copies(expert));
        for device in (0..board.sites.len()).filter(|device| *device != slowest) {
            if *effort == 0 {
                return best.map(|(_, change)| change);
            }
            if board.holds(device, expert) {
                *effort = effort.saturating_sub(1);
                continue;
            }
            let leaves = may_go(board, expert, slowest, device, copies);
            let other = board.rows.get(device)?;
            *effort = effort.saturating_sub(u64::try_from(other.len()).unwrap_or(u64::MAX).max(1));
            for (place, held) in other.iter().enumerate() {
                let (from, to) = ((slowest, slot), (device, place));
                match *held {
                    None if leaves => {
                        let time = board.time(slowest, -share).max(board.time(device, share));
                        offer(time, Change::Move { from, to });
                    }
                    None => {}
                    Some(held) => {
                        let back = board.share(held, board.copies(held));
                        if leaves && !board.holds(slowest, held) && back < share {
                            let time = board.time(slowest, back - share).max(board.time(device, share - back));
                            let fits = time < limit && may_go(board, held, device, slowest, copies);
                            if fits {
                                offer(time, Change::Swap { from, to });
                            }
                        }
                        if let Some(time) = copy_time(board, expert, held, device, copies, limit) {
                            offer(time, Change::Copy { expert, to });
                        }
                    }
                }
            }
        }
    }
    best.map(|(_, change)| change)
}

/// Whether `expert` keeps its domains and nodes when its copy on `from` goes to `to`.
fn may_go(board: &Board<'_>, expert: usize, from: usize, to: usize, copies: usize) -> bool {
    let domains = board.domains(expert, Some(from), Some(to));
    domains >= copies.min(board.domains(expert, None, None))
        && board.nodes(expert, Some(from), Some(to)) >= board.nodes(expert, None, None).min(2)
}

/// Time of the slowest touched device when `held` on `device` gives way to one more copy of `expert`.
fn copy_time(board: &Board<'_>, expert: usize, held: usize, device: usize, copies: usize, limit: f64) -> Option<f64> {
    let (count, others) = (board.copies(expert), board.copies(held));
    if others < 2 || held == expert || board.domains(held, Some(device), None) < copies {
        return None;
    }
    // A copy more is worth little where the expert's node is lost with all of them.
    let elsewhere = board.sites.iter().any(|site| board.sites.first().is_some_and(|first| first.node != site.node));
    if elsewhere && board.nodes(expert, None, Some(device)) < 2 {
        return None;
    }
    if board.nodes(held, Some(device), None) < board.nodes(held, None, None).min(2).min(others - 1) {
        return None;
    }
    let (new, old) = (board.share(expert, count + 1), board.share(expert, count));
    let (lost, grown) = (board.share(held, others), board.share(held, others - 1));
    let mut time = board.time(device, new - lost);
    for home in board.homes.get(held)?.iter().copied().filter(|home| *home != device) {
        let relief = if board.holds(home, expert) { new - old } else { 0.0 };
        time = time.max(board.time(home, grown - lost + relief));
        if time >= limit {
            return None;
        }
    }
    for home in board.homes.get(expert)?.iter().copied() {
        if !board.holds(home, held) {
            time = time.max(board.time(home, new - old));
        }
    }
    (time < limit).then_some(time)
}

fn apply(board: &mut Board<'_>, change: Change) {
    match change {
        Change::Swap { from, to } => {
            let (one, other) = (board.take(from.0, from.1), board.take(to.0, to.1));
            if let (Some(one), Some(other)) = (one, other) {
                board.put(to.0, to.1, one);
                board.put(from.0, from.1, other);
            }
        }
        Change::Move { from, to } => {
            if let Some(expert) = board.take(from.0, from.1) {
                board.put(to.0, to.1, expert);
            }
        }
        Change::Copy { expert, to } => {
            board.take(to.0, to.1);
            board.put(to.0, to.1, expert);
        }
    }
}
