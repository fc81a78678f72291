//! AcceleratorNode: one node's devices. The operator writes the spec, the node's agent the status but
//! for the `Reachable` condition, which is the scheduler's.

use berth_types::{Action, Admission, Bytes, DeviceId, Health, Reason, Scope, Vendor, WeightFormat};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the operator wants of a node.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "AcceleratorNode",
    plural = "acceleratornodes",
    status = "AcceleratorNodeStatus",
    shortname = "ban",
    category = "berth",
    derive = "Default",
    doc = "One node's devices. The operator writes the spec, the node's agent the status.",
    printcolumn(name = "Vendor", type_ = "string", json_path = ".status.summary.vendor"),
    printcolumn(name = "Product", type_ = "string", json_path = ".status.summary.product"),
    printcolumn(name = "Devices", type_ = "integer", json_path = ".status.summary.devices"),
    printcolumn(name = "Healthy", type_ = "integer", json_path = ".status.summary.healthy"),
    printcolumn(name = "Schedulable", type_ = "integer", json_path = ".status.summary.schedulable"),
    printcolumn(name = "Action", type_ = "string", json_path = ".status.summary.action"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.summary.reason"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Native", type_ = "boolean", json_path = ".spec.native", priority = 1),
    printcolumn(name = "Drain", type_ = "boolean", json_path = ".spec.drain", priority = 1),
    printcolumn(name = "Domain", type_ = "string", json_path = ".status.summary.domain", priority = 1),
    printcolumn(name = "Rack", type_ = "string", json_path = ".spec.rack", priority = 1),
    printcolumn(name = "Agent", type_ = "string", json_path = ".status.agent", priority = 1),
    validation = Rule::new(
        "!has(self.spec.cordonedDevices) || self.spec.cordonedDevices.all(c, c.device.split('/')[0] == self.metadata.name)"
    ).message("spec.cordonedDevices must name devices of this node: <node>/<device>"),
    validation = Rule::new(
        "!has(self.spec.orders) || self.spec.orders.all(o, o.device.split('/')[0] == self.metadata.name)"
    ).message("spec.orders must name devices of this node: <node>/<device>")
)]
#[serde(rename_all = "camelCase")]
pub struct AcceleratorNodeSpec {
    /// The node hosts experts (its label `berth.dev/mode=native` was seen, and nothing else held its devices).
    #[serde(default, skip_serializing_if = "is_false")]
    pub native: bool,
    /// No new replicas; those there are moved away.
    #[serde(default, skip_serializing_if = "is_false")]
    pub drain: bool,
    /// The node's rack, from its labels; empty = the node is its own failure domain.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 63))]
    pub rack: String,
    /// Pods that still hold devices of a node labelled native; it hosts nothing before they are gone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    pub held_by: Vec<Holder>,
    /// Devices to drain, with a reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 64),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["device"])
    )]
    pub cordoned_devices: Vec<CordonedDevice>,
    /// Orders to the agent: resets, and reboots where they are allowed. One that is taken out before it started is
    /// cancelled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 64),
        extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["id"])
    )]
    pub orders: Vec<Order>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
const fn is_false(value: &bool) -> bool {
    !*value
}

/// A pod that holds devices of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Holder {
    /// `<namespace>/<name>`.
    #[schemars(length(max = 512))]
    pub pod: String,
    /// The extended resource, such as `nvidia.com/gpu`.
    #[schemars(length(max = 253))]
    pub resource: String,
    /// How many of it.
    pub devices: u64,
}

/// One device taken out: by hand, or by the operator, whose reasons begin with `remediation `.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CordonedDevice {
    /// The device.
    pub device: DeviceId,
    /// Why.
    #[schemars(length(min = 1, max = 512))]
    pub reason: String,
}

/// One order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("self == oldSelf").message("an order never changes: write another one under a new id"),
    validation = Rule::new("self.action in ['ResetDevice', 'ResetGroup', 'RebootNode']")
        .message("an order's action must be ResetDevice, ResetGroup or RebootNode")
)]
#[serde(rename_all = "camelCase")]
pub struct Order {
    /// Unique within the node; an order is carried out once.
    #[schemars(length(min = 1, max = 63))]
    pub id: String,
    /// The device.
    pub device: DeviceId,
    /// What to do.
    pub action: Action,
    /// Given up after this time.
    pub deadline: Time,
    /// Why, for people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = 512))]
    pub reason: String,
}

