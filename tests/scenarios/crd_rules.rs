//! Every rule of the schemas refuses on a real API server, with the sentence that the user reads. A rule
//! without a case here fails the last test.

use std::{collections::BTreeSet, time::Duration};

use berth_crds::{definitions, placement_map::MapLayer};
use berth_tests::control_plane::{ControlPlane, ControlPlaneConfig};
use berth_types::ExpertId;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, Patch, PatchParams, PostParams},
    core::GroupVersionKind,
};
use serde_json::{Value, json};

/// At creation: kind, where to write, what (null removes), what the user reads.
const CREATION: &[(&str, &str, &str, &str)] = &[
    (
        "ModelDeployment",
        "/metadata/name",
        r#""a-name-that-is-longer-than-the-fifty-characters-we-can-use""#,
        "metadata.name must have at most 50 characters: the names of its instances are made from it",
    ),
    (
        "ModelDeployment",
        "/metadata/name",
        r#""v3.one""#,
        "metadata.name must not contain a dot: the names of its instances are made from it",
    ),
    (
        "ModelDeployment",
        "/spec/fallback",
        r#"["v3"]"#,
        "spec.fallback must not name the deployment itself: name others that may answer instead",
    ),
    ("ModelDeployment", "/spec/fallback", r#"["v2","v2"]"#, r#"spec.fallback[1]: Duplicate value: "v2""#),
    (
        "ModelDeployment",
        "/spec/autoscaling",
        r#"{"min":3,"max":2}"#,
        "spec.autoscaling.min must not be above spec.autoscaling.max",
    ),
    ("ModelDeployment", "/spec/objective", r#"{"percentile":90}"#, "spec.objective needs ttftMs or tpotMs, or both"),
    ("ModelDeployment", "/spec/objective", r#"{"ttftMs":null}"#, "spec.objective needs ttftMs or tpotMs, or both"),
    (
        "ModelDeployment",
        "/spec/weights/uri",
        r#""/models/v3""#,
        "weights.uri must start with file://, https://, s3://, hf:// or oci://",
    ),
    (
        "ModelDeployment",
        "/spec/weights/uri",
        r#""file://models/v3""#,
        "weights.uri must be an absolute path after file://, as in file:///models/v3",
    ),
    (
        "ModelDeployment",
        "/spec/weights/uri",
        r#""file:///models/..""#,
        "weights.uri must not contain '..': write the path that it means",
    ),
    (
        "ModelDeployment",
        "/spec/weights/digest",
        r#""sha256:abc""#,
        "digest must be sha256: followed by 64 lower-case hexadecimal digits",
    ),
    (
        "ModelDeployment",
        "/spec/devices",
        r#"{"products":["h200"," "]}"#,
        "devices.products must not hold an empty text: write products as kubectl get ban prints them",
    ),
    (
        "ModelDeployment",
        "/spec/devices",
        r#"{"vendors":["ascend"],"crossVendor":true}"#,
        "devices.crossVendor needs more than one vendor: name both in devices.vendors or leave vendors out",
    ),
    ("ModelDeployment", "/spec/devices", r#"{"vendors":["amd"]}"#, r#"supported values: "nvidia", "ascend""#),
    ("ModelDeployment", "/spec/replicas", "-1", "spec.replicas in body should be greater than or equal to 0"),
    (
        "ModelDeployment",
        "/spec",
        r#"{"model":"v3","weights":{"uri":"file:///m"},"devices":{"perInstance":1},"redundancy":{"survive":"device"}}"#,
        "spec.redundancy.survive needs at least 2 devices: raise spec.devices.perInstance or leave it out",
    ),
    ("ModelProfile", "/spec/geometry/denseLayers", "4", "geometry.denseLayers must be below geometry.layers"),
    ("ModelProfile", "/spec/geometry/topK", "17", "geometry.topK must not be above geometry.experts"),
    ("ModelProfile", "/spec/geometry/groups", "5", "geometry.groups must divide geometry.experts"),
    ("ModelProfile", "/spec/geometry/groupsKept", "5", "geometry.groupsKept must not be above geometry.groups"),
    (
        "ModelProfile",
        "/spec/geometry/topK",
        "9",
        "geometry.topK must not be above the experts of the groups kept (experts / groups * groupsKept)",
    ),
    (
        "ModelProfile",
        "/spec/geometry/hashLayers",
        "4",
        "geometry.hashLayers must not be above geometry.layers - geometry.denseLayers",
    ),
    ("ModelProfile", "/spec/geometry/format", r#""fp9""#, "Unsupported value"),
    ("ExpertPlacement", "/spec/geometry/denseLayers", "4", "geometry.denseLayers must be below geometry.layers"),
    (
        "AcceleratorNode",
        "/spec",
        r#"{"cordonedDevices":[{"device":"other/0.0","reason":"rma"}]}"#,
        "spec.cordonedDevices must name devices of this node: <node>/<device>",
    ),
    (
        "AcceleratorNode",
        "/spec",
        r#"{"orders":[{"id":"1","device":"other/0.0","action":"ResetDevice","deadline":"2026-01-01T00:00:00Z"}]}"#,
        "spec.orders must name devices of this node: <node>/<device>",
    ),
    (
        "AcceleratorNode",
        "/spec",
        r#"{"orders":[{"id":"1","device":"n1/0.0","action":"None","deadline":"2026-01-01T00:00:00Z"}]}"#,
        "an order's action must be ResetDevice, ResetGroup or RebootNode",
    ),
    ("CapacityQueue", "/spec/priority", "1000001", "should be less than or equal to 1000000"),
    (
        "PlacementMap",
        "/metadata/name",
        r#""v3-0-2""#,
        "metadata.name must be <spec.placement>-<spec.revision>: creating it is what fences a revision",
    ),
    ("PlacementMap", "/spec/layers/1/experts", r#""AAA""#, "every layer must have as many slots as the first"),
    (
        "PlacementMap",
        "/spec/devices/0/slots",
        "3",
        "every layer must have as many entries as the devices have slots per layer together",
    ),
    ("PlacementMap", "/spec/layers/1/weights", r#""AAA""#, "a layer with weights must have one for every slot"),
    ("PlacementMap", "/spec/layers/1/experts", r#""AA==""#, "should match '^[A-Za-z0-9+/]*$'"),
    ("DemandReport", "/spec/inputTokens", "5", "spec.inputTokens must be 0 when no request arrived"),
];

/// At a change of what exists: kind, where, what, what the user reads.
const CHANGE: &[(&str, &str, &str, &str)] = &[
    (
        "ModelProfile",
        "/spec/geometry/hidden",
        "128",
        "spec.geometry cannot change: another geometry is another ModelProfile",
    ),
    (
        "ExpertPlacement",
        "/spec/model",
        r#""v4""#,
        "spec.model and spec.weights cannot change: new weights are a new instance",
    ),
    (
        "ExpertPlacement",
        "/spec/weights/uri",
        r#""file:///models/v4""#,
        "spec.model and spec.weights cannot change: new weights are a new instance",
    ),
    (
        "ExpertPlacement",
        "/spec/geometry/hidden",
        "128",
        "spec.geometry and spec.vendorFormats cannot change: another format is a new instance",
    ),
    (
        "ExpertPlacement",
        "/spec/vendorFormats",
        r#"{"ascend":"int8_per_channel"}"#,
        "spec.geometry and spec.vendorFormats cannot change: another format is a new instance",
    ),
    ("PlacementMap", "/spec/epoch", "2", "a PlacementMap cannot change: write the next revision"),
    ("PlacementMap", "/spec/layers/0/experts", r#""AAABAA""#, "a PlacementMap cannot change: write the next revision"),
    (
        "DemandReport",
        "/spec/deployment",
        r#""v4""#,
        "spec.deployment cannot change: another deployment's demand is another report",
    ),
    (
        "AcceleratorNode",
        "/spec/orders/0/action",
        r#""RebootNode""#,
        "an order never changes: write another one under a new id",
    ),
];

/// At a change of an ExpertPlacement's status: what to write under /status, what the writer reads.
const ASSIGNMENT: &[(&str, &str)] = &[
    (
        r#"{"assignment":{"epoch":4,"revision":8,"digest":"sha256:D8","devices":[]}}"#,
        "status.assignment.epoch never falls: another scheduler leads, write nothing more",
    ),
    (
        r#"{"assignment":{"epoch":6,"revision":6,"digest":"sha256:D6","devices":[]}}"#,
        "status.assignment.revision never falls: write a higher revision to go back",
    ),
    (
        r#"{"assignment":{"epoch":5,"revision":7,"digest":"sha256:D8","devices":[]}}"#,
        "status.assignment.digest of a revision never changes: write the next revision",
    ),
    (
        r#"{"assignment":{"epoch":5,"revision":8,"digest":"md5:1","devices":[]}}"#,
        "digest must be sha256: followed by 64 lower-case hexadecimal digits",
    ),
    ("{}", "status.assignment cannot be taken back: write a higher revision"),
];

fn geometry() -> Value {
    json!({"layers": 4, "denseLayers": 1, "experts": 16, "sharedExperts": 1, "topK": 4, "groups": 4, "groupsKept": 2,
           "scoring": "sigmoid", "hidden": 64, "expertWidth": 32, "format": "bf16"})
}

fn base(kind: &str) -> Value {
    let (name, spec) = match kind {
        "ModelDeployment" => ("v3", json!({"model": "v3-tiny", "weights": {"uri": "file:///models/v3"}})),
        "ModelProfile" => {
            ("v3-tiny", json!({"geometry": geometry(), "nonExpertBytes": 1, "kvBytesPerToken": 1, "context": 512}))
        }
        "ExpertPlacement" => (
            "v3-0",
            json!({"model": "v3-tiny", "geometry": geometry(), "nonExpertBytes": 1,
                   "weights": {"uri": "file:///models/v3"}}),
        ),
        "AcceleratorNode" => (
            "n1",
            json!({"native": true, "orders": [{"id": "1", "device": "n1/0.0", "action": "ResetDevice",
                   "deadline": "2026-01-01T00:00:00Z"}]}),
        ),
        "CapacityQueue" => ("batch", json!({"quotaDevices": 12})),
        "PlacementMap" => (
            "v3-0-1",
            json!({"placement": "v3-0", "revision": 1, "epoch": 1, "devices": [{"device": "n1/0.0", "slots": 2}],
                   "layers": [{"layer": 1, "experts": "AAD//w"}, {"layer": 2, "experts": "AAABAA"}]}),
        ),
        "DemandReport" => (
            "gateway-0",
            json!({"deployment": "v3", "observedAt": "2026-01-01T00:00:00Z", "windowSeconds": 5, "requests": 0,
                   "inputTokens": 0, "outputTokens": 0, "waiting": 0, "refused": 0}),
        ),
        other => panic!("no base for {other}"),
    };
    json!({"apiVersion": "berth.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

const KINDS: [&str; 7] = [
    "ModelDeployment",
    "ModelProfile",
    "ExpertPlacement",
    "AcceleratorNode",
    "CapacityQueue",
    "PlacementMap",
    "DemandReport",
];

/// `object` with `value` at the JSON pointer `at`, whose parent must exist.
fn with(mut object: Value, at: &str, value: &str) -> Value {
    let value = value.replace("D6", &"6".repeat(64)).replace("D7", &"7".repeat(64)).replace("D8", &"8".repeat(64));
    let value: Value = serde_json::from_str(&value).unwrap();
    let (parent, field) = at.rsplit_once('/').unwrap();
    match object.pointer_mut(parent).unwrap_or_else(|| panic!("{at}")) {
        Value::Array(items) => items[field.parse::<usize>().unwrap()] = value,
        parent => parent[field] = value,
    }
    object
}

fn api(client: &Client, kind: &str) -> Api<DynamicObject> {
    let plural = format!("{}s", kind.to_lowercase());
    let resource = ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("berth.dev", "v1alpha1", kind), &plural);
    let cluster_wide = ["ModelProfile", "AcceleratorNode", "CapacityQueue"].contains(&kind);
    if cluster_wide {
        Api::all_with(client.clone(), &resource)
    } else {
        Api::default_namespaced_with(client.clone(), &resource)
    }
}

/// Installs every definition and waits until its kind is served.
pub(crate) async fn install(client: &Client) {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in definitions::all() {
        let name = definition.metadata.name.clone().unwrap();
        let applied = api.patch(&name, &PatchParams::apply("tests"), &Patch::Apply(&definition)).await;
        applied.unwrap_or_else(|error| panic!("{name}: {error}"));
        let established = kube::runtime::conditions::is_crd_established();
        let waited = kube::runtime::wait::await_condition(api.clone(), &name, established);
        tokio::time::timeout(Duration::from_secs(30), waited).await.unwrap().unwrap();
    }
}

fn sentence(error: kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message,
        other => panic!("the API server did not answer: {other}"),
    }
}

async fn creation_is_refused_with_its_sentence(client: &Client) {
    let dry_run = PostParams { dry_run: true, field_manager: None };
    for kind in KINDS {
        let object = serde_json::from_value(base(kind)).unwrap();
        api(client, kind).create(&dry_run, &object).await.unwrap_or_else(|error| panic!("{kind}: {error}"));
    }
    for (kind, at, value, expected) in CREATION {
        let object = serde_json::from_value(with(base(kind), at, value)).unwrap();
        let refused = sentence(api(client, kind).create(&dry_run, &object).await.unwrap_err());
        assert!(refused.contains(expected), "{kind} {at} = {value}: {refused}");
    }
}

async fn change_is_refused_with_its_sentence(client: &Client) {
    for kind in KINDS {
        let object = serde_json::from_value(base(kind)).unwrap();
        api(client, kind).create(&PostParams::default(), &object).await.unwrap();
    }
    for (kind, at, value, expected) in CHANGE {
        let name = base(kind)["metadata"]["name"].as_str().unwrap().to_owned();
        let live = serde_json::to_value(api(client, kind).get(&name).await.unwrap()).unwrap();
        let object = serde_json::from_value(with(live, at, value)).unwrap();
        let refused = sentence(api(client, kind).replace(&name, &PostParams::default(), &object).await.unwrap_err());
        assert!(refused.contains(expected), "{kind} {at} = {value}: {refused}");
    }
}

async fn assignment_never_goes_back(client: &Client) {
    let placements = api(client, "ExpertPlacement");
    let write = async |status: &str| {
        let live = serde_json::to_value(placements.get("v3-0").await.unwrap()).unwrap();
        let object = serde_json::from_value(with(live, "/status", status)).unwrap();
        placements.replace_status("v3-0", &PostParams::default(), &object).await
    };
    let first = r#"{"assignment":{"epoch":5,"revision":7,"digest":"sha256:D7","devices":["n1/0.0"]}}"#;
    write(first).await.unwrap();
    for (status, expected) in ASSIGNMENT {
        let refused = sentence(write(status).await.unwrap_err());
        assert!(refused.contains(expected), "{status}: {refused}");
    }
    write(r#"{"assignment":{"epoch":5,"revision":8,"digest":"sha256:D8","devices":[]}}"#).await.unwrap();
}

/// 61 layers of 9,000 slots, near the 1.5 MB that etcd takes, are within the cost limits of the rules.
async fn a_large_map_is_accepted(client: &Client) {
    let experts = (0..9_000).map(|slot| Some(ExpertId(slot % 384))).collect();
    let experts = serde_json::to_value(MapLayer { layer: 3, experts, weights: None }).unwrap()["experts"].clone();
    let devices: Vec<Value> =
        (0..90).map(|index| json!({"device": format!("node-{}/0000:3b:00.0", index), "slots": 100})).collect();
    let layers: Vec<Value> = (3..64).map(|layer| json!({"layer": layer, "experts": experts})).collect();
    let spec = json!({"placement": "big-0", "revision": 1, "epoch": 1, "devices": devices, "layers": layers});
    let object = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "PlacementMap",
                        "metadata": {"name": "big-0-1"}, "spec": spec});
    let maps = api(client, "PlacementMap");
    let object = serde_json::from_value(object).unwrap();
    let mut live = maps.create(&PostParams::default(), &object).await.unwrap();
    live.metadata.labels = Some([("seen".to_owned(), "yes".to_owned())].into());
    maps.replace("big-0-1", &PostParams::default(), &live).await.unwrap();
}

/// Kubernetes keeps what a user did not write as the schema's default, and `/scale` works.
async fn defaults_and_scale_are_there(client: &Client) {
    let deployments = api(client, "ModelDeployment");
    let live = deployments.get("v3").await.unwrap();
    assert_eq!(live.data.pointer("/spec/replicas"), Some(&json!(1)));
    assert_eq!(live.data.pointer("/spec/redundancy/survive"), Some(&json!("none")));
    assert_eq!(deployments.get_scale("v3").await.unwrap().spec.unwrap().replicas, Some(1));
    let selected = kube::api::ListParams::default().fields("spec.model=v3-tiny");
    assert_eq!(deployments.list(&selected).await.unwrap().items.len(), 1);
}

#[tokio::test]
async fn schemas_refuse_what_one_object_can_decide() {
    let plane = ControlPlane::start(ControlPlaneConfig::named("crd-rules")).await.unwrap();
    let client = plane.client().unwrap();
    install(&client).await;
    creation_is_refused_with_its_sentence(&client).await;
    change_is_refused_with_its_sentence(&client).await;
    assignment_never_goes_back(&client).await;
    defaults_and_scale_are_there(&client).await;
    a_large_map_is_accepted(&client).await;
}

fn messages(schema: &Value, found: &mut BTreeSet<String>) {
    match schema {
        Value::Object(fields) => {
            let rules = fields.get("x-kubernetes-validations").and_then(Value::as_array);
            found.extend(rules.into_iter().flatten().filter_map(|rule| rule["message"].as_str().map(str::to_owned)));
            fields.values().for_each(|value| messages(value, found));
        }
        Value::Array(items) => items.iter().for_each(|item| messages(item, found)),
        _ => {}
    }
}

#[test]
fn every_rule_has_a_case() {
    let mut rules = BTreeSet::new();
    definitions::all().iter().for_each(|crd| messages(&serde_json::to_value(crd).unwrap(), &mut rules));
    let cases: BTreeSet<&str> =
        CREATION.iter().chain(CHANGE).map(|case| case.3).chain(ASSIGNMENT.iter().map(|c| c.1)).collect();
    let without: Vec<_> = rules.iter().filter(|rule| !cases.contains(rule.as_str())).collect();
    assert!(without.is_empty(), "rules without a case: {without:#?}");
}
