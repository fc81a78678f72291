//! Writes with an agent's token on objects that are there, by their names: a role may allow one object by its name
//! alone, and what is tried on nobody would not find that. All are dry runs.

use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use serde_json::{Value, json};

use super::{NODES, Release, component, node_of, rights::USER_AGENT};

const ACCELERATORS: &str = "/apis/berth.dev/v1alpha1/acceleratornodes";
const APPLY: &str = "application/apply-patch+yaml";
const MERGE: &str = "application/merge-patch+json";
const JSON: &str = "application/json";

/// Objects of the release and of the cluster that whoever has a node would like to write.
const OBJECTS: [&str; 12] = [
    "/apis/coordination.k8s.io/v1/namespaces/berth-system/leases/berth-scheduler",
    "/apis/coordination.k8s.io/v1/namespaces/berth-system/leases/berth-operator",
    "/apis/apps/v1/namespaces/berth-system/deployments/berth-operator",
    "/apis/apps/v1/namespaces/berth-system/deployments/berth-operator/scale",
    "/apis/apps/v1/namespaces/berth-system/daemonsets/berth-agent",
    "/api/v1/namespaces/berth-system/serviceaccounts/berth-operator",
    "/api/v1/namespaces/berth-system/serviceaccounts/berth-operator/token",
    "/apis/rbac.authorization.k8s.io/v1/clusterroles/berth-agent",
    "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/berth-agent",
    "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/berth-agent-own-node",
    "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings/berth-agent-own-node",
    "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/acceleratornodes.berth.dev",
];

/// Reads that would tell a node what is not its business.
const READS: [&str; 5] = [
    "/api/v1/namespaces/berth-system/secrets",
    "/api/v1/pods",
    "/api/v1/nodes",
    "/apis/berth.dev/v1alpha1/placementmaps",
    "/apis/coordination.k8s.io/v1/namespaces/berth-system/leases/berth-operator",
];

type Try = (&'static str, String, &'static str, Value);

fn apply(path: &str, body: Value) -> Try {
    ("PATCH", format!("{path}?dryRun=All&fieldManager=berth-agent&force=true"), APPLY, body)
}

/// Every method on one object.
fn tries(path: &str) -> Vec<Try> {
    let dry = format!("{path}?dryRun=All");
    let methods = [("PUT", JSON), ("PATCH", MERGE), ("DELETE", JSON), ("POST", JSON)];
    methods.into_iter().map(|(method, content)| (method, dry.clone(), content, json!({}))).collect()
}

/// Status and message of an answer.
async fn ask(client: &Client, (method, path, content, body): &Try) -> (u16, String) {
    let body = if *method == "GET" { Vec::new() } else { body.to_string().into_bytes() };
    let request = http::Request::builder().method(*method).uri(path).header("user-agent", USER_AGENT);
    match client.request_text(request.header("content-type", *content).body(body).expect("a request")).await {
        Ok(_) => (200, String::new()),
        Err(kube::Error::Api(status)) => (status.code, status.message),
        Err(error) => (0, error.to_string()),
    }
}

/// Its own AcceleratorNode's status is what it may write; not the spec, not another's, and nothing of Berth or the cluster.
pub(super) async fn an_agent_s_token_writes_nothing_by_name(release: &Release, pods: &[Pod]) {
    let agent = pods.iter().find(|pod| component(pod) == "agent").expect("an agent");
    let own = node_of(agent).expect("a node");
    let client = release.client_of("agent", Some(agent)).await;
    let object = |name: &str, field: &str, value: Value| json!({"apiVersion": "berth.dev/v1alpha1", "kind": "AcceleratorNode", "metadata": {"name": name}, field: value});
    let mut all: Vec<Try> = OBJECTS.iter().flat_map(|path| tries(path)).collect();
    for node in NODES {
        all.extend(
            tries(&format!("/api/v1/nodes/{node}")).into_iter().chain(tries(&format!("/api/v1/nodes/{node}/status"))),
        );
        all.extend(tries(&format!("{ACCELERATORS}/{node}")).into_iter().filter(|(method, ..)| *method != "POST"));
        all.push(apply(
            &format!("{ACCELERATORS}/{node}"),
            object(node, "spec", json!({"native": true, "drain": true})),
        ));
        let mut put = object(node, "status", json!({"agent": "try"}));
        put["spec"] = json!({});
        all.push(("PUT", format!("{ACCELERATORS}/{node}/status?dryRun=All"), JSON, put));
        if node != own {
            all.push(apply(&format!("{ACCELERATORS}/{node}/status"), object(node, "status", json!({"agent": "try"}))));
        }
    }
    all.extend(READS.iter().map(|path| ("GET", (*path).to_owned(), JSON, Value::Null)));
    let mut let_through = Vec::new();
    for one in &all {
        let (code, message) = ask(&client, one).await;
        // No such method on such a path is no way in either.
        if code != 403 && code != 405 {
            let_through.push(format!("{} {}: {code} {message}", one.0, one.1));
        }
    }
    assert!(let_through.is_empty(), "of {} tries: {let_through:#?}", all.len());
    // The same token can do what it is for, so that the refusals are of rights and not of the token.
    let mine = apply(&format!("{ACCELERATORS}/{own}/status"), object(own, "status", json!({"agent": "try"})));
    assert_eq!(ask(&client, &mine).await, (200, String::new()));
}
