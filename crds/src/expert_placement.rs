//! ExpertPlacement: one instance's experts on devices. The operator writes the spec, the scheduler the
//! status; this object is the only place where the two meet.

use std::collections::BTreeMap;

use berth_types::{Bytes, DeviceId, Geometry, TokensPerSecond, Vendor, WeightFormat};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    model_deployment::{DeviceChoice, Redundancy, Weights},
    model_profile::{Basis, LayerShares},
};

/// What to place: everything the scheduler needs, resolved.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "ExpertPlacement",
    plural = "expertplacements",
    namespaced,
    status = "ExpertPlacementStatus",
    shortname = "bep",
    category = "berth",
    doc = "One instance's experts on devices. The operator writes the spec, the scheduler the status.",
    selectable = ".spec.model",
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.model"),
    printcolumn(name = "Rev", type_ = "integer", json_path = ".status.assignment.revision"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Balance", type_ = "number", json_path = ".status.balancedness"),
    printcolumn(name = "Loaded", type_ = "integer", json_path = ".status.slotsReady"),
    printcolumn(name = "Slots", type_ = "integer", json_path = ".status.slotsTotal"),
    printcolumn(name = "Lost", type_ = "integer", json_path = ".status.expertsLost"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Serving", type_ = "integer", json_path = ".status.servingRevision", priority = 1),
    printcolumn(name = "Moved", type_ = "integer", json_path = ".status.movedBytes", priority = 1),
    printcolumn(name = "Epoch", type_ = "integer", json_path = ".status.assignment.epoch", priority = 1),
    printcolumn(name = "Why", type_ = "string", json_path = ".status.why", priority = 1),
    validation = Rule::new(
        "!has(oldSelf.status) || !has(oldSelf.status.assignment) || (has(self.status) && has(self.status.assignment))"
    ).message("status.assignment cannot be taken back: write a higher revision")
)]
#[x_kube(
    validation = Rule::new("self.model == oldSelf.model && self.weights == oldSelf.weights")
        .message("spec.model and spec.weights cannot change: new weights are a new instance"),
    validation = Rule::new(
        "self.geometry == oldSelf.geometry && has(self.vendorFormats) == has(oldSelf.vendorFormats) && (!has(self.vendorFormats) || self.vendorFormats == oldSelf.vendorFormats)"
    ).message("spec.geometry and spec.vendorFormats cannot change: another format is a new instance")
)]
#[serde(rename_all = "camelCase")]
pub struct ExpertPlacementSpec {
    /// Name of the ModelProfile it was resolved from.
    #[schemars(length(min = 1, max = 253))]
    pub model: String,
    /// The model's geometry.
    #[schemars(extend("x-kubernetes-validations" = crate::geometry_rules::all()))]
    pub geometry: Geometry,
    /// Format per vendor, where it differs from the checkpoint's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub vendor_formats: BTreeMap<Vendor, WeightFormat>,
    /// Bytes of everything but routed experts, for the runner.
    pub non_expert_bytes: Bytes,
    /// Cache bytes to reserve for the runner.
    #[serde(default)]
    pub kv_budget_bytes: Bytes,
    /// How usual traffic asks for the model's experts; absent = not known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 256),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["layer"])
    )]
    pub expert_loads: Vec<LayerShares>,
    /// How fast devices compute the model, by product; a product that is absent counts as the others do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 64),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["product"])
    )]
    pub speeds: Vec<ProductSpeed>,
    /// The weights.
    pub weights: Weights,
    /// Devices that may be used.
    #[serde(default)]
    pub devices: DeviceChoice,
    /// What must be survived.
    #[serde(default)]
    pub redundancy: Redundancy,
    /// Most devices it may take (the queue's grant).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub granted_devices: Option<u32>,
    /// Higher places first.
    #[serde(default)]
    pub priority: i32,
    /// No re-plans while true.
    #[serde(default)]
    pub paused: bool,
}

/// How fast one device of a product computes the model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProductSpeed {
    /// Product, as agents report it, or a word of that, such as `h200` of `NVIDIA H200`.
    #[schemars(length(min = 1, max = 128))]
    pub product: String,
    /// Output tokens per second of one device's share of an instance.
    pub tokens_per_second: TokensPerSecond,
    /// How the figure was found.
    pub basis: Basis,
}

