//! Step 5: tells the user what is. The status is a pure function of what was found and applied; one write
//! if it changed, and one event for each condition that did.

use std::collections::BTreeMap;

use berth_crds::{
    LABEL_DEPLOYMENT, ModelDeployment, ModelDeploymentStatus,
    conditions::{ConditionType, is_true, merge},
    model_deployment::{InstanceStatus, Summary},
};
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Condition, jiff::Timestamp};
use kube::{
    Resource, ResourceExt,
    runtime::events::{Event, EventType},
};

use super::{
    apply::Applied,
    dereference::Dereferenced,
    report::{Report, report},
    rollout::{Instance, observe},
    validate::Checked,
};
use crate::{error::WriteError, writes::Writes};

/// The status as it should be.
#[must_use]
pub fn compute(found: &Dereferenced, checked: &Checked, applied: &Applied, now: Timestamp) -> ModelDeploymentStatus {
    let deployment = &found.deployment;
    let before = deployment.status.clone().unwrap_or_default();
    let instances = observe(&applied.placements, &found.pods);
    let Report { conditions, phase, reason, message } = report(found, checked, applied, &instances);
    let answering = |instance: &&Instance| instance.ready && !applied.ending.contains(&instance.name);
    let ready = i32::try_from(instances.iter().filter(answering).count()).unwrap_or(i32::MAX);
    let desired = deployment.spec.replicas;
    ModelDeploymentStatus {
        observed_generation: deployment.metadata.generation,
        phase: phase.to_owned(),
        replicas: i32::try_from(instances.len()).unwrap_or(i32::MAX),
        ready_replicas: ready,
        desired_replicas: desired,
        selector: format!("{LABEL_DEPLOYMENT}={}", deployment.name_any()),
        summary: Summary {
            instances: format!("{ready}/{desired}"),
            pools: pools(found, &instances),
            reason: reason.as_str().to_owned(),
            message,
        },
        instances: instances.iter().map(|instance| of_instance(instance, applied)).collect(),
        unhonoured_fields: checked.unhonoured.iter().map(|field| field.field.to_owned()).collect(),
        granted_devices: found.grant.verdict.devices,
        conditions: merge(&before.conditions, &conditions, deployment.metadata.generation, now),
    }
}

/// `product:devices`, largest first.
fn pools(found: &Dereferenced, instances: &[Instance]) -> String {
    let mut pools: BTreeMap<&str, usize> = BTreeMap::new();
    for instance in instances {
        let assignment = instance.placement.status.as_ref().and_then(|status| status.assignment.as_ref());
        for device in assignment.iter().flat_map(|assignment| &assignment.devices) {
            let product = found.products.get(device.as_str()).map_or("unknown", String::as_str);
            *pools.entry(product).or_default() += 1;
        }
    }
    let mut sorted: Vec<_> = pools.into_iter().collect();
    sorted.sort_by_key(|(product, devices)| (std::cmp::Reverse(*devices), *product));
    sorted.iter().map(|(product, devices)| format!("{product}:{devices}")).collect::<Vec<_>>().join(",")
}

fn of_instance(instance: &Instance, applied: &Applied) -> InstanceStatus {
    let ending = applied.ending.contains(&instance.name);
    let status = instance.placement.status.clone().unwrap_or_default();
    let ready = instance.ready && !ending;
    InstanceStatus {
        name: instance.name.clone(),
        template: instance.template.clone(),
        ready,
        revision: status.serving_revision,
        endpoint: instance.endpoint.clone().filter(|_| !ending).unwrap_or_default(),
        expert_bytes: status.expert_bytes,
        message: if ready { String::new() } else { why_not(instance, ending) },
    }
}

/// Why an instance does not answer, in the words of whoever knows.
pub(super) fn why_not(instance: &Instance, ending: bool) -> String {
    if ending {
        return "ends: running requests are finished first".to_owned();
    }
    let conditions = instance.placement.status.as_ref().map_or(&[][..], |status| status.conditions.as_slice());
    for kind in [ConditionType::Placed, ConditionType::WeightsLoaded, ConditionType::Serving] {
        let lacking = conditions.iter().find(|condition| condition.type_ == kind.as_str());
        if let Some(condition) = lacking.filter(|condition| condition.status != "True") {
            return format!("{}: {}", kind.as_str(), condition.message);
        }
        if kind == ConditionType::Placed && lacking.is_none() {
            return "waits for the scheduler to place it".to_owned();
        }
    }
    if instance.endpoint.is_none() {
        return "waits for its runner to become ready".to_owned();
    }
    if is_true(conditions, ConditionType::Serving) { String::new() } else { "waits for its weights".to_owned() }
}

/// Writes the status if it changed, and tells an event for each condition that turned.
///
/// # Errors
/// [`WriteError`].
pub async fn update_status(
    deployment: &ModelDeployment,
    status: &ModelDeploymentStatus,
    writes: &Writes,
) -> Result<(), WriteError> {
    if deployment.status.as_ref() == Some(status) {
        return Ok(());
    }
    let space = deployment.namespace().unwrap_or_default();
    writes.apply_status(&writes.within(&space), deployment, status).await?;
    let before = deployment.status.as_ref().map_or(&[][..], |status| status.conditions.as_slice());
    let reference = deployment.object_ref(&());
    for event in events(before, &status.conditions) {
        writes.tell(&reference, &event).await;
    }
    Ok(())
}

