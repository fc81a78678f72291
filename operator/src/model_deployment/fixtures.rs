//! A deployment and its surroundings for the tests of the steps.

use std::{collections::BTreeMap, sync::Arc};

use berth_crds::{
    ExpertPlacement, LABEL_DEPLOYMENT, LABEL_INSTANCE, LABEL_PLACEMENT, LABEL_TEMPLATE, ModelDeployment, ModelProfile,
};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::{
    build::RunnerConfig,
    dereference::Dereferenced,
    validate::{Checked, Roots, validate},
};
use crate::{allocation::Verdict, capacity::Grant, fleet};

pub(crate) fn config() -> RunnerConfig {
    RunnerConfig {
        image: "registry/berth:1".to_owned(),
        image_pull_policy: "IfNotPresent".to_owned(),
        service_account: String::new(),
        scheduler_lease: "berth/berth-scheduler".to_owned(),
        otlp_endpoint: String::new(),
        roots: Roots(vec!["/models".into()]),
        claims: BTreeMap::new(),
    }
}

pub(crate) fn deployment(more: &Value) -> Arc<ModelDeployment> {
    let mut object = json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "ModelDeployment",
        "metadata": {"name": "v3", "namespace": "models", "uid": "u-1", "generation": 3},
        "spec": {"model": "v3-tiny", "weights": {"uri": "file:///models/v3"}},
    });
    for (key, value) in more.as_object().unwrap() {
        object["spec"][key] = value.clone();
    }
    Arc::new(serde_json::from_value(object).unwrap())
}

/// What a pass finds for `more`, with `allowed` instances granted.
pub(crate) fn found(more: &Value, allowed: u32) -> (Dereferenced, Checked) {
    let deployment = deployment(more);
    let profile = Arc::new(ModelProfile::new("v3-tiny", fleet::tests::profile()));
    let checked = validate(&deployment, Some(Arc::clone(&profile)), &config().roots);
    let verdict = Verdict { allowed, per_instance: 2, devices: allowed * 2, priority: 7, waiting: None };
    let grant = Grant { uid: Some("u-1".to_owned()), generation: Some(3), verdict };
    let found = Dereferenced {
        deployment,
        profile: Some(profile),
        placements: Vec::new(),
        runners: BTreeMap::new(),
        pods: Vec::new(),
        grant,
        products: [("n1/0.0".to_owned(), "910c".to_owned())].into(),
    };
    (found, checked)
}

pub(crate) fn template(checked: &Checked) -> String {
    checked.outcome.as_ref().unwrap().template.clone()
}

/// A placement as the cluster would hold it, and its runner's pod.
pub(crate) fn instance(template: &str, index: u32, ready: bool) -> (Arc<ExpertPlacement>, Arc<Pod>) {
    let name = format!("v3-{template}-{index}");
    let labels = json!({LABEL_DEPLOYMENT: "v3", LABEL_PLACEMENT: name, LABEL_TEMPLATE: template,
                        LABEL_INSTANCE: index.to_string()});
    let assignment = json!({"epoch": 1, "revision": 1, "digest": "sha256:0", "devices": ["n1/0.0"]});
    let placement = json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "ExpertPlacement",
        "metadata": {"name": name, "namespace": "models", "labels": labels},
        "spec": {"model": "v3-tiny", "geometry": fleet::tests::profile().geometry, "nonExpertBytes": 1,
                 "weights": {"uri": "file:///models/v3"}},
        "status": {"servingRevision": u32::from(ready), "assignment": assignment, "slotsTotal": 16, "slotsReady": 16},
    });
    let status = if ready { "True" } else { "False" };
    let pod = json!({"metadata": {"name": name, "labels": labels},
        "status": {"podIP": "10.0.0.9", "conditions": [{"type": "Ready", "status": status}]}});
    (Arc::new(serde_json::from_value(placement).unwrap()), Arc::new(serde_json::from_value(pod).unwrap()))
}

pub(crate) fn add(found: &mut Dereferenced, instance: (Arc<ExpertPlacement>, Arc<Pod>)) {
    found.placements.push(instance.0);
    found.pods.push(instance.1);
}
