//! How long to wait before the next try, as a kubelet does it: the first try after a failure is at once, each
//! further one after twice the time, up to a limit. Pure: it counts, it never waits.

use std::time::Duration;

/// The waiting times; a kubelet has 10 s and 300 s, tests do not have that long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// The wait before the second try.
    pub first: Duration,
    /// No wait is longer.
    pub limit: Duration,
    /// After so long a success the count starts anew.
    pub forget_after: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { first: Duration::from_millis(200), limit: Duration::from_secs(5), forget_after: Duration::from_secs(60) }
    }
}

/// The failures in a row of one thing.
#[derive(Debug, Clone, Copy)]
pub(super) struct Failures {
    backoff: Backoff,
    count: u32,
}

impl Failures {
    pub(super) fn new(backoff: Backoff) -> Self {
        Self { backoff, count: 0 }
    }

    /// The wait that this failure, after `lasted` of success, asks for.
    pub(super) fn next(&mut self, lasted: Duration) -> Duration {
        if lasted >= self.backoff.forget_after {
            self.count = 0;
        }
        self.count = self.count.saturating_add(1);
        match self.count {
            1 => Duration::ZERO,
            n => self.backoff.first.saturating_mul(1 << (n - 2).min(20)).min(self.backoff.limit),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_limit_and_start_anew_after_a_long_success() {
        let mut failures = Failures::new(Backoff::default());
        let waits: Vec<u128> = (0..8).map(|_| failures.next(Duration::ZERO).as_millis()).collect();
        assert_eq!(waits, [0, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(failures.next(Duration::from_secs(60)), Duration::ZERO);
    }
}
