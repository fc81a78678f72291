//! What is true of a deployment, as conditions and one dominant reason. Pure. `Ready` is true only when
//! everything asked for is.

use berth_crds::conditions::{ConditionType, Wanted};
use berth_crds::{ExpertPlacementStatus, conditions::is_true};

use super::{
    apply::Applied, dereference::Dereferenced, reason::Reason, rollout::Instance, update_status::why_not,
    validate::Checked,
};
use crate::allocation::WaitReason;

/// The conditions and what matters most.
pub(super) struct Report {
    /// All conditions, in the order of a checklist.
    pub(super) conditions: Vec<Wanted>,
    /// Pending, Loading, Serving, Degraded, Paused or Rejected.
    pub(super) phase: &'static str,
    /// The one reason that matters most.
    pub(super) reason: Reason,
    /// In one sentence.
    pub(super) message: String,
}

struct Facts<'a> {
    desired: usize,
    /// Instances that stay.
    staying: Vec<&'a Instance>,
    /// Of these, the ones that answer requests.
    ready: usize,
    /// Instances that an update still has to replace, and those that end.
    old: usize,
}

pub(super) fn report(found: &Dereferenced, checked: &Checked, applied: &Applied, instances: &[Instance]) -> Report {
    let template = checked.outcome.as_ref().ok().map(|accepted| accepted.template.as_str());
    let staying: Vec<&Instance> =
        instances.iter().filter(|instance| !applied.ending.contains(&instance.name)).collect();
    let current = |instance: &&&Instance| template.is_none_or(|template| instance.template == template);
    let facts = Facts {
        desired: usize::try_from(found.deployment.spec.replicas).unwrap_or(0),
        ready: staying.iter().filter(|instance| instance.ready).count(),
        old: instances.len() - staying.iter().filter(current).count(),
        staying,
    };
    let accepted = accepted(found, checked);
    let capacity = capacity(found);
    let progress = [
        counted(&facts, ConditionType::Placed, "placed", is_placed),
        counted(&facts, ConditionType::WeightsLoaded, "loaded", is_loaded),
        counted(&facts, ConditionType::Serving, "serving", |instance| instance.ready),
    ];
    let degraded = degraded(&facts);
    let ready = ready(&facts, &accepted, &capacity, &progress[2], &degraded);
    let rejected = checked.outcome.is_err();
    let phase = phase(found, &facts, rejected);
    let (reconciling, stalled) = kstatus(&ready, rejected);
    let (reason, message) = (ready.reason, ready.message.clone());
    let [placed, loaded, serving] = progress;
    let all = [accepted, capacity, placed, loaded, serving, degraded, ready, reconciling, stalled];
    Report { conditions: all.into_iter().map(Said::into).collect(), phase, reason, message }
}

struct Said {
    kind: ConditionType,
    holds: bool,
    reason: Reason,
    message: String,
}

impl From<Said> for Wanted {
    fn from(said: Said) -> Self {
        let Said { kind, holds, reason, message } = said;
        Self { kind, status: Some(holds), reason: reason.as_str(), message }
    }
}

fn accepted(found: &Dereferenced, checked: &Checked) -> Said {
    let said = |holds, reason, message| Said { kind: ConditionType::Accepted, holds, reason, message };
    match &checked.outcome {
        Err(rejection) => said(false, rejection.reason, rejection.message.clone()),
        Ok(_) if !checked.unhonoured.is_empty() => {
            let fields: Vec<_> =
                checked.unhonoured.iter().map(|field| format!("{} ({})", field.field, field.instead)).collect();
            said(false, Reason::FieldNotHonoured, format!("not honoured yet: {}", fields.join("; ")))
        }
        Ok(accepted) => {
            let geometry = &accepted.profile.spec.geometry;
            let message = format!(
                "profile {}, {} layers, {} experts, top-{}",
                found.deployment.spec.model, geometry.layers, geometry.experts, geometry.top_k
            );
            said(true, Reason::ProfileResolved, message)
        }
    }
}

fn capacity(found: &Dereferenced) -> Said {
    let said = |holds, reason, message| Said { kind: ConditionType::CapacityAvailable, holds, reason, message };
    let verdict = &found.grant.verdict;
    match &verdict.waiting {
        None if found.deployment.spec.queue.is_some() => {
            said(true, Reason::Granted, format!("{} devices granted", verdict.devices))
        }
        None => said(true, Reason::Granted, "no queue is named: no quota applies".to_owned()),
        Some(waiting) => {
            let reason = match waiting.reason {
                WaitReason::QuotaExceeded => Reason::QuotaExceeded,
                WaitReason::QuotaTooSmall => Reason::QuotaTooSmall,
                WaitReason::QueueNotFound => Reason::QueueNotFound,
                WaitReason::QueueNotAllowed => Reason::QueueNotAllowed,
                WaitReason::CapacityShort => Reason::CapacityShort,
            };
            said(false, reason, waiting.message.clone())
        }
    }
}

