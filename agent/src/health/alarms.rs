//! What each alarm of Ascend's driver means: mind-cluster's levels and modules as data
//! (`data/ascend_faults.csv`), and the reasons of the health vocabulary. A new meaning is a new row.

use std::{collections::BTreeMap, sync::OnceLock, time::Duration};

use berth_types::{Action, Admission, Health, Reason, Scope};
use serde::{Deserialize, Serialize};

use super::condition::{Clears, Words};

const CSV: &str = include_str!("../../data/ascend_faults.csv");

/// A card left the bus: the driver's own alarm.
pub const CARD_DROP: u32 = 0x40F8_4E00;
/// A chip finished starting; no fault.
pub const STARTED: u32 = 0x8C2F_A009;
/// The device's own RoCE port went down.
pub const LINK_DOWN: u32 = 0x8107_8603;

/// How serious a code is, the worst last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Level {
    /// Counted.
    NotHandle,
    /// Works, with less.
    SubHealth,
    /// The program should start again; the device, when that lasts.
    RestartRequest,
    /// The program must start again.
    RestartBusiness,
    /// A reset when it is free.
    FreeRestart,
    /// A reset now.
    Restart,
    /// Nothing new on it.
    PreSeparate,
    /// Nothing on it.
    Separate,
}

/// So many within a window separate the device for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Escalation {
    /// How many.
    pub times: u32,
    /// Counted from the first.
    pub within: Duration,
    /// Quiet for so long ends it; `None` = a person does.
    pub release: Option<Duration>,
}

/// What is known of a code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its level, the most serious of its lists.
    pub level: Level,
    /// Its reason.
    pub reason: Reason,
    /// Severity that the driver gives it, 0 to 3, where a driver lists it.
    pub severity: Option<u8>,
    /// Module and cause, in words.
    pub what: String,
    /// When it comes too often.
    pub escalation: Option<Escalation>,
    /// A port is down: said while it lasts, whatever the level.
    pub port_down: bool,
}

impl Listed {
    /// What it says of its device; `None` = it is only counted.
    #[must_use]
    pub fn words(&self, grouped: bool) -> Option<Words> {
        let counted = self.level == Level::NotHandle && !self.port_down;
        (!counted).then(|| self.level.words(grouped))
    }
}

impl Level {
    pub(super) fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "NotHandleFault" => Self::NotHandle,
            "SubHealthFault" => Self::SubHealth,
            "RestartRequest" | "RestartRequestFault" => Self::RestartRequest,
            "RestartBusiness" => Self::RestartBusiness,
            "FreeRestartNPU" => Self::FreeRestart,
            "RestartNPU" => Self::Restart,
            "PreSeparateNPU" | "PreSeparateFault" => Self::PreSeparate,
            "SeparateNPU" | "SeparateFault" => Self::Separate,
            _ => return None,
        })
    }

    /// The words of a device's alarm; `grouped` = it resets together with others.
    #[must_use]
    pub fn words(self, grouped: bool) -> Words {
        let reset = if grouped { Action::ResetGroup } else { Action::ResetDevice };
        let words = |health, admission, action| Words::new(health, admission, action, Scope::Device);
        match self {
            Self::NotHandle | Self::SubHealth => words(Health::Degraded, Admission::Schedulable, Action::None),
            Self::RestartRequest => words(Health::Degraded, Admission::Schedulable, Action::RestartWorkload),
            Self::RestartBusiness => words(Health::Unhealthy, Admission::Draining, Action::RestartWorkload),
            Self::FreeRestart => words(Health::Degraded, Admission::Draining, reset),
            Self::Restart => words(Health::Unhealthy, Admission::Barred, reset),
            Self::PreSeparate => words(Health::Degraded, Admission::Draining, Action::ServiceHardware),
            Self::Separate => words(Health::Unhealthy, Admission::Barred, Action::ServiceHardware),
        }
    }

    /// What ends a condition of this level.
    #[must_use]
    pub const fn clears(self, reason: Reason) -> Clears {
        match (reason, self) {
            (Reason::NetworkDown, _)
            | (Reason::FabricDegraded, _)
            | (Reason::FabricLinkDown, Self::NotHandle)
            | (Reason::PcieFault, Self::NotHandle | Self::SubHealth | Self::RestartRequest | Self::RestartBusiness) => {
                Clears::Reading
            }
            (Reason::MemoryRemapFailed, _) => Clears::Release,
            (Reason::MemoryCorrectableBurst | Reason::ThermalThrottle | Reason::PowerFault, level)
                if !level.takes_out() =>
            {
                Clears::ReadingHeld
            }
            // Nothing was taken from it: there is nothing to give back but trust.
            (_, Self::NotHandle | Self::SubHealth) => Clears::ReadingHeld,
            _ => Clears::Probe,
        }
    }

    const fn takes_out(self) -> bool {
        matches!(self, Self::FreeRestart | Self::Restart | Self::PreSeparate | Self::Separate)
    }
}

