//! Counters that only grow, and how fast they do. A counter that fell began anew: its device was reset.

use std::{collections::VecDeque, time::Duration};

use serde::{Deserialize, Serialize};

/// Growth is counted over so long.
const SPAN: Duration = Duration::from_secs(600);

/// What is remembered of one counter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Counter(VecDeque<(Duration, u64)>);

impl Counter {
    /// Remembers a value. The oldest one kept is the last from before the span.
    pub(super) fn take(&mut self, now: Duration, count: u64) {
        if self.0.back().is_some_and(|(_, last)| *last > count) {
            self.0.clear();
        }
        self.0.push_back((now, count));
        while self.0.get(1).is_some_and(|(at, _)| now.saturating_sub(*at) >= SPAN) {
            self.0.pop_front();
        }
    }

    /// How much it grew over what is remembered.
    pub(super) fn growth(&self) -> u64 {
        let ends = self.0.front().zip(self.0.back());
        ends.map_or(0, |((_, first), (_, last))| last.saturating_sub(*first))
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_that_of_ten_minutes_and_a_counter_that_fell_begins_anew() {
        let at = Duration::from_secs;
        let mut counter = Counter::default();
        for (second, count) in [(0, 10), (300, 500), (599, 900)] {
            counter.take(at(second), count);
        }
        assert_eq!(counter.growth(), 890);
        counter.take(at(1_199), 900);
        assert_eq!(counter.growth(), 0, "nothing since ten minutes ago");
        counter.take(at(1_200), 3);
        counter.take(at(1_201), 8);
        assert_eq!(counter.growth(), 5);
    }
}
