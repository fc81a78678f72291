//! NVIDIA's management library, safely: devices and readings in our own words.
//!
//! Every function here may block for as long as the driver likes: call them on a [`super::lane::Lane`]
//! only. A value that the driver or device does not have is [`Read::Absent`], never an error.

mod ffi;
mod vitals;
pub mod watch;

use std::{
    ffi::{OsStr, OsString},
    sync::Arc,
    time::Duration,
};

use berth_runtime::Clock;
use berth_types::Vendor;
use ffi::{Api, Code, GPU_IS_LOST, NOT_SUPPORTED, RESET_REQUIRED, SUCCESS, TIMEOUT};

use crate::{
    health::fact::{DeviceInfo, Fabric, HostLink, PciAddress, Read, Reading, Rows, What},
    vendor::{
        poll::Readable,
        slate::{Failure, Slate},
    },
    vitals::Sight,
};

/// The library's name, as the dynamic linker searches it.
pub const LIBRARY: &str = "libnvidia-ml.so.1";
/// `NVML_FI_DEV_GET_GPU_RECOVERY_ACTION`; drivers before R570 do not know it.
const RECOVERY_ACTION: u32 = 230;
/// `NVML_FI_DEV_PCIE_REPLAY_COUNTER`.
const PCIE_REPLAYS: u32 = 94;
/// The fabric's health in one number: unhealthy.
const UNHEALTHY: u8 = 2;
/// `NVML_NVLINK_MAX_LINKS`.
const LINKS: u32 = 36;
/// First branch of drivers that know the recovery action; one before answers whatever it likes.
const KNOWS_RECOVERY: u16 = 570;
/// `NVML_ERROR_INVALID_ARGUMENT`, of a field that the driver does not know; `NVML_ERROR_NO_DATA`.
const UNKNOWN_FIELD: Code = 2;
const NO_DATA: Code = 21;
/// °C that no device of these survives: a sensor that cannot be read says so.
const IMPLAUSIBLE: u32 = 200;
/// Codes of a library whose driver went from under it: not initialised, no driver, parts missing, another version, an
/// error of the system or one that it does not know.
const STALE: [i32; 7] = [1, 9, 12, 13, 17, 18, 999];
/// Events that say something about health: errors, retirement, poison, unavailable, recovery action.
pub const EVENTS: u64 = 0x1 | 0x2 | 0x8 | 0x200 | 0x400 | 0x800 | 0x1000 | 0x2000 | 0x4000 | 0x8000;

/// Why the library cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is not there, or cannot be loaded.
    #[error("{path} cannot be opened ({reason}): install NVIDIA's driver, or name the library with BERTH_NVML_LIBRARY")]
    Missing {
        /// What was opened.
        path: String,
        /// The linker's words.
        reason: String,
    },
    /// It refuses to start.
    #[error("{path}: nvmlInit_v2 answers {code} ({words})")]
    Init {
        /// What was opened.
        path: String,
        /// NVML's code.
        code: i32,
        /// NVML's words.
        words: String,
    },
}

/// One device that the library lists.
#[derive(Clone, Debug)]
pub struct Target {
    /// What it is.
    pub info: DeviceInfo,
    /// What the library calls it.
    index: u32,
    handle: ffi::Device,
    /// Links that were up when it was first seen.
    links: Vec<u32>,
}

/// An event of the library.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Index among the targets that were registered.
    pub target: usize,
    /// Its bit.
    pub kind: u64,
    /// The XID, for 0x8.
    pub data: u64,
    /// MIG GPU instance.
    pub gpu_instance: Option<u32>,
}

/// What a wait for events gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// An event.
    Event(Event),
    /// None came in time.
    Nothing,
    /// An event of a device that is not ours, or a refusal with this code.
    Refused(i32),
}

/// The open library.
pub struct Nvml {
    api: Api,
}

impl std::fmt::Debug for Nvml {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Nvml")
    }
}

/// Events of several devices.
#[derive(Debug)]
pub struct Events {
    library: Arc<Nvml>,
    set: ffi::EventSet,
    handles: Vec<ffi::Device>,
}

impl Drop for Nvml {
    fn drop(&mut self) {
        let code = self.api.shutdown();
        tracing::debug!(code, "NVML shut down");
    }
}

impl Target {
    /// Whether its driver is older than the recovery action.
    fn predates_recovery(&self) -> bool {
        self.info.driver_branch.is_some_and(|branch| branch < KNOWS_RECOVERY)
    }
}

