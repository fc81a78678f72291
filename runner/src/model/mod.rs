//! One model, whole but for its routed experts: configuration, tokenizer, non-expert weights and their maths.
//!
//! Everything here is a pure function of tokens, weights and cache: no clock, no network. A row of activations never
//! depends on the other rows of its step, so batches, chunks and retries change no bit of a token
//! (`docs/decisions/0003-runner-maths.md`). Prompts and activations are never logged.
//!
//! A family is one file (`v3.rs`, `v4.rs`) on shared blocks: `norm`, `rope`, `linear`, `dense`, `experts`. What only one
//! family has lies with it.

pub(crate) mod chunk;
pub(crate) mod config;
mod dense;
mod experts;
mod family;
mod fields;
#[cfg(test)]
mod fuzz;
mod latent;
mod linear;
pub(crate) mod maths;
mod norm;
mod rope;
pub(crate) mod tokenizer;
mod v3;
mod v4;

use std::{path::Path, sync::Arc};

use berth_kernels::Checkpoint;
use berth_types::LayerId;

pub use self::chunk::Phase;
pub(crate) use self::family::Cache;
use self::{
    chunk::{Batches, Outside},
    family::Family,
    linear::Source,
    tokenizer::Text,
};
pub use crate::error::ModelError;
use crate::error::StepError;

/// A loaded model. Shared by everything that generates; never changes.
#[derive(Debug)]
pub struct Model {
    facts: Facts,
    family: Family,
    pub(crate) text: Text,
    checkpoint: Arc<Checkpoint>,
}

/// What everything outside the maths asks of a model, whatever its family.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    /// Token ids.
    pub(crate) vocab: usize,
    /// Longest sequence, in tokens.
    pub(crate) context: usize,
    /// Features of a layer's input.
    pub(crate) hidden: usize,
    /// Values of one row of what `forward` gives.
    pub(crate) width: usize,
    /// Inner width of one routed expert.
    pub(crate) expert_width: usize,
    /// Bound on a routed expert's gate and up.
    pub(crate) expert_limit: Option<f32>,
    /// Routed experts of each expert layer.
    pub(crate) experts: usize,
    /// Routed experts of each token.
    pub(crate) top_k: usize,
    /// Layers that have routed experts, in order.
    pub(crate) expert_layers: Vec<LayerId>,
    /// Token put before a prompt, if the model has one.
    pub(crate) bos: Option<u32>,
    /// Tokens that end a sequence.
    pub(crate) eos: Vec<u32>,
}

impl Model {
    /// Loads configuration, tokenizer and every tensor but the routed experts from `checkpoint`, whose folder is `dir`.
    ///
    /// # Errors
    /// The first field, tensor or file that is missing, malformed, not supported or too large for memory, with the remedy.
    pub fn load(checkpoint: Arc<Checkpoint>, dir: &Path) -> Result<Arc<Self>, ModelError> {
        let config = family::Config::read(checkpoint.config_json())?;
        let facts = config.facts();
        let text = Text::load(dir, facts.bos, facts.vocab)?;
        let family = Family::load(&Source(&checkpoint), config)?;
        Ok(Arc::new(Self { facts, family, text, checkpoint }))
    }

    /// Identity of the weights, `sha256:…`. The first call reads the whole checkpoint.
    #[must_use]
    pub fn digest(&self) -> &str {
        self.checkpoint.digest()
    }

    /// Longest sequence, prompt and generated tokens together.
    #[must_use]
    pub fn context(&self) -> usize {
        self.facts.context
    }

    /// Number of token ids.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.facts.vocab
    }

    /// Features of a layer's input, and of what routed experts take and give.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.facts.hidden
    }

    /// Inner width of one routed expert.
    #[must_use]
    pub fn expert_width(&self) -> usize {
        self.facts.expert_width
    }

    /// Bound on the gate (from above) and up (both ways) of a routed expert, `swiglu_limit`.
    #[must_use]
    pub fn expert_limit(&self) -> Option<f32> {
        self.facts.expert_limit
    }

    /// Routed experts of each expert layer.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.facts.experts
    }

    /// Layers that have routed experts, in order.
    #[must_use]
    pub fn expert_layers(&self) -> Vec<LayerId> {
        self.facts.expert_layers.clone()
    }

    /// Bytes that attention remembers at most of a sequence of `tokens` tokens.
    #[must_use]
    pub fn cache_bytes(&self, tokens: usize) -> u64 {
        self.family.cache_bytes(tokens)
    }

    /// Whether `id` ends a sequence.
    #[must_use]
    pub fn ends(&self, id: u32) -> bool {
        self.facts.eos.contains(&id)
    }

    /// Token ids of a prompt, the model's first token included.
    ///
    /// # Errors
    /// A text that the tokenizer cannot turn into tokens that the model knows.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        self.text.encode(text)
    }

    /// Text of `ids`, special tokens left out.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        self.text.decode(ids)
    }

    /// Routed experts of each token.
    pub(crate) fn top_k(&self) -> usize {
        self.facts.top_k
    }

    /// Values of one row that [`Model::forward`] gives.
    pub(crate) fn width(&self) -> usize {
        self.facts.width
    }

    /// An empty cache for a sequence of at most `tokens` tokens.
    pub(crate) fn new_cache(&self, tokens: usize) -> Cache {
        self.family.new_cache(tokens)
    }

    /// Runs the batches through all layers, by turns: [tokens of all chunks × width].
    ///
    /// # Errors
    /// What routed experts give, and what the layers' maths gives.
    pub(crate) fn forward(
        &self,
        batches: Batches<'_, Cache>,
        outside: &mut Outside<'_>,
    ) -> Result<Vec<f32>, StepError> {
        self.family.forward(batches, outside)
    }

    /// Logits of `rows` rows of what `forward` gave, [rows × vocab].
    ///
    /// # Errors
    /// Too little memory.
    pub(crate) fn logits(&self, x: &[f32], rows: usize) -> Result<Vec<f32>, StepError> {
        self.family.logits(x, rows)
    }
}
