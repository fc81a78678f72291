//! ModelDeployment: what a user applies. The operator reads the spec and writes the status; it never
//! writes the spec.

use berth_types::{Bytes, Vendor};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A model to serve: which one, how many instances, where, and what to do when there is not enough.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "ModelDeployment",
    plural = "modeldeployments",
    namespaced,
    status = "ModelDeploymentStatus",
    shortname = "bmd",
    category = "berth",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    doc = "A model to serve: which one, how many instances, where, and what to do when there is not enough.",
    selectable = ".spec.model",
    selectable = ".spec.queue",
    selectable = ".status.phase",
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Instances", type_ = "string", json_path = ".status.summary.instances"),
    printcolumn(name = "Pools", type_ = "string", json_path = ".status.summary.pools"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.summary.reason"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.model", priority = 1),
    printcolumn(name = "Queue", type_ = "string", json_path = ".spec.queue", priority = 1),
    printcolumn(name = "Devices", type_ = "integer", json_path = ".status.grantedDevices", priority = 1),
    printcolumn(name = "Observed", type_ = "integer", json_path = ".status.observedGeneration", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.summary.message", priority = 1),
    validation = Rule::new("size(self.metadata.name) <= 50").message(
        "metadata.name must have at most 50 characters: the names of its instances are made from it"
    ),
    validation = Rule::new("!self.metadata.name.contains('.')").message(
        "metadata.name must not contain a dot: the names of its instances are made from it"
    ),
    validation = Rule::new("!has(self.spec.fallback) || !(self.metadata.name in self.spec.fallback)").message(
        "spec.fallback must not name the deployment itself: name others that may answer instead"
    )
)]
#[x_kube(
    validation = Rule::new(
        "self.redundancy.survive == 'none' || !has(self.devices.perInstance) || self.devices.perInstance >= 2"
    ).message("spec.redundancy.survive needs at least 2 devices: raise spec.devices.perInstance or leave it out")
)]
#[serde(rename_all = "camelCase")]
pub struct ModelDeploymentSpec {
    /// Name of the ModelProfile.
    #[schemars(length(min = 1, max = 253))]
    pub model: String,
    /// The weights to serve.
    pub weights: Weights,
    /// Instances to run; obeyed unless `autoscaling` is set.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: i32,
    /// Lets Berth choose the number of instances between two bounds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    /// What users of the model should see.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objective: Option<Objective>,
    /// Devices that may be used.
    #[serde(default)]
    pub devices: DeviceChoice,
    /// What the placement must survive.
    #[serde(default)]
    pub redundancy: Redundancy,
    /// CapacityQueue in which it waits and whose quota it uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub queue: Option<String>,
    /// ModelDeployments of the same namespace that may answer instead under shortage, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 253)), extend("x-kubernetes-list-type" = "set"))]
    pub fallback: Vec<String>,
    /// What to do with requests that do not fit.
    #[serde(default)]
    pub on_shortage: OnShortage,
    /// No re-plans and no remediation while true.
    #[serde(default)]
    pub paused: bool,
    /// How the model is run.
    #[serde(default)]
    pub serving: Serving,
}

const fn one() -> i32 {
    1
}

/// Where weights are and what they must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Weights {
    /// `file://` URI of a checkpoint folder under a root that the chart allows.
    #[schemars(length(max = 1024))]
    #[x_kube(
        validation = Rule::new("['file://', 'https://', 's3://', 'hf://', 'oci://'].exists(s, self.startsWith(s))")
            .message("weights.uri must start with file://, https://, s3://, hf:// or oci://"),
        validation = Rule::new("!self.startsWith('file://') || self.startsWith('file:///')")
            .message("weights.uri must be an absolute path after file://, as in file:///models/v3"),
        validation = Rule::new("!(self + '/').contains('/../')")
            .message("weights.uri must not contain '..': write the path that it means")
    )]
    pub uri: String,
    /// `sha256:<hex>` of the checkpoint; empty = whatever is there when the instance starts.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 71))]
    #[x_kube(
        validation = Rule::new("self == '' || self.matches('^sha256:[0-9a-f]{64}$')")
            .message("digest must be sha256: followed by 64 lower-case hexadecimal digits")
    )]
    pub digest: String,
}

/// Bounds for the number of instances.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("self.min <= self.max")
        .message("spec.autoscaling.min must not be above spec.autoscaling.max")
)]
#[serde(rename_all = "camelCase")]
pub struct Autoscaling {
    /// Least instances.
    #[schemars(range(min = 0, max = 1000))]
    pub min: i32,
    /// Most instances.
    #[schemars(range(min = 1, max = 1000))]
    pub max: i32,
}

