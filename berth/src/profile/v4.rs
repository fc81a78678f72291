//! What a V4 configuration says of caches and of weights that are not experts: attention there compresses what it
//! keeps, layer by layer. Computes; reads nothing but the fields.

use anyhow::{Context as _, bail};
use berth_types::{Bytes, Geometry};
use serde_json::Value;

use super::Fields;

/// What a layer's attention keeps beyond its window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    Window,
    /// One entry and one index key per this many tokens.
    Sparse(u64),
    /// One entry per this many tokens.
    Heavy(u64),
}

/// Shape of a V4 model's attention.
#[derive(Debug)]
pub(super) struct Attention<'a> {
    fields: &'a Fields<'a>,
    layers: Vec<Layer>,
    head: u64,
    index: u64,
}

/// Whether the fields are those of the V4 family.
pub(super) fn is_v4(fields: &Fields<'_>) -> bool {
    fields.value.get("model_type").and_then(Value::as_str) == Some("deepseek_v4")
}

impl<'a> Attention<'a> {
    /// Reads the layers, in the first published form or the current one.
    pub(super) fn read(fields: &'a Fields<'a>, geometry: &Geometry) -> anyhow::Result<Self> {
        let layers = read_layers(fields, usize::try_from(geometry.layers)?)?;
        let sparse = layers.iter().any(|layer| matches!(layer, Layer::Sparse(_)));
        let index = if sparse { fields.number("index_head_dim")? } else { 0 };
        Ok(Self { fields, layers, head: fields.number("head_dim")?, index })
    }

    /// Cache bytes per token, in bfloat16: Σ sparse 2·(head_dim + index_head_dim)/m + Σ heavy 2·head_dim/m', rounded up.
    pub(super) fn kv_bytes_per_token(&self) -> Bytes {
        // Layers of one ratio together, so that rounding happens once for each.
        let mut parts: Vec<(u64, u64)> = Vec::new();
        for layer in &self.layers {
            let (values, ratio) = match *layer {
                Layer::Window => continue,
                Layer::Sparse(ratio) => (self.head.saturating_add(self.index), ratio),
                Layer::Heavy(ratio) => (self.head, ratio),
            };
            match parts.iter_mut().find(|(_, known)| *known == ratio) {
                Some((sum, _)) => *sum = sum.saturating_add(values),
                None => parts.push((values, ratio)),
            }
        }
        Bytes(parts.iter().map(|(values, ratio)| values.saturating_mul(2).div_ceil(*ratio)).sum())
    }

    /// Cache bytes per sequence, in bfloat16: the windows of all layers.
    pub(super) fn kv_fixed_bytes(&self) -> anyhow::Result<Bytes> {
        let layers = u64::try_from(self.layers.len())?;
        Ok(Bytes(self.head).times(2).times(self.fields.number("sliding_window")?).times(layers))
    }

