//! The chart as text: what helm refuses, and what it renders for the values that people use. Needs helm,
//! but no cluster.

use std::process::{Command, Output};

use berth_tests::ClusterTool;

const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/berth");
const KUBERNETES: &str = "1.36.3";

fn helm(verb: &[&str], args: &[&str]) -> Output {
    let helm = ClusterTool::locate().expect("helm").helm();
    let home = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(helm);
    command.args(verb).arg(CHART).args(["--kube-version", KUBERNETES]).args(args).env("HOME", home.path());
    command.output().expect("helm runs")
}

/// What helm renders, or why it refuses.
pub(crate) fn template(args: &[&str]) -> Result<String, String> {
    let output = helm(&["template", "berth"], &[&["--namespace", "berth-system"], args].concat());
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

/// The objects of a rendered text.
pub(crate) fn documents(rendered: &str) -> Vec<serde_json::Value> {
    let texts = rendered.split("\n---\n").filter(|text| text.lines().any(|line| line.starts_with("kind:")));
    texts.map(|text| serde_saphyr::from_str(text.trim_start_matches("---\n")).expect("an object")).collect()
}

fn golden(name: &str, args: &[&str]) {
    let rendered = template(args).expect("rendered");
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(concat!(env!("CARGO_MANIFEST_DIR"), "/golden/chart"));
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, rendered));
}