/// What users of the model should see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("has(self.ttftMs) || has(self.tpotMs)")
        .message("spec.objective needs ttftMs or tpotMs, or both")
)]
#[serde(rename_all = "camelCase")]
pub struct Objective {
    /// Time to the first token, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub ttft_ms: Option<u64>,
    /// Time per further token, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub tpot_ms: Option<u64>,
    /// Share of requests that must meet it, percent.
    #[serde(default = "ninety_five")]
    #[schemars(range(min = 1, max = 100))]
    pub percentile: u32,
}

const fn ninety_five() -> u32 {
    95
}

/// Devices that may be used; an empty list allows all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("!has(self.crossVendor) || !self.crossVendor || !has(self.vendors) || size(self.vendors) != 1")
        .message("devices.crossVendor needs more than one vendor: name both in devices.vendors or leave vendors out")
)]
#[serde(rename_all = "camelCase")]
pub struct DeviceChoice {
    /// Allowed vendors.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 2), extend("x-kubernetes-list-type" = "set"))]
    pub vendors: Vec<Vendor>,
    /// Allowed products, as AcceleratorNodes report them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 128)), extend("x-kubernetes-list-type" = "set"))]
    #[x_kube(
        validation = Rule::new("self.all(product, product.trim() != '')")
            .message("devices.products must not hold an empty text: write products as kubectl get ban prints them")
    )]
    pub products: Vec<String>,
    /// Devices of one instance; absent = the least that memory and redundancy allow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub per_instance: Option<u32>,
    /// One instance may span devices of both vendors.
    #[serde(default)]
    pub cross_vendor: bool,
    /// Largest share of an instance's devices in one failure domain, percent; absent = no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub blast_radius_percent: Option<u32>,
}

/// What the placement must survive.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Redundancy {
    /// The largest failure domain whose loss may leave no expert without a replica.
    #[serde(default)]
    pub survive: Survive,
    /// Slots per layer beyond one per expert and what `survive` needs, for hot experts.
    #[serde(default)]
    #[schemars(range(min = 0, max = 65534))]
    pub extra_replicas: u32,
}

/// A failure domain that may be lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Survive {
    /// One replica of each expert is enough.
    #[default]
    None,
    /// Any one device may be lost.
    Device,
    /// Any one node may be lost.
    Node,
    /// Any one rack may be lost.
    Rack,
}

/// What to do with requests that do not fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnShortage {
    /// Wait in the queue.
    #[default]
    Queue,
    /// Answer from a fallback.
    Degrade,
    /// Refuse with a time to come back.
    Refuse,
}

/// How the model is run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Serving {
    /// Berth's own runner and workers, or an engine.
    #[serde(default)]
    pub mode: ServingMode,
}

/// Who computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ServingMode {
    /// Berth's runner and workers.
    #[default]
    Native,
    /// An inference engine that Berth manages; not honoured yet.
    Engine,
}

/// What the operator found and did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelDeploymentStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One word: Pending, Loading, Serving, Degraded, Paused, Rejected.
    #[serde(default)]
    pub phase: String,
    /// Instances that exist.
    #[serde(default)]
    pub replicas: i32,
    /// Instances that answer requests.
    #[serde(default)]
    pub ready_replicas: i32,
    /// Instances wanted now.
    #[serde(default)]
    pub desired_replicas: i32,
    /// Label selector of the runner pods, for `/scale`.
    #[serde(default)]
    pub selector: String,
    /// For people: `ready/desired`, pools, the dominant reason.
    #[serde(default)]
    pub summary: Summary,
    /// The instances, by name of their ExpertPlacement.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub instances: Vec<InstanceStatus>,
    /// Fields of the spec that are not honoured, by path.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unhonoured_fields: Vec<String>,
    /// Devices granted in the queue.
    #[serde(default)]
    pub granted_devices: u32,
    /// Accepted, CapacityAvailable, Placed, WeightsLoaded, Serving, Degraded, Ready, Reconciling, Stalled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Printed columns.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// `ready/desired` instances.
    #[serde(default)]
    pub instances: String,
    /// `product:devices` of what is used.
    #[serde(default)]
    pub pools: String,
    /// The one reason that matters most.
    #[serde(default)]
    pub reason: String,
    /// What is and what to do, in one sentence.
    #[serde(default)]
    pub message: String,
}

/// One instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceStatus {
    /// Name of the ExpertPlacement and of the runner Deployment.
    pub name: String,
    /// Hash of what it serves (weights, profile); instances of an older hash are drained.
    pub template: String,
    /// Whether it answers requests.
    pub ready: bool,
    /// Revision that serves.
    #[serde(default)]
    pub revision: u64,
    /// Address of the runner's Serve service, when it runs.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub endpoint: String,
    /// Expert bytes on devices.
    #[serde(default)]
    pub expert_bytes: Bytes,
    /// Why it does not answer, if it does not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}
