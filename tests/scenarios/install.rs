//! The chart installed with helm on a cluster of its own: pods become ready, a killed leader is followed, what
//! the admission policies forbid is refused to real tokens, and uninstalling leaves only what is kept.

mod named;
mod rights;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::{Duration, Instant},
};

use berth_tests::{
    ControlPlane, ProcessKubelet,
    control_plane::{ControlPlaneConfig, target_dir},
    process_kubelet::{KubeletConfig, SimulatedNode},
};
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    coordination::v1::Lease,
    core::v1::{Pod, ServiceAccount},
};
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, ListParams, ObjectMeta, Patch, PatchParams, PostParams},
    core::GroupVersionKind,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::cluster::{eventually, has};

const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/berth");
const NAMESPACE: &str = "berth-system";
const USERS: &str = "system:serviceaccount:berth-system:berth-";
const NODES: [&str; 2] = ["gpu-1", "gpu-2"];

struct Release {
    // Dropped in this order: pods end before the API server does.
    kubelet: ProcessKubelet,
    plane: ControlPlane,
    client: Client,
}

impl Release {
    async fn install() -> Self {
        let plane = ControlPlane::start(ControlPlaneConfig::named("install")).await.expect("a control plane");
        let binary = berth();
        let nodes = NODES.map(|name| SimulatedNode {
            labels: BTreeMap::from([("berth.dev/mode".into(), "native".into())]),
            ..SimulatedNode::named(name)
        });
        let images = ["berth:dev", "berth-agent:dev"].map(|image| (image.to_owned(), binary.clone())).into();
        let config = KubeletConfig { nodes: nodes.into(), images, ..KubeletConfig::default() };
        let kubelet = ProcessKubelet::start(&plane, config).await.expect("a kubelet");
        let client = plane.client().expect("a client");
        let release = Self { kubelet, plane, client };
        release.helm(&["install", "berth", CHART, "--create-namespace", "--wait"], "info").await;
        release
    }

    async fn helm(&self, verb: &[&str], log: &str) {
        let log = format!("log={log}");
        let values = ["--namespace", NAMESPACE, "--set", "image.tag=dev", "--set", &log, "--timeout", "120s"];
        self.plane.helm(&[verb, &values].concat()).await.expect("helm");
    }

    async fn pods(&self) -> Vec<Pod> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), NAMESPACE);
        pods.list(&ListParams::default()).await.expect("pods").items
    }

    /// Waits until two pods of each part are ready, one agent on each node, and no other pod is there.
    async fn ready(&self) -> Vec<Pod> {
        eventually("six ready pods", || async {
            let pods = self.pods().await;
            let of = |part: &str| pods.iter().filter(|pod| component(pod) == part && has(pod, "Ready")).count();
            let nodes =
                pods.iter().filter(|pod| component(pod) == "agent").filter_map(node_of).collect::<BTreeSet<_>>();
            let all = ["operator", "scheduler", "agent"].map(of) == [2, 2, 2] && pods.len() == 6 && nodes.len() == 2;
            all.then_some(pods)
        })
        .await
    }

    async fn lease(&self, name: &str) -> Option<(String, i32)> {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), NAMESPACE);
        let spec = leases.get_opt(name).await.ok()??.spec?;
        let holder = spec.holder_identity.filter(|holder| !holder.is_empty())?;
        Some((holder, spec.lease_transitions?))
    }

    /// Kills the leader of `part` as a crash would, and waits for the other replica to lead.
    async fn fail_over(&self, part: &str) -> Duration {
        let name = format!("berth-{part}");
        let (holder, term) = eventually("a leader", || self.lease(&name)).await;
        let pod = holder.split_once('@').expect("<pod>@<ip:port>").0.to_owned();
        let killed = Instant::now();
        self.kubelet.kill_pod_container(NAMESPACE, &pod, part, Signal::SIGKILL).expect("killed");
        let (next, its_term) =
            eventually("another leader", || async { self.lease(&name).await.filter(|(_, now)| *now > term) }).await;
        let took = killed.elapsed();
        assert_ne!(next, holder, "the other replica takes over");
        assert_eq!(its_term, term + 1);
        took
    }

    /// A client with the service account of `part`; bound to `pod` as the kubelet binds tokens, or to nothing.
    async fn client_of(&self, part: &str, pod: Option<&Pod>) -> Client {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), NAMESPACE);
        let bound = pod.map(|pod| BoundObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
        });
        let spec = TokenRequestSpec { bound_object_ref: bound, expiration_seconds: Some(600), ..Default::default() };
        let request = TokenRequest { metadata: ObjectMeta::default(), spec: Some(spec), status: None };
        let answer = accounts.create_token_request(&format!("berth-{part}"), &PostParams::default(), &request).await;
        let token = answer.expect("a token").status.and_then(|status| status.token).expect("a token");
        let mut config = self.plane.client_config().clone();
        config.auth_info = kube::config::AuthInfo { token: Some(token.into()), ..Default::default() };
        Client::try_from(config).expect("a client")
    }

    /// Calls of our service accounts that were refused, from the audit log: who, verb, what.
    fn forbidden(&self) -> BTreeSet<String> {
        let log = std::fs::read_to_string(self.plane.audit_log()).expect("an audit log");
        let calls = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        // What a test tries with a part's token is not the part's call.
        let parts = calls.filter(|call| call["userAgent"] != rights::USER_AGENT);
        let refused = parts.filter(|call| call["responseStatus"]["code"] == 403);
        let text = |call: &Value, path: &str| call.pointer(path).and_then(Value::as_str).unwrap_or("").to_owned();
        let ours = refused.filter(|call| text(call, "/user/username").starts_with(USERS));
        ours.map(|call| {
            let resource = ["/objectRef/resource", "/objectRef/subresource"].map(|path| text(&call, path)).join("/");
            format!("{} {} {resource}", text(&call, "/user/username"), text(&call, "/verb"))
        })
        .collect()
    }

    /// Everything in the release's namespace, and everything of ours elsewhere, but for objects of kept kinds.
    async fn left(&self) -> Vec<String> {
        let list = async |args: &[&str]| self.plane.kubectl(args).await.expect("a list");
        let mut found = Vec::new();
        for (scope, rest) in [("true", ["-n", NAMESPACE]), ("false", ["-l", "app.kubernetes.io/part-of=berth"])] {
            let namespaced = format!("--namespaced={scope}");
            let kinds = list(&["api-resources", "--verbs=list", &namespaced, "-o", "name"]).await;
            let kinds = kinds.lines().filter(|kind| !kind.starts_with("events") && !kind.ends_with("berth.dev"));
            let kinds = kinds.collect::<Vec<_>>().join(",");
            let args = [&["get", &kinds, "--ignore-not-found", "-o", "name"], rest.as_slice()].concat();
            found.extend(list(&args).await.lines().map(str::to_owned));
        }
        found.retain(|name| !KEPT.iter().any(|kept| name.starts_with(kept)));
        found
    }
}

