//! Whether what was said is what the script wants. Pure.

use std::collections::BTreeMap;

use berth_agent::health::{fact::Subject, ledger::Report};
use berth_types::DeviceState;
use serde::Serialize;
use serde_json::{Map, Value};

use super::script::{Expectation, Script, Wants, Whom};

/// One report with its time on the script's clock.
#[derive(Clone, Debug)]
pub(super) struct Said {
    /// Microseconds since the agent was ready.
    pub(super) at_us: i64,
    /// The report.
    pub(super) report: Report,
    /// A state at 0.
    pub(super) initial: bool,
}

/// A report as it is written.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    at_ms: i64,
    device: String,
    note: bool,
    health: String,
    admission: String,
    action: String,
    scope: Option<&'static str>,
    reason: Option<&'static str>,
    evidence: String,
}

/// An expectation's outcome as it is written.
#[derive(Debug, Serialize)]
pub(super) struct Judged {
    pub(super) line: usize,
    pub(super) ok: bool,
    pub(super) why: String,
}

impl Said {
    /// As it is written.
    pub(super) fn line(&self) -> Line {
        let Report { of, note, state, evidence, .. } = &self.report;
        Line {
            at_ms: self.at_us.div_euclid(1000),
            device: name(of).to_owned(),
            note: *note,
            health: state.health.to_string(),
            admission: state.admission.to_string(),
            action: state.action.to_string(),
            scope: state.scope.map(|scope| scope.lower()),
            reason: state.reason.map(|reason| reason.as_str()),
            evidence: evidence.clone(),
        }
    }
}

fn name(of: &Subject) -> &str {
    match of {
        Subject::Node => "node",
        Subject::Device(local) => local,
    }
}

/// Judges every expectation of `script` by what was said, in order.
pub(super) fn judge(script: &Script, said: &[Said]) -> Vec<Judged> {
    let mut by_subject: BTreeMap<&str, Vec<&Said>> = BTreeMap::new();
    for said in said {
        by_subject.entry(name(&said.report.of)).or_default().push(said);
    }
    script.expectations.iter().map(|expectation| one(script, expectation, &by_subject)).collect()
}

fn one(script: &Script, expectation: &Expectation, said: &BTreeMap<&str, Vec<&Said>>) -> Judged {
    let whom: Vec<&str> = match &expectation.whom {
        Whom::Node => vec!["node"],
        Whom::Device(local) => vec![local],
        Whom::All => script.devices.iter().map(|device| device.local.as_str()).collect(),
        Whom::Others => script.others().map(|device| device.local.as_str()).collect(),
    };
    let of = |subject: &str| said.get(subject).map(Vec::as_slice).unwrap_or_default();
    let fault = match &expectation.wants {
        Wants::Expect(wanted) => whom.iter().find_map(|subject| expected(wanted, expectation, subject, of(subject))),
        Wants::Never(wanted) => whom.iter().find_map(|subject| forbidden(wanted, expectation, subject, of(subject))),
        Wants::Count { transitions, reports } => {
            let within =
                |said: &&Said| !said.initial && (expectation.from_us..=expectation.until_us).contains(&said.at_us);
            let all: Vec<&Said> = whom.iter().flat_map(|subject| of(subject)).copied().filter(within).collect();
            let changes = all.iter().filter(|said| !said.report.note).count();
            let over = |count: usize, most: &Option<u64>, what: &str| {
                let over = most.is_some_and(|most| u64::try_from(count).is_ok_and(|count| count > most));
                over.then(|| format!("{count} {what}"))
            };
            over(changes, transitions, "transitions").or_else(|| over(all.len(), reports, "reports"))
        }
    };
    Judged { line: expectation.line, ok: fault.is_none(), why: fault.unwrap_or_default() }
}

fn expected(wanted: &Map<String, Value>, expectation: &Expectation, subject: &str, said: &[&Said]) -> Option<String> {
    let before = said.iter().filter(|said| said.at_us <= expectation.until_us);
    let state = before.clone().rfind(|said| !said.report.note);
    let notes = before.filter(|said| said.report.note && said.at_us >= expectation.from_us);
    if state.into_iter().chain(notes).any(|said| matches(wanted, &said.report)) {
        return None;
    }
    Some(match state {
        Some(state) => format!("{subject} is {}", words(&state.report)),
        None => format!("{subject} has no state"),
    })
}

fn forbidden(wanted: &Map<String, Value>, expectation: &Expectation, subject: &str, said: &[&Said]) -> Option<String> {
    let (from, until) = (expectation.from_us, expectation.until_us);
    let held = said.iter().rfind(|said| !said.report.note && said.at_us <= from);
    let then = said.iter().filter(|said| said.at_us >= from && said.at_us <= until);
    let hit = held.into_iter().chain(then).find(|said| matches(wanted, &said.report))?;
    Some(format!("{subject} at {} ms: {}", hit.at_us.div_euclid(1000), words(&hit.report)))
}

fn words(report: &Report) -> String {
    let DeviceState { health, admission, action, scope, reason } = report.state;
    let scope = scope.map_or("-", |scope| scope.lower());
    let reason = reason.map_or("-", |reason| reason.as_str());
    format!("{health}/{admission}/{action} {scope} {reason} ({})", report.evidence)
}

fn matches(wanted: &Map<String, Value>, report: &Report) -> bool {
    wanted.iter().all(|(field, value)| match value {
        Value::Array(any) => any.iter().any(|value| matches_one(field, value, report)),
        value => matches_one(field, value, report),
    })
}

fn matches_one(field: &str, value: &Value, report: &Report) -> bool {
    let state = report.state;
    let is = match field {
        "health" => Some(state.health.as_str()),
        "admission" => Some(state.admission.as_str()),
        "action" => Some(state.action.as_str()),
        "scope" => state.scope.map(|scope| scope.lower()),
        "reason" => state.reason.map(|reason| reason.as_str()),
        _ => {
            let part = value.as_str().unwrap_or_default().to_lowercase();
            return report.evidence.to_lowercase().contains(&part);
        }
    };
    value.as_str() == is
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { at_ms, device, note, health, admission, action, scope, reason, evidence } = self;
        let kind = if *note { "note" } else { "" };
        let (scope, reason) = (scope.unwrap_or("-"), reason.unwrap_or("-"));
        write!(f, "{at_ms:>10} ms  {device:<14} {kind:<4} {health:<9} {admission:<11} {action:<15} ")?;
        write!(f, "{scope:<7} {reason:<22} {evidence}")
    }
}
