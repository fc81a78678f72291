//! DeviceTaintRules, on an API server that serves them (in 1.36 behind a gate): a barred device gets one for each name
//! that a DRA driver gave it, and it goes when the device is back.

use berth_crds::AcceleratorNode;
use berth_operator::accelerator_node::book::Budget;
use berth_runtime::Clock;
use berth_tests::control_plane::{ControlPlane, ControlPlaneConfig};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{cluster::eventually, crd_rules, operator::config};

const DEVICE: &str = "gpu-07/0000:3b:00.0";

async fn says(client: &Client, admission: &str) {
    let health = if admission == "Barred" { "Unhealthy" } else { "Healthy" };
    let mut device = json!({"device": DEVICE, "vendor": "nvidia", "product": "H100", "uuid": "GPU-aa", "memoryBytes": 1,
        "health": health, "admission": admission, "action": "None"});
    if admission == "Barred" {
        device["reason"] = json!("DeviceLost");
    }
    let status = json!({"status": {"bootId": "b", "sequence": 1, "devices": [device]}});
    let api: Api<AcceleratorNode> = Api::all(client.clone());
    api.patch_status("gpu-07", &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
}

async fn rules(plane: &ControlPlane) -> Vec<Value> {
    let list = plane.kubectl(&["get", "devicetaintrules", "-o", "json"]).await.unwrap();
    serde_json::from_str::<Value>(&list).unwrap()["items"].as_array().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_barred_device_is_tainted_where_kubernetes_knows_devices() {
    let gate = ["--runtime-config=resource.k8s.io/v1beta2=true", "--feature-gates=DRADeviceTaintRules=true"];
    let config_plane = ControlPlaneConfig {
        apiserver_args: gate.map(str::to_owned).into(),
        ..ControlPlaneConfig::named("device-taints")
    };
    let plane = ControlPlane::start(config_plane).await.unwrap();
    let client = plane.client().unwrap();
    crd_rules::install(&client).await;
    let slice = json!({"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": {"name": "gpu-07-gpu"},
        "spec": {"driver": "gpu.nvidia.com", "nodeName": "gpu-07", "pool": {"name": "gpu-07", "generation": 1, "resourceSliceCount": 1},
            "devices": [{"name": "gpu-0", "attributes": {"uuid": {"string": "GPU-aa"}}}, {"name": "gpu-1", "attributes": {"uuid": {"string": "GPU-bb"}}}]}});
    let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "gpu-07"}}, slice,
        {"apiVersion": "berth.dev/v1alpha1", "kind": "AcceleratorNode", "metadata": {"name": "gpu-07"}, "spec": {}}]});
    plane.kubectl_with_input(&["apply", "-f", "-"], &objects.to_string()).await.unwrap();
    says(&client, "Barred").await;
    let stop = CancellationToken::new();
    let operator = tokio::spawn(berth_operator::run(
        config(Budget { cluster: 1, pool: 1, domain: 1 }),
        client.clone(),
        Clock::real(),
        stop.clone(),
    ));

    let rule = eventually("a rule", || async { rules(&plane).await.first().cloned() }).await;
    let selector = json!({"driver": "gpu.nvidia.com", "pool": "gpu-07", "device": "gpu-0"});
    assert_eq!(rule["spec"]["deviceSelector"], selector);
    let taint = &rule["spec"]["taint"];
    assert_eq!(
        (&taint["key"], &taint["value"], &taint["effect"]),
        (&json!("berth.dev/unhealthy"), &json!("DeviceLost"), &json!("NoSchedule"))
    );
    says(&client, "Schedulable").await;
    eventually("no rule", || async { rules(&plane).await.is_empty().then_some(()) }).await;

    stop.cancel();
    operator.await.unwrap().unwrap();
}
