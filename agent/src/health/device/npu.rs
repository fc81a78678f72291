//! Alarms and readings of one Ascend device. The driver's list of codes decides what holds; events only
//! say where to look, how serious an unlisted code is, and what the list cannot tell any more.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use berth_types::{Action, Admission, Health, Reason, Scope};
use serde::{Deserialize, Serialize};

use super::{Device, Effect, Phase, silence::NETWORK_HOLD};
use crate::health::{
    alarms::{self, Escalation, Level, Listed},
    catalog::{self, Row},
    condition::{Clears, Origin, Words},
    fact::{Alarm, Assertion, NpuReading, Read},
};

/// A hint that the list does not bear out waits so long for it. With [`LAST_WORD`] well below the 250 ms in
/// which a report must leave.
const PATIENCE: Duration = Duration::from_millis(150);
/// A hint is believed when no reading came until then.
const LAST_WORD: Duration = Duration::from_millis(220);
/// A port that is down for so long takes the device out.
const DOWN_LIMIT: Duration = Duration::from_secs(20);
/// A program that was asked to start again has so long.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// Codes that hold on a device, beyond which one that nobody listed says nothing new: what a driver lists at most.
const INVENTED: usize = 128;
/// Health without a code must last so long: list and health are read one after the other.
const UNCODED: Duration = Duration::from_secs(10);
/// Stands for the code that is missing; no driver uses it.
const NO_CODE: u32 = 0;
/// Two events of one code and serial number within this are one.
const SERIALS: usize = 64;
/// Codes whose severity is remembered; a driver that invents them must not fill the memory.
const CODES: usize = 512;

/// Codes that hold, and what is remembered of them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Npu {
    pub(super) last: Option<NpuReading>,
    pub(super) active: BTreeMap<u32, Active>,
    pub(super) silence: super::silence::Silence,
    severities: BTreeMap<u32, u8>,
    hints: Vec<Hint>,
    over: Vec<u32>,
    serials: VecDeque<(u32, i32)>,
    counts: BTreeMap<u32, (Duration, u32)>,
    /// Codes that separated the device until they are quiet for so long, and when they last were not.
    quiet: BTreeMap<u32, (Duration, Duration)>,
    /// The port's bad health belongs to a fault of a switch.
    pub(super) network_joined: bool,
    /// Since when health is severe without a code.
    uncoded: Option<Duration>,
    /// When a code last left the list.
    pub(super) ended: Option<Duration>,
}

impl Npu {
    /// The node booted: serial numbers, hints and announcements of the boot before mean nothing.
    pub(super) fn reboot(&mut self) {
        self.serials.clear();
        self.hints.clear();
        self.over.clear();
        self.silence = super::silence::Silence::default();
        self.last = None;
    }

    /// How often `code` came counts no more.
    pub(super) fn forget(&mut self, code: u32) {
        self.counts.remove(&code);
        self.quiet.remove(&code);
    }
}

/// A code that holds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Active {
    pub(super) since: Duration,
    /// Its condition, when it makes one.
    pub(super) reason: Option<Reason>,
    level: Level,
    /// Nobody listed it, and an event may still tell how serious it is until then.
    undecided: Option<Duration>,
    /// It belongs to a fault of a switch: that one has the timer.
    joined: bool,
}

/// What an event said and no reading has borne out yet.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Hint {
    code: u32,
    at: Duration,
    asked: bool,
}

impl Device {
    /// An alarm of the driver.
    pub(super) fn alarm(&mut self, now: Duration, alarm: Alarm, effects: &mut Vec<Effect>) {
        let Alarm { code, assertion, severity, serial } = alarm;
        effects.push(Effect::Reread);
        if self.npu.severities.len() >= CODES {
            let active = &self.npu.active;
            self.npu.severities.retain(|code, _| active.contains_key(code));
        }
        self.npu.severities.insert(code, severity);
        if code == alarms::STARTED {
            return self.npu.silence.chip_started();
        }
        let again = assertion != Assertion::Recovered && self.npu.serials.contains(&(code, serial));
        if again && serial != 0 {
            return;
        }
        self.npu.serials.push_back((code, serial));
        if self.npu.serials.len() > SERIALS {
            self.npu.serials.pop_front();
        }
        match assertion {
            Assertion::Occurred if self.announced(now, code) => {}
            Assertion::Occurred => {
                self.npu.over.retain(|known| *known != code);
                if !self.npu.active.contains_key(&code) && !self.npu.hints.iter().any(|hint| hint.code == code) {
                    self.npu.hints.push(Hint { code, at: now, asked: false });
                }
                self.decide_undecided(now, effects);
            }
            Assertion::Recovered => {
                self.npu.hints.retain(|hint| hint.code != code);
                if !self.npu.over.contains(&code) {
                    self.npu.over.push(code);
                }
            }
            Assertion::Once => self.one_off(now, code, severity, effects),
        }
    }

