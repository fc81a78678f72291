//! What the user changes: the number of instances, the weights, and that there is a deployment at all.

use std::time::{Duration, Instant};

use berth_tests::demo::{
    objects::{self, DEPLOYMENT},
    prompts::Runner,
};
use serde_json::json;

use super::{Ring, processes::ready_bytes, say};
use crate::cluster::eventually;

impl Ring {
    async fn scale(&self, replicas: usize) {
        let replicas = format!("--replicas={replicas}");
        let scale = ["-n", objects::NAMESPACE, "scale", "modeldeployment", DEPLOYMENT, replicas.as_str()];
        self.cluster.kubectl(&scale).await.expect("scaled");
    }
}

/// By `kubectl scale`, as for anything that has the subresource.
pub(super) async fn scaled_up_both_instances_serve_and_scaled_down_one(ring: &Ring) {
    ring.scale(2).await;
    let up = ring.settled().await;
    let both = ring.endpoints().await;
    assert_eq!(both.len(), 2, "{both:?}");
    for endpoint in &both {
        ring.serves_the_reference(&Runner::at(endpoint).expect("an address")).await;
    }
    ring.scale(1).await;
    let down = ring.settled().await;
    let one = ring.endpoints().await;
    assert!(one.len() == 1 && both.contains(&one[0]), "{both:?}, then {one:?}");
    ring.serves_the_reference(&ring.runner().await).await;
    eventually("one placement and one pod", || async {
        let left = (ring.placements().await.len(), ring.pods(objects::NAMESPACE).await.len());
        (left == (1, 1)).then_some(())
    })
    .await;
    say(&format!("scaled to 2 in {up:.1?}, to 1 in {down:.1?}"));
}

/// Prompts go on all the while, each to an instance that the status names at that time.
pub(super) async fn new_weights_make_a_new_instance_and_no_request_fails(ring: &Ring) {
    let old = ring.placements().await[0].metadata.name.clone().expect("a name");
    let uri = format!("file://{}", ring.checkpoints[1].display());
    let patch = json!({"spec": {"weights": {"uri": uri}}}).to_string();
    let patch = ["-n", objects::NAMESPACE, "patch", "modeldeployment", DEPLOYMENT, "--type=merge", "-p", &patch];
    ring.cluster.kubectl(&patch).await.expect("patched");
    let started = Instant::now();
    let (mut served, mut beside) = (0, false);
    loop {
        // One look, one request: as a client that asks where to go does.
        let endpoints = ring.endpoints().await;
        let endpoint = &endpoints[served % endpoints.len()];
        let case = &ring.cases[served % ring.cases.len()];
        let runner = Runner::at(endpoint).expect("an address");
        let answer = runner.generate(case, case.max_tokens, |_| ()).await;
        let answer = answer.unwrap_or_else(|error| panic!("request {served} at {endpoint}: {error}"));
        assert_eq!(Some(&answer.ids), case.expected.as_ref(), "request {served}: {:?}", answer.finished);
        served += 1;
        let names: Vec<_> = ring.placements().await.into_iter().filter_map(|one| one.metadata.name).collect();
        beside |= names.len() == 2 && names.contains(&old);
        if !names.contains(&old) && ring.unsettled().await.is_none() {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(90), "{names:?}: {:?}", ring.unsettled().await);
    }
    say(&format!("new weights in {:.1?}, {served} prompts served meanwhile, none failed", started.elapsed()));
    assert!(beside, "the new instance was made beside the old");
    assert!(served > 0);
}

/// Objects, pods and runner processes vanish, and what workers held is freed.
pub(super) async fn a_deleted_deployment_leaves_no_object_process_or_loaded_slot(ring: &Ring) {
    let loaded = ready_bytes(ring).await.expect("workers that can be asked");
    assert!(loaded > 0, "what is freed afterwards is loaded before");
    let started = Instant::now();
    let delete = ["-n", objects::NAMESPACE, "delete", "modeldeployment", DEPLOYMENT];
    ring.cluster.kubectl(&delete).await.expect("deleted");
    nothing_is_left(ring).await;
    say(&format!("{loaded} bytes loaded; deleted and freed in {:.1?}", started.elapsed()));
}

/// Waits until there is no object, no runner process and no loaded slot.
pub(super) async fn nothing_is_left(ring: &Ring) {
    let kinds = "modeldeployments,expertplacements,placementmaps,deployments,replicasets,pods";
    objects::wait_for("nothing left of the deployment", Duration::from_secs(60), || async {
        let left = ring.cluster.kubectl(&["-n", objects::NAMESPACE, "get", kinds, "-o", "name"]).await?;
        let running = ring.cluster.kubelet().running();
        let runners = running.iter().filter(|(_, _, container, _)| container == "runner").count();
        let bytes = ready_bytes(ring).await;
        let gone = left.trim().is_empty() && runners == 0 && bytes == Some(0);
        Ok(if gone { Ok(()) } else { Err(format!("{left} {runners} runner processes, {bytes:?} bytes loaded")) })
    })
    .await
    .expect("nothing left");
}
