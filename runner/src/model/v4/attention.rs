//! V4's attention (paper §2.3): many query heads over one head of keys that are the values too.
//!
//! ```text
//! latent = norm(W_qa x)      q_h = rope( unit(W_qb latent)_h )      k = rope( norm(W_kv x) )
//! out_h  = unrope( Σ_j p_j k_j )      p = softmax( q_h · k_j / √c, sink_h )
//! ```
//!
//! `j` runs over the newest `sliding_window` tokens and, by layer, over entries that stand for closed blocks of earlier
//! ones: none; the indexer's choice (sparse, §2.3.1); all (heavy, §2.3.2). A query at position `t` sees the entries of the
//! `(t + 1) / ratio` blocks that are closed by then. `rope` turns the last `qk_rope_head_dim` features of a head, with the
//! compressed base in layers that have entries, else the main one; since keys are values, the output is turned back at the
//! query's position. A head's sink takes a share of the softmax and gives nothing.
//!
//! One query is one fixed sequence of sums over what it sees, oldest first, so prefill, decoding and any batch give the
//! same bits.

use berth_kernels::Linear;
use rayon::prelude::*;

use super::{
    cache::{BlockShape, Cache},
    compressor::{Compressor, Contributions},
    config::{Reach, V4Config},
    index::{Asking, Indexer},
    output::GroupedOutput,
};
use crate::{
    error::{ModelError, StepError},
    model::{
        chunk::{Chunk, Phase},
        linear::{Source, apply},
        maths::{add_scaled, dot, softmax_with_sink},
        norm::{Norm, unit},
        rope::{Angles, Rope},
    },
    num::{f32_near, f64_of, usize_of},
};

/// One layer's attention.
#[derive(Debug)]
pub(crate) struct Attention {
    head: usize,
    /// [query_rank, hidden].
    query_down: Linear,
    query_norm: Norm,
    /// [heads × head, query_rank].
    query_up: Linear,
    /// [head, hidden].
    key: Linear,
    key_norm: Norm,
    /// By head.
    sinks: Vec<f32>,
    far: Far,
    output: GroupedOutput,
    scale: f32,
    epsilon: f32,
}

/// What it sees beyond the window.
#[derive(Debug)]
enum Far {
    Nothing,
    /// Heavily compressed attention.
    All(Box<Compressor>),
    /// Compressed sparse attention.
    Chosen(Box<Sparse>),
}

#[derive(Debug)]
struct Sparse {
    entries: Compressor,
    index: Compressor,
    indexer: Indexer,
}

/// The two rotations and, for the rows of one step, what they turn by.
#[derive(Debug)]
pub(crate) struct Turning<'a> {
    /// Of the layers without entries.
    pub(crate) main: Vec<Angles>,
    /// Of all others.
    pub(crate) compress: Vec<Angles>,
    /// Turns entries.
    pub(crate) rope: &'a Rope,
}

/// The step's contributions to entries and to index keys.
#[derive(Debug, Default)]
struct Contributed {
    entries: Option<Contributions>,
    index: Option<Contributions>,
}