impl Nvml {
    /// Opens and initialises the library at `path`.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &OsStr) -> Result<Self, OpenError> {
        let name = || path.to_string_lossy().into_owned();
        let api = Api::open(path).map_err(|error| OpenError::Missing { path: name(), reason: error.to_string() })?;
        match api.init() {
            SUCCESS => Ok(Self { api }),
            code => Err(OpenError::Init { path: name(), code, words: api.words(code) }),
        }
    }

    /// Version of the driver, as it says it.
    #[must_use]
    pub fn driver(&self) -> Option<String> {
        self.api.driver().ok()
    }

    fn branch(&self) -> Option<u16> {
        self.driver()?.split('.').next()?.parse().ok()
    }

    /// Every device that the library lists.
    ///
    /// # Errors
    /// NVML's code when it does not even tell how many there are.
    pub fn list(&self) -> Result<Vec<Target>, i32> {
        let count = self.api.count()?;
        Ok((0..count).filter_map(|index| self.target(index).ok()).collect())
    }

    fn target(&self, index: u32) -> Result<Target, Code> {
        let handle = self.api.by_index(index)?;
        let (domain, bus, device) = self.api.pci(handle)?;
        let narrow = |number: u32| u8::try_from(number).map_err(|_| NOT_SUPPORTED);
        let pci = PciAddress { domain, bus: narrow(bus)?, device: narrow(device)? };
        let local = pci.to_string();
        let serial = self.api.serial(handle).unwrap_or_default();
        let info = DeviceInfo {
            vendor: Vendor::Nvidia,
            product: self.api.name(handle).unwrap_or_default(),
            uuid: self.api.uuid(handle).unwrap_or_default(),
            memory_bytes: self.api.memory(handle).unwrap_or(0),
            interconnect_domain: self.domain(handle),
            card: if serial.is_empty() { local.clone() } else { serial },
            local,
            pci: Some(pci),
            reset_group: None,
            driver_branch: self.branch(),
        };
        let links = (0..LINKS).filter(|link| self.api.link_up(handle, *link) == Ok(true)).collect();
        Ok(Target { info, index, handle, links })
    }

    /// `<cluster uuid>.<clique>`, as feature discovery prints it; only a completed registration counts.
    fn domain(&self, handle: ffi::Device) -> Option<String> {
        let fabric = self.api.fabric(handle).ok().filter(|fabric| fabric.state == 3 && fabric.status == SUCCESS)?;
        let hex: String = fabric.cluster.iter().map(|byte| format!("{byte:02x}")).collect();
        let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
        let uuid = [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)].join("-");
        Some(format!("{uuid}.{}", fabric.clique))
    }

    /// Reads every value of a device onto `slate`, deciding values first, but for those in its skip list.
    pub fn read(&self, target: &Target, slate: &Slate<Reading>, clock: &Clock) {
        for step in STEPS {
            let asked = slate.begin(step.name, clock.now());
            let mut values = slate.values();
            if !asked {
                // Left out, as it hung a moment ago: it is not known, which is not the same as well.
                (step.failed)(&mut values, Failure::Missed);
                slate.write(values);
                continue;
            }
            let code = (step.read)(&self.api, target, &mut values).err().unwrap_or(SUCCESS);
            match code {
                SUCCESS | NOT_SUPPORTED => {}
                GPU_IS_LOST => values.lost = true,
                RESET_REQUIRED => values.reset_required = true,
                code => (step.failed)(&mut values, Failure::Code(code)),
            }
            let lost = values.lost;
            slate.write(values);
            if lost {
                return;
            }
        }
    }

    /// Registers for the events that each target supports.
    ///
    /// # Errors
    /// NVML's code when there are no event sets.
    pub fn events(self: Arc<Self>, targets: &[Target]) -> Result<Events, i32> {
        let set = self.api.create_set()?;
        for target in targets {
            let Ok(supported) = self.api.supported_events(target.handle) else { continue };
            // NOT_SUPPORTED = too old for events; polling goes on without them.
            let _ = self.api.register(target.handle, EVENTS & supported, set);
        }
        let handles = targets.iter().map(|target| target.handle).collect();
        Ok(Events { library: self, set, handles })
    }
}

impl Events {
    /// Waits for an event, by the library's own clock.
    #[must_use]
    pub fn wait(&self, limit_ms: u32) -> Waited {
        let event = match self.library.api.wait(self.set, limit_ms) {
            Ok(event) => event,
            Err(TIMEOUT) => return Waited::Nothing,
            Err(code) => return Waited::Refused(code),
        };
        let Some(target) = self.handles.iter().position(|handle| *handle == event.device) else {
            return Waited::Refused(SUCCESS);
        };
        let gpu_instance = Some(event.gpu_instance).filter(|instance| *instance != u32::MAX);
        let _ = event.compute_instance;
        Waited::Event(Event { target, kind: event.kind, data: event.data, gpu_instance })
    }
}

/// One device, with the library that reads it.
#[derive(Debug)]
pub struct Gpu {
    /// The library.
    pub library: Arc<Nvml>,
    /// The device.
    pub target: Target,
}

impl Readable for Gpu {
    type Values = Reading;

