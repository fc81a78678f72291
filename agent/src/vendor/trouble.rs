//! Notices that a whole library has stopped to be of use: every device of it has answered nothing but errors for a
//! minute. A driver that was loaded anew leaves its old clients in that state; opening the library again ends it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::Notify;

use crate::health::fact::Local;

/// Every device must fail for so long.
const LASTING: Duration = Duration::from_secs(60);

/// What every device of one library last did.
#[derive(Debug, Default)]
pub struct Trouble {
    /// Since when it fails; `None` = it answered.
    failing: Mutex<BTreeMap<Local, Option<Duration>>>,
    bell: Notify,
}

impl Trouble {
    /// Trouble of a library with these devices.
    #[must_use]
    pub fn of(locals: impl Iterator<Item = Local>) -> Self {
        Self { failing: Mutex::new(locals.map(|local| (local, None)).collect()), bell: Notify::new() }
    }

    /// A device was read.
    pub fn told(&self, local: &str, fails: bool, now: Duration) {
        // A map of plain values is whole between statements.
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(since) = failing.get_mut(local) {
            *since = if fails { Some(since.unwrap_or(now)) } else { None };
        }
        let latest = failing.values().copied().reduce(|one, other| Some(one?.max(other?))).flatten();
        if latest.is_some_and(|since| now.saturating_sub(since) >= LASTING) {
            self.bell.notify_one();
        }
    }

    /// Returns when nothing but errors has come for a minute. Cancel-safe.
    pub async fn lasts(&self) {
        self.bell.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn only_all_of_them_for_a_minute_is_trouble() {
        let at = Duration::from_secs;
        let trouble = Trouble::of(["a", "b"].map(str::to_owned).into_iter());
        for second in 0..200 {
            trouble.told("a", true, at(second));
            trouble.told("b", second > 100 && second != 150, at(second));
        }
        assert!(trouble.lasts().now_or_never().is_none(), "b answered 49 s ago");
        trouble.told("b", true, at(211));
        assert!(trouble.lasts().now_or_never().is_some());
    }
}
