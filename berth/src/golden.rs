//! What people see, as golden texts: two deployments on two nodes, one device lost. And what programs read.

use berth_crds::{AcceleratorNode, ExpertPlacement, PlacementMap, expert_placement::PlanDecision};
use serde_json::{Value, json};

use crate::{
    explain,
    placement::{self, DiffView, Shown, devices},
    status::{self, Objects},
    top::{self, Held, Kind, Sort},
};

/// 2026-01-01T01:00:00Z; the objects speak of the hour before.
const NOW: i64 = 1_767_229_200;

fn read<T: serde::de::DeserializeOwned>(object: Value) -> T {
    serde_json::from_value(object).unwrap()
}

fn condition(kind: &str, status: &str, reason: &str, message: &str) -> Value {
    json!({"type": kind, "status": status, "reason": reason, "message": message,
           "lastTransitionTime": "2026-01-01T00:50:00Z"})
}

fn node(name: &str, lost: bool) -> AcceleratorNode {
    let device = |local: &str, lost: bool| {
        let (health, admission, action) =
            if lost { ("Unhealthy", "Barred", "ResetDevice") } else { ("Healthy", "Schedulable", "None") };
        let mut device = json!({"device": format!("{name}/{local}"), "vendor": "nvidia", "product": "NVIDIA H200",
            "memoryBytes": 150_000_000_000_u64, "interconnectDomain": "nvl-7", "health": health,
            "admission": admission, "action": action, "worker": if lost { "Dead" } else { "Serving" }});
        if lost {
            device["reason"] = json!("DeviceLost");
            device["evidence"] = json!("Xid 79");
        }
        device
    };
    let healthy = if lost { 1 } else { 2 };
    read(json!({"apiVersion": "berth.dev/v1alpha1", "kind": "AcceleratorNode", "metadata": {"name": name},
        "spec": {"native": true},
        "status": {"devices": [device("0000:3b:00.0", lost), device("0000:5e:00.0", false)],
            "summary": {"vendor": "nvidia", "product": "NVIDIA H200", "devices": 2, "healthy": healthy,
                "schedulable": healthy, "action": if lost { "ResetDevice" } else { "None" },
                "reason": if lost { "DeviceLost" } else { "" }, "domain": "nvl-7"},
            "conditions": [condition("Ready", "True", "Ready", ""), condition("Reachable", "True", "Heard", "")]}}))
}

fn deployment(name: &str, ready: bool) -> berth_crds::ModelDeployment {
    let message = "needs 32 devices, 28 are free: wait for 4 that are in probation, or allow pool h200";
    let (reason, phase) = if ready { ("Ready", "Serving") } else { ("CapacityShort", "Pending") };
    let status = if ready { "True" } else { "False" };
    let conditions = [
        condition("CapacityAvailable", status, reason, if ready { "16 devices are granted" } else { message }),
        condition("Ready", status, reason, if ready { "1 of 1 instances answer" } else { message }),
    ];
    read(json!({"apiVersion": "berth.dev/v1alpha1", "kind": "ModelDeployment",
        "metadata": {"name": name, "namespace": "models", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"model": "v3", "weights": {"uri": "file:///w"}},
        "status": {"phase": phase, "conditions": conditions,
            "summary": {"instances": if ready { "1/1" } else { "0/1" }, "pools": if ready { "NVIDIA H200:3" } else { "" },
                "reason": reason, "message": if ready { "serves" } else { message }}}}))
}

const DEVICES: [&str; 3] = ["gpu-01/0000:3b:00.0", "gpu-01/0000:5e:00.0", "gpu-02/0000:5e:00.0"];

