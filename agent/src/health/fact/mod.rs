//! Facts: what was seen, where and when. A fact claims nothing about health.

mod address;
mod event;
mod reading;

use std::time::Duration;

use berth_types::Vendor;
use serde::{Deserialize, Serialize};

pub use address::{NoAddress, PciAddress};
pub use event::{Alarm, Assertion, DriverState, Source, SwitchFault, Xid};
pub use reading::{Fabric, HostLink, NpuReading, Read, Reading, Rows};

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

/// How an ordered reset goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetStep {
    /// It began: silence is expected.
    Started,
    /// It is done.
    Done,
    /// It did not work.
    Failed,
    /// Who made it ended in the middle: whether it was made is not known.
    Left,
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
    /// The kernel says that a slot lost its link, by the slot's name: some device behind it may be gone.
    SlotDown(String),
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
