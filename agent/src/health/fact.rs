//! Facts: what was seen, where and when. A fact claims nothing about health.

use std::{fmt, str::FromStr, time::Duration};

use berth_types::Vendor;
use serde::{Deserialize, Deserializer, Serialize};

/// The place of a PCI device on its node, function left out. Compared as numbers, for drivers pad the
/// domain to four or eight digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PciAddress {
    /// Domain (segment).
    pub domain: u32,
    /// Bus.
    pub bus: u8,
    /// Device (slot).
    pub device: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.0", self.domain, self.bus, self.device)
    }
}

/// A text that is no PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no PCI address: write it as 0000:3b:00.0")]
pub struct NoAddress(pub String);

impl FromStr for PciAddress {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let error = || NoAddress(text.chars().take(40).collect());
        let (text, function) = text.split_once('.').unwrap_or((text, "0"));
        let mut parts = text.split(':');
        let mut hex = |digits: std::ops::RangeInclusive<usize>| {
            let part = parts.next().filter(|part| digits.contains(&part.len()))?;
            part.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u32::from_str_radix(part, 16).ok())?
        };
        let (domain, bus, device) = (hex(4..=8), hex(2..=2), hex(2..=2));
        let whole = parts.next().is_none() && function.len() == 1 && function.bytes().all(|byte| byte.is_ascii_digit());
        match (domain, bus.and_then(|bus| u8::try_from(bus).ok()), device.and_then(|at| u8::try_from(at).ok())) {
            (Some(domain), Some(bus), Some(device)) if whole && device < 32 => Ok(Self { domain, bus, device }),
            _ => Err(error()),
        }
    }
}

/// The part of a device's id that is unique on its node.
pub type Local = String;

/// What a fact is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Subject {
    /// The node as a whole.
    Node,
    /// One device, by the local part of its id.
    Device(Local),
}

/// What is known of a device that does not change while it stays in its place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Local part of its id.
    pub local: Local,
    /// Who makes it.
    pub vendor: Vendor,
    /// Product as the vendor's library says it; empty when nobody told.
    pub product: String,
    /// Vendor's UUID, else serial number; empty when nobody told.
    pub uuid: String,
    /// Memory on the device, bytes.
    pub memory_bytes: u64,
    /// Interconnect domain beyond the node.
    pub interconnect_domain: Option<String>,
    /// Devices with the same card fail together.
    pub card: String,
    /// Where it is on the PCI bus; `None` = nobody told.
    pub pci: Option<PciAddress>,
    /// Devices with the same group can only be reset together; `None` = it resets alone.
    pub reset_group: Option<String>,
    /// First number of the driver's version.
    pub driver_branch: Option<u16>,
}

/// Who told of an XID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// A line of the kernel log.
    KernelLog,
    /// An event of the vendor's library.
    Event,
}

/// An XID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xid {
    /// The number.
    pub number: u16,
    /// Who told.
    pub source: Source,
    /// The process it names.
    pub pid: Option<u32>,
    /// The process's name.
    pub process: String,
    /// MIG GPU instance it blames.
    pub gpu_instance: Option<u32>,
    /// The text after the number and the process; empty from an event.
    pub message: String,
}

impl Xid {
    /// What a report says of it.
    #[must_use]
    pub fn evidence(&self) -> String {
        let mut text = format!("Xid {}", self.number);
        if let Some(pid) = self.pid {
            text.push_str(&format!(", pid {pid}"));
        }
        if let Some(instance) = self.gpu_instance {
            text.push_str(&format!(", GPU instance {instance}"));
        }
        if !self.message.is_empty() {
            text.push_str(": ");
            text.extend(self.message.chars().take(160));
        }
        text
    }
}

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
    /// Links that were up when first seen and are down now.
    pub links_down: Vec<u32>,
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

    fn fault(&self) -> Option<String> {
        match self {
            Self::Absent | Self::Value(_) => None,
            Self::Failed(code) => Some(format!("NVML {code}")),
            Self::Missed => Some("no answer in time".to_owned()),
        }
    }
}

/// What an alarm of Ascend's driver says about its fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Assertion {
    /// It is there.
    Occurred,
    /// It is over.
    Recovered,
    /// It happened, and nothing will say that it is over.
    Once,
}

/// An alarm of Ascend's driver about one device: a hint, for the device's own list decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alarm {
    /// The code.
    pub code: u32,
    /// What it says.
    pub assertion: Assertion,
    /// 0 warning, 1 minor, 2 major, 3 critical.
    pub severity: u8,
    /// Serial number of the event.
    pub serial: i32,
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
}

/// What a fault of a switch of Ascend's scale-up fabric is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct SwitchFault {
    /// Alarm.
    pub alarm: u32,
    /// Fault within the alarm; `None` = the alarm has none.
    pub fault: Option<u32>,
    /// What the port leads to: `cpu`, `npu`, `L2` or `na`.
    pub peer: &'static str,
    /// Chip of the switch.
    pub chip: u16,
    /// Its port.
    pub port: u16,
}

/// A [`SwitchFault`] as it is read from a file.
#[derive(Deserialize)]
struct Kept {
    alarm: u32,
    fault: Option<u32>,
    peer: String,
    chip: u16,
    port: u16,
}

