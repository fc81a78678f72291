//! A thread on which vendor calls are made. A call that misses its deadline is abandoned: its thread is
//! written off and a new one takes its place, at most [`HUNG_LIMIT`] of them at a time.
//!
//! One lane per device, so that a call that hangs on one never delays the others. Nothing here may wait
//! without a deadline, or kill a thread: a thread inside a driver cannot be ended from outside.

use std::{
    cell::RefCell,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use berth_runtime::clock::{Clock, InFlight};
use tokio::sync::oneshot;

/// Threads of one lane that may hang in the vendor's library before it is left alone.
pub const HUNG_LIMIT: usize = 3;

thread_local! {
    /// What keeps discrete time still while this thread is inside a call.
    static IN_CALL: RefCell<Option<InFlight>> = const { RefCell::new(None) };
}

/// Why a call has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaneError {
    /// It did not come back in time; its thread is written off.
    #[error("no answer within {0:?}")]
    Missed(Duration),
    /// Too many threads of this lane hang already; no call was made.
    #[error("{HUNG_LIMIT} earlier calls still hang")]
    Exhausted,
    /// The system refused a thread, or the call panicked.
    #[error("the call's thread ended")]
    Broken,
}

type Job = Box<dyn FnOnce() + Send>;

/// One device's thread for vendor calls.
#[derive(Debug)]
pub struct Lane {
    name: String,
    clock: Clock,
    jobs: Option<mpsc::SyncSender<Job>>,
    hung: Arc<AtomicUsize>,
}

impl Lane {
    /// A lane without a thread yet; the first call starts it.
    #[must_use]
    pub fn new(name: impl Into<String>, clock: Clock) -> Self {
        Self { name: name.into(), clock, jobs: None, hung: Arc::default() }
    }

    /// Calls that are written off and have not come back.
    #[must_use]
    pub fn hung(&self) -> usize {
        self.hung.load(Ordering::Acquire)
    }

    /// Makes a call and waits for it until `limit` after `alive` last answered another time: a call that
    /// makes several vendor calls tells by `alive` when it began the current one.
    ///
    /// # Errors
    /// [`LaneError`]. Not cancel-safe in that a dropped call still runs to its end.
    pub async fn call<T: Send + 'static>(
        &mut self,
        limit: Duration,
        alive: impl Fn() -> Duration,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, LaneError> {
        if self.hung() >= HUNG_LIMIT {
            return Err(LaneError::Exhausted);
        }
        let (answer, mut answered) = oneshot::channel();
        let guard = self.clock.in_flight();
        let job: Job = Box::new(move || {
            let (value, guard) = within(guard, call);
            let _ = answer.send((value, guard));
        });
        self.submit(job)?;
        let started = self.clock.now();
        loop {
            let end = started.max(alive()).saturating_add(limit);
            let left = end.saturating_sub(self.clock.now());
            match self.clock.timeout(left, &mut answered).await {
                Ok(Ok((value, _guard))) => return Ok(value),
                Ok(Err(_)) => {
                    self.jobs = None;
                    return Err(LaneError::Broken);
                }
                Err(_) if started.max(alive()).saturating_add(limit) > self.clock.now() => {}
                Err(_) => break,
            }
        }
        self.write_off(answered);
        Err(LaneError::Missed(limit))
    }

    fn submit(&mut self, job: Job) -> Result<(), LaneError> {
        let job = match &self.jobs {
            Some(jobs) => match jobs.try_send(job) {
                Ok(()) => return Ok(()),
                Err(mpsc::TrySendError::Full(job) | mpsc::TrySendError::Disconnected(job)) => job,
            },
            None => job,
        };
        let jobs = start(&self.name).map_err(|_| LaneError::Broken)?;
        jobs.try_send(job).map_err(|_| LaneError::Broken)?;
        self.jobs = Some(jobs);
        Ok(())
    }

