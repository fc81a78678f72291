//! What drivers and libraries say by themselves: XIDs, alarms, faults of switches, and how a driver judges itself.

use serde::{Deserialize, Deserializer, Serialize};

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