    /// A card that drops during its own reset does what it was told.
    fn announced(&self, now: Duration, code: u32) -> bool {
        code == alarms::CARD_DROP && self.npu.silence.expected(now)
    }

    /// Happened and over: counted, and said when it is more than a counter. It is never active.
    fn one_off(&mut self, now: Duration, code: u32, severity: u8, effects: &mut Vec<Effect>) {
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

    /// Values of the device.
    pub(super) fn npu_reading(&mut self, now: Duration, reading: &NpuReading, effects: &mut Vec<Effect>) {
        self.npu.last = Some(reading.clone());
        self.listen(now, reading);
        match &reading.codes {
            Read::Value(codes) => self.list(now, reading.begun, codes, effects),
            // No list says otherwise: the events are all there is.
            Read::Absent | Read::Failed(_) | Read::Missed => self.believe(now, reading, effects),
        }
        self.uncoded(now, reading);
        self.read_network(now, reading);
        self.read_pages(reading, now);
        self.come_back(now);
    }

    /// Health that is major or critical, and no code that says why: as a code that nobody listed, once it has lasted.
    fn uncoded(&mut self, now: Duration, reading: &NpuReading) {
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
    fn list(&mut self, now: Duration, begun: Duration, codes: &[u32], effects: &mut Vec<Effect>) {
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
    fn believe(&mut self, now: Duration, reading: &NpuReading, effects: &mut Vec<Effect>) {
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

    fn begin_code(&mut self, now: Duration, code: u32, effects: &mut Vec<Effect>) {
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
    fn decide_undecided(&mut self, now: Duration, effects: &mut Vec<Effect>) {
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

    /// Lets time pass for what holds.
    pub(super) fn npu_tick(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        self.decide_undecided(now, effects);
        for hint in &mut self.npu.hints {
            if !hint.asked && now >= hint.at.saturating_add(PATIENCE) {
                hint.asked = true;
                effects.push(Effect::Reread);
            }
        }
        let overdue = |hint: &Hint| now >= hint.at.saturating_add(LAST_WORD);
        let believed: Vec<u32> = self.npu.hints.iter().filter(|hint| overdue(hint)).map(|hint| hint.code).collect();
        self.npu.hints.retain(|hint| !overdue(hint));
        for code in believed {
            self.begin_code(now, code, effects);
        }
        self.listen_again(now, effects);
        self.lasting(now);
        self.release_quiet(now);
    }

    /// What lasts too long becomes worse.
    fn lasting(&mut self, now: Duration) {
        let down = Words::new(Health::Degraded, Admission::Draining, Action::None, Scope::Device);
        let asked = Words::new(Health::Unhealthy, Admission::Draining, Action::ResetDevice, Scope::Device);
        let codes = self.npu.active.iter().filter_map(|(code, active)| {
            let worse = match active.reason? {
                Reason::NetworkDown if active.level <= Level::SubHealth && !active.joined => (DOWN_LIMIT, down),
                _ if active.level == Level::RestartRequest => (REQUEST_LIMIT, asked),
                _ => return None,
            };
            Some((active.reason?, Origin::Code(*code), active.since, worse))
        });
        let network = self.conditions.get(&(Reason::NetworkDown, Origin::Vendor));
        let network = network.filter(|network| network.phase == Phase::Active && !self.npu.network_joined);
        let network = network.map(|network| network.since);
        let network = network.map(|since| (Reason::NetworkDown, Origin::Vendor, since, (DOWN_LIMIT, down)));
        for (reason, origin, since, (limit, words)) in codes.chain(network).collect::<Vec<_>>() {
            if now.saturating_sub(since) >= limit
                && let Some(condition) = self.conditions.get_mut(&(reason, origin))
            {
                condition.words = condition.words.worsened(words);
            }
        }
    }

    /// A port that kept flapping and is quiet for long enough is tried again.
    fn release_quiet(&mut self, now: Duration) {
        let due: Vec<u32> = self
            .npu
            .quiet
            .iter()
            .filter(|(code, (release, last))| {
                !self.npu.active.contains_key(code) && now.saturating_sub(*last) >= *release
            })
            .map(|(code, _)| *code)
            .collect();
        for code in due {
            self.npu.quiet.remove(&code);
            self.npu.counts.remove(&code);
            let until = now.saturating_add(self.probation(now, Reason::RepeatedFault));
            if let Some(condition) = self.conditions.get_mut(&(Reason::RepeatedFault, Origin::Code(code))) {
                condition.phase = Phase::Probation(until);
            }
        }
    }

    /// When [`Self::npu_tick`] has something to do.
    pub(super) fn npu_deadline(&self) -> Option<Duration> {
        let hints =
            self.npu.hints.iter().map(|hint| hint.at.saturating_add(if hint.asked { LAST_WORD } else { PATIENCE }));
        let undecided = self.npu.active.values().filter_map(|active| active.undecided);
        let quiet = self.npu.quiet.iter().filter(|(code, _)| !self.npu.active.contains_key(code));
        let quiet = quiet.map(|(_, (release, last))| last.saturating_add(*release));
        let first = hints.chain(undecided).chain(quiet).chain(self.npu.silence.deadline()).min();
        first.into_iter().chain(self.lasting_deadline()).min()
    }

    fn lasting_deadline(&self) -> Option<Duration> {
        let network = self.conditions.get(&(Reason::NetworkDown, Origin::Vendor));
        let network = network.filter(|network| {
            let waits = network.words.admission == Admission::Schedulable && !self.npu.network_joined;
            network.phase == Phase::Active && waits
        });
        let codes = self.npu.active.iter().filter_map(|(code, active)| {
            let condition = self.conditions.get(&(active.reason?, Origin::Code(*code)))?;
            let waits = condition.words.admission == Admission::Schedulable && !active.joined;
            match active.reason? {
                Reason::NetworkDown if waits && active.level <= Level::SubHealth => Some(active.since + DOWN_LIMIT),
                _ if waits && active.level == Level::RestartRequest => Some(active.since + REQUEST_LIMIT),
                _ => None,
            }
        });
        codes.chain(network.map(|network| network.since + DOWN_LIMIT)).min()
    }

    /// Whether the device resets together with others.
    pub(super) fn grouped(&self) -> bool {
        self.info.as_ref().is_some_and(|info| info.reset_group.is_some())
    }

    /// The link fault that holds here, and when it began.
    pub(crate) fn link_down(&self) -> Option<Duration> {
        self.npu.active.get(&alarms::LINK_DOWN).map(|active| active.since)
    }

    /// A fault elsewhere on the node makes this one's link fault say more.
    pub(crate) fn pair(&mut self, level: Level) {
        if let Some(condition) = self.conditions.get_mut(&(Reason::NetworkDown, Origin::Code(alarms::LINK_DOWN))) {
            condition.words = condition.words.worsened(level.words(false));
        }
    }

    /// A fault of a switch began at `at`: link faults of that time are part of it.
    pub(crate) fn join_switch(&mut self, at: Duration, within: Duration) {
        for active in self.npu.active.values_mut() {
            let link = matches!(active.reason, Some(Reason::NetworkDown | Reason::FabricLinkDown));
            active.joined |= link && active.since.abs_diff(at) <= within;
        }
        let network = self.conditions.get(&(Reason::NetworkDown, Origin::Vendor));
        self.npu.network_joined =
            network.is_some_and(|network| self.npu.network_joined || network.since.abs_diff(at) <= within);
    }

    /// Whether an event of `code` is not borne out yet.
    pub(super) fn hinted(&self, code: u32) -> bool {
        self.npu.hints.iter().any(|hint| hint.code == code)
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
