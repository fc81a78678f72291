//! One model step: some consecutive tokens of several sequences through all layers, on one placement.
//!
//! Per expert layer: route in float32, start one call per worker, compute the shared expert meanwhile, add. A step of many
//! rows is cut in two batches, one of which is at work while the other waits for its experts. The step decides nothing
//! about sequences (`engine`) or replicas (`experts`).

use berth_types::Revision;

use crate::{
    error::StepError,
    experts::{CallCounts, ExpertCalls, LayerCall, StepCalls},
    load::LoadCounter,
    model::{
        Cache, Model,
        chunk::{Batches, Chunk, Outside, Phase},
    },
    num::usize_of,
};

/// What a step computes for one sequence.
#[derive(Debug)]
pub(crate) struct Part<'a> {
    /// Tokens to compute; at least one.
    pub(crate) tokens: &'a [u32],
    /// Position of the first.
    pub(crate) start: usize,
    /// The sequence's cache.
    pub(crate) cache: &'a mut Cache,
    /// Tells the sequence from others.
    pub(crate) salt: u64,
    /// Which logits are wanted.
    pub(crate) wanted: Wanted,
}

/// Which logits of a part are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// None: the prompt goes on.
    Nothing,
    /// Of the last token.
    Last,
    /// Of every token, with the chosen experts.
    Every,
}

/// What a step gives for one sequence.
#[derive(Debug, Default)]
pub(crate) struct PartOutput {
    /// [wanted rows × vocab].
    pub(crate) logits: Vec<f32>,
    /// By expert layer: [tokens × top_k]; empty unless every row was wanted.
    pub(crate) experts: Vec<Vec<u32>>,
}

/// What a step gives.
#[derive(Debug)]
pub(crate) struct StepOutput {
    /// By part.
    pub(crate) parts: Vec<PartOutput>,
    /// Placement that the step was on.
    pub(crate) revision: Revision,
}

/// Runs one step. `counts` is what was called, also when the step fails; `ended` hears of each phase.
///
/// # Errors
/// What the maths or the experts give; the caches of the parts are then unfinished.
pub(crate) fn run(
    model: &Model,
    experts: &dyn ExpertCalls,
    load: &LoadCounter,
    parts: Vec<Part<'_>>,
    cancelled: &(impl Fn() -> bool + Clone + Send + 'static),
    ended: &dyn Fn(Phase),
    counts: &mut CallCounts,
) -> Result<StepOutput, StepError> {
    let mut step = experts.begin()?;
    let result = layers(model, step.as_mut(), load, parts, cancelled, ended);
    counts.add(step.counts());
    let parts = result?;
    step.complete();
    Ok(StepOutput { parts, revision: step.revision() })
}

fn layers(
    model: &Model,
    step: &mut dyn StepCalls,
    load: &LoadCounter,
    parts: Vec<Part<'_>>,
    cancelled: &(impl Fn() -> bool + Clone + Send + 'static),
    ended: &dyn Fn(Phase),
) -> Result<Vec<PartOutput>, StepError> {
    let wanted: Vec<(usize, Wanted)> = parts.iter().map(|part| (part.tokens.len(), part.wanted)).collect();
    let chunks: Vec<Chunk<'_, Cache>> = parts
        .into_iter()
        .map(|part| Chunk { tokens: part.tokens, start: part.start, cache: part.cache, salt: part.salt })
        .collect();
    let mut outputs: Vec<PartOutput> = wanted.iter().map(|_| PartOutput::default()).collect();
    let mut start = |call: &LayerCall<'_>, first: usize| {
        load.count(step.revision(), call.layer, call.experts);
        record(&wanted, &mut outputs, call, first);
        Ok(step.start(call)?.unless(cancelled.clone()))
    };
    let x = model.forward(batches(model, chunks), &mut Outside { start: &mut start, ended })?;
    head(model, &x, &wanted, &mut outputs)?;
    ended(Phase::Head);
    Ok(outputs)
}

/// Rows that an expert gets on average in each of two batches, at least, for a step to be cut in two. Every batch reads the
/// weights of the experts that it hits; below this, reading them twice costs workers more than the runner gains by
/// working while it waits.
const ROWS_PER_EXPERT: usize = 16;

/// One batch, or two of nearly as many rows, cut between sequences.
fn batches<'a>(model: &Model, mut chunks: Vec<Chunk<'a, Cache>>) -> Batches<'a, Cache> {
    let rows: usize = chunks.iter().map(|chunk| chunk.tokens.len()).sum();
    let least = 2 * ROWS_PER_EXPERT * model.experts();
    if chunks.len() < 2 || rows.saturating_mul(model.top_k()) < least {
        return vec![chunks];
    }
    let mut before = 0;
    let half = |chunk: &Chunk<'_, Cache>| {
        before += chunk.tokens.len();
        2 * before >= rows
    };
    let cut = chunks.iter().position(half).unwrap_or(0).clamp(1, chunks.len() - 1);
    let rest = chunks.split_off(cut);
    vec![chunks, rest]
}

/// Keeps the chosen experts of the parts that want every row. The call is about whole parts, from row `first` of the step.
fn record(wanted: &[(usize, Wanted)], outputs: &mut [PartOutput], call: &LayerCall<'_>, first: usize) {
    let (mut rest, mut before) = (call.experts, 0);
    for ((tokens, wanted), output) in wanted.iter().zip(outputs) {
        before += tokens;
        if before <= first || rest.is_empty() {
            continue;
        }
        let (own, others) = rest.split_at(tokens * call.top_k);
        if *wanted == Wanted::Every {
            output.experts.push(own.to_vec());
        }
        rest = others;
    }
}

/// Logits of the wanted rows only: the output matrix is the largest of the model.
fn head(model: &Model, x: &[f32], wanted: &[(usize, Wanted)], outputs: &mut [PartOutput]) -> Result<(), StepError> {
    let (width, vocab) = (model.width(), model.vocab());
    let (mut picked, mut sizes, mut first) = (Vec::new(), Vec::new(), 0);
    for (tokens, wanted) in wanted {
        let rows = match wanted {
            Wanted::Nothing => 0,
            Wanted::Last => 1,
            Wanted::Every => *tokens,
        };
        picked.extend_from_slice(&x[(first + tokens - rows) * width..(first + tokens) * width]);
        sizes.push(rows);
        first += tokens;
    }
    let rows = sizes.iter().sum();
    let logits = model.logits(&picked, rows)?;
    let mut rest = logits.as_slice();
    for (rows, output) in sizes.iter().zip(outputs) {
        let (own, others) = rest.split_at(rows * vocab);
        output.logits = own.to_vec();
        rest = others;
    }
    Ok(())
}

/// Checks that every token is one the model knows.
pub(crate) fn known(model: &Model, tokens: &[u32]) -> bool {
    tokens.iter().all(|token| usize_of(*token) < model.vocab())
}
