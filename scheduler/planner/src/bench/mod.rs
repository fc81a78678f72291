//! Placement benchmarks: a case's devices and load windows, solved window by window and judged. Reads no
//! file and no clock; the caller brings bytes and measures time.

mod case;
mod judge;
#[cfg(test)]
mod tests;

use crate::{
    experts::{Budget, Duty, Fleet, Rows, Site, Task, arrange},
    forecast::{Forecast, Window},
    num,
    problem::Effort,
};
use case::Spot;
use judge::Judged;

pub use case::{BenchError, Case, Event, Manifest, Pool};
pub use judge::WindowResult;

/// Which loads a window's plan may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Those of the window itself.
    Oracle,
    /// Those of the windows before it.
    Forecast,
}

/// How a case is solved.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Which loads plans may use.
    pub mode: Mode,
    /// Work for each layer.
    pub effort: Effort,
    /// Threads; plans do not depend on it.
    pub threads: usize,
    /// Most replicas that may move for balance in a window, in percent of all slots; `None` = as many as pay.
    pub moved_percent: Option<u32>,
    /// Most bytes that may move for balance in a window; `None` = no bound.
    pub moved_bytes: Option<u64>,
}

impl Default for Options {
    fn default() -> Self {
        Self { mode: Mode::Oracle, effort: Effort::DEFAULT, threads: 1, moved_percent: Some(6), moved_bytes: None }
    }
}

/// What moving every replica once costs, as a share of a window's step time.
const PRICE: f64 = 0.1;
/// Least gain after costs, as a share of the step time, for which anything moves.
const LEAST: f64 = 0.002;
/// Most replicas that a window with a loss may move, in percent of the replicas lost.
const REPAIR_PERCENT: usize = 125;

/// Solves a case. `loads` are little-endian u32 `[windows][layers][experts]`; `seconds` is a stopwatch.
/// Answers with a judgement per window and the plans, little-endian u16 `[windows][layers][slots]`, 0xFFFF
/// = empty.
///
/// Each window's plan is made for the loads expected next, from the windows that the mode lets it see.
///
/// # Errors
/// [`BenchError`], naming the case.
pub fn run(
    case: &Case,
    loads: &[u8],
    options: Options,
    mut seconds: impl FnMut() -> f64,
) -> Result<(Vec<WindowResult>, Vec<u8>), BenchError> {
    let windows = case::windows(case, loads)?;
    let spots = case::spots(case)?;
    let mut course = Course::new(case, &spots, options);
    let (mut results, mut plans) = (Vec::new(), Vec::new());
    for (window, judged) in windows.iter().enumerate() {
        let gone = case::gone(case, window);
        let alive: Vec<bool> = spots.iter().map(|spot| !gone.contains(&spot.node)).collect();
        case::feasible(case, window, &spots, &alive)?;
        let began = seconds();
        let plan = course.plan(judged, &alive);
        let seconds = seconds() - began;
        let previous = course.previous.as_deref();
        let next = windows.get(window + 1).map(Vec::as_slice);
        let judged =
            Judged { case, window, seconds, spots: &spots, alive: &alive, plan: &plan, loads: judged, next, previous };
        results.push(judge::judge(&judged));
        write(&plan, &mut plans);
        course.previous = Some(plan);
    }
    Ok((results, plans))
}

/// Whether loads are what they were but for rounding: no plan gains by a billionth.
fn same(one: Option<&Window>, other: Option<&Window>) -> bool {
    let near = |(one, other): (&f64, &f64)| (one - other).abs() <= 1e-9 * (one.abs() + other.abs());
    match (one, other) {
        (Some(one), Some(other)) => {
            let mut rows = one.iter().zip(other);
            one.len() == other.len()
                && rows.all(|(one, other)| one.len() == other.len() && one.iter().zip(other).all(near))
        }
        (one, other) => one.is_none() && other.is_none(),
    }
}

fn write(plan: &[Rows], plans: &mut Vec<u8>) {
    for slot in plan.iter().flatten().flatten() {
        let entry = slot.and_then(|expert| u16::try_from(expert).ok()).unwrap_or(u16::MAX);
        plans.extend_from_slice(&entry.to_le_bytes());
    }
}