fn placed(lost: u64) -> ExpertPlacement {
    read(json!({"apiVersion": "berth.dev/v1alpha1", "kind": "ExpertPlacement",
        "metadata": {"name": "v3-0", "namespace": "models", "uid": "u-1", "labels": {"berth.dev/deployment": "v3"}},
        "spec": {"model": "v3", "geometry": {"layers": 3, "denseLayers": 1, "experts": 4, "topK": 2, "groups": 1,
            "groupsKept": 1, "scoring": "sigmoid", "hidden": 7168, "expertWidth": 2048, "format": "bf16"},
            "nonExpertBytes": 1000, "weights": {"uri": "file:///w"}},
        "status": {"assignment": {"epoch": 4, "revision": 2, "digest": format!("sha256:{}", "ab".repeat(32)),
            "devices": DEVICES}, "servingRevision": if lost > 0 { 1 } else { 2 }, "slotsReady": 12, "slotsTotal": 12,
            "balancedness": 0.9375, "expertsLost": lost, "why": "device lost: 3 moves, 264.2 MB",
            "conditions": [condition("Ready", "True", "Ready", ""), condition("Stalled", "False", "NotStalled", "")]}}))
}

/// Slots of two layers, device by device; -1 = empty.
fn map(revision: u64, devices: &[&str], layers: [&[i64]; 2]) -> PlacementMap {
    use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
    let packed = |slots: &[i64]| {
        let bytes = slots.iter().flat_map(|slot| u16::try_from(*slot).unwrap_or(u16::MAX).to_le_bytes());
        STANDARD_NO_PAD.encode(bytes.collect::<Vec<u8>>())
    };
    let devices: Vec<_> = devices.iter().map(|device| json!({"device": device, "slots": 2})).collect();
    let layers = [(1, layers[0]), (2, layers[1])];
    let layers = layers.map(|(layer, slots)| json!({"layer": layer, "experts": packed(slots)}));
    read(json!({"apiVersion": "berth.dev/v1alpha1", "kind": "PlacementMap",
        "metadata": {"name": format!("v3-0-{revision}"), "namespace": "models"},
        "spec": {"placement": "v3-0", "revision": revision, "epoch": 3 + revision / 2, "devices": devices, "layers": layers}}))
}

/// Before and after the loss of gpu-02's first device.
fn maps() -> [PlacementMap; 2] {
    let before = ["gpu-01/0000:3b:00.0", "gpu-02/0000:3b:00.0", "gpu-02/0000:5e:00.0"];
    [
        map(1, &before, [&[0, 1, 2, 3, 0, 2], &[0, 1, 2, 3, 1, 3]]),
        map(2, &DEVICES, [&[0, 1, 2, 3, 0, 2], &[0, 1, 2, -1, 1, 3]]),
    ]
}

fn objects(lost: u64) -> Objects {
    Objects {
        namespace: None,
        deployments: vec![deployment("v3", true), deployment("v4-pro", false)],
        placements: vec![placed(lost)],
        nodes: vec![node("gpu-01", false), node("gpu-02", true)],
        queues: vec![read(json!({"apiVersion": "berth.dev/v1alpha1", "kind": "CapacityQueue",
            "metadata": {"name": "batch"}, "spec": {"quotaDevices": 12, "priority": 10},
            "status": {"usedDevices": 3, "waiting": 1}}))],
    }
}

