//! How long to wait for a worker before asking another one, and how often that may be done.
//!
//! Pure: time is an argument. A call is given three times the 99th percentile of calls of its size, but never more than a
//! quarter of the deadline. Asking twice on suspicion is bounded to a tenth of the calls of the last ten seconds; asking
//! again after a refusal is necessary, so it is counted there but never denied.

use std::{collections::VecDeque, time::Duration};

use crate::num::f64_of;

/// Latencies kept per size.
const SAMPLES: usize = 128;
/// Fewer latencies than this say nothing.
const ENOUGH: usize = 16;
/// Calls of one to `2^SIZES - 1` tokens are told apart by powers of two.
const SIZES: usize = 12;
/// Patience while nothing is known.
const UNKNOWN: Duration = Duration::from_secs(2);
/// Least patience: below it, a busy machine's jitter looks like a hang.
const LEAST: Duration = Duration::from_millis(50);
/// Over how long the budget is counted.
const WINDOW_S: u64 = 10;
/// Share of calls that may be asked twice.
const SHARE: f64 = 0.1;

/// What recent calls were like.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    latencies: [VecDeque<Duration>; SIZES],
    seconds: VecDeque<Second>,
}

#[derive(Debug)]
struct Second {
    at: u64,
    calls: usize,
    retries: usize,
}

impl Pace {
    /// How long to wait for a call of `tokens` tokens before asking another replica.
    pub(crate) fn patience(&self, tokens: usize, deadline: Duration) -> Duration {
        let known = &self.latencies[size(tokens)];
        let patience = if known.len() < ENOUGH {
            UNKNOWN
        } else {
            let mut sorted: Vec<Duration> = known.iter().copied().collect();
            sorted.sort_unstable();
            let p99 = sorted.get((sorted.len() * 99).div_ceil(100) - 1).copied().unwrap_or(UNKNOWN);
            (p99 * 3).max(LEAST)
        };
        patience.min(deadline / 4)
    }

    /// A call of `tokens` tokens was answered well.
    pub(crate) fn answered(&mut self, tokens: usize, took: Duration) {
        let known = &mut self.latencies[size(tokens)];
        if known.len() == SAMPLES {
            known.pop_front();
        }
        known.push_back(took);
    }

    /// A call is sent.
    pub(crate) fn called(&mut self, now: Duration, again: bool) {
        let second = self.second(now);
        second.calls += 1;
        second.retries += usize::from(again);
    }

    /// Whether a call may be asked twice on suspicion.
    pub(crate) fn may_hedge(&mut self, now: Duration) -> bool {
        self.second(now);
        let (calls, retries) =
            self.seconds.iter().fold((0, 0), |sum, second| (sum.0 + second.calls, sum.1 + second.retries));
        f64_of(retries) < (f64_of(calls) * SHARE).max(1.0)
    }

    fn second(&mut self, now: Duration) -> &mut Second {
        let at = now.as_secs();
        while self.seconds.front().is_some_and(|second| second.at + WINDOW_S <= at) {
            self.seconds.pop_front();
        }
        if self.seconds.back().is_none_or(|second| second.at < at) {
            self.seconds.push_back(Second { at, calls: 0, retries: 0 });
        }
        let last = self.seconds.len() - 1;
        &mut self.seconds[last]
    }
}

fn size(tokens: usize) -> usize {
    let log = tokens.max(1).ilog2();
    usize::try_from(log).map_or(SIZES - 1, |log| log.min(SIZES - 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEADLINE: Duration = Duration::from_secs(60);

    #[test]
    fn patience_follows_calls_of_the_same_size() {
        let mut pace = Pace::default();
        assert_eq!(pace.patience(1, DEADLINE), UNKNOWN);
        for _ in 0..50 {
            pace.answered(1, Duration::from_millis(40));
            pace.answered(200, Duration::from_millis(900));
        }
        assert_eq!(pace.patience(1, DEADLINE), Duration::from_millis(120));
        assert_eq!(pace.patience(255, DEADLINE), Duration::from_millis(2700));
        assert_eq!(pace.patience(255, Duration::from_secs(4)), Duration::from_secs(1));
    }

    #[test]
    fn one_slow_call_in_a_hundred_does_not_make_all_wait() {
        let mut pace = Pace::default();
        for call in 0..128 {
            pace.answered(1, if call == 7 { Duration::from_secs(9) } else { Duration::from_millis(20) });
        }
        assert_eq!(pace.patience(1, DEADLINE), Duration::from_millis(60));
    }

    #[test]
    fn a_tenth_of_the_last_ten_seconds_may_be_asked_twice() {
        let mut pace = Pace::default();
        let at = Duration::from_secs;
        assert!(pace.may_hedge(at(0)));
        (0..100).for_each(|_| pace.called(at(1), false));
        let hedged = (0..50).filter(|_| pace.may_hedge(at(2)).then(|| pace.called(at(2), true)).is_some()).count();
        assert_eq!(hedged, 12);
        assert!(!pace.may_hedge(at(10)));
        assert!(pace.may_hedge(at(13)));
    }

    proptest! {
        #[test]
        fn the_budget_holds_for_any_history(history in proptest::collection::vec((0_u64..3, any::<bool>()), 0..400)) {
            let (mut pace, mut now) = (Pace::default(), 0);
            for (passed, forced) in history {
                now += passed;
                let at = Duration::from_secs(now);
                let hedge = !forced && pace.may_hedge(at);
                let before: usize = pace.seconds.iter().map(|second| second.retries).sum();
                let calls: usize = pace.seconds.iter().map(|second| second.calls).sum();
                prop_assert!(!hedge || before == 0 || before * 10 < calls);
                pace.called(at, hedge);
            }
        }
    }
}