impl Attention {
    /// Loads the attention of layer `layer`.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub(crate) fn load(source: &Source<'_>, config: &V4Config, layer: usize) -> Result<Self, ModelError> {
        let (shape, hidden, epsilon) = (&config.attention, config.hidden, config.epsilon);
        let prefix = format!("layers.{layer}.attn");
        let linear = |part: &str, rows, cols| source.linear(&format!("{prefix}.{part}.weight"), rows, cols);
        let norm = |part: &str, len| {
            let gain = source.vector(&format!("{prefix}.{part}.weight"), len)?;
            Ok::<_, ModelError>(Norm::new(gain, epsilon))
        };
        let compressor =
            |part: &str, shape| Compressor::load(source, &format!("{prefix}.{part}"), shape, hidden, epsilon);
        let far = match (config.layers[layer].reach, shape.index) {
            (Reach::Window, _) => Far::Nothing,
            (Reach::Heavy { ratio }, _) => {
                Far::All(Box::new(compressor("compressor", BlockShape::plain(ratio, shape.head))?))
            }
            (Reach::Sparse { ratio }, Some(index)) => Far::Chosen(Box::new(Sparse {
                entries: compressor("compressor", BlockShape::overlapping(ratio, shape.head))?,
                index: compressor("indexer.compressor", BlockShape::overlapping(ratio, index.head))?,
                indexer: Indexer::load(source, &format!("{prefix}.indexer"), index, config)?,
            })),
            (Reach::Sparse { .. }, None) => {
                return Err(ModelError::ConfigMissing { field: "index_head_dim".to_owned() });
            }
        };
        Ok(Self {
            head: shape.head,
            query_down: linear("wq_a", shape.query_rank, hidden)?,
            query_norm: norm("q_norm", shape.query_rank)?,
            query_up: linear("wq_b", shape.heads * shape.head, shape.query_rank)?,
            key: linear("wkv", shape.head, hidden)?,
            key_norm: norm("norm", shape.head)?,
            sinks: source.vector(&format!("{prefix}.attn_sink"), shape.heads)?,
            far,
            output: GroupedOutput::load(source, &prefix, config)?,
            scale: f32_near(1.0 / f64_of(shape.head).sqrt()),
            epsilon,
        })
    }

    /// Attention of the rows `x` ([T × hidden], the chunks one after another), which are added to layer `layer` of each
    /// chunk's cache. `ended` hears of each phase.
    ///
    /// # Errors
    /// Too little memory.
    pub(crate) fn forward(
        &self,
        layer: usize,
        x: &[f32],
        chunks: &mut [Chunk<'_, Cache>],
        turning: &Turning<'_>,
        ended: &dyn Fn(Phase),
    ) -> Result<Vec<f32>, StepError> {
        let rows = turning.main.len();
        let angles = if matches!(self.far, Far::Nothing) { &turning.main } else { &turning.compress };
        let mut latent = apply(&self.query_down, x, rows)?;
        self.query_norm.apply_in_place(&mut latent);
        let queries = apply(&self.query_up, &latent, rows)?;
        let mut keys = apply(&self.key, x, rows)?;
        self.key_norm.apply_in_place(&mut keys);
        keys.chunks_exact_mut(self.head).zip(angles).for_each(|(key, angles)| angles.turn_neighbours(key));
        ended(Phase::Projection);
        self.remember(layer, &keys, &self.contribute(x, rows)?, chunks, turning.rope);
        ended(Phase::Compression);
        let chosen = self.choose(layer, x, &latent, chunks, angles)?;
        ended(Phase::Index);
        let mixed = self.attend(layer, queries, chunks, angles, &chosen);
        for chunk in chunks.iter_mut() {
            chunk.cache.layer_mut(layer).window.forget();
        }
        ended(Phase::Attention);
        let out = self.output.forward(&mixed, rows)?;
        ended(Phase::Output);
        Ok(out)
    }

    fn contribute(&self, x: &[f32], rows: usize) -> Result<Contributed, StepError> {
        Ok(match &self.far {
            Far::Nothing => Contributed::default(),
            Far::All(entries) => Contributed { entries: Some(entries.contribute(x, rows)?), index: None },
            Far::Chosen(sparse) => Contributed {
                entries: Some(sparse.entries.contribute(x, rows)?),
                index: Some(sparse.index.contribute(x, rows)?),
            },
        })
    }

    /// Adds the step's keys and contributions to the caches of their sequences.
    fn remember(&self, layer: usize, keys: &[f32], new: &Contributed, chunks: &mut [Chunk<'_, Cache>], rope: &Rope) {
        let (entries, index) = match &self.far {
            Far::Nothing => (None, None),
            Far::All(entries) => (Some(&**entries), None),
            Far::Chosen(sparse) => (Some(&sparse.entries), Some(&sparse.index)),
        };
        let mut first = 0;
        for chunk in chunks.iter_mut() {
            let count = chunk.tokens.len();
            let cache = chunk.cache.layer_mut(layer);
            cache.window.append(&keys[first * self.head..(first + count) * self.head]);
            if let (Some(compressor), Some(new), Some(blocks)) = (entries, &new.entries, &mut cache.entries) {
                compressor.append(blocks, new, first, count, rope);
            }
            if let (Some(compressor), Some(new), Some(blocks)) = (index, &new.index, &mut cache.index) {
                compressor.append(blocks, new, first, count, rope);
            }
            first += count;
        }
    }

    /// The entries that each row sees; `None` = all that are closed before it.
    fn choose(
        &self,
        layer: usize,
        x: &[f32],
        latent: &[f32],
        chunks: &[Chunk<'_, Cache>],
        angles: &[Angles],
    ) -> Result<Vec<Option<Vec<u32>>>, StepError> {
        let Far::Chosen(sparse) = &self.far else { return Ok(vec![None; angles.len()]) };
        let mut asking = Vec::with_capacity(angles.len());
        for chunk in chunks {
            if let Some(keys) = &chunk.cache.layer(layer).index {
                let ratio = keys.shape.ratio;
                let rows = (chunk.start..).take(chunk.tokens.len());
                asking.extend(rows.map(|position| Asking { closed: (position + 1) / ratio, keys }));
            }
        }
        sparse.indexer.choose(x, latent, angles, &asking)
    }

    /// Outputs of all heads, [T × heads × head], turned back.
    fn attend(
        &self,
        layer: usize,
        mut queries: Vec<f32>,
        chunks: &[Chunk<'_, Cache>],
        angles: &[Angles],
        chosen: &[Option<Vec<u32>>],
    ) -> Vec<f32> {
        let mut seen = Vec::with_capacity(angles.len());
        for chunk in chunks {
            let rows = (chunk.start..).take(chunk.tokens.len());
            seen.extend(rows.map(|position| (position, chunk.cache.layer(layer))));
        }
        let keys: Vec<Vec<&[f32]>> = seen
            .iter()
            .zip(chosen)
            .map(|((position, cache), chosen)| {
                let mut keys: Vec<&[f32]> = cache.window.seen_from(*position).chunks_exact(self.head).collect();
                if let Some(blocks) = &cache.entries {
                    let closed = (position + 1) / blocks.shape.ratio;
                    let entry = |at: usize| &blocks.entries[at * self.head..][..self.head];
                    match chosen {
                        None => keys.extend((0..closed).map(entry)),
                        Some(chosen) => keys.extend(chosen.iter().map(|at| entry(usize_of(*at)))),
                    }
                }
                keys
            })
            .collect();
        let heads = self.sinks.len();
        queries.par_chunks_exact_mut(self.head).enumerate().for_each(|(index, query)| {
            let (row, head) = (index / heads, index % heads);
            self.attend_one(query, &keys[row], &angles[row], self.sinks[head]);
        });
        queries
    }

    /// One head of one query: `query` becomes its output, [head].
    fn attend_one(&self, query: &mut [f32], keys: &[&[f32]], angles: &Angles, sink: f32) {
        let scale = unit(query, self.epsilon);
        query.iter_mut().for_each(|value| *value *= scale);
        angles.turn_neighbours(query);
        let mut scores: Vec<f32> = keys.iter().map(|key| dot(query, key) * self.scale).collect();
        softmax_with_sink(&mut scores, sink);
        query.fill(0.0);
        for (score, key) in scores.iter().zip(keys) {
            add_scaled(query, *score, key);
        }
        angles.turn_neighbours_back(query);
    }
}
