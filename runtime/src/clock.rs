//! The only source of time. Production reads the machine's clocks; tests and the node lab use discrete
//! time, which stands still until everybody waits and then jumps to the next timer.
//!
//! Rules that make discrete time exact, and that callers must keep:
//! * whoever waits for time waits through [`Clock::sleep_until`], [`Clock::timeout`] or, on a thread of
//!   its own, [`InFlight::block_until`]; never through `tokio::time` or `std::thread::sleep`;
//! * whoever is owed something that does not come from a timer (a vendor call on a thread, a fact on its
//!   way, bytes in a socket) holds an [`InFlight`] until the answer is consumed. Send the guard with the
//!   answer, `tx.send((answer, guard))`: dropped earlier, time could jump past the answer's deadline;
//! * async code runs under [`Clock::run`], whose idle moment is what "everybody waits" means. Without
//!   it, drive the clock by hand with [`Clock::step`].
//!
//! No other file of the project asks the system for the time of day or for a monotonic instant.

use std::{
    collections::BTreeMap,
    future::{Future, poll_fn},
    io,
    pin::{Pin, pin},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio::runtime::Builder;

/// Wall time at which every discrete clock starts: 2026-01-01T00:00:00Z.
const DISCRETE_UNIX_MS: u64 = 1_767_225_600_000;

/// A handle on time; clones share one clock.
#[derive(Clone, Debug)]
pub struct Clock(Kind);

#[derive(Clone, Debug)]
enum Kind {
    /// An instant, and what the clock showed then.
    Real(Instant, Duration),
    Discrete(Arc<Discrete>),
}

/// What was awaited did not come before its deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no answer within {0:?}")]
pub struct Elapsed(pub Duration);

impl Clock {
    /// The machine's monotonic clock and wall clock.
    #[must_use]
    pub fn real() -> Self {
        Self(Kind::Real(Instant::now(), Duration::ZERO))
    }

    /// This clock set forward to show at least `base` now: for what must outlive the process with its times. It runs
    /// on from there. Discrete time cannot be set: it stays as it is.
    #[must_use]
    pub fn ahead(self, base: Duration) -> Self {
        match self.0 {
            Kind::Real(..) => Self(Kind::Real(Instant::now(), base.max(self.now()))),
            Kind::Discrete(discrete) => Self(Kind::Discrete(discrete)),
        }
    }

    /// A clock at zero that moves only in jumps.
    #[must_use]
    pub fn discrete() -> Self {
        Self(Kind::Discrete(Arc::default()))
    }

    /// Time since this clock was made, or what it was set to and since; never falls.
    #[must_use]
    pub fn now(&self) -> Duration {
        match &self.0 {
            Kind::Real(start, base) => base.saturating_add(start.elapsed()),
            Kind::Discrete(discrete) => discrete.lock().now,
        }
    }

    /// Milliseconds since 1970. May jump either way: for people and objects to read, never to decide by.
    #[must_use]
    pub fn unix_ms(&self) -> u64 {
        u64::try_from(self.unix().as_millis()).unwrap_or(u64::MAX)
    }

    /// Time since 1970. As [`Self::unix_ms`], and as fine as the machine tells it.
    #[must_use]
    pub fn unix(&self) -> Duration {
        match &self.0 {
            Kind::Real(..) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            Kind::Discrete(discrete) => Duration::from_millis(DISCRETE_UNIX_MS).saturating_add(discrete.lock().now),
        }
    }

    /// Returns when [`Clock::now`] has reached `deadline`; at once if it has already. Cancel-safe.
    pub async fn sleep_until(&self, deadline: Duration) {
        match &self.0 {
            Kind::Real(start, base) => match start.checked_add(deadline.saturating_sub(*base)) {
                Some(instant) => tokio::time::sleep_until(instant.into()).await,
                None => std::future::pending().await,
            },
            Kind::Discrete(discrete) => {
                Sleep { discrete: Arc::clone(discrete), deadline, idle: false, key: None }.await;
            }
        }
    }

    /// As [`Clock::sleep_until`], for a look that only repeats the one before: while [`Clock::leap`] is allowed,
    /// discrete time may pass over it, and it returns a little late.
    pub async fn idle_until(&self, deadline: Duration) {
        match &self.0 {
            Kind::Real(..) => self.sleep_until(deadline).await,
            Kind::Discrete(discrete) => {
                Sleep { discrete: Arc::clone(discrete), deadline, idle: true, key: None }.await;
            }
        }
    }

    /// Lets discrete time pass over idle looks, at most `stride` at once; `None` = no longer. Whoever allows it
    /// vouches that nothing changes that such a look could see. Does nothing on a real clock.
    pub fn leap(&self, stride: Option<Duration>) {
        if let Kind::Discrete(discrete) = &self.0 {
            discrete.lock().stride = stride;
        }
    }

    /// Returns after `duration`. Cancel-safe.
    pub async fn sleep(&self, duration: Duration) {
        self.sleep_until(self.now().saturating_add(duration)).await;
    }

    /// Awaits `future` for at most `limit`; the future is dropped when the time is over.
    ///
    /// # Errors
    /// [`Elapsed`] when the deadline came first. A future that is ready at the deadline wins.
    pub async fn timeout<F: Future>(&self, limit: Duration, future: F) -> Result<F::Output, Elapsed> {
        let mut future = pin!(future);
        let mut deadline = pin!(self.sleep(limit));
        poll_fn(|cx| {
            if let Poll::Ready(output) = future.as_mut().poll(cx) {
                return Poll::Ready(Ok(output));
            }
            deadline.as_mut().poll(cx).map(|()| Err(Elapsed(limit)))
        })
        .await
    }

    /// Stops discrete time while the guard lives: an answer is on its way. Costs nothing on a real clock.
    #[must_use]
    pub fn in_flight(&self) -> InFlight {
        if let Kind::Discrete(discrete) = &self.0 {
            discrete.lock().in_flight += 1;
        }
        InFlight(self.clone())
    }

    /// Jumps to the earliest timer, if the clock is discrete, nothing is in flight and a timer waits;
    /// wakes whoever waits for that moment. Returns the new time.
    pub fn step(&self) -> Option<Duration> {
        match &self.0 {
            Kind::Real(..) => None,
            Kind::Discrete(discrete) => discrete.step(),
        }
    }

    /// Runs `main` and everything it spawns on one thread, and calls [`Clock::step`] whenever all of it
    /// waits. Returns what `main` returns; tasks that still run are dropped. On a real clock it is an
    /// ordinary single-threaded runtime.
    ///
    /// # Errors
    /// When the system refuses the runtime its descriptors.
    ///
    /// # Panics
    /// When `main` panics, with its panic.
    pub fn run<F>(&self, main: F) -> io::Result<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let clock = self.clone();
        let runtime = Builder::new_current_thread()
            .enable_all()
            .on_thread_park(move || {
                let _ = clock.step();
            })
            .build()?;
        if let Kind::Discrete(discrete) = &self.0 {
            let discrete = Arc::clone(discrete);
            // Parks again, and so steps again, each time the last guard is dropped.
            runtime.spawn(poll_fn(move |cx| {
                discrete.lock().idle = Some(cx.waker().clone());
                Poll::<()>::Pending
            }));
        }
        // A task, because the runtime may park, and so step, while only its root future is ready.
        let main = runtime.spawn(main);
        runtime.block_on(main).map_err(|stopped| match stopped.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(cancelled) => io::Error::other(cancelled),
        })
    }
}

