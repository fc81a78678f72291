//! Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434, eq. 9–19, kept by V3).
//!
//! Keys and values of all heads come from one latent row `c` per token (`kv_lora_rank` wide) and one rotary key `r`
//! shared by the heads. The cache holds `(c, r)`. Attention runs on them directly ("absorbed", the paper's remark after
//! eq. 19): with head `h`'s key and value matrices `Wk`, `Wv`,
//!
//! ```text
//! score(p) = scale · ( (Wkᵀ q) · c[p] + rope(q') · r[p] )      out = Wv · Σ_p softmax(score)[p] · c[p]
//! ```
//!
//! One query is one fixed sequence of sums over the positions before it, so prefill, decoding and any batch give
//! the same bits. Prefill costs more multiplications than expanding the keys would; it buys that equality.

use berth_kernels::Linear;
use rayon::prelude::*;

use super::cache::Cache;
use crate::{
    error::{ModelError, StepError},
    model::{
        chunk::{Chunk, Phase},
        config::AttentionConfig,
        linear::{Source, apply},
        maths::{add_scaled, dot, softmax},
        norm::Norm,
        rope::Angles,
    },
    num::{f32_near, f64_of},
};

/// `ε` of the norms inside attention, whatever `rms_norm_eps` says (published V3 code).
const EPSILON: f32 = 1e-6;

/// One layer's attention.
#[derive(Debug)]
pub(crate) struct Attention {
    shape: AttentionConfig,
    query: Query,
    /// Hidden to `(c, r)`: [kv_rank + rope, hidden].
    compress: Linear,
    norm: Norm,
    /// `Wk` and `Wv` by head: [heads × (plain + value), kv_rank], expanded to `f32`.
    expand: Vec<f32>,
    /// [hidden, heads × value].
    output: Linear,
    scale: f32,
}

/// How queries are made.
#[derive(Debug)]
enum Query {
    /// [heads × (plain + rope), hidden].
    Direct(Linear),
    /// Through a normalised latent of `q_lora_rank` features.
    Compressed { down: Linear, norm: Norm, up: Linear },
}

impl Attention {
    /// Loads the attention of the layer under `prefix` (`model.layers.N.self_attn`).
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub(crate) fn load(
        source: &Source<'_>,
        prefix: &str,
        shape: &AttentionConfig,
        hidden: usize,
    ) -> Result<Self, ModelError> {
        let name = |part: &str| format!("{prefix}.{part}.weight");
        let head = shape.plain + shape.rope.width;
        let queries = shape.heads * head;
        let query = match shape.query_rank {
            None => Query::Direct(source.linear(&name("q_proj"), queries, hidden)?),
            Some(rank) => Query::Compressed {
                down: source.linear(&name("q_a_proj"), rank, hidden)?,
                norm: Norm::new(source.vector(&name("q_a_layernorm"), rank)?, EPSILON),
                up: source.linear(&name("q_b_proj"), queries, rank)?,
            },
        };
        let expanded = shape.heads * (shape.plain + shape.value);
        Ok(Self {
            query,
            compress: source.linear(&name("kv_a_proj_with_mqa"), shape.kv_rank + shape.rope.width, hidden)?,
            norm: Norm::new(source.vector(&name("kv_a_layernorm"), shape.kv_rank)?, EPSILON),
            expand: source.matrix(&name("kv_b_proj"), expanded, shape.kv_rank)?.dequantise(),
            output: source.linear(&name("o_proj"), hidden, shape.heads * shape.value)?,
            scale: f32_near(shape.rope.score_scale() / f64_of(head).sqrt()),
            shape: shape.clone(),
        })
    }

