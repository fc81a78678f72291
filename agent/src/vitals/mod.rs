//! Vital signs: what is measured of devices and decides nothing, kept for whoever scrapes. Health stays the
//! ledger's; a value that was not read is absent here, never a guess and never an old one.
//!
//! ```text
//! vendor/poll ─seen─┐                   ┌─> accelerator  accelerator_…, one vocabulary for both vendors
//! vendor/measure ───┼─> Board ──view()──┼─> dcgm         names of dcgm-exporter's default counters
//! node ──shown──────┘     ^             └─> npu          names of npu-exporter
//!                         └── a scrape asks for measurements
//! ```

pub mod accelerator;
pub mod dcgm;
pub mod npu;
mod text;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

pub use text::CONTENT_TYPE;

use crate::{
    health::{
        fact::{DeviceInfo, Fact, Local, ResetStep, Subject, What},
        ledger::Standing,
    },
    node::Shown,
};

/// Memory of a device, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All of it.
    pub total: u64,
    /// In use.
    pub used: u64,
    /// Neither in use nor reserved; `None` = the vendor does not tell.
    pub free: Option<u64>,
    /// Kept by the driver; `None` = the vendor does not tell.
    pub reserved: Option<u64>,
}

/// How busy the units of a device are, percent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Busy {
    /// The device as a whole.
    pub device: Option<u32>,
    /// The path to its memory.
    pub memory: Option<u32>,
    /// Video encoders.
    pub encoder: Option<u32>,
    /// Video decoders.
    pub decoder: Option<u32>,
    /// AI cores.
    pub core: Option<u32>,
    /// Vector units of AI cores.
    pub vector: Option<u32>,
    /// Matrix units of AI cores.
    pub cube: Option<u32>,
}

/// Errors of memory that were counted, and what was done about them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Errors {
    /// Whether they are looked for; `None` = the vendor does not tell.
    pub enabled: Option<bool>,
    /// Corrected, since the driver was loaded.
    pub corrected: Option<u64>,
    /// Uncorrected, since the driver was loaded.
    pub uncorrected: Option<u64>,
    /// Corrected, the device's life long.
    pub corrected_ever: Option<u64>,
    /// Uncorrected, the device's life long.
    pub uncorrected_ever: Option<u64>,
    /// Rows or pages taken out of use for corrected errors.
    pub retired_corrected: Option<u64>,
    /// Rows or pages taken out of use for uncorrected errors.
    pub retired_uncorrected: Option<u64>,
}

/// What the readings that health is judged by say besides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// °C of the chip.
    pub temperature: Option<u32>,
    /// Corrected memory errors since the driver was loaded.
    pub corrected: Option<u64>,
    /// Uncorrected memory errors since the driver was loaded.
    pub uncorrected: Option<u64>,
    /// Rows or pages that the next reset takes out of use.
    pub repairs_pending: Option<u64>,
    /// A repair of memory failed.
    pub repair_failed: Option<bool>,
    /// The device's own network port is up.
    pub network_up: Option<bool>,
    /// It is slower than it could be: heat.
    pub slowed_by_heat: Option<bool>,
    /// It is slower than it could be: power.
    pub slowed_by_power: Option<bool>,
    /// Health as the vendor's driver says it, where it does.
    pub vendor_health: Option<u32>,
    /// Vendor's codes of faults that hold, where there is such a list.
    pub codes: Option<Vec<u32>>,
}

/// What is measured only while somebody scrapes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Number that the vendor's tools call it by.
    pub index: Option<u32>,
    /// Model as the vendor's exporter writes it; `None` = as the product.
    pub model: Option<String>,
    /// Version of the driver.
    pub driver: Option<String>,
    /// Memory.
    pub memory: Option<Memory>,
    /// °C of the chip; `None` = only the health readings tell.
    pub temperature: Option<i32>,
    /// °C of the memory.
    pub memory_temperature: Option<i32>,
    /// Milliwatts.
    pub power_mw: Option<u64>,
    /// Millijoules since the driver was loaded.
    pub energy_mj: Option<u64>,
    /// Millivolts.
    pub voltage_mv: Option<u64>,
    /// MHz of what computes.
    pub clock_mhz: Option<u32>,
    /// MHz of the memory.
    pub memory_clock_mhz: Option<u32>,
    /// Percent.
    pub busy: Busy,
    /// Memory errors.
    pub errors: Errors,
    /// Retries on the host's bus.
    pub bus_replays: Option<u64>,
    /// Scale-up links that were up when first seen and are down; `None` = it had none.
    pub links_down: Option<usize>,
}