    fn local(&self) -> &str {
        &self.target.info.local
    }

    fn blank(&self, now: Duration) -> Reading {
        Reading { begun: now, ..Reading::default() }
    }

    fn read(&self, slate: &Slate<Reading>, clock: &Clock) {
        self.library.read(&self.target, slate, clock);
    }

    fn give_up(&self, slate: &Slate<Reading>) -> (Reading, Option<&'static str>) {
        give_up(slate)
    }

    fn unread(&self, mut values: Reading) -> Reading {
        STEPS.iter().for_each(|step| (step.failed)(&mut values, Failure::Missed));
        values
    }

    fn seen(&self, values: &Reading) -> Sight {
        vitals::seen(values)
    }

    fn fails(&self, values: &Reading) -> bool {
        let codes = [values.recovery.failed(), values.rows.failed(), values.ecc_uncorrected.failed()];
        let answered = values.recovery.value().is_some() || values.rows.value().is_some();
        let answered = answered || values.ecc_uncorrected.value().is_some() || values.lost || values.reset_required;
        !answered && codes.into_iter().flatten().any(|code| STALE.contains(&code))
    }

    fn fact(&self, values: Reading) -> What {
        What::Reading(Box::new(values))
    }
}

fn give_up(slate: &Slate<Reading>) -> (Reading, Option<&'static str>) {
    let (mut values, current) = (slate.values(), slate.current());
    let step = STEPS.iter().find(|step| step.name == current);
    // What comes after a call that hangs was not asked.
    let unasked = STEPS.iter().skip_while(|step| step.name != current);
    unasked.for_each(|step| (step.failed)(&mut values, Failure::Missed));
    (values, step.filter(|step| !step.deciding).map(|step| step.name))
}

struct Step {
    name: &'static str,
    deciding: bool,
    read: fn(&Api, &Target, &mut Reading) -> Result<(), Code>,
    failed: fn(&mut Reading, Failure),
}

/// A temperature, unless it is none.
fn plausible(celsius: u32) -> Result<u32, Code> {
    if celsius > IMPLAUSIBLE { Err(NO_DATA) } else { Ok(celsius) }
}

/// A counter; all ones is how a driver says that it has none.
fn counted(count: u64) -> Result<u64, Code> {
    if count == u64::MAX { Err(NO_DATA) } else { Ok(count) }
}

/// Every value, in the order of reading.
static STEPS: &[Step] = &[
    Step {
        name: "recovery action",
        deciding: true,
        read: |api, target, out| {
            let value = match api.field(target.handle, RECOVERY_ACTION) {
                Err(UNKNOWN_FIELD) => return Err(NOT_SUPPORTED),
                // An older driver does not know the field, and not each says so in the same way.
                Err(code) if code != GPU_IS_LOST && code != RESET_REQUIRED && target.predates_recovery() => {
                    return Err(NOT_SUPPORTED);
                }
                value => value?,
            };
            out.recovery = Read::Value(u32::try_from(value).unwrap_or(u32::MAX));
            Ok(())
        },
        failed: |out, failure| out.recovery = failure.into(),
    },
    Step {
        name: "remapped rows",
        deciding: true,
        read: |api, target, out| {
            let rows = match api.rows(target.handle) {
                Ok(rows) => Rows { pending: rows.pending, failed: rows.failed },
                // Older devices retire pages instead.
                Err(NOT_SUPPORTED) => Rows { pending: api.retired_pending(target.handle)?, failed: false },
                Err(code) => return Err(code),
            };
            out.rows = Read::Value(rows);
            Ok(())
        },
        failed: |out, failure| out.rows = failure.into(),
    },
    Step {
        name: "uncorrected errors",
        deciding: true,
        read: |api, target, out| {
            let count = api.ecc(target.handle, 1).and_then(counted)?;
            out.ecc_uncorrected = Read::Value(count);
            Ok(())
        },
        failed: |out, failure| out.ecc_uncorrected = failure.into(),
    },
    Step {
        name: "corrected errors",
        deciding: false,
        read: |api, target, out| {
            let count = api.ecc(target.handle, 0).and_then(counted)?;
            out.ecc_corrected = Read::Value(count);
            Ok(())
        },
        failed: |out, failure| out.ecc_corrected = failure.into(),
    },
    Step {
        name: "on-chip memory",
        deciding: false,
        read: |api, target, out| {
            api.sram_exceeded(target.handle).map(|exceeded| out.sram_exceeded = Read::Value(exceeded))
        },
        failed: |out, failure| out.sram_exceeded = failure.into(),
    },
    Step {
        name: "temperature",
        deciding: false,
        read: |api, target, out| {
            let celsius = api.temperature(target.handle).and_then(plausible)?;
            out.temperature = Read::Value(celsius);
            Ok(())
        },
        failed: |out, failure| out.temperature = failure.into(),
    },
    Step {
        name: "temperature thresholds",
        deciding: false,
        read: |api, target, out| {
            out.shutdown = Read::Value(api.threshold(target.handle, 0)?);
            out.slowdown = Read::Value(api.threshold(target.handle, 1)?);
            Ok(())
        },
        failed: |out, failure| (out.shutdown, out.slowdown) = (failure.into(), failure.into()),
    },
    Step {
        name: "clock event reasons",
        deciding: false,
        read: |api, target, out| api.clock_reasons(target.handle).map(|bits| out.clock_reasons = Read::Value(bits)),
        failed: |out, failure| out.clock_reasons = failure.into(),
    },
    Step {
        name: "host link",
        deciding: false,
        read: |api, target, out| {
            let (lanes, lanes_most) = api.lanes(target.handle)?;
            // A driver that tells the lanes and no generation has the lanes to go by.
            let (generation, generation_most) = api.generation(target.handle).unwrap_or_default();
            out.host_link = Read::Value(HostLink { lanes, lanes_most, generation, generation_most });
            Ok(())
        },
        failed: |out, failure| out.host_link = failure.into(),
    },
    Step {
        name: "host link replays",
        deciding: false,
        read: |api, target, out| api.field(target.handle, PCIE_REPLAYS).map(|count| out.replays = Read::Value(count)),
        failed: |out, failure| out.replays = failure.into(),
    },
    Step {
        name: "links",
        deciding: false,
        read: |api, target, out| {
            let mut down = Vec::new();
            for link in &target.links {
                match api.link_up(target.handle, *link) {
                    Ok(true) | Err(NOT_SUPPORTED) => {}
                    Ok(false) => down.push(*link),
                    Err(code) => return Err(code),
                }
            }
            out.links_down = Read::Value(down);
            Ok(())
        },
        failed: |out, failure| out.links_down = failure.into(),
    },
    Step {
        name: "fabric",
        deciding: false,
        read: |api, target, out| {
            let fabric = api.fabric(target.handle)?;
            let clique = (fabric.state == 3 && fabric.status == SUCCESS).then_some(fabric.clique);
            let unhealthy = mask_says_unhealthy(fabric.mask) || fabric.summary == UNHEALTHY;
            out.fabric = Read::Value(Fabric { clique, unhealthy });
            Ok(())
        },
        failed: |out, failure| out.fabric = failure.into(),
    },
];

