//! Model geometry: what placement and memory need to know about a mixture-of-experts model. Read from a
//! published `config.json` or from a ModelProfile; holds no weights.

use std::{collections::BTreeMap, fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    ids::{LayerId, Vendor},
    units::Bytes,
};

/// How a router turns logits into scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scoring {
    /// softmax over all experts (V2).
    Softmax,
    /// sigmoid (V3).
    Sigmoid,
    /// sqrt(softplus) (V4).
    SqrtSoftplus,
}

/// How expert weights are stored, scales included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum WeightFormat {
    /// bfloat16, 2 bytes a weight.
    #[serde(rename = "bf16")]
    Bf16,
    /// E4M3, one float32 scale per 128×128 block.
    #[serde(rename = "fp8_e4m3_block128x128_f32")]
    Fp8Block128F32,
    /// E4M3, one power-of-two scale byte per 128×128 block.
    #[serde(rename = "fp8_e4m3_block128x128_ue8m0")]
    Fp8Block128Ue8m0,
    /// E4M3, one power-of-two scale byte per 32×32 block.
    #[serde(rename = "fp8_e4m3_block32x32_ue8m0")]
    Fp8Block32Ue8m0,
    /// E2M1, one power-of-two scale byte per 32 weights of a row.
    #[serde(rename = "mxfp4_group32_ue8m0")]
    Mxfp4,
    /// Signed bytes, one float32 scale per output row.
    #[serde(rename = "int8_per_channel")]
    Int8PerRow,
    /// Signed nibbles, one bfloat16 scale per 32 weights of a row.
    #[serde(rename = "int4_group32_bf16")]
    Int4Group32,
}

impl WeightFormat {
    /// Every format, in the order of the declaration.
    pub const ALL: &'static [Self] = &[
        Self::Bf16,
        Self::Fp8Block128F32,
        Self::Fp8Block128Ue8m0,
        Self::Fp8Block32Ue8m0,
        Self::Mxfp4,
        Self::Int8PerRow,
        Self::Int4Group32,
    ];

    /// The word in profiles and objects.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Fp8Block128F32 => "fp8_e4m3_block128x128_f32",
            Self::Fp8Block128Ue8m0 => "fp8_e4m3_block128x128_ue8m0",
            Self::Fp8Block32Ue8m0 => "fp8_e4m3_block32x32_ue8m0",
            Self::Mxfp4 => "mxfp4_group32_ue8m0",
            Self::Int8PerRow => "int8_per_channel",
            Self::Int4Group32 => "int4_group32_bf16",
        }
    }

    /// Whether kernels that compute with `computes` take this format; an empty list says nothing, so it bars nothing.
    #[must_use]
    pub fn is_in(self, computes: &[Self]) -> bool {
        computes.is_empty() || computes.contains(&self)
    }

    /// The words of `formats`, joined by a comma, for sentences.
    #[must_use]
    pub fn words(formats: &[Self]) -> String {
        formats.iter().map(|format| format.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// Bytes of a `rows × cols` matrix, scales included.
    #[must_use]
    pub fn matrix_bytes(self, rows: u64, cols: u64) -> Bytes {
        let weights = Bytes(rows).times(cols);
        let blocks = |side: u64| Bytes(rows.div_ceil(side)).times(cols.div_ceil(side));
        match self {
            Self::Bf16 => weights.times(2),
            Self::Fp8Block128F32 => weights.plus(blocks(128).times(4)),
            Self::Fp8Block128Ue8m0 => weights.plus(blocks(128)),
            Self::Fp8Block32Ue8m0 => weights.plus(blocks(32)),
            Self::Mxfp4 => Bytes(rows).times(cols.div_ceil(2)).plus(Bytes(rows).times(cols.div_ceil(32))),
            Self::Int8PerRow => weights.plus(Bytes(rows).times(4)),
            Self::Int4Group32 => {
                Bytes(rows).times(cols.div_ceil(2)).plus(Bytes(rows).times(cols.div_ceil(32)).times(2))
            }
        }
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for WeightFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .iter()
            .copied()
            .find(|format| format.as_str() == text)
            .ok_or_else(|| format!("{text:?} is not a weight format: write one of {}", Self::words(Self::ALL)))
    }
}

/// What placement must know of a model. Sizes are counts of elements unless they say bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Geometry {
    /// Layers of the model, dense ones counted, multi-token-prediction layers not.
    #[schemars(range(min = 1, max = 1024))]
    pub layers: u32,
    /// Leading layers without experts.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1023))]
    pub dense_layers: u32,
    /// Routed experts of each expert layer.
    #[schemars(range(min = 1, max = 65534))]
    pub experts: u32,
    /// Experts that every token passes through.
    #[serde(default)]
    #[schemars(range(min = 0, max = 64))]
    pub shared_experts: u32,
    /// Experts that a token is routed to.
    #[schemars(range(min = 1, max = 256))]
    pub top_k: u32,
    /// Groups the experts are divided into; 1 = no groups.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1024))]
    pub groups: u32,
    /// Groups a token may choose from.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1024))]
    pub groups_kept: u32,
    /// The router's scores.
    pub scoring: Scoring,
    /// Leading expert layers that route by a table of token ids.
    #[serde(default)]
    #[schemars(range(min = 0, max = 1024))]
    pub hash_layers: u32,
    /// Width of the residual stream.
    #[schemars(range(min = 1, max = 1048576))]
    pub hidden: u32,
    /// Inner width of one routed expert.
    #[schemars(range(min = 1, max = 1048576))]
    pub expert_width: u32,
    /// How the checkpoint stores its routed experts.
    pub format: WeightFormat,
}

