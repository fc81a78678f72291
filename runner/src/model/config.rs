//! `config.json` of the V3 family, parsed once and strictly: what is missing, malformed or not implemented is
//! refused here by field name, so that nothing later has to guess.

use serde_json::Value;

use super::{ModelError, fields::Fields, rope::RopeConfig};
use crate::num::{f32_near, u64_of};

/// A model of the V3 family. Widths are features, counts are plain numbers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct V3Config {
    /// Token ids.
    pub(crate) vocab: usize,
    /// Longest sequence, in tokens.
    pub(crate) context: usize,
    /// Residual stream.
    pub(crate) hidden: usize,
    /// Layers, dense ones counted.
    pub(crate) layers: usize,
    /// Leading layers without experts.
    pub(crate) dense_layers: usize,
    /// Inner width of dense layers; 0 if there are none.
    pub(crate) dense_width: usize,
    /// Attention's shape.
    pub(crate) attention: AttentionConfig,
    /// Expert layers' shape.
    pub(crate) experts: ExpertsConfig,
    /// `ε` of the two norms of a layer and of the last one.
    pub(crate) epsilon: f32,
    /// Whether the output matrix is the embedding.
    pub(crate) tied: bool,
    /// Token put before a prompt, if the model has one.
    pub(crate) bos: Option<u32>,
    /// Tokens that end a sequence.
    pub(crate) eos: Vec<u32>,
}

/// Shape of MLA.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AttentionConfig {
    /// Heads.
    pub(crate) heads: usize,
    /// Rank of query compression, if queries are compressed.
    pub(crate) query_rank: Option<usize>,
    /// Rank of key-value compression.
    pub(crate) kv_rank: usize,
    /// Features of a head without position.
    pub(crate) plain: usize,
    /// Features of a head's value.
    pub(crate) value: usize,
    /// Features of a head with position, and how they turn.
    pub(crate) rope: RopeConfig,
}

/// Shape of an expert layer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ExpertsConfig {
    /// Routed experts.
    pub(crate) routed: usize,
    /// Experts that every token passes through, stored as one of that many times the width; 0 = none.
    pub(crate) shared: usize,
    /// Inner width of one expert.
    pub(crate) width: usize,
    /// Routed experts per token.
    pub(crate) top_k: usize,
    /// Groups of routed experts.
    pub(crate) groups: usize,
    /// Groups a token may choose from.
    pub(crate) groups_kept: usize,
    /// Whether weights are divided by their sum.
    pub(crate) renormalise: bool,
    /// Multiplies every weight.
    pub(crate) scaling: f32,
}

impl V3Config {
    /// Reads a configuration.
    ///
    /// # Errors
    /// The first field that is missing, malformed or not supported.
    pub(crate) fn read(value: &Value) -> Result<Self, ModelError> {
        let fields = Fields::new(value)?;
        supported(&fields)?;
        let context = fields.size("max_position_embeddings")?;
        let layers = fields.size("num_hidden_layers")?;
        let dense_layers = fields
            .size_or_none("first_k_dense_replace", 0)?
            .ok_or_else(|| ModelError::ConfigMissing { field: "first_k_dense_replace".to_owned() })?
            .min(layers);
        let vocab = fields.size("vocab_size")?;
        let known = |field, ids: Vec<u32>| {
            let known = ids.iter().all(|id| usize::try_from(*id).is_ok_and(|id| id < vocab));
            if known { Ok(ids) } else { Err(fields.refuse(field, "token ids below vocab_size")) }
        };
        Ok(Self {
            vocab,
            context,
            hidden: fields.size("hidden_size")?,
            layers,
            dense_layers,
            dense_width: if dense_layers == 0 { 0 } else { fields.size("intermediate_size")? },
            attention: AttentionConfig::read(&fields, context)?,
            experts: ExpertsConfig::read(&fields)?,
            epsilon: f32_near(fields.positive("rms_norm_eps")?),
            tied: fields.flag("tie_word_embeddings", false)?,
            bos: known("bos_token_id", fields.tokens("bos_token_id")?)?.first().copied(),
            eos: known("eos_token_id", fields.tokens("eos_token_id")?)?,
        })
    }
}

impl V3Config {
    /// Bytes that attention remembers per token of a sequence: layers × (`kv_lora_rank` + `qk_rope_head_dim`) × 4.
    pub(crate) fn cache_bytes_per_token(&self) -> u64 {
        u64_of(self.layers * (self.attention.kv_rank + self.attention.rope.width) * size_of::<f32>())
    }
}

impl AttentionConfig {
    fn read(fields: &Fields<'_>, context: usize) -> Result<Self, ModelError> {
        let heads = fields.size("num_attention_heads")?;
        if fields.size_or_none("num_key_value_heads", 1)?.is_some_and(|shared| shared != heads) {
            return Err(fields.refuse("num_key_value_heads", "as many as num_attention_heads"));
        }
        Ok(Self {
            heads,
            query_rank: fields.size_or_none("q_lora_rank", 1)?,
            kv_rank: fields.size("kv_lora_rank")?,
            plain: fields.size("qk_nope_head_dim")?,
            value: fields.size("v_head_dim")?,
            rope: RopeConfig::read(fields, fields.size("qk_rope_head_dim")?, context)?,
        })
    }
}

