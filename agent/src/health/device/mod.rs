//! One device: its conditions and what it remembers. Pure: each fact comes with its time, effects are
//! handed back.

mod codes;
mod counters;
mod due;
mod ladder;
mod memory;
mod npu;
mod programs;
mod readings;
mod resets;
mod silence;
mod xids;

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use berth_types::{Action, Admission, DeviceState, Health, Reason, Scope, Vendor};
use serde::{Deserialize, Serialize};

use super::{
    catalog::{self, Row},
    condition::{Clears, Condition, DAY, Origin, PROBATION, Phase, WINDOW, Words, compose},
    fact::{DeviceInfo, Reading, ResetStep, What},
};
use ladder::CAUSES;

/// What must be done because of a fact.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Say this without changing the state.
    Note {
        /// Its reason.
        reason: Reason,
        /// Its action.
        action: Action,
        /// Its scope.
        scope: Scope,
        /// Code, pid, text.
        evidence: String,
    },
    /// Say this, unless another fault of the fabric explains it.
    FabricNote {
        /// Code and text.
        evidence: String,
        /// A program lost by it, and starts again.
        program: bool,
    },
    /// Read the deciding values now.
    Reread,
    /// Programs keep failing here; only the node can tell whether it is the device.
    Suspect,
    /// This code happened here and is over; a link fault of the node may mean more by it.
    Trigger(u32),
}

/// A device that cannot be read for so long takes no new replicas.
const BLIND_LIMIT: Duration = Duration::from_secs(30);

/// One device's conditions and memory.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Device {
    /// What it is; `None` while only the kernel spoke of it.
    pub info: Option<DeviceInfo>,
    #[serde(with = "super::pairs")]
    conditions: BTreeMap<(Reason, Origin), Condition>,
    /// The recovery action that holds, and when the kernel log last named one.
    recovery: Option<u32>,
    recovery_line: Option<Duration>,
    last: Option<Reading>,
    resetting: Option<Duration>,
    reset_done: Option<Duration>,
    validated: Option<Duration>,
    /// When a validation last failed, and when the device last could not be reached.
    invalid: Option<Duration>,
    unreachable: Option<Duration>,
    /// When links were last seen to be down.
    #[serde(default)]
    links_seen_down: Option<Duration>,
    waiting: Vec<xids::Waiting>,
    traces: Vec<xids::Trace>,
    seen: VecDeque<xids::Seen>,
    /// Processes that failed here, with when.
    failures: VecDeque<(Duration, u32)>,
    begun: BTreeMap<Reason, Vec<Duration>>,
    returned: BTreeMap<Reason, Duration>,
    /// Timeouts of the firmware's processor in the incident that is open.
    #[serde(default)]
    gsp_timeouts: u32,
    /// Volatile uncorrected errors as they were last read.
    #[serde(default)]
    uncorrected: Option<u64>,
    corrected: counters::Counter,
    replays: counters::Counter,
    #[serde(default)]
    host_link: readings::HostLinkWatch,
    clique: Option<FirstClique>,
    npu: npu::Npu,
    /// Lines of the last instant, for one that is delivered twice.
    #[serde(skip)]
    lines: VecDeque<xids::Line>,
    /// Another device of the node has a link down by its own fault.
    #[serde(skip)]
    pub(crate) other_end_blamed: bool,
    /// Somebody spoke of it since this process began.
    #[serde(skip)]
    met: bool,
    /// Its values were read since this process began.
    #[serde(skip)]
    read: bool,
    /// Facts come from the time before the agent started.
    #[serde(skip)]
    replaying: bool,
    #[serde(skip)]
    settings: Settings,
}

/// The fabric's clique as it was first read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FirstClique {
    clique: Option<u32>,
}

/// What the cluster's owner may choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How long a device is watched after it came back, the first time.
    pub probation: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { probation: PROBATION }
    }
}

impl Device {
    /// A device of which nothing is known yet; while `replaying`, facts are history.
    #[must_use]
    pub fn new(replaying: bool, settings: Settings) -> Self {
        Self { replaying, settings, ..Self::default() }
    }

