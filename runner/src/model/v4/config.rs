//! `config.json` of the V4 family, in its first published form (`compress_ratios`, `num_hash_layers`, `rope_scaling`) and
//! in the current one (`layer_types`, `mlp_layer_types`, `rope_parameters` with `main` and `compress`).
//!
//! Parsed once and strictly: what is missing, malformed or not implemented is refused here by field name, so that
//! nothing later has to guess. Where both forms are there, the current one counts, and they must not contradict.

use berth_kernels::Scoring;
use serde_json::Value;

use super::super::{
    ModelError,
    fields::Fields,
    rope::{RopeConfig, Yarn},
};
use crate::num::{f32_near, f64_of};

/// A model of the V4 family. Widths are features, counts are plain numbers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct V4Config {
    /// Token ids.
    pub(crate) vocab: usize,
    /// Longest sequence, in tokens.
    pub(crate) context: usize,
    /// One residual stream.
    pub(crate) hidden: usize,
    /// By layer.
    pub(crate) layers: Vec<LayerConfig>,
    /// Attention's shape, the same in every layer.
    pub(crate) attention: AttentionConfig,
    /// Residual streams.
    pub(crate) streams: StreamsConfig,
    /// Expert layers' shape.
    pub(crate) experts: ExpertsConfig,
    /// `ε` of every norm.
    pub(crate) epsilon: f32,
    /// Whether the output matrix is the embedding.
    pub(crate) tied: bool,
    /// Token put before a prompt, if the model has one.
    pub(crate) bos: Option<u32>,
    /// Tokens that end a sequence.
    pub(crate) eos: Vec<u32>,
}

/// What differs between layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LayerConfig {
    /// What attention sees beyond the window.
    pub(crate) reach: Reach,
    /// Whether experts are chosen by a table of token ids.
    pub(crate) hash: bool,
}

/// What a layer's attention sees beyond its window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Nothing.
    Window,
    /// The best entries of `ratio` tokens each (CSA).
    Sparse {
        /// Tokens per entry, `m`.
        ratio: usize,
    },
    /// All entries of `ratio` tokens each (HCA).
    Heavy {
        /// Tokens per entry, `m'`.
        ratio: usize,
    },
}

/// Shape of attention.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AttentionConfig {
    /// Heads of queries; keys and values have one.
    pub(crate) heads: usize,
    /// Features of a head, of a key, and of a value: `c`.
    pub(crate) head: usize,
    /// Rank of query compression.
    pub(crate) query_rank: usize,
    /// Tokens that a query sees uncompressed, itself counted.
    pub(crate) window: usize,
    /// Groups that heads are divided into before the output.
    pub(crate) groups: usize,
    /// Features of each group's part of the output.
    pub(crate) group_rank: usize,
    /// Rotation in layers that see a window only.
    pub(crate) main: RopeConfig,
    /// Rotation in all others.
    pub(crate) compress: RopeConfig,
    /// The indexer, where a layer has one.
    pub(crate) index: Option<IndexConfig>,
}

/// Shape of the indexer of sparse layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IndexConfig {
    /// Heads of queries.
    pub(crate) heads: usize,
    /// Features of a head and of a key.
    pub(crate) head: usize,
    /// Entries that a query sees at most.
    pub(crate) top_k: usize,
}

/// Shape of the residual streams.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct StreamsConfig {
    /// How many, `n_hc`.
    pub(crate) count: usize,
    /// Rounds of Sinkhorn and Knopp.
    pub(crate) rounds: usize,
    /// Floor of their divisors.
    pub(crate) epsilon: f32,
}

/// Shape of an expert layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ExpertsConfig {
    /// Routed experts; one shared expert is beside them.
    pub(crate) routed: usize,
    /// Inner width of one expert.
    pub(crate) width: usize,
    /// Routed experts per token.
    pub(crate) top_k: usize,
    /// From logit to score.
    pub(crate) scoring: Scoring,
    /// Multiplies every weight.
    pub(crate) scaling: f32,
    /// Bound on gate and up, `swiglu_limit`.
    pub(crate) limit: f32,
}

