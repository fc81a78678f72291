//! ModelProfiles for published models, generated from `presets/models.json`, which names the sources of its
//! figures. Left out are models whose experts the geometry cannot describe: those with a latent width of
//! their own (kimi-k3) or with biases (gpt-oss). Throughput is left empty: a figure is a deployment's own.

use std::collections::BTreeMap;

use berth_types::{Bytes, Geometry, Scoring, Vendor, WeightFormat};
use serde::Deserialize;

use crate::{ModelProfile, ModelProfileSpec};

/// Why the facts make no profile.
#[derive(Debug, thiserror::Error)]
pub enum PresetError {
    /// The file is not in its form.
    #[error("presets/models.json: {0}")]
    Form(#[from] serde_json::Error),
    /// A word is not one of the geometry's.
    #[error("presets/models.json: {model}: {field} {value:?} is unknown: leave the model out or extend berth_types")]
    Unknown {
        /// The model.
        model: String,
        /// The field.
        field: &'static str,
        /// What it says.
        value: String,
    },
    /// Figures contradict each other.
    #[error("presets/models.json: {model}: {why}")]
    Contradiction {
        /// The model.
        model: String,
        /// Which, and how.
        why: String,
    },
}

#[derive(Deserialize)]
struct Facts {
    models: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
    hf_id: String,
    layers: u32,
    dense_layers: u32,
    experts: u32,
    shared_experts: u32,
    top_k: u32,
    groups: u32,
    groups_kept: u32,
    scoring: String,
    hash_layers: u32,
    hidden: u32,
    expert_width: u32,
    expert_format: String,
    ascend_format: Option<String>,
    bytes_per_expert: u64,
    non_expert_bytes: u64,
    kv_format: String,
    kv_bytes_per_token: u64,
    kv_fixed_bytes_per_sequence: u64,
    context: u64,
    sources: Vec<String>,
}

/// Every preset, in the order of the facts.
///
/// # Errors
/// [`PresetError`], when the facts were edited into nonsense.
pub fn all() -> Result<Vec<ModelProfile>, PresetError> {
    let facts: Facts = serde_json::from_str(include_str!("../presets/models.json"))?;
    facts.models.into_iter().map(profile).collect()
}

/// The YAML of a profile.
///
/// # Errors
/// When it cannot be written as YAML.
pub fn yaml(profile: &ModelProfile) -> Result<String, serde_saphyr::ser::Error> {
    serde_saphyr::to_string(profile)
}

fn profile(model: Model) -> Result<ModelProfile, PresetError> {
    let format = format_of(&model.id, "expert_format", &model.expert_format)?;
    let geometry = Geometry {
        layers: model.layers,
        dense_layers: model.dense_layers,
        experts: model.experts,
        shared_experts: model.shared_experts,
        top_k: model.top_k,
        groups: model.groups,
        groups_kept: model.groups_kept,
        scoring: scoring(&model)?,
        hash_layers: model.hash_layers,
        hidden: model.hidden,
        expert_width: model.expert_width,
        format,
    };
    let contradiction = |why| PresetError::Contradiction { model: model.id.clone(), why };
    geometry.validate().map_err(|error| contradiction(error.to_string()))?;
    let computed = geometry.expert_bytes(format);
    if computed != Bytes(model.bytes_per_expert) {
        let why =
            format!("an expert has {computed:?} by the geometry and {} by bytes_per_expert", model.bytes_per_expert);
        return Err(contradiction(why));
    }
    let mut vendor_formats = BTreeMap::new();
    if let Some(ascend) = &model.ascend_format {
        vendor_formats.insert(Vendor::Ascend, format_of(&model.id, "ascend_format", ascend)?);
    }
    let mut sources = vec![format!("published checkpoint {}", model.hf_id)];
    sources.extend(model.sources.iter().cloned());
    sources.push(format!("kvBytesPerToken: a cache in {}", model.kv_format));
    let spec = ModelProfileSpec {
        geometry,
        vendor_formats,
        non_expert_bytes: Bytes(model.non_expert_bytes),
        kv_bytes_per_token: Bytes(model.kv_bytes_per_token),
        kv_fixed_bytes_per_sequence: Bytes(model.kv_fixed_bytes_per_sequence),
        context: model.context,
        throughput: Vec::new(),
        expert_loads: Vec::new(),
        sources,
    };
    Ok(ModelProfile::new(&model.id, spec))
}

fn format_of(model: &str, field: &'static str, value: &str) -> Result<WeightFormat, PresetError> {
    let unknown = |_| PresetError::Unknown { model: model.to_owned(), field, value: value.to_owned() };
    value.parse().map_err(unknown)
}

fn scoring(model: &Model) -> Result<Scoring, PresetError> {
    match model.scoring.as_str() {
        "sigmoid" => Ok(Scoring::Sigmoid),
        "softmax" => Ok(Scoring::Softmax),
        "sqrtsoftplus" => Ok(Scoring::SqrtSoftplus),
        other => Err(PresetError::Unknown { model: model.id.clone(), field: "scoring", value: other.to_owned() }),
    }
}