    /// Attention of the rows `x` ([T × hidden], the chunks one after another), whose keys are appended to layer
    /// `layer` of each chunk's cache. `angles` has one entry per row, `ended`
    /// hears of each phase.
    ///
    /// # Errors
    /// Too little memory.
    pub(crate) fn forward(
        &self,
        layer: usize,
        x: &[f32],
        chunks: &mut [Chunk<'_, Cache>],
        angles: &[Angles],
        ended: &dyn Fn(Phase),
    ) -> Result<Vec<f32>, StepError> {
        let rows = angles.len();
        let queries = self.queries(x, rows)?;
        self.remember(layer, x, chunks, angles)?;
        ended(Phase::Projection);
        let mut owners = Vec::with_capacity(rows);
        for chunk in chunks.iter() {
            owners.extend((chunk.start..).take(chunk.tokens.len()).map(|position| (position, &*chunk.cache)));
        }
        let head = self.shape.plain + self.shape.rope.width;
        let mut mixed = vec![0.0; rows * self.shape.heads * self.shape.value];
        mixed.par_chunks_exact_mut(self.shape.value).zip(queries.par_chunks_exact(head)).enumerate().for_each(
            |(index, (out, query))| {
                let (row, h) = (index / self.shape.heads, index % self.shape.heads);
                let (position, cache) = owners[row];
                let keys = &cache.layer(layer)[..(position + 1) * cache.width()];
                self.attend(h, query, &angles[row], keys, out);
            },
        );
        ended(Phase::Attention);
        let out = apply(&self.output, &mixed, rows)?;
        ended(Phase::Output);
        Ok(out)
    }

    /// Queries of all heads, [T × heads × (plain + rope)], not yet turned.
    fn queries(&self, x: &[f32], rows: usize) -> Result<Vec<f32>, StepError> {
        match &self.query {
            Query::Direct(query) => apply(query, x, rows),
            Query::Compressed { down, norm, up } => {
                let mut latent = apply(down, x, rows)?;
                norm.apply_in_place(&mut latent);
                apply(up, &latent, rows)
            }
        }
    }

    /// Appends `(norm(c), rope(r))` of every row to its sequence's cache.
    fn remember(
        &self,
        layer: usize,
        x: &[f32],
        chunks: &mut [Chunk<'_, Cache>],
        angles: &[Angles],
    ) -> Result<(), StepError> {
        let mut latent = apply(&self.compress, x, angles.len())?;
        let width = self.shape.kv_rank + self.shape.rope.width;
        let mut turned = vec![0.0; self.shape.rope.width];
        for (row, angles) in latent.chunks_exact_mut(width).zip(angles) {
            let (c, r) = row.split_at_mut(self.norm.width());
            self.norm.apply_in_place(c);
            angles.turn(r, &mut turned);
            r.copy_from_slice(&turned);
        }
        let mut rest = latent.as_slice();
        for chunk in chunks.iter_mut() {
            let (own, others) = rest.split_at(chunk.tokens.len() * width);
            let rows = chunk.cache.layer_mut(layer);
            rows.truncate(chunk.start * width);
            rows.extend_from_slice(own);
            rest = others;
        }
        Ok(())
    }

    /// One head of one query over `keys` ([positions × (kv_rank + rope)]) into `out` ([value]).
    fn attend(&self, head: usize, query: &[f32], angles: &Angles, keys: &[f32], out: &mut [f32]) {
        let (rank, plain) = (self.shape.kv_rank, self.shape.plain);
        let per_head = (plain + self.shape.value) * rank;
        let (wk, wv) = self.expand[head * per_head..][..per_head].split_at(plain * rank);
        let (unturned, with_position) = query.split_at(plain);
        let mut absorbed = vec![0.0; rank + with_position.len()];
        let (latent, turned) = absorbed.split_at_mut(rank);
        for (q, row) in unturned.iter().zip(wk.chunks_exact(rank)) {
            add_scaled(latent, *q, row);
        }
        angles.turn(with_position, turned);
        let width = absorbed.len();
        let mut scores: Vec<f32> = keys.chunks_exact(width).map(|key| dot(&absorbed, key) * self.scale).collect();
        softmax(&mut scores);
        let mut mix = vec![0.0; rank];
        for (score, key) in scores.iter().zip(keys.chunks_exact(width)) {
            add_scaled(&mut mix, *score, &key[..rank]);
        }
        for (out, row) in out.iter_mut().zip(wv.chunks_exact(rank)) {
            *out = dot(row, &mix);
        }
    }
}

impl Cache {
    /// An empty cache for `layers` layers of this attention.
    pub(crate) fn of(layers: usize, shape: &AttentionConfig) -> Self {
        Self::new(layers, shape.kv_rank + shape.rope.width)
    }
}
