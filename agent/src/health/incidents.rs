//! The last incidents of a node, as evidence for whoever repairs its hardware: from the report that took a subject out
//! of health to the one that says it is well again. Reports in, a bounded list out. Pure.

use std::collections::VecDeque;

use berth_types::{Action, Admission, DeviceState, Health, Reason, Scope};
use serde::{Deserialize, Serialize};

use super::{
    fact::{DeviceInfo, Subject},
    ledger::Report,
};

/// Incidents that are kept.
pub const KEPT: usize = 50;
/// Transitions that are kept of one incident: the first, and the last ones.
const TRANSITIONS: usize = 20;
/// A note joins one of the same device and reason that is younger than this.
const JOINED_MS: i64 = 3_600_000;
/// Letters of evidence that are kept.
const EVIDENCE: usize = 400;

/// One change within an incident.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Transition {
    /// When, milliseconds since 1970.
    pub at_unix_ms: i64,
    /// Health.
    pub health: Health,
    /// Admission.
    pub admission: Admission,
    /// Advised action.
    pub action: Action,
    /// Scope of the worst condition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<Scope>,
    /// Its reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// Code, pid, link as printed.
    pub evidence: String,
}

/// One incident.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Incident {
    /// Local part of the device's id; `node` = the node itself.
    pub device: String,
    /// Product as the vendor's library says it.
    pub product: String,
    /// Vendor's UUID, or what it has instead.
    pub uuid: String,
    /// Serial number of the board, where the library tells one.
    pub serial: String,
    /// When it began, milliseconds since 1970.
    pub opened_unix_ms: i64,
    /// When it was over; `None` = it is not.
    pub closed_unix_ms: Option<i64>,
    /// It changed no state: a note.
    pub note: bool,
    /// Reports that it took.
    pub reports: u64,
    /// Reason of its worst report.
    pub reason: Option<Reason>,
    /// The vendor's code in that report, as printed; empty = it names none.
    pub code: String,
    /// That report's evidence.
    pub evidence: String,
    /// Strongest action that was advised.
    pub action: Action,
    /// Its reports: the first, and the last ones.
    pub transitions: Vec<Transition>,
}

/// The list, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Incidents(VecDeque<Incident>);

impl Incidents {
    /// Every incident, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Incident> {
        self.0.iter()
    }

    /// Takes a report that was said at `unix_ms`; `info` tells whom it is about. A state that is known already, as after
    /// a restart, changes nothing.
    pub fn take(&mut self, report: &Report, info: Option<&DeviceInfo>, unix_ms: i64) {
        let transition = transition(report, unix_ms);
        let device = name(&report.of).to_owned();
        if report.note {
            // What a program did wrong says nothing about hardware.
            if report.state.reason != Some(Reason::ProcessFault) {
                self.note(device, transition, info);
            }
            return;
        }
        let well = report.state == DeviceState::HEALTHY;
        let open = self.0.iter_mut().rev().find(|incident| incident.device == device && incident.is_open());
        match open {
            Some(open) if open.says(&transition) => {}
            Some(open) => {
                open.add(transition);
                open.closed_unix_ms = well.then_some(unix_ms);
            }
            None if well => {}
            None => self.push(Incident::begun(device, transition, info, false)),
        }
    }

    fn note(&mut self, device: String, transition: Transition, info: Option<&DeviceInfo>) {
        let at = transition.at_unix_ms;
        let joins = |known: &&mut Incident| {
            known.note
                && known.device == device
                && known.reason == transition.reason
                && at.saturating_sub(known.closed_unix_ms.unwrap_or(at)) < JOINED_MS
        };
        if let Some(known) = self.0.iter_mut().rev().find(joins) {
            known.add(transition);
            known.closed_unix_ms = Some(at);
            return;
        }
        let mut incident = Incident::begun(device, transition, info, true);
        incident.closed_unix_ms = Some(at);
        self.push(incident);
    }

    /// The oldest that is over gives way: what still holds is what somebody will ask for.
    fn push(&mut self, incident: Incident) {
        self.0.push_back(incident);
        while self.0.len() > KEPT {
            let over = self.0.iter().position(|incident| !incident.is_open()).unwrap_or(0);
            self.0.remove(over);
        }
    }

    /// What was read from a file, cut to what is kept.
    pub(crate) fn bound(&mut self) {
        while self.0.len() > KEPT {
            self.0.pop_front();
        }
        for incident in &mut self.0 {
            incident.transitions.truncate(TRANSITIONS);
        }
    }
}

impl Incident {
    fn begun(device: String, first: Transition, info: Option<&DeviceInfo>, note: bool) -> Self {
        let text = |of: fn(&DeviceInfo) -> &str| info.map(of).unwrap_or_default().to_owned();
        // A card that has no serial number is called by its place.
        let serial = info.filter(|info| info.card != info.local && !info.card.starts_with("card "));
        Self {
            device,
            product: text(|info| &info.product),
            uuid: text(|info| &info.uuid),
            serial: serial.map(|info| info.card.clone()).unwrap_or_default(),
            opened_unix_ms: first.at_unix_ms,
            closed_unix_ms: None,
            note,
            reports: 1,
            reason: first.reason,
            code: code(&first.evidence).to_owned(),
            evidence: first.evidence.clone(),
            action: first.action,
            transitions: vec![first],
        }
    }

    fn is_open(&self) -> bool {
        self.closed_unix_ms.is_none()
    }

    fn says(&self, next: &Transition) -> bool {
        let words = |of: &Transition| (of.health, of.admission, of.action, of.scope, of.reason);
        self.transitions.last().is_some_and(|last| words(last) == words(next))
    }