    /// Leaves the thread to itself; it ends, and is counted back, when its call returns.
    fn write_off<T: Send + 'static>(&mut self, mut answered: oneshot::Receiver<T>) {
        self.jobs = None;
        self.hung.fetch_add(1, Ordering::AcqRel);
        let hung = Arc::clone(&self.hung);
        tokio::spawn(async move {
            let _ = (&mut answered).await;
            hung.fetch_sub(1, Ordering::AcqRel);
        });
    }
}

fn start(name: &str) -> io::Result<mpsc::SyncSender<Job>> {
    let (jobs, todo) = mpsc::sync_channel::<Job>(1);
    thread::Builder::new().name(format!("vendor {name}")).spawn(move || {
        while let Ok(job) = todo.recv() {
            job();
        }
    })?;
    Ok(jobs)
}

/// Runs `call` on this thread while `guard` keeps discrete time still; gives the guard back with the value.
pub fn within<T>(guard: InFlight, call: impl FnOnce() -> T) -> (T, Option<InFlight>) {
    IN_CALL.set(Some(guard));
    let value = call();
    (value, IN_CALL.take())
}

/// For a library double that runs on discrete time: blocks the vendor call of this thread until
/// `duration` of the clock's time has passed, as a call does that hangs.
pub fn hang(clock: &Clock, duration: Duration) {
    let guard = IN_CALL.take().unwrap_or_else(|| clock.in_flight());
    guard.block_until(clock.now().saturating_add(duration));
    IN_CALL.set(Some(guard));
}

/// For a library double that runs on discrete time: what comes back from the call of this thread is on
/// its way from now on.
pub fn carry(guard: InFlight) {
    IN_CALL.set(Some(guard));
}

/// The guard that the last call of this thread left behind.
pub(crate) fn carried() -> Option<InFlight> {
    IN_CALL.take()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn on_time<F>(test: impl FnOnce(Clock) -> F) -> F::Output
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let clock = Clock::discrete();
        clock.run(test(clock.clone())).unwrap()
    }

    #[test]
    fn a_call_answers_with_its_value() {
        let seven = on_time(|clock| async move { Lane::new("t", clock).call(SECOND, Duration::default, || 7).await });
        assert_eq!(seven, Ok(7));
    }

    #[test]
    fn a_hanging_call_is_abandoned_at_its_deadline_and_the_next_is_answered() {
        let (first, at, second, hung) = on_time(|clock| async move {
            let mut lane = Lane::new("t", clock.clone());
            let stuck = clock.clone();
            let first = lane.call(SECOND, Duration::default, move || hang(&stuck, SECOND * 5)).await;
            let at = clock.now();
            let second = lane.call(SECOND, Duration::default, || 2).await;
            (first, at, second, lane.hung())
        });
        assert_eq!((first, at, second, hung), (Err(LaneError::Missed(SECOND)), SECOND, Ok(2), 1));
    }

    #[test]
    fn a_lane_with_too_many_hung_threads_makes_no_call_until_one_is_back() {
        on_time(|clock| async move {
            let mut lane = Lane::new("t", clock.clone());
            for _ in 0..HUNG_LIMIT {
                let stuck = clock.clone();
                lane.call(SECOND, Duration::default, move || hang(&stuck, SECOND * 60)).await.unwrap_err();
            }
            assert_eq!(lane.call(SECOND, Duration::default, || 1).await, Err(LaneError::Exhausted));
            clock.sleep(SECOND * 60).await;
            assert_eq!(lane.call(SECOND, Duration::default, || 1).await, Ok(1));
        });
    }

    #[test]
    fn each_step_of_a_call_has_its_own_deadline() {
        let answer = on_time(|clock| async move {
            let begun = Arc::new(std::sync::Mutex::new(Duration::ZERO));
            let (seen, inner) = (begun.clone(), clock.clone());
            Lane::new("t", clock)
                .call(
                    SECOND,
                    move || *seen.lock().unwrap(),
                    move || {
                        for _ in 0..5 {
                            *begun.lock().unwrap() = inner.now();
                            hang(&inner, SECOND * 4 / 5);
                        }
                        inner.now()
                    },
                )
                .await
        });
        assert_eq!(answer, Ok(SECOND * 4));
    }
}
