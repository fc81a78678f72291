//! kill -9 of every part, one after the other, at points of a running generation that a printed seed chooses.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use berth_tests::demo::{cluster, objects};
use nix::sys::signal::Signal;

use super::{LONG, Ring, processes::signal, say};
use crate::cluster::{eventually, first, has};

/// A small generator of its own (splitmix64), so that a seed means the same on every machine.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    /// A number below `end`.
    pub(super) fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % u64::try_from(end).unwrap()).unwrap()
    }

    pub(super) fn pick<T>(&mut self, mut from: Vec<T>) -> T {
        assert!(!from.is_empty(), "nothing to choose from");
        from.swap_remove(self.below(from.len()))
    }
}

/// The seed: `BERTH_CHAOS_SEED`, or another one each time.
pub(super) fn seed() -> u64 {
    let given = std::env::var("BERTH_CHAOS_SEED").ok().map(|seed| seed.parse().expect("BERTH_CHAOS_SEED is a number"));
    given.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs())
}

/// Each in turn; a request is lost only with the runner that has it.
pub(super) async fn parts_killed_in_the_middle_of_a_generation_change_no_token(ring: &Ring) {
    let seed = seed();
    say(&format!("BERTH_CHAOS_SEED={seed}"));
    let mut dice = Dice(seed);
    for part in ["worker", "agent", "scheduler", "operator", "runner"] {
        let victim = Victim::choose(ring, part, &mut dice).await;
        let Victim { who, pid, .. } = &victim;
        let at = 1 + dice.below(usize::try_from(LONG).unwrap() - 20);
        let runner = ring.runner().await;
        let answer = runner
            .generate(&ring.long, LONG, |tokens| {
                if tokens == at {
                    signal(*pid, Signal::SIGKILL);
                }
            })
            .await;
        match answer {
            Ok(answer) => {
                assert!(answer.succeeded(), "{part} {who} killed at token {at}: {:?}", answer.finished);
                assert_eq!(Some(&answer.ids), ring.long.expected.as_ref(), "{part} {who} killed at token {at}");
                say(&format!(
                    "{part} {who} killed at token {at}: {} calls, {} retried, revisions {:?}",
                    answer.finished.calls, answer.finished.retried, answer.revisions
                ));
            }
            Err(error) => {
                assert_eq!(part, "runner", "{who} killed at token {at}: {error}");
                say(&format!("runner {who} killed at token {at}: its request broke"));
            }
        }
        let since = Instant::now();
        victim.is_replaced(ring).await;
        ring.settled().await;
        say(&format!("{part}: replaced and settled {:.1?} after the answer", since.elapsed()));
        ring.serves_the_reference(&ring.runner().await).await;
    }
}

/// A process that is to be killed.
pub(super) struct Victim {
    /// The device of a worker, else the pod.
    pub(super) who: String,
    pub(super) pid: i32,
    /// Namespace, and how often its pod's container was restarted before; none for a worker.
    container: Option<(&'static str, i32)>,
}

impl Victim {
    pub(super) async fn choose(ring: &Ring, part: &str, dice: &mut Dice) -> Self {
        if part == "worker" {
            let worker = dice.pick(ring.loaded_workers().await);
            return Self { who: worker.device, pid: worker.pid, container: None };
        }
        let kubelet = ring.cluster.kubelet();
        let who = match part {
            "scheduler" | "operator" => ring.leader(part).await.expect("a leader").0,
            part => {
                let running = kubelet.running().into_iter().filter(|(_, _, container, _)| container == part);
                dice.pick(running.collect()).1
            }
        };
        Self::of(ring, part, who).await
    }

    /// The process of a part in the pod `who`.
    pub(super) async fn of(ring: &Ring, part: &str, who: String) -> Self {
        let namespace = if part == "runner" { objects::NAMESPACE } else { cluster::NAMESPACE };
        let pid = ring.cluster.kubelet().container_pid(namespace, &who, part).expect("it runs");
        let (restarts, _) = restarts(ring, namespace, &who).await.expect("a status");
        Self { who, pid, container: Some((namespace, restarts)) }
    }

    /// Waits until there is another in its place, and the objects speak of that one.
    pub(super) async fn is_replaced(&self, ring: &Ring) {
        eventually(&format!("{} replaced", self.who), || async {
            let Some((namespace, before)) = self.container else {
                let worker = ring.workers().into_iter().find(|worker| worker.device == self.who)?;
                let loaded = worker.pid != self.pid && worker.ready_bytes().await? > 0;
                return loaded.then_some(());
            };
            let (now, ready) = restarts(ring, namespace, &self.who).await?;
            (now > before && ready).then_some(())
        })
        .await;
    }
}

/// How often the container of a pod was restarted, and whether the pod is ready.
async fn restarts(ring: &Ring, namespace: &str, pod: &str) -> Option<(i32, bool)> {
    let pods = ring.pods(namespace).await;
    let pod = pods.iter().find(|found| found.metadata.name.as_deref() == Some(pod))?;
    Some((first(pod).restart_count, has(pod, "Ready")))
}