/// What every namespace has, and the CRDs.
const KEPT: &[&str] =
    &["configmap/kube-root-ca.crt", "serviceaccount/default", "customresourcedefinition.apiextensions.k8s.io/"];

/// The binary that was built beside this test.
fn berth() -> PathBuf {
    let binary = target_dir().join("debug/berth");
    assert!(binary.is_file(), "{} is missing: run cargo build -p berth first", binary.display());
    binary
}

fn component(pod: &Pod) -> &str {
    pod.metadata.labels.as_ref().and_then(|labels| labels.get("berth.dev/component")).map_or("", String::as_str)
}

fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

fn nodes(client: Client) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk("berth.dev", "v1alpha1", "AcceleratorNode");
    Api::all_with(client, &ApiResource::from_gvk(&kind))
}

fn node(name: &str, spec: Value) -> DynamicObject {
    let object = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "AcceleratorNode", "metadata": {"name": name}, "spec": spec});
    serde_json::from_value(object).expect("an object")
}

fn condition(kind: &str) -> Value {
    json!({"type": kind, "status": "True", "reason": "Seen", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"})
}

async fn apply_status(client: &Client, manager: &str, name: &str, status: Value) -> Result<(), String> {
    let patch = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "AcceleratorNode", "status": status});
    // By force, so that a conflict of managers is never taken for a refusal.
    let params = PatchParams::apply(manager).force();
    let answer = nodes(client.clone()).patch_status(name, &params, &Patch::Apply(patch)).await;
    answer.map(|_| ()).map_err(|error| refusal(&error))
}

async fn create(client: &Client, name: &str, spec: Value) -> Result<(), String> {
    let answer = nodes(client.clone()).create(&PostParams::default(), &node(name, spec)).await;
    answer.map(|_| ()).map_err(|error| refusal(&error))
}

/// `<code> <sentence>`.
fn refusal(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => format!("{} {}", status.code, status.message),
        other => other.to_string(),
    }
}

fn assert_refused(answer: Result<(), String>, sentence: &str) {
    let refusal = answer.expect_err(sentence);
    assert!(refusal.starts_with("403 ") && refusal.contains(sentence), "{refusal}");
}

