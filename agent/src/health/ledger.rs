//! The ledger of one node: facts in, transitions and notes out. Pure: every fact comes with its time.
//!
//! It alone says how a device is. It never waits, reads nothing, and does not know who reports.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use berth_types::{Action, Admission, DeviceState, Reason, Scope, Vendor};
use serde::{Deserialize, Serialize};

use super::{
    alarms::Level,
    catalog::{self, Treat},
    condition::{Condition, Origin, WINDOW, compose},
    device::{Device, Effect, Settings},
    fact::{DeviceInfo, Fact, Local, Subject, What},
    switch::Switches,
};

/// Reports per subject within [`STORM_SPAN`]; the last state is said all the same, a little later.
const STORM: usize = 2;
/// See [`STORM`].
const STORM_SPAN: Duration = Duration::from_secs(1);

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
    /// When something was said of late, and whether it was a note.
    #[serde(skip)]
    recent: VecDeque<(Duration, bool)>,
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

/// Whether a fact makes a device known that nobody spoke of before: it is listed, or did not come up when its driver
/// was loaded. What is said of a device that ran is of one that is known, or of none of ours.
fn introduces(what: &What) -> bool {
    match what {
        What::Listed(_) | What::Unspoken(_) => true,
        What::BusLoss(line) => !line.starts_with("GPU "),
        _ => false,
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
    pub(super) killed: Option<Duration>,
    /// Switches of Ascend's scale-up fabric.
    pub(super) switches: Switches,
    /// What happened once on the node and makes link faults worse.
    pub(super) triggers: Vec<(Duration, Level)>,
    pub(super) strangers: BTreeMap<Local, Duration>,
    #[serde(skip)]
    pub(super) started: bool,
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
        let silent = behind.filter_map(|said| said.recent.front().map(|(at, _)| at.saturating_add(STORM_SPAN)));
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
            // Addresses from old lines that no library and no kernel list any more: only a loss explains that.
            device.info.is_some() || device.state().0.reason == Some(Reason::DeviceLost)
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

    pub(super) fn take_device(&mut self, now: Duration, local: &Local, what: &What, outcome: &mut Outcome) {
        let ours = self.devices.contains_key(local);
        if !ours && !introduces(what) && self.started {
            return self.stranger(now, local, what, outcome);
        }
        if let What::Xid(xid) = what
            && let Treat::Node(row) = catalog::treat(xid.number)
        {
            // What was said of the driver before the agent began, its readings say better.
            if !self.started {
                return;
            }
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
                Effect::FabricNote { evidence, program } => {
                    let switch = self.switch_fault.is_some_and(|at| now.saturating_sub(at) <= WINDOW);
                    if !switch && !self.devices.values().any(|device| device.fabric_fault(now)) {
                        let (reason, action, scope) = if program {
                            (Reason::ProcessFault, Action::RestartWorkload, Scope::Process)
                        } else {
                            (Reason::FabricLinkDown, Action::None, Scope::Device)
                        };
                        self.note(now, &of, reason, action, scope, evidence, outcome);
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
    pub(super) fn note(
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
        said.recent.push_back((now, true));
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
        // That nothing may stay on a device is never held back, nor by notes that nothing new may go there.
        let bars = state.admission == Admission::Barred && said.state.admission != Admission::Barred;
        let drains = state.admission > said.state.admission && said.may_turn(now);
        if !said.may(now) && !bars && !drains {
            said.behind = true;
            return;
        }
        said.recent.push_back((now, false));
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
        self.recent.retain(|(at, _)| now.saturating_sub(*at) < STORM_SPAN);
        self.recent.len() < STORM
    }

    /// As [`Self::may`], notes left aside.
    fn may_turn(&mut self, now: Duration) -> bool {
        self.recent.retain(|(at, _)| now.saturating_sub(*at) < STORM_SPAN);
        self.recent.iter().filter(|(_, note)| !note).count() < STORM
    }
}
