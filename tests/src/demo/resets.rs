//! Devices of both vendors that must be reset: emptied while prompts go on, reset by order, validated, watched, used again.
//! Looked at as a user would: by objects, and by what prompts give. It orders nothing.

use std::time::{Duration, Instant};

use berth_crds::{
    AcceleratorNode,
    accelerator_node::{DeviceStatus, OrderPhase},
};
use berth_types::{Action, Admission, DeviceId, Health, Vendor};
use futures::future::try_join_all;
use kube::{Api, Client};
use tokio::sync::oneshot;

use super::PATIENCE;
use super::changes::{Serving, assigned, count, listed, placed};
use super::cluster::Cluster;
use super::nodes::ResetFault;
use super::objects;
use super::progress::Progress;
use super::prompts::{Case, Runner};
use super::report::{Report, ResetReport};
use crate::{Error, Result};

/// Between two looks at the objects.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The code of each vendor by which a device wants a reset and goes on serving: a double-bit error, a failed bus access.
const fn code(vendor: Vendor) -> &'static str {
    match vendor {
        Vendor::Nvidia => "48",
        Vendor::Ascend => "0x80AD8009",
    }
}

/// Each vendor's device in turn, the second once the first is reset, while prompts go on.
pub(super) async fn reset_by_order(
    cluster: &Cluster,
    vendors: &[Vendor],
    runner: &Runner,
    case: &Case,
    report: &mut Report,
    progress: &Progress,
) -> Result<()> {
    let mut faults = Vec::new();
    for vendor in vendors {
        faults.push(choose(cluster, *vendor, report).await?);
    }
    let members: Vec<&DeviceId> = faults.iter().flat_map(ResetFault::members).collect();
    placed(cluster.client(), "the devices to be in use", |used| members.iter().all(|one| used.contains(one))).await?;
    let serving = Serving::start(runner, case);
    let done = in_turn(cluster, &faults, progress).await;
    let answers = serving.end().await?;
    let mut resets = done?;
    let failed = answers.iter().filter(|answer| !answer.succeeded() || Some(&answer.ids) != case.expected.as_ref());
    let (requests, failed_requests) = (count(answers.len()), count(failed.count()));
    for reset in &mut resets {
        (reset.requests, reset.failed_requests) = (requests, failed_requests);
    }
    progress.detail(&format!("{requests} requests meanwhile, {failed_requests} failed or gave other tokens"));
    report.reset = resets;
    Ok(())
}

/// A device of `vendor` that is in use, on a node where nothing was lost before.
async fn choose(cluster: &Cluster, vendor: Vendor, report: &Report) -> Result<ResetFault> {
    let client = cluster.client();
    let used = assigned(&objects::placement(client).await?.status.unwrap_or_default());
    let known = objects::vendors(client).await?;
    let spared = |device: &DeviceId| {
        let on_its_node = |lost: &String| lost.split('/').next() == Some(device.node());
        report.fault.iter().flat_map(|fault| &fault.devices).any(on_its_node)
    };
    let device = used.iter().find(|device| known.get(device) == Some(&vendor) && !spared(device));
    let device = device.ok_or_else(|| Error::Runner {
        doing: "choose a device to reset".into(),
        why: format!("the placement uses no device of {vendor} on a node that has lost none"),
    })?;
    cluster.reset_fault_of(device, code(vendor))
}

/// Lets one fault happen, and each next one once what the last one wanted is carried out: the proof and the probation of
/// one device are waited for while the next is emptied.
async fn in_turn(cluster: &Cluster, faults: &[ResetFault], progress: &Progress) -> Result<Vec<ResetReport>> {
    let mut turn = None;
    let mut all = Vec::new();
    for fault in faults {
        let (carried_out, next) = oneshot::channel();
        all.push(reset(cluster, fault, turn.replace(next), carried_out, progress));
    }
    try_join_all(all).await
}

