//! DemandReport: what one gateway pod sees of the demand for a deployment. Owned by the pod, so a dead
//! reporter's figures vanish with it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Demand over one window.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "DemandReport",
    plural = "demandreports",
    namespaced,
    category = "berth"
)]
#[serde(rename_all = "camelCase")]
pub struct DemandReportSpec {
    /// Name of the ModelDeployment.
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
