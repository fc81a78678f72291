//! What the API server itself says of the release: a node's token can write nothing but its own AcceleratorNode, and
//! every pod but the agent's is admitted where the restricted Pod Security Standard is enforced.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use serde_json::{Value, json};

use super::{NAMESPACE, Release, component};

/// What tells these tries from an agent's own calls in the audit log.
pub(super) const USER_AGENT: &str = "rights-test";
/// Writes that an agent's token is not refused by authorisation, and why.
const ALLOWED: &[(&str, &str)] = &[
    ("POST acceleratornodes.berth.dev", "makes its own; an admission policy refuses every other"),
    ("PATCH acceleratornodes/status.berth.dev", "writes its own; an admission policy refuses every other"),
    ("POST selfsubjectreviews.authentication.k8s.io", "everybody may ask who they are; nothing is stored"),
    ("POST selfsubjectaccessreviews.authorization.k8s.io", "everybody may ask what they may do; nothing is stored"),
    ("POST selfsubjectrulesreviews.authorization.k8s.io", "everybody may ask what they may do; nothing is stored"),
];

/// What the agent needs beyond the restricted standard, as the API server names it; the chart's README says why.
const AGENT_NEEDS: [&str; 6] = [
    "allowPrivilegeEscalation != false",
    "privileged",
    "restricted volume types",
    "runAsNonRoot != true",
    "runAsUser=0",
    "unrestricted capabilities",
];

/// One kind that the API server serves.
struct Kind {
    /// Of the collection; `{name}` where an object's name goes.
    path: String,
    name: String,
    verbs: Vec<String>,
}

/// Every kind that is served, with its subresources.
async fn kinds(client: &Client) -> Vec<Kind> {
    let get = async |path: &str| {
        let request = http::Request::get(path).body(Vec::new()).expect("a request");
        client.request::<Value>(request).await.expect("an answer")
    };
    let groups = get("/apis").await;
    let preferred = groups["groups"].as_array().into_iter().flatten();
    let mut versions: Vec<String> = preferred
        .filter_map(|group| Some(format!("/apis/{}", group.pointer("/preferredVersion/groupVersion")?.as_str()?)))
        .collect();
    versions.push("/api/v1".to_owned());
    let mut kinds = Vec::new();
    for version in versions {
        let group = version.split('/').nth(2).filter(|_| version.starts_with("/apis/")).unwrap_or_default().to_owned();
        for resource in get(&version).await["resources"].as_array().into_iter().flatten() {
            let name = resource["name"].as_str().unwrap_or_default();
            let space = if resource["namespaced"] == true { format!("/namespaces/{NAMESPACE}") } else { String::new() };
            let (plural, subresource) = name.split_once('/').map_or((name, None), |(plural, sub)| (plural, Some(sub)));
            let path = match subresource {
                Some(subresource) => format!("{version}{space}/{plural}/{{name}}/{subresource}"),
                None => format!("{version}{space}/{plural}"),
            };
            let name = if group.is_empty() { name.to_owned() } else { format!("{name}.{group}") };
            let verbs = resource["verbs"].as_array().into_iter().flatten().filter_map(Value::as_str);
            kinds.push(Kind { path, name, verbs: verbs.map(str::to_owned).collect() });
        }
    }
    kinds
}

impl Kind {
    /// Every write that it takes, as method and path, on the object `name`.
    fn writes(&self, name: &str) -> Vec<(&'static str, String)> {
        let object = if self.path.contains("{name}") {
            self.path.replace("{name}", name)
        } else {
            format!("{}/{name}", self.path)
        };
        let collection = if self.path.contains("{name}") { object.clone() } else { self.path.clone() };
        self.verbs
            .iter()
            .filter_map(|verb| match verb.as_str() {
                "create" => Some(("POST", collection.clone())),
                "update" => Some(("PUT", object.clone())),
                "patch" => Some(("PATCH", object.clone())),
                "delete" => Some(("DELETE", object.clone())),
                "deletecollection" => Some(("DELETE", collection.clone())),
                _ => None,
            })
            .collect()
    }
}

/// Every write of every kind that the API server serves, on what belongs to another node and on nothing at all.
#[expect(clippy::print_stdout, reason = "the test runner keeps what is printed with the test it belongs to")]
pub(super) async fn a_node_s_token_can_write_nothing_else(release: &Release, pods: &[Pod]) {
    let agent = pods.iter().find(|pod| component(pod) == "agent").expect("an agent");
    let client = release.client_of("agent", Some(agent)).await;
    let mut allowed = BTreeSet::new();
    let mut tried = 0_usize;
    for kind in kinds(&release.client).await {
        for (method, path) in kind.writes("nobody") {
            // Nothing is stored even where it is allowed, and authorisation comes before the body is looked at.
            let content = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
            let request = http::Request::builder().method(method).uri(format!("{path}?dryRun=All"));
            let body = if method == "DELETE" { Vec::new() } else { b"{}".to_vec() };
            let request =
                request.header("user-agent", USER_AGENT).header("content-type", content).body(body).expect("a request");
            tried += 1;
            match client.request_text(request).await {
                Err(kube::Error::Api(status)) if status.code == 403 => {}
                _ => {
                    allowed.insert(format!("{method} {}", kind.name));
                }
            }
        }
    }
    let explained: BTreeSet<String> = ALLOWED.iter().map(|(write, _)| (*write).to_owned()).collect();
    assert_eq!(allowed, explained, "of {tried} writes");
    assert!(tried > 200, "{tried} writes were tried");
    println!("{tried} writes tried with an agent's token, {} not refused and explained", allowed.len());
}

/// By the admission plugin that clusters use.
pub(super) async fn all_pods_but_the_agent_s_are_restricted(release: &Release) {
    let space = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "restricted", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    });
    release.plane.kubectl_with_input(&["apply", "-f", "-"], &space.to_string()).await.expect("a namespace");
    for (kind, name) in [("deployment", "operator"), ("deployment", "scheduler"), ("daemonset", "agent")] {
        let get = ["-n", NAMESPACE, "get", kind, &format!("berth-{name}"), "-o", "json"];
        let workload: Value = serde_json::from_str(&release.plane.kubectl(&get).await.expect(name)).expect("an object");
        let mut spec = workload.pointer("/spec/template/spec").expect("a pod").clone();
        // The account lives in the release's namespace; what the pod asks of its node is what is judged.
        for field in ["serviceAccountName", "serviceAccount", "priorityClassName"] {
            spec.as_object_mut().expect("a pod").remove(field);
        }
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "restricted"}, "spec": spec});
        let dry = ["create", "--dry-run=server", "-f", "-"];
        let answer = release.plane.kubectl_with_input(&dry, &pod.to_string()).await;
        match (name, answer) {
            ("agent", Err(refusal)) => {
                let refusal = refusal.to_string();
                let broken = AGENT_NEEDS.iter().filter(|need| refusal.contains(*need)).count();
                assert_eq!(broken, AGENT_NEEDS.len(), "{refusal}");
            }
            ("agent", Ok(_)) => panic!("the agent opens device nodes: it cannot be restricted"),
            (_, answer) => assert!(answer.is_ok(), "{name}: {answer:?}"),
        }
    }
}
