//! What a plan gains and what it costs, in figures and in one sentence: the record that status keeps of every decision.
//! It decides nothing: whether moves pay back is the planner's to say.

use std::{fmt, time::Duration};

use berth_crds::expert_placement::{DecisionOutcome, PlanDecision};
use berth_planner::{Balance, Payback};
use berth_runtime::telemetry::large;
use berth_types::{Bytes, Revision};
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

use crate::{balance::Spread, replan::Cause};

/// Decisions that a status keeps, the newest first.
pub const KEPT: usize = 8;

/// Moves, and what they do to the loads that are expected next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weighed {
    /// The layout there is; `None` = there is none, or no load is known.
    pub before: Option<Spread>,
    /// The planned one.
    pub after: Option<Spread>,
    /// Replicas that devices load.
    pub moves: u64,
    /// Their bytes.
    pub bytes: Bytes,
    /// What the bytes cost, as a share of the time that experts take, over the time for which the gain is expected to
    /// last.
    pub price: f64,
    /// Until the gain has paid for the moves; `None` = it never does, or there is nothing to compare.
    pub pays_back: Option<Duration>,
}

impl Weighed {
    /// `bytes` loaded side by side by `devices` devices, from one spread to the other.
    #[must_use]
    pub fn new(
        payback: &Payback,
        devices: usize,
        (before, after): (Option<Spread>, Option<Spread>),
        (moves, bytes): (u64, Bytes),
    ) -> Self {
        let price = payback.price(devices) * large(bytes.get());
        let mut weighed = Self { before, after, moves, bytes, price, pays_back: None };
        // The price is spread over the time that the gain lasts: it is paid when that share of it has passed.
        let seconds = payback.lasts_s * price / weighed.gain();
        weighed.pays_back = (weighed.gain() > 0.0).then(|| Duration::try_from_secs_f64(seconds).ok()).flatten();
        weighed
    }

    /// By how much the slowest device gets faster, in units of the ideal time of a step's experts.
    #[must_use]
    pub fn gain(&self) -> f64 {
        let makespan = |spread: Option<Spread>| spread.map(|spread| spread.makespan);
        makespan(self.before).zip(makespan(self.after)).map_or(0.0, |(before, after)| before - after)
    }
}

impl fmt::Display for Weighed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let (Some(before), Some(after)) = (self.before, self.after) {
            write!(f, "balance {:.2} -> {:.2}, ", before.balancedness, after.balancedness)?;
        }
        let replicas = if self.moves == 1 { "replica" } else { "replicas" };
        write!(f, "moves {} {replicas} ({})", self.moves, self.bytes)?;
        match self.pays_back {
            Some(time) if self.moves > 0 => write!(f, ", pays back in {}", seconds(time)),
            _ => Ok(()),
        }
    }
}

/// The record of a plan that is followed.
#[must_use]
pub fn moved(at: Timestamp, cause: Cause, from: Revision, to: Revision, weighed: &Weighed) -> PlanDecision {
    let (verb, reason) = cause.words();
    let revisions = if from.0 == 0 { format!("r{to}") } else { format!("r{from} -> r{to}") };
    let why = format!("{verb} {revisions} ({reason}): {weighed}");
    record(at, cause, DecisionOutcome::Moved, (from, to), Some(weighed), why)
}

/// The record of a look at the balance that moves nothing.
#[must_use]
pub fn kept(at: Timestamp, revision: Revision, before: Option<Spread>, balance: Balance) -> PlanDecision {
    let spread = before.map_or_else(String::new, |spread| format!("balance {:.2}; ", spread.balancedness));
    let why = format!("kept r{revision}: {spread}{balance}");
    let mut kept = record(at, Cause::Rebalance, DecisionOutcome::Kept, (revision, revision), None, why);
    kept.balancedness_before = before.map(|spread| rounded(spread.balancedness));
    kept
}

/// The record of a plan that could not be made.
#[must_use]
pub fn refused(at: Timestamp, cause: Cause, revision: Revision, problem: &str) -> PlanDecision {
    let (verb, reason) = cause.words();
    let why = format!("no {verb} ({reason}): {problem}");
    record(at, cause, DecisionOutcome::Refused, (revision, revision), None, why)
}

