//! The devices of a round and the faults that befall them, each by one road alone. Pure: chance comes from a seed.

use std::time::Duration;

use berth_types::Vendor;
use rand::{Rng, rngs::SmallRng, seq::SliceRandom};
use serde_json::{Value, json};

/// Devices of the node.
pub(super) const DEVICES: u32 = 64;
/// Of these, NVIDIA devices that never fail and only make noise.
const NOISY: u32 = 8;
/// Faults of one round: one for each device that is not noisy.
pub(super) const PER_ROUND: u32 = DEVICES - NOISY;
/// Mean time between two faults of a road that is watched all the time.
const GAP: Duration = Duration::from_millis(100);
/// Faults that polling must find fall within so long.
const POLLED_WITHIN: Duration = Duration::from_secs(9);

/// By what a fault shows, and by nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Road {
    /// A line of the kernel log.
    Kernel,
    /// An event of NVIDIA's library.
    NvmlEvent,
    /// A fault event of Ascend's library.
    DcmiEvent,
    /// Values that both libraries answer when they are asked.
    Polling,
}

impl Road {
    /// The 99th percentile may be so long.
    pub(super) const fn bound(self) -> Duration {
        match self {
            Self::Kernel | Self::NvmlEvent | Self::DcmiEvent => Duration::from_millis(250),
            // Polls are at most 5 s apart.
            Self::Polling => Duration::from_secs(5),
        }
    }

    /// A fault that was not told after so long never will be.
    pub(super) const fn patience(self) -> Duration {
        match self {
            Self::Kernel | Self::NvmlEvent | Self::DcmiEvent => Duration::from_secs(5),
            Self::Polling => Duration::from_secs(15),
        }
    }
}

/// One device.
#[derive(Clone, Debug)]
pub(super) struct Device {
    /// The local part of its id.
    pub(super) local: String,
    /// Whose it is.
    pub(super) vendor: Vendor,
    number: u32,
}

impl Device {
    fn nvidia(number: u32) -> Self {
        Self { local: format!("0000:{:02x}:00.0", number.saturating_add(0x10)), vendor: Vendor::Nvidia, number }
    }

    /// Two to a card.
    fn ascend(number: u32) -> Self {
        Self { local: format!("{}.{}", number / 2, number % 2), vendor: Vendor::Ascend, number }
    }

    /// As the double's script names it.
    fn place(&self) -> (&'static str, Value) {
        match self.vendor {
            Vendor::Nvidia => ("nvml", json!(self.local)),
            Vendor::Ascend => ("dcmi", json!([self.number / 2, self.number % 2])),
        }
    }

    fn header(&self) -> Value {
        let Self { local, vendor, number } = self;
        match vendor {
            Vendor::Nvidia => json!({
                "pci": local, "uuid": format!("GPU-{number:08x}"), "product": "NVIDIA H100 80GB HBM3",
                "memory_bytes": 85_899_345_920_u64, "serial": format!("{number:010}"),
            }),
            Vendor::Ascend => json!({
                "card": number / 2, "device": number % 2, "logic_id": number, "product": "Ascend910_9392",
                "hbm_bytes": 68_719_476_736_u64, "superpod": 7,
            }),
        }
    }
}

/// The node of a round.
#[derive(Debug)]
pub(super) struct Fleet {
    /// Devices that will fail.
    pub(super) failing: Vec<Device>,
    /// Devices that only make noise.
    pub(super) noisy: Vec<Device>,
}

impl Fleet {
    /// The node on which `road` is measured.
    pub(super) fn of(road: Road) -> Self {
        let noisy = (PER_ROUND..DEVICES).map(Device::nvidia).collect();
        let nvidia = match road {
            Road::Kernel | Road::NvmlEvent => PER_ROUND,
            Road::DcmiEvent => 0,
            Road::Polling => PER_ROUND / 2,
        };
        let ascend = (nvidia..PER_ROUND).map(|number| Device::ascend(number.saturating_sub(nvidia)));
        Self { failing: (0..nvidia).map(Device::nvidia).chain(ascend).collect(), noisy }
    }

    /// The first line of the doubles' script.
    pub(super) fn header(&self) -> Value {
        let of = |vendor| {
            let devices = self.failing.iter().chain(&self.noisy).filter(move |device| device.vendor == vendor);
            devices.map(Device::header).collect::<Vec<_>>()
        };
        json!({"node": "bench", "nvidia": of(Vendor::Nvidia), "ascend": of(Vendor::Ascend)})
    }
}

/// How a fault shows.
#[derive(Clone, Debug)]
pub(super) enum Shows {
    /// In the kernel log, by this text.
    Line(String),
    /// In a vendor's library, by this line of its script.
    Library(Vendor, String),
}

/// One fault.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    /// When, since the storm began.
    pub(super) at: Duration,
    /// Whose.
    pub(super) local: String,
    /// What it is called.
    pub(super) name: String,
    /// How it shows.
    pub(super) shows: Shows,
}

/// So many faults on so many devices at random times, in the order in which they happen.
pub(super) fn draw(road: Road, fleet: &Fleet, count: u32, chance: &mut SmallRng) -> Vec<Fault> {
    let mut devices: Vec<&Device> = fleet.failing.iter().collect();
    devices.shuffle(chance);
    let mut at = Duration::ZERO;
    let mut faults: Vec<Fault> = Vec::new();
    for device in devices.into_iter().take(usize::try_from(count).unwrap_or(usize::MAX)) {
        at = match road {
            Road::Polling => POLLED_WITHIN.mul_f64(chance.random()),
            Road::Kernel | Road::NvmlEvent | Road::DcmiEvent => {
                at.saturating_add(GAP.mul_f64(chance.random_range(0.2..1.8)))
            }
        };
        let (name, shows) = show(road, device, chance);
        faults.push(Fault { at, local: device.local.clone(), name, shows });
    }
    faults.sort_by_key(|fault| fault.at);
    faults
}