impl<'de> Deserialize<'de> for SwitchFault {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let Kept { alarm, fault, peer, chip, port } = Kept::deserialize(from)?;
        let peer = ["cpu", "npu", "L2"].into_iter().find(|known| *known == peer).unwrap_or("na");
        Ok(Self { alarm, fault, peer, chip, port })
    }
}

/// Driver of Ascend's devices, as it judges itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DriverState {
    /// 0 = well.
    pub health: Option<u32>,
    /// Codes of what is wrong with it.
    pub codes: Vec<u32>,
}

impl DriverState {
    /// What is wrong with it, if anything is.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        let codes: Vec<String> = self.codes.iter().map(|code| format!("0x{code:08X}")).collect();
        let unwell = self.health.is_some_and(|health| health != 0) || !codes.is_empty();
        unwell.then(|| format!("DCMI driver health {}, {}", self.health.unwrap_or(0), codes.join(" ")))
    }
}

/// How an ordered reset goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetStep {
    /// It began: silence is expected.
    Started,
    /// It is done.
    Done,
    /// It did not work.
    Failed,
}

/// What was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// The vendor's library lists the device.
    Listed(DeviceInfo),
    /// Only the kernel lists the device: no library speaks for it.
    Unspoken(DeviceInfo),
    /// An XID.
    Xid(Xid),
    /// The driver's recovery action changed to this; `None` = the line does not say.
    Recovery(Option<u32>),
    /// The kernel says that the device is off its bus, by a line without a number.
    BusLoss(String),
    /// A fault of a switch of the scale-up fabric; fatal or not.
    Switch {
        /// Links are lost.
        fatal: bool,
        /// The line.
        text: String,
    },
    /// The kernel ended a program because memory ran out: its line.
    Killed(String),
    /// A vendor's driver was loaded: whatever was known of its devices may be otherwise.
    DriverLoaded(String),
    /// A vendor event other than an XID, by its bit.
    Event(u64),
    /// Values were read.
    Reading(Box<Reading>),
    /// An alarm of Ascend's driver.
    Alarm(Alarm),
    /// Values of an Ascend device were read.
    Npu(Box<NpuReading>),
    /// An event of a switch of Ascend's scale-up fabric.
    Fabric {
        /// What it is about.
        of: SwitchFault,
        /// What it says.
        assertion: Assertion,
        /// 0 to 3.
        severity: u8,
    },
    /// Every fault that switches of Ascend's scale-up fabric hold.
    Fabrics {
        /// When they were asked.
        begun: Duration,
        /// The faults, each with its severity.
        faults: Vec<(SwitchFault, u8)>,
    },
    /// Ascend's driver judged itself.
    Driver(DriverState),
    /// No call can be made.
    NoLibrary {
        /// Whose library.
        vendor: Vendor,
        /// In words, with the library's name or code.
        why: String,
    },
    /// The library of this vendor answers again.
    Library(Vendor),
    /// Exactly these devices of a vendor are listed, by its library or by the kernel.
    Inventory {
        /// Whose.
        vendor: Vendor,
        /// Local parts of their ids.
        locals: Vec<Local>,
    },
    /// Nothing can be read from the kernel log, for this reason; `None` = it can again.
    LogBlind(Option<String>),
    /// How many devices the library lists, and how many there should be.
    Count {
        /// Listed.
        listed: usize,
        /// Expected.
        expected: usize,
    },
    /// An ordered reset.
    Reset(ResetStep),
    /// The validation probe's outcome.
    Validated(bool),
    /// A look at the idle device found that it does not compute what it should: in words.
    Unsound(String),
    /// A person vouches for the device as of then, on the ledger's timeline.
    Released(Duration),
    /// The device's worker died without being asked to.
    WorkerDied(String),
    /// The device's worker does not end; `None` = it did at last.
    WorkerStuck(Option<String>),
}

/// One fact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// What it is about.
    pub of: Subject,
    /// What was seen.
    pub what: What,
}

impl Fact {
    /// A fact about a device.
    #[must_use]
    pub fn device(local: impl Into<Local>, what: What) -> Self {
        Self { of: Subject::Device(local.into()), what }
    }

    /// A fact about the node.
    #[must_use]
    pub fn node(what: What) -> Self {
        Self { of: Subject::Node, what }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_compare_as_numbers() {
        let short: PciAddress = "0000:3B:00".parse().unwrap();
        assert_eq!(short, "00000000:3b:00.0".parse().unwrap());
        assert_eq!(short.to_string(), "0000:3b:00.0");
        assert_eq!("0018:01:00".parse::<PciAddress>().unwrap().to_string(), "0018:01:00.0");
    }

    #[test]
    fn damaged_addresses_are_refused() {
        for text in [
            "",
            "3b:00.0",
            "0000:3b",
            "0000:3b:00:1",
            "0000:3g:00",
            "+000:3b:00",
            "0000:3b:20",
            "0000:3b:00.x",
            "0000:3b:00.12",
        ] {
            assert!(text.parse::<PciAddress>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_an_address_or_refused(text in ".{0,40}") {
            if let Ok(address) = text.parse::<PciAddress>() {
                prop_assert_eq!(address.to_string().parse::<PciAddress>(), Ok(address));
            }
        }
    }
}
