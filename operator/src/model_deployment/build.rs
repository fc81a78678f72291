//! Step 3: the objects as they should be. Pure: the same inputs give the same objects, byte for byte.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use berth_crds::{
    ExpertPlacement, ExpertPlacementSpec, LABEL_DEPLOYMENT, LABEL_INSTANCE, LABEL_MODE, LABEL_PLACEMENT,
    LABEL_TEMPLATE, TAINT_NATIVE,
    expert_placement::ProductSpeed,
    model_profile::{Basis, Throughput},
};
use berth_types::{Bytes, TokensPerSecond};
use k8s_openapi::{api::apps::v1::Deployment, apimachinery::pkg::apis::meta::v1::OwnerReference};
use kube::{Resource, ResourceExt, api::ObjectMeta};

use crate::fleet::kv_budget;

use super::{
    dereference::Dereferenced,
    rollout::{Instance, SERVE_PORT, Steps, observe, roll},
    validate::{Accepted, Checked, Roots},
};

/// Port of the runner's admin endpoints.
const ADMIN_PORT: u16 = 8081;
/// What a runner needs besides weights and cache.
const PROGRAM: Bytes = Bytes(64 << 20);

/// What every runner is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunnerConfig {
    /// Image of the runner's container.
    pub image: String,
    /// When the image is pulled: `Always`, `IfNotPresent` or `Never`.
    pub image_pull_policy: String,
    /// ServiceAccount of the runner's pods; empty = the namespace's default.
    pub service_account: String,
    /// The scheduler's Lease, `<namespace>/<name>`.
    pub scheduler_lease: String,
    /// Where runners export traces to; empty = nowhere.
    pub otlp_endpoint: String,
    /// Folders of the nodes that weights may lie in.
    pub roots: Roots,
    /// Of these, those that runners mount by a PersistentVolumeClaim of their own namespace instead of from the node:
    /// what the restricted Pod Security Standard admits.
    pub claims: BTreeMap<PathBuf, String>,
}

/// One instance as it should be.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Its placement.
    pub placement: ExpertPlacement,
    /// Its runner.
    pub runner: Deployment,
}

/// One instance that should end: first its runner, then, when no pod of it is left, its placement.
#[derive(Clone, Debug)]
pub struct Ending {
    /// Its placement.
    pub placement: Arc<ExpertPlacement>,
    /// Its runner, if there still is one.
    pub runner: Option<Arc<Deployment>>,
    /// Pods that still run.
    pub pods: usize,
}

/// Everything the next step should make true.
#[derive(Clone, Debug, Default)]
pub struct Prepared {
    /// Instances to make or keep.
    pub wanted: Vec<Wanted>,
    /// Names of instances that stay as they are for now.
    pub left: Vec<String>,
    /// Instances to end.
    pub ending: Vec<Ending>,
}

/// Builds the objects. Nothing is made for a spec that was rejected, and nothing that runs is touched then.
#[must_use]
pub fn build(found: &Dereferenced, checked: &Checked, config: &RunnerConfig) -> Prepared {
    let instances = observe(&found.placements, &found.pods);
    let replicas = u32::try_from(found.deployment.spec.replicas).unwrap_or(0);
    let Ok(accepted) = &checked.outcome else {
        let (left, ended): (Vec<_>, Vec<_>) = instances.iter().partition(|instance| instance.index < replicas);
        let left = left.into_iter().map(|instance| instance.name.clone()).collect();
        return Prepared { wanted: Vec::new(), left, ending: ended.into_iter().map(|i| ending(found, i)).collect() };
    };
    let steps = roll(replicas, found.grant.verdict.allowed, &accepted.template, &instances);
    let Steps { keep, keep_old, create, retire } = steps;
    let named = |name: &String| instances.iter().find(|instance| instance.name == *name);
    let kept = keep.iter().filter_map(named).map(|instance| (instance.index, Some(&instance.placement)));
    let all = kept.chain(create.into_iter().map(|index| (index, None)));
    let wanted = all
        .map(|(index, live)| {
            let placement = placement(found, accepted, index, live);
            let runner = runner(found, config, &placement);
            Wanted { placement, runner }
        })
        .collect();
    let ending = retire.iter().filter_map(named).map(|instance| ending(found, instance)).collect();
    Prepared { wanted, left: keep_old, ending }
}

fn ending(found: &Dereferenced, instance: &Instance) -> Ending {
    let runner = found.runners.get(&instance.name).cloned();
    Ending { placement: Arc::clone(&instance.placement), runner, pods: instance.pods }
}

