//! The script's words: the header that lists devices, and the settings and events of later lines. Only
//! the fields that concern this library are read; the rest of a line is somebody else's.

use std::collections::BTreeMap;

pub use berth_double_stage::words::{Hex, Value};
use serde::Deserialize;

/// The first line of a script.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Header {
    /// NVIDIA devices, in index order.
    #[serde(default)]
    pub nvidia: Vec<DeviceHeader>,
    /// What is known of the vendor libraries.
    #[serde(default)]
    pub libraries: Libraries,
}

/// Vendor libraries of a node.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Libraries {
    /// This one. (`null` = not installed, which the caller sees to.)
    #[serde(default)]
    pub nvml: Option<LibraryHeader>,
}

/// How this library presents itself.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct LibraryHeader {
    /// Driver version; decides which fields exist.
    #[serde(default)]
    pub driver: Option<String>,
    /// Event mask that devices support.
    #[serde(default)]
    pub events: Option<Hex>,
    /// What `nvmlInit_v2` returns.
    #[serde(default)]
    pub init: i32,
}

/// One device of the header.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct DeviceHeader {
    /// `0000:3b:00.0`.
    pub pci: String,
    /// `GPU-…`.
    #[serde(default)]
    pub uuid: Option<String>,
    /// Product name.
    #[serde(default)]
    pub product: Option<String>,
    /// Memory, bytes.
    #[serde(default)]
    pub memory_bytes: Option<u64>,
    /// Board serial number.
    #[serde(default)]
    pub serial: Option<String>,
    /// NVLink fabric.
    #[serde(default)]
    pub fabric: Option<FabricHeader>,
    /// MIG GPU instances; empty = MIG off.
    #[serde(default)]
    pub mig: Vec<serde_json::Value>,
    /// Expected by the node, listed by no library.
    #[serde(default)]
    pub absent: bool,
}

/// A device's place in an NVLink fabric.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct FabricHeader {
    /// Cluster UUID.
    pub cluster: String,
    /// Clique.
    pub clique: u32,
}

/// A later line, as far as this library is concerned.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Line {
    /// When, in ms since the library was initialised; absent = at once.
    #[serde(default)]
    pub at_ms: Option<f64>,
    /// The device; a line without one is not ours.
    #[serde(default)]
    pub nvml: Option<String>,
    /// New settings.
    #[serde(default)]
    pub set: Option<Set>,
    /// An event to deliver.
    #[serde(default)]
    pub event: Option<Event>,
}

/// Settings; what is absent stays as it is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Set {
    /// Every call on the device answers 15.
    pub lost: Option<bool>,
    /// Values of `nvmlDeviceGetFieldValues`, by field id.
    #[serde(default)]
    pub fields: BTreeMap<String, Value>,
    /// Bytes in use.
    pub memory_used: Option<Value>,
    /// Temperature.
    pub temperature_c: Option<Value>,
    /// Power draw, mW.
    pub power_mw: Option<Value>,
    /// Energy since the driver was loaded, mJ.
    pub energy_mj: Option<Value>,
    /// Use of the device, percent.
    pub utilization: Option<Value>,
    /// Volatile uncorrected ECC errors.
    pub ecc_uncorrected: Option<Value>,
    /// Volatile corrected ECC errors.
    pub ecc_corrected: Option<Value>,
    /// Row remapping.
    pub remapped: Option<RemappedValue>,
    /// By symbol: how long a call takes.
    #[serde(default)]
    pub hang_ms: BTreeMap<String, u64>,
    /// By symbol: what a call returns; 0 = as usual.
    #[serde(default, rename = "return")]
    pub returns: BTreeMap<String, i32>,
    /// Too many errors in on-chip memory.
    pub sram_threshold_exceeded: Option<bool>,
    /// Slowdown threshold.
    pub slowdown_c: Option<Value>,
    /// Shutdown threshold.
    pub shutdown_c: Option<Value>,
    /// Clock event reasons.
    pub clock_reasons: Option<Hex>,
    /// Link number to up or down.
    #[serde(default)]
    pub nvlinks: BTreeMap<String, bool>,
    /// NVLink fabric.
    pub fabric: Option<FabricSet>,
    /// Lanes of the link to the host.
    pub pcie_width: Option<Value>,
    /// Lanes that it could have.
    pub pcie_width_max: Option<Value>,
    /// PCIe generation of the link to the host.
    pub pcie_generation: Option<Value>,
    /// The highest that it could have.
    pub pcie_generation_max: Option<Value>,
}

/// Row remapping, or the code that the call answers instead.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(untagged)]
pub enum RemappedValue {
    /// The counters.
    Rows(Remapped),
    /// The call fails.
    Code {
        /// With this.
        #[serde(rename = "return")]
        code: i32,
    },
}

impl Default for RemappedValue {
    fn default() -> Self {
        Self::Rows(Remapped::default())
    }
}

/// Row remapping.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq)]
#[serde(default)]
pub struct Remapped {
    /// Rows remapped for corrected errors.
    pub corrected: u32,
    /// Rows remapped for uncorrected errors.
    pub uncorrected: u32,
    /// A reset is needed for the last one.
    pub pending: bool,
    /// A remap failed.
    pub failed: bool,
}

/// NVLink fabric state; what is absent stays as it is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FabricSet {
    /// Clique.
    pub clique: Option<u32>,
    /// Registration state; 3 = completed.
    pub state: Option<u32>,
    /// Health bits.
    pub health_mask: Option<Hex>,
    /// Health in one number.
    pub health_summary: Option<u32>,
    /// Status code of the registration.
    pub status: Option<i32>,
}

/// A vendor event.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// Event bit.
    #[serde(rename = "type")]
    pub kind: Hex,
    /// XID for 0x8, else 0.
    #[serde(default)]
    pub data: u64,
    /// GPU instance.
    #[serde(default = "no_instance")]
    pub gi: u32,
    /// Compute instance.
    #[serde(default = "no_instance")]
    pub ci: u32,
}

const fn no_instance() -> u32 {
    u32::MAX
}
