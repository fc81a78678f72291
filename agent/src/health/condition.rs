//! One condition of a device: what it says, what ends it, and how several make one state.

use std::time::Duration;

use berth_types::{Action, Admission, DeviceState, Health, Reason, Scope, Vendor};
use serde::{Deserialize, Serialize};

/// Joins an incident for so long after its last fact.
pub const WINDOW: Duration = Duration::from_secs(60);
/// How long a device is watched after it came back, the first time.
pub const PROBATION: Duration = Duration::from_secs(600);
/// Longest probation, and how far back repetition is counted.
pub const DAY: Duration = Duration::from_secs(86_400);

/// Four of the five words; the fifth is the reason they are kept under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Words {
    /// How well.
    pub health: Health,
    /// What may be placed.
    pub admission: Admission,
    /// What should be done.
    pub action: Action,
    /// What holds the fault.
    pub scope: Scope,
}

impl Words {
    /// Shorthand.
    #[must_use]
    pub const fn new(health: Health, admission: Admission, action: Action, scope: Scope) -> Self {
        Self { health, admission, action, scope }
    }

    /// The worse of each of the first three words; the scope stays.
    #[must_use]
    pub fn worsened(self, other: Self) -> Self {
        Self {
            health: self.health.max(other.health),
            admission: self.admission.max(other.admission),
            action: self.action.max(other.action),
            scope: self.scope,
        }
    }
}

/// What ends a condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Clears {
    /// A good reading, at once.
    Reading,
    /// A good reading, held for one probation.
    ReadingHeld,
    /// A good reading after a reset.
    ReadingAfterReset,
    /// A good reading and a validation that passed, then probation.
    Probe,
    /// A person, or another device in its place.
    Release,
}

/// Who can say that a condition is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Origin {
    /// The vendor's library or driver.
    Vendor,
    /// The driver's recovery action.
    Recovery,
    /// The device's worker.
    Worker,
    /// One alarm of Ascend's driver.
    Code(u32),
    /// Another device of the reset group.
    Sibling,
    /// The library of a vendor as a whole.
    Library(Vendor),
    /// The kernel log.
    Log,
}

/// Where a condition stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// It holds.
    Active,
    /// The reading is good; it shows until then all the same.
    Held(Duration),
    /// The device came back and is watched until then.
    Probation(Duration),
}

/// One condition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// What it says while it is active or held.
    pub words: Words,
    /// The facts, as printed.
    pub evidence: String,
    /// When it began.
    pub since: Duration,
    /// Its last fact.
    pub last: Duration,
    /// What ends it.
    pub clears: Clears,
    /// Where it stands.
    pub phase: Phase,
    /// It came from the log of the time before the agent started.
    pub old: bool,
    /// What it said, and what ended it, before the driver's wish joined it.
    #[serde(default)]
    pub own: Option<(Words, Clears)>,
}

impl Condition {
    /// One that begins at `now` with its first fact.
    #[must_use]
    pub fn begun(now: Duration, words: Words, clears: Clears, evidence: &str) -> Self {
        let evidence = evidence.to_owned();
        Self { words, evidence, since: now, last: now, clears, phase: Phase::Active, old: false, own: None }
    }

    /// What it says now.
    #[must_use]
    pub fn shown(&self) -> Words {
        match self.phase {
            Phase::Active | Phase::Held(_) => self.words,
            Phase::Probation(_) => Words {
                health: Health::Degraded,
                admission: self.words.admission.min(Admission::Draining),
                action: Action::None,
                scope: self.words.scope,
            },
        }
    }

    /// Whether facts at `now` still belong to its incident.
    #[must_use]
    pub fn explains(&self, now: Duration) -> bool {
        matches!(self.phase, Phase::Active | Phase::Held(_)) && now.saturating_sub(self.last) <= WINDOW
    }
}

/// The state that conditions make together, and the evidence of the worst.
#[must_use]
pub fn compose<'a>(conditions: impl Iterator<Item = (Reason, &'a Condition)>) -> (DeviceState, String) {
    let mut state = DeviceState::HEALTHY;
    let mut worst: Option<(Words, Duration, &str)> = None;
    for (reason, condition) in conditions {
        let words = condition.shown();
        state.health = state.health.max(words.health);
        state.admission = state.admission.max(words.admission);
        state.action = state.action.max(words.action);
        let rank = |words: Words| (words.health, words.admission, words.action);
        let worse = worst.is_none_or(|(other, since, _)| {
            rank(words) > rank(other) || (rank(words) == rank(other) && condition.since < since)
        });
        if worse {
            worst = Some((words, condition.since, &condition.evidence));
            (state.scope, state.reason) = (Some(words.scope), Some(reason));
        }
    }
    (state, worst.map(|(_, _, evidence)| evidence.to_owned()).unwrap_or_default())
}

/// The next rung of the ladder; `grouped` = the device resets together with others.
#[must_use]
pub const fn next_step(action: Action, grouped: bool) -> Action {
    match action {
        Action::None => Action::None,
        Action::RestartWorkload if !grouped => Action::ResetDevice,
        Action::RestartWorkload => Action::ResetGroup,
        Action::ResetDevice if grouped => Action::ResetGroup,
        Action::ResetDevice | Action::ResetGroup => Action::RebootNode,
        Action::RebootNode | Action::ServiceHardware => Action::ServiceHardware,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition(words: Words, since: u64) -> Condition {
        let since = Duration::from_secs(since);
        Condition {
            words,
            evidence: format!("since {since:?}"),
            since,
            last: since,
            clears: Clears::Probe,
            phase: Phase::Active,
            old: false,
            own: None,
        }
    }

    #[test]
    fn each_word_is_the_worst_and_the_reason_is_that_of_the_worst_condition() {
        let service =
            condition(Words::new(Health::Degraded, Admission::Schedulable, Action::ServiceHardware, Scope::Device), 1);
        let reset =
            condition(Words::new(Health::Unhealthy, Admission::Draining, Action::ResetDevice, Scope::Device), 2);
        let (state, evidence) = compose([(Reason::PowerFault, &service), (Reason::EngineFault, &reset)].into_iter());
        assert_eq!(
            (state.health, state.admission, state.action),
            (Health::Unhealthy, Admission::Draining, Action::ServiceHardware)
        );
        assert_eq!((state.reason, evidence.as_str()), (Some(Reason::EngineFault), "since 2s"));
        assert_eq!(compose(std::iter::empty()).0, DeviceState::HEALTHY);
    }

    #[test]
    fn among_equals_the_earliest_is_shown() {
        let words = Words::new(Health::Degraded, Admission::Schedulable, Action::None, Scope::Device);
        let (late, early) = (condition(words, 9), condition(words, 3));
        let (state, _) = compose([(Reason::ThermalThrottle, &late), (Reason::PcieFault, &early)].into_iter());
        assert_eq!(state.reason, Some(Reason::PcieFault));
    }

    #[test]
    fn probation_keeps_out_what_had_been_kept_out() {
        let mut barred =
            condition(Words::new(Health::Unhealthy, Admission::Barred, Action::RebootNode, Scope::Device), 1);
        barred.phase = Phase::Probation(PROBATION);
        let shown = barred.shown();
        assert_eq!(
            (shown.health, shown.admission, shown.action),
            (Health::Degraded, Admission::Draining, Action::None)
        );
    }
}
