//! Wire to types and back. Everything that arrives is checked here, once; an error names the message's
//! field and what was expected, and never carries activations or prompts.

use std::collections::BTreeMap;

use berth_types::{
    Action, Admission, Bytes, DeviceId, DeviceState, ExpertId, Health, LayerId, PlacementName, Reason, Revision, Scope,
    Vendor, WeightFormat,
};

use crate::{EMPTY_SLOT, v1};

/// Largest layer index and number of experts or slots that is believed.
const LIMIT: usize = 65_535;

/// A field of a message that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("field {field} is {value:?}: expected {expected}")]
pub struct WireError {
    /// Path of the field in the message.
    pub field: String,
    /// What it holds, shortened.
    pub value: String,
    /// What it should hold.
    pub expected: &'static str,
}

impl WireError {
    /// An error for `field`, whose value is shortened to what a log line can hold.
    #[must_use]
    pub fn new(field: &str, value: &str, expected: &'static str) -> Self {
        Self { field: field.to_owned(), value: value.chars().take(80).collect(), expected }
    }
}

/// Slots of a device by layer: the expert in each, `None` = empty.
pub type Slots = BTreeMap<LayerId, Vec<Option<ExpertId>>>;

/// Slots as they travel.
#[must_use]
pub fn slots_to_wire(slots: &Slots) -> Vec<v1::LayerSlots> {
    let expert = |slot: &Option<ExpertId>| slot.map_or(EMPTY_SLOT, |expert| expert.0);
    slots
        .iter()
        .map(|(layer, experts)| v1::LayerSlots { layer: layer.0, experts: experts.iter().map(expert).collect() })
        .collect()
}

/// Slots as they arrived.
///
/// # Errors
/// When a layer comes twice, or a layer, expert or number of slots is beyond belief.
pub fn slots_from_wire(layers: &[v1::LayerSlots]) -> Result<Slots, WireError> {
    let mut slots = Slots::new();
    for entry in layers {
        let beyond = |number: u32| usize::try_from(number).map_or(true, |number| number > LIMIT);
        if beyond(entry.layer) {
            return Err(WireError::new("layers.layer", &entry.layer.to_string(), "a layer index up to 65535"));
        }
        if entry.experts.len() > LIMIT {
            return Err(WireError::new("layers.experts", &entry.experts.len().to_string(), "at most 65535 slots"));
        }
        if let Some(wrong) = entry.experts.iter().find(|expert| **expert != EMPTY_SLOT && beyond(**expert)) {
            return Err(WireError::new("layers.experts", &wrong.to_string(), "an expert index up to 65535"));
        }
        let experts = entry.experts.iter().map(|expert| (*expert != EMPTY_SLOT).then_some(ExpertId(*expert)));
        if slots.insert(LayerId(entry.layer), experts.collect()).is_some() {
            return Err(WireError::new("layers.layer", &entry.layer.to_string(), "each layer once"));
        }
    }
    Ok(slots)
}

/// Weights of a device's slots by layer, each of 65535 for the replicas of its expert together.
pub type SlotWeights = BTreeMap<LayerId, Vec<u16>>;

/// Weights as they travel.
#[must_use]
pub fn weights_to_wire(weights: &SlotWeights) -> Vec<v1::LayerWeights> {
    let layer = |(layer, weights): (&LayerId, &Vec<u16>)| v1::LayerWeights {
        layer: layer.0,
        weights: weights.iter().map(|weight| u32::from(*weight)).collect(),
    };
    weights.iter().map(layer).collect()
}

/// Weights as they arrived, for the slots that came with them.
///
/// # Errors
/// When a layer comes twice or has no slots, a weight is above 65535, or there are not as many as slots.
pub fn weights_from_wire(wire: &[v1::LayerWeights], slots: &Slots) -> Result<SlotWeights, WireError> {
    let mut weights = SlotWeights::new();
    for entry in wire {
        let held = slots.get(&LayerId(entry.layer)).map_or(0, Vec::len);
        if entry.weights.len() != held {
            let count = entry.weights.len().to_string();
            return Err(WireError::new("weights.weights", &count, "as many weights as the layer has slots"));
        }
        let checked = entry.weights.iter().map(|weight| {
            u16::try_from(*weight).map_err(|_| WireError::new("weights.weights", &weight.to_string(), "at most 65535"))
        });
        if weights.insert(LayerId(entry.layer), checked.collect::<Result<_, _>>()?).is_some() {
            return Err(WireError::new("weights.layer", &entry.layer.to_string(), "each layer once"));
        }
    }
    Ok(weights)
}

