//! Values that were asked for. One that did not come says so: silence is no value.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// One value that was to be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Read<T> {
    /// This device, driver or library has no such value, or it was not asked for.
    #[default]
    Absent,
    /// The value.
    Value(T),
    /// The library answered this code.
    Failed(i32),
    /// No answer in time.
    Missed,
}

impl<T: Copy> Read<T> {
    /// The value, if there is one.
    #[must_use]
    pub fn value(self) -> Option<T> {
        match self {
            Self::Value(value) => Some(value),
            _ => None,
        }
    }
}

/// The link to the host: what it is, and what it could be with this device in this machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostLink {
    /// Lanes in use.
    pub lanes: u32,
    /// Lanes that there could be.
    pub lanes_most: u32,
    /// PCIe generation in use; an idle device lowers it to save power.
    pub generation: u32,
    /// The highest that there could be.
    pub generation_most: u32,
}

impl HostLink {
    /// Fewer lanes than there could be: no power saving does that.
    #[must_use]
    pub const fn narrow(&self) -> bool {
        self.lanes > 0 && self.lanes < self.lanes_most
    }

    /// A lower generation than there could be.
    #[must_use]
    pub const fn slow(&self) -> bool {
        self.generation > 0 && self.generation < self.generation_most
    }
}

/// Row remapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rows {
    /// A spare row waits for a reset.
    pub pending: bool,
    /// A repair failed; stays so for good.
    pub failed: bool,
}

/// NVLink fabric.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fabric {
    /// Clique, when registered.
    pub clique: Option<u32>,
    /// A field of the health mask says unhealthy or degraded.
    pub unhealthy: bool,
}

/// All values of a device that were read in one go. Deciding: recovery, rows, uncorrected errors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// When the first value was asked for.
    pub begun: Duration,
    /// The library says that the device is gone (code 15).
    pub lost: bool,
    /// The library says that the device needs a reset (code 16).
    pub reset_required: bool,
    /// The driver's recovery action, field 230.
    pub recovery: Read<u32>,
    /// Row remapping, or retired pages of older devices.
    pub rows: Read<Rows>,
    /// Volatile uncorrected memory errors.
    pub ecc_uncorrected: Read<u64>,
    /// Volatile corrected memory errors.
    pub ecc_corrected: Read<u64>,
    /// Too many errors in on-chip memory.
    pub sram_exceeded: Read<bool>,
    /// °C.
    pub temperature: Read<u32>,
    /// °C from which it slows down.
    pub slowdown: Read<u32>,
    /// °C at which it shuts down.
    pub shutdown: Read<u32>,
    /// Clock event reasons.
    pub clock_reasons: Read<u64>,
    /// Packets that the host link had to send again.
    pub replays: Read<u64>,
    /// The link to the host.
    #[serde(default)]
    pub host_link: Read<HostLink>,
    /// Links that were up when first seen and are down now.
    pub links_down: Read<Vec<u32>>,
    /// NVLink fabric.
    pub fabric: Read<Fabric>,
}

impl Reading {
    /// A deciding value that did not come in time or failed: its name and what happened.
    #[must_use]
    pub fn blind(&self) -> Option<String> {
        let deciding = [
            ("recovery action", self.recovery.fault()),
            ("remapped rows", self.rows.fault()),
            ("uncorrected errors", self.ecc_uncorrected.fault()),
        ];
        deciding.into_iter().find_map(|(name, fault)| fault.map(|fault| format!("{name}: {fault}")))
    }

    /// Links that are known to be down.
    #[must_use]
    pub fn down(&self) -> &[u32] {
        match &self.links_down {
            Read::Value(links) => links,
            Read::Absent | Read::Failed(_) | Read::Missed => &[],
        }
    }
}

impl<T> Read<T> {
    /// The library's code, if it answered one.
    #[must_use]
    pub const fn failed(&self) -> Option<i32> {
        match self {
            Self::Failed(code) => Some(*code),
            Self::Absent | Self::Value(_) | Self::Missed => None,
        }
    }

    /// Whether it was asked for in vain: nothing may be concluded from it.
    #[must_use]
    pub const fn unknown(&self) -> bool {
        matches!(self, Self::Failed(_) | Self::Missed)
    }

    fn fault(&self) -> Option<String> {
        match self {
            Self::Absent | Self::Value(_) => None,
            Self::Failed(code) => Some(format!("NVML {code}")),
            Self::Missed => Some("no answer in time".to_owned()),
        }
    }
}

/// All values of an Ascend device that were read in one go. Deciding: health and codes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NpuReading {
    /// When the first value was asked for.
    pub begun: Duration,
    /// 0 to 3; 0xFFFFFFFF = absent or not started.
    pub health: Read<u32>,
    /// Codes of the faults that hold.
    pub codes: Read<Vec<u32>>,
    /// 16 = started.
    pub boot: Read<u32>,
    /// 0 = well, 6 = not known yet.
    pub network: Read<u32>,
    /// Pages that a reset will isolate.
    pub next_isolated: Read<u32>,
    /// Errors of the link to the host since the chip started.
    #[serde(default)]
    pub host_errors: Read<u64>,
    /// Damaged and repeated packets of the scale-up links since the chip started.
    #[serde(default)]
    pub fabric_errors: Read<u64>,
}