#[tokio::test]
async fn a_release_lives_from_install_to_uninstall() {
    let release = Release::install().await;
    let pods = release.ready().await;
    assert_eq!(release.forbidden(), BTreeSet::new(), "what a part asks for, its role must allow");
    an_agent_writes_only_its_own_node(&release, &pods).await;
    the_scheduler_writes_only_reachable(&release, &pods).await;
    rights::a_node_s_token_can_write_nothing_else(&release, &pods).await;
    named::an_agent_s_token_writes_nothing_by_name(&release, &pods).await;
    rights::all_pods_but_the_agent_s_are_restricted(&release).await;

    let (operator, scheduler) = tokio::join!(release.fail_over("operator"), release.fail_over("scheduler"));
    for took in [operator, scheduler] {
        println!("failover took {took:.1?}");
        assert!(took <= Duration::from_secs(20), "failover took {took:?}");
    }
    release.ready().await;

    let of_policies = |call: &String| call.contains("acceleratornodes");
    let refused: Vec<String> = release.forbidden().into_iter().filter(|call| !of_policies(call)).collect();
    assert_eq!(refused, Vec::<String>::new(), "what a part asks for, its role must allow");

    release.helm(&["upgrade", "berth", CHART, "--wait"], "debug").await;
    let upgraded = release.ready().await;
    let name = |pod: &Pod| pod.metadata.name.clone();
    let stayed = upgraded.iter().filter(|pod| pods.iter().any(|old| name(old) == name(pod)));
    assert_eq!(stayed.map(component).collect::<Vec<_>>(), ["agent", "agent"], "agents are rolled by the operator");

    // What is looked for afterwards is found before.
    let installed = release.left().await;
    for name in [
        "deployment.apps/berth-operator",
        "lease.coordination.k8s.io/berth-scheduler",
        "clusterrole.rbac.authorization.k8s.io/berth-agent",
    ] {
        assert!(installed.iter().any(|found| found == name), "{name} in {installed:?}");
    }
    release.plane.helm(&["uninstall", "berth", "--namespace", NAMESPACE, "--wait"]).await.expect("uninstalled");
    eventually("nothing left", || async { release.left().await.is_empty().then_some(()) }).await;
    assert_eq!(release.kubelet.running(), Vec::new());
    let crds = release.plane.kubectl(&["get", "crd", "-l", "app.kubernetes.io/part-of=berth", "-o", "name"]).await;
    assert_eq!(crds.expect("CRDs").lines().count(), 7);
}

/// Tokens of a real pod, as a kubelet gives them.
async fn an_agent_writes_only_its_own_node(release: &Release, pods: &[Pod]) {
    let agent = pods.iter().find(|pod| component(pod) == "agent").expect("an agent");
    let own = node_of(agent).expect("a node").to_owned();
    let other = NODES.into_iter().find(|name| *name != own).expect("another node");
    let client = release.client_of("agent", Some(agent)).await;
    let foreign = format!("this token is bound to node {own}, not to {other}");
    // The agents may have made them already; the policy speaks either way.
    for name in NODES {
        let _ = nodes(release.client.clone()).delete(name, &Default::default()).await;
    }
    assert_refused(create(&client, other, json!({})).await, &foreign);
    assert_refused(create(&client, &own, json!({"drain": true})).await, "an agent writes its status");
    // The agents themselves may be faster.
    let is_there = |answer: Result<(), String>| answer.err().is_none_or(|why| why.starts_with("409 "));
    for (writer, name) in [(&client, own.as_str()), (&release.client, other)] {
        assert!(is_there(create(writer, name, json!({})).await), "{name}");
    }
    let status = json!({"bootId": "b", "sequence": 1, "conditions": [condition("Ready")]});
    apply_status(&client, "berth-agent", &own, status.clone()).await.expect("its own status");
    assert_refused(apply_status(&client, "berth-agent", other, status.clone()).await, &foreign);
    let unbound = release.client_of("agent", None).await;
    let sentence = "this token is bound to no node";
    assert_refused(apply_status(&unbound, "berth-agent", &own, status).await, sentence);
    let drain = Patch::Merge(json!({"spec": {"drain": true}}));
    let patched = nodes(client).patch(&own, &PatchParams::default(), &drain).await;
    assert_refused(patched.map(|_| ()).map_err(|error| refusal(&error)), "cannot patch resource");
}

async fn the_scheduler_writes_only_reachable(release: &Release, pods: &[Pod]) {
    let scheduler = pods.iter().find(|pod| component(pod) == "scheduler").expect("a scheduler");
    let client = release.client_of("scheduler", Some(scheduler)).await;
    let agent = pods.iter().find(|pod| component(pod) == "agent").expect("an agent");
    let name = node_of(agent).expect("a node");
    let write = async |status: Value| apply_status(&client, "berth-scheduler", name, status).await;
    write(json!({"conditions": [condition("Reachable")]})).await.expect("its condition");
    let rest = "the rest of its status is the agent's";
    assert_refused(write(json!({"agent": "0", "conditions": [condition("Reachable")]})).await, rest);
    let others = "its other conditions are the agent's";
    assert_refused(write(json!({"conditions": [condition("Reachable"), condition("Cooled")]})).await, others);
    assert_refused(create(&client, "gpu-3", json!({})).await, "cannot create resource");
}
