//! DemandReport: what one gateway pod sees of the demand for a deployment. Owned by the pod, so a dead
//! reporter's figures vanish with it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

/// Demand over one window.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "DemandReport",
    plural = "demandreports",
    namespaced,
    doc = "What one gateway pod sees of the demand for a deployment.",
    selectable = ".spec.deployment",
    printcolumn(name = "Deployment", type_ = "string", json_path = ".spec.deployment"),
    printcolumn(name = "Requests", type_ = "integer", json_path = ".spec.requests"),
    printcolumn(name = "Input", type_ = "integer", json_path = ".spec.inputTokens"),
    printcolumn(name = "Output", type_ = "integer", json_path = ".spec.outputTokens"),
    printcolumn(name = "Waiting", type_ = "integer", json_path = ".spec.waiting"),
    printcolumn(name = "Refused", type_ = "integer", json_path = ".spec.refused"),
    printcolumn(name = "Observed", type_ = "date", json_path = ".spec.observedAt"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp", priority = 1)
)]
#[x_kube(
    validation = Rule::new("self.requests > 0 || self.inputTokens == 0")
        .message("spec.inputTokens must be 0 when no request arrived"),
    validation = Rule::new("self.deployment == oldSelf.deployment")
        .message("spec.deployment cannot change: another deployment's demand is another report")
)]
#[serde(rename_all = "camelCase")]
pub struct DemandReportSpec {
    /// Name of the ModelDeployment.
    #[schemars(length(min = 1, max = 253))]
    pub deployment: String,
    /// End of the window.
    pub observed_at: Time,
    /// Length of the window, seconds.
    #[schemars(range(min = 1, max = 3600))]
    pub window_seconds: u32,
    /// Requests that arrived.
    pub requests: u64,
    /// Prompt tokens that arrived.
    pub input_tokens: u64,
    /// Tokens that were generated.
    pub output_tokens: u64,
    /// Requests that wait now.
    pub waiting: u64,
    /// Requests refused in the window.
    pub refused: u64,
}