/// Keeps discrete time from moving while it lives. Made by [`Clock::in_flight`]; may move to a thread.
#[derive(Debug)]
pub struct InFlight(Clock);

impl InFlight {
    /// Blocks this thread until `deadline`, as a call does that hangs. Discrete time may pass meanwhile;
    /// it stands still again before this returns. Never call it on an async thread.
    pub fn block_until(&self, deadline: Duration) {
        match &self.0.0 {
            Kind::Real(..) => std::thread::sleep(deadline.saturating_sub(self.0.now())),
            Kind::Discrete(discrete) => discrete.block_until(deadline),
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if let Kind::Discrete(discrete) = &self.0.0 {
            discrete.land(&mut discrete.lock());
        }
    }
}

#[derive(Debug, Default)]
struct Discrete {
    state: Mutex<State>,
    thread_woken: Condvar,
}

#[derive(Debug, Default)]
struct State {
    now: Duration,
    in_flight: usize,
    /// Distinguishes timers of one moment and keeps the order in which they were set.
    next_id: u64,
    timers: BTreeMap<(Duration, u64), Sleeper>,
    /// How far time may go at once over looks that only repeat.
    stride: Option<Duration>,
    idle: Option<Waker>,
}

impl State {
    /// The moment to go to: the earliest timer, or, where leaps are allowed, the earliest that is no idle look.
    fn next(&self) -> Option<Duration> {
        let (first, _) = *self.timers.first_key_value()?.0;
        let Some(stride) = self.stride else { return Some(first) };
        let firm = self.timers.iter().find(|(_, sleeper)| !matches!(sleeper, Sleeper::Idle(_)));
        let most = self.now.saturating_add(stride);
        Some(firm.map_or(most, |(key, _)| key.0.min(most)).max(first))
    }
}

#[derive(Debug)]
enum Sleeper {
    Task(Waker),
    /// A task whose look only repeats.
    Idle(Waker),
    /// Gets its place in `in_flight` back in the same step that reaches its moment.
    Thread,
}

impl Discrete {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is plain numbers, whole between statements: a panic elsewhere cannot tear it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn land(&self, state: &mut State) {
        state.in_flight = state.in_flight.saturating_sub(1);
        if state.in_flight == 0
            && let Some(waker) = &state.idle
        {
            waker.wake_by_ref();
        }
    }