fn record(
    at: Timestamp,
    cause: Cause,
    outcome: DecisionOutcome,
    (from, to): (Revision, Revision),
    weighed: Option<&Weighed>,
    why: String,
) -> PlanDecision {
    let balance = |spread: Option<Spread>| spread.map(|spread| rounded(spread.balancedness));
    PlanDecision {
        time: Time(at),
        outcome,
        cause: cause.as_str().to_owned(),
        from_revision: from.0,
        revision: to.0,
        balancedness_before: weighed.and_then(|weighed| balance(weighed.before)),
        balancedness_after: weighed.and_then(|weighed| balance(weighed.after)),
        moved_replicas: weighed.map_or(0, |weighed| weighed.moves),
        moved_bytes: weighed.map_or(Bytes::ZERO, |weighed| weighed.bytes),
        pays_back_seconds: weighed.and_then(|weighed| weighed.pays_back).map(|time| rounded(time.as_secs_f64())),
        why: why.chars().take(1024).collect(),
    }
}

/// `decisions` with `newest` in front. Looks at the balance that kept what there was, or plans that could not be made, are
/// told once as long as their cause is the same: the latest stands for all of them.
pub fn remember(decisions: &mut Vec<PlanDecision>, newest: PlanDecision) {
    let same = |last: &PlanDecision| {
        last.outcome != DecisionOutcome::Moved && last.outcome == newest.outcome && last.cause == newest.cause
    };
    match decisions.first_mut() {
        Some(last) if same(last) => *last = newest,
        _ => decisions.insert(0, newest),
    }
    decisions.truncate(KEPT);
}

/// Three digits: what changes less is no news for the API server.
#[must_use]
pub fn rounded(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

fn seconds(time: Duration) -> String {
    match time.as_secs_f64() {
        short if short < 1.0 => "less than 1 s".to_owned(),
        long if long < 120.0 => format!("{long:.0} s"),
        long => format!("{:.0} min", long / 60.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(balancedness: f64) -> Option<Spread> {
        Some(Spread { balancedness, makespan: 1.0 / balancedness })
    }

    fn weighed(before: f64, after: f64, bytes: u64) -> Weighed {
        let payback = Payback { lasts_s: 600.0, bytes_per_s: 1e9, disturbance: 0.3, experts: 0.5 };
        Weighed::new(&payback, 8, (spread(before), spread(after)), (12, Bytes(bytes)))
    }

    #[test]
    fn a_move_is_told_with_its_gain_its_bytes_and_when_it_has_paid() {
        let weighed = weighed(0.71, 0.97, 48_000_000_000);
        // 8 devices side by side at 1 GB/s load 48 GB in 6 s, losing 0.3 of their work: 1.8 s of throughput; the step
        // gains 0.378 of the half that experts take.
        let expected = 0.3 * 48.0 / 8.0 / (0.5 * (1.0 / 0.71 - 1.0 / 0.97));
        assert!((weighed.pays_back.unwrap().as_secs_f64() - expected).abs() < 1e-6, "{weighed:?}");
        let told = moved(Timestamp::UNIX_EPOCH, Cause::Rebalance, Revision(4), Revision(5), &weighed);
        assert_eq!(
            told.why,
            "re-plan r4 -> r5 (the load has drifted): balance 0.71 -> 0.97, moves 12 replicas (48.0 GB), pays back in 10 s"
        );
        assert_eq!((told.from_revision, told.revision, told.moved_replicas), (4, 5, 12));
    }

    #[test]
    fn what_is_kept_says_the_gain_and_the_price_that_it_was_held_against() {
        let dear = Balance::Unpaid { gain: 0.011, cost: 0.06, least: 0.01 };
        let told = kept(Timestamp::UNIX_EPOCH, Revision(4), spread(0.97), dear);
        assert!(told.why.starts_with("kept r4: balance 0.97; nothing moves: moves would gain 1.10 %"), "{}", told.why);
    }

    #[test]
    fn a_gain_of_nothing_never_pays_back() {
        assert_eq!(weighed(0.9, 0.9, 10).pays_back, None);
        assert_eq!(Weighed::new(&Payback::default(), 0, (None, None), (3, Bytes(10))).pays_back, None);
    }

    #[test]
    fn looks_that_change_nothing_are_one_record_and_moves_are_all_kept() {
        let mut decisions = Vec::new();
        let look = |second| {
            let at = Timestamp::from_second(second).unwrap();
            kept(at, Revision(1), spread(0.9), Balance::Close { slack: 0.001 })
        };
        remember(&mut decisions, look(1));
        remember(&mut decisions, look(2));
        assert_eq!((decisions.len(), decisions[0].time.0.as_second()), (1, 2));
        for revision in 1..20 {
            let (from, to) = (Revision(revision), Revision(revision + 1));
            remember(&mut decisions, moved(Timestamp::UNIX_EPOCH, Cause::Rebalance, from, to, &weighed(0.7, 0.9, 1)));
        }
        assert_eq!((decisions.len(), decisions[0].revision), (KEPT, 20));
    }
}
