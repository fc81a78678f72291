//! Ascend's management library, safely: devices and readings in our own words, for both generations of its
//! calls. A card may hold two devices; the second generation numbers devices alone.
//!
//! Every function here may block for as long as the driver likes: call them on a [`super::lane::Lane`] only. A
//! value that the driver or device does not have is [`Read::Absent`], never an error.

mod ffi;
mod layout;
mod listener;
mod queue;
pub mod resets;
mod switches;
mod vitals;
pub mod watch;

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString, c_int},
    sync::Arc,
    time::Duration,
};

use berth_runtime::Clock;
use berth_types::Vendor;
use ffi::{Api, At, Code, NOT_SUPPORT, OK};

use super::{
    poll::Readable,
    slate::{Failure, Slate},
};
use crate::{
    health::fact::{DeviceInfo, DriverState, NpuReading, PciAddress, Read, What},
    vitals::Sight,
};

/// The library's name, as the dynamic linker searches it.
pub const LIBRARY: &str = "libdcmi.so";
/// Codes of a library whose driver went from under it: inner error, a device file or a message that fails.
const STALE: [i32; 5] = [-8005, -8009, -8010, -8011, -8014];
/// The name of the switches' library.
pub const SWITCH_LIBRARY: &str = "liblingqu-dcmi.so";

/// Why the library cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is not there, or cannot be loaded.
    #[error("{path} cannot be opened ({reason}): install Ascend's driver, or name the library with BERTH_DCMI_LIBRARY")]
    Missing {
        /// What was opened.
        path: String,
        /// The linker's words.
        reason: String,
    },
    /// It refuses to start.
    #[error("{path}: {symbol} answers {code}")]
    Init {
        /// What was opened.
        path: String,
        /// What was called.
        symbol: &'static str,
        /// DCMI's code.
        code: i32,
    },
}

/// One device that the library lists.
#[derive(Clone, Debug)]
pub struct Target {
    /// What it is.
    pub info: DeviceInfo,
    /// What events call it.
    event_id: Option<u16>,
    /// Its place in the host's order.
    logic: Option<c_int>,
    at: At,
}

/// The open library.
pub struct Dcmi {
    api: Api,
    second: bool,
}

impl std::fmt::Debug for Dcmi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Dcmi(generation {})", if self.second { 2 } else { 1 })
    }
}

