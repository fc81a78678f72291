//! A sequence's tokens are its own: no batch, no chunk size, no split of prompt and generation changes a bit.

use std::{
    path::Path,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
    },
};

use berth_runner::{
    engine::{Engine, EngineConfig, Reason, Request},
    error::ExpertsError,
    experts::{ExpertCalls, LocalExperts, StepCalls},
};
use proptest::prelude::*;

use crate::tiny::{self, Loaded, Outcome};

/// Two of the V3 family, three of the V4 family.
static MODELS: LazyLock<[Loaded; 5]> = LazyLock::new(|| {
    let stored = |folder| tiny::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(folder));
    [
        tiny::random(&tiny::grouped(), 3),
        tiny::random(&tiny::plain(), 4),
        stored("v4-first-form"),
        stored("v4-current-form"),
        stored("../../../tests/data/reference/models/v4-tiny"),
    ]
});

fn alone(loaded: &Loaded, prompt: &[u32], tokens: u32, chunk: usize) -> Outcome {
    let engine = tiny::engine(&loaded.model, Arc::new(loaded.local.clone()), chunk);
    tiny::generate(&engine, prompt, tokens, true)
}

fn prompt() -> impl Strategy<Value = Vec<u32>> {
    proptest::collection::vec(0_u32..258, 1..70)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// What is decoded token by token equals, bit for bit, what one pass over prompt and continuation gives.
    #[test]
    fn decoding_equals_recomputing(model in 0_usize..5, prompt in prompt(), tokens in 2_u32..8, chunk in 1_usize..24) {
        let loaded = &MODELS[model];
        let decoded = alone(loaded, &prompt, tokens, chunk);
        let mut whole = prompt.clone();
        whole.extend(&decoded.ids[..decoded.ids.len() - 1]);
        let recomputed = alone(loaded, &whole, 1, 64);
        prop_assert_eq!(&decoded.trace, &recomputed.trace);
        prop_assert_eq!(decoded.ids.last(), recomputed.ids.last());
    }

    #[test]
    fn other_sequences_of_a_batch_change_nothing(
        model in 0_usize..5,
        prompts in proptest::collection::vec(prompt(), 2..6),
        chunk in 1_usize..24,
    ) {
        let loaded = &MODELS[model];
        let engine = tiny::engine(&loaded.model, Arc::new(loaded.local.clone()), chunk);
        let requests: Vec<_> = prompts
            .iter()
            .map(|prompt| Request { prompt_ids: prompt.clone(), max_tokens: 4, ignore_eos: true, trace: true, deadline: None })
            .map(|request| engine.generate(request))
            .collect();
        for (events, prompt) in requests.into_iter().zip(&prompts) {
            let together = tiny::collect(events);
            prop_assert_eq!(together.finished.reason, Reason::Length);
            prop_assert_eq!(&together.trace, &alone(loaded, prompt, 4, 5).trace);
        }
    }
}

#[test]
fn a_later_token_never_changes_an_earlier_position() {
    for loaded in MODELS.iter() {
        let short = alone(loaded, &[0, 7, 9], 1, 8);
        let long = alone(loaded, &[0, 7, 9, 200, 3], 1, 8);
        assert_eq!(short.trace[..3], long.trace[..3]);
    }
}

/// Experts of this process, from when the gate is opened.
#[derive(Debug)]
struct Gated(LocalExperts, AtomicBool);

impl ExpertCalls for Gated {
    fn ready(&self) -> bool {
        self.1.load(Ordering::Acquire)
    }

    fn begin(&self) -> Result<Box<dyn StepCalls>, ExpertsError> {
        self.0.begin()
    }
}

/// Prompts long enough that an expert gets 16 rows of either half of a step: then it is cut in two.
#[test]
fn a_step_that_is_cut_in_two_changes_nothing() {
    for loaded in MODELS.iter() {
        let gated = Arc::new(Gated(loaded.local.clone(), AtomicBool::new(false)));
        let experts: Arc<dyn ExpertCalls> = gated.clone();
        let engine = tiny::engine(&loaded.model, experts, 80);
        let prompt = |at: u32| (0..70 + at).map(|token| (token * 37 + at * 11) % 258).collect::<Vec<u32>>();
        let requests: Vec<_> = (0..5)
            .map(|at| Request { prompt_ids: prompt(at), max_tokens: 1, ignore_eos: true, trace: true, deadline: None })
            .map(|request| engine.generate(request))
            .collect();
        gated.1.store(true, Ordering::Release);
        let together: Vec<_> = requests.into_iter().map(tiny::collect).collect();
        // The first took part in one step, which made two calls per layer.
        let layers = u64::try_from(loaded.model.expert_layers().len()).unwrap();
        assert_eq!(together[0].finished.counts.calls, 2 * layers);
        for (at, together) in (0..).zip(together) {
            assert_eq!(together.trace, alone(loaded, &prompt(at), 1, 128).trace);
        }
    }
}

#[test]
fn a_request_that_nobody_waits_for_frees_its_cache() {
    for loaded in MODELS.iter() {
        let engine = tiny::engine(&loaded.model, Arc::new(loaded.local.clone()), 4);
        let request = |max_tokens| Request {
            prompt_ids: vec![0; 40],
            max_tokens,
            ignore_eos: true,
            trace: false,
            deadline: None,
        };
        drop(engine.generate(request(64)));
        // Served after the first, so what it sees is what the first left.
        let outcome = tiny::collect(engine.generate(request(1)));
        assert_eq!(outcome.finished.reason, Reason::Length);
        while !engine.idle() {
            std::thread::yield_now();
        }
        let stats = engine.stats();
        assert_eq!((stats.cache_bytes, stats.sequences, stats.ended), (0, 0, 2));
    }
}

#[test]
fn a_request_beyond_the_cache_is_refused_with_both_figures() {
    let loaded = &MODELS[2];
    let bytes = loaded.model.cache_bytes(50);
    let config = EngineConfig { cache_bytes: bytes - 1, ..EngineConfig::default() };
    let engine = Engine::start(Arc::clone(&loaded.model), Arc::new(loaded.local.clone()), config).unwrap();
    let request =
        |prompt: usize| Request { prompt_ids: vec![0; prompt], max_tokens: 10, ignore_eos: true, ..Request::default() };
    let refused = tiny::collect(engine.generate(request(40))).finished;
    assert!(refused.error.contains(&bytes.to_string()), "{}", refused.error);
    assert_eq!(tiny::collect(engine.generate(request(30))).finished.reason, Reason::Length);
}
