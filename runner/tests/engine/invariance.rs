//! A sequence's tokens are its own: no batch, no chunk size, no split of prompt and generation changes a bit.

use std::sync::{Arc, LazyLock};

use berth_runner::engine::{Reason, Request};
use proptest::prelude::*;

use crate::tiny::{self, Loaded, Outcome};

static MODELS: LazyLock<[Loaded; 2]> =
    LazyLock::new(|| [tiny::random(&tiny::grouped(), 3), tiny::random(&tiny::plain(), 4)]);

fn alone(loaded: &Loaded, prompt: &[u32], tokens: u32, chunk: usize) -> Outcome {
    let engine = tiny::engine(&loaded.model, Arc::new(loaded.local.clone()), chunk);
    tiny::generate(&engine, prompt, tokens, true)
}

fn prompt() -> impl Strategy<Value = Vec<u32>> {
    proptest::collection::vec(0_u32..258, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// What is decoded token by token equals, bit for bit, what one pass over prompt and continuation gives.
    #[test]
    fn decoding_equals_recomputing(model in 0_usize..2, prompt in prompt(), tokens in 2_u32..8, chunk in 1_usize..9) {
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
        model in 0_usize..2,
        prompts in proptest::collection::vec(prompt(), 2..6),
        chunk in 1_usize..9,
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