fn golden(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"));
    settings.set_prepend_module_to_snapshot(false);
    settings.set_omit_expression(true);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

#[test]
fn status_says_what_serves_and_what_wants_attention() {
    let view = status::view(&objects(0), None, NOW);
    assert!(!view.healthy);
    golden("status", &status::text(&view));
}

#[test]
fn status_of_one_deployment_shows_its_conditions_and_what_it_uses() {
    golden("status-one", &status::text(&status::view(&objects(0), Some("v4-pro"), NOW)));
}

#[test]
fn experts_that_nobody_holds_come_first() {
    let view = status::view(&objects(2), Some("v3"), NOW);
    assert!(!view.healthy);
    let text = status::text(&view);
    assert!(text.contains("2 experts have no live replica") && text.contains("1 -> 2"), "{text}");
}

#[test]
fn a_lost_device_says_whether_somebody_still_uses_it() {
    let used = Objects { nodes: vec![node("gpu-01", true)], ..objects(0) };
    let text = status::text(&status::view(&used, None, NOW));
    assert!(text.contains("still used by 1 instance") && text.contains("the agent advises ResetDevice"), "{text}");
}

#[test]
fn a_cluster_in_which_all_is_well_is_healthy() {
    let objects = Objects {
        deployments: vec![deployment("v3", true)],
        placements: vec![placed(0)],
        nodes: vec![node("gpu-01", false)],
        ..Objects::default()
    };
    let view = status::view(&objects, None, NOW);
    assert!(view.healthy && status::text(&view).ends_with("nothing wants attention\n"));
    let elsewhere = Objects { namespace: Some("other".to_owned()), ..Objects::default() };
    assert!(status::text(&status::view(&elsewhere, None, NOW)).contains("in namespace other: see -A"));
    let empty = status::view(&Objects::default(), None, NOW);
    assert_eq!(status::text(&empty).lines().next(), Some("no ModelDeployment: apply one"));
}

#[test]
fn programs_read_the_same_as_people() {
    let view = serde_json::to_value(status::view(&objects(0), None, NOW)).unwrap();
    assert_eq!((view["schema"].as_str(), view["healthy"].as_bool()), (Some("berth.dev/status/v1"), Some(false)));
    assert_eq!(view["instances"][0]["revision"], 2);
    assert_eq!(view["attention"][1]["object"], "gpu-02/0000:3b:00.0");
    let yaml = serde_saphyr::to_string(&view).unwrap();
    assert!(yaml.contains("schema: berth.dev/status/v1"), "{yaml}");
}

fn shown<T>(of: impl FnOnce(&Shown<'_>, &PlacementMap) -> T) -> T {
    let ([before, after], placement) = (maps(), placed(0));
    let nodes = [node("gpu-01", false), node("gpu-02", true)];
    of(&Shown { placement: &placement, map: &after, devices: &devices(&nodes) }, &before)
}

#[test]
fn a_placement_shows_what_each_device_holds() {
    golden("placement", &shown(|shown, _| placement::text(&placement::view(shown, None))));
    let layer = shown(|shown, _| placement::text(&placement::view(shown, Some(2))));
    assert!(layer.contains("gpu-01/0000:5e:00.0: 2 -"), "an empty slot is a dash: {layer}");
}

#[test]
fn a_difference_shows_every_move() {
    golden("placement-diff", &shown(|shown, before| placement::diff_text(&placement::diff(shown, before, None))));
    let same = shown(|shown, _| placement::diff(shown, shown.map, None));
    assert!(same.is_empty() && placement::diff_text(&same).ends_with("no change"));
    let one: DiffView = shown(|shown, before| placement::diff(shown, before, Some(1)));
    let one = serde_json::to_value(one).unwrap();
    assert_eq!((one["loads"].as_u64(), one["drops"].as_u64(), one["kept"].as_u64()), (Some(2), Some(2), Some(4)));
}

#[test]
fn top_sums_devices_nodes_and_models() {
    let [before, after] = maps();
    let devices = devices(&[node("gpu-01", false), node("gpu-02", true)]);
    let held = [Held { placement: placed(0), maps: vec![before, after] }];
    for (name, kind) in [("top-devices", Kind::Devices), ("top-nodes", Kind::Nodes), ("top-models", Kind::Models)] {
        golden(name, &top::text(&top::view(kind, Sort::Bytes, &devices, &held)));
    }
    let unknown = [Held { placement: placed(0), maps: Vec::new() }];
    let text = top::text(&top::view(Kind::Devices, Sort::Name, &devices, &unknown));
    assert!(text.contains("not counted") && text.contains("models/v3-0"), "{text}");
}

/// A placement that was evened out, with what its scheduler says of that.
fn evened_out() -> ExpertPlacement {
    let mut object = placed(0);
    let decision = |seconds: i64, outcome: &str, cause: &str, revisions: [u64; 2], why: &str| {
        let time = jiff::Timestamp::from_second(NOW - seconds).unwrap();
        json!({"time": time.to_string(), "outcome": outcome, "cause": cause, "fromRevision": revisions[0],
            "revision": revisions[1], "why": why})
    };
    let moved =
        "re-plan r1 -> r2 (the load has drifted): balance 0.71 -> 0.94, moves 3 replicas (264.2 MB), pays back in 40 s";
    let kept = "kept r2: balance 0.94; nothing moves: the slowest device is 0.31 % above its bound";
    let status = object.status.as_mut().unwrap();
    status.why = moved.to_owned();
    status.certificate = Some(read(json!({"revision": 2, "makespan": 1.064, "bound": 1.061, "gap": 0.003,
        "limit": "layer 2 is the slowest, at 1.120 of the ideal: one more slot for expert 1 would make that 1.031",
        "loads": "7 load windows", "speeds": "none declared: every device alike", "sharing": "by weight",
        "survives": "node"})));
    status.decisions = [
        decision(40, "Kept", "rebalance", [2, 2], kept),
        decision(300, "Moved", "rebalance", [1, 2], moved),
        decision(
            3600,
            "Moved",
            "first",
            [0, 1],
            "first placement r1 (nothing was assigned): moves 12 replicas (1.0 GB)",
        ),
    ]
    .map(read::<PlanDecision>)
    .into();
    object
}

#[test]
fn an_explanation_says_what_was_chosen_how_good_it_is_and_why() {
    let known = devices(&[node("gpu-01", false), node("gpu-02", true)]);
    let copies = explain::copies(&maps()[1], (1, 3)).unwrap();
    let subject = explain::Subject {
        deployment: Some(deployment("v3", true)),
        placements: vec![(evened_out(), Some(copies))],
        devices: known,
    };
    let view = explain::view(&subject, NOW);
    golden("explain", &explain::text(&view));
    let view = serde_json::to_value(view).unwrap();
    assert_eq!(view["waits"], json!([]));
    assert_eq!(view["instances"][0]["decisions"][1]["outcome"], "Moved");
    assert_eq!(view["instances"][0]["certificate"]["sharing"], "by weight");
    assert_eq!(view["instances"][0]["copies"]["slots"][0]["slot"], 1);
}

#[test]
fn an_explanation_of_what_waits_begins_with_the_dominant_reason() {
    let subject = explain::Subject { deployment: Some(deployment("v4-pro", false)), ..explain::Subject::default() };
    let text = explain::text(&explain::view(&subject, NOW));
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[1].starts_with("WAITS       v4-pro CapacityShort: needs 32 devices"), "{text}");
    assert!(text.ends_with("no instance was made yet"), "{text}");
}

#[test]
fn what_is_asked_for_and_is_not_there_is_named() {
    for (asked, words) in [((9, 0), "the model's expert layers are 1, 2"), ((1, 99), "layer 1 has no such expert")] {
        assert!(explain::copies(&maps()[1], asked).unwrap_err().to_string().contains(words));
    }
    let all = || (vec![deployment("v3", true)], vec![placed(0)]);
    for name in ["v3", "models/v3", "v3-0"] {
        let (deployments, placements) = all();
        let (_, chosen) = explain::choose(deployments, placements, name, None).unwrap();
        assert_eq!(chosen.len(), 1, "{name}");
    }
    let (deployments, placements) = all();
    assert!(explain::choose(deployments, placements, "v9", None).unwrap_err().to_string().contains("models/v3-0"));
}

#[test]
fn a_difference_says_why_it_was_made() {
    let ([before, after], placement) = (maps(), evened_out());
    let nodes = [node("gpu-01", false), node("gpu-02", true)];
    let shown = Shown { placement: &placement, map: &after, devices: &devices(&nodes) };
    let text = placement::diff_text(&placement::diff(&shown, &before, None));
    assert!(text.contains("why: re-plan r1 -> r2") && text.contains("bound 1.061, gap 0.3 %; layer 2"), "{text}");
}

#[test]
fn a_name_that_is_none_is_answered_with_those_there_are() {
    let placements = [placed(0)];
    for name in ["v3-0", "models/v3-0", "v3"] {
        assert!(placement::find(&placements, name, Some("models")).is_ok(), "{name}");
    }
    let error = placement::find(&placements, "v4", None).unwrap_err().to_string();
    assert!(error.contains("models/v3-0") && error.contains("-A"), "{error}");
}