    /// Takes one fact.
    pub fn take(&mut self, now: Duration, what: &What, effects: &mut Vec<Effect>) {
        self.read |= matches!(what, What::Reading(_) | What::Npu(_));
        self.met |= !matches!(what, What::NoLibrary { .. } | What::Library(_));
        match what {
            What::Listed(info) => self.listed(info),
            // Who only the kernel lists keeps what a library once said of it.
            What::Unspoken(info) => {
                self.info.get_or_insert_with(|| info.clone());
            }
            What::Xid(xid) => self.xid(now, xid, effects),
            What::Recovery(value) => self.recovery_line(now, *value, effects),
            What::BusLoss(line) => self.lost(now, line),
            What::Event(bits) => self.event(now, *bits, effects),
            What::Reading(reading) => self.reading(now, reading, effects),
            What::Alarm(alarm) => self.alarm(now, *alarm, effects),
            What::Npu(reading) => self.npu_reading(now, reading, effects),
            What::Reset(step) => self.reset(now, *step, effects),
            What::Validated(ok) => self.validate(now, *ok, effects),
            What::WorkerDied(how) => effects.push(Effect::Note {
                reason: Reason::ProcessFault,
                action: Action::RestartWorkload,
                scope: Scope::Process,
                evidence: how.clone(),
            }),
            What::Unsound(why) => {
                let row = Row { reason: Reason::EngineFault, words: catalog::RESET, clears: Clears::Probe };
                self.begin(now, row, Origin::Vendor, &format!("validation of the idle device failed: {why}"));
            }
            What::Released(since) => self.release(now, *since),
            What::WorkerStuck(stuck) => self.worker_stuck(now, stuck.as_deref()),
            What::NoLibrary { why, .. } => {
                let words = Words::new(Health::Unknown, Admission::Barred, Action::None, Scope::Node);
                self.begin(
                    now,
                    Row { reason: Reason::AgentBlind, words, clears: Clears::Reading },
                    Origin::Vendor,
                    why,
                );
            }
            What::Library(_) => self.end(Reason::AgentBlind, Origin::Vendor),
            What::Switch { .. }
            | What::Count { .. }
            | What::Fabric { .. }
            | What::Fabrics { .. }
            | What::Driver(_)
            | What::Inventory { .. }
            | What::Killed(_)
            | What::DriverLoaded(_)
            | What::SlotDown(_)
            | What::LogBlind(_) => {}
        }
    }

    /// Lets time pass: what waited for it happens.
    pub fn tick(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        self.decide_waiting(now, effects);
        self.npu_tick(now, effects);
        let returned = &mut self.returned;
        self.conditions.retain(|(reason, _), condition| match condition.phase {
            Phase::Held(until) if until <= now => {
                // What wanted something done and went by itself has come back all the same.
                if condition.words.action != Action::None {
                    returned.insert(*reason, until);
                }
                false
            }
            Phase::Probation(until) => until > now,
            Phase::Held(_) | Phase::Active => true,
        });
        if let Some(blind) = self.conditions.get_mut(&(Reason::AgentBlind, Origin::Vendor))
            && now.saturating_sub(blind.since) >= BLIND_LIMIT
        {
            blind.words.admission = blind.words.admission.max(Admission::Draining);
        }
    }