/// The row of a code that the driver can report; `None` = nobody listed it.
#[must_use]
pub fn listed(code: u32) -> Option<&'static Listed> {
    static TABLE: OnceLock<BTreeMap<u32, Listed>> = OnceLock::new();
    TABLE.get_or_init(|| table(&rows().collect::<Vec<_>>())).get(&code)
}

/// One row of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) scope: String,
    pub(super) code: String,
    pub(super) level: String,
    severity: Option<u8>,
    module: String,
    pub(super) cause: String,
    escalation: String,
    note: String,
}

/// Every row.
pub(super) fn rows() -> impl Iterator<Item = Row> {
    CSV.lines().filter(|line| !line.starts_with('#')).skip(1).filter_map(row)
}

fn row(line: &str) -> Option<Row> {
    let mut cells = cells(line).into_iter();
    let (scope, code, _, level) = (cells.next()?, cells.next()?, cells.next()?, cells.next()?);
    let severity = [severity(&cells.next()?), severity(&cells.next()?)].into_iter().flatten().max();
    let (module, cause, escalation, note) = (cells.next()?, cells.next()?, cells.next()?, cells.next()?);
    Some(Row { scope, code, level, severity, module, cause, escalation, note })
}

/// Cells of a line; quoted ones may hold commas.
fn cells(line: &str) -> Vec<String> {
    let mut cells = vec![String::new()];
    let mut quoted = false;
    for letter in line.chars() {
        match letter {
            '"' => quoted = !quoted,
            ',' if !quoted => cells.push(String::new()),
            letter => {
                if let Some(cell) = cells.last_mut() {
                    cell.push(letter);
                }
            }
        }
    }
    cells
}

fn severity(text: &str) -> Option<u8> {
    ["warning", "minor", "major", "critical"].iter().zip(0..).find(|(word, _)| **word == text).map(|(_, level)| level)
}

fn table(rows: &[Row]) -> BTreeMap<u32, Listed> {
    let chip = rows.iter().filter(|row| matches!(row.scope.as_str(), "chip" | "driver-only"));
    let chip: Vec<(u32, &Row)> = chip.filter_map(|row| Some((number(&row.code)?, row))).collect();
    let mut modules: BTreeMap<u32, &str> = BTreeMap::new();
    for (code, row) in chip.iter().filter(|(_, row)| !row.module.is_empty()) {
        modules.entry(code >> 16).or_insert(&row.module);
    }
    let mut table: BTreeMap<u32, Listed> = BTreeMap::new();
    for (code, row) in chip {
        let Some(level) = Level::parse(&row.level) else { continue };
        let module =
            if row.module.is_empty() { modules.get(&(code >> 16)).copied().unwrap_or("") } else { &row.module };
        let what = [module, &row.cause].into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(", ");
        let (reason, severity) = (reason(code, module, &row.cause, level), row.severity);
        let port_down = row.cause.contains("link went down") || row.note.contains("port down");
        let new = Listed { level, reason, severity, what, escalation: escalation(&row.escalation), port_down };
        let known = table.entry(code).or_insert_with(|| new.clone());
        if new.level > known.level {
            *known = new;
        }
    }
    table
}

