//! What each XID means: NVIDIA's catalog as data (`data/nvidia_xids.csv`), and the reasons of the health
//! vocabulary. One row per code or group of codes; a new meaning is a new row.

use std::{collections::BTreeMap, sync::OnceLock};

use berth_types::{Action, Admission, Health, Reason, Scope};
use serde::{Deserialize, Serialize};

use super::condition::{Clears, Words};

const CSV: &str = include_str!("../../data/nvidia_xids.csv");

/// Unhealthy/Draining/ResetDevice: what RESET_GPU of the catalog means.
pub const RESET: Words = Words::new(Health::Unhealthy, Admission::Draining, Action::ResetDevice, Scope::Device);
/// Unhealthy/Barred/ResetDevice.
pub const RESET_NOW: Words = Words::new(Health::Unhealthy, Admission::Barred, Action::ResetDevice, Scope::Device);
/// Unhealthy/Barred/RebootNode: what RESTART_BM of the catalog means.
pub const REBOOT: Words = Words::new(Health::Unhealthy, Admission::Barred, Action::RebootNode, Scope::Device);
/// Degraded/Schedulable/None: watch it.
pub const WATCH: Words = Words::new(Health::Degraded, Admission::Schedulable, Action::None, Scope::Device);
/// Unhealthy/Barred/ServiceHardware.
pub const SERVICE: Words = Words::new(Health::Unhealthy, Admission::Barred, Action::ServiceHardware, Scope::Device);
/// Degraded/Schedulable/None on a domain.
pub const FABRIC: Words = Words::new(Health::Degraded, Admission::Schedulable, Action::None, Scope::Domain);

/// How an XID is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treat {
    /// Counted, never reported.
    Count,
    /// A program's own error: a note.
    Note,
    /// Channels torn down because of something else: joins it, alone a note.
    Torn,
    /// Memory lost in one program only: a note, whose pid may come with the tear-down.
    Contained,
    /// A condition of the device.
    Device(Row),
    /// A condition of the node.
    Node(Row),
    /// The driver's recovery action decides: 0 makes it the second, anything else the first.
    Driver(Row, Option<Row>),
}

/// What a condition of one code is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The reason.
    pub reason: Reason,
    /// The other words.
    pub words: Words,
    /// What ends it.
    pub clears: Clears,
}

const fn row(reason: Reason, words: Words, clears: Clears) -> Row {
    Row { reason, words, clears }
}

/// The catalog's immediate action for a number; `None` = not listed.
#[must_use]
pub fn listed(number: u16) -> Option<&'static str> {
    static TABLE: OnceLock<BTreeMap<u16, (&'static str, bool)>> = OnceLock::new();
    let table = TABLE.get_or_init(|| CSV.lines().filter_map(parse).collect());
    table.get(&number).filter(|(_, unused)| !unused).map(|(action, _)| *action)
}

fn parse(line: &'static str) -> Option<(u16, (&'static str, bool))> {
    let mut cells = line.split(',');
    let number = cells.next()?.parse().ok()?;
    let action = cells.nth(1)?;
    Some((number, (action, cells.next()? == "yes")))
}

