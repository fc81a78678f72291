//! Values read from one device: what they begin and what they end.

use std::time::Duration;

use berth_types::{Admission, Health, Reason, Scope};
use serde::{Deserialize, Serialize};

use super::{Device, Effect, FirstClique};
use crate::health::{
    catalog::{self, Row},
    condition::{Clears, Origin, Phase, Words},
    fact::{HostLink, Read, Reading},
};

/// Corrected errors within 10 min that are too many.
const BURST: u64 = 1000;
/// Errors of a link within 10 min that are too many: more than a trained one ever has. A default, as no vendor names
/// one.
pub(super) const WORN: u64 = 1000;
/// What a line of the kernel log began ends with a good reading that is so much later: less than readings are apart.
const SETTLED: Duration = Duration::from_secs(4);
/// The driver prints its recovery action so much before its field has it.
const FIELD_LATE: Duration = Duration::from_millis(500);
/// Clock event reason of a device that has nothing to do.
const IDLE: u64 = 0x1;
/// Clock event reasons: hardware slowdown by heat, by software and by hardware.
const HOT: u64 = 0x20 | 0x40;
/// Clock event reasons: hardware slowdown and power brake.
const POWER: u64 = 0x8 | 0x80;

/// Whether the link to the host is slower than it could be while the device works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HostLinkWatch {
    /// It was at the last look.
    slow: bool,
    /// It was at two looks in a row, and has not been seen at its best since.
    fault: bool,
}

impl HostLinkWatch {
    fn look(&mut self, link: HostLink, busy: bool) {
        // An idle device lowers the generation to save power, and says nothing by it.
        let slow = link.slow() && busy;
        self.fault = link.slow() && (self.fault || (slow && self.slow));
        self.slow = slow;
    }
}

impl Reading {
    /// At or above the temperature at which it shuts down.
    pub(super) fn too_hot(&self) -> bool {
        self.temperature.value().zip(self.shutdown.value()).is_some_and(|(at, limit)| limit > 0 && at >= limit)
    }

    /// Above the temperature from which it slows down.
    fn hot(&self) -> bool {
        self.temperature.value().zip(self.slowdown.value()).is_some_and(|(at, limit)| limit > 0 && at > limit)
    }

    /// Whether none of these clock event reasons is given; what is not known gives none away.
    fn free_of(&self, reasons: u64) -> bool {
        !self.clock_reasons.unknown() && self.clock_reasons.value().is_none_or(|given| given & reasons == 0)
    }
}

impl Device {
    pub(super) fn reading(&mut self, now: Duration, reading: &Reading, effects: &mut Vec<Effect>) {
        if reading.lost {
            self.unreachable = Some(now);
            self.lost(now, "NVML 15 (GPU is lost)");
            self.last = Some(reading.clone());
            return self.decide_waiting(now, effects);
        }
        self.sight(now, reading);
        self.read_memory(now, reading);
        self.read_heat_and_power(now, reading);
        self.read_host_link(now, reading);
        self.read_fabric(now, reading);
        self.last = Some(reading.clone());
        self.hold(now);
        // Last, so that the driver's wish joins what is left and not what this reading just ended.
        self.read_recovery(now, reading);
        self.decide_waiting(now, effects);
        self.come_back(now);
    }

    /// A deciding value that does not come makes the agent blind, and one that comes lets it see.
    fn sight(&mut self, now: Duration, reading: &Reading) {
        match reading.blind() {
            Some(what) => {
                let words =
                    Words::new(Health::Unknown, Admission::Schedulable, berth_types::Action::None, Scope::Device);
                let row = Row { reason: Reason::AgentBlind, words, clears: Clears::Reading };
                self.begin(now, row, Origin::Vendor, &what);
            }
            None => self.end(Reason::AgentBlind, Origin::Vendor),
        }
    }

    fn read_recovery(&mut self, now: Duration, reading: &Reading) {
        if reading.reset_required {
            return self.recovery_value(now, 1, "NVML 16 (GPU requires reset)");
        }
        let Some(value) = reading.recovery.value() else { return };
        // The log spoke after this value was asked for: it is the newer word. The field may be a moment behind the line.
        let settled = |said: Duration| said.saturating_add(if value == 0 { FIELD_LATE } else { Duration::ZERO });
        if self.recovery_line.is_some_and(|said| settled(said) > reading.begun) {
            return;
        }
        self.recovery_value(now, value, &format!("recovery action {value} (field 230)"));
    }