impl Dcmi {
    /// Opens and initialises the library at `path`, and finds out which generation of calls it answers.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &OsStr) -> Result<Self, OpenError> {
        let name = || path.to_string_lossy().into_owned();
        let api = Api::open(path).map_err(|error| OpenError::Missing { path: name(), reason: error.to_string() })?;
        let first = api.init();
        let second = match first {
            OK => api.cards().err() == Some(NOT_SUPPORT),
            NOT_SUPPORT => true,
            code => return Err(OpenError::Init { path: name(), symbol: "dcmi_init", code }),
        };
        // An old library has no second generation, and its first is what there is.
        let second = second
            && match api.init_2() {
                OK => true,
                NOT_SUPPORT if first == OK => false,
                code => return Err(OpenError::Init { path: name(), symbol: "dcmiv2_init", code }),
            };
        Ok(Self { api, second })
    }

    /// Version of the driver, as it says it.
    #[must_use]
    pub fn driver(&self) -> Option<String> {
        self.api.driver(self.second).ok().filter(|version| !version.is_empty())
    }

    /// How the driver judges itself; `None` = it does not.
    #[must_use]
    pub fn driver_state(&self) -> Option<DriverState> {
        let (health, codes) = self.api.driver_state().ok()?;
        Some(DriverState { health: Some(health), codes })
    }

    /// Every device that the library lists.
    ///
    /// # Errors
    /// DCMI's code when it does not even tell the cards.
    pub fn list(&self) -> Result<Vec<Target>, i32> {
        if self.second {
            let places = self.api.devices_2()?.into_iter().map(|device| (At::Second { device }, device, 0));
            return Ok(self.targets(places));
        }
        let mut places = Vec::new();
        for card in self.api.cards()? {
            // A card that does not tell is one device: its health will say more.
            let most = self.api.in_card(card).unwrap_or(1).clamp(0, 16);
            places.extend((0..most).map(|device| (At::First { card, device }, card, device)));
        }
        Ok(self.targets(places.into_iter()))
    }

    fn targets(&self, places: impl Iterator<Item = (At, c_int, c_int)>) -> Vec<Target> {
        let computes = places.filter(|(at, ..)| self.api.computes(*at).unwrap_or(true));
        computes.map(|(at, card, device)| self.target(at, card, device)).collect()
    }

    fn target(&self, at: At, card: c_int, device: c_int) -> Target {
        let logic = match at {
            At::First { .. } => self.api.logic(card, device).ok(),
            At::Second { device } => Some(device),
        };
        let (chip, npu) = self.api.chip(at).unwrap_or_default();
        let product = if chip.is_empty() { npu } else { chip };
        let serial = if self.second { String::new() } else { self.api.serial(card).unwrap_or_default() };
        let die = if self.second { Err(NOT_SUPPORT) } else { self.api.die(card, device) };
        let die = die.ok().filter(|words| words.iter().any(|word| *word != 0));
        let die = die.map(|words| words.map(|word| format!("{word:08x}")).join("-"));
        let info = DeviceInfo {
            local: format!("{card}.{device}"),
            vendor: Vendor::Ascend,
            reset_group: self.reset_group(&product, card, device, logic),
            driver_branch: None,
            product,
            uuid: die.unwrap_or_else(|| serial.clone()),
            memory_bytes: self.api.hbm(at).unwrap_or(0).saturating_mul(1 << 20),
            interconnect_domain: self.domain(at),
            card: if serial.is_empty() { format!("card {card}") } else { serial },
            pci: self.pci(at),
        };
        Target { info, event_id: logic.and_then(|logic| u16::try_from(logic).ok()), logic, at }
    }

    /// The super-pod; what a driver without one says is no number of a pod.
    fn domain(&self, at: At) -> Option<String> {
        let pod = self.api.super_pod(at).ok().filter(|pod| *pod != u32::MAX)?;
        Some(format!("superpod-{pod}"))
    }

    fn pci(&self, at: At) -> Option<PciAddress> {
        let (domain, bus, device) = self.api.pcie(at).ok()?;
        let (bus, device) = (u8::try_from(bus).ok()?, u8::try_from(device).ok()?);
        Some(PciAddress { domain: u32::try_from(domain).ok()?, bus, device })
    }

    /// Devices that can only be reset together: of an A3, a card and the one that shares its network port; of
    /// a 910A, four; of a 910B for training, eight. Any other resets alone.
    fn reset_group(&self, product: &str, card: c_int, device: c_int, logic: Option<c_int>) -> Option<String> {
        let ring = |size: c_int| logic.map(|logic| format!("ring {}", logic / size));
        if self.second {
            return None;
        }
        match Family::of(product) {
            Family::A3 => {
                let brother = self.api.brother(card, device).ok().filter(|brother| *brother >= 0);
                Some(format!("module {}", brother.map_or(card, |brother| brother.min(card))))
            }
            Family::A1 => ring(4),
            Family::Training => ring(8),
            Family::Other => None,
        }
    }

    /// Reads every value of a device onto `slate`, deciding values first, but for those in its skip list.
    fn read(&self, target: &Target, slate: &Slate<NpuReading>, clock: &Clock) {
        for step in STEPS {
            let asked = slate.begin(step.name, clock.now());
            let mut values = slate.values();
            if !asked {
                // Left out, as it hung a moment ago: it is not known, which is not the same as well.
                (step.failed)(&mut values, Failure::Missed);
                slate.write(values);
                continue;
            }
            match (step.read)(&self.api, target.at, &mut values) {
                Ok(()) | Err(NOT_SUPPORT) => {}
                Err(code) => (step.failed)(&mut values, Failure::Code(code)),
            }
            slate.write(values);
        }
    }
}

