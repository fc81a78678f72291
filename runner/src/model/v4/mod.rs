//! The V4 family (DeepSeek-V4's paper and published configurations), under the published tensor names:
//!
//! ```text
//! X ← embed(token), once for each of n streams
//! per layer:   x, mix = read(X)     X ← mix(X, attention(norm x))          hyper-connections, §2.2; attention, §2.3
//!              x, mix = read(X)     X ← mix(X, experts(norm x))            routed and shared experts, §2.1
//! logits = head(norm(read X))
//! ```
//!
//! | file | part |
//! |---|---|
//! | `streams` | hyper-connections with Sinkhorn's mixing |
//! | `attention` | queries, keys that are values, sinks, the window |
//! | `compressor`, `index`, `ties` | blocks of tokens as entries; which entries a query sees |
//! | `output` | the grouped output projection |
//! | `cache` | what is remembered, and its bytes |
//!
//! Every layer has experts: the first ones choose them by a table of token ids (`tid2eid`), all others by
//! `sqrt(softplus)` scores and a bias. The bound `swiglu_limit` holds for routed and shared experts alike, as in
//! `transformers`; the first published inference code bounds routed ones only.

mod attention;
pub(crate) mod cache;
mod compressor;
pub(crate) mod config;
mod index;
mod output;
mod streams;
mod ties;

use berth_kernels::{Linear, Router, StoredMatrix};

use self::{
    attention::{Attention, Turning},
    cache::{Cache, CacheShape},
    config::V4Config,
    streams::{HyperConnection, Mix, StreamsHead},
};
use super::{
    chunk::{Batches, Chunk, Outside, Phase, Rows, with_rows},
    dense::Dense,
    experts::{Choice, ExpertLayer, Underway},
    linear::{Source, apply, embed},
    norm::Norm,
    rope::Rope,
};
use crate::{
    error::{ModelError, StepError},
    num::usize_of,
};

/// A loaded model.
#[derive(Debug)]
pub(crate) struct V4 {
    config: V4Config,
    shape: CacheShape,
    embedding: StoredMatrix,
    main: Rope,
    compress: Rope,
    layers: Vec<Layer>,
    read: StreamsHead,
    norm: Norm,
    head: Linear,
}

#[derive(Debug)]
struct Layer {
    around_attention: HyperConnection,
    before_attention: Norm,
    attention: Attention,
    around_experts: HyperConnection,
    before_experts: Norm,
    experts: ExpertLayer,
}

/// A batch on its way through the layers.
struct Batch<'a> {
    chunks: Vec<Chunk<'a, Cache>>,
    rows: Rows,
    turning: Turning<'a>,
    /// The streams, [rows × n · hidden].
    x: Vec<f32>,
    /// The last layer's experts, whose output the streams still lack.
    underway: Option<(Underway, &'a HyperConnection, Mix)>,
}

impl Batch<'_> {
    fn settle(&mut self, ended: &dyn Fn(Phase)) -> Result<(), StepError> {
        if let Some((underway, connection, mix)) = self.underway.take() {
            connection.leave(&mut self.x, &underway.finish(ended)?, &mix);
            ended(Phase::Streams);
        }
        Ok(())
    }
}

impl V4 {
    /// Loads everything but the routed experts.
    ///
    /// # Errors
    /// A tensor that is missing, has another shape or does not fit memory.
    pub(crate) fn load(source: &Source<'_>, config: V4Config) -> Result<Self, ModelError> {
        let embedding = source.matrix("embed.weight", config.vocab, config.hidden)?;
        let head = if config.tied {
            Linear::from_stored(&embedding)
                .map_err(|source| ModelError::Pack { tensor: "embed.weight".to_owned(), source })?
        } else {
            source.linear("head.weight", config.vocab, config.hidden)?
        };
        Ok(Self {
            shape: CacheShape::of(&config),
            embedding,
            main: Rope::new(&config.attention.main),
            compress: Rope::new(&config.attention.compress),
            layers: (0..config.layers.len())
                .map(|layer| Layer::load(source, &config, layer))
                .collect::<Result<_, _>>()?,
            read: StreamsHead::load(source, &config)?,
            norm: Norm::new(source.vector("norm.weight", config.hidden)?, config.epsilon),
            head,
            config,
        })
    }

