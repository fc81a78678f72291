//! A leader that was asleep while another took over.

use std::time::{Duration, Instant};

use berth_tests::demo::cluster;
use nix::sys::signal::Signal;

use super::{PATIENCE, Ring, processes::signal, say};
use crate::cluster::eventually;

/// A node that hosts.
const NODE: &str = "gpu-01";
/// The deposed leader is watched for so long at least.
const AWAKE: Duration = Duration::from_secs(5);

/// Epoch and revision of every placement.
async fn decisions(ring: &Ring) -> Vec<(u64, u64)> {
    let assignment = |placement: berth_crds::ExpertPlacement| placement.status.unwrap_or_default().assignment;
    let all = ring.placements().await.into_iter().filter_map(assignment);
    all.map(|assignment| (assignment.epoch, assignment.revision)).collect()
}

/// Stopped, followed, resumed, and then given a reason to plan: only the new leader's word counts.
pub(super) async fn a_paused_leader_that_was_deposed_writes_nothing(ring: &Ring) {
    let before = decisions(ring).await;
    let (pod, term) = ring.leader("scheduler").await.expect("a leader");
    let pid = ring.cluster.kubelet().container_pid(cluster::NAMESPACE, &pod, "scheduler").expect("it runs");
    signal(pid, Signal::SIGSTOP);
    let stopped = Instant::now();
    let next = eventually("another leader", || async {
        ring.leader("scheduler").await.filter(|(_, now)| *now > term).map(|(pod, _)| pod)
    })
    .await;
    let took = stopped.elapsed();
    say(&format!("the other scheduler led after {took:.1?}"));
    assert_ne!(next, pod);
    assert!(took <= Duration::from_secs(20), "{took:?}");
    // Its probes fail meanwhile; what matters is that it wakes before it is restarted.
    signal(pid, Signal::SIGCONT);
    // A reason to plan, for whoever believes to lead: the experts of a node must leave it.
    ring.cluster.kubectl(&["cordon", NODE]).await.expect("cordoned");
    let (mut last, watched) = (before.clone(), Instant::now());
    let planned = |now: &[(u64, u64)]| before.iter().zip(now).all(|(old, new)| new.0 > old.0 && new.1 > old.1);
    while watched.elapsed() < AWAKE || !planned(&last) {
        let now = decisions(ring).await;
        for (old, new) in last.iter().zip(&now) {
            assert!(new >= old, "a decision fell from {old:?} to {new:?}");
        }
        last = now;
        let (leads, _) = ring.leader("scheduler").await.expect("a leader");
        assert_eq!(leads, next, "the deposed one does not take the lease back");
        assert!(watched.elapsed() < PATIENCE, "the new leader has not planned: {before:?}, then {last:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    ring.cluster.kubectl(&["uncordon", NODE]).await.expect("uncordoned");
    ring.settled().await;
    let after = decisions(ring).await;
    say(&format!("decisions (epoch, revision): {before:?}, then {after:?}"));
    ring.serves_the_reference(&ring.runner().await).await;
}
