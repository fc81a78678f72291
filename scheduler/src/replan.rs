//! When to plan, never what: one look at a placement's facts says whether a plan is due and why. Pure.

use std::{fmt, time::Duration};

/// Least time between two revisions for balance, however soon the first has paid back.
pub const BALANCE_PAUSE: Duration = Duration::from_secs(60);
/// Balance is left alone for so long after any other revision.
pub const SETTLE: Duration = Duration::from_secs(10);
/// Tokens a device, in a layer, below which a load window says too little: a device's load is known to 1 ÷ √ of them.
pub const TOKENS_A_DEVICE: u64 = 100;

/// Why a plan is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
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

/// Plans of one lane are made one after the other, the most important placement first, for one may take what the next
/// then lacks; lanes go side by side. The first is the most urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lane {
    /// Something that served is gone.
    Repair,
    /// What is asked for has changed.
    Place,
    /// Nothing is wrong.
    Balance,
}

impl Cause {
    /// Where its plans are made.
    #[must_use]
    pub const fn lane(self) -> Lane {
        match self {
            Self::Repair | Self::Around => Lane::Repair,
            Self::First | Self::Spec | Self::Drain | Self::Return | Self::Wave => Lane::Place,
            Self::Rebalance => Lane::Balance,
        }
    }

    /// What is made, and why.
    #[must_use]
    pub const fn words(self) -> (&'static str, &'static str) {
        match self {
            Self::First => ("first placement", "nothing was assigned"),
            Self::Repair => ("repair", "devices are gone"),
            Self::Around => ("repair", "workers did not load in time"),
            Self::Spec => ("re-plan", "the spec changed"),
            Self::Drain => ("re-plan", "devices are being drained"),
            Self::Return => ("re-plan", "devices came back"),
            Self::Wave => ("next wave", "moves go on"),
            Self::Rebalance => ("re-plan", "the load has drifted"),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, why) = self.words();
        write!(f, "{what}: {why}")
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
    /// What a plan that is being made is for.
    pub planning: Option<Cause>,
    /// A load window came that says enough and was not looked at.
    pub window: bool,
    /// Nothing moves for balance before.
    pub balance_at: Duration,
}

/// Whether a plan is due at `now`, and why. One that is being made is passed only by what is more urgent.
#[must_use]
pub fn decide(now: Duration, facts: &Facts) -> Option<Cause> {
    if facts.paused || facts.pending || !facts.adopted || now < facts.retry_at {
        return None;
    }
    due(now, facts).filter(|cause| facts.planning.is_none_or(|made| cause.lane() < made.lane()))
}

fn due(now: Duration, facts: &Facts) -> Option<Cause> {
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
    // Whether it pays is the planner's to say: every window that says enough is looked at.
    (facts.assigned && facts.window && now >= facts.balance_at).then_some(Cause::Rebalance)
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
        let facts = Facts { gone: 1, changed: true, cutting: true, ..quiet() };
        assert_eq!(decide(NOW, &facts), Some(Cause::Repair));
    }

    #[test]
    fn every_window_is_looked_at_once_the_last_moves_have_paid_back() {
        let drifted = Facts { window: true, balance_at: NOW, ..quiet() };
        assert_eq!(decide(NOW, &drifted), Some(Cause::Rebalance));
        assert_eq!(decide(NOW - Duration::from_secs(1), &drifted), None);
        assert_eq!(decide(NOW, &Facts { cutting: true, ..drifted.clone() }), None);
        assert_eq!(decide(NOW, &Facts { window: false, ..drifted.clone() }), None);
        assert_eq!(decide(NOW, &Facts { planning: Some(Cause::Rebalance), ..drifted }), None);
    }

    #[test]
    fn a_plan_that_is_being_made_is_passed_by_what_is_more_urgent_only() {
        let lost = Facts { gone: 1, changed: true, ..quiet() };
        for (made, due) in [
            (Cause::Rebalance, Some(Cause::Repair)),
            (Cause::Drain, Some(Cause::Repair)),
            (Cause::Repair, None),
            (Cause::Around, None),
        ] {
            assert_eq!(decide(NOW, &Facts { planning: Some(made), ..lost.clone() }), due, "{made}");
        }
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