const fn one() -> u32 {
    1
}

/// Why a geometry or a `config.json` cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// A field is missing.
    #[error("field {field} is missing: add it as the published config.json of the model family has it")]
    Missing {
        /// Name in the file.
        field: String,
    },
    /// A field has a value that cannot be right.
    #[error("field {field} is {value}: {remedy}")]
    Invalid {
        /// Name in the file.
        field: String,
        /// What it holds.
        value: String,
        /// What to write instead.
        remedy: String,
    },
}

impl Geometry {
    /// Layers that have routed experts.
    #[must_use]
    pub const fn expert_layers(&self) -> u32 {
        self.layers.saturating_sub(self.dense_layers)
    }

    /// The layers that have routed experts, in order.
    pub fn expert_layer_ids(&self) -> impl Iterator<Item = LayerId> + use<> {
        (self.dense_layers..self.layers).map(LayerId)
    }

    /// How devices of `vendor` hold experts: as `formats` says, else as the checkpoint stores them. A device whose vendor is
    /// not known counts as the latter.
    #[must_use]
    pub fn format_on(
        &self,
        formats: &BTreeMap<Vendor, WeightFormat>,
        vendor: impl Into<Option<Vendor>>,
    ) -> WeightFormat {
        vendor.into().and_then(|vendor| formats.get(&vendor)).copied().unwrap_or(self.format)
    }

    /// Bytes of one routed expert (gate, up and down) stored in `format`.
    #[must_use]
    pub fn expert_bytes(&self, format: WeightFormat) -> Bytes {
        let (hidden, width) = (u64::from(self.hidden), u64::from(self.expert_width));
        format.matrix_bytes(width, hidden).times(2).plus(format.matrix_bytes(hidden, width))
    }

    /// Checks what no schema can: relations between fields.
    ///
    /// # Errors
    /// The first field that contradicts another.
    pub fn validate(&self) -> Result<(), GeometryError> {
        let invalid = |field: &str, value: u32, remedy: String| {
            Err(GeometryError::Invalid { field: field.to_owned(), value: value.to_string(), remedy })
        };
        if self.layers == 0 || self.dense_layers >= self.layers {
            return invalid("denseLayers", self.dense_layers, format!("must be below layers ({})", self.layers));
        }
        if self.experts == 0 || self.top_k == 0 || self.top_k > self.experts {
            return invalid("topK", self.top_k, format!("must be 1 to experts ({})", self.experts));
        }
        if self.groups == 0 || !self.experts.is_multiple_of(self.groups) {
            return invalid("groups", self.groups, format!("must divide experts ({})", self.experts));
        }
        if self.groups_kept == 0 || self.groups_kept > self.groups {
            return invalid("groupsKept", self.groups_kept, format!("must be 1 to groups ({})", self.groups));
        }
        if self.hash_layers > self.expert_layers() {
            return invalid("hashLayers", self.hash_layers, format!("must be at most {}", self.expert_layers()));
        }
        if self.hidden == 0 || self.expert_width == 0 {
            return invalid("hidden", self.hidden, "hidden and expertWidth must be above 0".to_owned());
        }
        Ok(())
    }

