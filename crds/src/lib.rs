//! Kubernetes objects of the group `berth.dev`, version `v1alpha1`: types, schemas and the words of
//! their conditions. Holds no client and takes no decision.
#![expect(unreachable_pub, reason = "KubeSchema repeats a public struct inside a block of its own")]
#![expect(clippy::duplicated_attributes, reason = "each printed column has a type and a path of its own")]

pub mod accelerator_node;
pub mod capacity_queue;
pub mod conditions;
pub mod definitions;
pub mod demand_report;
pub mod expert_placement;
#[cfg(test)]
mod fuzz;
mod geometry_rules;
pub mod model_deployment;
pub mod model_profile;
mod packed;
pub mod placement_map;
pub mod presets;

pub use accelerator_node::{AcceleratorNode, AcceleratorNodeSpec, AcceleratorNodeStatus};
pub use capacity_queue::{CapacityQueue, CapacityQueueSpec, CapacityQueueStatus};
pub use demand_report::{DemandReport, DemandReportSpec};
pub use expert_placement::{ExpertPlacement, ExpertPlacementSpec, ExpertPlacementStatus};
pub use model_deployment::{ModelDeployment, ModelDeploymentSpec, ModelDeploymentStatus};
pub use model_profile::{ModelProfile, ModelProfileSpec};
pub use placement_map::{PlacementMap, PlacementMapSpec};

/// API group of every object.
pub const GROUP: &str = "berth.dev";
/// Label and annotation that opts a node in to hosting experts: `native`.
pub const LABEL_MODE: &str = "berth.dev/mode";
/// Label of a node's rack, the failure domain above the node.
pub const LABEL_RACK: &str = "berth.dev/rack";
/// Taint of native nodes: `berth.dev/native=:NoSchedule`.
pub const TAINT_NATIVE: &str = "berth.dev/native";
/// Label on everything made for a ModelDeployment: its name.
pub const LABEL_DEPLOYMENT: &str = "berth.dev/deployment";
/// Label on everything made for an instance: the ExpertPlacement's name.
pub const LABEL_PLACEMENT: &str = "berth.dev/placement";
/// Label on everything made for an instance: hash of what it serves. An instance of another hash is replaced.
pub const LABEL_TEMPLATE: &str = "berth.dev/template";
/// Label on everything made for an instance: its index, from 0.
pub const LABEL_INSTANCE: &str = "berth.dev/instance";
/// Field managers for server-side apply, one per part.
pub mod managers {
    /// The operator.
    pub const OPERATOR: &str = "berth-operator";
    /// The scheduler.
    pub const SCHEDULER: &str = "berth-scheduler";
    /// The agent.
    pub const AGENT: &str = "berth-agent";
}
