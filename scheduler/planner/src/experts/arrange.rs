//! All layers of one instance: from nothing each by itself, from a previous layout within one budget for
//! all. The same on any number of threads, for layers are solved apart and put together in order.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use super::{
    board::Board,
    fleet::{Fleet, Site},
    layer::{self, Duty},
    leap::{self, Leap},
    repair::{self, Rows},
    replan::{self, Budget, Track},
    temper,
};
use crate::{num, plan::Balance, problem::Effort};

/// All layers, to be filled.
#[derive(Clone, Copy, Debug)]
pub struct Task<'a> {
    /// The devices.
    pub fleet: &'a Fleet,
    /// What every layer must keep.
    pub duty: Duty,
    /// Tokens by layer and expert. A layer without any load, or with a number that is none, is placed as if
    /// evenly loaded, and keeps what it has.
    pub loads: &'a [Vec<f64>],
    /// By layer and device, what slots held before, no entries for a device that joins; `None` = a first
    /// placement.
    pub previous: Option<&'a [Rows]>,
    /// What may move for balance.
    pub budget: Budget,
    /// Work for each layer.
    pub effort: Effort,
    /// Threads.
    pub threads: usize,
}

/// A filled layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Arranged {
    /// By device, the expert in each slot.
    pub rows: Rows,
    /// Slowest device's load ÷ speed over the ideal; 1 without load.
    pub makespan: f64,
    /// The least that it could be, whatever the layout.
    pub bound: f64,
    /// The expert that the slowest device spends most on, and what the makespan would be if one more slot
    /// took a copy of it.
    pub limit: Option<(usize, f64)>,
}

/// Why a layer cannot be filled.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{needed} slots are needed and {room} count: {short} short")]
pub struct Short {
    /// Required copies over all experts.
    pub needed: usize,
    /// Slots that can hold one of them.
    pub room: usize,
    /// The difference.
    pub short: usize,
}

/// Work that a repair spends on balance in each layer: what was lost comes first, calm comes later. It buys many
/// steps, each of the slowest device that one helps.
const REPAIR_EFFORT: u64 = 24_000;

/// Fills all layers.
///
/// # Errors
/// [`Short`] when the required copies do not fit; every other input gives valid layers.
pub fn arrange(task: &Task<'_>) -> Result<Vec<Arranged>, Short> {
    fill(task).map(|(arranged, _)| arranged)
}

/// Fills all layers, and says why replicas moved for balance or did not.
///
/// # Errors
/// As [`arrange`].
pub fn fill(task: &Task<'_>) -> Result<(Vec<Arranged>, Balance), Short> {
    let Duty { copies, apart } = task.duty;
    let experts = task.loads.iter().map(Vec::len).max().unwrap_or(0);
    let (needed, room) = (experts * copies, task.fleet.room(experts, copies, apart));
    if room < needed {
        return Err(Short { needed, room, short: needed - room });
    }
    let layers = each(task.threads, task.loads, |_, loads| normal(task.fleet, loads));
    let Some(previous) = task.previous else {
        let arranged = each(task.threads, &layers, |_, layer| finish(&first(task, layer), layer, None));
        return Ok((arranged, Balance::Unasked));
    };
    let started = each(task.threads, &layers, |at, layer| start(task, layer, previous.get(at)));
    let mut tracks = started.into_iter().collect::<Result<Vec<_>, _>>()?;
    let balance = if task.budget.moves == Some(0) { Balance::Unasked } else { balance(task, &mut tracks, &layers) };
    let finished = each(task.threads, &layers, |at, layer| finish(&tracks[at].board, layer, previous.get(at)));
    Ok((finished, balance))
}

/// A layer's loads in units of the ideal time.
struct Normal {
    loads: Vec<f64>,
    /// Whether they say anything.
    known: bool,
    /// The least time of the slowest device, whatever the layout.
    bound: f64,
}

fn normal(fleet: &Fleet, loads: &[f64]) -> Normal {
    let known = loads.iter().all(|load| load.is_finite() && *load >= 0.0) && loads.iter().sum::<f64>() > 0.0;
    let even = vec![1.0; loads.len()];
    let loads = if known { loads } else { &even };
    let ideal = fleet.ideal(loads).max(f64::MIN_POSITIVE);
    let loads: Vec<f64> = loads.iter().map(|load| load / ideal).collect();
    let bound = fleet.bound(&loads).0;
    Normal { loads, known, bound }
}

fn first<'a>(task: &Task<'a>, layer: &'a Normal) -> Board<'a> {
    layer::fresh(task.fleet, &layer.loads, layer.bound, task.duty, task.effort)
}

