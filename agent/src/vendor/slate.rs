//! Where a reading is written while it is made, so that what came before a call that hangs is kept.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use crate::health::fact::Read;

/// What became of a value that could not be had.
#[derive(Clone, Copy, Debug)]
pub enum Failure {
    /// The library's code.
    Code(i32),
    /// No answer in time.
    Missed,
}

impl<T> From<Failure> for Read<T> {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Code(code) => Self::Failed(code),
            Failure::Missed => Self::Missed,
        }
    }
}

/// A reading being made. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Slate<V>(Arc<Mutex<Writing<V>>>);

#[derive(Clone, Debug, Default)]
struct Writing<V> {
    values: V,
    current: &'static str,
    since: Duration,
    skip: Vec<&'static str>,
}

impl<V: Clone> Slate<V> {
    /// An empty slate for a reading that begins at `now` and leaves out what is in `skip`.
    #[must_use]
    pub fn new(values: V, now: Duration, skip: Vec<&'static str>) -> Self {
        Self(Arc::new(Mutex::new(Writing { values, current: "", since: now, skip })))
    }

    fn with<T>(&self, act: impl FnOnce(&mut Writing<V>) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The next call begins; `false` = it is left out.
    #[must_use]
    pub fn begin(&self, name: &'static str, now: Duration) -> bool {
        self.with(|writing| {
            (writing.current, writing.since) = (name, now);
            !writing.skip.contains(&name)
        })
    }

    /// Keeps what was read so far.
    pub fn write(&self, values: V) {
        self.with(|writing| writing.values = values);
    }

    /// When the current call began.
    #[must_use]
    pub fn since(&self) -> Duration {
        self.with(|writing| writing.since)
    }

    /// Name of the current call.
    #[must_use]
    pub fn current(&self) -> &'static str {
        self.with(|writing| writing.current)
    }

    /// What was read so far.
    #[must_use]
    pub fn values(&self) -> V {
        self.with(|writing| writing.values.clone())
    }
}
