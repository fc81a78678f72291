//! ModelProfile: what a model is, apart from how anyone runs it. Cluster-wide; shipped as presets or
//! written by `berth profile import`.

use std::collections::BTreeMap;

use berth_types::{Bytes, Geometry, LayerId, TokensPerSecond, Vendor, WeightFormat};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a model is: geometry, bytes, formats and measured throughput.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "ModelProfile",
    plural = "modelprofiles",
    shortname = "bmp",
    category = "berth",
    doc = "What a model is, apart from how anyone runs it: geometry, bytes, formats and measured throughput.",
    printcolumn(name = "Layers", type_ = "integer", json_path = ".spec.geometry.layers"),
    printcolumn(name = "Experts", type_ = "integer", json_path = ".spec.geometry.experts"),
    printcolumn(name = "Top-K", type_ = "integer", json_path = ".spec.geometry.topK"),
    printcolumn(name = "Format", type_ = "string", json_path = ".spec.geometry.format"),
    printcolumn(name = "Context", type_ = "integer", json_path = ".spec.context"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Scoring", type_ = "string", json_path = ".spec.geometry.scoring", priority = 1),
    printcolumn(name = "Hidden", type_ = "integer", json_path = ".spec.geometry.hidden", priority = 1),
    printcolumn(name = "KV-Bytes", type_ = "integer", json_path = ".spec.kvBytesPerToken", priority = 1)
)]
#[serde(rename_all = "camelCase")]
pub struct ModelProfileSpec {
    /// Layers, experts, routing and widths. Never changes: another geometry is another profile.
    #[schemars(extend("x-kubernetes-validations" = crate::geometry_rules::all()))]
    #[x_kube(
        validation = Rule::new("self == oldSelf")
            .message("spec.geometry cannot change: another geometry is another ModelProfile")
    )]
    pub geometry: Geometry,
    /// Format in which each vendor's devices hold experts. A vendor that is absent uses the checkpoint's own. Workers
    /// make bf16 and int8_per_channel from any stored format; a device whose kernels lack the format is left out.
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
    #[schemars(
        length(max = 64),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["product", "devices"])
    )]
    pub throughput: Vec<Throughput>,
    /// How usual traffic asks for the model's experts: where a new instance starts from, until it has seen load or another
    /// instance of the model has. Absent = every expert alike.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 256),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["layer"])
    )]
    pub expert_loads: Vec<LayerShares>,
    /// Where the figures come from: public files, papers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 1024)))]
    pub sources: Vec<String>,
}

/// How the experts of one layer are asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LayerShares {
    /// The layer, counted as the model counts them.
    #[schemars(range(min = 0, max = 65_535))]
    pub layer: u32,
    /// A share for each expert beside the layer's others, in any unit, as base64 without padding of little-endian 16-bit
    /// numbers.
    #[serde(with = "crate::packed")]
    #[schemars(with = "String", length(min = 2, max = 16_384), regex(pattern = "^[A-Za-z0-9+/]*$"))]
    pub shares: Vec<u16>,
}

impl ModelProfileSpec {
    /// Whether `expertLoads` speaks of the model's own experts.
    ///
    /// # Errors
    /// A sentence that names the layer and what it should have.
    pub fn validate_expert_loads(&self) -> Result<(), String> {
        let layers: Vec<LayerId> = self.geometry.expert_layer_ids().collect();
        let experts = usize::try_from(self.geometry.experts).unwrap_or(usize::MAX);
        for LayerShares { layer, shares } in &self.expert_loads {
            if !layers.contains(&LayerId(*layer)) {
                let (first, last) =
                    (layers.first().copied().unwrap_or_default(), layers.last().copied().unwrap_or_default());
                return Err(format!("expertLoads of layer {layer}: experts are in layers {first} to {last}"));
            }
            if shares.len() != experts {
                return Err(format!("expertLoads of layer {layer}: {} shares for {experts} experts", shares.len()));
            }
        }
        Ok(())
    }
}

/// How fast one instance is on one product.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Throughput {
    /// Product, such as `h200` or `910c`.
    #[schemars(length(min = 1, max = 128))]
    pub product: String,
    /// Devices of the instance that was measured.
    #[schemars(range(min = 1))]
    pub devices: u32,
    /// Output tokens per second of the whole instance.
    pub tokens_per_second: TokensPerSecond,
    /// How the figure was found; a modelled one is planned with 20 % headroom.
    pub basis: Basis,
    /// Where the figure comes from.
    #[schemars(length(min = 1, max = 1024))]
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
