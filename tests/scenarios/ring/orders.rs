//! kill -9 of who gives an order and of who carries it out, in the middle of it, at a step that a printed seed chooses.
//! An order is carried out at most once, nothing is reset while something runs on it (the doubles look at the processes
//! themselves), no request fails, and in the end every device is well and used.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use berth_crds::{
    AcceleratorNode,
    accelerator_node::{OrderPhase, OrderStatus},
};
use berth_operator::accelerator_node::{
    book::{Book, CORDON},
    remediation::OBJECT,
};
use berth_tests::demo::{
    cluster,
    nodes::{Fleet, ResetFault},
    objects,
};
use berth_types::{Admission, Health};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use nix::sys::signal::Signal;
use serde_json::json;

use super::{
    LONG, Ring,
    kills::{Dice, Victim, seed},
    processes::signal,
    say,
};

/// A fault, two leaders that are followed, a reset, another and a probation fit in.
const LIMIT: Duration = Duration::from_secs(180);
/// The installed operator's limit for a proof, in seconds: an order of unknown outcome is looked at for as long.
const PROOF: u64 = 30;
/// A reset takes so long where something is to happen in the middle of it.
const SLOW_MS: u64 = 8_000;

/// How far an order is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Emptying,
    Ordered,
    Started,
}

/// Nodes of both vendors, and an operator that orders.
pub(super) async fn install() -> Ring {
    let ring = Ring::start("orders", Fleet::BOTH, "v4-tiny").await;
    let values = [format!("operator.remediation.validateSeconds={PROOF}")];
    ring.cluster.install_acting(&values).await.expect("the chart installed");
    let devices = json!({"perInstance": ring.fleet.len() * 2, "crossVendor": true});
    ring.serve(&devices).await
}

impl Ring {
    fn fault(&self, device: &str, code: &str) -> ResetFault {
        self.cluster.reset_fault_of(&device.parse().expect("a device"), code).expect("it is on a node")
    }

    async fn node_of(&self, fault: &ResetFault) -> AcceleratorNode {
        let api: Api<AcceleratorNode> = Api::all(self.client.clone());
        api.get(fault.device().node()).await.expect("its node")
    }

    /// Waits until the order that `fault` leads to is as far as `step`.
    async fn reaches(&self, fault: &ResetFault, step: Step) {
        objects::wait_for(&format!("{} to be {step:?}", fault.device()), LIMIT, || async {
            let node = self.node_of(fault).await;
            let begun = orders(&node, fault).iter().any(|order| order.phase == OrderPhase::Started);
            let ordered = node.spec.orders.iter().any(|order| order.device == *fault.device());
            let cordoned = node.spec.cordoned_devices.iter().any(|one| one.reason.starts_with(CORDON));
            let reached = match step {
                Step::Emptying => cordoned || ordered || begun,
                Step::Ordered => ordered || begun,
                Step::Started => begun,
            };
            Ok(if reached { Ok(()) } else { Err(json!([node.spec, node.status]).to_string()) })
        })
        .await
        .expect("a step of an order");
    }

    /// Waits until all that was reset is well and nothing is left in the spec; answers the orders.
    async fn returned(&self, fault: &ResetFault) -> Vec<OrderStatus> {
        objects::wait_for(&format!("the return of {}", fault.device()), LIMIT, || async {
            let node = self.node_of(fault).await;
            let devices = node.status.iter().flat_map(|status| &status.devices);
            let members = devices.filter(|one| fault.members().contains(&one.device));
            let well = members.filter(|one| (one.health, one.admission) == (Health::Healthy, Admission::Schedulable));
            let done = well.count() == fault.members().len()
                && node.spec.orders.is_empty()
                && node.spec.cordoned_devices.is_empty()
                && !orders(&node, fault).is_empty();
            let book = self.book().await;
            Ok(if done { Ok(orders(&node, fault)) } else { Err(json!([node.spec, node.status, book]).to_string()) })
        })
        .await
        .expect("a device that is back")
    }

    async fn book(&self) -> Book {
        let api: Api<ConfigMap> = Api::namespaced(self.client.clone(), cluster::NAMESPACE);
        let data = api.get(OBJECT).await.expect("the book").data.unwrap_or_default();
        serde_json::from_str(data.get("book.json").expect("a book")).expect("a book that can be read")
    }

    async fn kill_at(&self, fault: &ResetFault, step: Step, victim: &Victim) {
        self.reaches(fault, step).await;
        signal(victim.pid, Signal::SIGKILL);
    }
}

/// What became of the orders for a fault.
fn orders(node: &AcceleratorNode, fault: &ResetFault) -> Vec<OrderStatus> {
    let all = node.status.iter().flat_map(|status| &status.orders);
    all.filter(|order| fault.members().contains(&order.device)).cloned().collect()
}

/// Prompts that go on, one after the other; every one must give the tokens of the undisturbed placement.
struct Prompts {
    ended: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<usize>,
}

impl Prompts {
    async fn start(ring: &Ring) -> Self {
        let ended = Arc::<AtomicBool>::default();
        let (runner, case, until) = (ring.runner().await, ring.long.clone(), Arc::clone(&ended));
        let task = tokio::spawn(async move {
            let mut served = 0;
            while served == 0 || !until.load(Ordering::Relaxed) {
                let answer = runner.generate(&case, LONG, |_| ()).await.expect("an answer");
                assert!(answer.succeeded(), "request {served}: {:?}", answer.finished);
                assert_eq!(Some(&answer.ids), case.expected.as_ref(), "request {served}: {:?}", answer.finished);
                served += 1;
            }
            served
        });
        Self { ended, task }
    }