/// One event for each told condition whose status or reason turned. At most one of a pass is a warning's
/// repetition: `Ready` is not told when another condition already says why.
fn events(before: &[Condition], now: &[Condition]) -> Vec<Event> {
    const TOLD: [ConditionType; 4] =
        [ConditionType::Accepted, ConditionType::CapacityAvailable, ConditionType::Degraded, ConditionType::Ready];
    let mut events: Vec<Event> = Vec::new();
    for kind in TOLD {
        let find = |list: &[Condition]| list.iter().find(|condition| condition.type_ == kind.as_str()).cloned();
        let Some(condition) = find(now) else { continue };
        let same = find(before).is_some_and(|old| old.status == condition.status && old.reason == condition.reason);
        let first_and_fine = find(before).is_none() && kind == ConditionType::Degraded && condition.status == "False";
        if same || first_and_fine || events.iter().any(|event| event.reason == condition.reason) {
            continue;
        }
        let bad = if kind == ConditionType::Degraded { "True" } else { "False" };
        let starting = condition.reason == "Starting" || condition.reason == "NoInstance";
        let warning = condition.status == bad && !starting;
        let mut note = condition.message.clone();
        note.truncate(
            note.char_indices().take_while(|(at, _)| *at < 1000).last().map_or(0, |(at, c)| at + c.len_utf8()),
        );
        events.push(Event {
            type_: if warning { EventType::Warning } else { EventType::Normal },
            reason: condition.reason.clone(),
            note: Some(note),
            action: kind.as_str().to_owned(),
            secondary: None,
        });
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        allocation::{WaitReason, Waiting},
        model_deployment::fixtures::{add, found, instance, template},
    };
    use serde_json::{Value, json};

    fn status(more: &Value, ready: &[bool], waiting: Option<Waiting>) -> ModelDeploymentStatus {
        let (mut found, checked) = found(more, 3);
        found.grant.verdict.waiting = waiting;
        let template = checked.outcome.as_ref().map_or_else(|_| "t".to_owned(), |accepted| accepted.template.clone());
        for (index, ready) in (0u32..).zip(ready) {
            add(&mut found, instance(&template, index, *ready));
        }
        let applied = Applied { placements: found.placements.clone(), ending: Vec::new() };
        compute(&found, &checked, &applied, Timestamp::UNIX_EPOCH)
    }

    fn line(status: &ModelDeploymentStatus, kind: &str) -> String {
        let condition = status.conditions.iter().find(|condition| condition.type_ == kind).unwrap();
        format!("{} {}: {}", condition.status, condition.reason, condition.message)
    }

    #[test]
    fn ready_only_when_everything_asked_for_is_true() {
        let all = status(&json!({"replicas": 2}), &[true, true], None);
        assert_eq!(line(&all, "Ready"), "True Serving: 2 of 2 instances serving");
        assert_eq!((all.phase.as_str(), all.summary.pools.as_str()), ("Serving", "910c:2"));
        let unmeasured = status(&json!({"objective": {"ttftMs": 5}}), &[true], None);
        assert!(line(&unmeasured, "Ready").starts_with("False FieldNotHonoured"));
        assert_eq!((unmeasured.ready_replicas, unmeasured.unhonoured_fields[0].as_str()), (1, "spec.objective"));
    }

    #[test]
    fn too_few_instances_are_degraded_and_the_reason_is_told() {
        let some = status(&json!({"replicas": 2}), &[true, false], None);
        assert_eq!(line(&some, "Degraded"), "True InstancesShort: 1 of 2 instances serve");
        assert!(line(&some, "Ready").starts_with("False Starting: 1 of 2 instances serving; v3-"));
        assert!(line(&some, "Reconciling").starts_with("True") && line(&some, "Stalled").starts_with("False"));
    }

    #[test]
    fn who_waits_for_quota_reads_the_queues_words() {
        let message = "queue batch: 12 of 12 devices used; needs 4 more".to_owned();
        let waiting = Waiting { reason: WaitReason::QuotaExceeded, message: message.clone() };
        let waits = status(&json!({"queue": "batch"}), &[], Some(waiting));
        assert_eq!(line(&waits, "CapacityAvailable"), format!("False QuotaExceeded: {message}"));
        assert_eq!((waits.phase.as_str(), waits.summary.message.as_str()), ("Pending", message.as_str()));
    }

    #[test]
    fn rejection_stalls() {
        let rejected = status(&json!({"serving": {"mode": "engine"}}), &[], None);
        assert_eq!(rejected.phase, "Rejected");
        assert!(line(&rejected, "Stalled").starts_with("True FieldNotHonoured"));
    }

    #[test]
    fn a_second_pass_over_the_same_changes_nothing() {
        let (mut found, checked) = found(&json!({}), 1);
        add(&mut found, instance(&template(&checked), 0, true));
        let applied = Applied { placements: found.placements.clone(), ending: Vec::new() };
        let first = compute(&found, &checked, &applied, Timestamp::UNIX_EPOCH);
        let mut deployment = found.deployment.as_ref().clone();
        deployment.status = Some(first.clone());
        found.deployment = std::sync::Arc::new(deployment);
        let later = Timestamp::from_second(1000).unwrap();
        assert_eq!(compute(&found, &checked, &applied, later), first);
        assert!(events(&first.conditions, &first.conditions).is_empty());
    }

    #[test]
    fn a_turn_is_told_once_and_a_long_note_is_cut() {
        let message = "é".repeat(900);
        let waiting = Waiting { reason: WaitReason::QuotaExceeded, message };
        let waits = status(&json!({"queue": "batch"}), &[], Some(waiting));
        let told = events(&[], &waits.conditions);
        let reasons: Vec<_> = told.iter().map(|event| event.reason.as_str()).collect();
        assert_eq!(reasons, ["ProfileResolved", "QuotaExceeded"]);
        assert!(told[1].note.as_ref().unwrap().len() <= 1002);
    }
}