const WINDOW: &str = "sliding_attention";
const SPARSE: &str = "compressed_sparse_attention";
const HEAVY: &str = "heavily_compressed_attention";
/// The compression ratio that means sparse attention where only ratios are given (published V4 configs).
const SPARSE_RATIO: usize = 4;

impl V4Config {
    /// Reads a configuration.
    ///
    /// # Errors
    /// The first field that is missing, malformed or not supported.
    pub(crate) fn read(value: &Value) -> Result<Self, ModelError> {
        let fields = Fields::new(value)?;
        supported(&fields)?;
        let vocab = fields.size("vocab_size")?;
        let context = fields.size("max_position_embeddings")?;
        let layers = read_layers(&fields)?;
        let known = |field, ids: Vec<u32>| {
            let known = ids.iter().all(|id| usize::try_from(*id).is_ok_and(|id| id < vocab));
            if known { Ok(ids) } else { Err(fields.refuse(field, "token ids below vocab_size")) }
        };
        let sparse = layers.iter().any(|layer| matches!(layer.reach, Reach::Sparse { .. }));
        Ok(Self {
            vocab,
            context,
            hidden: fields.size("hidden_size")?,
            attention: AttentionConfig::read(&fields, context, sparse)?,
            streams: StreamsConfig {
                count: fields.size("hc_mult")?,
                rounds: fields.size("hc_sinkhorn_iters")?,
                epsilon: f32_near(fields.positive("hc_eps")?),
            },
            experts: ExpertsConfig::read(&fields)?,
            layers,
            epsilon: f32_near(fields.positive("rms_norm_eps")?),
            tied: fields.flag("tie_word_embeddings", false)?,
            bos: known("bos_token_id", fields.tokens("bos_token_id")?)?.first().copied(),
            eos: known("eos_token_id", fields.tokens("eos_token_id")?)?,
        })
    }
}

fn read_layers(fields: &Fields<'_>) -> Result<Vec<LayerConfig>, ModelError> {
    let count = fields.size("num_hidden_layers")?;
    let hash = read_hash(fields, count)?;
    let rates = fields.object("compress_rates")?;
    let rate = |kind: &str, legacy: &str| match (fields.size_or_none(legacy, 1)?, &rates) {
        (Some(rate), _) => Ok(Some(rate)),
        (None, Some(rates)) => rates.size_or_none(kind, 1),
        (None, None) => Ok(None),
    };
    let (sparse, heavy) = (rate(SPARSE, "compress_rate_csa")?, rate(HEAVY, "compress_rate_hca")?);
    let of_ratio = |ratio: &usize| match *ratio {
        0 => Reach::Window,
        SPARSE_RATIO => Reach::Sparse { ratio: sparse.unwrap_or(SPARSE_RATIO) },
        ratio => Reach::Heavy { ratio: heavy.unwrap_or(ratio) },
    };
    let ratios = fields.sizes("compress_ratios")?.map(|ratios| ratios.iter().map(of_ratio).collect::<Vec<_>>());
    let types = match fields.texts("layer_types")? {
        None => None,
        Some(types) => {
            let rate_of = |rate: Option<usize>| rate.ok_or_else(|| fields.missing("compress_rates"));
            let reach = |kind: &&str| match *kind {
                WINDOW => Ok(Reach::Window),
                SPARSE => Ok(Reach::Sparse { ratio: rate_of(sparse)? }),
                HEAVY => Ok(Reach::Heavy { ratio: rate_of(heavy)? }),
                _ => Err(fields.refuse("layer_types", "sliding, compressed_sparse and heavily_compressed attention")),
            };
            Some(types.iter().map(reach).collect::<Result<Vec<_>, _>>()?)
        }
    };
    // Layers beyond the last are those of multi-token prediction, which is not served.
    let (field, all) = match (&types, &ratios) {
        (Some(types), Some(ratios)) if types.iter().zip(ratios).any(|(a, b)| a != b) => {
            return Err(fields.refuse("compress_ratios", "what layer_types says, or nothing"));
        }
        (Some(types), _) => ("layer_types", types),
        (None, Some(ratios)) => ("compress_ratios", ratios),
        (None, None) => return Err(fields.missing("layer_types")),
    };
    if all.len() < count {
        return Err(fields.refuse(field, "one entry for each of num_hidden_layers"));
    }
    Ok(all.iter().zip(hash).map(|(reach, hash)| LayerConfig { reach: *reach, hash }).collect())
}

