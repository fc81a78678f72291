//! The one memory formula: how many expert slots a device has for a model. Planner, operator and
//! worker all ask here, so they can never disagree about what fits.

use crate::{model::Geometry, units::Bytes};

/// Share of a device's bytes that is usable, in percent; the rest is the driver's and fragmentation's.
pub const USABLE_PERCENT: u64 = 92;
/// Default transition room, in percent of the device's bytes.
pub const TRANSITION_PERCENT: u64 = 2;

/// A device's memory as one model instance sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes on the device.
    pub device: Bytes,
    /// Bytes the kernels need beside weights (activations, scratch).
    pub workspace: Bytes,
    /// Bytes that other instances already hold or have been promised.
    pub committed: Bytes,
}

/// What is missing when a model does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{needed} are needed for one slot in every layer and {usable} are usable: give the deployment larger or more devices"
)]
pub struct MemoryShort {
    /// Bytes of one slot in each expert layer.
    pub needed: Bytes,
    /// Bytes left for slots.
    pub usable: Bytes,
}

impl DeviceMemory {
    /// Bytes kept free so that new experts can be loaded before old ones go: 2 % of the device, at
    /// least one expert (`expert` = bytes of the largest one).
    #[must_use]
    pub fn transition(&self, expert: Bytes) -> Bytes {
        self.device.scaled(TRANSITION_PERCENT, 100).max(expert)
    }

    /// device × 0.92 − workspace − committed: what a move may fill, transition room included.
    #[must_use]
    pub fn room(&self) -> Bytes {
        self.device.scaled(USABLE_PERCENT, 100).minus(self.workspace).minus(self.committed)
    }

    /// usable = device × 0.92 − workspace − transition − committed.
    #[must_use]
    pub fn usable(&self, expert: Bytes) -> Bytes {
        self.room().minus(self.transition(expert))
    }

    /// Slots per expert layer: usable ÷ Σ layers' expert bytes. `expert` is the bytes of one expert in
    /// this vendor's format, the same in every layer.
    ///
    /// # Errors
    /// [`MemoryShort`] when not even one slot per layer fits.
    pub fn slots_per_layer(&self, geometry: &Geometry, expert: Bytes) -> Result<u64, MemoryShort> {
        let layers = u64::from(geometry.expert_layers());
        let needed = expert.times(layers);
        let usable = self.usable(expert);
        let slots = usable.get().checked_div(needed.get()).unwrap_or(0);
        if slots == 0 { Err(MemoryShort { needed, usable }) } else { Ok(slots) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::tiny;
    use proptest::prelude::*;

    #[test]
    fn one_expert_is_the_least_transition_room() {
        let memory = DeviceMemory { device: Bytes(1_000), workspace: Bytes(0), committed: Bytes(0) };
        assert_eq!(memory.transition(Bytes(5)), Bytes(20));
        assert_eq!(memory.transition(Bytes(50)), Bytes(50));
    }

    #[test]
    fn a_device_too_small_says_by_how_much() {
        let memory = DeviceMemory { device: Bytes(1_000), workspace: Bytes(0), committed: Bytes(0) };
        let short = memory.slots_per_layer(&tiny(), Bytes(400)).unwrap_err();
        assert_eq!(short, MemoryShort { needed: Bytes(1_200), usable: Bytes(520) });
    }

    proptest! {
        #[test]
        fn slots_never_exceed_the_device(device in 0u64..1 << 48, workspace in 0u64..1 << 40, expert in 1u64..1 << 32) {
            let memory = DeviceMemory { device: Bytes(device), workspace: Bytes(workspace), committed: Bytes(0) };
            if let Ok(slots) = memory.slots_per_layer(&tiny(), Bytes(expert)) {
                prop_assert!(expert * 3 * slots + workspace <= device);
            }
        }
    }
}