/// Products that reset alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    /// 910A, Pro and Premium.
    A1,
    /// 910B1 to 910B3: eight joined by HCCS.
    Training,
    /// 910C: two devices on a card.
    A3,
    /// 910B4 and other inference chips, 310P, 950.
    Other,
}

impl Family {
    /// By the product's name, with or without `Ascend` before it.
    fn of(product: &str) -> Self {
        let name = product.trim().trim_start_matches("Ascend").trim_start_matches([' ', '_']);
        match name {
            _ if name.starts_with("910_93") || name.starts_with("910A3") || name.starts_with("910C") => Self::A3,
            "910B1" | "910B2" | "910B3" | "910B2C" => Self::Training,
            "910A" | "910ProA" | "910ProB" | "910PremiumA" | "910" => Self::A1,
            _ => Self::Other,
        }
    }
}

/// One device, with the library that reads it.
#[derive(Debug)]
pub struct Npu {
    /// The library.
    pub library: Arc<Dcmi>,
    /// The device.
    pub target: Target,
}

impl Readable for Npu {
    type Values = NpuReading;

    fn local(&self) -> &str {
        &self.target.info.local
    }

    fn blank(&self, now: Duration) -> NpuReading {
        NpuReading { begun: now, ..NpuReading::default() }
    }

    fn read(&self, slate: &Slate<NpuReading>, clock: &Clock) {
        self.library.read(&self.target, slate, clock);
    }

    fn give_up(&self, slate: &Slate<NpuReading>) -> (NpuReading, Option<&'static str>) {
        let (mut values, current) = (slate.values(), slate.current());
        let step = STEPS.iter().find(|step| step.name == current);
        // What comes after a call that hangs was not asked.
        let unasked = STEPS.iter().skip_while(|step| step.name != current);
        unasked.for_each(|step| (step.failed)(&mut values, Failure::Missed));
        (values, step.filter(|step| !step.deciding).map(|step| step.name))
    }

    fn unread(&self, mut values: NpuReading) -> NpuReading {
        STEPS.iter().for_each(|step| (step.failed)(&mut values, Failure::Missed));
        values
    }

    fn seen(&self, values: &NpuReading) -> Sight {
        vitals::seen(values)
    }

    fn fails(&self, values: &NpuReading) -> bool {
        let stale = |code: Option<i32>| code.is_some_and(|code| STALE.contains(&code));
        stale(values.health.failed()) && stale(values.codes.failed())
    }

    fn fact(&self, values: NpuReading) -> What {
        What::Npu(Box::new(values))
    }
}

struct Step {
    name: &'static str,
    deciding: bool,
    read: fn(&Api, At, &mut NpuReading) -> Result<(), Code>,
    failed: fn(&mut NpuReading, Failure),
}

/// Every value, in the order of reading.
static STEPS: &[Step] = &[
    Step {
        name: "health",
        deciding: true,
        read: |api, at, out| api.health(at).map(|health| out.health = Read::Value(health)),
        failed: |out, failure| out.health = failure.into(),
    },
    Step {
        name: "error list",
        deciding: true,
        read: |api, at, out| api.codes(at).map(|codes| out.codes = Read::Value(codes)),
        failed: |out, failure| out.codes = failure.into(),
    },
    Step {
        name: "boot status",
        deciding: false,
        read: |api, at, out| api.boot(at).map(|boot| out.boot = Read::Value(boot)),
        failed: |out, failure| out.boot = failure.into(),
    },
    Step {
        name: "isolated pages",
        deciding: false,
        read: |api, at, out| api.next_isolated(at).map(|pages| out.next_isolated = Read::Value(pages)),
        failed: |out, failure| out.next_isolated = failure.into(),
    },
    Step {
        name: "host link",
        deciding: false,
        read: |api, at, out| api.host_errors(at).map(|errors| out.host_errors = Read::Value(errors)),
        failed: |out, failure| out.host_errors = failure.into(),
    },
    Step {
        name: "scale-up links",
        deciding: false,
        read: |api, at, out| api.fabric_errors(at).map(|errors| out.fabric_errors = Read::Value(errors)),
        failed: |out, failure| out.fabric_errors = failure.into(),
    },
    // Last: it is known to hang.
    Step {
        name: "network health",
        deciding: false,
        read: |api, at, out| api.network(at).map(|network| out.network = Read::Value(network)),
        failed: |out, failure| out.network = failure.into(),
    },
];