/// What `number` means.
#[must_use]
pub fn treat(number: u16) -> Treat {
    use Clears::{Probe, Reading, ReadingAfterReset, ReadingHeld, Release};
    use Reason as R;
    let draining = Words { admission: Admission::Draining, ..WATCH };
    match number {
        79 => Treat::Device(row(R::DeviceLost, REBOOT, Probe)),
        48 | 171 | 172 | 175 => Treat::Device(row(R::MemoryUncorrectable, RESET, Probe)),
        95 | 140 => Treat::Device(row(R::MemoryUncorrectable, RESET_NOW, Probe)),
        94 => Treat::Contained,
        63 | 156 => Treat::Device(row(R::MemoryRemapPending, WATCH, ReadingAfterReset)),
        64 | 157 | 168 => Treat::Device(row(R::MemoryRemapFailed, RESET, Release)),
        92 | 93 => Treat::Device(row(R::MemoryCorrectableBurst, WATCH, ReadingHeld)),
        46 | 110 | 158 => Treat::Device(row(R::EngineFault, RESET, Probe)),
        109 => {
            let restart = Words { action: Action::RestartWorkload, ..WATCH };
            Treat::Driver(row(R::EngineFault, RESET, Probe), Some(row(R::EngineFault, restart, ReadingHeld)))
        }
        62 | 119 | 120 | 143 | 169 => Treat::Device(row(R::FirmwareHang, RESET, Probe)),
        78 => Treat::Node(row(R::DriverFault, Words { scope: Scope::Node, ..draining }, Reading)),
        74 | 136 | 144..=150 | 173 => Treat::Device(row(R::FabricLinkDown, RESET, Probe)),
        155 => Treat::Driver(row(R::FabricLinkDown, RESET, Probe), Some(row(R::FabricDegraded, FABRIC, Reading))),
        121 | 137 | 159 | 166 | 170 => Treat::Device(row(R::FabricDegraded, FABRIC, Reading)),
        167 => Treat::Device(row(R::PcieFault, RESET, Probe)),
        176 => Treat::Device(row(R::PcieFault, WATCH, Reading)),
        54 => {
            let words = Words { admission: Admission::Draining, ..SERVICE };
            Treat::Device(row(R::PowerFault, words, ReadingHeld))
        }
        162..=165 => Treat::Device(row(R::PowerFault, WATCH, ReadingHeld)),
        45 => Treat::Torn,
        13 | 31 | 32 | 43 | 68 | 69 | 174 => Treat::Note,
        _ => by_catalog(number),
    }
}

fn by_catalog(number: u16) -> Treat {
    match listed(number) {
        Some("RESTART_APP") => Treat::Note,
        Some("IGNORE") => Treat::Count,
        Some("RESET_GPU") => Treat::Device(row(Reason::EngineFault, RESET, Clears::Probe)),
        Some("RESTART_BM") => Treat::Device(row(Reason::EngineFault, REBOOT, Clears::Probe)),
        Some("RESTART_VM") => {
            let words = Words { action: Action::RebootNode, ..RESET };
            Treat::Device(row(Reason::EngineFault, words, Clears::Probe))
        }
        _ => Treat::Driver(row(Reason::UnknownFault, WATCH, Clears::Probe), None),
    }
}

/// What the driver's recovery action means; `None` = nothing is wanted.
#[must_use]
pub fn recovery(value: u32) -> Option<Row> {
    let degraded = |admission, action, scope| Words::new(Health::Degraded, admission, action, scope);
    let (reason, words, clears) = match value {
        0 => return None,
        1 => (Reason::ResetRequired, RESET_NOW, Clears::Probe),
        2 => (Reason::ResetRequired, Words { scope: Scope::Node, ..REBOOT }, Clears::Probe),
        3 => (Reason::FabricDegraded, degraded(Admission::Draining, Action::None, Scope::Domain), Clears::Reading),
        4 => {
            let words = degraded(Admission::Draining, Action::ResetDevice, Scope::Device);
            (Reason::ResetRequired, words, Clears::Probe)
        }
        5 => (Reason::FabricDegraded, FABRIC, Clears::Reading),
        _ => {
            let words = degraded(Admission::Draining, Action::ServiceHardware, Scope::Device);
            (Reason::UnknownFault, words, Clears::Probe)
        }
    };
    Some(row(reason, words, clears))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalog_is_read_whole() {
        assert_eq!(CSV.lines().filter_map(parse).count(), 176);
        assert_eq!(
            (listed(79), listed(13), listed(1), listed(200)),
            (Some("RESTART_BM"), Some("RESTART_APP"), None, None)
        );
    }

    #[test]
    fn a_code_that_the_catalog_wants_reset_for_is_never_a_note() {
        for number in 0..=u16::MAX {
            if matches!(listed(number), Some("RESET_GPU" | "RESTART_BM" | "RESTART_VM")) {
                assert!(matches!(treat(number), Treat::Device(_) | Treat::Driver(..)), "{number}");
            }
        }
    }

    #[test]
    fn a_program_that_fails_is_a_note_and_an_unlisted_code_asks_the_driver() {
        assert_eq!((treat(13), treat(39), treat(45), treat(14)), (Treat::Note, Treat::Note, Treat::Torn, Treat::Count));
        for number in [1, 200, 999] {
            assert!(matches!(treat(number), Treat::Driver(Row { reason: Reason::UnknownFault, .. }, None)), "{number}");
        }
    }
}
