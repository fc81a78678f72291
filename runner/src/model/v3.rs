//! The V3 family (arXiv 2412.19437): embedding, layers of attention and feed-forward around one residual stream, and
//! the output matrix, under the published tensor names.
//!
//! ```text
//! x ← embed(token)
//! per layer:   x ← x + attention(norm₁ x)
//!              h = norm₂ x;   x ← x + dense(h)                              the first layers
//!                             x ← x + Σ wᵢ·expertᵢ(h) + shared(h)           all others (eq. 12–16)
//! logits = head(norm x)
//! ```

use berth_kernels::{Linear, Router, Scoring, StoredMatrix};

use super::{
    chunk::{Batches, Chunk, Outside, Phase, Rows, with_rows},
    config::V3Config,
    dense::Dense,
    experts::{Choice, ExpertLayer, Underway},
    latent::{attention::Attention, cache::Cache},
    linear::{Source, apply, embed},
    maths::add,
    norm::Norm,
    rope::{Angles, Rope},
};
use crate::{
    error::{ModelError, StepError},
    num::usize_of,
};

/// A loaded model.
#[derive(Debug)]
pub(crate) struct V3 {
    pub(crate) config: V3Config,
    embedding: StoredMatrix,
    rope: Rope,
    layers: Vec<Layer>,
    norm: Norm,
    head: Linear,
}

#[derive(Debug)]
struct Layer {
    before_attention: Norm,
    attention: Attention,
    before_feed: Norm,
    feed: Feed,
}

#[derive(Debug)]
enum Feed {
    Dense(Dense),
    Experts(ExpertLayer),
}

/// A batch on its way through the layers.
struct Batch<'a> {
    chunks: Vec<Chunk<'a, Cache>>,
    rows: Rows,
    angles: Vec<Angles>,
    /// The residual stream, [rows × hidden].
    x: Vec<f32>,
    /// The last layer's experts, whose output `x` still lacks.
    underway: Option<Underway>,
}

impl Batch<'_> {
    fn settle(&mut self, ended: &dyn Fn(Phase)) -> Result<(), StepError> {
        if let Some(underway) = self.underway.take() {
            add(&mut self.x, &underway.finish(ended)?);
        }
        Ok(())
    }
}

impl V3 {
    /// Loads everything but the routed experts.
    ///
    /// # Errors
    /// A tensor that is missing, has another shape or does not fit memory.
    pub(crate) fn load(source: &Source<'_>, config: V3Config) -> Result<Self, ModelError> {
        let embedding = source.matrix("model.embed_tokens.weight", config.vocab, config.hidden)?;
        let head = if config.tied {
            Linear::from_stored(&embedding)
                .map_err(|source| ModelError::Pack { tensor: "model.embed_tokens.weight".to_owned(), source })?
        } else {
            source.linear("lm_head.weight", config.vocab, config.hidden)?
        };
        Ok(Self {
            embedding,
            rope: Rope::new(&config.attention.rope),
            layers: (0..config.layers).map(|layer| Layer::load(source, &config, layer)).collect::<Result<_, _>>()?,
            norm: Norm::new(source.vector("model.norm.weight", config.hidden)?, config.epsilon),
            head,
            config,
        })
    }

    /// An empty cache for one sequence.
    pub(crate) fn new_cache(&self) -> Cache {
        Cache::of(self.config.layers, &self.config.attention)
    }

    /// Runs the batches through all layers, by turns: the residual stream, [tokens of all chunks × hidden].
    ///
    /// # Errors
    /// What routed experts give, and what the layers' maths gives.
    pub(crate) fn forward(
        &self,
        batches: Batches<'_, Cache>,
        outside: &mut Outside<'_>,
    ) -> Result<Vec<f32>, StepError> {
        let mut batches: Vec<_> =
            with_rows(batches).into_iter().map(|(chunks, rows)| self.begin(chunks, rows)).collect();
        (outside.ended)(Phase::Embedding);
        for (index, layer) in self.layers.iter().enumerate() {
            for batch in &mut batches {
                batch.settle(outside.ended)?;
                let h = layer.before_attention.apply(&batch.x);
                let chunks = &mut batch.chunks;
                let attended = layer.attention.forward(index, &h, chunks, &batch.angles, outside.ended)?;
                add(&mut batch.x, &attended);
                let h = layer.before_feed.apply(&batch.x);
                match &layer.feed {
                    Feed::Dense(dense) => {
                        add(&mut batch.x, &dense.forward(&h, batch.rows.len())?);
                        (outside.ended)(Phase::Dense);
                    }
                    Feed::Experts(experts) => {
                        batch.underway = Some(experts.begin(index, &h, &batch.rows, outside)?);
                    }
                }
            }
        }
        let mut x = Vec::new();
        for mut batch in batches {
            batch.settle(outside.ended)?;
            x.append(&mut batch.x);
        }
        Ok(x)
    }

    fn begin<'a>(&self, chunks: Vec<Chunk<'a, Cache>>, rows: Rows) -> Batch<'a> {
        let mut x = Vec::with_capacity(rows.len() * self.config.hidden);
        for token in &rows.tokens {
            embed(&self.embedding, usize_of(*token), &mut x);
        }
        let angles = rows.positions.iter().map(|position| self.rope.angles(*position)).collect();
        Batch { chunks, rows, angles, x, underway: None }
    }

    /// Logits of `rows` rows of the residual stream, [rows × vocab].
    ///
    /// # Errors
    /// Too little memory.
    pub(crate) fn logits(&self, x: &[f32], rows: usize) -> Result<Vec<f32>, StepError> {
        apply(&self.head, &self.norm.apply(x), rows)
    }
}

impl Layer {
    fn load(source: &Source<'_>, config: &V3Config, layer: usize) -> Result<Self, ModelError> {
        let prefix = format!("model.layers.{layer}");
        let norm = |name: &str| {
            let gain = source.vector(&format!("{prefix}.{name}.weight"), config.hidden)?;
            Ok::<_, ModelError>(Norm::new(gain, config.epsilon))
        };
        let feed = if layer < config.dense_layers {
            let shape = (config.hidden, config.dense_width);
            Feed::Dense(Dense::load(source, &format!("{prefix}.mlp"), Dense::V3, shape, None)?)
        } else {
            Feed::Experts(load_experts(source, &format!("{prefix}.mlp"), config)?)
        };
        Ok(Self {
            before_attention: norm("input_layernorm")?,
            attention: Attention::load(source, &format!("{prefix}.self_attn"), &config.attention, config.hidden)?,
            before_feed: norm("post_attention_layernorm")?,
            feed,
        })
    }
}

fn load_experts(source: &Source<'_>, prefix: &str, config: &V3Config) -> Result<ExpertLayer, ModelError> {
    let shape = &config.experts;
    let shared = match shape.shared {
        0 => None,
        count => {
            let sizes = (config.hidden, count * shape.width);
            Some(Dense::load(source, &format!("{prefix}.shared_experts"), Dense::V3, sizes, None)?)
        }
    };
    Ok(ExpertLayer {
        gate: source.linear(&format!("{prefix}.gate.weight"), shape.routed, config.hidden)?,
        choice: Choice::Bias(source.vector(&format!("{prefix}.gate.e_score_correction_bias"), shape.routed)?),
        router: Router {
            scoring: Scoring::Sigmoid,
            top_k: shape.top_k,
            groups: shape.groups,
            groups_kept: shape.groups_kept,
            renormalise: shape.renormalise,
            scaling: shape.scaling,
        },
        shared,
    })
}