/// A shelf, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shelf {
    /// The placement it belongs to.
    pub placement: PlacementName,
    /// Uid of the ExpertPlacement.
    pub placement_uid: String,
    /// The placement's revision.
    pub revision: Revision,
    /// Where the weights are.
    pub uri: String,
    /// What the weights are; empty = not pinned.
    pub digest: String,
    /// How the device holds the experts; `None` = as the checkpoint stores them.
    pub format: Option<WeightFormat>,
    /// Experts by layer and slot.
    pub slots: Slots,
}

impl TryFrom<&v1::Shelf> for Shelf {
    type Error = WireError;

    fn try_from(wire: &v1::Shelf) -> Result<Self, WireError> {
        let weights = wire.weights.as_ref().ok_or_else(|| WireError::new("weights", "", "a uri and a digest"))?;
        if wire.placement_uid.is_empty() {
            return Err(WireError::new("placement_uid", "", "the uid of the ExpertPlacement"));
        }
        if wire.revision == 0 {
            return Err(WireError::new("revision", "0", "a revision from 1"));
        }
        Ok(Self {
            placement: placement(&wire.placement)?,
            placement_uid: wire.placement_uid.clone(),
            revision: Revision(wire.revision),
            uri: weights.uri.clone(),
            digest: weights.digest.clone(),
            format: Some(wire.format.as_str()).filter(|text| !text.is_empty()).map(weight_format).transpose()?,
            slots: slots_from_wire(&wire.layers)?,
        })
    }
}

impl From<&Shelf> for v1::Shelf {
    fn from(shelf: &Shelf) -> Self {
        Self {
            placement: shelf.placement.to_string(),
            placement_uid: shelf.placement_uid.clone(),
            revision: shelf.revision.0,
            weights: Some(v1::Weights { uri: shelf.uri.clone(), digest: shelf.digest.clone() }),
            layers: slots_to_wire(&shelf.slots),
            format: shelf.format.map(|format| format.to_string()).unwrap_or_default(),
        }
    }
}

/// A placement's name.
///
/// # Errors
/// When it is not `<namespace>/<name>`.
pub fn placement(text: &str) -> Result<PlacementName, WireError> {
    text.parse().map_err(|_| WireError::new("placement", text, "<namespace>/<name>"))
}

/// A device's id.
///
/// # Errors
/// When it is not `<node>/<local>`.
pub fn device(text: &str) -> Result<DeviceId, WireError> {
    text.parse().map_err(|_| WireError::new("device", text, "<node>/<PCI address> or <node>/<card>.<device>"))
}

fn weight_format(text: &str) -> Result<WeightFormat, WireError> {
    text.parse().map_err(|_| WireError::new("format", text, "a weight format, or nothing"))
}

/// One device of a health report, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceHealth {
    /// The device.
    pub id: DeviceId,
    /// Its five words.
    pub state: DeviceState,
    /// The vendor's code, pid, link or address; free text.
    pub evidence: String,
    /// Who made it.
    pub vendor: Vendor,
    /// Product name as the vendor's library says it.
    pub product: String,
    /// Memory on the device.
    pub memory: Bytes,
    /// Interconnect domain, if it has one beyond the node.
    pub interconnect_domain: Option<String>,
    /// Devices with the same card on a node fail together.
    pub card: String,
    /// Since when the state holds, milliseconds of Unix time.
    pub since_unix_ms: i64,
    /// W3C trace context of the fault that led to the state; empty = none. Not checked: it decides nothing.
    pub traceparent: String,
    /// Formats that its kernels compute with; none = not said, as by an agent that does not know the field.
    pub computes: Vec<WeightFormat>,
}

impl TryFrom<&v1::DeviceHealth> for DeviceHealth {
    type Error = WireError;

