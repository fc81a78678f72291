//! Codes of one Ascend device: what each begins when the driver lists it, what ends when it leaves the list, and how often
//! is too often.

use std::time::Duration;

use berth_types::{Action, Admission, Reason, Scope};

use super::{
    Device, Effect, Phase,
    npu::{Active, PATIENCE},
    silence::NETWORK_HOLD,
};
use crate::health::{
    alarms::{self, Escalation, Level, Listed},
    catalog::{self, Row},
    condition::{Clears, Origin},
    fact::{NpuReading, Read},
};

/// Codes that hold on a device, beyond which one that nobody listed says nothing new: what a driver lists at most.
const INVENTED: usize = 128;
/// Health without a code must last so long: list and health are read one after the other.
const UNCODED: Duration = Duration::from_secs(10);
/// Stands for the code that is missing; no driver uses it.
const NO_CODE: u32 = 0;

impl Device {
    /// Happened and over: counted, and said when it is more than a counter. It is never active.
    pub(super) fn one_off(&mut self, now: Duration, code: u32, severity: u8, effects: &mut Vec<Effect>) {
        effects.push(Effect::Trigger(code));
        let listed = alarms::listed(code);
        let (reason, action) = match listed {
            Some(row) => {
                self.count(now, code, row.escalation);
                let Some(words) = row.words(self.grouped()) else { return };
                (row.reason, words.action)
            }
            None if severity <= 1 => (Reason::UnknownFault, Action::None),
            None => (Reason::UnknownFault, Action::ServiceHardware),
        };
        let evidence = describe(code, listed);
        effects.push(Effect::Note { reason, action, scope: Scope::Device, evidence: format!("{evidence}, once") });
    }

    /// Health that is major or critical, and no code that says why: as a code that nobody listed, once it has lasted.
    pub(super) fn uncoded(&mut self, now: Duration, reading: &NpuReading) {
        let none = matches!(&reading.codes, Read::Value(codes) if codes.is_empty());
        let severe = matches!(reading.health, Read::Value(2 | 3));
        let idle = self.npu.active.is_empty() && self.npu.hints.is_empty() && !self.npu.silence.expected(now);
        if !(none && severe && idle) {
            self.npu.uncoded = None;
            return;
        }
        let since = *self.npu.uncoded.get_or_insert(now);
        if now.saturating_sub(since) < UNCODED {
            return;
        }
        let (reason, level) = (Reason::UnknownFault, Level::Separate);
        let active = Active { since: now, reason: Some(reason), level, undecided: None, joined: false };
        self.npu.active.insert(NO_CODE, active);
        let row = Row { reason, words: level.words(false), clears: Clears::Probe };
        let health = reading.health.value().unwrap_or(0);
        self.begin(now, row, Origin::Code(NO_CODE), &format!("DCMI health {health} without a code"));
    }

    /// The driver's list: what is new on it begins, what left it ends when health agrees.
    pub(super) fn list(&mut self, now: Duration, begun: Duration, codes: &[u32], effects: &mut Vec<Effect>) {
        for code in codes {
            self.npu.hints.retain(|hint| hint.code != *code);
            if !self.npu.active.contains_key(code) && !self.announced(now, *code) {
                self.begin_code(now, *code, effects);
            }
        }
        self.npu.hints.retain(|hint| now < hint.at.saturating_add(PATIENCE) || begun < hint.at);
        let left: Vec<u32> = self.npu.active.keys().filter(|code| !codes.contains(code)).copied().collect();
        for code in left {
            if self.agrees(code, codes) {
                self.end_code(now, code);
            }
        }
        self.npu.over.clear();
    }

    /// Without a list events are believed; a recovery still needs health's word.
    pub(super) fn believe(&mut self, now: Duration, reading: &NpuReading, effects: &mut Vec<Effect>) {
        for hint in std::mem::take(&mut self.npu.hints) {
            self.begin_code(now, hint.code, effects);
        }
        if reading.codes != Read::Absent {
            return;
        }
        for code in std::mem::take(&mut self.npu.over) {
            let others: Vec<u32> = self.npu.active.keys().filter(|other| **other != code).copied().collect();
            if self.npu.active.contains_key(&code) && self.agrees(code, &others) {
                self.end_code(now, code);
            } else if self.npu.active.contains_key(&code) {
                self.npu.over.push(code);
            }
        }
    }

    /// Whether health bears out that `code` is over while `rest` holds: it is the worst of what holds.
    fn agrees(&self, code: u32, rest: &[u32]) -> bool {
        let health = match self.npu.last.as_ref().map(|last| last.health) {
            Some(Read::Value(health)) => health,
            Some(Read::Absent) => return true,
            _ => return false,
        };
        let severity = |code: &u32| self.severity(*code).map_or(3, u32::from);
        let most = rest.iter().map(severity).max().unwrap_or(0);
        health <= most || self.severity(code).is_some_and(|severity| health < u32::from(severity))
    }