    /// Bytes of everything but routed experts: attention's matrices and shared experts at one byte a weight where the
    /// checkpoint is quantised, all else at two.
    pub(super) fn non_expert_bytes(&self, geometry: &Geometry) -> anyhow::Result<Bytes> {
        let number = |field| self.fields.number(field);
        let hidden = u64::from(geometry.hidden);
        let (heads, rank) = (number("num_attention_heads")?, number("q_lora_rank")?);
        let (groups, group_rank) = (number("o_groups")?, number("o_lora_rank")?);
        let (streams, experts) = (number("hc_mult")?, u64::from(geometry.experts));
        let count = |a: u64, b: u64| Bytes(a).times(b);
        let all_heads = heads.saturating_mul(self.head);
        let (mut small, mut plain) = (Bytes::ZERO, Bytes::ZERO);
        for layer in &self.layers {
            let queries = count(hidden, rank).plus(count(rank, all_heads)).plus(count(hidden, self.head));
            let output = count(all_heads, group_rank).plus(count(groups, group_rank).times(hidden));
            let shared = count(3 * hidden, u64::from(geometry.expert_width)).times(u64::from(geometry.shared_experts));
            small = small.plus(queries).plus(output).plus(shared);
            let connection = (2 + streams) * streams;
            let connections = count(connection, streams.saturating_mul(hidden)).plus(Bytes(connection + 3)).times(2);
            let norms = Bytes(rank + self.head + heads + 2 * hidden);
            plain = plain.plus(connections).plus(norms).plus(count(experts, hidden + 1));
            let compressor = |ratio: u64, width: u64| count(width, 2 * hidden + ratio).plus(Bytes(width));
            match *layer {
                Layer::Window => {}
                Layer::Heavy(ratio) => plain = plain.plus(compressor(ratio, self.head)),
                Layer::Sparse(ratio) => {
                    let asking = number("index_n_heads")?;
                    small = small.plus(count(asking.saturating_mul(self.index), rank));
                    plain = plain.plus(count(asking, hidden)).plus(compressor(ratio, 2 * self.head));
                    plain = plain.plus(compressor(ratio, 2 * self.index));
                }
            }
        }
        let vocab = number("vocab_size")?;
        let tied = self.fields.value.get("tie_word_embeddings") == Some(&Value::Bool(true));
        let tables = count(vocab, u64::from(geometry.top_k)).times(u64::from(geometry.hash_layers)).times(2);
        plain = plain.plus(count(vocab, hidden).times(if tied { 1 } else { 2 })).plus(tables);
        plain = plain.plus(count(streams, streams.saturating_mul(hidden))).plus(Bytes(hidden));
        let quantised = self.fields.value.get("quantization_config").is_some_and(Value::is_object);
        Ok(small.times(if quantised { 1 } else { 2 }).plus(plain.times(2)))
    }
}

