//! Values read from one device: what they begin and what they end.

use std::{collections::VecDeque, time::Duration};

use berth_types::{Admission, Health, Reason, Scope};

use super::{Device, Effect, FirstClique};
use crate::health::{
    catalog::{self, Row},
    condition::{Clears, Origin, Phase, WINDOW, Words},
    fact::Reading,
};

/// Corrected errors within [`BURST_SPAN`] that are too many.
const BURST: u64 = 1000;
/// See [`BURST`].
const BURST_SPAN: Duration = Duration::from_secs(600);
/// Repeated packets within [`BURST_SPAN`] that are too many. A default, as no vendor names one.
const REPLAYS: u64 = 1000;
/// Clock event reasons: hardware slowdown by heat, by software and by hardware.
const HOT: u64 = 0x20 | 0x40;
/// Clock event reasons: hardware slowdown and power brake.
const POWER: u64 = 0x8 | 0x80;

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
        // The log spoke after this value was asked for: it is the newer word.
        if self.recovery_line.is_some_and(|said| said > reading.begun) {
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
            } else if after_reset {
                self.end(Reason::MemoryRemapPending, Origin::Vendor);
            }
        }
        if reading.sram_exceeded.value() == Some(true) {
            let words = if after_reset { catalog::SERVICE } else { catalog::RESET };
            let row = Row { reason: Reason::MemoryRemapFailed, words, clears: Clears::Release };
            self.renew(now, row, "on-chip memory: error threshold exceeded");
        }
        let before = self.last.as_ref().and_then(|last| last.ecc_uncorrected.value());
        if let (Some(before), Some(count)) = (before, reading.ecc_uncorrected.value())
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
        counted(&mut self.corrected, now, count);
        if self.corrected_growth() >= BURST {
            let row =
                Row { reason: Reason::MemoryCorrectableBurst, words: catalog::WATCH, clears: Clears::ReadingHeld };
            self.renew(now, row, &format!("{} corrected errors in 10 min", self.corrected_growth()));
        }
    }

    fn corrected_growth(&self) -> u64 {
        growth(&self.corrected)
    }

    /// A host link that repeats more than a trained one ever does.
    fn count_replays(&mut self, now: Duration, count: u64) {
        counted(&mut self.replays, now, count);
        let again = growth(&self.replays);
        if again >= REPLAYS {
            let row = Row { reason: Reason::PcieFault, words: catalog::WATCH, clears: Clears::Reading };
            self.renew(now, row, &format!("{again} replays on the host link in 10 min"));
        }
    }

    fn read_heat_and_power(&mut self, now: Duration, reading: &Reading) {
        let reasons = reading.clock_reasons.value().unwrap_or(0);
        let temperature = reading.temperature.value();
        let over = |limit: Option<u32>| temperature.zip(limit).is_some_and(|(temperature, limit)| temperature > limit);
        if reasons & HOT != 0 || over(reading.slowdown.value()) {
            let row = Row { reason: Reason::ThermalThrottle, words: catalog::WATCH, clears: Clears::ReadingHeld };
            self.renew(now, row, &format!("clock event reasons {reasons:#x}, {} C", temperature.unwrap_or(0)));
        }
        if temperature.zip(reading.shutdown.value()).is_some_and(|(at, limit)| limit > 0 && at >= limit) {
            let row = Row { reason: Reason::ThermalCritical, words: catalog::SERVICE, clears: Clears::Probe };
            self.renew(now, row, &format!("{} C, at the shutdown threshold", temperature.unwrap_or(0)));
        }
        if reasons & POWER != 0 {
            let row = Row { reason: Reason::PowerFault, words: catalog::WATCH, clears: Clears::ReadingHeld };
            self.renew(now, row, &format!("clock event reasons {reasons:#x}"));
        }
    }

    fn read_fabric(&mut self, now: Duration, reading: &Reading) {
        let known = self.conditions.contains_key(&(Reason::FabricLinkDown, Origin::Vendor));
        if !reading.links_down.is_empty() && !known && self.resetting.is_none() && !self.awaits_line() {
            let row = Row { reason: Reason::FabricLinkDown, words: catalog::RESET, clears: Clears::Probe };
            self.begin(now, row, Origin::Vendor, &format!("NVLink {:?} inactive", reading.links_down));
        }
        let Some(fabric) = reading.fabric.value() else { return };
        let first = *self.clique.get_or_insert(FirstClique { clique: fabric.clique });
        if fabric.unhealthy || fabric.clique != first.clique {
            let row = Row { reason: Reason::FabricDegraded, words: catalog::FABRIC, clears: Clears::Reading };
            self.renew(now, row, &format!("fabric: clique {:?}, unhealthy {}", fabric.clique, fabric.unhealthy));
        }
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
        let calm = self.corrected_growth() < BURST;
        let steady = growth(&self.replays) < REPLAYS;
        let cool = last.clock_reasons.value().is_none_or(|reasons| reasons & HOT == 0)
            && last.temperature.value().zip(last.slowdown.value()).is_none_or(|(at, limit)| at <= limit);
        let powered = last.clock_reasons.value().is_none_or(|reasons| reasons & POWER == 0);
        let joined = last
            .fabric
            .value()
            .is_none_or(|fabric| !fabric.unhealthy && self.clique.is_none_or(|first| first.clique == fabric.clique));
        let (probation, blamed) = (self.settings.probation, self.other_end_blamed);
        self.conditions.retain(|(reason, origin), condition| {
            if condition.phase != Phase::Active || *origin != Origin::Vendor || last.begun < condition.last {
                return true;
            }
            let quiet = now.saturating_sub(condition.last) > WINDOW;
            let good = match reason {
                Reason::MemoryCorrectableBurst => calm,
                Reason::ThermalThrottle => cool,
                Reason::PowerFault => powered,
                Reason::FabricDegraded => joined && quiet,
                // The innocent end of a link, once the link is up and nobody else of the node is to blame.
                Reason::FabricLinkDown => last.links_down.is_empty() && !blamed,
                Reason::PcieFault => quiet && steady,
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

/// Remembers a counter's value; one that fell began anew. The oldest value kept is the last one from before the span.
fn counted(values: &mut VecDeque<(Duration, u64)>, now: Duration, count: u64) {
    if values.back().is_some_and(|(_, last)| *last > count) {
        values.clear();
    }
    values.push_back((now, count));
    while values.get(1).is_some_and(|(at, _)| now.saturating_sub(*at) >= BURST_SPAN) {
        values.pop_front();
    }
}

/// How much a counter grew over what is remembered of it.
fn growth(values: &VecDeque<(Duration, u64)>) -> u64 {
    let ends = values.front().zip(values.back());
    ends.map_or(0, |((_, first), (_, last))| last.saturating_sub(*first))
}