/// What the scheduler decided and how far it is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExpertPlacementStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The decision; neither epoch nor revision ever falls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assignment: Option<Assignment>,
    /// Revision that the runner starts steps on; 0 = none.
    #[serde(default)]
    pub serving_revision: u64,
    /// Revision that the runner still has steps on; 0 = none.
    #[serde(default)]
    pub draining_revision: u64,
    /// Slots of the assigned revision that are loaded.
    #[serde(default)]
    pub slots_ready: u64,
    /// Slots of the assigned revision.
    #[serde(default)]
    pub slots_total: u64,
    /// Experts (layer, expert) that have no live replica now.
    #[serde(default)]
    pub experts_lost: u64,
    /// Mean over layers of mean ÷ max device load, each device's load divided by its speed: as runners measured it in their
    /// last windows on the serving revision, else as their last loads would lie on it. Absent = no load seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balancedness: Option<f64>,
    /// Bytes that the last revision made devices load.
    #[serde(default)]
    pub moved_bytes: Bytes,
    /// Expert bytes of the assigned revision over all devices.
    #[serde(default)]
    pub expert_bytes: Bytes,
    /// Why the last revision was made, in one sentence.
    #[serde(default)]
    pub why: String,
    /// How good the assigned revision was by the loads it was planned for, and what keeps it from being better; absent =
    /// its moves go on, or an earlier version planned it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<PlanCertificate>,
    /// What was decided last, the newest first: every change with its reason, and the latest look that changed nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub decisions: Vec<PlanDecision>,
    /// Placed, WeightsLoaded, Serving, Ready, Reconciling, Stalled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// How good a revision is. Times are load ÷ speed of the slowest device over the ideal, which is total load ÷ total speed:
/// 1 is perfect. Means over layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlanCertificate {
    /// The revision.
    pub revision: u64,
    /// Slowest device.
    pub makespan: f64,
    /// The least that any layout on these devices reaches.
    pub bound: f64,
    /// Makespan ÷ bound − 1.
    pub gap: f64,
    /// What limits the slowest layer, in one sentence; empty = nothing: no load was known, or it is at the ideal.
    #[serde(default)]
    #[schemars(length(max = 1024))]
    pub limit: String,
    /// Which loads it was planned for, in words.
    #[serde(default)]
    #[schemars(length(max = 256))]
    pub loads: String,
    /// Which speeds of devices it was planned for, in words.
    #[serde(default)]
    #[schemars(length(max = 256))]
    pub speeds: String,
    /// How replicas of an expert share its tokens: evenly, or by weight where the runner declares that it can.
    #[serde(default)]
    #[schemars(length(max = 16))]
    pub sharing: String,
    /// Largest failure domain whose loss leaves every expert with a replica: nothing, device, node, rack.
    #[serde(default)]
    #[schemars(length(max = 16))]
    pub survives: String,
}

/// What became of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DecisionOutcome {
    /// A revision was made.
    Moved,
    /// The balance was looked at, and nothing moves.
    Kept,
    /// A revision was due, and none could be made.
    Refused,
}

/// One decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlanDecision {
    /// When.
    pub time: Time,
    /// What became of it.
    pub outcome: DecisionOutcome,
    /// What made it due: first, repair, around, spec, drain, return, wave, rebalance.
    #[schemars(length(max = 32))]
    pub cause: String,
    /// Revision before; 0 = none.
    pub from_revision: u64,
    /// Revision after; the same = nothing changed.
    pub revision: u64,
    /// Balancedness that was expected of the revision before; absent = no load was known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balancedness_before: Option<f64>,
    /// Balancedness that is expected of the revision after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balancedness_after: Option<f64>,
    /// Replicas that devices load.
    #[serde(default)]
    pub moved_replicas: u64,
    /// Bytes of those replicas.
    #[serde(default)]
    pub moved_bytes: Bytes,
    /// Seconds until the gain has paid for the moves; absent = they are not made for balance alone, or there is no gain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pays_back_seconds: Option<f64>,
    /// The reason, in one sentence.
    #[schemars(length(max = 1024))]
    pub why: String,
}

/// Which revision is wanted and which devices hold it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("self.epoch >= oldSelf.epoch")
        .message("status.assignment.epoch never falls: another scheduler leads, write nothing more"),
    validation = Rule::new("self.revision >= oldSelf.revision")
        .message("status.assignment.revision never falls: write a higher revision to go back"),
    validation = Rule::new("self.revision != oldSelf.revision || self.digest == oldSelf.digest")
        .message("status.assignment.digest of a revision never changes: write the next revision")
)]
#[serde(rename_all = "camelCase")]
pub struct Assignment {
    /// The leader's epoch when it was written.
    pub epoch: u64,
    /// The revision; its PlacementMap is named `<placement>-<revision>`.
    #[schemars(range(min = 1))]
    pub revision: u64,
    /// `sha256:<hex>` of the PlacementMap's spec.
    #[schemars(length(max = 71))]
    #[x_kube(
        validation = Rule::new("self.matches('^sha256:[0-9a-f]{64}$')")
            .message("digest must be sha256: followed by 64 lower-case hexadecimal digits")
    )]
    pub digest: String,
    /// Devices of the revision, in order of the map's slots.
    #[schemars(length(max = 4096))]
    pub devices: Vec<DeviceId>,
}