/// Which layers route by a table.
fn read_hash(fields: &Fields<'_>, count: usize) -> Result<Vec<bool>, ModelError> {
    let Some(types) = fields.texts("mlp_layer_types")? else {
        let hashed = fields.size_or_none("num_hash_layers", 0)?.ok_or_else(|| fields.missing("mlp_layer_types"))?;
        return Ok((0..count).map(|layer| layer < hashed).collect());
    };
    if types.len() < count {
        return Err(fields.refuse("mlp_layer_types", "one entry for each of num_hidden_layers"));
    }
    let hash = |kind: &&str| match *kind {
        "hash_moe" => Ok(true),
        "moe" => Ok(false),
        _ => Err(fields.refuse("mlp_layer_types", "hash_moe and moe")),
    };
    types[..count].iter().map(hash).collect()
}

impl AttentionConfig {
    fn read(fields: &Fields<'_>, context: usize, sparse: bool) -> Result<Self, ModelError> {
        let heads = fields.size("num_attention_heads")?;
        if fields.size_or_none("num_key_value_heads", 1)?.is_some_and(|heads| heads != 1) {
            return Err(fields.refuse("num_key_value_heads", "1"));
        }
        let head = fields.size("head_dim")?;
        let groups = fields.size("o_groups")?;
        if !heads.is_multiple_of(groups) {
            return Err(fields.refuse("o_groups", "a divisor of num_attention_heads"));
        }
        let turned = read_turned(fields, head)?;
        let (main, compress) = read_ropes(fields, head, turned, context)?;
        let index = if sparse { Some(IndexConfig::read(fields, turned)?) } else { None };
        Ok(Self {
            heads,
            head,
            query_rank: fields.size("q_lora_rank")?,
            window: fields.size("sliding_window")?,
            groups,
            group_rank: fields.size("o_lora_rank")?,
            main,
            compress,
            index,
        })
    }
}

impl IndexConfig {
    fn read(fields: &Fields<'_>, turned: usize) -> Result<Self, ModelError> {
        let head = fields.size("index_head_dim")?;
        if head < turned {
            return Err(fields.refuse("index_head_dim", "at least qk_rope_head_dim"));
        }
        Ok(Self { heads: fields.size("index_n_heads")?, head, top_k: fields.size("index_topk")? })
    }
}

/// Features at the end of a head that turn: `qk_rope_head_dim`, or `partial_rotary_factor` of `head_dim`.
fn read_turned(fields: &Fields<'_>, head: usize) -> Result<usize, ModelError> {
    let named = fields.size_or_none("qk_rope_head_dim", 2)?;
    let share = fields.number_or_none("partial_rotary_factor")?;
    let turned = match (named, share) {
        (Some(named), Some(share)) if !is_share(named, head, share) => {
            return Err(fields.refuse("partial_rotary_factor", "qk_rope_head_dim / head_dim, or nothing"));
        }
        (Some(named), _) => named,
        (None, Some(share)) => (2..=head)
            .step_by(2)
            .find(|turned| is_share(*turned, head, share))
            .ok_or_else(|| fields.refuse("partial_rotary_factor", "an even number of features / head_dim"))?,
        (None, None) => return Err(fields.missing("qk_rope_head_dim")),
    };
    if !turned.is_multiple_of(2) || turned > head {
        return Err(fields.refuse("qk_rope_head_dim", "an even number, at most head_dim"));
    }
    Ok(turned)
}