    fn step(&self) -> Option<Duration> {
        let mut woken = Vec::new();
        let now = {
            let mut state = self.lock();
            if state.in_flight > 0 {
                return None;
            }
            let next = state.next()?;
            state.now = state.now.max(next);
            while let Some(entry) = state.timers.first_entry() {
                if entry.key().0 > next {
                    break;
                }
                match entry.remove() {
                    Sleeper::Task(waker) | Sleeper::Idle(waker) => woken.push(waker),
                    Sleeper::Thread => state.in_flight += 1,
                }
            }
            state.now
        };
        self.thread_woken.notify_all();
        woken.into_iter().for_each(Waker::wake);
        Some(now)
    }

    fn block_until(&self, deadline: Duration) {
        let mut state = self.lock();
        if state.now >= deadline {
            return;
        }
        state.next_id += 1;
        let key = (deadline, state.next_id);
        state.timers.insert(key, Sleeper::Thread);
        self.land(&mut state);
        while state.timers.contains_key(&key) {
            state = self.thread_woken.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

struct Sleep {
    discrete: Arc<Discrete>,
    deadline: Duration,
    idle: bool,
    key: Option<(Duration, u64)>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let mut state = this.discrete.lock();
        if state.now >= this.deadline {
            return Poll::Ready(());
        }
        let key = *this.key.get_or_insert_with(|| {
            state.next_id += 1;
            (this.deadline, state.next_id)
        });
        let waker = cx.waker().clone();
        state.timers.insert(key, if this.idle { Sleeper::Idle(waker) } else { Sleeper::Task(waker) });
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(key) = self.key {
            self.discrete.lock().timers.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;
    use tokio::sync::{mpsc, oneshot};

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_thread_and_a_task_that_wait_for_one_moment_both_wake() {
        let clock = Clock::discrete();
        let main = clock.clone();
        let woken = clock.run(async move {
            let (guard, sleeper) = (main.in_flight(), main.clone());
            let task = tokio::spawn(async move { sleeper.sleep(HOUR).await });
            tokio::task::yield_now().await;
            let thread = thread::spawn(move || guard.block_until(HOUR));
            let woken = main.timeout(HOUR * 2, task).await.is_ok();
            thread.join().unwrap();
            woken
        });
        assert!(woken.unwrap());
    }

    #[test]
    fn leaps_pass_over_idle_looks_and_never_over_anything_else() {
        let clock = Clock::discrete();
        let main = clock.clone();
        let (looks, firm, last) = clock
            .run(async move {
                let looked = Arc::new(Mutex::new(0_u32));
                let (inner, count) = (main.clone(), Arc::clone(&looked));
                tokio::spawn(async move {
                    loop {
                        inner.idle_until(inner.now() + Duration::from_secs(5)).await;
                        *count.lock().unwrap() += 1;
                    }
                });
                main.leap(Some(HOUR));
                main.sleep(HOUR * 10).await;
                let firm = main.now();
                main.leap(None);
                let looks = *looked.lock().unwrap();
                main.sleep(Duration::from_secs(50)).await;
                let after = *looked.lock().unwrap() - looks;
                (looks, firm, after)
            })
            .unwrap();
        assert_eq!(firm, HOUR * 10);
        assert!((9..=11).contains(&looks) && (9..=11).contains(&last), "{looks} {last}");
    }

    #[test]
    fn discrete_time_jumps_to_each_timer_in_order() {
        let clock = Clock::discrete();
        let (main, wall) = (clock.clone(), clock.unix_ms());
        let seen = clock.run(async move {
            let (tx, mut rx) = mpsc::channel(8);
            for hours in [3_u32, 1, 2] {
                let (clock, tx) = (main.clone(), tx.clone());
                tokio::spawn(async move {
                    clock.sleep(HOUR * hours).await;
                    tx.send(hours).await.unwrap();
                });
            }
            drop(tx);
            let mut seen = Vec::new();
            while let Some(hours) = rx.recv().await {
                seen.push((hours, main.now()));
            }
            seen
        });
        assert_eq!(seen.unwrap(), [(1, HOUR), (2, HOUR * 2), (3, HOUR * 3)]);
        assert_eq!(clock.unix_ms() - wall, 3 * 3_600_000);
    }

    #[test]
    fn time_stands_still_while_a_call_is_in_flight() {
        let clock = Clock::discrete();
        let main = clock.clone();
        let answered = clock.run(async move {
            let (tx, rx) = oneshot::channel();
            let guard = main.in_flight();
            let worker = thread::spawn(move || {
                // Real time passes; a jump to the one-hour timer would show here.
                thread::sleep(Duration::from_millis(30));
                tx.send((7, guard)).unwrap();
            });
            let (answer, guard) = main.timeout(HOUR, rx).await.unwrap().unwrap();
            drop(guard);
            worker.join().unwrap();
            (answer, main.now())
        });
        assert_eq!(answered.unwrap(), (7, Duration::ZERO));
    }

    #[test]
    fn dropping_the_last_guard_alone_lets_time_go_on() {
        let clock = Clock::discrete();
        let main = clock.clone();
        let ended = clock.run(async move {
            let guard = main.in_flight();
            let worker = thread::spawn(move || {
                thread::sleep(Duration::from_millis(20));
                drop(guard);
            });
            main.sleep(HOUR).await;
            worker.join().unwrap();
        });
        ended.unwrap();
        assert_eq!(clock.now(), HOUR);
    }

    #[test]
    fn a_hanging_call_is_abandoned_at_its_deadline_and_ends_at_its_own() {
        let clock = Clock::discrete();
        let main = clock.clone();
        let (gave_up, answered) = clock
            .run(async move {
                let (tx, mut rx) = oneshot::channel();
                let guard = main.in_flight();
                let worker = thread::spawn(move || {
                    guard.block_until(HOUR);
                    let _ = tx.send(guard);
                });
                let limit = Duration::from_secs(5);
                assert!(matches!(main.timeout(limit, &mut rx).await, Err(Elapsed(at)) if at == limit));
                let gave_up = main.now();
                // The guard in the answer holds time at the moment when the call came back.
                let guard = main.timeout(HOUR * 2, rx).await.unwrap().unwrap();
                let answered = main.now();
                drop(guard);
                worker.join().unwrap();
                (gave_up, answered)
            })
            .unwrap();
        assert_eq!((gave_up, answered), (Duration::from_secs(5), HOUR));
    }

    #[test]
    fn steps_by_hand_need_no_runtime() {
        let clock = Clock::discrete();
        assert_eq!(clock.step(), None);
        let guard = clock.in_flight();
        let worker = thread::spawn(move || guard.block_until(HOUR));
        let stepped = loop {
            if let Some(now) = clock.step() {
                break now;
            }
            thread::yield_now();
        };
        worker.join().unwrap();
        assert_eq!(stepped, HOUR);
    }

    #[test]
    fn an_answer_that_is_ready_at_the_deadline_wins() {
        let clock = Clock::discrete();
        let main = clock.clone();
        let outcomes = clock.run(async move {
            let answered = main.timeout(HOUR, main.sleep(HOUR)).await;
            (answered, main.timeout(HOUR, main.sleep(HOUR * 2)).await)
        });
        assert_eq!(outcomes.unwrap(), (Ok(()), Err(Elapsed(HOUR))));
    }

    #[test]
    #[should_panic(expected = "as it was")]
    fn a_panic_under_the_clock_is_the_panic_of_its_caller() {
        let _ = Clock::discrete().run(async { panic!("as it was") });
    }

    #[tokio::test]
    async fn real_time_passes_by_itself() {
        let clock = Clock::real();
        let before = clock.now();
        clock.sleep(Duration::from_millis(5)).await;
        assert!(clock.now() - before >= Duration::from_millis(5));
        assert!(clock.timeout(Duration::from_millis(5), std::future::pending::<()>()).await.is_err());
        assert!(clock.unix_ms() > DISCRETE_UNIX_MS);
        assert_eq!(clock.step(), None);
    }
}