    fn try_from(wire: &v1::DeviceHealth) -> Result<Self, WireError> {
        Ok(Self {
            id: device(&wire.device)?,
            state: state_from_wire(wire)?,
            evidence: wire.evidence.clone(),
            vendor: wire.vendor.parse().map_err(|_| WireError::new("vendor", &wire.vendor, "nvidia or ascend"))?,
            product: wire.product.clone(),
            memory: Bytes(wire.memory_bytes),
            interconnect_domain: Some(wire.interconnect_domain.clone()).filter(|domain| !domain.is_empty()),
            card: wire.card.clone(),
            since_unix_ms: wire.since_unix_ms,
            traceparent: Some(wire.traceparent.clone()).filter(|text| text.len() <= 64).unwrap_or_default(),
            // A word of a newer agent is a format that nothing here asks for.
            computes: wire.computes.iter().filter_map(|word| word.parse().ok()).collect(),
        })
    }
}

impl From<&DeviceHealth> for v1::DeviceHealth {
    fn from(device: &DeviceHealth) -> Self {
        Self {
            device: device.id.to_string(),
            evidence: device.evidence.clone(),
            vendor: device.vendor.to_string(),
            product: device.product.clone(),
            memory_bytes: device.memory.get(),
            interconnect_domain: device.interconnect_domain.clone().unwrap_or_default(),
            card: device.card.clone(),
            since_unix_ms: device.since_unix_ms,
            traceparent: device.traceparent.clone(),
            computes: device.computes.iter().map(ToString::to_string).collect(),
            ..state_to_wire(device.state)
        }
    }
}

/// The five words of a health entry (of a device or of the node itself).
///
/// # Errors
/// When one is no word of the vocabulary.
pub fn state_from_wire(wire: &v1::DeviceHealth) -> Result<DeviceState, WireError> {
    let word = |field, value: &str| WireError::new(field, value, "a word of the health vocabulary");
    let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
    Ok(DeviceState {
        health: Health::parse(&wire.health).ok_or_else(|| word("health", &wire.health))?,
        admission: Admission::parse(&wire.admission).ok_or_else(|| word("admission", &wire.admission))?,
        action: Action::parse(&wire.action).ok_or_else(|| word("action", &wire.action))?,
        scope: some(&wire.scope)
            .map(|text| Scope::parse_lower(&text).ok_or_else(|| word("scope", &text)))
            .transpose()?,
        reason: some(&wire.reason).map(|text| Reason::parse(&text).ok_or_else(|| word("reason", &text))).transpose()?,
    })
}

