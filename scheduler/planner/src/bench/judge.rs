//! What a window's plan is worth, from the plan and the loads alone: it shares no code with what made it.

use serde::Serialize;

use super::case::{Case, Spot};
use crate::{experts::Rows, num};

/// One window's judgement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WindowResult {
    /// The case.
    pub case: String,
    /// The window.
    pub window: usize,
    /// Seconds of solving.
    pub seconds: f64,
    /// Mean ÷ max device load (÷ speed), mean over layers with load; 1 without any.
    pub balancedness: f64,
    /// Slowest device's load ÷ speed over the ideal, likewise.
    pub makespan: f64,
    /// Balancedness of the window's plan on the loads of the window after it; none for the last.
    pub next_balancedness: Option<f64>,
    /// Replicas that devices had to load since the window before.
    pub moved_replicas: u64,
    /// Their bytes.
    pub moved_bytes: u64,
    /// Copies that share a device with another of the same expert.
    pub violations: u64,
}

/// What is judged.
pub(super) struct Judged<'a> {
    pub(super) case: &'a Case,
    pub(super) window: usize,
    pub(super) seconds: f64,
    pub(super) spots: &'a [Spot],
    pub(super) alive: &'a [bool],
    /// By layer and device; a lost device's slots are empty.
    pub(super) plan: &'a [Rows],
    pub(super) loads: &'a [Vec<f64>],
    /// Those of the window after it.
    pub(super) next: Option<&'a [Vec<f64>]>,
    pub(super) previous: Option<&'a [Rows]>,
}

/// The judgement.
pub(super) fn judge(judged: &Judged<'_>) -> WindowResult {
    let Judged { case, window, seconds, plan, loads, previous, .. } = judged;
    let (balancedness, makespan) = times(judged, loads);
    let moved =
        previous.map_or(0, |previous| plan.iter().zip(previous).map(|(rows, before)| moved(rows, before)).sum());
    WindowResult {
        case: case.id.clone(),
        window: *window,
        seconds: *seconds,
        balancedness,
        makespan,
        next_balancedness: judged.next.map(|next| times(judged, next).0),
        moved_replicas: moved,
        moved_bytes: moved.saturating_mul(case.expert_bytes),
        violations: plan.iter().flatten().map(|row| doubled(row)).sum(),
    }
}

/// Balancedness and makespan on `loads`, means over layers with load; 1 without any.
fn times(judged: &Judged<'_>, loads: &[Vec<f64>]) -> (f64, f64) {
    let times: Vec<(f64, f64)> =
        judged.plan.iter().zip(loads).filter_map(|(rows, tokens)| layer(judged, rows, tokens)).collect();
    let mean = |of: fn(&(f64, f64)) -> f64| {
        if times.is_empty() { 1.0 } else { times.iter().map(of).sum::<f64>() / num::real_size(times.len()) }
    };
    (mean(|(balance, _)| *balance), mean(|(_, makespan)| *makespan))
}

/// Balancedness and makespan of one layer; nothing without load.
fn layer(judged: &Judged<'_>, rows: &Rows, tokens: &[f64]) -> Option<(f64, f64)> {
    let total: f64 = tokens.iter().sum();
    if total <= 0.0 {
        return None;
    }
    let mut copies = vec![0_usize; judged.case.experts];
    for expert in rows.iter().flatten().flatten() {
        if let Some(count) = copies.get_mut(*expert) {
            *count += 1;
        }
    }
    let share = |expert: &usize| {
        let count = copies.get(*expert).copied().unwrap_or(1).max(1);
        tokens.get(*expert).copied().unwrap_or(0.0) / num::real_size(count)
    };
    let living = rows.iter().zip(judged.spots).zip(judged.alive).filter(|(_, alive)| **alive);
    let living: Vec<(f64, f64)> = living
        .map(|((row, spot), _)| (row.iter().flatten().map(share).sum::<f64>() / spot.site.speed, spot.site.speed))
        .collect();
    let slowest = living.iter().map(|(time, _)| *time).fold(0.0, f64::max);
    let mean = living.iter().map(|(time, _)| time).sum::<f64>() / num::real_size(living.len());
    let speed: f64 = living.iter().map(|(_, speed)| speed).sum();
    Some((mean / slowest, slowest / (total / speed)))
}

/// Replicas that are where they were not before.
fn moved(rows: &Rows, before: &Rows) -> u64 {
    let new = |(row, before): (&Vec<Option<usize>>, &Vec<Option<usize>>)| {
        row.iter().filter(|slot| slot.is_some() && !before.contains(*slot)).count()
    };
    num::count(rows.iter().zip(before).map(new).sum())
}

/// Copies beside another of the same expert.
fn doubled(row: &[Option<usize>]) -> u64 {
    let again = |at: &usize| row[*at].is_some() && row[..*at].contains(&row[*at]);
    num::count((0..row.len()).filter(again).count())
}
