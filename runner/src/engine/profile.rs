//! Where a step's time goes: a stopwatch that is told which phase has just ended.

use std::{cell::Cell, time::Duration};

use berth_runtime::Clock;

use crate::model::Phase;

/// Time by phase.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PhaseTimes([Duration; Phase::ALL.len()]);

impl PhaseTimes {
    /// Time of one phase.
    #[must_use]
    pub fn of(&self, phase: Phase) -> Duration {
        self.0[phase.index()]
    }

    /// All phases together.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.0.iter().sum()
    }

    /// Adds `other`.
    pub fn add(&mut self, other: &Self) {
        for (sum, more) in self.0.iter_mut().zip(other.0) {
            *sum = sum.saturating_add(more);
        }
    }

    /// What was added since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let mut times = *self;
        for (time, before) in times.0.iter_mut().zip(earlier.0) {
            *time = time.saturating_sub(before);
        }
        times
    }
}

/// Measures one step.
pub(crate) struct Stopwatch {
    clock: Clock,
    last: Cell<Duration>,
    times: Cell<PhaseTimes>,
}

impl Stopwatch {
    /// Starts now.
    pub(crate) fn new(clock: Clock) -> Self {
        let last = Cell::new(clock.now());
        Self { clock, last, times: Cell::default() }
    }

    /// The time since the last call, or since the start, was spent in `phase`.
    pub(crate) fn ended(&self, phase: Phase) {
        let now = self.clock.now();
        let mut times = self.times.get();
        let spent = &mut times.0[phase.index()];
        *spent = spent.saturating_add(now.saturating_sub(self.last.replace(now)));
        self.times.set(times);
    }

    /// What was measured.
    pub(crate) fn times(&self) -> PhaseTimes {
        self.times.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_add_up_by_phase() {
        let mut times = PhaseTimes::default();
        let mut more = PhaseTimes::default();
        more.0[Phase::Index.index()] = Duration::from_millis(3);
        times.add(&more);
        times.add(&more);
        assert_eq!((times.of(Phase::Index), times.total()), (Duration::from_millis(6), Duration::from_millis(6)));
        assert_eq!(times.since(&more), more);
    }
}
