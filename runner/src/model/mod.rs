//! One model, whole but for its routed experts: configuration, tokenizer, non-expert weights and their maths.
//!
//! Everything here is a pure function of tokens, weights and cache: no clock, no network. A row of activations never
//! depends on the other rows of its step, so batches, chunks and retries change no bit of a token
//! (`docs/decisions/0003-runner-maths.md`). Prompts and activations are never logged.
//!
//! A family is one file (`v3.rs`) on shared blocks: `norm`, `rope`, `linear`, `dense`, `attention`.

mod attention;
pub(crate) mod cache;
pub(crate) mod config;
mod dense;
mod fields;
mod linear;
pub(crate) mod maths;
mod norm;
mod rope;
pub(crate) mod tokenizer;
pub(crate) mod v3;

use std::{path::Path, sync::Arc};

use berth_kernels::Checkpoint;
use berth_types::LayerId;

use self::{config::V3Config, linear::Source, tokenizer::Text, v3::V3};
pub use crate::error::ModelError;
use crate::num::{u32_of, u64_of};

/// A loaded model. Shared by everything that generates; never changes.
#[derive(Debug)]
pub struct Model {
    pub(crate) v3: V3,
    pub(crate) text: Text,
    checkpoint: Arc<Checkpoint>,
}

impl Model {
    /// Loads configuration, tokenizer and every tensor but the routed experts from `checkpoint`, whose folder is `dir`.
    ///
    /// # Errors
    /// The first field, tensor or file that is missing, malformed, not supported or too large for memory, with the remedy.
    pub fn load(checkpoint: Arc<Checkpoint>, dir: &Path) -> Result<Arc<Self>, ModelError> {
        let config = V3Config::read(checkpoint.config_json())?;
        let text = Text::load(dir, config.bos, config.vocab)?;
        let v3 = V3::load(&Source(&checkpoint), config)?;
        Ok(Arc::new(Self { v3, text, checkpoint }))
    }

    /// Identity of the weights, `sha256:…`. The first call reads the whole checkpoint.
    #[must_use]
    pub fn digest(&self) -> &str {
        self.checkpoint.digest()
    }

    /// Longest sequence, prompt and generated tokens together.
    #[must_use]
    pub fn context(&self) -> usize {
        self.v3.config.context
    }

    /// Number of token ids.
    #[must_use]
    pub fn vocab(&self) -> usize {
        self.v3.config.vocab
    }

    /// Features of the residual stream.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.v3.config.hidden
    }

    /// Inner width of one routed expert.
    #[must_use]
    pub fn expert_width(&self) -> usize {
        self.v3.config.experts.width
    }

    /// Routed experts of each expert layer.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.v3.config.experts.routed
    }

    /// Layers that have routed experts, in order.
    #[must_use]
    pub fn expert_layers(&self) -> Vec<LayerId> {
        (self.v3.config.dense_layers..self.v3.config.layers).map(|layer| LayerId(u32_of(layer))).collect()
    }

    /// Bytes that attention remembers per token of a sequence: layers × (`kv_lora_rank` + `qk_rope_head_dim`) × 4.
    #[must_use]
    pub fn cache_bytes_per_token(&self) -> u64 {
        let attention = &self.v3.config.attention;
        u64_of(self.v3.config.layers * (attention.kv_rank + attention.rope.width) * size_of::<f32>())
    }

    /// Whether `id` ends a sequence.
    #[must_use]
    pub fn ends(&self, id: u32) -> bool {
        self.v3.config.eos.contains(&id)
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
}
