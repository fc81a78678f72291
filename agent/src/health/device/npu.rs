//! Alarms and readings of one Ascend device. The driver's list of codes decides what holds (`codes`); events only
//! say where to look, how serious an unlisted code is, and what the list cannot tell any more.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use berth_types::{Action, Admission, Health, Reason, Scope};
use serde::{Deserialize, Serialize};

use super::{Device, Effect, Phase, counters::Counter};
use crate::health::{
    alarms::{self, Level},
    condition::{Origin, Words},
    fact::{Alarm, Assertion, NpuReading, Read},
};

/// A hint that the list does not bear out waits so long for it. With [`LAST_WORD`] well below the 250 ms in
/// which a report must leave.
pub(super) const PATIENCE: Duration = Duration::from_millis(150);
/// A hint is believed when no reading came until then.
const LAST_WORD: Duration = Duration::from_millis(220);
/// A port that is down for so long takes the device out.
const DOWN_LIMIT: Duration = Duration::from_secs(20);
/// A program that was asked to start again has so long.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);
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
    pub(super) severities: BTreeMap<u32, u8>,
    pub(super) hints: Vec<Hint>,
    pub(super) over: Vec<u32>,
    serials: VecDeque<(u32, i32)>,
    pub(super) counts: BTreeMap<u32, (Duration, u32)>,
    /// Codes that separated the device until they are quiet for so long, and when they last were not.
    pub(super) quiet: BTreeMap<u32, (Duration, Duration)>,
    /// The port's bad health belongs to a fault of a switch.
    pub(super) network_joined: bool,
    /// Since when health is severe without a code.
    pub(super) uncoded: Option<Duration>,
    /// When a code last left the list.
    pub(super) ended: Option<Duration>,
    /// Errors of the link to the host, and of the scale-up links.
    #[serde(default)]
    pub(super) host_errors: Counter,
    #[serde(default)]
    pub(super) fabric_errors: Counter,
}

impl Npu {
    /// The node booted: serial numbers, hints and announcements of the boot before mean nothing.
    pub(super) fn reboot(&mut self) {
        self.serials.clear();
        self.hints.clear();
        self.over.clear();
        self.silence = super::silence::Silence::default();
        self.last = None;
        self.host_errors.clear();
        self.fabric_errors.clear();
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
    pub(super) level: Level,
    /// Nobody listed it, and an event may still tell how serious it is until then.
    pub(super) undecided: Option<Duration>,
    /// It belongs to a fault of a switch: that one has the timer.
    pub(super) joined: bool,
}

/// What an event said and no reading has borne out yet.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Hint {
    pub(super) code: u32,
    pub(super) at: Duration,
    pub(super) asked: bool,
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
    pub(super) fn announced(&self, now: Duration, code: u32) -> bool {
        code == alarms::CARD_DROP && self.npu.silence.expected(now)
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
        self.read_links_errors(reading, now);
        self.come_back(now);
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