    /// When [`Self::tick`] has something to do.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let conditions = self.conditions.iter().filter_map(|((reason, origin), condition)| match condition.phase {
            Phase::Held(until) | Phase::Probation(until) => Some(until),
            Phase::Active if *reason == Reason::AgentBlind && *origin == Origin::Vendor => {
                let draining = condition.words.admission >= Admission::Draining;
                (!draining).then(|| condition.since.saturating_add(BLIND_LIMIT))
            }
            Phase::Active => None,
        });
        let waiting = self.waiting.iter().map(xids::Waiting::until);
        conditions.chain(waiting).chain(self.npu_deadline()).min()
    }

    /// The five words and the evidence of the worst condition.
    #[must_use]
    pub fn state(&self) -> (DeviceState, String) {
        compose(self.conditions.iter().map(|((reason, _), condition)| (*reason, condition)))
    }

    /// Whether a fault of the scale-up fabric is open here.
    #[must_use]
    pub fn fabric_fault(&self, now: Duration) -> bool {
        let open = |reason| self.conditions.iter().any(|((of, _), condition)| *of == reason && condition.explains(now));
        open(Reason::FabricLinkDown) || open(Reason::FabricDegraded)
    }

    /// Whether a link is down by this device's own fault.
    #[must_use]
    pub fn link_fault(&self) -> bool {
        let key = (Reason::FabricLinkDown, Origin::Vendor);
        let own = |open: &Condition| open.clears == Clears::Probe && !matches!(open.phase, Phase::Probation(_));
        self.conditions.get(&key).is_some_and(own)
    }

    /// Whether a program failed here within a day.
    #[must_use]
    pub fn programs_fail(&self, now: Duration) -> bool {
        self.failures.iter().any(|(at, _)| now.saturating_sub(*at) <= DAY)
    }

    /// Programs fail here and nowhere else on the node: the device is suspected, nothing is taken from it.
    pub fn suspect(&mut self, now: Duration) {
        let words = Words::new(Health::Degraded, Admission::Draining, Action::None, Scope::Device);
        let row = Row { reason: Reason::RepeatedFault, words, clears: Clears::Release };
        self.begin(now, row, Origin::Vendor, "faults of 4 different processes within 24 h, on this device only");
    }

    /// The log before the agent's start is read and the device was asked: what it says now counts.
    pub fn settle(&mut self) {
        self.replaying = false;
        let Some(last) = self.last.clone().filter(|_| self.read) else { return };
        self.conditions.retain(|(reason, _), condition| !condition.old || still_true(*reason, &last));
    }

    fn is_npu(&self) -> bool {
        self.info.as_ref().is_some_and(|info| info.vendor == Vendor::Ascend)
    }

    fn worker_stuck(&mut self, now: Duration, stuck: Option<&str>) {
        let words = Words::new(Health::Unknown, Admission::Barred, Action::None, Scope::Device);
        match stuck {
            Some(how) => {
                self.begin(
                    now,
                    Row { reason: Reason::AgentBlind, words, clears: Clears::Reading },
                    Origin::Worker,
                    how,
                );
            }
            None => self.end(Reason::AgentBlind, Origin::Worker),
        }
    }

    fn lost(&mut self, now: Duration, evidence: &str) {
        if self.in_reset(now) {
            return;
        }
        if self.is_npu() {
            return self.lost_npu(now, evidence);
        }
        let row = Row { reason: Reason::DeviceLost, words: catalog::REBOOT, clears: Clears::Probe };
        self.begin(now, row, Origin::Vendor, evidence);
        self.await_loss(now);
    }

    /// Opens a condition, or adds a fact to the one that is open.
    fn begin(&mut self, now: Duration, row: Row, origin: Origin, evidence: &str) {
        let Row { reason, words, clears } = row;
        let key = (reason, origin);
        // What is remembered from before a restart is never replaced by a line of the past.
        let (replaying, probation) = (self.replaying, |open: &Condition| matches!(open.phase, Phase::Probation(_)));
        let open = self.conditions.get_mut(&key).filter(|open| !probation(open) || (replaying && !open.old));
        if let Some(open) = open {
            // The reading was good again, and the window of the incident is over: this is another.
            let anew = matches!(open.phase, Phase::Held(_)) && now.saturating_sub(open.last) > WINDOW;
            let anew = anew && open.words.action != Action::None;
            open.words = open.words.worsened(words);
            open.own = open.own.map(|(own, clears)| (own.worsened(words), clears));
            (open.last, open.phase) = (now, Phase::Active);
            if clears == Clears::Probe {
                open.clears = Clears::Probe;
            }
            if anew && self.too_often(now, reason) {
                self.give_up(now, &format!("{reason} came back"));
            }
        } else {
            let words = self.climbed(now, reason, words);
            let fresh = Condition::begun(now, words, clears, evidence);
            self.conditions.insert(key, Condition { old: self.replaying, ..fresh });
        }
        if CAUSES.contains(&reason) && origin == Origin::Vendor {
            self.absorb();
        }
    }

    fn end(&mut self, reason: Reason, origin: Origin) {
        self.conditions.remove(&(reason, origin));
    }
}

/// Whether a fault from the log of the past still holds by what the device says now.
fn still_true(reason: Reason, now: &Reading) -> bool {
    let rows = now.rows.value();
    match reason {
        Reason::DeviceLost => now.lost,
        Reason::MemoryRemapPending => rows.is_some_and(|rows| rows.pending),
        Reason::MemoryRemapFailed => rows.is_none_or(|rows| rows.failed),
        _ => now.lost || now.recovery.value() != Some(0),
    }
}
