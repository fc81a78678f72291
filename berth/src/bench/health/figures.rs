//! Figures of one road: percentiles and their bound. Pure.

use std::fmt;

use clap::ValueEnum as _;
use serde::Serialize;

use super::{Outcome, faults::Road};

/// What is printed and written of one road.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    road: String,
    faults: usize,
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    max_ms: Option<f64>,
    /// Until the ledger had decided.
    decided_p50_ms: Option<f64>,
    decided_p99_ms: Option<f64>,
    /// The 99th percentile may be so long.
    bound_ms: f64,
    missed: Vec<String>,
    false_alarms: Vec<String>,
    lines_per_second: f64,
    /// Processor time of the agent ÷ time.
    agent_cores: f64,
    reports: u64,
}

impl Figures {
    /// Of what all rounds of `road` gave.
    pub(super) fn of(road: Road, outcome: &Outcome) -> Self {
        let sorted = sort(&outcome.latencies_ms);
        let decided = sort(&outcome.decided_ms);
        let seconds = outcome.seconds.max(f64::EPSILON);
        let lines = u32::try_from(outcome.lines).map_or(f64::INFINITY, f64::from);
        Self {
            road: road.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default(),
            faults: sorted.len().saturating_add(outcome.missed.len()),
            p50_ms: percentile(&sorted, 50),
            p99_ms: percentile(&sorted, 99),
            max_ms: sorted.last().copied(),
            decided_p50_ms: percentile(&decided, 50),
            decided_p99_ms: percentile(&decided, 99),
            bound_ms: road.bound().as_secs_f64() * 1e3,
            missed: outcome.missed.clone(),
            false_alarms: outcome.false_alarms.clone(),
            lines_per_second: lines / seconds,
            agent_cores: outcome.agent_seconds / seconds,
            reports: outcome.reports,
        }
    }

    /// Every fault was told, in time, and nothing else was.
    pub(super) fn passed(&self) -> bool {
        let in_time = self.p99_ms.is_some_and(|p99| p99 <= self.bound_ms);
        in_time && self.missed.is_empty() && self.false_alarms.is_empty()
    }
}

fn sort(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Nearest rank: the least value that so many percent of all do not exceed.
fn percentile(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = sorted.len().saturating_mul(percent).div_ceil(100);
    sorted.get(rank.checked_sub(1)?).copied()
}

/// The table's first line.
pub(super) fn heading() -> String {
    format!(
        "{:<12} {:>6} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8} {:>6} {:>6} {:>8} {:>6}",
        "road",
        "faults",
        "p50 ms",
        "p99 ms",
        "max ms",
        "bound ms",
        "decided",
        "its p99",
        "missed",
        "false",
        "lines/s",
        "cores"
    )
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"));
        write!(
            f,
            "{:<12} {:>6} {:>9} {:>9} {:>9} {:>9.0} {:>8} {:>8} {:>6} {:>6} {:>8.0} {:>6.2}",
            self.road,
            self.faults,
            ms(self.p50_ms),
            ms(self.p99_ms),
            ms(self.max_ms),
            self.bound_ms,
            ms(self.decided_p50_ms),
            ms(self.decided_p99_ms),
            self.missed.len(),
            self.false_alarms.len(),
            self.lines_per_second,
            self.agent_cores,
        )?;
        self.missed.iter().try_for_each(|missed| write!(f, "\n  not told: {missed}"))?;
        self.false_alarms.iter().try_for_each(|device| write!(f, "\n  without a fault, yet Unhealthy: {device}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(latencies: impl IntoIterator<Item = f64>) -> Outcome {
        Outcome { latencies_ms: latencies.into_iter().collect(), seconds: 2.0, lines: 10_000, ..Outcome::default() }
    }

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let figures = Figures::of(Road::Kernel, &outcome((1..=200).rev().map(f64::from)));
        assert_eq!((figures.p50_ms, figures.p99_ms, figures.max_ms), (Some(100.0), Some(198.0), Some(200.0)));
        assert!(figures.passed());
        assert_eq!(figures.lines_per_second, 5000.0);
        assert_eq!(Figures::of(Road::Kernel, &outcome([])).p99_ms, None);
    }

    #[test]
    fn a_late_a_missed_and_an_invented_fault_each_fail() {
        assert!(!Figures::of(Road::NvmlEvent, &outcome([251.0])).passed());
        assert!(Figures::of(Road::Polling, &outcome([4900.0])).passed(), "polling is bound by its period");
        let missed = Outcome { missed: vec!["x".into()], ..outcome([1.0]) };
        let invented = Outcome { false_alarms: vec!["y".into()], ..outcome([1.0]) };
        assert!(!Figures::of(Road::Kernel, &missed).passed());
        assert!(!Figures::of(Road::Kernel, &invented).passed());
        assert!(Figures::of(Road::Kernel, &missed).to_string().contains("not told: x"));
    }
}