/// A layer as it was, with what it must get. Where that cannot be had by adding, it is planned from nothing, unless
/// some devices take nothing new: then it says how many copies find no slot.
fn start<'a>(task: &Task<'a>, layer: &'a Normal, previous: Option<&Rows>) -> Result<Track<'a>, Short> {
    let Duty { copies, apart } = task.duty;
    let mut board = Board::new(task.fleet, &layer.loads);
    repair::keep(&mut board, previous.map(Vec::as_slice).unwrap_or_default());
    let before = board.held();
    let repaired = board.count.contains(&0);
    if !repair::repair(&mut board, copies, apart) {
        if task.fleet.closed.contains(&true) {
            return Err(short(&board, task.duty));
        }
        board = first(task, layer);
    } else {
        let scattered = repair::scatter(&mut board, copies);
        // Empty slots that were there before wait for a step that pays.
        let joins = |(row, site): (&Vec<_>, &Site)| row.is_empty() && site.slots > 0;
        let joined = previous.is_some_and(|rows| rows.iter().zip(&task.fleet.sites).any(joins));
        if repaired || scattered || joined {
            repair::fill(&mut board);
        }
    }
    board.weigh();
    Ok(Track::new(board, before, task.duty, repaired))
}

/// Copies that a board lacks.
fn short(board: &Board<'_>, duty: Duty) -> Short {
    let needed = board.loads.len() * duty.copies;
    let has = if duty.apart { &board.spread } else { &board.count };
    let short: usize = has.iter().map(|has| duty.copies.saturating_sub(*has)).sum();
    Short { needed, room: needed - short, short }
}

/// Moves what pays, within the budget.
fn balance(task: &Task<'_>, tracks: &mut Vec<Track<'_>>, layers: &[Normal]) -> Balance {
    let repaired = tracks.iter().any(|track| track.repaired);
    let above: f64 = tracks.iter().zip(layers).map(|(track, layer)| track.slack(layer.bound)).sum();
    let slack = above / num::real_size(tracks.len().max(1));
    if slack <= task.budget.least {
        return Balance::Close { slack };
    }
    // Later steps are looked for when the queue asks for them, by one thread.
    let even = task.budget.moves.map_or(usize::MAX, |moves| moves / tracks.len().max(1));
    let share = even.saturating_mul(3).saturating_add(8);
    let effort = if repaired { task.effort.units.min(REPAIR_EFFORT) } else { task.effort.units };
    let slots: Vec<Mutex<Track<'_>>> = std::mem::take(tracks).into_iter().map(Mutex::new).collect();
    each(task.threads, &slots, |layer, track| {
        let mut track = track.lock().unwrap_or_else(PoisonError::into_inner);
        if layers.get(layer).is_some_and(|layer| layer.known) {
            track.hasty = repaired;
            track.advance(if repaired { even } else { even / 2 }, share, effort);
        }
    });
    *tracks = slots.into_iter().map(|track| track.into_inner().unwrap_or_else(PoisonError::into_inner)).collect();
    let balance = replan::settle(tracks, task.budget);
    let leaps = leaps(task, tracks, layers);
    leap::settle(tracks, leaps, task.budget, balance)
}

/// What layers on devices with few slots could be beyond single steps.
fn leaps<'a>(task: &Task<'_>, tracks: &[Track<'a>], layers: &[Normal]) -> Vec<Option<Leap<'a>>> {
    let each_of = num::whole(tracks.len().max(1));
    let most = task.budget.most().0;
    let spent: i64 = tracks.iter().map(|track| track.spent().0).sum();
    let tempered = temper::apply(task.fleet.slots(), most / each_of);
    each(task.threads, tracks, |at, track| {
        let layer = layers.get(at).filter(|layer| layer.known && leap::worth(track, layer.bound))?;
        if tempered {
            temper::look(track, layer.bound, most.saturating_sub(spent).max(0) / each_of, task.effort)
        } else {
            leap::look(track, layer.bound, task.effort)
        }
    })
}

fn finish(board: &Board<'_>, layer: &Normal, previous: Option<&Rows>) -> Arranged {
    let (makespan, bound) = if layer.known { (board.slowest(), layer.bound) } else { (1.0, 1.0) };
    let limit = if layer.known { layer::limit(board) } else { None };
    Arranged { rows: repair::rows(board, previous), makespan, bound, limit }
}

/// `work` on every item, on as many threads; the answers in the items' order.
fn each<'i, T: Sync, R: Send>(threads: usize, items: &'i [T], work: impl Fn(usize, &'i T) -> R + Sync) -> Vec<R> {
    let threads = threads.clamp(1, items.len().max(1));
    if threads == 1 {
        return items.iter().enumerate().map(|(at, item)| work(at, item)).collect();
    }
    let next = AtomicUsize::new(0);
    let run = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(at) else { return done };
            done.push((at, work(at, item)));
        }
    };
    let mut all = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
        let mut all = run();
        for other in others {
            all.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        }
        all
    });
    all.sort_by_key(|(at, _)| *at);
    all.into_iter().map(|(_, result)| result).collect()
}