/// A case on its way through its windows.
struct Course<'a> {
    case: &'a Case,
    spots: &'a [Spot],
    options: Options,
    forecast: Forecast,
    previous: Option<Vec<Rows>>,
    /// The loads and the living devices that the last plan was made for; no loads = it was a guess.
    basis: Option<(Option<Window>, Vec<bool>)>,
}

impl<'a> Course<'a> {
    fn new(case: &'a Case, spots: &'a [Spot], options: Options) -> Self {
        let forecast = Forecast::new(vec![case.experts; case.layers]);
        Self { case, spots, options, forecast, previous: None, basis: None }
    }

    /// The plan of the window whose loads are `seen`, by layer and device of the case.
    fn plan(&mut self, seen: &Window, alive: &[bool]) -> Vec<Rows> {
        let expected = match self.options.mode {
            Mode::Oracle => {
                self.forecast.observe(seen);
                self.forecast.expect()
            }
            Mode::Forecast => {
                let expected = self.forecast.expect();
                self.forecast.observe(seen);
                expected
            }
        };
        if let (Some(previous), Some((basis, before))) = (&self.previous, &self.basis)
            && same(basis.as_ref(), expected.as_ref())
            && before == alive
        {
            // What a plan says for the problem that it was made for: itself.
            return previous.clone();
        }
        let living: Vec<usize> = (0..alive.len()).filter(|at| alive[*at]).collect();
        let sites: Vec<Site> = living.iter().map(|at| self.spots[*at].site.clone()).collect();
        let stayed = |at: usize| self.basis.as_ref().is_none_or(|(_, before)| before[at]);
        let row = |rows: &Rows, at: usize| if stayed(at) { rows[at].clone() } else { Vec::new() };
        let rows = |rows: &Rows| living.iter().map(|at| row(rows, *at)).collect();
        let previous: Option<Vec<Rows>> = self.previous.as_ref().map(|layers| layers.iter().map(rows).collect());
        let even = vec![vec![0.0; self.case.experts]; self.case.layers];
        let fleet = Fleet::new(&sites);
        let task = Task {
            fleet: &fleet,
            duty: Duty { copies: 1, apart: false },
            loads: expected.as_ref().unwrap_or(&even),
            previous: previous.as_deref(),
            budget: self.budget(&fleet, alive),
            effort: self.options.effort,
            threads: self.options.threads,
        };
        let empty: Rows = self.spots.iter().map(|spot| vec![None; spot.site.slots]).collect();
        // Feasibility was checked before; layers that do not fit would stay empty and be judged so.
        let solved = arrange(&task).unwrap_or_default();
        let mut plan = vec![empty; self.case.layers];
        for (rows, solved) in plan.iter_mut().zip(solved) {
            for (at, row) in living.iter().zip(solved.rows) {
                rows[*at] = row;
            }
        }
        self.basis = Some((expected, alive.to_vec()));
        plan
    }

    /// After a loss, what its repair leaves of the replicas lost; after a guess, all that pays.
    fn budget(&self, fleet: &Fleet, alive: &[bool]) -> Budget {
        let Some((basis, before)) = &self.basis else { return Budget::NONE };
        let slots = fleet.slots() * self.case.layers;
        let price = PRICE / (num::real_size(slots.max(1)) * num::real(self.case.expert_bytes.max(1)));
        let moves = self.options.moved_percent.map(|percent| slots * num::index(percent) / 100);
        let (lost, missing) = self.lost(before, alive);
        let moves = match (basis, lost) {
            (None, _) => None,
            (Some(_), 0) => moves,
            (Some(_), lost) => Some((lost * REPAIR_PERCENT / 100).saturating_sub(missing)),
        };
        Budget { moves, bytes: self.options.moved_bytes, price, least: LEAST }
    }

    /// Replicas that were lost since the last plan, and experts that have none left.
    fn lost(&self, before: &[bool], alive: &[bool]) -> (usize, usize) {
        let (mut lost, mut missing) = (0, 0);
        for rows in self.previous.iter().flatten() {
            let mut left = vec![false; self.case.experts];
            for (at, row) in rows.iter().enumerate() {
                for expert in row.iter().flatten() {
                    left[*expert] |= alive[at];
                    lost += usize::from(before[at] && !alive[at]);
                }
            }
            missing += left.iter().filter(|left| !**left).count();
        }
        (lost, missing)
    }
}
