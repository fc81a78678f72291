//! PlacementMap: one revision of a placement, slot by slot. Immutable; creating it is the fence that lets
//! only one leader write a revision.

use berth_types::{DeviceId, ExpertId};
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
    validation = Rule::new("self.layers.all(layer, !has(layer.weights) || size(layer.weights) == size(layer.experts))")
        .message("a layer with weights must have one for every slot"),
    validation = Rule::new("size(self.layers[0].experts) == (self.devices.map(device, device.slots).sum() * 8 + 2) / 3")
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
    #[schemars(length(min = 1, max = 256))]
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
    /// Expert in each slot, device by device, as base64 without padding of little-endian 16-bit numbers; 65535 =
    /// empty. (Packed, so that 61 layers of 9,000 slots stay below etcd's limit of 1.5 MB.)
    #[serde(with = "packed")]
    #[schemars(with = "String", length(max = 174_760), regex(pattern = "^[A-Za-z0-9+/]*$"))]
    pub experts: Vec<Option<ExpertId>>,
    /// What part of its expert's tokens each slot takes, packed likewise: the parts of an expert sum to 65535, an empty slot
    /// has 0. Absent = replicas of an expert share its tokens evenly.
    #[serde(default, with = "crate::packed::optional", skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", length(max = 174_760), regex(pattern = "^[A-Za-z0-9+/]*$"))]
    pub weights: Option<Vec<u16>>,
}

/// Slots as they stand in the object.
mod packed {
    use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
    use berth_types::ExpertId;
    use serde::{Deserialize as _, Deserializer, Serializer, de, ser};

    /// What an empty slot holds.
    const EMPTY: u16 = u16::MAX;

    pub(super) fn serialize<S: Serializer>(slots: &[Option<ExpertId>], serializer: S) -> Result<S::Ok, S::Error> {
        let number = |slot: &Option<ExpertId>| match slot {
            None => Ok(EMPTY),
            Some(ExpertId(id)) => u16::try_from(*id).ok().filter(|id| *id != EMPTY).ok_or_else(|| {
                ser::Error::custom(format!("expert {id} is above 65534, the highest that a PlacementMap can name"))
            }),
        };
        let bytes = slots.iter().map(|slot| Ok(number(slot)?.to_le_bytes())).collect::<Result<Vec<_>, S::Error>>()?;
        serializer.serialize_str(&STANDARD_NO_PAD.encode(bytes.concat()))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Option<ExpertId>>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD_NO_PAD.decode(&text).map_err(|error| {
            de::Error::custom(format!("experts: {error}: write base64 without padding of 16-bit numbers"))
        })?;
        let (pairs, rest) = bytes.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(de::Error::custom("experts: an odd number of bytes: each slot has two"));
        }
        let slot = |pair: &[u8; 2]| Some(u16::from_le_bytes(*pair)).filter(|id| *id != EMPTY);
        Ok(pairs.iter().map(|pair| slot(pair).map(|id| ExpertId(id.into()))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    proptest! {
        #[test]
        fn any_slots_survive_the_object(slots in proptest::collection::vec(proptest::option::of(0u32..65_535), 0..64)) {
            let experts: Vec<_> = slots.into_iter().map(|slot| slot.map(ExpertId)).collect();
            let weights = Some((0..experts.len()).map(|slot| u16::try_from(slot * 77).unwrap()).collect());
            let layer = MapLayer { layer: 3, experts, weights };
            let text = serde_json::to_string(&layer).unwrap();
            prop_assert_eq!(serde_json::from_str::<MapLayer>(&text).unwrap(), layer);
        }

        #[test]
        fn any_text_reads_or_fails_cleanly(text in ".{0,40}") {
            let _ = serde_json::from_value::<MapLayer>(json!({"layer": 1, "experts": text}));
            let _ = serde_json::from_value::<MapLayer>(json!({"layer": 1, "experts": "AAA", "weights": text}));
        }
    }

    #[test]
    fn an_expert_beyond_the_format_is_refused() {
        let layer = MapLayer { layer: 1, experts: vec![Some(ExpertId(65_535))], weights: None };
        assert!(serde_json::to_string(&layer).unwrap_err().to_string().contains("65535"));
        assert!(serde_json::from_value::<MapLayer>(json!({"layer": 1, "experts": "AA"})).is_err());
    }
}