fn read_layers(fields: &Fields<'_>, count: usize) -> anyhow::Result<Vec<Layer>> {
    let file = fields.file.display();
    let list = |field| fields.value.get(field).and_then(Value::as_array).filter(|list| list.len() >= count);
    let rates = fields.value.get("compress_rates");
    let rate = |kind: &str| {
        let rate = rates.and_then(|rates| rates.get(kind)).and_then(Value::as_u64).filter(|rate| *rate > 0);
        rate.with_context(|| format!("{file}: field compress_rates has no {kind}: it must be a whole number above 0"))
    };
    if let Some(types) = list("layer_types") {
        let layer = |kind: &Value| match kind.as_str() {
            Some("sliding_attention") => Ok(Layer::Window),
            Some(kind @ "compressed_sparse_attention") => Ok(Layer::Sparse(rate(kind)?)),
            Some(kind @ "heavily_compressed_attention") => Ok(Layer::Heavy(rate(kind)?)),
            _ => bail!("{file}: field layer_types has {kind}: it must name sliding, sparse or heavy attention"),
        };
        return types.iter().take(count).map(layer).collect();
    }
    let Some(ratios) = list("compress_ratios") else {
        bail!("{file}: field layer_types (or compress_ratios) is missing or short: it must have one entry per layer");
    };
    let layer = |ratio: &Value| match ratio.as_u64() {
        Some(0) => Ok(Layer::Window),
        Some(4) => Ok(Layer::Sparse(4)),
        Some(ratio) => Ok(Layer::Heavy(ratio)),
        None => bail!("{file}: field compress_ratios has {ratio}: it must be a whole number"),
    };
    ratios.iter().take(count).map(layer).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use berth_crds::presets;
    use serde_json::json;

    use super::*;

    /// The fields of a published config that its geometry and memory follow from.
    fn published(pro: bool) -> Value {
        let pick = |flash: u64, large: u64| if pro { large } else { flash };
        let layers = pick(43, 61);
        // Flash begins with two window layers, Pro with two heavy ones; then sparse and heavy take turns. One more entry is
        // that of multi-token prediction.
        let ratio = |layer: u64| match layer {
            0 | 1 => pick(0, 128),
            layer if layer == layers => 0,
            layer if layer % 2 == 0 => 4,
            _ => 128,
        };
        let ratios: Vec<u64> = (0..=layers).map(ratio).collect();
        let mut config = json!({"model_type": "deepseek_v4", "hidden_size": pick(4096, 7168), "num_hidden_layers": layers,
            "moe_intermediate_size": pick(2048, 3072), "n_routed_experts": pick(256, 384), "n_shared_experts": 1,
            "num_experts_per_tok": 6, "num_hash_layers": 3, "scoring_func": "sqrtsoftplus", "expert_dtype": "fp4",
            "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}});
        let rest = json!({"num_attention_heads": pick(64, 128), "num_key_value_heads": 1, "head_dim": 512,
            "qk_rope_head_dim": 64, "q_lora_rank": pick(1024, 1536), "o_lora_rank": 1024, "o_groups": pick(8, 16),
            "sliding_window": 128, "compress_ratios": ratios, "index_head_dim": 128, "index_n_heads": 64,
            "index_topk": pick(512, 1024), "hc_mult": 4, "vocab_size": 129_280, "tie_word_embeddings": false,
            "max_position_embeddings": 1_048_576});
        config.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
        config
    }

    #[test]
    fn published_configs_give_the_geometry_and_cache_of_the_presets() {
        let presets = presets::all().unwrap();
        for (name, pro) in [("deepseek-v4-flash", false), ("deepseek-v4-pro", true)] {
            let preset = &presets.iter().find(|preset| preset.metadata.name.as_deref() == Some(name)).unwrap().spec;
            let value = published(pro);
            let geometry = Geometry::from_config(&value).unwrap();
            assert_eq!(geometry, preset.geometry);
            let fields = Fields { file: Path::new("config.json"), value: &value };
            let attention = Attention::read(&fields, &geometry).unwrap();
            assert_eq!(attention.kv_bytes_per_token(), preset.kv_bytes_per_token);
            let (ours, whole) = (attention.non_expert_bytes(&geometry).unwrap(), preset.non_expert_bytes);
            // The preset's figure is a rounded total less its experts.
            assert!(ours.0.abs_diff(whole.0) * 4 < whole.0, "{name}: {ours} and {whole}");
        }
    }

    #[test]
    fn the_current_form_gives_the_same_cache() {
        let first = published(false);
        let mut current = first.clone();
        let kind = |ratio: &Value| match ratio.as_u64() {
            Some(0) => "sliding_attention",
            Some(4) => "compressed_sparse_attention",
            _ => "heavily_compressed_attention",
        };
        let types: Vec<&str> = first["compress_ratios"].as_array().unwrap().iter().take(43).map(kind).collect();
        current["layer_types"] = json!(types);
        current["compress_rates"] = json!({"compressed_sparse_attention": 4, "heavily_compressed_attention": 128});
        current.as_object_mut().unwrap().remove("compress_ratios");
        let bytes = |value: &Value| {
            let fields = Fields { file: Path::new("config.json"), value };
            let attention = Attention::read(&fields, &Geometry::from_config(value).unwrap()).unwrap();
            (attention.kv_bytes_per_token(), attention.kv_fixed_bytes().unwrap())
        };
        assert_eq!(bytes(&current), bytes(&first));
        assert_eq!(bytes(&first).1, Bytes(43 * 128 * 512 * 2));
    }

    #[test]
    fn a_damaged_list_of_layers_is_named() {
        for (field, damage) in [("compress_ratios", json!([4, 4])), ("compress_ratios", json!(vec!["4"; 44]))] {
            let mut value = published(false);
            value[field] = damage;
            let geometry = Geometry::from_config(&value).unwrap();
            let fields = Fields { file: Path::new("config.json"), value: &value };
            let error = Attention::read(&fields, &geometry).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
