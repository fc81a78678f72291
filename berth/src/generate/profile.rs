//! Where the time of `berth generate` went: the runner's phases, summed over all steps.

use berth_runner::engine::{Phase, PhaseTimes};
use serde::Serialize;

/// Time by phase.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Profile {
    steps: u64,
    /// Of one step, on average.
    milliseconds_per_step: f64,
    phases: Vec<Share>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct Share {
    phase: &'static str,
    milliseconds_per_step: f64,
    /// Of the whole, 0 to 1.
    share: f64,
}

impl Profile {
    /// From what an engine measured. Phases that took no time are left out.
    pub(crate) fn new(steps: u64, times: &PhaseTimes) -> Self {
        let count = f64::from(u32::try_from(steps.max(1)).unwrap_or(u32::MAX));
        let per_step = |seconds: f64| seconds * 1e3 / count;
        let total = times.total().as_secs_f64();
        let share = |phase: &Phase| {
            let seconds = times.of(*phase).as_secs_f64();
            let share = if total > 0.0 { seconds / total } else { 0.0 };
            Share { phase: phase.as_str(), milliseconds_per_step: per_step(seconds), share }
        };
        let phases = Phase::ALL.iter().map(share).filter(|share| share.share > 0.0).collect();
        Self { steps, milliseconds_per_step: per_step(total), phases }
    }

    /// As a table.
    pub(crate) fn lines(&self) -> Vec<String> {
        let title = format!("{} steps, {:.3} ms each:", self.steps, self.milliseconds_per_step);
        let line = |share: &Share| {
            format!("  {:<12} {:>9.3} ms {:>6.1} %", share.phase, share.milliseconds_per_step, share.share * 100.0)
        };
        std::iter::once(title).chain(self.phases.iter().map(line)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_did_nothing_has_an_empty_table() {
        let profile = Profile::new(0, &PhaseTimes::default());
        assert_eq!(profile.lines(), ["0 steps, 0.000 ms each:"]);
    }
}