async fn reset(
    cluster: &Cluster,
    fault: &ResetFault,
    turn: Option<oneshot::Receiver<()>>,
    carried_out: oneshot::Sender<()>,
    progress: &Progress,
) -> Result<ResetReport> {
    if let Some(turn) = turn {
        // Dropped only with an error, which ends all.
        let _ = turn.await;
    }
    let started = Instant::now();
    fault.happen()?;
    let mut carried_out = Some(carried_out);
    let mut seen = Seen::default();
    while seen.used.is_none() {
        let state = look(cluster.client(), fault).await?;
        seen.take(&state, fault, started.elapsed().as_secs_f64() * 1_000.0)?;
        if seen.reset.is_some()
            && let Some(carried_out) = carried_out.take()
        {
            // Nobody waits for the last one.
            let _ = carried_out.send(());
        }
        if started.elapsed() > PATIENCE {
            let what = format!("{} to be reset and used again", fault.device());
            return Err(Error::Wait { what, waited: PATIENCE, state: format!("{seen:?}\n{state:?}") });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    let report = seen.report(fault);
    progress.detail(&format!(
        "{} of {}: {} after {:.0} ms, empty {:.0}, ordered {:.0}, reset {:.0}, validated {:.0}, healthy {:.0}, in use {:.0}",
        report.code,
        listed(fault.members().iter()),
        report.action,
        report.told_ms,
        report.emptied_ms,
        report.ordered_ms,
        report.reset_ms,
        report.validated_ms,
        report.healthy_ms,
        report.used_ms
    ));
    Ok(report)
}

/// What the objects say at one time; the node's was read first.
#[derive(Debug, Default)]
struct State {
    device: Option<DeviceStatus>,
    /// What goes along, the device included, and is well.
    well: usize,
    order: Option<(String, Option<OrderPhase>, String)>,
    cordoned: usize,
    /// What the settled placement uses, and what any uses.
    settled: bool,
    used: Vec<DeviceId>,
}

async fn look(client: &Client, fault: &ResetFault) -> Result<State> {
    let nodes: Api<AcceleratorNode> = Api::all(client.clone());
    let node = nodes.get(fault.device().node()).await.map_err(Error::api("get an AcceleratorNode"))?;
    let status = node.status.unwrap_or_default();
    let ordered = node.spec.orders.iter().find(|order| fault.members().contains(&order.device));
    let fate = status.orders.iter().rev().find(|fate| fault.members().contains(&fate.device));
    let order = match (fate, ordered) {
        (Some(fate), _) => Some((fate.id.clone(), Some(fate.phase), fate.message.clone())),
        (None, Some(order)) => Some((order.id.clone(), None, String::new())),
        (None, None) => None,
    };
    let cordoned = node.spec.cordoned_devices.iter().filter(|one| fault.members().contains(&one.device)).count();
    let members: Vec<_> = status.devices.into_iter().filter(|one| fault.members().contains(&one.device)).collect();
    let well = |one: &&DeviceStatus| (one.health, one.admission) == (Health::Healthy, Admission::Schedulable);
    let well = members.iter().filter(well).count();
    let device = members.into_iter().find(|one| one.device == *fault.device());
    let placement = objects::placement(client).await?.status.unwrap_or_default();
    let revision = placement.assignment.as_ref().map_or(0, |assignment| assignment.revision);
    let settled = (placement.serving_revision, placement.draining_revision, placement.experts_lost) == (revision, 0, 0);
    Ok(State { device, well, order, cordoned, settled, used: assigned(&placement) })
}

/// When each step was first seen, milliseconds since the fault.
#[derive(Debug, Default)]
struct Seen {
    order: String,
    action: Option<Action>,
    told: Option<f64>,
    emptied: Option<f64>,
    ordered: Option<f64>,
    reset: Option<f64>,
    validated: Option<f64>,
    healthy: Option<f64>,
    used: Option<f64>,
}

impl Seen {
    fn take(&mut self, state: &State, fault: &ResetFault, now: f64) -> Result<()> {
        let wrong = |why: String| Error::Runner { doing: format!("reset {} by order", fault.device()), why };
        let Some(device) = &state.device else { return Ok(()) };
        if device.action >= Action::ResetDevice {
            self.told.get_or_insert(now);
            self.action.get_or_insert(device.action);
        }
        if self.told.is_none() {
            return Ok(());
        }
        let in_use = fault.members().iter().find(|member| state.used.contains(member));
        if in_use.is_none() && state.settled {
            self.emptied.get_or_insert(now);
        }
        if let Some((id, phase, message)) = &state.order {
            if let Some(used) = in_use.filter(|_| self.reset.is_none()) {
                return Err(wrong(format!("{id} is ordered while {used} is in use")));
            }
            if phase.is_some_and(|phase| phase.is_final() && phase != OrderPhase::Succeeded) {
                return Err(wrong(format!("{id} is {phase:?}: {message}")));
            }
            if !self.order.is_empty() && self.order != *id {
                return Err(wrong(format!("{} was ordered again as {id}", self.order)));
            }
            self.order.clone_from(id);
            self.emptied.get_or_insert(now);
            self.ordered.get_or_insert(now);
            if *phase == Some(OrderPhase::Succeeded) {
                self.reset.get_or_insert(now);
            }
        }
        if self.reset.is_some() && device.action == Action::None {
            self.validated.get_or_insert(now);
        }
        let all = fault.members().len();
        if self.validated.is_some() && state.well == all && state.cordoned == 0 {
            self.healthy.get_or_insert(now);
        }
        if self.healthy.is_some() && state.settled && fault.members().iter().all(|one| state.used.contains(one)) {
            self.used.get_or_insert(now);
        }
        Ok(())
    }

    fn report(self, fault: &ResetFault) -> ResetReport {
        let at = |step: Option<f64>| step.unwrap_or_default();
        ResetReport {
            vendor: fault.vendor(),
            device: fault.device().to_string(),
            devices: fault.members().iter().map(ToString::to_string).collect(),
            code: fault.code(),
            action: self.action.unwrap_or(Action::None),
            order: self.order,
            told_ms: at(self.told),
            emptied_ms: at(self.emptied),
            ordered_ms: at(self.ordered),
            reset_ms: at(self.reset),
            validated_ms: at(self.validated),
            healthy_ms: at(self.healthy),
            used_ms: at(self.used),
            asked: fault.resets(),
            requests: 0,
            failed_requests: 0,
        }
    }
}
