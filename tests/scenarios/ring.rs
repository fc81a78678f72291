//! The whole ring as a user has it: the chart installed on two doubled nodes, a deployment that serves, and what
//! happens to it. One cluster for all, in sequence, because installing takes longer than most of what follows. Looks
//! at Berth only from outside: objects, prompts, processes, metrics.

mod changes;
mod deposed;
mod hangs;
mod kills;
mod many;
mod orders;
mod processes;
mod rights;

use std::{
    collections::BTreeSet,
    path::PathBuf,
    time::{Duration, Instant},
};

use berth_crds::{
    AcceleratorNode, ExpertPlacement, ModelDeployment,
    conditions::{ConditionType, is_true},
};
use berth_tests::{
    control_plane::target_dir,
    demo::{
        Options,
        cluster::{self, Cluster},
        nodes::Fleet,
        objects::{self, DEPLOYMENT},
        prompts::{self, Case, Runner},
    },
};
use k8s_openapi::api::{coordination::v1::Lease, core::v1::Pod};
use kube::{Api, Client, api::ListParams};
use serde_json::json;

use crate::cluster::has;

/// Longest time for anything that is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// Tokens of a prompt that something happens in the middle of.
const LONG: u32 = 200;

/// The installed system with the demo's deployment.
pub(crate) struct Ring {
    cluster: Cluster,
    fleet: Fleet,
    client: Client,
    /// The checkpoint that is served, and a copy of it beside it.
    checkpoints: [PathBuf; 2],
    cases: Vec<Case>,
    /// The first case generated far on the undisturbed placement.
    long: Case,
}

impl Ring {
    /// Two NVIDIA nodes, and advice only about devices that are not well.
    async fn install() -> Self {
        let ring = Self::start("ring", Fleet::NVIDIA, "v3-tiny").await;
        ring.cluster.install().await.expect("the chart installed");
        ring.serve(&json!({})).await
    }

    /// A cluster without Berth, and two copies of a checkpoint beside it.
    async fn start(name: &str, fleet: Fleet, model: &str) -> Self {
        let source = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/data/reference/models")).join(model);
        let root = target_dir().join(format!("{name}-weights"));
        let checkpoints = ["first", "second"].map(|name| copy(&source, &root.join(name)));
        let options = Options {
            name: name.into(),
            fleet,
            checkpoint: checkpoints[0].clone(),
            report: PathBuf::new(),
            kubeconfig: None,
            keep: false,
        };
        let cluster = Cluster::start(&options).await.expect("a cluster");
        let client = cluster.client().clone();
        let cases = prompts::read_cases(&checkpoints[0]).expect("a reference");
        let long = Case { expected: None, max_tokens: LONG, ..cases[0].clone() };
        Self { cluster, fleet, client, checkpoints, cases, long }
    }

    /// The same with a deployment on `devices` that serves.
    async fn serve(mut self, devices: &serde_json::Value) -> Self {
        objects::nodes_are_healthy(&self.client, self.fleet.len(), PATIENCE).await.expect("healthy nodes");
        self.cluster.apply_profile(&self.checkpoints[0]).await.expect("a profile");
        self.cluster.apply_deployment(DEPLOYMENT, &self.checkpoints[0], devices).await.expect("a deployment");
        self.settled().await;
        self.serves_the_reference(&self.runner().await).await;
        let answer = self.runner().await.generate(&self.long, LONG, |_| ()).await.expect("a long answer");
        assert!(answer.succeeded(), "{answer:?}");
        self.long.expected = Some(answer.ids);
        self
    }

    /// Addresses of the instances that answer, as a client finds them.
    async fn endpoints(&self) -> Vec<String> {
        let api: Api<ModelDeployment> = Api::namespaced(self.client.clone(), objects::NAMESPACE);
        let status = api.get(DEPLOYMENT).await.expect("the deployment").status.unwrap_or_default();
        status.instances.into_iter().map(|one| one.endpoint).filter(|endpoint| !endpoint.is_empty()).collect()
    }

    /// The runner of the first instance that answers.
    async fn runner(&self) -> Runner {
        Runner::at(self.endpoints().await.first().expect("an endpoint")).expect("an address")
    }

    /// Every case of the reference, at one runner.
    async fn serves_the_reference(&self, runner: &Runner) {
        for case in &self.cases {
            let answer = runner.generate(case, case.max_tokens, |_| ()).await.expect("an answer");
            assert_eq!(Some(&answer.ids), case.expected.as_ref(), "{:?}", answer.finished);
        }
    }

    async fn deployment(&self) -> ModelDeployment {
        let api: Api<ModelDeployment> = Api::namespaced(self.client.clone(), objects::NAMESPACE);
        api.get(DEPLOYMENT).await.expect("the deployment")
    }

    async fn placements(&self) -> Vec<ExpertPlacement> {
        let api: Api<ExpertPlacement> = Api::namespaced(self.client.clone(), objects::NAMESPACE);
        api.list(&ListParams::default()).await.expect("placements").items
    }

