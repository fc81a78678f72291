//! What wants a person's attention: one line a finding, with what is and what to do. Pure.

use berth_crds::{
    AcceleratorNode, ExpertPlacement, ModelDeployment,
    conditions::{ConditionType, is_true},
};
use berth_types::{Action, Admission, Health};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;
use serde::Serialize;

use super::devices_of;
use crate::table::{Table, count};

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Attention {
    /// The object, as `<kind>/<name>` or the device's id.
    pub(crate) object: String,
    /// What is.
    pub(crate) what: String,
    /// What to do or look at.
    pub(crate) next: String,
}

/// Every finding, deployments first.
pub(crate) fn attention(
    deployments: &[&ModelDeployment],
    placements: &[&ExpertPlacement],
    nodes: &[&AcceleratorNode],
) -> Vec<Attention> {
    let mut found: Vec<_> = deployments.iter().filter_map(|one| of_deployment(one)).collect();
    found.extend(placements.iter().filter_map(|one| of_placement(one)));
    found.extend(nodes.iter().flat_map(|one| of_node(one, placements)));
    found
}

/// The findings for people.
pub(crate) fn text(found: &[Attention]) -> String {
    if found.is_empty() {
        return "nothing wants attention\n".to_owned();
    }
    let mut table = Table::new(&["WANTS ATTENTION", "WHAT IS", "NEXT"]);
    for Attention { object, what, next } in found {
        table.row([object.clone(), what.clone(), next.clone()]);
    }
    table.to_string()
}

fn of_deployment(object: &ModelDeployment) -> Option<Attention> {
    let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
    let found = |what: String, next: String| Some(Attention { object: format!("{namespace}/{name}"), what, next });
    let Some(status) = object.status.as_ref().filter(|status| !status.conditions.is_empty()) else {
        return found(
            "no operator has looked at it yet".to_owned(),
            "kubectl get pods -A -l berth.dev/component=operator".to_owned(),
        );
    };
    if is_true(&status.conditions, ConditionType::Ready) {
        return None;
    }
    let what = match (status.summary.reason.as_str(), status.summary.message.as_str()) {
        ("", "") => "not ready".to_owned(),
        (reason, "") => reason.to_owned(),
        (_, message) => message.to_owned(),
    };
    found(what, format!("kubectl berth status {name} -n {namespace}"))
}

fn of_placement(object: &ExpertPlacement) -> Option<Attention> {
    let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
    let status = object.status.as_ref()?;
    let stalled = message_of(&status.conditions, ConditionType::Stalled, "True");
    let lost = (status.experts_lost > 0 && status.serving_revision > 0).then(|| {
        let answers = "requests for them wait";
        format!("{} experts have no live replica: {answers} until a revision is repaired", status.experts_lost)
    });
    let what = lost.or(stalled)?;
    let next = format!("kubectl berth placement {name} -n {namespace}");
    Some(Attention { object: format!("{namespace}/{name}"), what, next })
}

fn of_node(object: &AcceleratorNode, placements: &[&ExpertPlacement]) -> Vec<Attention> {
    let name = object.name_any();
    let mut found = Vec::new();
    let Some(status) = &object.status else {
        let next = format!("kubectl get pods -A -l berth.dev/component=agent --field-selector spec.nodeName={name}");
        return vec![Attention { object: name, what: "its agent has reported nothing".to_owned(), next }];
    };
    let say = |what: String| Attention {
        object: name.clone(),
        what,
        next: format!("kubectl describe acceleratornode {name}"),
    };
    // Nobody waits for the stream of a node that hosts nothing.
    if object.spec.native {
        found.extend(message_of(&status.conditions, ConditionType::Reachable, "False").map(&say));
    }
    found.extend(message_of(&status.conditions, ConditionType::Ready, "False").map(&say));
    for device in &status.devices {
        let well = device.health == Health::Healthy && device.admission == Admission::Schedulable;
        if well {
            continue;
        }
        let reason = device.reason.map_or_else(String::new, |reason| format!(": {}", reason.as_str()));
        let evidence = if device.evidence.is_empty() { String::new() } else { format!(" ({})", device.evidence) };
        let what = format!("{}, {}{reason}{evidence}", device.health, device.admission);
        let users = placements.iter().filter(|one| devices_of(one).contains(&device.device)).count();
        let handled = match users {
            0 => "no instance uses it".to_owned(),
            users => format!("still used by {}, a revision without it must come", count(users, "instance")),
        };
        let next = match device.action {
            Action::None => format!("{handled}; nothing to do but wait, it is watched"),
            action => format!("{handled}; the agent advises {action}"),
        };
        found.push(Attention { object: device.device.to_string(), what, next });
    }
    found
}

/// The message of condition `kind` if it has this status.
fn message_of(conditions: &[Condition], kind: ConditionType, status: &str) -> Option<String> {
    let found = conditions.iter().find(|condition| condition.type_ == kind.as_str() && condition.status == status)?;
    let Condition { reason, message, .. } = found;
    Some(if message.is_empty() { reason.clone() } else { message.clone() })
}
