//! What the demo applies and what it waits for, through the API server like any user.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use berth_crds::conditions::{ConditionType, is_true};
use berth_crds::{AcceleratorNode, ExpertPlacement, ModelDeployment};
use berth_types::{DeviceId, Vendor};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::{Error, Result};

/// Namespace of the demo's deployment.
pub const NAMESPACE: &str = "models";
/// Name of the demo's ModelDeployment.
pub const DEPLOYMENT: &str = "demo";
/// Between two looks at an object that is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A ModelDeployment for a checkpoint folder: survives the loss of a node, on `devices`.
#[must_use]
pub fn deployment(name: &str, profile: &str, checkpoint: &std::path::Path, devices: &Value) -> Value {
    json!({
        "apiVersion": "berth.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "model": profile,
            "weights": {"uri": format!("file://{}", checkpoint.display())},
            "replicas": 1,
            "devices": devices,
            "redundancy": {"survive": "node"},
        },
    })
}

/// A volume of the nodes' folder of weights, and the claim that is bound to it.
#[must_use]
pub fn weights(claim: &str, folder: &std::path::Path) -> [Value; 2] {
    let spec = json!({
        "accessModes": ["ReadOnlyMany"], "storageClassName": "", "capacity": {"storage": "1Gi"},
        "persistentVolumeReclaimPolicy": "Retain",
        "hostPath": {"path": folder, "type": "Directory"},
        "claimRef": {"namespace": NAMESPACE, "name": claim},
    });
    let volume = json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": claim}, "spec": spec});
    let spec = json!({
        "accessModes": ["ReadOnlyMany"], "storageClassName": "", "volumeName": claim,
        "resources": {"requests": {"storage": "1Gi"}},
    });
    let metadata = json!({"name": claim, "namespace": NAMESPACE});
    let claim = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec});
    [volume, claim]
}

/// Looks at `what` until `ready` gives something, at most `within`.
///
/// # Errors
/// When the deadline passes; the error tells what `describe` says of the last state.
pub async fn wait_for<T, F, R>(what: &str, within: Duration, mut ready: F) -> Result<T>
where
    F: FnMut() -> R,
    R: Future<Output = Result<std::result::Result<T, String>>>,
{
    let started = Instant::now();
    loop {
        let state = match ready().await? {
            Ok(found) => return Ok(found),
            Err(state) => state,
        };
        if started.elapsed() > within {
            return Err(Error::Wait { what: what.to_owned(), waited: within, state });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Waits until `count` AcceleratorNodes report healthy devices and host.
///
/// # Errors
/// When they do not in time.
pub async fn nodes_are_healthy(client: &Client, count: usize, within: Duration) -> Result<Vec<AcceleratorNode>> {
    let api: Api<AcceleratorNode> = Api::all(client.clone());
    wait_for("healthy accelerator nodes", within, || async {
        let nodes = api.list(&Default::default()).await.map_err(Error::api("list AcceleratorNodes"))?.items;
        let healthy = nodes.iter().filter(|node| {
            let status = node.status.as_ref();
            status.is_some_and(|status| {
                !status.devices.is_empty() && status.summary.healthy == status.summary.devices && node.spec.native
            })
        });
        Ok(if healthy.count() == count { Ok(nodes) } else { Err(describe_nodes(&nodes)) })
    })
    .await
}

fn describe_nodes(nodes: &[AcceleratorNode]) -> String {
    let line = |node: &AcceleratorNode| {
        let summary = node.status.clone().unwrap_or_default().summary;
        let name = node.metadata.name.clone().unwrap_or_default();
        format!("{name}: {}/{} devices healthy, {}", summary.healthy, summary.devices, summary.reason)
    };
    if nodes.is_empty() {
        "no AcceleratorNode".to_owned()
    } else {
        nodes.iter().map(line).collect::<Vec<_>>().join("; ")
    }
}

/// A ModelDeployment once it is Ready.
///
/// # Errors
/// When it is not in time; the error shows its summary.
pub async fn deployment_is_ready(client: &Client, name: &str, within: Duration) -> Result<ModelDeployment> {
    let api: Api<ModelDeployment> = Api::namespaced(client.clone(), NAMESPACE);
    wait_for("the ModelDeployment to be Ready", within, || async {
        let deployment = api.get(name).await.map_err(Error::api("get the ModelDeployment"))?;
        let status = deployment.status.clone().unwrap_or_default();
        let current = status.observed_generation == deployment.metadata.generation;
        let ready = current && is_true(&status.conditions, ConditionType::Ready);
        Ok(if ready { Ok(deployment) } else { Err(format!("{}: {}", status.phase, status.summary.message)) })
    })
    .await
}

/// The ExpertPlacement of a deployment of one instance.
///
/// # Errors
/// When there is none.
pub async fn placement_of(client: &Client, deployment: &str) -> Result<ExpertPlacement> {
    let api: Api<ExpertPlacement> = Api::namespaced(client.clone(), NAMESPACE);
    let found = api.list(&Default::default()).await.map_err(Error::api("list ExpertPlacements"))?.items;
    let of = |placement: &ExpertPlacement| {
        placement.metadata.owner_references.iter().flatten().any(|owner| owner.name == deployment)
    };
    found.into_iter().find(of).ok_or_else(|| Error::Wait {
        what: "an ExpertPlacement".to_owned(),
        waited: Duration::ZERO,
        state: "there is none".to_owned(),
    })
}

/// The demo's ExpertPlacement.
///
/// # Errors
/// When there is none.
pub async fn placement(client: &Client) -> Result<ExpertPlacement> {
    placement_of(client, DEPLOYMENT).await
}

/// The vendor of every device, by the nodes' own reports.
///
/// # Errors
/// When they cannot be listed.
pub async fn vendors(client: &Client) -> Result<BTreeMap<DeviceId, Vendor>> {
    let api: Api<AcceleratorNode> = Api::all(client.clone());
    let nodes = api.list(&Default::default()).await.map_err(Error::api("list AcceleratorNodes"))?.items;
    let devices = nodes.into_iter().flat_map(|node| node.status.unwrap_or_default().devices);
    Ok(devices.map(|device| (device.device, device.vendor)).collect())
}

/// The demo's ExpertPlacement once a revision above `before` serves.
///
/// # Errors
/// When none does in time.
pub async fn repaired(client: &Client, before: u64, within: Duration) -> Result<ExpertPlacement> {
    wait_for("a repaired placement", within, || async {
        let placement = placement(client).await?;
        let status = placement.status.clone().unwrap_or_default();
        let state = format!("revision {} serves; {}", status.serving_revision, status.why);
        Ok(if status.serving_revision > before && status.experts_lost == 0 { Ok(placement) } else { Err(state) })
    })
    .await
}

/// The demo's measured balancedness, once the runner has reported a load window (every 10 s).
///
/// # Errors
/// When no window arrives in time.
pub async fn measured_balance(client: &Client, within: Duration) -> Result<f64> {
    wait_for("a load window", within, || async {
        let status = placement(client).await?.status.unwrap_or_default();
        Ok(status.balancedness.ok_or_else(|| "status.balancedness is absent".to_owned()))
    })
    .await
}