fn status_of(instance: &Instance) -> Option<&ExpertPlacementStatus> {
    instance.placement.status.as_ref()
}

fn is_placed(instance: &Instance) -> bool {
    status_of(instance).is_some_and(|status| status.assignment.is_some())
}

fn is_loaded(instance: &Instance) -> bool {
    status_of(instance).is_some_and(|status| {
        is_true(&status.conditions, ConditionType::WeightsLoaded)
            || (status.slots_total > 0 && status.slots_ready >= status.slots_total)
    })
}

/// `n of m instances are …`, and why the first that is not so is not.
fn counted(facts: &Facts<'_>, kind: ConditionType, word: &str, holds: fn(&Instance) -> bool) -> Said {
    let count = facts.staying.iter().filter(|instance| holds(instance)).count();
    let desired = facts.desired;
    if desired == 0 {
        let message = "no instance is wanted".to_owned();
        return Said { kind, holds: true, reason: Reason::ScaledToZero, message };
    }
    let reason = match count {
        0 => Reason::NoInstance,
        some if some < desired => Reason::SomeInstances,
        _ => Reason::AllInstances,
    };
    let lacking = facts.staying.iter().find(|instance| !holds(instance) && !instance.ready);
    let why = lacking
        .filter(|_| count < desired)
        .map(|instance| format!("; {}: {}", instance.name, why_not(instance, false)));
    let message = format!("{count} of {desired} instances {word}{}", why.unwrap_or_default());
    Said { kind, holds: count >= desired, reason, message }
}

fn degraded(facts: &Facts<'_>) -> Said {
    let said = |holds, reason, message| Said { kind: ConditionType::Degraded, holds, reason, message };
    let lost = facts.staying.iter().find_map(|instance| {
        let lost = status_of(instance).map_or(0, |status| status.experts_lost);
        (lost > 0).then(|| format!("{}: {lost} experts have no live replica; they are repaired first", instance.name))
    });
    match lost {
        Some(message) => said(true, Reason::ExpertsLost, message),
        None if facts.ready > 0 && facts.ready < facts.desired => {
            let message = format!("{} of {} instances serve", facts.ready, facts.desired);
            said(true, Reason::InstancesShort, message)
        }
        None => said(false, Reason::AsAsked, "nothing less than asked for is given".to_owned()),
    }
}

/// The dominant reason is the first thing on the way to serving that is not so.
fn ready(facts: &Facts<'_>, accepted: &Said, capacity: &Said, serving: &Said, degraded: &Said) -> Said {
    let said = |holds, reason, message| Said { kind: ConditionType::Ready, holds, reason, message };
    let blocked = !accepted.holds && accepted.reason != Reason::FieldNotHonoured;
    if blocked || (!accepted.holds && facts.ready == 0) {
        return said(false, accepted.reason, accepted.message.clone());
    }
    if !capacity.holds {
        return said(false, capacity.reason, capacity.message.clone());
    }
    if !serving.holds {
        return said(false, Reason::Starting, serving.message.clone());
    }
    if degraded.holds {
        return said(false, degraded.reason, degraded.message.clone());
    }
    if facts.old > 0 {
        let message = format!("{} instances are being replaced or ended", facts.old);
        return said(false, Reason::Replacing, message);
    }
    if !accepted.holds {
        return said(false, accepted.reason, accepted.message.clone());
    }
    if facts.desired == 0 {
        return said(true, Reason::ScaledToZero, "no instance is wanted".to_owned());
    }
    said(true, Reason::Serving, serving.message.clone())
}

/// `Reconciling` while work goes on by itself, `Stalled` when it takes a change by a person.
fn kstatus(ready: &Said, rejected: bool) -> (Said, Said) {
    let person = [Reason::QuotaTooSmall, Reason::QueueNotFound, Reason::QueueNotAllowed, Reason::FieldNotHonoured];
    let stuck = !ready.holds && (rejected || person.contains(&ready.reason));
    let moving = !ready.holds && !stuck;
    let said = |kind, holds: bool| Said {
        kind,
        holds,
        reason: if holds { ready.reason } else { Reason::Settled },
        message: if holds { ready.message.clone() } else { String::new() },
    };
    (said(ConditionType::Reconciling, moving), said(ConditionType::Stalled, stuck))
}

fn phase(found: &Dereferenced, facts: &Facts<'_>, rejected: bool) -> &'static str {
    let placed = facts.staying.iter().any(|instance| is_placed(instance));
    match () {
        () if rejected && facts.ready == 0 => "Rejected",
        () if found.deployment.spec.paused => "Paused",
        () if facts.ready >= facts.desired => "Serving",
        () if facts.ready > 0 => "Degraded",
        () if placed => "Loading",
        () => "Pending",
    }
}