fn labels(found: &Dereferenced, accepted: &Accepted, name: &str, index: &str) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", "berth-runner"),
        ("app.kubernetes.io/instance", name),
        ("app.kubernetes.io/component", "runner"),
        ("app.kubernetes.io/part-of", "berth"),
        ("app.kubernetes.io/managed-by", "berth-operator"),
        ("berth.dev/component", "runner"),
        (LABEL_DEPLOYMENT, &found.deployment.name_any()),
        (LABEL_PLACEMENT, name),
        (LABEL_TEMPLATE, &accepted.template),
        (LABEL_INSTANCE, index),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .collect()
}

fn metadata(found: &Dereferenced, name: String, labels: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        namespace: found.deployment.namespace(),
        owner_references: found.deployment.controller_owner_ref(&()).map(|owner| {
            // Blocking the owner's deletion would need a right on its finalizers.
            vec![OwnerReference { block_owner_deletion: None, ..owner }]
        }),
        labels: Some(labels),
        name: Some(name),
        ..ObjectMeta::default()
    }
}

fn placement(
    found: &Dereferenced,
    accepted: &Accepted,
    index: u32,
    live: Option<&Arc<ExpertPlacement>>,
) -> ExpertPlacement {
    let (spec, profile) = (&found.deployment.spec, &accepted.profile.spec);
    let name = format!("{}-{}-{index}", found.deployment.name_any(), accepted.template);
    // A grant stays what it was while the instance lives.
    let per_instance = Some(found.grant.verdict.per_instance).filter(|devices| *devices > 0);
    let granted = live.and_then(|placement| placement.spec.granted_devices).or(per_instance);
    let labels = labels(found, accepted, &name, &index.to_string());
    ExpertPlacement {
        metadata: metadata(found, name, labels),
        spec: ExpertPlacementSpec {
            model: spec.model.clone(),
            geometry: profile.geometry.clone(),
            vendor_formats: profile.vendor_formats.clone(),
            non_expert_bytes: profile.non_expert_bytes,
            kv_budget_bytes: kv_budget(profile),
            expert_loads: profile.expert_loads.clone(),
            speeds: speeds(&profile.throughput),
            weights: spec.weights.clone(),
            devices: spec.devices.clone(),
            redundancy: spec.redundancy.clone(),
            granted_devices: granted.filter(|_| spec.queue.is_some()),
            priority: found.grant.verdict.priority,
            paused: spec.paused,
        },
        status: None,
    }
}

/// How fast one device of each product is, from the figures of whole instances: of several for one product the best
/// founded, and of these the one with the fewest devices, in which the network counts least.
fn speeds(throughput: &[Throughput]) -> Vec<ProductSpeed> {
    let founded = |one: &Throughput| match one.basis {
        Basis::Measured => 0,
        Basis::Calibrated => 1,
        Basis::Modelled => 2,
    };
    let mut sorted: Vec<&Throughput> = throughput.iter().filter(|one| one.devices > 0).collect();
    sorted.sort_by(|one, other| {
        let key = |one: &Throughput| (one.product.clone(), founded(one), one.devices);
        key(one).cmp(&key(other))
    });
    sorted.dedup_by(|one, other| one.product == other.product);
    let speed = |one: &Throughput| ProductSpeed {
        product: one.product.clone(),
        tokens_per_second: TokensPerSecond::try_from(one.tokens_per_second.get() / f64::from(one.devices))
            .unwrap_or_default(),
        basis: one.basis,
    };
    sorted.into_iter().map(speed).collect()
}

/// Bytes as Kubernetes prints them back: the largest binary suffix that divides them, rounded up to MiB.
fn quantity(bytes: Bytes) -> String {
    let mebibytes = bytes.get().div_ceil(1 << 20).max(1);
    match mebibytes {
        whole if whole.is_multiple_of(1 << 20) => format!("{}Ti", whole >> 20),
        whole if whole.is_multiple_of(1 << 10) => format!("{}Gi", whole >> 10),
        whole => format!("{whole}Mi"),
    }
}

fn runner(found: &Dereferenced, config: &RunnerConfig, placement: &ExpertPlacement) -> Deployment {
    let name = placement.name_any();
    let labels = placement.labels().clone();
    let selector: BTreeMap<_, _> = [(LABEL_PLACEMENT.to_owned(), name.clone())].into();
    let spec = serde_json::json!({
        "replicas": 1,
        // The old pod's cache is lost either way, and two runners of one placement would count as one.
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": selector},
        "template": {
            "metadata": {"labels": labels},
            "spec": pod(found, config, placement),
        },
    });
    Deployment {
        metadata: metadata(found, name, labels),
        // The value above is of this type; a mistake in it fails every test of this file.
        spec: serde_json::from_value(spec).ok(),
        status: None,
    }
}

