//! Why an instance cannot be placed: how many bytes, slots or devices are missing, and what would help.

use berth_types::{Bytes, DeviceId, Vendor, WeightFormat};

/// Why an instance cannot be placed, and what would help.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Infeasible {
    /// Nothing may be used at all.
    #[error(
        "no device may be used: {seen} are known, {barred} of them barred or draining, {refused} not allowed by vendor \
         or product, {small} too small for one slot in every layer ({needed} needed); add a device or widen spec.devices"
    )]
    NoDevices {
        /// Devices known.
        seen: usize,
        /// Not open to new replicas.
        barred: usize,
        /// Excluded by the spec.
        refused: usize,
        /// Without room.
        small: usize,
        /// Bytes of one slot in each layer.
        needed: Bytes,
    },
    /// The declared number of devices is not there.
    #[error(
        "{wanted} devices are wanted and {usable} are usable: {missing} missing; add devices, have more granted, or lower spec.devices.perInstance"
    )]
    DevicesShort {
        /// Devices wanted.
        wanted: usize,
        /// Devices that could be used.
        usable: usize,
        /// The difference.
        missing: usize,
    },
    /// All devices together have too few slots.
    #[error(
        "{slots} slots a layer are needed and {usable} devices have room for {room}: {short} short ({bytes}), about \
         {devices} more devices like these; add devices, grant more, or ask for less redundancy"
    )]
    BytesShort {
        /// Slots needed in each layer.
        slots: usize,
        /// Usable devices.
        usable: usize,
        /// Slots that count.
        room: usize,
        /// The difference.
        short: usize,
        /// Bytes of the missing slots over all layers.
        bytes: Bytes,
        /// Devices that would help.
        devices: usize,
    },
    /// Too few failure domains, or too much in one of them.
    #[error(
        "surviving the loss of a {level} with {wanted} devices needs them in at least 2 failure domains, at most {most} \
         in each, with room for {slots} slots a layer: {domains} domains with {usable} devices are usable; add devices \
         in another {level} or ask for less"
    )]
    DomainsShort {
        /// The level.
        level: &'static str,
        /// Devices wanted.
        wanted: usize,
        /// Most devices in one domain.
        most: usize,
        /// Slots needed in each layer.
        slots: usize,
        /// Domains that have usable devices.
        domains: usize,
        /// Usable devices.
        usable: usize,
    },
    /// Replicas cannot be arranged as asked although the room is there.
    #[error("layer {layer}: replicas cannot be arranged on {devices} devices: {why}")]
    Arrangement {
        /// The layer.
        layer: u32,
        /// Devices.
        devices: usize,
        /// What is in the way.
        why: String,
    },
    /// Too few devices, and others only lack the format.
    #[error(
        "{cause}; {devices} more do not compute with {format}: set vendorFormats.{vendor} of the ModelProfile to one of \
         {computes}"
    )]
    Format {
        /// What is missing without them.
        cause: Box<Infeasible>,
        /// Devices that are left out.
        devices: usize,
        /// How the first of them would hold experts.
        format: WeightFormat,
        /// Its vendor.
        vendor: Vendor,
        /// What it computes with.
        computes: String,
    },
    /// A device has no room to load one new expert beside what it serves.
    #[error(
        "{device} has no room to load one expert beside what it serves: {short} short; free {short} or drain the device"
    )]
    NoTransition {
        /// The device.
        device: DeviceId,
        /// Bytes missing.
        short: Bytes,
    },
}