/// Devices that should be there and are not listed, where the gaps between those that are tell which: by card
/// and number, with `expected` devices in all.
fn missing(listed: &[Target], expected: usize) -> Vec<(c_int, c_int)> {
    let mut cards: BTreeMap<c_int, c_int> = BTreeMap::new();
    for target in listed {
        let (card, device) = match target.at {
            At::First { card, device } => (card, device),
            At::Second { device } => (device, 0),
        };
        let most = cards.entry(card).or_default();
        *most = (*most).max(device);
    }
    let per_card = cards.values().max().map_or(1, |most| most.saturating_add(1));
    let width = usize::try_from(per_card).unwrap_or(1).max(1);
    if listed.len() >= expected || !expected.is_multiple_of(width) {
        return Vec::new();
    }
    let cards = c_int::try_from(expected / width).unwrap_or(0);
    let all = (0..cards).flat_map(|card| (0..per_card).map(move |device| (card, device)));
    let there = |local: &str| listed.iter().any(|target| target.info.local == local);
    let missing: Vec<_> = all.filter(|(card, device)| !there(&format!("{card}.{device}"))).collect();
    // Cards that are not numbered from 0 leave no gaps to be read.
    if missing.len() == expected - listed.len() { missing } else { Vec::new() }
}

/// The library to open: what was configured, else by its usual name.
#[must_use]
pub fn library_path(configured: Option<&OsStr>) -> OsString {
    configured.map_or_else(|| OsString::from(LIBRARY), OsStr::to_os_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(card: c_int, device: c_int) -> Target {
        let info = DeviceInfo {
            local: format!("{card}.{device}"),
            vendor: Vendor::Ascend,
            product: String::new(),
            uuid: String::new(),
            memory_bytes: 0,
            interconnect_domain: None,
            card: String::new(),
            pci: None,
            reset_group: None,
            driver_branch: None,
        };
        Target { info, event_id: None, logic: None, at: At::First { card, device } }
    }

    #[test]
    fn a_missing_library_is_an_error_that_says_what_to_do() {
        let error = Dcmi::open(OsStr::new("/nonexistent/libdcmi.so")).unwrap_err().to_string();
        assert!(error.contains("libdcmi") && error.contains("BERTH_DCMI_LIBRARY"), "{error}");
    }

    #[test]
    fn gaps_between_cards_tell_which_device_is_missing() {
        let listed: Vec<Target> = [0, 1, 3].map(|card| target(card, 0)).into();
        assert_eq!(missing(&listed, 4), [(2, 0)]);
        let dies: Vec<Target> = [(0, 0), (0, 1), (1, 0)].map(|(card, device)| target(card, device)).into();
        assert_eq!(missing(&dies, 4), [(1, 1)]);
        let far: Vec<Target> = [8, 9].map(|card| target(card, 0)).into();
        assert!(missing(&far, 3).is_empty(), "cards that are numbered otherwise say nothing");
        assert!(missing(&listed, 3).is_empty());
    }

    #[test]
    fn products_reset_as_their_family_does() {
        for (product, family) in [
            ("Ascend910_9392", Family::A3),
            ("Ascend910_9362", Family::A3),
            ("910B3", Family::Training),
            ("Ascend910B1", Family::Training),
            ("910B4", Family::Other),
            ("910ProB", Family::A1),
            ("Ascend950PR", Family::Other),
            ("310P3", Family::Other),
        ] {
            assert_eq!(Family::of(product), family, "{product}");
        }
    }
}