    /// What its caches look like.
    pub(crate) fn shape(&self) -> &CacheShape {
        &self.shape
    }

    /// Runs the batches through all layers, by turns: the streams, [tokens of all chunks × n · hidden].
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
                let (mut h, mix) = layer.around_attention.enter(&batch.x, batch.rows.len())?;
                layer.before_attention.apply_in_place(&mut h);
                (outside.ended)(Phase::Streams);
                let out = layer.attention.forward(index, &h, &mut batch.chunks, &batch.turning, outside.ended)?;
                layer.around_attention.leave(&mut batch.x, &out, &mix);
                let (mut h, mix) = layer.around_experts.enter(&batch.x, batch.rows.len())?;
                layer.before_experts.apply_in_place(&mut h);
                (outside.ended)(Phase::Streams);
                let underway = layer.experts.begin(index, &h, &batch.rows, outside)?;
                batch.underway = Some((underway, &layer.around_experts, mix));
            }
        }
        let mut x = Vec::new();
        for mut batch in batches {
            batch.settle(outside.ended)?;
            x.append(&mut batch.x);
        }
        Ok(x)
    }

    fn begin<'a>(&'a self, chunks: Vec<Chunk<'a, Cache>>, rows: Rows) -> Batch<'a> {
        let mut x = Vec::with_capacity(rows.len() * self.config.streams.count * self.config.hidden);
        for token in &rows.tokens {
            for _ in 0..self.config.streams.count {
                embed(&self.embedding, usize_of(*token), &mut x);
            }
        }
        let angles = |rope: &Rope| rows.positions.iter().map(|position| rope.angles(*position)).collect();
        let turning = Turning { main: angles(&self.main), compress: angles(&self.compress), rope: &self.compress };
        Batch { chunks, rows, turning, x, underway: None }
    }

    /// Logits of `rows` rows of the streams, [rows × vocab].
    ///
    /// # Errors
    /// Too little memory.
    pub(crate) fn logits(&self, x: &[f32], rows: usize) -> Result<Vec<f32>, StepError> {
        if rows == 0 {
            return Ok(Vec::new());
        }
        let mut x = self.read.collapse(x, rows)?;
        self.norm.apply_in_place(&mut x);
        apply(&self.head, &x, rows)
    }
}

impl Layer {
    fn load(source: &Source<'_>, config: &V4Config, layer: usize) -> Result<Self, ModelError> {
        let prefix = format!("layers.{layer}");
        let norm = |name: &str| {
            let gain = source.vector(&format!("{prefix}.{name}.weight"), config.hidden)?;
            Ok::<_, ModelError>(Norm::new(gain, config.epsilon))
        };
        Ok(Self {
            around_attention: HyperConnection::load(source, &format!("{prefix}.hc_attn"), config)?,
            before_attention: norm("attn_norm")?,
            attention: Attention::load(source, config, layer)?,
            around_experts: HyperConnection::load(source, &format!("{prefix}.hc_ffn"), config)?,
            before_experts: norm("ffn_norm")?,
            experts: load_experts(source, &format!("{prefix}.ffn"), config, config.layers[layer].hash)?,
        })
    }
}

fn load_experts(source: &Source<'_>, prefix: &str, config: &V4Config, hash: bool) -> Result<ExpertLayer, ModelError> {
    let shape = config.experts;
    let choice = if hash {
        let table = source.table(&format!("{prefix}.gate.tid2eid"), config.vocab, shape.top_k, shape.routed)?;
        Choice::Table(table)
    } else {
        Choice::Bias(source.vector(&format!("{prefix}.gate.bias"), shape.routed)?)
    };
    let sizes = (config.hidden, shape.width);
    let shared = Dense::load(source, &format!("{prefix}.shared_experts"), Dense::V4, sizes, Some(shape.limit))?;
    Ok(ExpertLayer {
        gate: source.linear(&format!("{prefix}.gate.weight"), shape.routed, config.hidden)?,
        choice,
        router: Router {
            scoring: shape.scoring,
            top_k: shape.top_k,
            groups: 0,
            groups_kept: 0,
            renormalise: true,
            scaling: shape.scaling,
        },
        shared: Some(shared),
    })
}