/// Fields of the fabric's health mask, 0 = not supported: degraded bandwidth, route recovery, route
/// unhealthy, access timeout recovery (each 1 = so), incorrect configuration (above 1 = so).
fn mask_says_unhealthy(mask: u32) -> bool {
    let two_bits = |shift: u32| (mask >> shift) & 0x3 == 1;
    [0, 2, 4, 6].into_iter().any(two_bits) || (mask >> 8) & 0xf > 1
}

/// The library to open: what was configured, else by its usual name.
#[must_use]
pub fn library_path(configured: Option<&OsStr>) -> OsString {
    configured.map_or_else(|| OsString::from(LIBRARY), OsStr::to_os_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_says_what_to_do() {
        let error = Nvml::open(OsStr::new("/nonexistent/libnvidia-ml.so.1")).unwrap_err().to_string();
        assert!(error.contains("libnvidia-ml") && error.contains("BERTH_NVML_LIBRARY"), "{error}");
    }

    #[test]
    fn the_fabric_mask_is_read_by_its_fields() {
        for healthy in [0, 0x2, 0x20, 0x100, 0x2000 | 0xaa | 0x100] {
            assert!(!mask_says_unhealthy(healthy), "{healthy:#x}");
        }
        for unhealthy in [0x1, 0x4, 0x10, 0x40, 0x200] {
            assert!(mask_says_unhealthy(unhealthy), "{unhealthy:#x}");
        }
    }

    #[test]
    fn a_hung_deciding_value_is_missed_and_another_is_only_left_out() {
        let slate = Slate::new(Reading::default(), Duration::ZERO, Vec::new());
        assert!(slate.begin("recovery action", Duration::ZERO));
        let (values, skip) = give_up(&slate);
        assert!(values.recovery == Read::Missed && skip.is_none() && values.blind().is_some());
        assert!(slate.begin("temperature", Duration::ZERO));
        let (values, skip) = give_up(&slate);
        assert!(skip == Some("temperature") && values.blind().is_none());
        assert!(
            values.temperature == Read::Missed && values.links_down == Read::Missed,
            "what was not asked is not well"
        );
    }

    #[test]
    fn what_no_sensor_can_mean_is_no_value() {
        assert_eq!((plausible(110), plausible(255)), (Ok(110), Err(NO_DATA)));
        assert_eq!((counted(7), counted(u64::MAX)), (Ok(7), Err(NO_DATA)));
    }
}