fn number(code: &str) -> Option<u32> {
    u32::from_str_radix(code.strip_prefix("0x")?, 16).ok()
}

/// The first that fits: the code itself, its cause, its module.
fn reason(code: u32, module: &str, cause: &str, level: Level) -> Reason {
    by_value(code).or_else(|| by_cause(cause)).unwrap_or_else(|| by_module(module, level))
}

fn by_value(code: u32) -> Option<Reason> {
    Some(match code {
        CARD_DROP => Reason::DeviceLost,
        0x80E0_1801 | 0x80E1_8404 => Reason::MemoryUncorrectable,
        0x80E1_8402 => Reason::MemoryRemapFailed,
        0x80E1_8401 | 0x80E1_8405 => Reason::MemoryCorrectableBurst,
        0x8C03_A000 => Reason::FirmwareHang,
        0x81B1_8603 => Reason::FabricLinkDown,
        LINK_DOWN | 0x8107_8607 => Reason::NetworkDown,
        0x80E0_0209 | 0x80E2_0207 => Reason::ThermalThrottle,
        0x80E0_020B => Reason::ThermalCritical,
        _ if code >> 8 == 0x8C_1F86 || code == 0x4C1F_8608 => Reason::ProcessFault,
        _ => match code & 0xffff {
            0x8008 => Reason::MemoryUncorrectable,
            0x8006 => Reason::MemoryCorrectableBurst,
            0x8605 => Reason::FabricDegraded,
            0x4E00 => Reason::FirmwareHang,
            _ => return None,
        },
    })
}

fn by_cause(cause: &str) -> Option<Reason> {
    let has = |word: &str| cause.contains(word);
    if has("over-temperature") {
        return Some(if has(", fatal") { Reason::ThermalCritical } else { Reason::ThermalThrottle });
    }
    if ["power", "voltage", "clock"].iter().any(|word| has(word)) {
        return Some(Reason::PowerFault);
    }
    if has("heartbeat") {
        return Some(Reason::FirmwareHang);
    }
    has("multi-bit ECC").then_some(Reason::MemoryUncorrectable)
}

fn by_module(module: &str, level: Level) -> Reason {
    let soft = level <= Level::SubHealth;
    match module {
        "PORT" | "ROCE" | "NIC" | "UBOE" => Reason::NetworkDown,
        "UB" | "UB_PORT" | "HCCS" | "SIO" | "SIOE" | "SLLC" | "RoH" | "RoH_PORT" if level == Level::SubHealth => {
            Reason::FabricDegraded
        }
        "UB" | "UB_PORT" | "HCCS" | "SIO" | "SIOE" | "SLLC" | "RoH" | "RoH_PORT" => Reason::FabricLinkDown,
        "OS" | "PROCESS" | "LPM" => Reason::FirmwareHang,
        _ if module.starts_with("PCIE") => Reason::PcieFault,
        _ if module.starts_with("HBM") || module.starts_with("DDR") => {
            if soft {
                Reason::MemoryCorrectableBurst
            } else {
                Reason::MemoryUncorrectable
            }
        }
        _ => Reason::EngineFault,
    }
}