    fn read_memory(&mut self, now: Duration, reading: &Reading) {
        let after_reset = self.reset_done.is_some_and(|done| reading.begun >= done);
        if let Some(rows) = reading.rows.value() {
            if rows.failed {
                let words = if after_reset { catalog::SERVICE } else { catalog::RESET };
                let row = Row { reason: Reason::MemoryRemapFailed, words, clears: Clears::Release };
                self.renew(now, row, "remapped rows: failed");
            }
            if rows.pending {
                let row = Row {
                    reason: Reason::MemoryRemapPending,
                    words: catalog::WATCH,
                    clears: Clears::ReadingAfterReset,
                };
                self.renew(now, row, "remapped rows: pending");
            } else {
                // Nothing but a reset puts a spare row in: one that waited and waits no more is as good as its order.
                let waited = self.last.as_ref().and_then(|last| last.rows.value()).is_some_and(|rows| rows.pending);
                if after_reset || waited {
                    self.end(Reason::MemoryRemapPending, Origin::Vendor);
                }
            }
        }
        if reading.sram_exceeded.value() == Some(true) {
            let words = if after_reset { catalog::SERVICE } else { catalog::RESET };
            let row = Row { reason: Reason::MemoryRemapFailed, words, clears: Clears::Release };
            self.renew(now, row, "on-chip memory: error threshold exceeded");
        }
        if let Some(count) = reading.ecc_uncorrected.value()
            && let Some(before) = self.uncorrected.replace(count)
            && count > before
        {
            let row = Row { reason: Reason::MemoryUncorrectable, words: catalog::RESET, clears: Clears::Probe };
            self.begin(now, row, Origin::Vendor, &format!("uncorrected errors {before} to {count}"));
        }
        if let Some(count) = reading.ecc_corrected.value() {
            self.count_corrected(now, count);
        }
        if let Some(count) = reading.replays.value() {
            self.count_replays(now, count);
        }
    }

    fn count_corrected(&mut self, now: Duration, count: u64) {
        self.corrected.take(now, count);
        let growth = self.corrected.growth();
        if growth >= BURST {
            let row =
                Row { reason: Reason::MemoryCorrectableBurst, words: catalog::WATCH, clears: Clears::ReadingHeld };
            self.renew(now, row, &format!("{growth} corrected errors in 10 min"));
        }
    }

    /// A host link that repeats more than a trained one ever does.
    fn count_replays(&mut self, now: Duration, count: u64) {
        self.replays.take(now, count);
        let again = self.replays.growth();
        if again >= WORN {
            let row = Row { reason: Reason::PcieFault, words: catalog::WATCH, clears: Clears::Reading };
            self.renew(now, row, &format!("{again} replays on the host link in 10 min"));
        }
    }

    /// A host link that is less than this device and this machine could make of it.
    fn read_host_link(&mut self, now: Duration, reading: &Reading) {
        let Some(link) = reading.host_link.value() else { return };
        let busy = reading.clock_reasons.value().is_some_and(|reasons| reasons & IDLE == 0);
        self.host_link.look(link, busy);
        let HostLink { lanes, lanes_most, generation, generation_most } = link;
        let row = Row { reason: Reason::PcieFault, words: catalog::WATCH, clears: Clears::Reading };
        if link.narrow() {
            self.renew(now, row, &format!("host link has {lanes} of {lanes_most} lanes"));
        } else if self.host_link.fault {
            self.renew(now, row, &format!("host link is of generation {generation} and not {generation_most}"));
        }
    }

    fn read_heat_and_power(&mut self, now: Duration, reading: &Reading) {
        let reasons = reading.clock_reasons.value().unwrap_or(0);
        let temperature = reading.temperature.value();
        if reasons & HOT != 0 || reading.hot() {
            let row = Row { reason: Reason::ThermalThrottle, words: catalog::WATCH, clears: Clears::ReadingHeld };
            self.renew(now, row, &format!("clock event reasons {reasons:#x}, {} C", temperature.unwrap_or(0)));
        }
        if reading.too_hot() {
            let row = Row { reason: Reason::ThermalCritical, words: catalog::SERVICE, clears: Clears::Probe };
            self.renew(now, row, &format!("{} C, at the shutdown threshold", temperature.unwrap_or(0)));
        }
        if reasons & POWER != 0 {
            let row = Row { reason: Reason::PowerFault, words: catalog::WATCH, clears: Clears::ReadingHeld };
            self.renew(now, row, &format!("clock event reasons {reasons:#x}"));
        }
    }