    fn severity(&self, code: u32) -> Option<u8> {
        self.npu.severities.get(&code).copied().or_else(|| alarms::listed(code).and_then(|row| row.severity))
    }

    pub(super) fn begin_code(&mut self, now: Duration, code: u32, effects: &mut Vec<Effect>) {
        let listed = alarms::listed(code);
        // A driver that invents codes is told by those that are known already.
        let known = self.conditions.keys().filter(|(_, origin)| matches!(origin, Origin::Code(_))).count();
        if listed.is_none() && (self.npu.active.len() >= INVENTED || known >= INVENTED) {
            return;
        }
        let level = listed.map_or(Level::Separate, |row| row.level);
        let mut active = Active { since: now, reason: None, level, undecided: None, joined: false };
        match listed {
            Some(row) => {
                if let Some(words) = row.words(self.grouped()) {
                    active.reason = Some(row.reason);
                    let row = Row { reason: row.reason, words, clears: row.level.clears(row.reason) };
                    self.begin(now, row, Origin::Code(code), &describe(code, listed));
                }
                self.count(now, code, row.escalation);
            }
            // History is judged as it is found; later an event may come with the severity.
            None if self.replaying => active.undecided = Some(now),
            None => active.undecided = Some(now.saturating_add(PATIENCE)),
        }
        self.npu.active.insert(code, active);
        self.decide_undecided(now, effects);
    }

    /// Judges codes that nobody listed: by severity, or as the worst when nobody tells one.
    pub(super) fn decide_undecided(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let waiting: Vec<u32> =
            self.npu.active.iter().filter(|(_, active)| active.undecided.is_some()).map(|(code, _)| *code).collect();
        for code in waiting {
            let severity = self.npu.severities.get(&code).copied();
            let Some(active) = self.npu.active.get_mut(&code) else { continue };
            if severity.is_none() && active.undecided.is_some_and(|until| now < until) {
                continue;
            }
            active.undecided = None;
            let evidence = describe(code, None);
            if severity.is_some_and(|severity| severity <= 1) {
                active.level = Level::NotHandle;
                let (reason, scope) = (Reason::UnknownFault, Scope::Device);
                effects.push(Effect::Note { reason, action: Action::None, scope, evidence });
            } else {
                active.reason = Some(Reason::UnknownFault);
                let (words, clears) = (Level::Separate.words(false), Clears::Probe);
                self.begin(now, Row { reason: Reason::UnknownFault, words, clears }, Origin::Code(code), &evidence);
            }
        }
    }

    fn end_code(&mut self, now: Duration, code: u32) {
        let Some(active) = self.npu.active.remove(&code) else { return };
        self.npu.ended = Some(now);
        if let Some((_, last)) = self.npu.quiet.get_mut(&code) {
            *last = now;
        }
        let Some(reason) = active.reason else { return };
        let (key, probation) = ((reason, Origin::Code(code)), self.settings.probation);
        let Some(condition) = self.conditions.get_mut(&key) else { return };
        match condition.clears {
            Clears::Reading if reason == Reason::NetworkDown && condition.words.admission > Admission::Schedulable => {
                condition.phase = Phase::Held(now.saturating_add(NETWORK_HOLD));
            }
            Clears::Reading => self.end(reason, Origin::Code(code)),
            Clears::ReadingHeld => condition.phase = Phase::Held(now.saturating_add(probation)),
            Clears::ReadingAfterReset | Clears::Probe | Clears::Release => {}
        }
    }

    /// Counts an occurrence; too many within the window separate the device.
    fn count(&mut self, now: Duration, code: u32, rule: Option<Escalation>) {
        let Some(Escalation { times, within, release }) = rule else { return };
        let (first, count) = self.npu.counts.entry(code).or_insert((now, 0));
        if now.saturating_sub(*first) > within {
            (*first, *count) = (now, 0);
        }
        *count = count.saturating_add(1);
        if *count < times {
            return;
        }
        let evidence = format!("{}, {count} times within {} s", describe(code, alarms::listed(code)), within.as_secs());
        let row = Row { reason: Reason::RepeatedFault, words: catalog::SERVICE, clears: Clears::Release };
        self.begin(now, row, Origin::Code(code), &evidence);
        if let Some(release) = release {
            self.npu.quiet.insert(code, (release, now));
        }
    }
}

/// What a report says of a code.
fn describe(code: u32, listed: Option<&Listed>) -> String {
    match listed {
        Some(row) if !row.what.is_empty() => format!("0x{code:08X} ({})", row.what),
        Some(_) => format!("0x{code:08X}"),
        None => format!("0x{code:08X} (in no list)"),
    }
}
