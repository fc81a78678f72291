//! What happens when workers refuse, hang, die or are replaced: the tokens stay the same.

use std::{
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use berth_proto::v1::ForwardStatus;
use berth_runner::{
    engine::{Engine, Event, Reason, Request},
    experts::{ExpertCalls, ExpertsConfig},
};
use berth_types::Revision;

use crate::{
    tiny::{self, Loaded, Outcome},
    worker::{Crew, Mode},
};

static MODEL: LazyLock<Loaded> = LazyLock::new(|| tiny::random(&tiny::grouped(), 7));
const PROMPT: [u32; 9] = [0, 41, 7, 200, 13, 99, 54, 120, 3];
const TOKENS: u32 = 24;

/// The tokens that one process gives.
static EXPECTED: LazyLock<Vec<u32>> = LazyLock::new(|| {
    let engine = tiny::engine(&MODEL.model, Arc::new(MODEL.local.clone()), 4);
    tiny::generate(&engine, &PROMPT, TOKENS, false).ids
});

fn quick() -> ExpertsConfig {
    ExpertsConfig { deadline: Duration::from_secs(8), ..ExpertsConfig::default() }
}

fn crew(workers: usize) -> (Crew, Engine) {
    let crew = Crew::new(&MODEL, workers, quick());
    let experts: Arc<dyn ExpertCalls> = Arc::new(crew.experts.clone());
    let engine = tiny::engine(&MODEL.model, experts, 4);
    (crew, engine)
}

/// Two workers with everything: each expert has two replicas.
fn pair() -> (Crew, Engine) {
    let (crew, engine) = crew(2);
    assert!(crew.experts.set_routes(crew.table(1, |_, _| true)));
    (crew, engine)
}

/// Generates, and runs `act` when token `at` has come.
fn generate_and(engine: &Engine, at: usize, act: impl FnOnce()) -> Outcome {
    let request = Request { prompt_ids: PROMPT.to_vec(), max_tokens: TOKENS, ignore_eos: true, ..Request::default() };
    let mut events = engine.generate(request);
    let mut outcome = Outcome::default();
    let mut act = Some(act);
    while outcome.ids.len() < at {
        match events.blocking_recv().unwrap() {
            Event::Token { id, revision, .. } => {
                outcome.ids.push(id);
                outcome.revisions.push(revision.0);
            }
            Event::Finished(finished) => panic!("ended before token {at}: {}", finished.error),
            Event::Prompt { .. } | Event::Trace(_) => {}
        }
    }
    act.take().unwrap()();
    let rest = tiny::collect(events);
    outcome.ids.extend(rest.ids);
    outcome.revisions.extend(rest.revisions);
    outcome.finished = rest.finished;
    outcome
}

fn assert_expected(outcome: &Outcome) {
    assert_eq!(outcome.finished.reason, Reason::Length, "{}", outcome.finished.error);
    assert_eq!(outcome.ids, *EXPECTED);
}

#[test]
fn any_number_of_workers_gives_the_same_tokens_with_one_call_per_layer_and_worker() {
    for workers in [1, 2, 5] {
        let (crew, engine) = crew(workers);
        crew.experts.set_routes(crew.table(1, |worker, expert| usize::try_from(expert).unwrap() % workers == worker));
        assert_expected(&generate_and(&engine, 1, || ()));
        let steps = usize::try_from(engine.stats().steps).unwrap();
        let layers = MODEL.model.expert_layers().len();
        for worker in &crew.workers {
            let asked = worker.asked();
            assert!(!asked.is_empty() && asked.len() <= steps * layers, "{} calls in {steps} steps", asked.len());
        }
        assert!(workers > 1 || crew.asked() == steps * layers);
        let counts = crew.experts.stats().counts;
        assert_eq!((counts.refused, counts.retried), (0, 0));
        assert_eq!(usize::try_from(counts.calls).unwrap(), crew.asked());
    }
}

#[test]
fn replicas_share_the_tokens_evenly() {
    let (crew, engine) = pair();
    for first in 0..12 {
        let prompt: Vec<u32> = (0..40).map(|at| (at * 7 + first * 31) % 258).collect();
        tiny::generate(&engine, &prompt, 1, false);
    }
    let tokens: Vec<u32> =
        crew.workers.iter().map(|worker| worker.asked().iter().map(|asked| asked.tokens).sum()).collect();
    let share = f64::from(tokens[0]) / f64::from(tokens[0] + tokens[1]);
    assert!((0.45..0.55).contains(&share), "{tokens:?}");
}

#[test]
fn replicas_take_the_part_that_their_weights_say_and_no_token_changes() {
    let (crew, engine) = pair();
    let mut table = crew.table(2, |_, _| true);
    for (device, weight) in table.devices.iter_mut().zip([49_151, 16_384]) {
        device.weights = device.slots.iter().map(|(layer, slots)| (*layer, vec![weight; slots.len()])).collect();
    }
    assert!(crew.experts.set_routes(table));
    for first in 0..12 {
        let prompt: Vec<u32> = (0..40).map(|at| (at * 7 + first * 31) % 258).collect();
        tiny::generate(&engine, &prompt, 1, false);
    }
    let served: Vec<u64> = crew.experts.served().into_values().map(|layers| layers.into_values().sum()).collect();
    let counted = |at: usize| f64::from(u32::try_from(served[at]).unwrap());
    let share = counted(0) / (counted(0) + counted(1));
    assert!((0.70..0.80).contains(&share), "{served:?}");
    assert_expected(&generate_and(&engine, 1, || ()));
}

#[test]
fn a_lost_device_costs_one_retry_and_is_not_called_again_until_newer_routes() {
    let (crew, engine) = pair();
    let outcome = generate_and(&engine, 5, || crew.workers[0].set(Mode::Refuse(ForwardStatus::DeviceLost)));
    assert_expected(&outcome);
    assert!(outcome.finished.counts.refused >= 1 && outcome.finished.counts.retried >= 1);
    let stats = crew.experts.stats();
    assert!(stats.first_refused_unix_ms > 0 && stats.rerouted_unix_ms >= stats.first_refused_unix_ms);
    assert_eq!(stats.gone.len(), 1);
    crew.workers[0].set(Mode::Serve);
    let asked = crew.workers[0].asked().len();
    assert_expected(&generate_and(&engine, 1, || ()));
    assert_eq!(crew.workers[0].asked().len(), asked);
    crew.experts.set_routes(crew.table(2, |_, _| true));
    assert_expected(&generate_and(&engine, 1, || ()));
    assert!(crew.workers[0].asked().len() > asked);
    assert!(crew.experts.stats().gone.is_empty());
}

#[test]
fn devices_that_the_scheduler_calls_gone_are_not_called() {
    let (crew, engine) = pair();
    crew.experts.set_gone(["node-1/0.0".parse().unwrap()].into());
    assert_expected(&generate_and(&engine, 1, || ()));
    assert!(crew.workers[1].asked().is_empty());
    crew.experts.set_gone([].into());
    assert_expected(&generate_and(&engine, 1, || ()));
    assert!(!crew.workers[1].asked().is_empty());
}

#[test]
fn whatever_a_worker_refuses_with_another_replica_answers() {
    for status in [
        ForwardStatus::NotHeld,
        ForwardStatus::Overloaded,
        ForwardStatus::Deadline,
        ForwardStatus::Failed,
        ForwardStatus::Unspecified,
    ] {
        let (crew, engine) = pair();
        let outcome = generate_and(&engine, 3, || crew.workers[1].set(Mode::Refuse(status)));
        assert_expected(&outcome);
        assert!(outcome.finished.counts.refused >= 1, "{status:?}");
    }
}

#[test]
fn an_invalid_call_fails_its_request_and_is_not_retried() {
    let (crew, engine) = pair();
    let outcome = generate_and(&engine, 3, || {
        crew.workers.iter().for_each(|worker| worker.set(Mode::Refuse(ForwardStatus::Invalid)));
    });
    assert_eq!(outcome.finished.reason, Reason::Error);
    assert!(outcome.finished.error.contains("as the test wants"), "{}", outcome.finished.error);
    assert_eq!(outcome.finished.counts.retried, 0);
}

#[test]
fn a_killed_worker_changes_no_token() {
    let (mut crew, engine) = pair();
    let mut victim = crew.workers.remove(0);
    let outcome = std::thread::scope(|scope| {
        generate_and(&engine, 5, || {
            victim.set(Mode::Hang);
            let before = victim.asked().len();
            scope.spawn(move || {
                let deadline = Instant::now() + Duration::from_secs(5);
                while victim.asked().len() == before {
                    assert!(Instant::now() < deadline, "the victim was never called");
                    std::thread::yield_now();
                }
                victim.kill();
            });
        })
    });
    assert_expected(&outcome);
    assert!(outcome.finished.counts.refused >= 1 && outcome.finished.counts.retried >= 1);
    assert!(crew.experts.stats().rerouted_unix_ms > 0);
}

#[test]
fn a_worker_that_breaks_while_another_is_asked_for_it_counts_as_rerouted() {
    let (mut crew, engine) = pair();
    let mut victim = crew.workers.remove(0);
    let (experts, other) = (crew.experts.clone(), &crew.workers[0]);
    let outcome = std::thread::scope(|scope| {
        generate_and(&engine, 5, || {
            victim.set(Mode::Hang);
            other.set(Mode::Hang);
            scope.spawn(move || {
                let deadline = Instant::now() + Duration::from_secs(5);
                while experts.stats().counts.retried == 0 {
                    assert!(Instant::now() < deadline, "nobody else was asked");
                    std::thread::yield_now();
                }
                victim.kill();
                while experts.stats().counts.refused == 0 {
                    assert!(Instant::now() < deadline, "the broken call was not noticed");
                    std::thread::yield_now();
                }
                other.set(Mode::Serve);
            });
        })
    });
    assert_expected(&outcome);
    let stats = crew.experts.stats();
    assert!(stats.rerouted_unix_ms >= stats.first_refused_unix_ms && stats.first_refused_unix_ms > 0);
}

#[test]
fn a_worker_that_hangs_is_passed_over_after_its_patience() {
    let (crew, engine) = pair();
    let began = Instant::now();
    let outcome = generate_and(&engine, 12, || crew.workers[0].set(Mode::Hang));
    assert_expected(&outcome);
    assert!(outcome.finished.counts.retried >= 1);
    // Twelve more tokens of two layers: waiting for it every time would take 24 times its patience of at least 50 ms,
    // which is less than this bound only because it is passed over.
    assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    let late = crew.workers[0].asked().len();
    tiny::generate(&engine, &PROMPT, 2, false);
    assert!(crew.workers[0].asked().len() <= late + 4);
}

#[test]
fn an_expert_without_replica_waits_for_new_routes() {
    let (crew, engine) = crew(3);
    let half = |worker: usize, expert: u32| worker < 2 && usize::try_from(expert).unwrap() % 2 == worker;
    crew.experts.set_routes(crew.table(1, half));
    let repaired = |worker: usize, expert: u32| match worker {
        0 => expert.is_multiple_of(2),
        1 => false,
        _ => expert % 2 == 1,
    };
    let outcome = std::thread::scope(|scope| {
        generate_and(&engine, 5, || {
            crew.workers[1].set(Mode::Refuse(ForwardStatus::DeviceLost));
            scope.spawn(|| {
                let deadline = Instant::now() + Duration::from_secs(5);
                while crew.experts.stats().counts.refused == 0 {
                    assert!(Instant::now() < deadline, "the lost device was never called");
                    std::thread::yield_now();
                }
                crew.experts.set_routes(crew.table(2, repaired));
            });
        })
    });
    assert_expected(&outcome);
    assert_eq!(outcome.revisions.last(), Some(&2));
    assert!(crew.workers[2].asked().iter().all(|asked| asked.revision == 2));
}

#[test]
fn an_expert_without_replica_for_longer_than_the_deadline_is_named() {
    let crew = Crew::new(&MODEL, 1, ExpertsConfig { deadline: Duration::from_millis(300), ..quick() });
    let engine = tiny::engine(&MODEL.model, Arc::new(crew.experts.clone()), 4);
    crew.experts.set_routes(crew.table(1, |_, expert| expert != 3));
    let request = Request { prompt_ids: (0..60).collect(), max_tokens: 1, ..Request::default() };
    let outcome = tiny::collect(engine.generate(request));
    assert_eq!(outcome.finished.reason, Reason::Error);
    assert!(outcome.finished.error.contains("expert 3 of layer 1"), "{}", outcome.finished.error);
}

#[test]
fn overload_everywhere_delays_a_request_but_never_fails_it() {
    let crew = Crew::new(&MODEL, 2, ExpertsConfig { deadline: Duration::from_millis(200), ..quick() });
    let engine = tiny::engine(&MODEL.model, Arc::new(crew.experts.clone()), 4);
    crew.experts.set_routes(crew.table(1, |_, _| true));
    let outcome = std::thread::scope(|scope| {
        generate_and(&engine, 3, || {
            crew.workers.iter().for_each(|worker| worker.set(Mode::Refuse(ForwardStatus::Overloaded)));
            scope.spawn(|| {
                // Much longer than the deadline, told by the tries that were made meanwhile.
                let (began, limit) = (Instant::now(), Duration::from_secs(20));
                while crew.experts.stats().counts.refused < 40 {
                    assert!(began.elapsed() < limit, "{:?}", crew.experts.stats());
                    std::thread::yield_now();
                }
                assert!(began.elapsed() > Duration::from_millis(400));
                crew.workers.iter().for_each(|worker| worker.set(Mode::Serve));
            });
        })
    });
    assert_expected(&outcome);
}

#[test]
fn a_cutover_fails_nothing_and_drains_the_old_revision() {
    let (crew, engine) = crew(4);
    crew.experts.set_routes(crew.table(1, |worker, _| worker < 2));
    let mut seen = crew.experts.in_use();
    assert_eq!(seen.borrow_and_update().current, Revision(1));
    let outcome = generate_and(&engine, 6, || {
        assert!(crew.experts.set_routes(crew.table(2, |worker, _| worker >= 2)));
    });
    assert_expected(&outcome);
    assert!(
        outcome.revisions.is_sorted() && outcome.revisions.first() == Some(&1) && outcome.revisions.last() == Some(&2)
    );
    assert_eq!((outcome.finished.counts.refused, outcome.finished.counts.retried), (0, 0));
    let in_use = *seen.borrow_and_update();
    assert_eq!((in_use.oldest, in_use.current), (Revision(2), Revision(2)));
    assert!(crew.experts.stats().revision_since_unix_ms > 0);
    assert!(!crew.experts.set_routes(crew.table(1, |_, _| true)), "an older revision was taken");
}

#[test]
fn a_request_waits_for_the_first_routes() {
    let (crew, engine) = crew(1);
    let outcome = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| tiny::generate(&engine, &PROMPT, TOKENS, false));
        while engine.stats().sequences == 0 {
            std::thread::yield_now();
        }
        crew.experts.set_routes(crew.table(1, |_, _| true));
        waiting.join().unwrap()
    });
    assert_expected(&outcome);
}

#[test]
fn a_cancelled_request_ends_its_calls_and_frees_its_cache() {
    let (crew, engine) = crew(1);
    crew.experts.set_routes(crew.table(1, |_, _| true));
    crew.workers[0].set(Mode::Hang);
    let request = Request { prompt_ids: PROMPT.to_vec(), max_tokens: 50, ..Request::default() };
    let events = engine.generate(request);
    let deadline = Instant::now() + Duration::from_secs(5);
    while crew.asked() == 0 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert!(engine.stats().cache_bytes > 0);
    drop(events);
    while engine.stats().cache_bytes > 0 {
        assert!(Instant::now() < deadline, "the cache was not freed");
        std::thread::yield_now();
    }
    assert!(engine.idle());
}