    async fn end(self) -> usize {
        self.ended.store(true, Ordering::Relaxed);
        self.task.await.expect("prompts that were all answered")
    }
}

/// One order of each vendor; the operator dies at a step of the one, the scheduler while the other's card is emptied.
pub(super) async fn an_order_outlives_its_leader_and_the_scheduler(ring: &Ring) {
    let seed = seed();
    let mut dice = Dice(seed);
    let step = dice.pick(vec![Step::Emptying, Step::Ordered, Step::Started]);
    say(&format!("BERTH_CHAOS_SEED={seed}: the operator dies at {step:?}"));
    let (gpu, npu) = (ring.fault("gpu-01/0000:3b:00.0", "48"), ring.fault("npu-01/0.1", "0x80AD8009"));
    let operator = Victim::choose(ring, "operator", &mut dice).await;
    let scheduler = Victim::choose(ring, "scheduler", &mut dice).await;
    let prompts = Prompts::start(ring).await;
    gpu.resets_take(SLOW_MS).expect("written");
    let since = Instant::now();
    gpu.happen().expect("written");
    npu.happen().expect("written");
    tokio::join!(ring.kill_at(&gpu, step, &operator), ring.kill_at(&npu, Step::Emptying, &scheduler));
    let killed = since.elapsed();
    for fault in [&gpu, &npu] {
        let orders = ring.returned(fault).await;
        let fates: Vec<_> = orders.iter().map(|order| order.phase).collect();
        assert_eq!(fates, [OrderPhase::Succeeded], "one order: {orders:?}");
        assert_eq!(fault.resets(), [fault.device().local()], "carried out once, with nothing on it");
    }
    let back = since.elapsed();
    for victim in [&operator, &scheduler] {
        victim.is_replaced(ring).await;
    }
    let served = prompts.end().await;
    say(&format!(
        "both killed after {killed:.1?}, both vendors' devices back after {back:.1?}; {served} prompts served"
    ));
}

/// The reset dies with its agent, and nobody can know that it was not made: the device is looked at first, then a new order
/// is given. On one node of each vendor, the second while the first is looked at.
pub(super) async fn a_reset_whose_agent_dies_in_it_is_made_once_more_by_an_order_of_its_own(ring: &Ring) {
    let mut dice = Dice(seed());
    let faults = [ring.fault("gpu-02/0000:5e:00.0", "46"), ring.fault("npu-02/0.0", "0x8C17A005")];
    let prompts = Prompts::start(ring).await;
    let since = Instant::now();
    for fault in &faults {
        fault.resets_take(SLOW_MS).expect("written");
        fault.happen().expect("written");
        ring.reaches(fault, Step::Started).await;
        let pods = ring.pods(cluster::NAMESPACE).await;
        let on_its_node = |pod: &k8s_openapi::api::core::v1::Pod| {
            pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(fault.device().node())
        };
        let pod = pods.into_iter().find(on_its_node).and_then(|pod| pod.metadata.name).expect("its agent");
        let agent = Victim::of(ring, "agent", pod).await;
        // Somewhere in the reset: while workers end, while the library is let go of, or in the vendor's call.
        let later = Duration::from_millis(u64::try_from(dice.below(3_000)).unwrap());
        tokio::time::sleep(later).await;
        signal(agent.pid, Signal::SIGKILL);
        fault.resets_take(0).expect("written");
        agent.is_replaced(ring).await;
        say(&format!("{} killed {later:?} into the reset of {}", agent.who, fault.device()));
    }
    for fault in &faults {
        let orders = ring.returned(fault).await;
        let fates: Vec<_> = orders.iter().map(|order| (order.phase, order.outcome_unknown)).collect();
        assert_eq!(fates, [(OrderPhase::Failed, true), (OrderPhase::Succeeded, false)], "{orders:?}");
        assert_ne!(orders[0].id, orders[1].id);
        assert_eq!(fault.resets(), [fault.device().local()], "made once, with nothing on it");
    }
    let served = prompts.end().await;
    say(&format!("both back {:.1?} after the first fault; {served} prompts served", since.elapsed()));
}

/// The budget is given back, no incident is remembered, and the placement is on all devices again.
pub(super) async fn every_device_is_used_and_nothing_is_left_to_do(ring: &Ring) {
    assert_eq!(ring.book().await.begun, 6, "an order each, and one more for each whose agent died in it");
    objects::wait_for("an empty book", LIMIT, || async {
        let book = ring.book().await;
        let empty = book.operations.is_empty() && book.incidents.is_empty();
        Ok(if empty { Ok(()) } else { Err(json!(book).to_string()) })
    })
    .await
    .expect("nothing under way");
    assert_eq!(ring.book().await.begun, 6, "one operation per fault, and another where the agent died in the first");
    ring.settled().await;
    objects::wait_for("every device in use", LIMIT, || async {
        let status = ring.placements().await.remove(0).status.unwrap_or_default();
        let devices = status.assignment.map(|assignment| assignment.devices).unwrap_or_default();
        Ok(if devices.len() == ring.fleet.len() * 2 { Ok(()) } else { Err(format!("{devices:?}; {}", status.why)) })
    })
    .await
    .expect("a placement on all");
    ring.serves_the_reference(&ring.runner().await).await;
}