    fn read_fabric(&mut self, now: Duration, reading: &Reading) {
        let down = reading.down();
        if !down.is_empty() {
            self.links_seen_down = Some(now);
            self.read_links(now, down);
        }
        let Some(fabric) = reading.fabric.value() else { return };
        // A device that joins its fabric for the first time has changed nothing.
        if self.clique.is_none_or(|first| first.clique.is_none()) {
            self.clique = Some(FirstClique { clique: fabric.clique });
        }
        let first = self.clique.unwrap_or(FirstClique { clique: None });
        if fabric.unhealthy || fabric.clique != first.clique {
            let row = Row { reason: Reason::FabricDegraded, words: catalog::FABRIC, clears: Clears::Reading };
            self.renew(now, row, &format!("fabric: clique {:?}, unhealthy {}", fabric.clique, fabric.unhealthy));
        }
    }

    /// Links are down. The end that only follows from another's fault is innocent.
    fn read_links(&mut self, now: Duration, down: &[u32]) {
        let known = self.conditions.get(&(Reason::FabricLinkDown, Origin::Vendor));
        let known = known.is_some_and(|open| !matches!(open.phase, Phase::Probation(_)));
        if known || self.awaits_line() || self.in_reset(now) {
            return;
        }
        let (words, clears) = if self.follows_another(now) {
            (Words { admission: Admission::Draining, ..catalog::WATCH }, Clears::Reading)
        } else {
            (catalog::RESET, Clears::Probe)
        };
        self.begin(
            now,
            Row { reason: Reason::FabricLinkDown, words, clears },
            Origin::Vendor,
            &format!("NVLink {down:?} inactive"),
        );
    }

    /// As `begin`, for a value that is read again and again: it is one fact as long as it lasts.
    fn renew(&mut self, now: Duration, row: Row, evidence: &str) {
        match self.conditions.get_mut(&(row.reason, Origin::Vendor)) {
            Some(open) if open.phase == Phase::Active => {
                open.words = open.words.worsened(row.words);
            }
            _ => self.begin(now, row, Origin::Vendor, evidence),
        }
    }

    /// Conditions that a good reading ends, now or after a probation.
    fn hold(&mut self, now: Duration) {
        let Some(last) = self.last.clone() else { return };
        let calm = self.corrected.growth() < BURST && !last.ecc_corrected.unknown();
        let steady = self.replays.growth() < WORN && !last.replays.unknown();
        let whole = last.host_link.value().is_none_or(|link| !link.narrow() && !self.host_link.fault);
        let whole = whole && !last.host_link.unknown();
        let cool = last.free_of(HOT) && !last.hot() && !last.temperature.unknown() && !last.slowdown.unknown();
        let powered = last.free_of(POWER);
        let joined = match last.fabric {
            Read::Value(fabric) => !fabric.unhealthy && self.clique.is_none_or(|first| first.clique == fabric.clique),
            Read::Absent => true,
            Read::Failed(_) | Read::Missed => false,
        };
        let up = last.down().is_empty() && !last.links_down.unknown();
        let (probation, blamed) = (self.settings.probation, self.other_end_blamed);
        self.conditions.retain(|(reason, origin), condition| {
            if condition.phase != Phase::Active || *origin != Origin::Vendor || last.begun < condition.last {
                return true;
            }
            let quiet = now.saturating_sub(condition.last) > SETTLED;
            let good = match reason {
                Reason::MemoryCorrectableBurst => calm,
                Reason::ThermalThrottle => cool,
                Reason::PowerFault => powered,
                Reason::FabricDegraded => joined && quiet,
                // The innocent end of a link, once the link is up and nobody else of the node is to blame.
                Reason::FabricLinkDown => up && !blamed,
                Reason::PcieFault => quiet && steady && whole,
                Reason::EngineFault => last.recovery.value() == Some(0),
                _ => false,
            };
            match condition.clears {
                Clears::Reading if good => return false,
                Clears::ReadingHeld if good => condition.phase = Phase::Held(now.saturating_add(probation)),
                _ => {}
            }
            true
        });
    }
}