/// How far an order is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum OrderPhase {
    /// Seen, not begun: the message says what it waits for.
    Pending,
    /// Being carried out; it cannot be cancelled any more.
    Started,
    /// Carried out. Whether the device is well again, its health says after validation.
    Succeeded,
    /// Tried, or refused.
    Failed,
    /// Taken out of the spec before it started.
    Cancelled,
    /// Its deadline passed before it started.
    Expired,
}

impl OrderPhase {
    /// Whether nothing more will happen.
    #[must_use]
    pub const fn is_final(self) -> bool {
        !matches!(self, Self::Pending | Self::Started)
    }

    /// The word in the object.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Started => "Started",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
            Self::Cancelled => "Cancelled",
            Self::Expired => "Expired",
        }
    }
}

/// What became of one order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OrderStatus {
    /// The order's.
    pub id: String,
    /// The order's.
    pub device: DeviceId,
    /// The order's.
    pub action: Action,
    /// How far it is.
    pub phase: OrderPhase,
    /// When it was begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<Time>,
    /// When nothing more would happen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished: Option<Time>,
    /// What it waits for, or how it ended.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Nobody knows whether it was carried out.
    #[serde(default, skip_serializing_if = "is_false")]
    pub outcome_unknown: bool,
}

/// What the agent sees.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AcceleratorNodeStatus {
    /// Generation of the spec that the agent has seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Boot id of the node's kernel.
    #[serde(default)]
    pub boot_id: String,
    /// Rises with every report of this boot; the same pair travels on the stream.
    #[serde(default)]
    pub sequence: u64,
    /// The agent's version.
    #[serde(default)]
    pub agent: String,
    /// The node's own entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeHealth>,
    /// The devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["device"]))]
    pub devices: Vec<DeviceStatus>,
    /// Orders: those of the spec, then the last 16 that ended. An id that is here is not carried out again.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["id"]))]
    pub orders: Vec<OrderStatus>,
    /// Printed columns.
    #[serde(default)]
    pub summary: NodeSummary,
    /// Ready (agent); Reachable (scheduler).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Printed columns of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeSummary {
    /// Vendors, joined by a comma.
    #[serde(default)]
    pub vendor: String,
    /// Products, joined by a comma.
    #[serde(default)]
    pub product: String,
    /// Devices.
    #[serde(default)]
    pub devices: u32,
    /// Devices that are Healthy.
    #[serde(default)]
    pub healthy: u32,
    /// Devices that are Schedulable.
    #[serde(default)]
    pub schedulable: u32,
    /// Strongest action advised.
    #[serde(default)]
    pub action: String,
    /// Reason of the worst device.
    #[serde(default)]
    pub reason: String,
    /// Interconnect domains, joined by a comma.
    #[serde(default)]
    pub domain: String,
}

/// Health of the node as a whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeHealth {
    /// Health.
    pub health: Health,
    /// Admission.
    pub admission: Admission,
    /// Advised action.
    pub action: Action,
    /// Scope of the worst condition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<Scope>,
    /// Reason of the worst condition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// Vendor code, pid, link, address.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub evidence: String,
}

/// One device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeviceStatus {
    /// `<node>/<local>`.
    pub device: DeviceId,
    /// Who made it.
    pub vendor: Vendor,
    /// Product as the vendor's library says it.
    pub product: String,
    /// Vendor's UUID or serial number; empty when it does not tell.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uuid: String,
    /// Memory on the device.
    pub memory_bytes: Bytes,
    /// Interconnect domain, if it has one beyond the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interconnect_domain: Option<String>,
    /// Devices with the same card fail together.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub card: String,
    /// Devices of the node with the same group can only be reset together; empty = it resets alone.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reset_group: String,
    /// Health.
    pub health: Health,
    /// Admission.
    pub admission: Admission,
    /// Advised action.
    pub action: Action,
    /// Scope of the worst condition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<Scope>,
    /// Reason of the worst condition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// Vendor code, pid, link, address.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub evidence: String,
    /// Since when the five words hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    /// What its worker does: Starting, Serving, Dead; empty = no worker.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub worker: String,
    /// Weight formats that its kernels compute with; none = not said.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub computes: Vec<WeightFormat>,
    /// Placements whose experts its worker holds; told only while the device is not Schedulable, which is when it
    /// matters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holds: Vec<String>,
}
