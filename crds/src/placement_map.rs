//! PlacementMap: one revision of a placement, slot by slot. Immutable; creating it is the fence that lets
//! only one leader write a revision.

use berth_types::DeviceId;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The map (layer, slot) → expert of one revision.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "PlacementMap",
    plural = "placementmaps",
    namespaced,
    category = "berth"
)]
#[serde(rename_all = "camelCase")]
pub struct PlacementMapSpec {
    /// Name of the ExpertPlacement.
    pub placement: String,
    /// The revision.
    #[schemars(range(min = 1))]
    pub revision: u64,
    /// The leader's epoch when it was written.
    pub epoch: u64,
    /// Devices in slot order, with their number of slots per layer.
    pub devices: Vec<MapDevice>,
    /// For each expert layer, the experts in all slots of all devices in order.
    pub layers: Vec<MapLayer>,
}

/// One device of a map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MapDevice {
    /// The device.
    pub device: DeviceId,
    /// Its slots in each layer.
    #[schemars(range(min = 0, max = 65535))]
    pub slots: u32,
}

/// One layer of a map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MapLayer {
    /// The layer.
    pub layer: u32,
    /// Expert in each slot, device by device; -1 = empty.
    pub experts: Vec<i32>,
}