/// One device as it is scraped.
#[derive(Clone, Debug, PartialEq)]
pub struct Device {
    /// What it is and how it stands.
    pub shown: Shown,
    /// From the readings of health.
    pub seen: Sight,
    /// Measured.
    pub measured: Measured,
    /// The last XID, 0 = none since the agent began.
    pub xid: u16,
    /// Ordered resets that worked.
    pub resets_done: u64,
    /// Ordered resets that did not.
    pub resets_failed: u64,
    /// A worker of this agent runs on it.
    pub hosted: bool,
}

impl Device {
    /// What it is.
    #[must_use]
    pub fn info(&self) -> &DeviceInfo {
        &self.shown.info
    }

    /// °C of the chip.
    #[must_use]
    pub fn temperature(&self) -> Option<i32> {
        self.measured.temperature.or_else(|| self.seen.temperature.and_then(|value| i32::try_from(value).ok()))
    }
}

/// Everything that can be scraped of a node's devices.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// By local id.
    pub devices: BTreeMap<Local, Device>,
    /// The node's own entry; `None` = not known yet.
    pub node: Option<Standing>,
}

/// The pod that a device is given to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// The container in it.
    pub container: String,
}

#[derive(Debug, Default)]
struct Kept {
    shown: BTreeMap<Local, Shown>,
    node: Option<Standing>,
    seen: BTreeMap<Local, Sight>,
    measured: BTreeMap<Local, Measured>,
    xids: BTreeMap<Local, u16>,
    resets: BTreeMap<Local, (u64, u64)>,
    hosted: BTreeSet<Local>,
}

/// Where vital signs are kept. Clones share them.
#[derive(Clone, Debug)]
pub struct Board {
    kept: Arc<Mutex<Kept>>,
    scrapes: Arc<watch::Sender<u64>>,
}

impl Default for Board {
    fn default() -> Self {
        Self { kept: Arc::default(), scrapes: Arc::new(watch::channel(0).0) }
    }
}

impl Board {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Plain values, whole between statements.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the node and its devices stand now.
    pub fn show(&self, devices: &BTreeMap<Local, Shown>, node: &Standing) {
        let mut kept = self.kept();
        kept.shown.clone_from(devices);
        kept.node = Some(node.clone());
    }

    /// A reading of a device's health was made.
    pub fn see(&self, local: &str, seen: Sight) {
        self.kept().seen.insert(local.to_owned(), seen);
    }

    /// A device was measured; `None` = nobody asks any more, and what was measured is no longer so.
    pub fn measure(&self, local: &str, measured: Option<Measured>) {
        let mut kept = self.kept();
        match measured {
            Some(measured) => drop(kept.measured.insert(local.to_owned(), measured)),
            None => drop(kept.measured.remove(local)),
        }
    }

    #[cfg(test)]
    pub(crate) fn measured(&self, local: &str) -> Option<Measured> {
        self.kept().measured.get(local).cloned()
    }

    /// Takes what a fact counts.
    pub fn take(&self, fact: &Fact) {
        let Subject::Device(local) = &fact.of else { return };
        match &fact.what {
            What::Xid(xid) => drop(self.kept().xids.insert(local.clone(), xid.number)),
            What::Reset(step) => {
                let mut kept = self.kept();
                let (done, failed) = kept.resets.entry(local.clone()).or_default();
                match step {
                    ResetStep::Started | ResetStep::Left => {}
                    ResetStep::Done => *done = done.saturating_add(1),
                    ResetStep::Failed => *failed = failed.saturating_add(1),
                }
            }
            _ => {}
        }
    }

    /// A worker of this agent runs on the device, or does not any more.
    pub fn host(&self, local: &str, hosted: bool) {
        let mut kept = self.kept();
        if hosted {
            kept.hosted.insert(local.to_owned());
        } else {
            kept.hosted.remove(local);
        }
    }

    /// Tells when somebody scrapes.
    #[must_use]
    pub fn scrapes(&self) -> watch::Receiver<u64> {
        self.scrapes.subscribe()
    }

    /// What there is to scrape; whoever looks wants measurements to go on.
    #[must_use]
    pub fn view(&self) -> View {
        self.scrapes.send_modify(|count| *count = count.wrapping_add(1));
        let kept = self.kept();
        let device = |(local, shown): (&Local, &Shown)| {
            let (resets_done, resets_failed) = kept.resets.get(local).copied().unwrap_or_default();
            let device = Device {
                shown: shown.clone(),
                seen: kept.seen.get(local).cloned().unwrap_or_default(),
                measured: kept.measured.get(local).cloned().unwrap_or_default(),
                xid: kept.xids.get(local).copied().unwrap_or(0),
                resets_done,
                resets_failed,
                hosted: kept.hosted.contains(local),
            };
            (local.clone(), device)
        };
        View { devices: kept.shown.iter().map(device).collect(), node: kept.node.clone() }
    }
}

/// Milliwatts as watts, and the like.
fn thousandth(value: u64) -> f64 {
    berth_runtime::telemetry::large(value) / 1000.0
}

#[cfg(test)]
pub(crate) mod tests;