impl ExpertsConfig {
    fn read(fields: &Fields<'_>) -> Result<Self, ModelError> {
        let routed = fields.size("n_routed_experts")?;
        let groups = fields.size_or_none("n_group", 1)?.unwrap_or(1);
        if !routed.is_multiple_of(groups) {
            return Err(fields.refuse("n_group", "a divisor of n_routed_experts"));
        }
        let groups_kept = fields.size_or_none("topk_group", 1)?.unwrap_or(groups);
        if groups_kept > groups {
            return Err(fields.refuse("topk_group", "at most n_group"));
        }
        let top_k = fields.size("num_experts_per_tok")?;
        if top_k > groups_kept * (routed / groups) {
            return Err(fields.refuse("num_experts_per_tok", "at most the experts of topk_group groups"));
        }
        let scaling = fields.number_or_none("routed_scaling_factor")?.unwrap_or(1.0);
        Ok(Self {
            routed,
            shared: fields.size_or_none("n_shared_experts", 0)?.unwrap_or(0),
            width: fields.size("moe_intermediate_size")?,
            top_k,
            groups,
            groups_kept,
            renormalise: fields.flag("norm_topk_prob", true)?,
            scaling: f32_near(scaling),
        })
    }
}

/// Refuses what would be computed wrongly.
fn supported(fields: &Fields<'_>) -> Result<(), ModelError> {
    match fields.text("model_type")? {
        Some("deepseek_v3") => {}
        Some(_) => return Err(fields.refuse("model_type", "deepseek_v3")),
        None => return Err(ModelError::ConfigMissing { field: "model_type".to_owned() }),
    }
    fields.only("hidden_act", "silu")?;
    fields.only("scoring_func", "sigmoid")?;
    fields.only("topk_method", "noaux_tc")?;
    if fields.flag("attention_bias", false)? {
        return Err(fields.refuse("attention_bias", "false"));
    }
    if fields.size_or_none("moe_layer_freq", 1)?.is_some_and(|every| every != 1) {
        return Err(fields.refuse("moe_layer_freq", "1"));
    }
    if let Some(quantisation) = fields.object("quantization_config")? {
        quantisation.only("quant_method", "fp8")?;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    pub(crate) fn tiny() -> Value {
        json!({"model_type": "deepseek_v3", "vocab_size": 40, "max_position_embeddings": 64, "hidden_size": 32,
            "num_hidden_layers": 3, "first_k_dense_replace": 1, "intermediate_size": 48, "num_attention_heads": 2,
            "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
            "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
            "n_group": 4, "topk_group": 2, "norm_topk_prob": true, "routed_scaling_factor": 2.5,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "bos_token_id": 0, "eos_token_id": 1})
    }

    #[test]
    fn every_damaged_field_is_refused_by_name() {
        for (field, value) in [
            ("model_type", json!("deepseek_v4")),
            ("model_type", Value::Null),
            ("vocab_size", json!(0)),
            ("max_position_embeddings", json!("long")),
            ("hidden_size", Value::Null),
            ("hidden_size", json!(-64)),
            ("hidden_size", json!(1_u64 << 60)),
            ("num_hidden_layers", json!(3.5)),
            ("first_k_dense_replace", Value::Null),
            ("intermediate_size", json!([48])),
            ("num_attention_heads", json!(0)),
            ("num_key_value_heads", json!(1)),
            ("q_lora_rank", json!(0)),
            ("kv_lora_rank", Value::Null),
            ("qk_nope_head_dim", json!(null)),
            ("qk_rope_head_dim", json!(7)),
            ("v_head_dim", json!({})),
            ("n_routed_experts", json!(true)),
            ("n_shared_experts", json!(-1)),
            ("moe_intermediate_size", Value::Null),
            ("num_experts_per_tok", json!(5)),
            ("n_group", json!(3)),
            ("topk_group", json!(9)),
            ("norm_topk_prob", json!("yes")),
            ("routed_scaling_factor", json!("2.5")),
            ("rms_norm_eps", json!(0)),
            ("rope_theta", Value::Null),
            ("rope_scaling", json!("yarn")),
            ("rope_interleave", json!(1)),
            ("attention_bias", json!(true)),
            ("hidden_act", json!("gelu")),
            ("scoring_func", json!("softmax")),
            ("topk_method", json!("greedy")),
            ("moe_layer_freq", json!(2)),
            ("tie_word_embeddings", json!("no")),
            ("bos_token_id", json!(40)),
            ("eos_token_id", json!([1, -2])),
            ("quantization_config", json!({"quant_method": "awq"})),
        ] {
            let mut config = tiny();
            config[field] = value.clone();
            let error = V3Config::read(&config).expect_err(&format!("{field} = {value}")).to_string();
            assert!(error.contains(field), "{field} = {value}: {error}");
        }
    }

    #[test]
    fn query_compression_and_shared_experts_may_be_absent() {
        let mut config = tiny();
        config["q_lora_rank"] = Value::Null;
        config["n_shared_experts"] = Value::Null;
        let config = V3Config::read(&config).unwrap();
        assert_eq!((config.attention.query_rank, config.experts.shared), (None, 0));
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(2, 8, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::hash_map(".{0,8}", inner, 0..4).prop_map(|map| map.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_value_in_any_field_is_read_or_refused_cleanly(field in 0_usize..25, value in json()) {
            let mut config = tiny();
            let name = config.as_object().unwrap().keys().nth(field).unwrap().clone();
            config[&name] = value;
            if let Ok(read) = V3Config::read(&config) {
                prop_assert!(read.hidden > 0 && read.experts.top_k <= read.experts.routed);
            }
        }
    }
}