fn is_share(turned: usize, head: usize, share: f64) -> bool {
    (f64_of(head) * share - f64_of(turned)).abs() < 0.5
}

/// The main and the compressed rotation.
fn read_ropes(
    fields: &Fields<'_>,
    head: usize,
    turned: usize,
    context: usize,
) -> Result<(RopeConfig, RopeConfig), ModelError> {
    let theta = |fields: &Fields<'_>, field: &str| match fields.positive(field)? {
        theta if theta > 1.0 => Ok(theta),
        _ => Err(fields.refuse(field, "a number above 1")),
    };
    let rope = |theta, yarn| RopeConfig { theta, width: turned, interleaved: true, yarn };
    let parameters = fields.object("rope_parameters")?;
    if let Some(parameters) = &parameters {
        let main = parameters.nested("main", "rope_parameters.main")?;
        let compress = parameters.nested("compress", "rope_parameters.compress")?;
        if let (Some(main), Some(compress)) = (main, compress) {
            let one = |fields: &Fields<'_>| {
                let share = fields.number_or_none("partial_rotary_factor")?;
                if share.is_some_and(|share| !is_share(turned, head, share)) {
                    return Err(fields.refuse("partial_rotary_factor", "qk_rope_head_dim / head_dim"));
                }
                Ok(rope(theta(fields, "rope_theta")?, Yarn::read(fields, context)?))
            };
            return Ok((one(&main)?, one(&compress)?));
        }
    }
    // The first published form has one set of numbers, for the compressed rotation alone, and its code never applies
    // YaRN's amplitude.
    let flat = match parameters {
        Some(parameters) => Some(parameters),
        None => fields.object("rope_scaling")?,
    };
    let yarn = flat.map(|fields| Yarn::read(&fields, context)).transpose()?.flatten();
    let yarn = yarn.map(|yarn| Yarn { attention_factor: yarn.attention_factor.or(Some(1.0)), ..yarn });
    Ok((rope(theta(fields, "rope_theta")?, None), rope(theta(fields, "compress_rope_theta")?, yarn)))
}

impl ExpertsConfig {
    fn read(fields: &Fields<'_>) -> Result<Self, ModelError> {
        let routed = fields.size("n_routed_experts")?;
        let top_k = fields.size("num_experts_per_tok")?;
        if top_k > routed {
            return Err(fields.refuse("num_experts_per_tok", "at most n_routed_experts"));
        }
        let scoring = match fields.text("scoring_func")? {
            None | Some("sqrtsoftplus") => Scoring::SqrtSoftplus,
            Some("sigmoid") => Scoring::Sigmoid,
            Some("softmax") => Scoring::Softmax,
            Some(_) => return Err(fields.refuse("scoring_func", "sqrtsoftplus, sigmoid or softmax")),
        };
        Ok(Self {
            routed,
            width: fields.size("moe_intermediate_size")?,
            top_k,
            scoring,
            scaling: f32_near(fields.positive("routed_scaling_factor")?),
            limit: f32_near(fields.positive("swiglu_limit")?),
        })
    }
}

