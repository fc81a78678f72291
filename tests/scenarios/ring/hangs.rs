//! A worker that takes orders and does nothing: its process is stopped, which no exit status tells.

use std::time::{Duration, Instant};

use berth_tests::demo::{
    cluster,
    objects::{self, DEPLOYMENT},
};
use nix::sys::signal::Signal;
use serde_json::json;

use super::{Ring, processes::signal, say};
use crate::cluster::eventually;

/// The installed scheduler's limit for loading, in place of a minute.
const LOAD_LIMIT: Duration = Duration::from_secs(6);

impl Ring {
    /// Sets or unsets a variable of the scheduler and waits until it is back with it.
    async fn set_scheduler(&self, variable: &str) {
        let set = ["-n", cluster::NAMESPACE, "set", "env", "deployment/berth-scheduler", variable];
        self.cluster.kubectl(&set).await.expect("set");
        let rollout = ["-n", cluster::NAMESPACE, "rollout", "status", "deployment/berth-scheduler", "--timeout=60s"];
        self.cluster.kubectl(&rollout).await.expect("rolled out");
        self.settled().await;
    }

    async fn devices_per_instance(&self, devices: Option<u32>) {
        let patch = json!({"spec": {"devices": {"perInstance": devices}}}).to_string();
        let patch = ["-n", objects::NAMESPACE, "patch", "modeldeployment", DEPLOYMENT, "--type=merge", "-p", &patch];
        self.cluster.kubectl(&patch).await.expect("patched");
    }
}

/// Stopped before a revision needs it: at the limit the revision serves without it, and its agent, which it does not
/// answer either, puts another in its place.
pub(super) async fn a_worker_that_hangs_while_loading_does_not_block_a_revision(ring: &Ring) {
    ring.set_scheduler(&format!("BERTH_LOAD_LIMIT_SECONDS={}", LOAD_LIMIT.as_secs())).await;
    let before = ring.placements().await.remove(0).status.unwrap_or_default();
    let used = before.assignment.expect("an assignment").devices;
    let idle = |worker: &super::processes::Worker| !used.iter().any(|device| device.as_str() == worker.device);
    let hung = ring.workers().into_iter().find(idle).expect("a worker that nobody uses");
    signal(hung.pid, Signal::SIGSTOP);
    let started = Instant::now();
    ring.devices_per_instance(Some(4)).await;
    let serves = eventually("a revision above the one before serves", || async {
        let status = ring.placements().await.into_iter().next()?.status?;
        (status.serving_revision > before.serving_revision && status.experts_lost == 0).then_some(status)
    })
    .await;
    let took = started.elapsed();
    assert!(took >= LOAD_LIMIT, "{hung:?} was waited for until the limit: {took:.1?}");
    let assigned = serves.assignment.expect("an assignment").devices;
    say(&format!(
        "revision {} serves {took:.1?} after it was asked for, {} hung; {}",
        serves.serving_revision, hung.device, serves.why
    ));
    ring.serves_the_reference(&ring.runner().await).await;
    eventually("another worker in its place", || async {
        let now = ring.workers().into_iter().find(|worker| worker.device == hung.device)?;
        (now.pid != hung.pid && now.ready_bytes().await? > 0).then_some(())
    })
    .await;
    say(&format!("a worker that loads is in its place after {:.1?}; before on {assigned:?}", started.elapsed()));
    ring.devices_per_instance(None).await;
    ring.set_scheduler("BERTH_LOAD_LIMIT_SECONDS-").await;
    ring.serves_the_reference(&ring.runner().await).await;
}
