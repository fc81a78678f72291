//! The independent checker. It shares no code with what it checks: it reads the problem and the plan alone
//! and returns every finding, not the first. Only it makes a `Plan<Checked>`.

mod claims;
mod devices;
mod domains;
mod finding;
mod rows;

use std::collections::{BTreeMap, BTreeSet};

use berth_types::{DeviceId, ExpertId, LayerId};

use crate::{
    num,
    plan::{Checked, Layout, Plan, Proposed},
    problem::{Problem, Standing},
};
use claims::{claims, weights};
use devices::{bytes, choice, devices};
use domains::{fragile, gathered};
pub use finding::Finding;
use rows::rows;

/// A plan with everything that is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("the plan has {} finding(s), first: {}", findings.len(), findings.first().map(ToString::to_string).unwrap_or_default())]
pub struct Rejected {
    /// All findings, in order.
    pub findings: Vec<Finding>,
}

/// Checks `plan` against `problem` and `previous`, from which it was made.
///
/// # Errors
/// [`Rejected`] with all findings.
pub fn check(problem: &Problem, previous: Option<&Layout>, plan: Plan<Proposed>) -> Result<Plan<Checked>, Rejected> {
    let findings = findings(problem, previous, &plan);
    if findings.is_empty() { Ok(plan.checked()) } else { Err(Rejected { findings }) }
}

/// Everything that is wrong with `plan`.
#[must_use]
pub fn findings(problem: &Problem, previous: Option<&Layout>, plan: &Plan<Proposed>) -> Vec<Finding> {
    let decision = plan.decision();
    let mut found = Vec::new();
    if decision.waves.is_empty() {
        found.push(Finding::Shape { what: "it has no layout".to_owned() });
    }
    if decision.revision != problem.instance.revision || decision.name != problem.instance.name {
        let what = format!("it is {} revision {}", decision.name, decision.revision);
        found.push(Finding::Shape { what });
    }
    if decision.survives < problem.instance.survive && previous.is_none() {
        let what = format!("it survives the loss of {} only", decision.survives.as_str());
        found.push(Finding::Shape { what });
    }
    weights(problem, decision, &mut found);
    let mut before = pairs(problem.held.iter().chain(previous));
    for (wave, layout) in decision.waves.iter().enumerate() {
        // What was lost may wait for a later wave; the last has all.
        let living = (wave + 1 < decision.waves.len()).then(|| living(problem, &before));
        rows(problem, layout, wave, living.as_ref(), &mut found);
        devices(problem, layout, wave, &before, &mut found);
        bytes(problem, layout, wave, &before, decision.waves.last(), &mut found);
        before = pairs(std::iter::once(layout));
    }
    if let Some(last) = decision.waves.last() {
        fragile(problem, last, decision.survives, &mut found);
        gathered(problem, last, decision.survives, &mut found);
        claims(problem, last, decision, &mut found);
        choice(problem, last, previous.is_some(), &mut found);
    }
    found
}

/// Experts that had a replica on a device that is not gone.
fn living(problem: &Problem, before: &Pairs) -> BTreeSet<(LayerId, ExpertId)> {
    let gone = |id: &DeviceId| {
        let known = problem.devices.iter().find(|device| device.id == *id);
        known.is_none_or(|device| device.standing == Standing::Gone)
    };
    before.iter().filter(|(device, _)| !gone(device)).flat_map(|(_, held)| held.iter().copied()).collect()
}

type Pairs = BTreeMap<DeviceId, BTreeSet<(LayerId, ExpertId)>>;

fn each_slot(layout: &Layout) -> impl Iterator<Item = (&DeviceId, LayerId, ExpertId)> {
    layout.layers.iter().flat_map(|(layer, row)| {
        let owners =
            layout.devices.iter().flat_map(|entry| std::iter::repeat_n(&entry.device, num::index(entry.slots)));
        owners.zip(row).filter_map(|(device, expert)| Some((device, *layer, (*expert)?)))
    })
}

fn pairs<'a>(layouts: impl Iterator<Item = &'a Layout>) -> Pairs {
    let mut pairs = Pairs::new();
    for layout in layouts {
        for (device, layer, expert) in each_slot(layout) {
            pairs.entry(device.clone()).or_default().insert((layer, expert));
        }
    }
    pairs
}
