//! The families of models that are served, as one thing. A family is added here and nowhere else.

use berth_types::LayerId;
use serde_json::Value;

use super::{
    Facts, ModelError,
    chunk::{Batches, Chunk, Outside},
    config::V3Config,
    fields::Fields,
    latent::cache::Cache as LatentCache,
    linear::Source,
    v3::V3,
    v4::{V4, cache::Cache as V4Cache, config::V4Config},
};
use crate::{
    error::StepError,
    num::{u32_of, u64_of},
};

/// A configuration, by family.
#[derive(Debug)]
pub(crate) enum Config {
    /// `deepseek_v3`.
    V3(V3Config),
    /// `deepseek_v4`.
    V4(V4Config),
}

impl Config {
    /// Reads a `config.json`; `model_type` says which family.
    ///
    /// # Errors
    /// The first field that is missing, malformed or not supported.
    pub(crate) fn read(value: &Value) -> Result<Self, ModelError> {
        let fields = Fields::new(value)?;
        match fields.text("model_type")? {
            Some("deepseek_v3") => V3Config::read(value).map(Self::V3),
            Some("deepseek_v4") => V4Config::read(value).map(Self::V4),
            Some(_) => Err(fields.refuse("model_type", "deepseek_v3 or deepseek_v4")),
            None => Err(ModelError::ConfigMissing { field: "model_type".to_owned() }),
        }
    }

    /// What everything outside the maths asks.
    pub(crate) fn facts(&self) -> Facts {
        let layers = |from: usize, to: usize| (from..to).map(|layer| LayerId(u32_of(layer))).collect();
        match self {
            Self::V3(config) => Facts {
                vocab: config.vocab,
                context: config.context,
                hidden: config.hidden,
                width: config.hidden,
                expert_width: config.experts.width,
                expert_limit: None,
                experts: config.experts.routed,
                top_k: config.experts.top_k,
                expert_layers: layers(config.dense_layers, config.layers),
                bos: config.bos,
                eos: config.eos.clone(),
            },
            Self::V4(config) => Facts {
                vocab: config.vocab,
                context: config.context,
                hidden: config.hidden,
                width: config.streams.count * config.hidden,
                expert_width: config.experts.width,
                expert_limit: Some(config.experts.limit),
                experts: config.experts.routed,
                top_k: config.experts.top_k,
                expert_layers: layers(0, config.layers.len()),
                bos: config.bos,
                eos: config.eos.clone(),
            },
        }
    }
}

/// What attention remembers of one sequence, by family. Never shared between sequences; dropping it frees it.
#[derive(Debug)]
pub(crate) enum Cache {
    /// Latent rows.
    V3(LatentCache),
    /// Windows and compressed entries.
    V4(V4Cache),
}

impl Cache {
    fn latent(&mut self) -> Option<&mut LatentCache> {
        if let Self::V3(cache) = self { Some(cache) } else { None }
    }

    fn v4(&mut self) -> Option<&mut V4Cache> {
        if let Self::V4(cache) = self { Some(cache) } else { None }
    }
}

/// A loaded model of one family.
#[derive(Debug)]
pub(crate) enum Family {
    /// `deepseek_v3`.
    V3(Box<V3>),
    /// `deepseek_v4`.
    V4(Box<V4>),
}

impl Family {
    /// Loads everything but the routed experts.
    ///
    /// # Errors
    /// A tensor that is missing, has another shape or does not fit memory.
    pub(crate) fn load(source: &Source<'_>, config: Config) -> Result<Self, ModelError> {
        match config {
            Config::V3(config) => Ok(Self::V3(Box::new(V3::load(source, config)?))),
            Config::V4(config) => Ok(Self::V4(Box::new(V4::load(source, config)?))),
        }
    }

    /// Bytes of cache of a sequence of `tokens` tokens, at most.
    pub(crate) fn cache_bytes(&self, tokens: usize) -> u64 {
        match self {
            Self::V3(v3) => u64_of(tokens).saturating_mul(v3.config.cache_bytes_per_token()),
            Self::V4(v4) => v4.shape().bytes(tokens),
        }
    }

    /// An empty cache for a sequence of at most `tokens` tokens.
    pub(crate) fn new_cache(&self, tokens: usize) -> Cache {
        match self {
            Self::V3(v3) => Cache::V3(v3.new_cache()),
            Self::V4(v4) => Cache::V4(V4Cache::new(v4.shape(), tokens)),
        }
    }

    /// Runs the batches through all layers.
    ///
    /// # Errors
    /// What routed experts and the layers' maths give; `Foreign` for a cache that another model made.
    pub(crate) fn forward(
        &self,
        batches: Batches<'_, Cache>,
        outside: &mut Outside<'_>,
    ) -> Result<Vec<f32>, StepError> {
        match self {
            Self::V3(v3) => v3.forward(owned(batches, Cache::latent)?, outside),
            Self::V4(v4) => v4.forward(owned(batches, Cache::v4)?, outside),
        }
    }

    /// Logits of `rows` rows of what `forward` gave.
    ///
    /// # Errors
    /// Too little memory.
    pub(crate) fn logits(&self, x: &[f32], rows: usize) -> Result<Vec<f32>, StepError> {
        match self {
            Self::V3(v3) => v3.logits(x, rows),
            Self::V4(v4) => v4.logits(x, rows),
        }
    }
}

/// The batches with the caches of one family.
fn owned<'a, C>(
    batches: Batches<'a, Cache>,
    own: impl Fn(&'a mut Cache) -> Option<&'a mut C>,
) -> Result<Batches<'a, C>, StepError> {
    let chunk = |chunk: Chunk<'a, Cache>| {
        let Chunk { tokens, start, cache, salt } = chunk;
        Ok(Chunk { tokens, start, cache: own(cache).ok_or(StepError::Foreign)?, salt })
    };
    batches.into_iter().map(|chunks| chunks.into_iter().map(&chunk).collect()).collect()
}
