//! Switches of Ascend's scale-up fabric (LingQu): what their faults say of the node. Levels are
//! mind-cluster's, rows `switch` of `data/ascend_faults.csv`.

use std::{collections::BTreeMap, fmt, sync::OnceLock, time::Duration};

use berth_types::{Action, Admission, Health, Reason, Scope};
use serde::{Deserialize, Serialize};

use super::{
    alarms::{self, Level},
    condition::{Clears, Condition, Words},
    fact::{Assertion, SwitchFault},
};

/// Said of the node without changing its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Note {
    pub(super) reason: Reason,
    pub(super) action: Action,
    pub(super) evidence: String,
}

/// Faults that hold, each with the condition that it makes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Switches {
    #[serde(with = "super::pairs")]
    open: BTreeMap<SwitchFault, (Duration, Option<(Reason, Condition)>)>,
    began: Option<Duration>,
}

impl fmt::Display for SwitchFault {
    /// As mind-cluster prints it, then the place: `[0x00f1fef5,155912,cpu,na] chip 0 port 7`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { chip, port, .. } = self;
        write!(f, "{} chip {chip} port {port}", self.code())
    }
}

impl SwitchFault {
    fn code(&self) -> String {
        let Self { alarm, fault, peer, .. } = self;
        let fault = fault.map_or_else(|| "na".to_owned(), |fault| fault.to_string());
        format!("[0x{alarm:08x},{fault},{peer},na]")
    }
}

/// Level and cause of a code; `None` = in no list.
fn listed(code: &str) -> Option<&'static (Level, String)> {
    static TABLE: OnceLock<BTreeMap<String, (Level, String)>> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let switch = alarms::rows().filter(|row| row.scope == "switch");
        switch.filter_map(|row| Some((row.code.clone(), (Level::parse(&row.level)?, row.cause)))).collect()
    });
    table.get(code)
}

/// What a fault says of its node; `None` = it is only counted.
fn words(of: &SwitchFault, severity: u8) -> Option<(Reason, Words)> {
    let said = |reason, health, admission, action| Some((reason, Words::new(health, admission, action, Scope::Node)));
    let Some((level, _)) = listed(&of.code()) else {
        let unlisted = said(Reason::UnknownFault, Health::Unhealthy, Admission::Barred, Action::ServiceHardware);
        return unlisted.filter(|_| severity > 1);
    };
    match level {
        Level::NotHandle => None,
        Level::SubHealth => said(Reason::FabricDegraded, Health::Degraded, Admission::Schedulable, Action::None),
        Level::RestartRequest | Level::RestartBusiness => {
            said(Reason::FabricLinkDown, Health::Degraded, Admission::Draining, Action::RestartWorkload)
        }
        _ => said(Reason::FabricLinkDown, Health::Unhealthy, Admission::Barred, Action::None),
    }
}

fn evidence(of: &SwitchFault) -> String {
    let cause = listed(&of.code()).map(|(_, cause)| cause.as_str()).filter(|cause| !cause.is_empty());
    cause.map_or_else(|| of.to_string(), |cause| format!("{of} ({cause})"))
}

impl Switches {
    /// An event of a switch.
    pub(super) fn event(&mut self, now: Duration, of: SwitchFault, assertion: Assertion, severity: u8) -> Option<Note> {
        match assertion {
            Assertion::Occurred => return self.open(now, of, severity),
            Assertion::Recovered => {
                self.open.remove(&of);
            }
            Assertion::Once => {
                let (reason, words) = words(&of, severity)?;
                self.began = Some(now);
                return Some(Note { reason, action: words.action, evidence: format!("{}, once", evidence(&of)) });
            }
        }
        None
    }

    /// What the switches hold, as they were asked at `begun`: what came later is not denied by it.
    pub(super) fn list(&mut self, now: Duration, begun: Duration, faults: &[(SwitchFault, u8)]) {
        self.open.retain(|of, (since, _)| *since >= begun || faults.iter().any(|(listed, _)| listed == of));
        for (of, severity) in faults {
            let _ = self.open(now, *of, *severity);
        }
    }

    /// When a fault that says something last began.
    pub(super) const fn last_began(&self) -> Option<Duration> {
        self.began
    }

    /// Conditions of the node.
    pub(super) fn conditions(&self) -> impl Iterator<Item = (Reason, &Condition)> {
        self.open
            .values()
            .filter_map(|(_, condition)| condition.as_ref().map(|(reason, condition)| (*reason, condition)))
    }

    fn open(&mut self, now: Duration, of: SwitchFault, severity: u8) -> Option<Note> {
        if self.open.contains_key(&of) {
            return None;
        }
        let said = words(&of, severity);
        let condition = said.map(|(reason, words)| {
            self.began = Some(now);
            (reason, Condition::begun(now, words, Clears::Reading, &evidence(&of)))
        });
        self.open.insert(of, (now, condition));
        let strange = said.is_none() && listed(&of.code()).is_none();
        strange.then(|| Note { reason: Reason::UnknownFault, action: Action::None, evidence: evidence(&of) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(alarm: u32, fault: Option<u32>, peer: &'static str) -> SwitchFault {
        SwitchFault { alarm, fault, peer, chip: 0, port: 7 }
    }

    #[test]
    fn levels_act_on_the_node() {
        let said =
            |alarm, id, peer| words(&fault(alarm, id, peer), 0).map(|(_, words)| (words.admission, words.action));
        assert_eq!(said(0x00f1_fef5, Some(155_912), "cpu"), Some((Admission::Barred, Action::None)));
        assert_eq!(said(0x0852_0003, None, "npu"), Some((Admission::Barred, Action::None)));
        assert_eq!(said(0x00f1_0509, Some(132_332), "npu"), Some((Admission::Schedulable, Action::None)));
        assert_eq!(said(0x00f1_fef5, Some(155_914), "npu"), Some((Admission::Draining, Action::RestartWorkload)));
        assert_eq!(said(0x0852_0003, None, "L2"), None);
    }

    #[test]
    fn a_fault_that_the_list_lacks_is_over_unless_it_is_newer_than_the_list() {
        let (mut switches, of) = (Switches::default(), fault(0x0852_0003, None, "npu"));
        let at = Duration::from_secs;
        switches.event(at(5), of, Assertion::Occurred, 3);
        switches.list(at(6), at(4), &[]);
        assert_eq!(switches.conditions().count(), 1);
        switches.list(at(10), at(9), &[]);
        assert_eq!(switches.conditions().count(), 0);
    }

    #[test]
    fn what_nobody_listed_is_judged_by_its_severity() {
        let (mut switches, of) = (Switches::default(), fault(0x1, Some(2), "na"));
        let note = switches.event(Duration::ZERO, of, Assertion::Occurred, 1).unwrap();
        assert!(note.reason == Reason::UnknownFault && note.evidence.contains("[0x00000001,2,na,na]"));
        assert_eq!(switches.conditions().count(), 0);
        assert_eq!(words(&of, 2).map(|(_, words)| words.admission), Some(Admission::Barred));
    }
}