#[test]
fn chart_passes_the_strict_linter() {
    let output = helm(&["lint", "--strict"], &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn values_that_nobody_reads_are_refused_by_name() {
    let cases = [
        ("operators.replicas=2", "additional properties 'operators' not allowed"),
        ("operator.replica=2", "at '/operator': additional properties 'replica' not allowed"),
        ("operator.pdb.min=2", "at '/operator/pdb': additional properties 'min' not allowed"),
        ("scheduler.resources.request.cpu=1", "at '/scheduler/resources': additional properties 'request' not allowed"),
        ("agent.serviceAccount.nam=x", "at '/agent/serviceAccount': additional properties 'nam' not allowed"),
        ("runner.image.repo=x", "at '/runner/image': additional properties 'repo' not allowed"),
        ("metrics.podMonitor.every=1s", "at '/metrics/podMonitor': additional properties 'every' not allowed"),
        ("image.pullPolicy=Sometimes", "at '/image/pullPolicy': value must be one of"),
        ("image.digest=abc", "at '/image/digest': 'abc' does not match pattern"),
        ("agent.compat.dcg=true", "at '/agent/compat': additional properties 'dcg' not allowed"),
        ("alerts.runbook=x", "at '/alerts': additional properties 'runbook' not allowed"),
        ("agent.weightsRoots={srv}", "at '/agent/weightsRoots/0': 'srv' does not match pattern"),
        ("scheduler.store.type=redis", "at '/scheduler/store/type': value must be one of 'api', 'etcd'"),
        ("scheduler.store.type=etcd", "at '/scheduler/store/etcd/endpoints': minItems: got 0, want 1"),
        ("scheduler.store.etcd.endpoints={etcd:2379}", "at '/scheduler/store/etcd/endpoints/0': 'etcd:2379' does not"),
        ("scheduler.store.etcd.prefix=berth/", "at '/scheduler/store/etcd/prefix': 'berth/' does not match pattern"),
        (
            "scheduler.store.etcd.endpoints={https://etcd:2379}",
            "scheduler.store.etcd.tls.secretName: https://etcd:2379",
        ),
        ("operator.store.type=etcd", "at '/operator': additional properties 'store' not allowed"),
        (
            "operator.remediation.mode=Auto",
            "at '/operator/remediation/mode': value must be one of 'Advise', 'DryRun', 'Act'",
        ),
        ("ipFamily=IPv5", "at '/ipFamily': value must be one of 'IPv4', 'IPv6'"),
    ];
    for (value, sentence) in cases {
        let refusal = template(&["--set", value]).expect_err(value);
        assert!(refusal.contains(sentence), "{value}: {refusal}");
    }
}

#[test]
fn every_crd_is_kept_when_the_release_goes_and_can_be_left_out() {
    let rendered = template(&["--show-only", "templates/crds/crds.yaml"]).expect("rendered");
    let crds: Vec<&str> =
        rendered.split("\n---\n").filter(|text| text.contains("kind: CustomResourceDefinition")).collect();
    assert_eq!(crds.len(), 7);
    for crd in crds {
        assert!(crd.contains("helm.sh/resource-policy: keep"), "{crd}");
        assert!(crd.contains("app.kubernetes.io/part-of: berth"), "{crd}");
    }
    let without = template(&["--set", "crds.install=false"]).expect("rendered");
    assert!(!without.contains("kind: CustomResourceDefinition"));
}

#[test]
fn default_values_render_as_reviewed() {
    golden("default", &["--set", "crds.install=false,dashboards.enabled=false"]);
}

#[test]
fn production_values_render_as_reviewed() {
    let digest = format!("image.digest=sha256:{}", "0a".repeat(32));
    let values = [
        "image.registry=registry.example:5000",
        "image.repository=infra/berth",
        "runner.image.tag=v1.2.3",
        "global.imagePullSecrets={pull}",
        "agent.weightsRoots={/srv/weights,/mnt/weights}",
        "agent.hostLibraries={/usr/local/Ascend/driver}",
        "agent.runtimeClassName=nvidia",
        "ipFamily=IPv6",
        "operator.priorityClassName=platform",
        "runner.leaseReaders[0].kind=Group",
        "runner.leaseReaders[0].apiGroup=rbac.authorization.k8s.io",
        "runner.leaseReaders[0].name=system:serviceaccounts:models",
    ];
    let mut args = vec!["--set", &digest];
    args.extend(values.iter().flat_map(|value| ["--set", value]));
    let shown = ["templates/agent/daemonset.yaml", "templates/operator/deployment.yaml", "templates/runner/rbac.yaml"];
    args.extend(shown.iter().flat_map(|path| ["--show-only", path]));
    golden("production", &args);
}

#[test]
fn etcd_as_store_renders_as_reviewed() {
    let values = "scheduler.store.type=etcd,scheduler.store.etcd.endpoints={https://etcd-0.etcd:2379,https://etcd-1.etcd:2379},\
                  scheduler.store.etcd.tls.secretName=etcd-client,scheduler.store.etcd.credentialsSecret=etcd-user";
    golden("etcd", &["--set", values, "--show-only", "templates/scheduler/deployment.yaml"]);
    let plain = template(&["--set", "scheduler.store.type=api"]).expect("rendered");
    assert!(!plain.contains("BERTH_STORE"), "the default needs no word");
}

#[test]
fn monitors_appear_where_the_cluster_knows_them() {
    let plain = template(&[]).expect("rendered");
    assert!(!plain.contains("monitoring.coreos.com"));
    let knows = ["--api-versions", "monitoring.coreos.com/v1", "--show-only", "templates/monitors.yaml"];
    golden("monitors", &knows);
}

#[test]
fn pages_for_other_exporters_are_served_and_scraped_only_where_they_are_asked_for() {
    let render = |values: &[&str]| {
        let shown = ["--show-only", "templates/monitors.yaml", "--show-only", "templates/agent/daemonset.yaml"];
        let knows = ["--api-versions", "monitoring.coreos.com/v1"];
        let values: Vec<&str> = values.iter().flat_map(|value| ["--set", value]).collect();
        template(&[&shown[..], &knows, &values].concat()).expect("rendered")
    };
    assert!(!render(&[]).contains("BERTH_COMPATIBLE_METRICS") && !render(&[]).contains("/metrics/"));
    let both = render(&["agent.compat.dcgm=true", "agent.compat.npu=true"]);
    assert!(both.contains("value: \"dcgm,npu\""), "{both}");
    let npu = render(&["agent.compat.npu=true"]);
    assert!(npu.contains("value: \"npu\"") && npu.contains("path: /metrics/npu") && !npu.contains("/dcgm"), "{npu}");
    let agents = documents(&both).into_iter().find(|object| {
        object["kind"] == "PodMonitor"
            && object["metadata"]["labels"]["berth.dev/component"] != "runner"
            && object["spec"]["podMetricsEndpoints"].as_array().is_some_and(|endpoints| endpoints.len() == 3)
    });
    let paths: Vec<_> = agents.expect("a monitor of agents")["spec"]["podMetricsEndpoints"]
        .as_array()
        .expect("endpoints")
        .iter()
        .map(|endpoint| endpoint["path"].clone())
        .collect();
    assert_eq!(paths, ["/metrics", "/metrics/dcgm", "/metrics/npu"]);
}

#[test]
fn the_operator_may_taint_devices_where_the_cluster_knows_them_and_nodes_where_it_is_asked_to() {
    let rights =
        |args: &[&str]| template(&[&["--show-only", "templates/operator/rbac.yaml"], args].concat()).expect("rendered");
    assert!(!rights(&[]).contains("devicetaintrules") && rights(&[]).contains("nodes/status"));
    let knows = ["--api-versions", "resource.k8s.io/v1beta2/DeviceTaintRule"];
    assert!(rights(&knows).contains("devicetaintrules"));
    let none = rights(&[&knows[..], &["--set", "operator.remediation.nodeSigns=false"]].concat());
    assert!(!none.contains("devicetaintrules") && !none.contains("nodes/status"));
}

#[test]
fn the_smallest_install_has_no_agent_policy_or_budget() {
    let values = "crds.install=false,agent.enabled=false,admissionPolicies.enabled=false,networkPolicy.enabled=false,\
                  operator.replicas=1,scheduler.replicas=1";
    let rendered = template(&["--set", values]).expect("rendered");
    for kind in ["DaemonSet", "ValidatingAdmissionPolicy", "NetworkPolicy", "PodDisruptionBudget"] {
        assert!(!rendered.contains(&format!("kind: {kind}\n")), "{kind}");
    }
    assert_eq!(rendered.matches("kind: Deployment\n").count(), 2);
}