/// Faults that the kernel log tells, with their texts.
const LINES: [(u16, &str); 5] = [
    (79, "pid='<unknown>', name=<unknown>, GPU has fallen off the bus."),
    (
        48,
        "pid='<unknown>', name=<unknown>, An uncorrectable double bit error (DBE) has been detected on GPU in the \
         framebuffer at physAddr 0x18f31d80 partition 16, subpartition 3.",
    ),
    (95, "pid=7062, name=python3, Uncontained: LTC TAG (0x2, 0x1). RST: Yes, D-RST: No"),
    (
        119,
        "pid=123417, name=nv-hostengine, Timeout after 6s of waiting for RPC response from GPU0 GSP! Expected \
         function 10 (FREE) (0xc0000005 0x0).",
    ),
    (62, "pid=4011, name=python3, 20e1 0000f2ac 00000000 0000000c 000000d1 00000000"),
];
/// XIDs that NVIDIA's library tells.
const XIDS: [u16; 5] = [79, 48, 95, 119, 62];
/// Codes that Ascend's driver tells.
const CODES: [&str; 2] = ["0x80E01801", "0x80E18404"];

fn one<T: Copy, const N: usize>(of: [T; N], chance: &mut SmallRng) -> Option<T> {
    of.get(chance.random_range(0..N)).copied()
}

fn show(road: Road, device: &Device, chance: &mut SmallRng) -> (String, Shows) {
    let (kind, place) = device.place();
    let library = |name: String, mut line: Value| {
        if let Some(line) = line.as_object_mut() {
            line.insert(kind.to_owned(), place.clone());
        }
        (name, Shows::Library(device.vendor, line.to_string()))
    };
    match (road, device.vendor) {
        (Road::Kernel, _) => {
            let (number, message) = one(LINES, chance).unwrap_or((79, "GPU has fallen off the bus."));
            let address = device.local.trim_end_matches(".0");
            (format!("Xid {number}"), Shows::Line(format!("NVRM: Xid (PCI:{address}): {number}, {message}")))
        }
        (Road::NvmlEvent, _) | (Road::DcmiEvent, Vendor::Nvidia) => {
            let number = one(XIDS, chance).unwrap_or(79);
            library(format!("event 0x8, Xid {number}"), json!({"event": {"type": "0x8", "data": number}}))
        }
        (Road::DcmiEvent, Vendor::Ascend) => {
            let code = one(CODES, chance).unwrap_or("0x80E01801");
            let fault = json!({"id": code, "assertion": "occur", "severity": 3});
            library(format!("event {code}"), json!({"set": {"health": 3, "error_codes": [code]}, "fault": fault}))
        }
        (Road::Polling, Vendor::Nvidia) => match chance.random_range(0..3) {
            0 => library("every call refused".to_owned(), json!({"set": {"lost": true}})),
            1 => library("an uncorrected error counted".to_owned(), json!({"set": {"ecc_uncorrected": 1}})),
            _ => library("field 230 = 1".to_owned(), json!({"set": {"fields": {"230": 1}}})),
        },
        (Road::Polling, Vendor::Ascend) => {
            let code = one(CODES, chance).unwrap_or("0x80E01801");
            library(format!("{code} in the list"), json!({"set": {"health": 3, "error_codes": [code]}}))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use std::collections::BTreeSet;

    #[test]
    fn a_round_fails_each_device_once_and_never_a_noisy_one() {
        for road in [Road::Kernel, Road::NvmlEvent, Road::DcmiEvent, Road::Polling] {
            let fleet = Fleet::of(road);
            let faults = draw(road, &fleet, PER_ROUND, &mut SmallRng::seed_from_u64(3));
            let hit: BTreeSet<_> = faults.iter().map(|fault| fault.local.clone()).collect();
            assert_eq!(hit.len(), 56, "{road:?}");
            assert!(fleet.noisy.iter().all(|device| !hit.contains(&device.local)), "{road:?}");
            assert!(faults.is_sorted_by_key(|fault| fault.at), "{road:?}");
        }
    }

    #[test]
    fn the_same_seed_draws_the_same_faults() {
        let fleet = Fleet::of(Road::Kernel);
        let drawn = |seed| format!("{:?}", draw(Road::Kernel, &fleet, 9, &mut SmallRng::seed_from_u64(seed)));
        assert_eq!(drawn(5), drawn(5));
        assert_ne!(drawn(5), drawn(6));
    }

    #[test]
    fn a_road_shows_its_faults_by_nothing_else() {
        let shows = |road: Road| {
            let fleet = Fleet::of(road);
            draw(road, &fleet, PER_ROUND, &mut SmallRng::seed_from_u64(1)).into_iter().map(|fault| fault.shows)
        };
        assert!(shows(Road::Kernel).all(|shows| matches!(shows, Shows::Line(_))));
        for (road, event) in [(Road::NvmlEvent, true), (Road::DcmiEvent, true), (Road::Polling, false)] {
            let told = |shows| matches!(shows, Shows::Library(_, line) if (line.contains("\"event\"") || line.contains("\"fault\"")) == event);
            assert!(shows(road).all(told), "{road:?}");
        }
    }
}
