//! PlacementMap: one revision of a placement, slot by slot. Immutable; creating it is the fence that lets
//! only one leader write a revision.

use berth_types::DeviceId;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The map (layer, slot) → expert of one revision.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[kube(
    group = "berth.dev",
    version = "v1alpha1",
    kind = "PlacementMap",
    plural = "placementmaps",
    namespaced,
    doc = "One revision of a placement, slot by slot; immutable.",
    selectable = ".spec.placement",
    printcolumn(name = "Placement", type_ = "string", json_path = ".spec.placement"),
    printcolumn(name = "Rev", type_ = "integer", json_path = ".spec.revision"),
    printcolumn(name = "Epoch", type_ = "integer", json_path = ".spec.epoch"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new(
        "self.metadata.name.startsWith(self.spec.placement + '-') && self.metadata.name.substring(size(self.spec.placement) + 1) == string(self.spec.revision)"
    )
    .message("metadata.name must be <spec.placement>-<spec.revision>: creating it is what fences a revision")
)]
#[x_kube(
    validation = Rule::new("self == oldSelf").message("a PlacementMap cannot change: write the next revision"),
    validation = Rule::new("self.layers.all(layer, size(layer.experts) == size(self.layers[0].experts))")
        .message("every layer must have as many slots as the first"),
    validation = Rule::new("size(self.layers[0].experts) == self.devices.map(device, device.slots).sum()")
        .message("every layer must have as many entries as the devices have slots per layer together")
)]
#[serde(rename_all = "camelCase")]
pub struct PlacementMapSpec {
    /// Name of the ExpertPlacement.
    #[schemars(length(min = 1, max = 253))]
    pub placement: String,
    /// The revision.
    #[schemars(range(min = 1))]
    pub revision: u64,
    /// The leader's epoch when it was written.
    pub epoch: u64,
    /// Devices in slot order, with their number of slots per layer.
    #[schemars(length(min = 1, max = 4096))]
    pub devices: Vec<MapDevice>,
    /// For each expert layer, the experts in all slots of all devices in order.
    #[schemars(length(min = 1, max = 1024))]
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
    #[schemars(length(max = 65535), inner(range(min = -1, max = 65533)))]
    pub experts: Vec<i32>,
}
