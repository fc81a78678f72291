//! What can go wrong in a pass over an object, and the one function that says when to try again.
//! Nothing here retries by itself.

use std::time::Duration;

use berth_runtime::lease::Deposed;
use kube::runtime::controller::Action;

/// Why a write did not happen.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// Another process may lead.
    #[error("{what}: not written, {source}")]
    Deposed {
        /// What was to be written.
        what: String,
        /// Whose term is over.
        source: Deposed,
    },
    /// The API server did not answer in time; the write may have happened.
    #[error("{what}: no answer within {limit:?}")]
    Late {
        /// What was to be written.
        what: String,
        /// The deadline.
        limit: Duration,
    },
    /// The API server refused, or could not be reached.
    #[error("{what}: {source}")]
    Api {
        /// What was to be written.
        what: String,
        /// Its answer.
        source: Box<kube::Error>,
    },
}

/// What to do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Category {
    /// The same would be refused again: wait for a change.
    Invalid,
    /// Somebody wrote in between: read again and retry now.
    Conflict,
    /// It may work later: back off.
    Transient,
    /// The operator is wrong: tell, and back off long.
    Bug,
}

impl Category {
    /// Every category.
    pub const ALL: [Self; 4] = [Self::Invalid, Self::Conflict, Self::Transient, Self::Bug];

    /// The word in metrics and events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "Invalid",
            Self::Conflict => "Conflict",
            Self::Transient => "Transient",
            Self::Bug => "Bug",
        }
    }
}

impl WriteError {
    /// What to do about it.
    #[must_use]
    pub fn category(&self) -> Category {
        match self {
            Self::Deposed { .. } => Category::Invalid,
            Self::Late { .. } => Category::Transient,
            Self::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(status) => of_status(status.code, &status.message),
                kube::Error::SerdeError(_) | kube::Error::BuildRequest(_) => Category::Bug,
                _ => Category::Transient,
            },
        }
    }
}

fn of_status(code: u16, message: &str) -> Category {
    match code {
        409 => Category::Conflict,
        // The object or its namespace is going away; a new one is a new event.
        403 if message.contains("being terminated") => Category::Invalid,
        404 | 410 | 413 | 422 => Category::Invalid,
        // Rights may be given later, and nothing tells when.
        401 | 403 | 408 | 429 => Category::Transient,
        400..=499 => Category::Bug,
        _ => Category::Transient,
    }
}

/// When to look again after the `attempt`-th error in a row (from 1). `seed` spreads objects that fail
/// together: the wait is between half and all of the step's length.
#[must_use]
pub fn requeue(category: Category, attempt: u32, seed: u64) -> Action {
    let (first, most) = match category {
        Category::Invalid => return Action::await_change(),
        Category::Conflict => (20, 2_000),
        Category::Transient => (500, 60_000),
        Category::Bug => (30_000, 600_000),
    };
    let doubled = u64::checked_shl(first, attempt.saturating_sub(1).min(16)).unwrap_or(most);
    let step = doubled.clamp(first, most);
    // One step of splitmix64: neighbours in (seed, attempt) land far apart.
    let mut mixed = seed.wrapping_add(u64::from(attempt)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let jitter = (mixed >> 33) % (step / 2 + 1);
    Action::requeue(Duration::from_millis(step - jitter))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refusals_are_told_apart() {
        for (code, message, expected) in [
            (409, "the object has been modified", Category::Conflict),
            (422, "spec is invalid", Category::Invalid),
            (404, "not found", Category::Invalid),
            (403, "namespace x is being terminated", Category::Invalid),
            (403, "forbidden: no rights", Category::Transient),
            (429, "slow down", Category::Transient),
            (500, "etcd", Category::Transient),
            (400, "cannot decode", Category::Bug),
        ] {
            assert_eq!(of_status(code, message), expected, "{code} {message}");
        }
    }

    #[test]
    fn invalid_waits_for_a_change() {
        assert_eq!(requeue(Category::Invalid, 9, 1), Action::await_change());
    }

    proptest! {
        #[test]
        fn waits_are_never_zero_and_bounded(attempt in 1u32..100, seed: u64) {
            for (category, least, most) in
                [(Category::Conflict, 10, 2_000), (Category::Transient, 250, 60_000), (Category::Bug, 15_000, 600_000)]
            {
                let action = requeue(category, attempt, seed);
                let bounds = (least..=most).any(|ms| action == Action::requeue(Duration::from_millis(ms)));
                prop_assert!(bounds, "{action:?}");
            }
        }
    }
}
