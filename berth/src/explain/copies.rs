//! Where the copies of one expert are, in one revision. Pure.

use std::fmt;

use anyhow::bail;
use berth_crds::PlacementMap;
use berth_scheduler::index::from_map;
use berth_types::{DeviceId, ExpertId, LayerId};
use serde::Serialize;

/// The copies of an expert.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Copies {
    revision: u64,
    layer: u32,
    expert: u32,
    slots: Vec<Slot>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Slot {
    device: DeviceId,
    slot: usize,
}

/// Where `expert` of `layer` is in `map`.
pub(crate) fn copies(map: &PlacementMap, (layer, expert): (u32, u32)) -> anyhow::Result<Copies> {
    let layout = from_map(map);
    let Some(row) = layout.layers.get(&LayerId(layer)) else {
        let known: Vec<String> = layout.layers.keys().map(ToString::to_string).collect();
        bail!("--layer {layer}: the model's expert layers are {}", known.join(", "))
    };
    let mut slots = Vec::new();
    for (device, range) in layout.ranges() {
        for (slot, held) in row.get(range).unwrap_or_default().iter().enumerate() {
            if *held == Some(ExpertId(expert)) {
                slots.push(Slot { device: device.clone(), slot });
            }
        }
    }
    if slots.is_empty() {
        bail!("--expert {expert}: layer {layer} has no such expert");
    }
    Ok(Copies { revision: map.spec.revision, layer, expert, slots })
}

impl fmt::Display for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { revision, layer, expert, slots } = self;
        let slot = |slot: &Slot| format!("{} slot {}", slot.device, slot.slot);
        let list = slots.iter().map(slot).collect::<Vec<_>>().join("; ");
        write!(f, "  expert    {expert} of layer {layer}, revision {revision}: {list}")
    }
}