    /// Reads a published `config.json` of the DeepSeek V2, V3 or V4 families.
    ///
    /// # Errors
    /// Names the field that is missing or cannot be right.
    pub fn from_config(config: &Value) -> Result<Self, GeometryError> {
        let Some(fields) = config.as_object() else {
            return Err(GeometryError::Invalid {
                field: "config".to_owned(),
                value: "not an object".to_owned(),
                remedy: "give the model's config.json".to_owned(),
            });
        };
        let geometry = read_config(&Fields(fields))?;
        geometry.validate()?;
        Ok(geometry)
    }
}

/// The fields of a `config.json`, read with errors that name them.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn optional(&self, field: &str) -> Result<Option<u32>, GeometryError> {
        match self.0.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64().and_then(|number| u32::try_from(number).ok()) {
                Some(number) => Ok(Some(number)),
                None => Err(GeometryError::Invalid {
                    field: field.to_owned(),
                    value: value.to_string(),
                    remedy: "must be a whole number from 0 to 4294967295".to_owned(),
                }),
            },
        }
    }

    fn required(&self, field: &str) -> Result<u32, GeometryError> {
        self.optional(field)?.ok_or_else(|| GeometryError::Missing { field: field.to_owned() })
    }

    fn text(&self, field: &str) -> Option<&str> {
        self.0.get(field).and_then(Value::as_str)
    }

    /// Entries of the list `field` that satisfy `test`, if there is such a list.
    fn count(&self, field: &str, test: impl Fn(&str) -> bool) -> Option<u32> {
        let list = self.0.get(field)?.as_array()?;
        let hits = list.iter().filter(|entry| entry.as_str().is_some_and(&test)).count();
        u32::try_from(hits).ok()
    }
}

fn read_config(fields: &Fields<'_>) -> Result<Geometry, GeometryError> {
    let family = fields.text("model_type").unwrap_or_default();
    let scoring = match (fields.text("scoring_func"), family) {
        (Some("sqrtsoftplus"), _) | (None, "deepseek_v4") => Scoring::SqrtSoftplus,
        (Some("softmax"), _) | (None, "deepseek_v2") => Scoring::Softmax,
        (Some("sigmoid"), _) | (None, "deepseek_v3" | "deepseek_v32") => Scoring::Sigmoid,
        (Some(other), _) => {
            return Err(GeometryError::Invalid {
                field: "scoring_func".to_owned(),
                value: other.to_owned(),
                remedy: "supported are sigmoid, sqrtsoftplus and softmax".to_owned(),
            });
        }
        (None, other) => {
            return Err(GeometryError::Invalid {
                field: "model_type".to_owned(),
                value: format!("{other:?}"),
                remedy: "supported are deepseek_v2, deepseek_v3, deepseek_v32 and deepseek_v4".to_owned(),
            });
        }
    };
    let dense = fields.count("mlp_layer_types", |kind| kind == "dense");
    let hash = fields.count("mlp_layer_types", |kind| kind == "hash_moe");
    Ok(Geometry {
        layers: fields.required("num_hidden_layers")?,
        dense_layers: dense.or(fields.optional("first_k_dense_replace")?).unwrap_or(0),
        experts: fields.required("n_routed_experts")?,
        shared_experts: fields.optional("n_shared_experts")?.unwrap_or(0),
        top_k: fields.required("num_experts_per_tok")?,
        groups: fields.optional("n_group")?.unwrap_or(1),
        groups_kept: fields.optional("topk_group")?.unwrap_or(1),
        scoring,
        hash_layers: hash.or(fields.optional("num_hash_layers")?).unwrap_or(0),
        hidden: fields.required("hidden_size")?,
        expert_width: fields.required("moe_intermediate_size")?,
        format: read_format(fields, scoring)?,
    })
}

