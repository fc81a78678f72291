//! The script's words: the header that lists devices, and the settings and events of later lines. Only the
//! fields that concern these libraries are read; the rest of a line is somebody else's.

use std::collections::BTreeMap;

pub use berth_double_stage::words::{Hex, Value};
use serde::Deserialize;

/// The first line of a script.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Header {
    /// Ascend devices.
    #[serde(default)]
    pub ascend: Vec<DeviceHeader>,
    /// What is known of the vendor libraries.
    #[serde(default)]
    pub libraries: Libraries,
}

/// Vendor libraries of a node.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Libraries {
    /// This one. (`null` = not installed, which the caller sees to.)
    #[serde(default)]
    pub dcmi: Option<LibraryHeader>,
}

/// How this library presents itself.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct LibraryHeader {
    /// Driver version.
    #[serde(default)]
    pub driver: Option<String>,
    /// Generation of calls that it answers, 1 or 2.
    #[serde(default)]
    pub api: Option<u8>,
    /// What its init call returns.
    #[serde(default)]
    pub init: i32,
}

/// One device of the header.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct DeviceHeader {
    /// Card; of the second generation, the device's id.
    pub card: i32,
    /// Number on its card.
    #[serde(default)]
    pub device: i32,
    /// What events call it; absent = its place in this list.
    #[serde(default)]
    pub logic_id: Option<u16>,
    /// Product name.
    #[serde(default)]
    pub product: Option<String>,
    /// Memory, bytes.
    #[serde(default)]
    pub hbm_bytes: Option<u64>,
    /// Super-pod.
    #[serde(default)]
    pub superpod: Option<u32>,
    /// Place on the PCI bus, `0000:c1:00.0`.
    #[serde(default)]
    pub pci: Option<String>,
    /// Serial number of the card.
    #[serde(default)]
    pub serial: Option<String>,
    /// The card that shares its network port.
    #[serde(default)]
    pub brother: Option<i32>,
    /// Expected by the node, listed by no library.
    #[serde(default)]
    pub absent: bool,
}

/// A later line, as far as these libraries are concerned.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Line {
    /// When, in ms since the library was initialised; absent = at once.
    #[serde(default)]
    pub at_ms: Option<f64>,
    /// The device, card and number; a line without one is not about a device of ours.
    #[serde(default)]
    pub dcmi: Option<(i32, i32)>,
    /// New settings.
    #[serde(default)]
    pub set: Option<serde_json::Value>,
    /// A fault event to deliver.
    #[serde(default)]
    pub fault: Option<Fault>,
    /// An event of a switch.
    #[serde(default)]
    pub switch: Option<SwitchFault>,
}

/// Settings; what is absent stays as it is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Set {
    /// Health, 0 to 3, or 4294967295.
    pub health: Option<Value>,
    /// Network health.
    pub network_health: Option<Value>,
    /// Codes that hold.
    pub error_codes: Option<Codes>,
    /// Bytes in use.
    pub hbm_used: Option<Value>,
    /// Temperature.
    pub temperature_c: Option<Value>,
    /// Power draw, tenths of a watt.
    pub power: Option<Value>,
    /// Use of the device, percent.
    pub utilization: Option<Value>,
    /// Boot status.
    pub boot_status: Option<Value>,
    /// By sdid: state of a node of the super-pod.
    #[serde(default)]
    pub superpod_status: BTreeMap<String, u32>,
    /// Pages that the next reset isolates.
    pub next_isolated: Option<Value>,
    /// Errors of the link to the host since the chip started.
    pub pcie_errors: Option<Value>,
    /// CRC errors of the HCCS links since the chip started.
    pub hccs_crc_errors: Option<Value>,
    /// Packets that the HCCS links sent again since the chip started.
    pub hccs_retries: Option<Value>,
    /// By symbol: how long a call takes.
    #[serde(default)]
    pub hang_ms: BTreeMap<String, u64>,
    /// By symbol: what a call returns; 0 = as usual.
    #[serde(default, rename = "return")]
    pub returns: BTreeMap<String, i32>,
}

/// Codes that hold, or the code that the call answers instead.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(untagged)]
pub enum Codes {
    /// The list.
    List(Vec<Hex>),
    /// The call fails.
    Code {
        /// With this.
        #[serde(rename = "return")]
        code: i32,
    },
}

impl Default for Codes {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

/// A fault event of a device.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// Code.
    pub id: Hex,
    /// What it says.
    #[serde(default)]
    pub assertion: Assertion,
    /// 0 to 3.
    #[serde(default)]
    pub severity: u8,
    /// Serial number; absent = the next one.
    #[serde(default)]
    pub serial: Option<i32>,
}

/// What an event says of its fault.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Assertion {
    /// It is over.
    Recover,
    /// It is there.
    #[default]
    Occur,
    /// It happened, and is over.
    Once,
}

impl Assertion {
    /// As the library says it.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Recover => 0,
            Self::Occur => 1,
            Self::Once => 2,
        }
    }
}

/// An event of a switch.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwitchFault {
    /// Alarm.
    pub id: Hex,
    /// Fault; absent = the alarm has none.
    #[serde(default)]
    pub fault: Option<u32>,
    /// `cpu`, `npu`, `L2` or `na`.
    #[serde(default)]
    pub peer: Option<String>,
    /// Chip of the switch.
    #[serde(default)]
    pub chip: u16,
    /// Its port; absent = the whole chip.
    #[serde(default)]
    pub port: Option<u16>,
    /// 0 to 3.
    #[serde(default)]
    pub severity: u8,
    /// What it says.
    #[serde(default)]
    pub assertion: Assertion,
}
