//! ModelProfile: what a model is, apart from how anyone runs it. Cluster-wide; shipped as presets or
//! written by `berth profile import`.

use std::collections::BTreeMap;

use berth_types::{Bytes, Geometry, TokensPerSecond, Vendor, WeightFormat};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a model is: geometry, bytes, formats and measured throughput.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "ModelProfile",
    plural = "modelprofiles",
    shortname = "bmp",
    category = "berth"
)]
#[serde(rename_all = "camelCase")]
pub struct ModelProfileSpec {
    /// Layers, experts, routing and widths.
    pub geometry: Geometry,
    /// Format each vendor computes in. A vendor that is absent uses the checkpoint's own format.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub vendor_formats: BTreeMap<Vendor, WeightFormat>,
    /// Bytes of everything but routed experts (attention, router, shared experts, embeddings).
    pub non_expert_bytes: Bytes,
    /// Cache bytes per token of a sequence.
    pub kv_bytes_per_token: Bytes,
    /// Cache bytes per sequence whatever its length.
    #[serde(default)]
    pub kv_fixed_bytes_per_sequence: Bytes,
    /// Longest sequence in tokens.
    #[schemars(range(min = 1))]
    pub context: u64,
    /// Throughput of one instance per pool product, with its source.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub throughput: Vec<Throughput>,
    /// Where the figures come from: public files, papers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<String>,
}

/// How fast one instance is on one product.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Throughput {
    /// Product, such as `h200` or `910c`.
    pub product: String,
    /// Devices of the instance that was measured.
    #[schemars(range(min = 1))]
    pub devices: u32,
    /// Output tokens per second of the whole instance.
    pub tokens_per_second: TokensPerSecond,
    /// How the figure was found; a modelled one is planned with 20 % headroom.
    pub basis: Basis,
    /// Where the figure comes from.
    pub source: String,
}

/// How a figure was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Basis {
    /// Computed from specifications.
    Modelled,
    /// Modelled, then corrected by a measurement of another size.
    Calibrated,
    /// Measured as it is.
    Measured,
}
