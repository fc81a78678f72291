//! A hundred deployments in a queue for ten, with the installed parts: ten serve, ninety say why they wait, and then
//! nobody calls anybody.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use berth_crds::{CapacityQueue, ModelDeployment};
use berth_tests::demo::{objects, prompts::Runner};
use kube::{Api, api::ListParams};
use serde_json::{Value, json};

use super::{Ring, processes, say};
use crate::cluster::eventually;

/// Deployments.
const ALL: usize = 100;
/// Of them, those that the queue's quota lets run.
const RUN: usize = 10;
/// The API server's own count of a part's calls per deployment may be this high.
const CALLS_EACH: usize = 12;
/// What runs takes so long to come up at most.
const UP: Duration = Duration::from_secs(120);

impl Ring {
    /// Calls of the installed parts so far, by part and verb and kind; leases aside, which are kept by the clock.
    fn calls(&self) -> BTreeMap<String, usize> {
        let log = std::fs::read_to_string(self.cluster.dir().join("audit.log")).expect("an audit log");
        let mut calls = BTreeMap::new();
        for call in log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let text = |path: &str| call.pointer(path).and_then(Value::as_str).unwrap_or("");
            let Some(part) = text("/user/username").strip_prefix("system:serviceaccount:berth-system:berth-") else {
                continue;
            };
            let (kind, done) = (text("/objectRef/resource"), text("/stage") == "ResponseComplete");
            if done && kind != "leases" && text("/verb") != "watch" {
                let name = format!("{part} {} {kind}/{}", text("/verb"), text("/objectRef/subresource"));
                *calls.entry(name).or_default() += 1;
            }
        }
        calls
    }

    async fn deployments(&self) -> Vec<ModelDeployment> {
        let api: Api<ModelDeployment> = Api::namespaced(self.client.clone(), objects::NAMESPACE);
        api.list(&ListParams::default()).await.expect("deployments").items
    }
}

/// Applies them at once, as a user with a generator does.
pub(super) async fn a_hundred_deployments_under_a_full_quota_come_to_rest_and_ten_serve(ring: &Ring) {
    let before: usize = ring.calls().values().sum();
    let kind = |kind: &str, metadata: Value, spec: Value| json!({"apiVersion": "berth.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec});
    let quota = json!({"quotaDevices": RUN, "borrowLimitDevices": 0});
    let mut items = vec![kind("CapacityQueue", json!({"name": "batch"}), quota)];
    let uri = format!("file://{}", ring.checkpoints[0].display());
    items.extend((0..ALL).map(|index| {
        let spec = json!({"model": "demo-model", "weights": {"uri": uri}, "queue": "batch"});
        kind("ModelDeployment", json!({"name": format!("d{index:02}"), "namespace": objects::NAMESPACE}), spec)
    }));
    let started = Instant::now();
    let file = ring.cluster.dir().join("hundred.json");
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    std::fs::write(&file, list.to_string()).expect("written");
    ring.cluster.kubectl(&["apply", "-f", &file.display().to_string()]).await.expect("applied");
    let ready = objects::wait_for("ten deployments that serve", UP, || async {
        let (mut ready, mut waiting) = (Vec::new(), 0);
        for status in ring.deployments().await.into_iter().filter_map(|one| one.status) {
            waiting += usize::from(status.granted_devices == 0 && status.summary.reason == "QuotaExceeded");
            ready.extend(status.instances.into_iter().map(|one| one.endpoint).filter(|endpoint| !endpoint.is_empty()));
        }
        let state = format!("{} serve, {waiting} wait", ready.len());
        Ok(if (ready.len(), waiting) == (RUN, ALL - RUN) { Ok(ready) } else { Err(state) })
    })
    .await
    .expect("ten that serve");
    let up = started.elapsed();
    for endpoint in &ready {
        ring.serves_the_reference(&Runner::at(endpoint).expect("an address")).await;
    }
    let queues: Api<CapacityQueue> = Api::all(ring.client.clone());
    eventually("the queue's count", || async {
        let status = queues.get("batch").await.ok()?.status?;
        (status.used_devices == 10 && status.waiting == 90).then_some(())
    })
    .await;
    let calls = rest(ring).await;
    let total = calls.values().sum::<usize>() - before;
    say(&format!("{RUN} of {ALL} serve after {up:.1?}; {total} calls of the parts, then none: {calls:#?}"));
    assert!(total <= ALL * CALLS_EACH, "{total} calls: {calls:#?}");
    let loaded = processes::ready_bytes(ring).await;
    assert!(loaded.is_some_and(|bytes| bytes > 0), "{loaded:?}");
    let delete = ["-n", objects::NAMESPACE, "delete", "modeldeployments", "--all"];
    ring.cluster.kubectl(&delete).await.expect("deleted");
    super::changes::nothing_is_left(ring).await;
}

/// The calls so far, once two seconds passed without one.
async fn rest(ring: &Ring) -> BTreeMap<String, usize> {
    let mut before = ring.calls();
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let now = ring.calls();
        if now == before {
            return now;
        }
        before = now;
    }
    panic!("the parts never rest: {before:#?}");
}
