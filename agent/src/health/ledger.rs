//! The ledger of one node: facts in, transitions and notes out. Pure: every fact comes with its time.
//!
//! It alone says how a device is. It never waits, reads nothing, and does not know who reports.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use berth_types::{Action, Admission, DeviceState, Health, Reason, Scope, Vendor};
use serde::{Deserialize, Serialize};

use super::{
    alarms::Level,
    catalog::{self, Row, Treat},
    condition::{Clears, Condition, Origin, WINDOW, Words, compose},
    device::{Device, Effect, Settings},
    fact::{DeviceInfo, Fact, Local, Subject, What},
    switch::{Note, Switches},
};

/// Reports per subject within [`STORM_SPAN`]; the last state is said all the same, a little later.
const STORM: usize = 2;
/// See [`STORM`].
const STORM_SPAN: Duration = Duration::from_secs(1);

/// Whose word it is that Ascend's driver is not well: its own.
const JUDGED: Origin = Origin::Code(0);

/// One thing that the agent says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// When.
    pub at: Duration,
    /// About what.
    pub of: Subject,
    /// It changes no state.
    pub note: bool,
    /// The five words: of the subject, or of the note.
    pub state: DeviceState,
    /// Codes, pids, links as printed.
    pub evidence: String,
}

/// What follows from a fact.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// To be said, in order.
    pub reports: Vec<Report>,
    /// Devices whose deciding values must be read now.
    pub reread: Vec<Local>,
    /// Notes that a storm swallowed.
    pub swallowed: u32,
}

/// What is said of one subject, and when it last was.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Said {
    state: DeviceState,
    evidence: String,
    since: Duration,
    #[serde(skip)]
    recent: VecDeque<Duration>,
    /// It changed, and may not be said yet.
    #[serde(skip)]
    behind: bool,
}

/// Of whom a fact can change the state, the node aside.
enum Reach<'a> {
    /// Of one device.
    One(&'a Local),
    /// Of any.
    All,
}

impl<'a> Reach<'a> {
    /// Lines and readings of a device are its own; what else is said may concern its neighbours.
    fn of(fact: &'a Fact) -> Self {
        match (&fact.of, &fact.what) {
            (Subject::Device(local), What::Xid(_) | What::Recovery(_) | What::Event(_) | What::Reading(_)) => {
                Self::One(local)
            }
            _ => Self::All,
        }
    }
}

/// The state of one subject as it is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The five words.
    pub state: DeviceState,
    /// Evidence of the worst condition.
    pub evidence: String,
    /// Since when the words hold.
    pub since: Duration,
}

/// The ledger.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Ledger {
    pub(super) devices: BTreeMap<Local, Device>,
    #[serde(with = "super::pairs")]
    pub(super) node: BTreeMap<(Reason, Origin), Condition>,
    #[serde(with = "super::pairs")]
    said: BTreeMap<Subject, Said>,
    pub(super) switch_fault: Option<Duration>,
    /// When the kernel last ended a program for want of memory.
    #[serde(skip)]
    killed: Option<Duration>,
    /// Switches of Ascend's scale-up fabric.
    pub(super) switches: Switches,
    /// What happened once on the node and makes link faults worse.
    pub(super) triggers: Vec<(Duration, Level)>,
    pub(super) strangers: BTreeMap<Local, Duration>,
    #[serde(skip)]
    started: bool,
    /// It goes on from a memory that another boot of the node wrote.
    #[serde(skip)]
    pub(super) rebooted: bool,
    #[serde(skip)]
    pub(super) settings: Settings,
}

