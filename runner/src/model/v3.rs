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
//!
//! Routed experts are computed elsewhere: a layer's calls are started, the shared expert is computed meanwhile, then
//! the answers are awaited. Nothing here knows where they come from.

use berth_kernels::{Linear, Router, Scoring, StoredMatrix};

use super::{
    attention::Attention,
    cache::Cache,
    config::V3Config,
    dense::Dense,
    linear::{Source, apply},
    maths::add,
    norm::Norm,
    rope::Rope,
};
use crate::{
    error::{ModelError, StepError},
    experts::{LayerCall, Pending},
    num::{u32_of, usize_of},
};

/// Consecutive tokens of one sequence that a step computes.
#[derive(Debug)]
pub(crate) struct Chunk<'a> {
    /// Their ids; at least one.
    pub(crate) tokens: &'a [u32],
    /// Position of the first.
    pub(crate) start: usize,
    /// The sequence's cache; holds the positions before `start`.
    pub(crate) cache: &'a mut Cache,
    /// Tells the sequence from others when replicas are chosen; the same in every batch.
    pub(crate) salt: u64,
}

/// Starts the routed experts of one layer.
pub(crate) type StartExperts<'a> = dyn FnMut(&LayerCall<'_>) -> Result<Pending, StepError> + 'a;

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
    Experts(Experts),
}

/// The part of an expert layer that every runner computes itself.
#[derive(Debug)]
struct Experts {
    /// [experts, hidden].
    gate: Linear,
    /// Added to scores for choosing only.
    bias: Vec<f32>,
    router: Router,
    shared: Option<Dense>,
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

    /// Runs the chunks through all layers: the residual stream, [tokens of all chunks × hidden].
    ///
    /// # Errors
    /// What `start` gives, and what the layers' maths gives.
    pub(crate) fn forward(
        &self,
        chunks: &mut [Chunk<'_>],
        start: &mut StartExperts<'_>,
    ) -> Result<Vec<f32>, StepError> {
        let mut x = Vec::new();
        let (mut angles, mut spread) = (Vec::new(), Vec::new());
        for chunk in chunks.iter() {
            for (position, token) in (chunk.start..).zip(chunk.tokens) {
                self.embed(usize_of(*token), &mut x);
                angles.push(self.rope.angles(position));
                spread.push(chunk.salt.wrapping_add(crate::num::u64_of(position)));
            }
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let attended = layer.attention.forward(index, &layer.before_attention.apply(&x), chunks, &angles)?;
            add(&mut x, &attended);
            let h = layer.before_feed.apply(&x);
            match &layer.feed {
                Feed::Dense(dense) => add(&mut x, &dense.forward(&h, angles.len())?),
                Feed::Experts(experts) => add(&mut x, &experts.forward(index, &h, &spread, start)?),
            }
        }
        Ok(x)
    }

    /// Logits of `rows` rows of the residual stream, [rows × vocab].
    ///
    /// # Errors
    /// Too little memory.
    pub(crate) fn logits(&self, x: &[f32], rows: usize) -> Result<Vec<f32>, StepError> {
        apply(&self.head, &self.norm.apply(x), rows)
    }

    fn embed(&self, token: usize, x: &mut Vec<f32>) {
        let value = |col| self.embedding.code_at(token, col) * self.embedding.scale_at(token, col);
        x.extend((0..self.config.hidden).map(value));
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
            Feed::Dense(Dense::load(source, &format!("{prefix}.mlp"), config.hidden, config.dense_width)?)
        } else {
            Feed::Experts(Experts::load(source, &format!("{prefix}.mlp"), config)?)
        };
        Ok(Self {
            before_attention: norm("input_layernorm")?,
            attention: Attention::load(source, &format!("{prefix}.self_attn"), &config.attention, config.hidden)?,
            before_feed: norm("post_attention_layernorm")?,
            feed,
        })
    }
}

impl Experts {
    fn load(source: &Source<'_>, prefix: &str, config: &V3Config) -> Result<Self, ModelError> {
        let shape = &config.experts;
        let shared = match shape.shared {
            0 => None,
            count => {
                let width = count * shape.width;
                Some(Dense::load(source, &format!("{prefix}.shared_experts"), config.hidden, width)?)
            }
        };
        Ok(Self {
            gate: source.linear(&format!("{prefix}.gate.weight"), shape.routed, config.hidden)?,
            bias: source.vector(&format!("{prefix}.gate.e_score_correction_bias"), shape.routed)?,
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

    /// Routed plus shared experts of `h` ([T × hidden]).
    fn forward(
        &self,
        layer: usize,
        h: &[f32],
        spread: &[u64],
        start: &mut StartExperts<'_>,
    ) -> Result<Vec<f32>, StepError> {
        let rows = spread.len();
        let logits = apply(&self.gate, h, rows)?;
        let (mut experts, mut weights) = (Vec::new(), Vec::new());
        self.router.route(&logits, Some(&self.bias), None, &mut experts, &mut weights)?;
        let call = LayerCall {
            layer: berth_types::LayerId(u32_of(layer)),
            hidden: h.len() / rows.max(1),
            rows: h,
            top_k: self.router.top_k,
            experts: &experts,
            weights: &weights,
            spread,
        };
        let pending = start(&call)?;
        let shared = self.shared.as_ref().map(|shared| shared.forward(h, rows)).transpose()?;
        let mut out = pending.wait()?;
        if let Some(shared) = shared {
            add(&mut out, &shared);
        }
        Ok(out)
    }
}
