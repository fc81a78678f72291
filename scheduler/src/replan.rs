//! When to plan, never what: one look at a placement's facts says whether a plan is due and why. Pure.

use std::{fmt, time::Duration};

/// Least time between two plans for balance.
pub const BALANCE_PAUSE: Duration = Duration::from_secs(60);
/// Balance is left alone while the mean device is at this share of the slowest.
pub const BALANCED: f64 = 0.85;

/// Why a plan is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Nothing is assigned.
    First,
    /// A device of the assigned revision is gone.
    Repair,
    /// Workers did not load the assigned revision in time.
    Around,
    /// The spec changed.
    Spec,
    /// A device of the assigned revision must be emptied.
    Drain,
    /// The placement has less than it asks for, and the fleet changed.
    Return,
    /// The next wave of the last plan.
    Wave,
    /// The load has drifted.
    Rebalance,
}

impl Cause {
    /// Every cause.
    pub const ALL: [Self; 8] =
        [Self::First, Self::Repair, Self::Around, Self::Spec, Self::Drain, Self::Return, Self::Wave, Self::Rebalance];

    /// The word in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Repair => "repair",
            Self::Around => "around",
            Self::Spec => "spec",
            Self::Drain => "drain",
            Self::Return => "return",
            Self::Wave => "wave",
            Self::Rebalance => "rebalance",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::First => "first placement",
            Self::Repair => "repair: devices are gone",
            Self::Around => "workers did not load in time",
            Self::Spec => "the spec changed",
            Self::Drain => "devices are being drained",
            Self::Return => "devices came back",
            Self::Wave => "next wave of moves",
            Self::Rebalance => "the load has drifted",
        })
    }
}

/// What a decision depends on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Facts {
    /// The spec says: no re-plans.
    pub paused: bool,
    /// What serves has been heard of, or was waited for long enough.
    pub adopted: bool,
    /// A commit is under way.
    pub pending: bool,
    /// Not before this time (the last commit was refused).
    pub retry_at: Duration,
    /// Something that plans depend on changed since the last one.
    pub changed: bool,
    /// A revision is assigned.
    pub assigned: bool,
    /// The assigned revision loads, or an older one drains.
    pub cutting: bool,
    /// Devices of the assigned revision that are gone.
    pub gone: usize,
    /// Devices of the assigned revision that must be emptied.
    pub leaving: usize,
    /// Devices of the assigned revision that did not load it in time.
    pub late: usize,
    /// The spec is of another generation than the last plan's.
    pub spec_changed: bool,
    /// Fewer devices or less redundancy than asked for.
    pub short: bool,
    /// The last plan has further waves.
    pub waves: bool,
    /// Mean ÷ max device load, where loads are known.
    pub balancedness: Option<f64>,
    /// When the last plan was made.
    pub planned_at: Duration,
}

/// Whether a plan is due at `now`, and why.
#[must_use]
pub fn decide(now: Duration, facts: &Facts) -> Option<Cause> {
    if facts.paused || facts.pending || !facts.adopted || now < facts.retry_at {
        return None;
    }
    let due = [
        (!facts.assigned, Cause::First),
        (facts.gone > 0, Cause::Repair),
        (facts.late > 0, Cause::Around),
        (facts.spec_changed, Cause::Spec),
        (facts.leaving > 0, Cause::Drain),
        (facts.short && !facts.cutting, Cause::Return),
    ];
    if let Some((_, cause)) = due.into_iter().find(|(due, _)| facts.changed && *due) {
        return Some(cause);
    }
    if facts.cutting {
        return None;
    }
    if facts.waves {
        return Some(Cause::Wave);
    }
    let rested = now.saturating_sub(facts.planned_at) >= BALANCE_PAUSE;
    let drifted = facts.balancedness.is_some_and(|balancedness| balancedness < BALANCED);
    (facts.assigned && rested && drifted).then_some(Cause::Rebalance)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quiet() -> Facts {
        Facts { adopted: true, assigned: true, ..Facts::default() }
    }

    const NOW: Duration = Duration::from_secs(1000);

    #[test]
    fn a_repair_waits_for_nothing() {
        let facts = Facts { gone: 1, changed: true, cutting: true, planned_at: NOW, ..quiet() };
        assert_eq!(decide(NOW, &facts), Some(Cause::Repair));
    }

    #[test]
    fn balance_waits_until_it_pays_back() {
        let drifted = Facts { balancedness: Some(0.5), ..quiet() };
        assert_eq!(decide(NOW, &drifted), Some(Cause::Rebalance));
        assert_eq!(decide(NOW, &Facts { planned_at: NOW - Duration::from_secs(59), ..drifted.clone() }), None);
        assert_eq!(decide(NOW, &Facts { cutting: true, ..drifted.clone() }), None);
        assert_eq!(decide(NOW, &Facts { balancedness: Some(0.9), ..drifted }), None);
    }

    #[test]
    fn nothing_is_planned_while_paused_unadopted_or_committing() {
        let due = Facts { gone: 1, changed: true, ..quiet() };
        assert_eq!(decide(NOW, &Facts { paused: true, ..due.clone() }), None);
        assert_eq!(decide(NOW, &Facts { adopted: false, ..due.clone() }), None);
        assert_eq!(decide(NOW, &Facts { pending: true, ..due.clone() }), None);
        assert_eq!(decide(NOW, &Facts { retry_at: NOW + Duration::from_secs(1), ..due }), None);
    }

    #[test]
    fn what_could_not_be_placed_is_tried_again_only_when_something_changed() {
        let facts = Facts { assigned: false, ..quiet() };
        assert_eq!(decide(NOW, &facts), None);
        assert_eq!(decide(NOW, &Facts { changed: true, ..facts }), Some(Cause::First));
    }

    #[test]
    fn waves_follow_each_other_once_the_one_before_is_drained() {
        let facts = Facts { waves: true, cutting: true, ..quiet() };
        assert_eq!(decide(NOW, &facts), None);
        assert_eq!(decide(NOW, &Facts { cutting: false, ..facts }), Some(Cause::Wave));
    }
}