impl Ledger {
    /// A ledger that takes facts as history until [`Self::start`].
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings, ..Self::default() }
    }

    /// Takes one fact at `now`.
    pub fn take(&mut self, now: Duration, fact: &Fact) -> Outcome {
        let mut outcome = Outcome::default();
        match &fact.of {
            Subject::Node => self.take_node(now, &fact.what, &mut outcome),
            Subject::Device(local) => self.take_device(now, local, &fact.what, &mut outcome),
        }
        self.say(now, Reach::of(fact), &mut outcome);
        outcome
    }

    /// Lets time pass.
    pub fn tick(&mut self, now: Duration) -> Outcome {
        let mut outcome = Outcome::default();
        for local in self.devices.keys().cloned().collect::<Vec<_>>() {
            let mut effects = Vec::new();
            if let Some(device) = self.devices.get_mut(&local) {
                device.tick(now, &mut effects);
            }
            self.follow(now, &local, effects, &mut outcome);
        }
        self.relate(now);
        self.say(now, Reach::All, &mut outcome);
        outcome
    }

    /// When [`Self::tick`] has something to do.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let behind = self.said.values().filter(|said| said.behind);
        let silent = behind.filter_map(|said| said.recent.front().map(|at| at.saturating_add(STORM_SPAN)));
        let deadline = self.devices.values().filter_map(Device::deadline).chain(silent).min();
        deadline.filter(|_| self.started)
    }

    /// The past is read and every device was asked: from now on what changes is said. Answers what is so.
    pub fn start(&mut self, now: Duration) -> Vec<Report> {
        self.started = true;
        let rebooted = std::mem::take(&mut self.rebooted);
        self.devices.retain(|_, device| {
            device.settle();
            if rebooted && !device.outlives_boot() {
                return false;
            }
            device.unmet(now);
            // Addresses from old lines that no library and no kernel list any more.
            device.info.is_some() || device.state().0 != DeviceState::HEALTHY
        });
        let subjects = std::iter::once(Subject::Node).chain(self.devices.keys().cloned().map(Subject::Device));
        let reports: Vec<Report> = subjects
            .map(|of| {
                let (state, evidence) = self.state_of(&of);
                Report { at: now, of, note: false, state, evidence }
            })
            .collect();
        let before = std::mem::take(&mut self.said);
        for Report { of, state, evidence, .. } in &reports {
            // What was so before a restart is so since then.
            let since = before.get(of).filter(|said| said.state == *state).map_or(now, |said| said.since);
            let (state, evidence) = (*state, evidence.clone());
            let said = Said { state, evidence, since, recent: VecDeque::new(), behind: false };
            self.said.insert(of.clone(), said);
        }
        reports
    }

    /// How a subject stands, as it was last said.
    #[must_use]
    pub fn standing(&self, of: &Subject) -> Standing {
        self.said
            .get(of)
            .map_or(Standing { state: DeviceState::HEALTHY, evidence: String::new(), since: Duration::ZERO }, |said| {
                Standing { state: said.state, evidence: said.evidence.clone(), since: said.since }
            })
    }

    /// Devices that only a validation keeps from coming back.
    pub fn awaiting_validation(&self) -> impl Iterator<Item = &Local> {
        let due = self.devices.iter().filter(|(_, device)| self.started && device.awaits_validation());
        due.map(|(local, _)| local)
    }

    /// Every device, with what is known of it.
    pub fn devices(&self) -> impl Iterator<Item = (&Local, Option<&DeviceInfo>)> {
        self.devices.iter().map(|(local, device)| (local, device.info.as_ref()))
    }

    /// What is known of a device.
    #[must_use]
    pub fn info(&self, local: &str) -> Option<&DeviceInfo> {
        self.devices.get(local)?.info.as_ref()
    }

    fn take_device(&mut self, now: Duration, local: &Local, what: &What, outcome: &mut Outcome) {
        let ours = self.devices.contains_key(local);
        let introduces = matches!(what, What::Listed(_) | What::Unspoken(_) | What::BusLoss(_));
        if !ours && !introduces && self.started {
            return self.stranger(now, local, what, outcome);
        }
        if let What::Xid(xid) = what
            && let Treat::Node(row) = catalog::treat(xid.number)
        {
            return self.node_condition(now, row, Origin::Vendor, &format!("{}, {local}", xid.evidence()));
        }
        let fresh = !self.started;
        if !ours && !fresh {
            // Whatever it is, it was not said before.
            self.said.entry(Subject::Device(local.clone())).or_default();
        }
        let blamed = matches!(what, What::Reading(_))
            && self.devices.iter().any(|(other, device)| other != local && device.link_fault());
        let device = self.devices.entry(local.clone()).or_insert_with(|| Device::new(fresh, self.settings));
        device.other_end_blamed = blamed;
        let mut effects = Vec::new();
        device.take(now, what, &mut effects);
        self.follow(now, local, effects, outcome);
        if let What::Reset(step) = what {
            self.reset_group(now, local, *step, outcome);
        }
        match what {
            What::Npu(_) => self.judge_driver(now, Vendor::Ascend),
            What::Reading(_) => self.judge_driver(now, Vendor::Nvidia),
            _ => {}
        }
        if matches!(what, What::Npu(_) | What::Alarm(_) | What::Reset(_) | What::Validated(_)) {
            self.relate(now);
        }
    }

    /// A fault at an address that is no device of ours: the node says so once a minute.
    fn stranger(&mut self, now: Duration, local: &Local, what: &What, outcome: &mut Outcome) {
        let evidence = match what {
            What::Xid(xid) => format!("{}, {local}: no device of this node", xid.evidence()),
            What::Recovery(value) => format!("Xid 154, recovery action {value:?}, {local}: no device of this node"),
            _ => return,
        };
        self.strangers.retain(|_, at| now.saturating_sub(*at) <= WINDOW);
        if self.strangers.insert(local.clone(), now).is_none() {
            self.note(now, &Subject::Node, Reason::UnknownFault, Action::None, Scope::Node, evidence, outcome);
        }
    }

    fn take_node(&mut self, now: Duration, what: &What, outcome: &mut Outcome) {
        let words = |health, admission| Words::new(health, admission, Action::None, Scope::Node);
        match what {
            What::NoLibrary { vendor, why } => {
                let words = words(Health::Unknown, Admission::Barred);
                let row = Row { reason: Reason::AgentBlind, words, clears: Clears::Reading };
                self.node_condition(now, row, Origin::Library(*vendor), why);
                self.tell_vendor(now, *vendor, what, outcome);
            }
            What::Library(vendor) => {
                self.node.remove(&(Reason::AgentBlind, Origin::Library(*vendor)));
                self.tell_vendor(now, *vendor, what, outcome);
            }
            What::Inventory { vendor, locals } => self.take_inventory(now, *vendor, locals, outcome),
            What::LogBlind(Some(why)) => {
                // Readings and events go on, and are late where a line would not be.
                let words = words(Health::Degraded, Admission::Schedulable);
                let row = Row { reason: Reason::AgentBlind, words, clears: Clears::Reading };
                self.node_condition(now, row, Origin::Log, why);
            }
            What::LogBlind(None) => {
                self.node.remove(&(Reason::AgentBlind, Origin::Log));
            }
            What::Count { listed, expected } if listed != expected => {
                let row = Row {
                    reason: Reason::CountMismatch,
                    words: words(Health::Degraded, Admission::Schedulable),
                    clears: Clears::Reading,
                };
                let evidence = format!("{listed} devices listed, {expected} expected");
                self.node_condition(now, row, Origin::Vendor, &evidence);
            }
            What::Count { .. } => {
                self.node.remove(&(Reason::CountMismatch, Origin::Vendor));
            }
            What::Killed(text) => self.killed(now, text, outcome),
            What::DriverLoaded(_) => outcome.reread.extend(self.devices.keys().cloned()),
            What::Switch { fatal, text } => self.switch(now, *fatal, text, outcome),
            What::Fabric { of, assertion, severity } => {
                if let Some(note) = self.switches.event(now, *of, *assertion, *severity) {
                    let Note { reason, action, evidence } = note;
                    self.note(now, &Subject::Node, reason, action, Scope::Node, evidence, outcome);
                }
                self.relate(now);
            }
            What::Fabrics { begun, faults } => {
                self.switches.list(now, *begun, faults);
                self.relate(now);
            }
            What::Driver(state) => self.driver_fault(now, JUDGED, state.fault()),
            _ => {}
        }
    }

    /// Programs that the kernel ended within a minute are one note: it hurts the node, and accuses no device.
    fn killed(&mut self, now: Duration, text: &str, outcome: &mut Outcome) {
        if self.killed.replace(now).is_none_or(|at| now.saturating_sub(at) > WINDOW) {
            let (reason, action) = (Reason::ProcessFault, Action::RestartWorkload);
            self.note(now, &Subject::Node, reason, action, Scope::Process, text.to_owned(), outcome);
        }
    }

    /// One fault of a switch is one note, whatever it prints within a minute.
    fn switch(&mut self, now: Duration, fatal: bool, text: &str, outcome: &mut Outcome) {
        let open = self.switch_fault.is_some_and(|at| now.saturating_sub(at) <= WINDOW);
        if !self.started || !fatal {
            return;
        }
        self.switch_fault = Some(now);
        if !open {
            let evidence = text.to_owned();
            self.note(now, &Subject::Node, Reason::FabricLinkDown, Action::None, Scope::Node, evidence, outcome);
        }
    }

    /// The driver itself is at fault, or is not any more, as `origin` tells.
    pub(super) fn driver_fault(&mut self, now: Duration, origin: Origin, why: Option<String>) {
        let Some(why) = why else {
            self.node.remove(&(Reason::DriverFault, origin));
            return;
        };
        let words = Words::new(Health::Degraded, Admission::Draining, Action::None, Scope::Node);
        let row = Row { reason: Reason::DriverFault, words, clears: Clears::Reading };
        self.node_condition(now, row, origin, &why);
    }

    /// Tells every device of a vendor.
    fn tell_vendor(&mut self, now: Duration, vendor: Vendor, what: &What, outcome: &mut Outcome) {
        let of = |device: &Device| device.info.as_ref().is_some_and(|info| info.vendor == vendor);
        let locals: Vec<Local> =
            self.devices.iter().filter(|(_, device)| of(device)).map(|(local, _)| local.clone()).collect();
        for local in locals {
            self.take_device(now, &local, what, outcome);
        }
    }

    /// What was here and is listed by nobody any more is lost.
    fn take_inventory(&mut self, now: Duration, vendor: Vendor, locals: &[Local], outcome: &mut Outcome) {
        let gone = |local: &Local, device: &Device| {
            device.info.as_ref().is_some_and(|info| info.vendor == vendor) && !locals.contains(local)
        };
        let gone: Vec<Local> =
            self.devices.iter().filter(|(local, device)| gone(local, device)).map(|(local, _)| local.clone()).collect();
        let lost = What::BusLoss("was here, and is listed by no library any more".to_owned());
        for local in gone {
            self.take_device(now, &local, &lost, outcome);
        }
    }

    fn node_condition(&mut self, now: Duration, row: Row, origin: Origin, evidence: &str) {
        let Row { reason, words, clears } = row;
        let fresh = || Condition::begun(now, words, clears, evidence);
        self.node.entry((reason, origin)).or_insert_with(fresh).last = now;
    }

    pub(super) fn follow(&mut self, now: Duration, local: &Local, effects: Vec<Effect>, outcome: &mut Outcome) {
        let of = Subject::Device(local.clone());
        for effect in effects {
            match effect {
                Effect::Reread => {
                    if !outcome.reread.contains(local) {
                        outcome.reread.push(local.clone());
                    }
                }
                Effect::Note { reason, action, scope, evidence } => {
                    self.note(now, &of, reason, action, scope, evidence, outcome);
                }
                Effect::FabricNote(evidence) => {
                    let switch = self.switch_fault.is_some_and(|at| now.saturating_sub(at) <= WINDOW);
                    if !switch && !self.devices.values().any(|device| device.fabric_fault(now)) {
                        self.note(now, &of, Reason::FabricLinkDown, Action::None, Scope::Device, evidence, outcome);
                    }
                }
                Effect::Trigger(code) => self.triggered(now, code),
                Effect::Suspect => {
                    let others = self.devices.iter().filter(|(other, _)| *other != local);
                    if !others.into_iter().any(|(_, device)| device.programs_fail(now))
                        && let Some(device) = self.devices.get_mut(local)
                    {
                        device.suspect(now);
                    }
                }
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a note is these words")]
    fn note(
        &mut self,
        now: Duration,
        of: &Subject,
        reason: Reason,
        action: Action,
        scope: Scope,
        evidence: String,
        outcome: &mut Outcome,
    ) {
        if !self.started {
            return;
        }
        let (state, _) = self.state_of(of);
        let said = self.said.entry(of.clone()).or_default();
        if !said.may(now) {
            outcome.swallowed = outcome.swallowed.saturating_add(1);
            return;
        }
        said.recent.push_back(now);
        let state = DeviceState { action, scope: Some(scope), reason: Some(reason), ..state };
        outcome.reports.push(Report { at: now, of: of.clone(), note: true, state, evidence });
    }

    /// Says every change that may be said now. In a storm it looks at those subjects only that the fact can have
    /// changed.
    fn say(&mut self, now: Duration, reach: Reach<'_>, outcome: &mut Outcome) {
        if !self.started {
            return;
        }
        let mut said = std::mem::take(&mut self.said);
        match reach {
            Reach::All => said.iter_mut().for_each(|(of, said)| self.say_of(now, of, said, outcome)),
            Reach::One(local) => {
                for of in [Subject::Node, Subject::Device(local.clone())] {
                    if let Some(said) = said.get_mut(&of) {
                        self.say_of(now, &of, said, outcome);
                    }
                }
            }
        }
        self.said = said;
    }

    fn say_of(&self, now: Duration, of: &Subject, said: &mut Said, outcome: &mut Outcome) {
        let (state, evidence) = self.state_of(of);
        said.behind = false;
        if said.state == state {
            if said.evidence != evidence {
                said.evidence = evidence;
            }
            return;
        }
        // That nothing may stay on a device is never held back.
        let bars = state.admission == Admission::Barred && said.state.admission != Admission::Barred;
        if !said.may(now) && !bars {
            said.behind = true;
            return;
        }
        said.recent.push_back(now);
        (said.state, said.evidence, said.since) = (state, evidence.clone(), now);
        outcome.reports.push(Report { at: now, of: of.clone(), note: false, state, evidence });
    }

    /// Subjects whose change was neither said nor put off: there are none.
    #[cfg(test)]
    pub(super) fn forgotten(&self) -> Vec<&Subject> {
        let forgotten = |(of, said): &(&Subject, &Said)| !said.behind && self.state_of(of).0 != said.state;
        self.said.iter().filter(forgotten).map(|(of, _)| of).collect()
    }

    fn state_of(&self, of: &Subject) -> (DeviceState, String) {
        match of {
            Subject::Node => {
                let own = self.node.iter().map(|((reason, _), condition)| (*reason, condition));
                compose(own.chain(self.switches.conditions()))
            }
            Subject::Device(local) => self.devices.get(local).map(Device::state).unwrap_or_default(),
        }
    }
}

impl Said {
    fn may(&mut self, now: Duration) -> bool {
        self.recent.retain(|at| now.saturating_sub(*at) < STORM_SPAN);
        self.recent.len() < STORM
    }
}