fn read_format(fields: &Fields<'_>, scoring: Scoring) -> Result<WeightFormat, GeometryError> {
    let Some(quantisation) = fields.0.get("quantization_config").and_then(Value::as_object) else {
        // Experts may be packed where nothing else is: then only this field says so.
        return match fields.text("expert_dtype") {
            None | Some("bf16" | "bfloat16") => Ok(WeightFormat::Bf16),
            Some("fp4") => Ok(WeightFormat::Mxfp4),
            Some(other) => Err(GeometryError::Invalid {
                field: "expert_dtype".to_owned(),
                value: format!("{other:?}"),
                remedy: "supported without quantization_config are fp4 and bf16".to_owned(),
            }),
        };
    };
    let inner = Fields(quantisation);
    let invalid = |field: &str, value: String| GeometryError::Invalid {
        field: format!("quantization_config.{field}"),
        value,
        remedy: "supported is quant_method fp8 with blocks of 128 or 32, with expert_dtype fp4 or fp8".to_owned(),
    };
    let method = inner.text("quant_method").unwrap_or_default();
    if method != "fp8" {
        return Err(invalid("quant_method", format!("{method:?}")));
    }
    let expert = fields.text("expert_dtype").or(inner.text("expert_dtype"));
    if expert == Some("fp4") {
        return Ok(WeightFormat::Mxfp4);
    }
    let block =
        quantisation.get("weight_block_size").and_then(Value::as_array).and_then(|sizes| sizes.first()?.as_u64());
    let ue8m0 = inner.text("scale_fmt") == Some("ue8m0");
    match (block, ue8m0) {
        (Some(128), true) if scoring == Scoring::SqrtSoftplus => Ok(WeightFormat::Fp8Block128Ue8m0),
        (Some(128), _) => Ok(WeightFormat::Fp8Block128F32),
        (Some(32), _) => Ok(WeightFormat::Fp8Block32Ue8m0),
        (other, _) => Err(invalid("weight_block_size", format!("{other:?}"))),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    pub(crate) fn tiny() -> Geometry {
        Geometry {
            layers: 4,
            dense_layers: 1,
            experts: 16,
            shared_experts: 1,
            top_k: 4,
            groups: 4,
            groups_kept: 2,
            scoring: Scoring::Sigmoid,
            hash_layers: 0,
            hidden: 64,
            expert_width: 32,
            format: WeightFormat::Bf16,
        }
    }

    fn v3_config() -> Value {
        json!({"model_type": "deepseek_v3", "num_hidden_layers": 4, "first_k_dense_replace": 1,
               "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4,
               "topk_group": 2, "hidden_size": 64, "moe_intermediate_size": 32})
    }

    #[test]
    fn published_config_gives_the_geometry() {
        assert_eq!(Geometry::from_config(&v3_config()), Ok(tiny()));
    }

    #[test]
    fn a_damaged_config_gives_a_geometry_that_can_be_computed_with_or_an_error() {
        let seed = v3_config().to_string();
        berth_mutate::each(&[seed.as_bytes()], 5_000, |bytes| {
            let Ok(config) = serde_json::from_slice::<Value>(bytes) else { return };
            if let Ok(geometry) = Geometry::from_config(&config) {
                assert_eq!(geometry.validate(), Ok(()));
                let _ = geometry.expert_bytes(geometry.format);
            }
        });
    }

    #[test]
    fn expert_bytes_agree_with_the_published_figures() {
        let mut v3 = tiny();
        (v3.hidden, v3.expert_width) = (7168, 2048);
        assert_eq!(v3.expert_bytes(WeightFormat::Fp8Block128F32), Bytes(44_050_944));
        (v3.hidden, v3.expert_width) = (4096, 2048);
        assert_eq!(v3.expert_bytes(WeightFormat::Mxfp4), Bytes(13_369_344));
    }

    #[test]
    fn a_damaged_config_is_refused_by_field() {
        for (field, value) in [
            ("n_routed_experts", json!(-3)),
            ("n_routed_experts", Value::Null),
            ("n_group", json!(5)),
            ("num_experts_per_tok", json!(17)),
            ("first_k_dense_replace", json!(4)),
            ("scoring_func", json!("noisy")),
            ("quantization_config", json!({"quant_method": "awq"})),
        ] {
            let mut config = v3_config();
            config[field] = value;
            assert!(Geometry::from_config(&config).is_err(), "{field}");
        }
        let mut config = v3_config();
        config["hidden_size"] = json!("wide");
        let error = Geometry::from_config(&config).unwrap_err().to_string();
        assert!(error.contains("hidden_size"), "{error}");
    }

    proptest! {
        #[test]
        fn any_numbers_validate_or_name_a_field(layers: u32, dense: u32, experts: u32, top: u32, groups: u32) {
            let mut geometry = tiny();
            (geometry.layers, geometry.dense_layers, geometry.experts) = (layers, dense, experts);
            (geometry.top_k, geometry.groups) = (top, groups);
            if geometry.validate().is_ok() {
                prop_assert!(geometry.expert_layers() > 0 && top <= experts && experts % groups == 0);
            }
        }
    }
}