/// Refuses what would be computed wrongly.
fn supported(fields: &Fields<'_>) -> Result<(), ModelError> {
    match fields.text("model_type")? {
        Some("deepseek_v4") => {}
        Some(_) => return Err(fields.refuse("model_type", "deepseek_v4")),
        None => return Err(fields.missing("model_type")),
    }
    fields.only("hidden_act", "silu")?;
    fields.only("topk_method", "noaux_tc")?;
    for field in ["attention_bias", "mlp_bias"] {
        if fields.flag(field, false)? {
            return Err(fields.refuse(field, "false"));
        }
    }
    if !fields.flag("norm_topk_prob", true)? {
        return Err(fields.refuse("norm_topk_prob", "true"));
    }
    for field in ["n_shared_experts", "n_group", "topk_group"] {
        if fields.size_or_none(field, 0)?.is_some_and(|count| count != 1) {
            return Err(fields.refuse(field, "1"));
        }
    }
    let expert_dtype = |fields: &Fields<'_>| match fields.text("expert_dtype")? {
        None | Some("fp4" | "fp8" | "bf16" | "bfloat16") => Ok(()),
        Some(_) => Err(fields.refuse("expert_dtype", "fp4, fp8 or bf16")),
    };
    expert_dtype(fields)?;
    if let Some(quantisation) = fields.object("quantization_config")? {
        quantisation.only("quant_method", "fp8")?;
        expert_dtype(&quantisation)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// The current form.
    fn current() -> Value {
        let mut config = json!({"model_type": "deepseek_v4", "vocab_size": 40, "max_position_embeddings": 64, "hidden_size": 32,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
            "qk_rope_head_dim": 4, "partial_rotary_factor": 0.25, "q_lora_rank": 24, "sliding_window": 8,
            "o_groups": 2, "o_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4,
            "layer_types": [WINDOW, SPARSE, HEAVY], "compress_rates": {SPARSE: 4, HEAVY: 16}});
        let rest = json!({"mlp_layer_types": ["hash_moe", "moe", "moe"], "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
            "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
            "norm_topk_prob": true, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
            "rms_norm_eps": 1e-6, "rope_parameters": {"main": {"rope_theta": 10000.0, "rope_type": "default",
            "partial_rotary_factor": 0.25}, "compress": {"rope_theta": 160_000.0, "rope_type": "yarn", "factor": 16.0,
            "original_max_position_embeddings": 32, "attention_factor": 1.0, "beta_fast": 32, "beta_slow": 1,
            "partial_rotary_factor": 0.25}}, "hidden_act": "silu", "attention_bias": false, "bos_token_id": 0,
            "eos_token_id": 1, "expert_dtype": "fp4"});
        config.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        config
    }

    /// The same model in the first published form.
    fn legacy() -> Value {
        let mut config = current();
        let fields = config.as_object_mut().unwrap();
        for field in ["layer_types", "compress_rates", "mlp_layer_types", "partial_rotary_factor", "rope_parameters"] {
            fields.remove(field);
        }
        fields.extend(
            json!({"compress_ratios": [0, 4, 16, 0], "num_hash_layers": 1, "rope_theta": 10000,
            "compress_rope_theta": 160_000, "topk_method": "noaux_tc", "quantization_config": {"quant_method": "fp8"},
            "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 32, "beta_fast": 32,
            "beta_slow": 1}})
            .as_object()
            .unwrap()
            .clone(),
        );
        config
    }

    #[test]
    fn both_forms_give_the_same_model() {
        let read = V4Config::read(&current()).unwrap();
        assert_eq!(read, V4Config::read(&legacy()).unwrap());
        let reach: Vec<Reach> = read.layers.iter().map(|layer| layer.reach).collect();
        assert_eq!(reach, [Reach::Window, Reach::Sparse { ratio: 4 }, Reach::Heavy { ratio: 16 }]);
        assert_eq!(read.layers.iter().map(|layer| layer.hash).collect::<Vec<_>>(), [true, false, false]);
        assert_eq!(read.attention.compress.yarn.unwrap().attention_factor, Some(1.0));
        assert_eq!(read.attention.main.yarn, None);
    }

    #[test]
    fn every_damaged_field_is_refused_by_name() {
        for (field, value) in [
            ("model_type", json!("deepseek_v41")),
            ("vocab_size", json!(0)),
            ("max_position_embeddings", Value::Null),
            ("hidden_size", json!("wide")),
            ("num_hidden_layers", json!(-3)),
            ("num_attention_heads", json!(0)),
            ("num_key_value_heads", json!(2)),
            ("head_dim", Value::Null),
            ("qk_rope_head_dim", json!(5)),
            ("partial_rotary_factor", json!(0.5)),
            ("q_lora_rank", Value::Null),
            ("sliding_window", json!(0)),
            ("o_groups", json!(3)),
            ("o_lora_rank", json!(true)),
            ("index_n_heads", Value::Null),
            ("index_head_dim", json!(2)),
            ("index_topk", json!(0)),
            ("layer_types", json!([WINDOW, SPARSE])),
            ("layer_types", json!([WINDOW, "linear_attention", HEAVY])),
            ("layer_types", json!([0, 4, 128])),
            ("layer_types", Value::Null),
            ("compress_rates", json!({SPARSE: 0, HEAVY: 16})),
            ("compress_rates", json!([4, 128])),
            ("compress_rates", json!({SPARSE: 4})),
            ("compress_ratios", json!([4, 4, 16])),
            ("compress_ratios", json!("4")),
            ("mlp_layer_types", json!(["hash_moe", "dense", "moe"])),
            ("mlp_layer_types", json!(["moe"])),
            ("mlp_layer_types", Value::Null),
            ("hc_mult", json!(0)),
            ("hc_sinkhorn_iters", json!(0)),
            ("hc_eps", json!(-1)),
            ("n_routed_experts", json!(1)),
            ("n_shared_experts", json!(2)),
            ("moe_intermediate_size", Value::Null),
            ("num_experts_per_tok", json!(9)),
            ("norm_topk_prob", json!(false)),
            ("scoring_func", json!("tanh")),
            ("routed_scaling_factor", json!("1.5")),
            ("swiglu_limit", Value::Null),
            ("swiglu_limit", json!(0)),
            ("rms_norm_eps", json!(0)),
            ("rope_parameters", json!("yarn")),
            ("rope_parameters", json!({"main": {"rope_theta": 1e4}, "compress": {"rope_theta": 0.5}})),
            ("hidden_act", json!("gelu")),
            ("attention_bias", json!(true)),
            ("mlp_bias", json!(true)),
            ("n_group", json!(8)),
            ("topk_method", json!("greedy")),
            ("tie_word_embeddings", json!("no")),
            ("bos_token_id", json!(40)),
            ("eos_token_id", json!([1, -2])),
            ("expert_dtype", json!("int3")),
            ("quantization_config", json!({"quant_method": "awq"})),
            ("quantization_config", json!({"quant_method": "fp8", "expert_dtype": "nf4"})),
        ] {
            let mut config = current();
            config[field] = value.clone();
            let error = V4Config::read(&config).expect_err(&format!("{field} = {value}")).to_string();
            let told = if field == "n_routed_experts" { "num_experts_per_tok" } else { field };
            assert!(error.contains(told), "{field} = {value}: {error}");
        }
    }

    #[test]
    fn the_first_form_needs_its_own_fields() {
        for field in ["compress_ratios", "num_hash_layers", "rope_theta", "compress_rope_theta"] {
            let mut config = legacy();
            config.as_object_mut().unwrap().remove(field);
            let error = V4Config::read(&config).unwrap_err().to_string();
            let current = match field {
                "compress_ratios" => "layer_types",
                "num_hash_layers" => "mlp_layer_types",
                field => field,
            };
            assert!(error.contains(current), "{field}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_number_in_any_field_is_read_or_refused_cleanly(field in 0_usize..60, value in -3_i64..40) {
            for mut config in [current(), legacy()] {
                let fields = config.as_object_mut().unwrap();
                let name = fields.keys().nth(field % fields.len()).unwrap().clone();
                fields.insert(name, json!(value));
                if let Ok(read) = V4Config::read(&config) {
                    prop_assert!(read.experts.top_k <= read.experts.routed && read.attention.head >= read.attention.main.width);
                }
            }
        }
    }
}
