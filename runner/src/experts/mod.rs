//! The seam between a model and its routed experts. A layer's calls are started, and answered later: by the workers
//! of a placement (`remote`) or, in tests and measurements, by this process (`local`).

mod delivery;
mod directory;
mod link;
mod local;
mod message;
mod pace;
mod remote;

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    time::Duration,
};

use berth_types::{LayerId, Revision};

pub use self::{
    directory::InUse,
    local::LocalExperts,
    remote::{Experts, ExpertsConfig, ExpertsStats},
};
use crate::error::{ExpertsError, StepError};

/// What the rows of one step want from one layer's routed experts.
#[derive(Clone, Copy, Debug)]
pub struct LayerCall<'a> {
    /// The layer.
    pub layer: LayerId,
    /// Features of a row.
    pub hidden: usize,
    /// [T × hidden].
    pub rows: &'a [f32],
    /// Experts of each row.
    pub top_k: usize,
    /// [T × top_k].
    pub experts: &'a [u32],
    /// [T × top_k].
    pub weights: &'a [f32],
    /// [T]: chooses among replicas; depends on the sequence and the position alone, never on the batch.
    pub spread: &'a [u64],
}

/// Expert calls made for something, and how many of them did not go as planned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallCounts {
    /// Calls sent.
    pub calls: u64,
    /// Calls that a worker refused or that broke.
    pub refused: u64,
    /// Calls made again on another replica.
    pub retried: u64,
}

impl CallCounts {
    /// Adds `other`.
    pub fn add(&mut self, other: Self) {
        self.calls = self.calls.saturating_add(other.calls);
        self.refused = self.refused.saturating_add(other.refused);
        self.retried = self.retried.saturating_add(other.retried);
    }
}

/// Where routed experts are computed.
pub trait ExpertCalls: Send + Sync + std::fmt::Debug {
    /// Whether there is a placement to begin steps on.
    fn ready(&self) -> bool {
        true
    }

    /// Begins a step on the placement that is current now.
    ///
    /// # Errors
    /// [`ExpertsError::NoRoutes`] when there is none.
    fn begin(&self) -> Result<Box<dyn StepCalls>, ExpertsError>;
}

/// The calls of one step. Dropping it ends the step.
pub trait StepCalls: Send {
    /// Starts the calls of one layer and returns at once.
    ///
    /// # Errors
    /// When the step cannot make calls at all.
    fn start(&mut self, call: &LayerCall<'_>) -> Result<Pending, ExpertsError>;

    /// Revision of the placement that the step is on; 0 where there is none.
    fn revision(&self) -> Revision;

    /// What was called so far.
    fn counts(&self) -> CallCounts;

    /// Says that the step ended well.
    fn complete(&mut self) {}
}

type Answer = Result<Vec<f32>, ExpertsError>;

/// An answer on its way: [T × hidden], each row the weighted sum over its experts.
pub struct Pending {
    answer: Receiver<Answer>,
    cancelled: Option<Box<dyn Fn() -> bool + Send>>,
    /// Ends the calls when dropped.
    holder: Option<Box<dyn Send>>,
}

impl Pending {
    /// How often a waiting step looks whether anybody still wants it.
    const LOOK: Duration = Duration::from_millis(20);

    /// A place for an answer, and the way to give it once.
    #[must_use]
    pub fn channel() -> (SyncSender<Answer>, Self) {
        let (give, answer) = sync_channel(1);
        (give, Self { answer, cancelled: None, holder: None })
    }

    /// An answer that is there already.
    #[must_use]
    pub fn ready(answer: Answer) -> Self {
        let (give, pending) = Self::channel();
        // The channel holds one answer and its receiver is alive: there is room.
        let _ = give.try_send(answer);
        pending
    }

    /// Drops `holder` with this.
    #[must_use]
    pub fn held_by(mut self, holder: impl Send + 'static) -> Self {
        self.holder = Some(Box::new(holder));
        self
    }

    /// Gives up waiting once `cancelled` says so.
    #[must_use]
    pub fn unless(mut self, cancelled: impl Fn() -> bool + Send + 'static) -> Self {
        self.cancelled = Some(Box::new(cancelled));
        self
    }

    /// Waits for the answer.
    ///
    /// # Errors
    /// What the calls gave; `Cancelled`; `Stopped` when the calls were dropped.
    pub fn wait(self) -> Result<Vec<f32>, StepError> {
        loop {
            match self.answer.recv_timeout(Self::LOOK) {
                Ok(answer) => return Ok(answer?),
                Err(RecvTimeoutError::Disconnected) => return Err(ExpertsError::Stopped.into()),
                Err(RecvTimeoutError::Timeout) => {
                    if self.cancelled.as_ref().is_some_and(|cancelled| cancelled()) {
                        return Err(StepError::Cancelled);
                    }
                }
            }
        }
    }
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pending")
    }
}