/// A health entry that holds only the five words.
#[must_use]
pub fn state_to_wire(state: DeviceState) -> v1::DeviceHealth {
    v1::DeviceHealth {
        health: state.health.to_string(),
        admission: state.admission.to_string(),
        action: state.action.to_string(),
        scope: state.scope.map(Scope::lower).unwrap_or_default().to_owned(),
        reason: state.reason.map(Reason::as_str).unwrap_or_default().to_owned(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use prost::Message;

    fn shelf() -> Shelf {
        Shelf {
            placement: "models/v3-0".parse().unwrap(),
            placement_uid: "6c1f".to_owned(),
            revision: Revision(7),
            uri: "file:///models/v3".to_owned(),
            digest: String::new(),
            format: None,
            slots: [(LayerId(1), vec![Some(ExpertId(3)), None])].into(),
        }
    }

    #[test]
    fn a_shelf_survives_the_wire() {
        let wire = v1::Shelf::from(&shelf());
        assert_eq!(Shelf::try_from(&wire), Ok(shelf()));
    }

    #[test]
    fn a_damaged_shelf_is_refused_by_field() {
        let wire = v1::Shelf::from(&shelf());
        let broken = |change: fn(&mut v1::Shelf)| {
            let mut wire = wire.clone();
            change(&mut wire);
            Shelf::try_from(&wire).unwrap_err().field
        };
        assert_eq!(broken(|shelf| shelf.placement = "x".to_owned()), "placement");
        assert_eq!(broken(|shelf| shelf.placement_uid.clear()), "placement_uid");
        assert_eq!(broken(|shelf| shelf.revision = 0), "revision");
        assert_eq!(broken(|shelf| shelf.weights = None), "weights");
        assert_eq!(broken(|shelf| shelf.layers.push(shelf.layers[0].clone())), "layers.layer");
        assert_eq!(broken(|shelf| shelf.layers[0].experts[0] = 70_000), "layers.experts");
    }

    #[test]
    fn weights_survive_the_wire_and_damaged_ones_are_refused() {
        let slots = shelf().slots;
        let weights: SlotWeights = [(LayerId(1), vec![65_535, 0])].into();
        let wire = weights_to_wire(&weights);
        assert_eq!(weights_from_wire(&wire, &slots), Ok(weights));
        assert_eq!(
            weights_from_wire(&[wire.clone(), wire.clone()].concat(), &slots).unwrap_err().field,
            "weights.layer"
        );
        let broken = |change: fn(&mut v1::LayerWeights)| {
            let mut wire = wire.clone();
            change(&mut wire[0]);
            weights_from_wire(&wire, &slots).unwrap_err().field
        };
        assert_eq!(broken(|layer| layer.weights.push(1)), "weights.weights");
        assert_eq!(broken(|layer| layer.weights[0] = 70_000), "weights.weights");
        assert_eq!(broken(|layer| layer.layer = 2), "weights.weights");
    }

    #[test]
    fn unknown_health_words_are_refused() {
        let mut wire = state_to_wire(DeviceState::HEALTHY);
        assert_eq!(state_from_wire(&wire), Ok(DeviceState::HEALTHY));
        wire.reason = "Gremlins".to_owned();
        assert_eq!(state_from_wire(&wire).unwrap_err().field, "reason");
    }

    #[test]
    fn a_damaged_message_is_read_or_refused() {
        let shelf = v1::Shelf::from(&shelf());
        let device =
            v1::DeviceHealth { device: "gpu-07/0000:3b:00.0".to_owned(), ..state_to_wire(DeviceState::HEALTHY) };
        let devices = vec![v1::DeviceShelves { device: device.device.clone(), shelves: vec![shelf.clone()] }];
        let order = v1::DesiredShelves { epoch: 1, sequence: 2, devices };
        let report = v1::HealthReport { devices: vec![device.clone()], ..Default::default() };
        let whole = [shelf.encode_to_vec(), device.encode_to_vec(), order.encode_to_vec(), report.encode_to_vec()];
        let seeds: Vec<&[u8]> = whole.iter().map(Vec::as_slice).collect();
        berth_mutate::each(&seeds, 8_000, |bytes| {
            if let Ok(wire) = v1::Shelf::decode(bytes) {
                let _ = Shelf::try_from(&wire);
            }
            if let Ok(wire) = v1::DeviceHealth::decode(bytes) {
                let _ = (state_from_wire(&wire), DeviceHealth::try_from(&wire));
            }
            let shelves = v1::DesiredShelves::decode(bytes).map(|order| order.devices).unwrap_or_default();
            for wire in shelves.iter().flat_map(|device| &device.shelves) {
                let _ = Shelf::try_from(wire);
            }
            let _ = (v1::HealthReport::decode(bytes), v1::AgentMessage::decode(bytes), v1::AgentOrder::decode(bytes));
        });
    }

    proptest! {
        #[test]
        fn any_bytes_decode_and_convert_or_fail_cleanly(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            if let Ok(wire) = v1::Shelf::decode(bytes.as_slice()) {
                let _ = Shelf::try_from(&wire);
            }
            if let Ok(wire) = v1::DeviceHealth::decode(bytes.as_slice()) {
                let _ = DeviceHealth::try_from(&wire);
            }
            let _ = v1::AgentMessage::decode(bytes.as_slice());
            let _ = v1::RunnerMessage::decode(bytes.as_slice());
            let _ = v1::AgentOrder::decode(bytes.as_slice());
            let _ = v1::RunnerOrder::decode(bytes.as_slice());
            let _ = v1::WorkerOrder::decode(bytes.as_slice());
            let _ = v1::WorkerReport::decode(bytes.as_slice());
            let _ = v1::GenerateRequest::decode(bytes.as_slice());
        }
    }
}