    async fn pods(&self, namespace: &str) -> Vec<Pod> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        api.list(&ListParams::default()).await.expect("pods").items
    }

    /// The pod that holds a part's lease, and how often the lease has changed hands.
    async fn leader(&self, part: &str) -> Option<(String, i32)> {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), cluster::NAMESPACE);
        let spec = leases.get_opt(&format!("berth-{part}")).await.ok()??.spec?;
        let holder = spec.holder_identity?;
        Some((holder.split_once('@')?.0.to_owned(), spec.lease_transitions?))
    }

    /// Waits until nothing is left to repair, and says how long that took.
    async fn settled(&self) -> Duration {
        let since = Instant::now();
        objects::wait_for("a settled ring", PATIENCE, || async {
            Ok(match self.unsettled().await {
                Some(why) => Err(why),
                None => Ok(()),
            })
        })
        .await
        .expect("a settled ring");
        since.elapsed()
    }

    /// What is still to be repaired.
    async fn unsettled(&self) -> Option<String> {
        let pods = self.pods(cluster::NAMESPACE).await;
        let ready = pods.iter().filter(|pod| has(pod, "Ready")).count();
        // Two operators, two schedulers, an agent per node.
        let all = 4 + self.fleet.len();
        if (ready, pods.len()) != (all, all) {
            return Some(format!("{ready} of {} pods ready", pods.len()));
        }
        let nodes: Api<AcceleratorNode> = Api::all(self.client.clone());
        for node in nodes.list(&ListParams::default()).await.expect("nodes").items {
            let status = node.status.unwrap_or_default();
            if !node.spec.native || status.summary.healthy != 2 || !is_true(&status.conditions, ConditionType::Ready) {
                return Some(format!("node {:?}: {:?}", node.metadata.name, status.summary));
            }
        }
        for placement in self.placements().await {
            let name = placement.metadata.name.unwrap_or_default();
            let status = placement.status.unwrap_or_default();
            let Some(assigned) = status.assignment else { return Some(format!("{name}: nothing is assigned")) };
            let nodes: BTreeSet<_> = assigned.devices.iter().map(|device| device.node()).collect();
            let slots = (status.slots_ready, status.slots_total);
            let whole = (status.serving_revision, status.draining_revision) == (assigned.revision, 0)
                && (slots.0, status.experts_lost, nodes.len()) == (slots.1, 0, self.fleet.len());
            if !whole {
                let serving = (status.serving_revision, status.draining_revision, status.experts_lost);
                let (revision, devices) = (assigned.revision, assigned.devices);
                return Some(format!(
                    "{name}: revision {revision} on {devices:?}, {slots:?} slots ready, (serves, drains, lost) {serving:?}; {}",
                    status.why
                ));
            }
        }
        let deployment = self.deployment().await;
        let status = deployment.status.unwrap_or_default();
        let ready = status.observed_generation == deployment.metadata.generation
            && is_true(&status.conditions, ConditionType::Ready)
            && i64::from(status.ready_replicas) == i64::from(deployment.spec.replicas)
            && status.instances.len() == usize::try_from(status.ready_replicas).unwrap_or(0);
        (!ready).then(|| format!("{}: {}", status.phase, status.summary.message))
    }
}

/// A figure for whoever watches.
#[expect(clippy::print_stdout, reason = "the test runner keeps what is printed with the test it belongs to")]
fn say(line: &str) {
    println!("{line}");
}

/// Copies the files of a folder into another, which is made anew.
fn copy(from: &std::path::Path, to: &std::path::Path) -> PathBuf {
    let _ = std::fs::remove_dir_all(to);
    std::fs::create_dir_all(to).expect("a folder");
    for file in std::fs::read_dir(from).expect("a checkpoint").flatten() {
        std::fs::copy(file.path(), to.join(file.file_name())).expect("copied");
    }
    to.canonicalize().expect("a path")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ring_lives_through_what_happens_to_it() {
    let ring = Ring::install().await;
    kills::parts_killed_in_the_middle_of_a_generation_change_no_token(&ring).await;
    deposed::a_paused_leader_that_was_deposed_writes_nothing(&ring).await;
    hangs::a_worker_that_hangs_while_loading_does_not_block_a_revision(&ring).await;
    changes::scaled_up_both_instances_serve_and_scaled_down_one(&ring).await;
    changes::new_weights_make_a_new_instance_and_no_request_fails(&ring).await;
    changes::a_deleted_deployment_leaves_no_object_process_or_loaded_slot(&ring).await;
    many::a_hundred_deployments_under_a_full_quota_come_to_rest_and_ten_serve(&ring).await;
    rights::parts_may_do_what_they_do_and_nothing_else(&ring).await;
    ring.cluster.end().await.expect("nothing left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_live_through_the_death_of_who_gives_and_who_carries_them_out() {
    let ring = orders::install().await;
    orders::an_order_outlives_its_leader_and_the_scheduler(&ring).await;
    orders::a_reset_whose_agent_dies_in_it_is_made_once_more_by_an_order_of_its_own(&ring).await;
    orders::every_device_is_used_and_nothing_is_left_to_do(&ring).await;
    ring.cluster.end().await.expect("nothing left");
}