    fn add(&mut self, next: Transition) {
        let rank = |of: &Transition| (of.health, of.admission, of.action);
        if self.transitions.iter().all(|known| rank(known) < rank(&next)) {
            self.reason = next.reason;
            self.code = code(&next.evidence).to_owned();
            self.evidence.clone_from(&next.evidence);
        }
        self.action = self.action.max(next.action);
        self.reports = self.reports.saturating_add(1);
        if self.transitions.len() >= TRANSITIONS {
            self.transitions.remove(1);
        }
        self.transitions.push(next);
    }
}

fn name(of: &Subject) -> &str {
    match of {
        Subject::Node => "node",
        Subject::Device(local) => local,
    }
}

fn transition(report: &Report, at_unix_ms: i64) -> Transition {
    let DeviceState { health, admission, action, scope, reason } = report.state;
    let evidence = report.evidence.chars().take(EVIDENCE).collect();
    Transition { at_unix_ms, health, admission, action, scope, reason, evidence }
}

/// The vendor's code at the beginning of an evidence: `Xid 79`, `SXid 20034`, `0x80E01801`, `NVML 15`, `DCMI -8012`.
fn code(evidence: &str) -> &str {
    let (first, rest) = evidence.split_once(' ').unwrap_or((evidence, ""));
    let token = |text: &str| text.split(|letter: char| " ,:;()".contains(letter)).next().map_or(0, str::len);
    let end = match first {
        "Xid" | "SXid" | "NVML" | "DCMI" => first.len().saturating_add(1).saturating_add(token(rest)),
        _ if first.starts_with("0x") || first.starts_with("[0x") => first.len(),
        _ => 0,
    };
    evidence.get(..end).unwrap_or_default().trim_end_matches([',', ':', ' '])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn report(device: &str, health: Health, reason: Option<Reason>, evidence: &str, note: bool) -> Report {
        let admission = if health == Health::Healthy { Admission::Schedulable } else { Admission::Barred };
        let state = DeviceState { health, admission, action: Action::None, scope: None, reason };
        let of = Subject::Device(device.to_owned());
        Report { at: Duration::ZERO, of, note, state, evidence: evidence.to_owned() }
    }

    fn unhealthy(device: &str, evidence: &str) -> Report {
        report(device, Health::Unhealthy, Some(Reason::DeviceLost), evidence, false)
    }

    fn well(device: &str) -> Report {
        report(device, Health::Healthy, None, "", false)
    }

    #[test]
    fn an_incident_lasts_from_the_first_fault_until_the_device_is_well() {
        let mut incidents = Incidents::default();
        incidents.take(&well("a"), None, 1);
        let degraded = report("a", Health::Degraded, Some(Reason::PcieFault), "Xid 176", false);
        for (at, report) in [(10, degraded), (20, unhealthy("a", "Xid 79: GPU has fallen")), (30, well("a"))] {
            incidents.take(&report, None, at);
        }
        let all: Vec<&Incident> = incidents.iter().collect();
        assert_eq!((all.len(), all[0].opened_unix_ms, all[0].closed_unix_ms), (1, 10, Some(30)));
        assert_eq!((all[0].code.as_str(), all[0].reason), ("Xid 79", Some(Reason::DeviceLost)));
        assert_eq!(all[0].transitions.len(), 3);
    }

    #[test]
    fn what_still_holds_outlives_what_is_over() {
        let mut incidents = Incidents::default();
        incidents.take(&unhealthy("open", "x"), None, 0);
        for at in 1..200 {
            incidents.take(&unhealthy("a", "x"), None, at * 2);
            incidents.take(&well("a"), None, at * 2 + 1);
        }
        assert_eq!(incidents.iter().count(), KEPT);
        assert_eq!(incidents.iter().next().unwrap().device, "open");
        assert_eq!(incidents.iter().last().unwrap().opened_unix_ms, 398);
    }

    #[test]
    fn a_restart_that_says_the_same_adds_nothing() {
        let mut incidents = Incidents::default();
        incidents.take(&unhealthy("a", "x"), None, 0);
        incidents.take(&unhealthy("a", "x"), None, 9);
        assert_eq!(incidents.iter().next().unwrap().reports, 1);
    }

    #[test]
    fn notes_of_one_kind_are_one_entry_and_programs_are_none() {
        let mut incidents = Incidents::default();
        for at in 0..500 {
            incidents.take(&report("a", Health::Healthy, Some(Reason::ProcessFault), "Xid 13", true), None, at);
            incidents.take(&report("a", Health::Healthy, Some(Reason::UnknownFault), "Xid 999", true), None, at);
        }
        let all: Vec<&Incident> = incidents.iter().collect();
        assert_eq!((all.len(), all[0].reports, all[0].transitions.len()), (1, 500, TRANSITIONS));
    }

    #[test]
    fn codes_are_taken_as_they_are_printed() {
        for (evidence, expected) in [
            ("Xid 79, pid 7: text", "Xid 79"),
            ("SXid 20034, nvswitch 0, Fatal", "SXid 20034"),
            ("0x80E01801 (HBM, multi-bit ECC)", "0x80E01801"),
            ("NVML 15 (GPU is lost)", "NVML 15"),
            ("DCMI -8012, 0x40F84E00", "DCMI -8012"),
            ("remapped rows: failed", ""),
            ("", ""),
        ] {
            assert_eq!(code(evidence), expected, "{evidence}");
        }
    }
}
