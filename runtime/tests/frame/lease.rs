//! The keeper of a Lease in discrete time: whole failovers take no real time.

use std::{sync::atomic::Ordering, time::Duration};

use crate::store::{Line, Store};
use berth_runtime::{
    Clock, Leadership, Term,
    election::Timing,
    lease::{self, LeaseConfig, next_term},
};
use berth_types::Epoch;
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

struct Candidate {
    leadership: watch::Receiver<Leadership>,
    release: CancellationToken,
    keeper: JoinHandle<()>,
}

impl Candidate {
    fn stand(line: Line, name: &str, clock: &Clock, floor: u64) -> Self {
        let release = CancellationToken::new();
        let config = LeaseConfig {
            namespace: "berth-system".into(),
            name: "berth-scheduler".into(),
            identity: name.into(),
            timing: Timing::default(),
            floor: Epoch(floor),
        };
        let (leadership, keeper) = lease::keep(line, config, clock.clone(), CancellationToken::new(), release.clone());
        Self { leadership, release, keeper: tokio::spawn(keeper) }
    }

    async fn term(&mut self) -> Term {
        next_term(&mut self.leadership, &CancellationToken::new()).await.unwrap()
    }

    async fn follows(&mut self, name: &str) {
        let known =
            |state: &Leadership| matches!(state, Leadership::Following { leader: Some(leader) } if leader == name);
        self.leadership.wait_for(known).await.unwrap();
    }
}

fn in_discrete_time<F>(test: impl FnOnce(Clock) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let clock = Clock::discrete();
    let (test, limit) = (test(clock.clone()), clock.clone());
    // Keepers renew for ever, and so would a test that waits for what does not come.
    clock.run(async move { limit.timeout(SECOND * 3600, test).await }).unwrap().unwrap();
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_released_lease_passes_on_within_one_retry() {
    in_discrete_time(async |clock| {
        let store = Store::default();
        let mut first = Candidate::stand(store.line(), "first", &clock, 0);
        let term = first.term().await;
        assert_eq!(term.epoch(), Epoch(1));
        let mut second = Candidate::stand(store.line(), "second", &clock, 0);
        second.follows("first").await;
        clock.sleep(SECOND * 100).await;
        assert_eq!(term.check(), Ok(Epoch(1)), "renewals went on");

        first.release.cancel();
        first.keeper.await.unwrap();
        let released = clock.now();
        assert!(term.check().is_err() && term.ended().is_cancelled());
        assert_eq!(second.term().await.epoch(), Epoch(2));
        assert!(clock.now() - released <= SECOND * 3, "{:?}", clock.now() - released);
    });
}

#[test]
fn a_leader_that_dies_is_followed_within_twenty_seconds() {
    in_discrete_time(async |clock| {
        let store = Store::default();
        let mut first = Candidate::stand(store.line(), "first", &clock, 0);
        first.term().await;
        let mut second = Candidate::stand(store.line(), "second", &clock, 0);
        second.follows("first").await;
        clock.sleep(SECOND * 7).await;
        first.keeper.abort();
        let died = clock.now();
        // Its next process, in the same pod and under the same name, must not take the term up again.
        let mut again = Candidate::stand(store.line(), "first", &clock, 0);
        assert_eq!(second.term().await.epoch(), Epoch(2));
        let took = clock.now() - died;
        assert!(took > SECOND * 12 && took <= SECOND * 20, "{took:?}");
        again.follows("second").await;
    });
}

#[test]
fn a_leader_that_is_cut_off_stops_before_another_begins() {
    in_discrete_time(async |clock| {
        let store = Store::default();
        let line = store.line();
        let mut first = Candidate::stand(line.clone(), "first", &clock, 0);
        let term = first.term().await;
        let mut second = Candidate::stand(store.line(), "second", &clock, 0);
        second.follows("first").await;
        line.cut.store(true, Ordering::Relaxed);
        let cut = clock.now();

        term.ended().cancelled().await;
        let stopped = clock.now();
        assert!(stopped - cut <= SECOND * 10, "{:?}", stopped - cut);
        assert!(term.check().is_err());
        assert!(matches!(*first.leadership.borrow(), Leadership::Following { .. }));
        let next = second.term().await;
        assert!(clock.now() - stopped >= SECOND * 2, "{:?}", clock.now() - stopped);

        line.cut.store(false, Ordering::Relaxed);
        first.follows("second").await;
        assert_eq!(next.check(), Ok(Epoch(2)));
        assert_eq!(term.check().unwrap_err().to_string(), "the term of epoch 1 is over: another process may lead");
    });
}

#[test]
fn a_term_lasts_to_its_deadline_and_not_a_moment_longer() {
    in_discrete_time(async |clock| {
        let store = Store::default();
        let line = store.line();
        let mut only = Candidate::stand(line.clone(), "only", &clock, 0);
        let term = only.term().await;
        only.keeper.abort();
        clock.sleep_until(SECOND * 10 - Duration::from_micros(1)).await;
        assert!(term.check().is_ok());
        clock.sleep_until(SECOND * 10).await;
        assert!(term.check().is_err(), "nobody needs to tell the holder");
    });
}

#[test]
fn a_lease_that_somebody_deleted_is_made_anew_above_the_floor() {
    in_discrete_time(async |clock| {
        let store = Store::default();
        let mut only = Candidate::stand(store.line(), "only", &clock, 41);
        let term = only.term().await;
        assert_eq!(term.epoch(), Epoch(42));
        *store.lease.lock().unwrap() = None;
        term.ended().cancelled().await;
        assert_eq!(only.term().await.epoch(), Epoch(42 + 1), "the lease is gone, its number is not given twice");
    });
}

#[test]
fn what_others_wrote_on_the_lease_stays() {
    in_discrete_time(async |clock| {
        let store = Store::default();
        let mut only = Candidate::stand(store.line(), "only", &clock, 0);
        let term = only.term().await;
        let labels = [("team".to_owned(), "serving".to_owned())].into();
        store.lease.lock().unwrap().as_mut().unwrap().metadata.labels = Some(labels);
        clock.sleep(SECOND * 30).await;
        assert!(term.check().is_ok());
        let lease = store.lease.lock().unwrap().clone().unwrap();
        assert_eq!(lease.metadata.labels.unwrap()["team"], "serving");
        let spec = lease.spec.unwrap();
        assert_eq!((spec.lease_transitions, spec.lease_duration_seconds), (Some(1), Some(15)));
        assert!(spec.renew_time.unwrap().0 > spec.acquire_time.unwrap().0);
    });
}
