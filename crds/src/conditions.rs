//! Condition types and reasons, one enum each, and the one way to change a list of conditions: the time
//! of the last transition moves only when the status does.

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};

/// Condition types. Positive polarity, but for `Degraded`, `Reconciling` and `Stalled`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConditionType {
    /// The object can be honoured as written.
    Accepted,
    /// Enough devices are granted.
    CapacityAvailable,
    /// Every instance has a checked placement.
    Placed,
    /// Every device of the placement holds its experts.
    WeightsLoaded,
    /// Requests are answered.
    Serving,
    /// Less than asked for is given; the message names the rung of the ladder.
    Degraded,
    /// Everything asked for is true.
    Ready,
    /// Work towards the spec goes on (kstatus).
    Reconciling,
    /// Nothing will change without help (kstatus).
    Stalled,
    /// The scheduler hears from the node's agent.
    Reachable,
}

impl ConditionType {
    /// The word in `status.conditions[].type`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "Accepted",
            Self::CapacityAvailable => "CapacityAvailable",
            Self::Placed => "Placed",
            Self::WeightsLoaded => "WeightsLoaded",
            Self::Serving => "Serving",
            Self::Degraded => "Degraded",
            Self::Ready => "Ready",
            Self::Reconciling => "Reconciling",
            Self::Stalled => "Stalled",
            Self::Reachable => "Reachable",
        }
    }
}

/// One condition as a part wants it to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which condition.
    pub kind: ConditionType,
    /// `True`, `False` or unknown.
    pub status: Option<bool>,
    /// CamelCase reason.
    pub reason: &'static str,
    /// What is, what was needed, what will happen, what the reader may do.
    pub message: String,
}

/// `current` with `wanted` in it: others are kept, the transition time moves only with the status.
#[must_use]
pub fn merge(current: &[Condition], wanted: &[Wanted], generation: Option<i64>, now: Timestamp) -> Vec<Condition> {
    let mut merged: Vec<Condition> = current.to_vec();
    for want in wanted {
        let status = match want.status {
            Some(true) => "True",
            Some(false) => "False",
            None => "Unknown",
        };
        let before = merged.iter().position(|condition| condition.type_ == want.kind.as_str());
        let since = before
            .and_then(|index| merged.get(index))
            .filter(|condition| condition.status == status)
            .map_or(Time(now), |condition| condition.last_transition_time.clone());
        let condition = Condition {
            type_: want.kind.as_str().to_owned(),
            status: status.to_owned(),
            reason: want.reason.to_owned(),
            message: want.message.clone(),
            observed_generation: generation,
            last_transition_time: since,
        };
        match before.and_then(|index| merged.get_mut(index)) {
            Some(slot) => *slot = condition,
            None => merged.push(condition),
        }
    }
    merged
}

/// Whether condition `kind` is `True`.
#[must_use]
pub fn is_true(conditions: &[Condition], kind: ConditionType) -> bool {
    conditions.iter().any(|condition| condition.type_ == kind.as_str() && condition.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn want(status: bool, message: &str) -> Vec<Wanted> {
        vec![Wanted { kind: ConditionType::Ready, status: Some(status), reason: "Test", message: message.to_owned() }]
    }

    #[test]
    fn transition_time_moves_only_with_the_status() {
        let (first, second) = (Timestamp::from_second(100).unwrap(), Timestamp::from_second(200).unwrap());
        let before = merge(&[], &want(true, "a"), Some(1), first);
        let same = merge(&before, &want(true, "b"), Some(2), second);
        assert_eq!(same[0].last_transition_time, Time(first));
        assert_eq!((same[0].message.as_str(), same[0].observed_generation), ("b", Some(2)));
        let changed = merge(&same, &want(false, "c"), Some(2), second);
        assert_eq!(changed[0].last_transition_time, Time(second));
        assert!(!is_true(&changed, ConditionType::Ready));
    }
}