fn pod(found: &Dereferenced, config: &RunnerConfig, placement: &ExpertPlacement) -> serde_json::Value {
    let roots: Vec<String> = config.roots.0.iter().map(|root| root.display().to_string()).collect();
    let claim = |root: &str| config.claims.get(Path::new(root));
    let (volumes, mounts): (Vec<_>, Vec<_>) =
        roots.iter().enumerate().map(|(index, root)| weights(index, root, claim(root))).unzip();
    let memory = placement.spec.non_expert_bytes.plus(placement.spec.kv_budget_bytes).plus(PROGRAM);
    let probe = |path: &str, period: u32, failures: u32| {
        serde_json::json!({"httpGet": {"path": path, "port": "admin"}, "periodSeconds": period,
                           "timeoutSeconds": 3, "failureThreshold": failures})
    };
    let mut pod = serde_json::json!({
        "terminationGracePeriodSeconds": 30,
        "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532,
                            "seccompProfile": {"type": "RuntimeDefault"}},
        "tolerations": [{"key": TAINT_NATIVE, "operator": "Exists", "effect": "NoSchedule"}],
        "volumes": volumes,
        "containers": [{
            "name": "runner",
            "image": config.image,
            "imagePullPolicy": config.image_pull_policy,
            "args": ["runner"],
            "env": environment(found, config, placement, &roots),
            "ports": [{"name": "serve", "containerPort": SERVE_PORT, "protocol": "TCP"},
                      {"name": "admin", "containerPort": ADMIN_PORT, "protocol": "TCP"}],
            "startupProbe": probe("/startupz", 1, 120),
            "livenessProbe": probe("/livez", 10, 3),
            "readinessProbe": probe("/readyz", 1, 2),
            "resources": {"requests": {"cpu": "100m", "memory": quantity(memory)}},
            "volumeMounts": mounts,
            "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                                "capabilities": {"drop": ["ALL"]}},
        }],
    });
    if roots.iter().any(|root| claim(root).is_none()) {
        // Nodes that host have the weights; others need not.
        pod["affinity"] = serde_json::json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [
                {"matchExpressions": [{"key": LABEL_MODE, "operator": "In", "values": ["native"]}]}]}}});
    }
    if !config.service_account.is_empty() {
        pod["serviceAccountName"] = serde_json::json!(config.service_account);
    }
    pod
}

/// The volume of a folder of weights, by claim or from the node, and where it is seen.
fn weights(index: usize, root: &str, claim: Option<&String>) -> (serde_json::Value, serde_json::Value) {
    let name = format!("weights-{index}");
    let volume = match claim {
        Some(claim) => {
            serde_json::json!({"name": name, "persistentVolumeClaim": {"claimName": claim, "readOnly": true}})
        }
        None => serde_json::json!({"name": name, "hostPath": {"path": root, "type": "Directory"}}),
    };
    (volume, serde_json::json!({"name": name, "mountPath": root, "readOnly": true}))
}

