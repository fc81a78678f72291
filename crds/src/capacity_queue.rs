//! CapacityQueue: quota, borrowing and priority for the deployments that name it. Cluster-wide.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How much the deployments of a queue may use, and who goes first.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "CapacityQueue",
    plural = "capacityqueues",
    status = "CapacityQueueStatus",
    shortname = "bcq",
    category = "berth",
    doc = "Quota, borrowing and priority for the deployments that name it.",
    printcolumn(name = "Quota", type_ = "integer", json_path = ".spec.quotaDevices"),
    printcolumn(name = "Used", type_ = "integer", json_path = ".status.usedDevices"),
    printcolumn(name = "Borrowed", type_ = "integer", json_path = ".status.borrowedDevices"),
    printcolumn(name = "Waiting", type_ = "integer", json_path = ".status.waiting"),
    printcolumn(name = "Priority", type_ = "integer", json_path = ".spec.priority"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Borrow-Limit", type_ = "integer", json_path = ".spec.borrowLimitDevices", priority = 1)
)]
#[serde(rename_all = "camelCase")]
pub struct CapacityQueueSpec {
    /// Devices that its deployments are sure of.
    #[schemars(range(min = 0, max = 1000000))]
    pub quota_devices: u32,
    /// Most devices beyond the quota, borrowed while nobody else needs them; absent = no bound.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000000))]
    pub borrow_limit_devices: Option<u32>,
    /// Higher goes first.
    #[serde(default)]
    #[schemars(range(min = -1000000, max = 1000000))]
    pub priority: i32,
    /// Namespaces whose deployments may name it; empty = all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(min = 1, max = 63)), extend("x-kubernetes-list-type" = "set"))]
    pub namespaces: Vec<String>,
}

/// How much is used.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CapacityQueueStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Devices granted to its deployments.
    #[serde(default)]
    pub used_devices: u32,
    /// Of these, beyond the quota.
    #[serde(default)]
    pub borrowed_devices: u32,
    /// Deployments that wait.
    #[serde(default)]
    pub waiting: u32,
    /// Accepted, Ready.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
