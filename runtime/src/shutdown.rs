//! How a process ends: one token from `main`, and tasks of which none dies unnoticed.
//!
//! The order of an orderly end is kept by [`crate::Part::finish`]. Nothing here kills a task in the
//! middle of a write.

use std::{
    any::Any,
    future::Future,
    io,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
};

use futures::FutureExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// A token that SIGTERM or SIGINT cancels. A second signal ends the process at once, with status 130.
///
/// # Errors
/// When the system refuses the handlers.
pub fn on_signals() -> io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = CancellationToken::new();
    let cancelled = stop.clone();
    tokio::spawn(async move {
        for first in [true, false] {
            // Cancel-safe: `recv` keeps a signal for the next call.
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if !first {
                std::process::exit(130);
            }
            tracing::info!(signal = name, "asked to stop");
            cancelled.cancel();
        }
    });
    Ok(stop)
}

/// Whatever a task failed with.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A task ended as it must not.
#[derive(Debug, thiserror::Error)]
#[error("task {task} {how}")]
pub struct TaskFailure {
    /// The name it was spawned under.
    pub task: String,
    /// What happened.
    #[source]
    pub how: HowFailed,
}

/// What ended a task.
#[derive(Debug, thiserror::Error)]
pub enum HowFailed {
    /// It returned an error.
    #[error("failed: {0}")]
    Failed(BoxError),
    /// It panicked with this message.
    #[error("panicked: {0}")]
    Panicked(String),
    /// It returned although nobody asked the process to stop.
    #[error("ended before it was asked to")]
    EndedEarly,
}

/// The tasks of a process. The first failure asks the whole process to stop. Clones share one set.
#[derive(Clone, Debug)]
pub struct Tasks {
    tracker: TaskTracker,
    stopping: CancellationToken,
    ask_to_stop: CancellationToken,
    failure: Arc<Mutex<Option<TaskFailure>>>,
    alive: Arc<Mutex<Vec<String>>>,
}

impl Tasks {
    /// An empty set. A failure cancels `ask_to_stop`; `stopping` is what the tasks look at.
    #[must_use]
    pub fn new(ask_to_stop: CancellationToken, stopping: CancellationToken) -> Self {
        Self { tracker: TaskTracker::new(), stopping, ask_to_stop, failure: Arc::default(), alive: Arc::default() }
    }

    /// Cancelled when tasks should accept nothing new, finish what they have and return.
    #[must_use]
    pub fn stopping(&self) -> &CancellationToken {
        &self.stopping
    }

    /// Spawns a task that must run until [`Self::stopping`] is cancelled: an error, a panic or an early
    /// end ends the process.
    pub fn keep<F, E>(&self, name: impl Into<String>, future: F)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<BoxError>,
    {
        self.start(name.into(), future, true);
    }

    /// Spawns a task that may end by itself; an error or a panic ends the process.
    pub fn spawn<F, E>(&self, name: impl Into<String>, future: F)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<BoxError>,
    {
        self.start(name.into(), future, false);
    }

    fn start<F, E>(&self, name: String, future: F, forever: bool)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<BoxError>,
    {
        let tasks = self.clone();
        lock(&self.alive).push(name.clone());
        self.tracker.spawn(async move {
            let outcome = AssertUnwindSafe(future).catch_unwind().await;
            let how = match outcome {
                Ok(Ok(())) if forever && !tasks.stopping.is_cancelled() => Some(HowFailed::EndedEarly),
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(HowFailed::Failed(error.into())),
                Err(panic) => Some(HowFailed::Panicked(message_of(&*panic))),
            };
            tasks.ended(name, how);
        });
    }

    fn ended(&self, name: String, how: Option<HowFailed>) {
        let mut alive = lock(&self.alive);
        if let Some(place) = alive.iter().position(|task| *task == name) {
            alive.swap_remove(place);
        }
        drop(alive);
        let Some(how) = how else { return };
        tracing::error!(task = %name, error = %how, "task failed, the process ends");
        lock(&self.failure).get_or_insert(TaskFailure { task: name, how });
        self.ask_to_stop.cancel();
    }

    /// Waits for every task to return. Cancel-safe.
    pub async fn wait(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// Names of the tasks that still run.
    #[must_use]
    pub fn alive(&self) -> Vec<String> {
        lock(&self.alive).clone()
    }

    /// The first failure, once.
    #[must_use]
    pub fn take_failure(&self) -> Option<TaskFailure> {
        lock(&self.failure).take()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Plain values, whole between statements: a panic elsewhere cannot tear them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn tasks() -> (Tasks, CancellationToken) {
        let (ask, stopping) = (CancellationToken::new(), CancellationToken::new());
        (Tasks::new(ask.clone(), stopping), ask)
    }

    async fn failure_of<F>(future: F) -> String
    where
        F: Future<Output = Result<(), io::Error>> + Send + 'static,
    {
        let (tasks, ask) = tasks();
        tasks.keep("watch", future);
        ask.cancelled().await;
        tasks.wait().await;
        tasks.take_failure().unwrap().to_string()
    }

    #[tokio::test]
    async fn a_task_that_fails_panics_or_ends_early_ends_the_process() {
        assert_eq!(failure_of(async { Err(io::Error::other("no route")) }).await, "task watch failed: no route");
        assert_eq!(failure_of(async { panic!("bad index") }).await, "task watch panicked: bad index");
        assert_eq!(failure_of(async { Ok(()) }).await, "task watch ended before it was asked to");
    }

    #[tokio::test]
    async fn a_task_that_returns_when_asked_is_no_failure() {
        let (tasks, ask) = tasks();
        let stopping = tasks.stopping().clone();
        tasks.keep("watch", async move {
            stopping.cancelled().await;
            Ok::<_, Infallible>(())
        });
        tasks.spawn("call", async { Ok::<_, Infallible>(()) });
        assert!(tasks.alive().contains(&"watch".to_owned()));
        tasks.stopping().cancel();
        tasks.wait().await;
        assert!(tasks.take_failure().is_none() && !ask.is_cancelled());
        assert!(tasks.alive().is_empty());
    }
}