fn environment(
    found: &Dereferenced,
    config: &RunnerConfig,
    placement: &ExpertPlacement,
    roots: &[String],
) -> Vec<serde_json::Value> {
    let space = found.deployment.namespace().unwrap_or_default();
    let weights = &placement.spec.weights;
    let field = |name: &str, path: &str| serde_json::json!({"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}});
    let value = |name: &str, value: String| serde_json::json!({"name": name, "value": value});
    let mut variables = vec![
        field("BERTH_POD_NAME", "metadata.name"),
        field("BERTH_POD_NAMESPACE", "metadata.namespace"),
        field("BERTH_POD_IP", "status.podIP"),
        value("BERTH_PLACEMENT", format!("{space}/{}", placement.name_any())),
        value("BERTH_WEIGHTS", weights.uri.clone()),
        value("BERTH_WEIGHTS_ROOTS", roots.join(",")),
        value("BERTH_CACHE", placement.spec.kv_budget_bytes.get().to_string()),
        value("BERTH_SCHEDULER_LEASE", config.scheduler_lease.clone()),
        value("BERTH_LISTEN", format!("$(BERTH_POD_IP):{SERVE_PORT}")),
        value("BERTH_ADMIN_LISTEN", format!("$(BERTH_POD_IP):{ADMIN_PORT}")),
    ];
    if !weights.digest.is_empty() {
        variables.push(value("BERTH_WEIGHTS_DIGEST", weights.digest.clone()));
    }
    if !config.otlp_endpoint.is_empty() {
        variables.push(value("BERTH_OTLP_ENDPOINT", config.otlp_endpoint.clone()));
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_deployment::fixtures::{add, config, found, instance, template};
    use serde_json::json;

    #[test]
    fn objects_of_an_instance_are_as_written() {
        let (found, checked) = found(
            &json!({"queue": "batch", "weights": {"uri": "file:///models/v3",
            "digest": format!("sha256:{}", "a".repeat(64))}}),
            1,
        );
        let mut prepared = build(&found, &checked, &config());
        let Wanted { placement, runner } = prepared.wanted.remove(0);
        insta::assert_json_snapshot!("placement", placement);
        insta::assert_json_snapshot!("runner", runner);
    }

    #[test]
    fn a_claim_takes_the_place_of_the_node_s_folder() {
        let (found, checked) = found(&json!({}), 1);
        let pod = |claims| {
            let config = RunnerConfig { claims, ..config() };
            let runner = build(&found, &checked, &config).wanted.remove(0).runner;
            serde_json::to_value(runner.spec.unwrap().template.spec.unwrap()).unwrap()
        };
        let of_node = pod(BTreeMap::new());
        assert_eq!(of_node["volumes"][0]["hostPath"]["path"], "/models");
        assert!(of_node["affinity"].is_object(), "{of_node}");
        let claimed = pod(BTreeMap::from([("/models".into(), "weights".to_owned())]));
        let claim = json!({"name": "weights-0", "persistentVolumeClaim": {"claimName": "weights", "readOnly": true}});
        assert_eq!(claimed["volumes"], json!([claim]));
        assert_eq!(claimed["containers"][0]["volumeMounts"], of_node["containers"][0]["volumeMounts"]);
        assert!(claimed["affinity"].is_null(), "it finds its weights on any node");
    }

    #[test]
    fn building_twice_gives_the_same() {
        let (found, checked) = found(&json!({"replicas": 3}), 3);
        let text = |prepared: Prepared| format!("{:?}", prepared.wanted);
        assert_eq!(text(build(&found, &checked, &config())), text(build(&found, &checked, &config())));
    }

    #[test]
    fn only_granted_instances_are_made() {
        let (found, checked) = found(&json!({"replicas": 3}), 2);
        assert_eq!(build(&found, &checked, &config()).wanted.len(), 2);
    }

    #[test]
    fn a_rejected_spec_touches_nothing_that_runs() {
        let (mut found, _) = found(&json!({"replicas": 1}), 1);
        add(&mut found, instance("old", 0, true));
        add(&mut found, instance("old", 1, true));
        let rejected = crate::model_deployment::fixtures::found(&json!({"serving": {"mode": "engine"}}), 1).1;
        let prepared = build(&found, &rejected, &config());
        assert_eq!((prepared.wanted.len(), prepared.left), (0, vec!["v3-old-0".to_owned()]));
        assert_eq!(prepared.ending.len(), 1);
    }

    #[test]
    fn a_grant_stays_what_it_was_while_the_instance_lives() {
        let (mut found, checked) = found(&json!({"queue": "batch"}), 1);
        let (placement, pod) = instance(&template(&checked), 0, true);
        let mut placement = Arc::unwrap_or_clone(placement);
        placement.spec.granted_devices = Some(9);
        add(&mut found, (Arc::new(placement), pod));
        assert_eq!(build(&found, &checked, &config()).wanted[0].placement.spec.granted_devices, Some(9));
    }

    #[test]
    fn a_device_is_as_fast_as_its_part_of_the_best_founded_instance() {
        let figure = |product: &str, devices: u32, rate: f64, basis: Basis| Throughput {
            product: product.to_owned(),
            devices,
            tokens_per_second: TokensPerSecond::try_from(rate).unwrap(),
            basis,
            source: "a test".to_owned(),
        };
        let figures = [
            figure("h200", 16, 3200.0, Basis::Modelled),
            figure("h200", 8, 1200.0, Basis::Measured),
            figure("h200", 32, 4000.0, Basis::Measured),
            figure("910c", 16, 1600.0, Basis::Modelled),
        ];
        let speeds: Vec<_> =
            speeds(&figures).into_iter().map(|one| (one.product, one.tokens_per_second.get(), one.basis)).collect();
        let expected = [("910c".to_owned(), 100.0, Basis::Modelled), ("h200".to_owned(), 150.0, Basis::Measured)];
        assert_eq!(speeds, expected);
    }

    #[test]
    fn quantities_read_back_as_written() {
        for (bytes, text) in
            [(1, "1Mi"), (64 << 20, "64Mi"), (1 << 30, "1Gi"), ((1 << 30) + 1, "1025Mi"), (1 << 40, "1Ti")]
        {
            assert_eq!(quantity(Bytes(bytes)), text);
        }
    }
}