/// `2x/86400s->ManuallySeparateNPU release 172800s; …`.
fn escalation(text: &str) -> Option<Escalation> {
    let rule = text.split(';').next().filter(|rule| rule.contains("->ManuallySeparateNPU"))?;
    let (times, rest) = rule.split_once("x/")?;
    let seconds = |text: &str| text.trim().strip_suffix('s')?.parse().ok().map(Duration::from_secs);
    let (within, rest) = rest.split_once("->")?;
    let release = rest.split_once(" release ").and_then(|(_, release)| seconds(release));
    Some(Escalation { times: times.trim().parse().ok()?, within: seconds(within)?, release })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level_and_reason(code: u32) -> (Level, Reason) {
        let row = listed(code).unwrap();
        (row.level, row.reason)
    }

    #[test]
    fn the_file_is_read_whole() {
        let rows: Vec<Row> = rows().collect();
        assert_eq!(rows.len(), 932);
        let count = |scope: &str| rows.iter().filter(|row| row.scope == scope).count();
        assert_eq!((count("chip"), count("driver-only"), count("switch")), (803, 10, 30));
        assert!(rows.iter().all(|row| Level::parse(&row.level).is_some()), "every row has a level");
        let wide = rows.iter().filter(|row| row.scope == "chip" && number(&row.code).is_none());
        assert!(wide.clone().all(|row| row.code.len() > 10), "only mind-cluster's own codes are wider than 32 bits");
    }

    #[test]
    fn a_code_in_two_lists_has_the_more_serious_level() {
        assert_eq!(listed(0xA230_1001).unwrap().level, Level::Separate);
    }

    #[test]
    fn codes_have_the_reasons_of_the_vocabulary() {
        use Reason as R;
        for (code, level, reason) in [
            (CARD_DROP, Level::Restart, R::DeviceLost),
            (0x80E0_1801, Level::RestartBusiness, R::MemoryUncorrectable),
            (0x80C9_8008, Level::RestartRequest, R::MemoryUncorrectable),
            (0x80E1_8402, Level::Separate, R::MemoryRemapFailed),
            (0x80E1_8405, Level::SubHealth, R::MemoryCorrectableBurst),
            (0x8C0E_4E00, Level::FreeRestart, R::FirmwareHang),
            (0x8C48_4E00, Level::FreeRestart, R::FirmwareHang),
            (0x8C03_A000, Level::Restart, R::FirmwareHang),
            (0x81B1_8603, Level::NotHandle, R::FabricLinkDown),
            (0x81AF_8000, Level::Restart, R::FabricLinkDown),
            (0x81B1_8605, Level::SubHealth, R::FabricDegraded),
            (0x80BB_8000, Level::RestartRequest, R::NetworkDown),
            (0x80B9_8000, Level::Restart, R::PcieFault),
            (0x80E3_A201, Level::Separate, R::PowerFault),
            (0x80DE_0207, Level::SubHealth, R::ThermalThrottle),
            (0x80E0_020B, Level::Separate, R::ThermalCritical),
            (0x8C1F_8608, Level::NotHandle, R::ProcessFault),
            (0x80CF_8008, Level::Restart, R::MemoryUncorrectable),
            (0x80C9_8000, Level::RestartRequest, R::EngineFault),
        ] {
            assert_eq!(level_and_reason(code), (level, reason), "{code:#X}");
        }
        assert!(listed(0x80FE_8008).is_none());
        let said = |code| listed(code).unwrap().words(false).is_some();
        assert!(said(LINK_DOWN) && said(0x8107_8607) && said(0x81B1_8603), "a port that is down shows");
        assert!(!said(0x80E1_8401) && !said(0x81AF_8009) && !said(STARTED), "what is only counted does not");
    }

    #[test]
    fn escalations_are_read_with_their_windows() {
        let day = Duration::from_secs(86_400);
        let rule = |code| listed(code).unwrap().escalation;
        assert_eq!(rule(0x80E0_1801), Some(Escalation { times: 2, within: day, release: None }));
        assert_eq!(rule(LINK_DOWN), Some(Escalation { times: 5, within: day, release: Some(day * 2) }));
        assert_eq!(rule(0x80E1_8005).map(|rule| rule.times), Some(3));
        assert_eq!(rule(CARD_DROP), None);
    }

    #[test]
    fn what_takes_a_device_out_is_never_given_back_by_silence() {
        for (code, row) in table(&rows().collect::<Vec<_>>()) {
            let Some(words) = row.words(false) else { continue };
            if words.admission == Admission::Barred && row.reason != Reason::NetworkDown {
                assert!(matches!(row.level.clears(row.reason), Clears::Probe | Clears::Release), "{code:#X} {row:?}");
            }
        }
    }
}
