//! The operator on a real control plane. Agents, scheduler and kubelets are played by the scenario, which
//! writes what they would write; everything else is real, the garbage collector included.

use std::{collections::BTreeMap, time::Duration};

use berth_crds::{
    AcceleratorNode, CapacityQueue, ExpertPlacement, LABEL_DEPLOYMENT, LABEL_PLACEMENT, ModelDeployment, ModelProfile,
};
use berth_operator::{
    Config, Roots, RunnerConfig,
    accelerator_node::{
        book::Budget,
        remediate::{Mode, Policy},
        remediation::Settings,
    },
};
use berth_runtime::{Clock, PartConfig, election::Timing, lease::LeaseConfig};
use berth_tests::control_plane::{ControlPlane, ControlPlaneConfig};
use berth_types::Epoch;
use k8s_openapi::{
    NamespaceResourceScope,
    api::{
        apps::v1::Deployment,
        core::v1::{Node, Pod},
    },
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{cluster::eventually, crd_rules};

const SPACE: &str = "default";
/// The operator's own identity, so that the audit log tells its calls from the scenario's.
const OPERATOR: &str = "system:serviceaccount:default:operator";

struct World {
    plane: ControlPlane,
    client: Client,
    stop: CancellationToken,
    operator: JoinHandle<()>,
}

impl World {
    async fn start(name: &str) -> Self {
        let plane = ControlPlane::start(ControlPlaneConfig::named(name)).await.unwrap();
        let client = plane.client().unwrap();
        crd_rules::install(&client).await;
        plane.kubectl(&["create", "serviceaccount", "operator"]).await.unwrap();
        let grant = ["create", "clusterrolebinding", "operator", "--clusterrole=cluster-admin"];
        plane.kubectl(&[&grant[..], &["--serviceaccount=default:operator"]].concat()).await.unwrap();
        let token = plane.kubectl(&["create", "token", "operator"]).await.unwrap();
        let mut identity = plane.client_config().clone();
        identity.auth_info =
            kube::config::AuthInfo { token: Some(token.trim().to_owned().into()), ..Default::default() };
        let stop = CancellationToken::new();
        let config = config(Budget { cluster: 4, pool: 2, domain: 1 });
        let own = Client::try_from(identity).unwrap();
        let asked = stop.clone();
        let operator = tokio::spawn(async move {
            berth_operator::run(config, own, Clock::real(), asked).await.unwrap();
        });
        Self { plane, client, stop, operator }
    }

    async fn end(self) {
        self.stop.cancel();
        self.operator.await.unwrap();
    }

    fn api<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(&self) -> Api<K> {
        Api::namespaced(self.client.clone(), SPACE)
    }

    async fn create<K>(&self, api: Api<K>, object: Value)
    where
        K: Resource<DynamicType = ()> + DeserializeOwned + serde::Serialize + Clone + std::fmt::Debug,
    {
        let object: K = serde_json::from_value(object).unwrap();
        api.create(&PostParams::default(), &object).await.unwrap();
    }

    /// A labelled node with four devices as its agent would report them. It has no room for pods, so that
    /// runners stay unbound and the scenario can play their kubelet.
    async fn add_node(&self, name: &str) {
        let node = json!({"apiVersion": "v1", "kind": "Node",
                          "metadata": {"name": name, "labels": {"berth.dev/mode": "native", "berth.dev/rack": "r1"}}});
        self.create::<Node>(Api::all(self.client.clone()), node).await;
        let api: Api<AcceleratorNode> = Api::all(self.client.clone());
        let object = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "AcceleratorNode",
                            "metadata": {"name": name}, "spec": {}});
        self.create(api.clone(), object).await;
        let device = |index: u32| {
            json!({"device": format!("{name}/0000:0{index}:00.0"), "vendor": "nvidia", "product": "h200",
                   "memoryBytes": 80_000_000_000u64, "health": "Healthy", "admission": "Schedulable", "action": "None"})
        };
        let status =
            json!({"status": {"devices": (1..5).map(device).collect::<Vec<_>>(), "bootId": "b", "sequence": 1}});
        api.patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
    }

    async fn add_profile(&self) {
        let geometry = json!({"layers": 4, "denseLayers": 1, "experts": 16, "topK": 4, "groups": 4, "groupsKept": 2,
                              "scoring": "sigmoid", "hidden": 64, "expertWidth": 32, "format": "bf16"});
        let profile = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "ModelProfile",
            "metadata": {"name": "v3-tiny"},
            "spec": {"geometry": geometry, "nonExpertBytes": 500_000, "kvBytesPerToken": 384, "context": 512}});
        self.create::<ModelProfile>(Api::all(self.client.clone()), profile).await;
    }

    async fn deploy(&self, name: &str, spec: Value) {
        let mut object = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "ModelDeployment",
            "metadata": {"name": name},
            "spec": {"model": "v3-tiny", "weights": {"uri": "file:///models/v3"}}});
        for (key, value) in spec.as_object().unwrap() {
            object["spec"][key] = value.clone();
        }
        self.create::<ModelDeployment>(self.api(), object).await;
    }

    async fn list<K>(&self, deployment: &str) -> Vec<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        let selector = ListParams::default().labels(&format!("{LABEL_DEPLOYMENT}={deployment}"));
        self.api::<K>().list(&selector).await.unwrap().items
    }

    async fn names<K>(&self, deployment: &str) -> Vec<String>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        self.list::<K>(deployment).await.iter().map(ResourceExt::name_any).collect()
    }

    /// Waits until there are `count` instances, each with its runner's pod, and gives their names.
    async fn instances(&self, deployment: &str, count: usize) -> Vec<String> {
        eventually(&format!("{count} instances of {deployment}"), || async {
            let names = self.names::<ExpertPlacement>(deployment).await;
            let pods = self.list::<Pod>(deployment).await;
            let running = self.names::<Deployment>(deployment).await;
            (names.len() == count && running == names && pods.len() == count).then_some(names)
        })
        .await
    }

    /// What scheduler and kubelet would write once the instance serves.
    async fn serve(&self, instance: &str) {
        let now = "2026-01-01T00:00:00Z";
        let condition = |kind: &str| json!({"type": kind, "status": "True", "reason": "Played", "message": "", "lastTransitionTime": now});
        let digest = format!("sha256:{}", "a".repeat(64));
        let status = json!({"status": {"servingRevision": 1, "slotsReady": 16, "slotsTotal": 16,
            "assignment": {"epoch": 1, "revision": 1, "digest": digest, "devices": ["n1/0000:01:00.0"]},
            "conditions": [condition("Placed"), condition("WeightsLoaded"), condition("Serving")]}});
        let placements = self.api::<ExpertPlacement>();
        placements.patch_status(instance, &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
        let pods = self.api::<Pod>();
        let selector = ListParams::default().labels(&format!("{LABEL_PLACEMENT}={instance}"));
        for pod in pods.list(&selector).await.unwrap() {
            let status = json!({"status": {"podIP": "127.1.1.1", "podIPs": [{"ip": "127.1.1.1"}], "phase": "Running",
                "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now}]}});
            let parameters = PatchParams::default();
            pods.patch_status(&pod.name_any(), &parameters, &Patch::Strategic(&status)).await.unwrap();
        }
    }

    /// Waits until the condition is as said and gives its message.
    async fn condition(&self, deployment: &str, kind: &str, status: &str, reason: &str) -> String {
        let deployments = self.api::<ModelDeployment>();
        eventually(&format!("{deployment}: {kind}={status} {reason}"), || async {
            let live = deployments.get(deployment).await.ok()?;
            let found = live.status?.conditions.into_iter().find(|condition| condition.type_ == kind)?;
            let current = found.observed_generation == live.metadata.generation;
            (current && found.status == status && found.reason == reason).then_some(found.message)
        })
        .await
    }

    async fn nothing_left_of(&self, deployment: &str) {
        eventually(&format!("nothing left of {deployment}"), || async {
            let left = self.names::<ExpertPlacement>(deployment).await.len()
                + self.names::<Deployment>(deployment).await.len()
                + self.names::<Pod>(deployment).await.len();
            (left == 0).then_some(())
        })
        .await;
    }

    /// Calls of the operator that the API server answered so far, by verb and resource; watches left out.
    fn calls(&self) -> BTreeMap<(String, String), usize> {
        let log = std::fs::read_to_string(self.plane.audit_log()).unwrap();
        let mut calls = BTreeMap::new();
        for line in log.lines() {
            let event: Value = serde_json::from_str(line).unwrap();
            let text = |path: &str| event.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
            let lease = text("/objectRef/resource") == "leases";
            if text("/user/username") == OPERATOR
                && text("/stage") == "ResponseComplete"
                && text("/verb") != "watch"
                && !lease
            {
                *calls.entry((text("/verb"), text("/objectRef/resource"))).or_default() += 1;
            }
        }
        calls
    }
}

/// An operator of this control plane that advises within `budget` and resets nothing.
pub(crate) fn config(budget: Budget) -> Config {
    Config {
        part: PartConfig {
            name: "operator",
            admin_listen: "127.0.0.1:0".parse().unwrap(),
            drain_limit: Duration::from_secs(20),
        },
        lease: LeaseConfig {
            namespace: SPACE.to_owned(),
            name: "berth-operator".to_owned(),
            identity: "operator@127.0.0.1:1".to_owned(),
            timing: Timing::default(),
            floor: Epoch(0),
        },
        runner: RunnerConfig {
            image: "berth".to_owned(),
            image_pull_policy: "IfNotPresent".to_owned(),
            service_account: String::new(),
            scheduler_lease: "berth/berth-scheduler".to_owned(),
            otlp_endpoint: String::new(),
            roots: Roots(vec!["/models".into()]),
            claims: BTreeMap::new(),
        },
        instance: Some("operator".to_owned()),
        remediation: Settings {
            policy: Policy {
                mode: Mode::Advise,
                budget,
                empty_limit: 60,
                order_limit: 60,
                validate_limit: 60,
                reboot: false,
                paused: false,
            },
            others: Vec::new(),
            signs: true,
            namespace: SPACE.to_owned(),
        },
    }
}

async fn a_label_makes_a_node_host(world: &World) {
    let (nodes, accelerators): (Api<Node>, Api<AcceleratorNode>) =
        (Api::all(world.client.clone()), Api::all(world.client.clone()));
    eventually("n1 is native and tainted", || async {
        let native = accelerators.get("n1").await.ok()?.spec;
        let taints = nodes.get("n1").await.ok()?.spec?.taints?;
        (native.native && native.rack == "r1" && taints.iter().any(|taint| taint.key == "berth.dev/native"))
            .then_some(())
    })
    .await;
    world.plane.kubectl(&["cordon", "n1"]).await.unwrap();
    eventually("n1 drains", || async { accelerators.get("n1").await.ok()?.spec.drain.then_some(()) }).await;
    world.plane.kubectl(&["uncordon", "n1"]).await.unwrap();
    eventually("n1 hosts again", || async { (!accelerators.get("n1").await.ok()?.spec.drain).then_some(()) }).await;
}

async fn a_deployment_becomes_instances_that_serve(world: &World) {
    world.deploy("v3", json!({"replicas": 2})).await;
    let instances = world.instances("v3", 2).await;
    world.condition("v3", "Ready", "False", "Starting").await;
    for instance in &instances {
        world.serve(instance).await;
    }
    assert_eq!(world.condition("v3", "Ready", "True", "Serving").await, "2 of 2 instances serving");
    let status = world.api::<ModelDeployment>().get("v3").await.unwrap().status.unwrap();
    assert_eq!((status.summary.instances.as_str(), status.summary.pools.as_str()), ("2/2", "h200:2"));
    assert!(status.instances.iter().all(|instance| instance.endpoint == "127.1.1.1:7500"), "{status:?}");
    let printed = world.plane.kubectl(&["get", "bmd"]).await.unwrap();
    assert!(printed.contains("READY") && printed.contains("2/2") && printed.contains("h200:2"), "{printed}");
}

async fn other_weights_make_a_new_instance_beside_the_old(world: &World) {
    let before = world.names::<ExpertPlacement>("v3").await;
    let change = json!({"spec": {"weights": {"uri": "file:///models/v3-other"}}});
    world.api::<ModelDeployment>().patch("v3", &PatchParams::default(), &Patch::Merge(&change)).await.unwrap();
    let three = world.instances("v3", 3).await;
    assert!(before.iter().all(|name| three.contains(name)), "an old one went before a new one served: {three:?}");
    let is_ready = |name: &String| {
        let name = name.clone();
        async move {
            let status = world.api::<ModelDeployment>().get("v3").await.ok()?.status?;
            status.instances.iter().any(|instance| instance.name == name && instance.ready).then_some(())
        }
    };
    for round in 0..2 {
        let names = world.instances("v3", 3 - usize::from(round > 1)).await;
        let fresh: Vec<_> = names.iter().filter(|name| !before.contains(name)).cloned().collect();
        for name in &fresh {
            world.serve(name).await;
            eventually(&format!("{name} serves"), || is_ready(name)).await;
        }
    }
    eventually("only new instances", || async {
        let names = world.names::<ExpertPlacement>("v3").await;
        (names.len() == 2 && names.iter().all(|name| !before.contains(name))).then_some(())
    })
    .await;
    world.condition("v3", "Ready", "True", "Serving").await;
}

async fn scale_takes_the_highest_indexes_first(world: &World) {
    let names = world.names::<ExpertPlacement>("v3").await;
    world.plane.kubectl(&["scale", "bmd/v3", "--replicas=1"]).await.unwrap();
    let left = world.instances("v3", 1).await;
    assert_eq!(left, names[..1]);
    world.condition("v3", "Ready", "True", "Serving").await;
    world.plane.kubectl(&["scale", "bmd/v3", "--replicas=0"]).await.unwrap();
    world.nothing_left_of("v3").await;
    world.condition("v3", "Ready", "True", "ScaledToZero").await;
    world.plane.kubectl(&["scale", "bmd/v3", "--replicas=3"]).await.unwrap();
    world.instances("v3", 3).await;
}

async fn deletion_leaves_nothing(world: &World) {
    world.api::<ModelDeployment>().delete("v3", &DeleteParams::default()).await.unwrap();
    world.nothing_left_of("v3").await;
}

async fn what_is_not_honoured_is_named(world: &World) {
    world.deploy("engine", json!({"serving": {"mode": "engine"}})).await;
    let message = world.condition("engine", "Accepted", "False", "FieldNotHonoured").await;
    assert_eq!(message, "spec.serving.mode engine is not honoured yet: set it to native");
    world.condition("engine", "Stalled", "True", "FieldNotHonoured").await;
    world.deploy("far", json!({"weights": {"uri": "s3://bucket/v3"}})).await;
    world.condition("far", "Accepted", "False", "FieldNotHonoured").await;
    world.deploy("outside", json!({"weights": {"uri": "file:///etc/v3"}})).await;
    let message = world.condition("outside", "Accepted", "False", "WeightsNotAllowed").await;
    assert!(message.contains("/etc/v3 is outside the folders that weights may lie in (/models)"), "{message}");
    world.deploy("unknown", json!({"model": "v9"})).await;
    world.condition("unknown", "Accepted", "False", "ProfileNotFound").await;
    for name in ["engine", "far", "outside", "unknown"] {
        world.nothing_left_of(name).await;
        world.api::<ModelDeployment>().delete(name, &DeleteParams::default()).await.unwrap();
    }
    let events = world.plane.kubectl(&["get", "events"]).await.unwrap();
    assert!(events.contains("FieldNotHonoured") && events.contains("modeldeployment/engine"), "{events}");
}

#[tokio::test]
async fn operator_keeps_deployments_and_nodes_true() {
    let world = World::start("operator").await;
    world.add_profile().await;
    world.add_node("n1").await;
    a_label_makes_a_node_host(&world).await;
    a_deployment_becomes_instances_that_serve(&world).await;
    other_weights_make_a_new_instance_beside_the_old(&world).await;
    scale_takes_the_highest_indexes_first(&world).await;
    deletion_leaves_nothing(&world).await;
    what_is_not_honoured_is_named(&world).await;
    world.end().await;
}

/// 100 deployments in a queue for 10: ten get instances, ninety say why they wait, and then nobody calls
/// anybody.
#[tokio::test]
async fn a_hundred_deployments_under_a_full_quota_come_to_rest() {
    let world = World::start("operator-quota").await;
    world.add_profile().await;
    world.add_node("n1").await;
    let queue = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "CapacityQueue", "metadata": {"name": "batch"},
                       "spec": {"quotaDevices": 10, "borrowLimitDevices": 0}});
    world.create::<CapacityQueue>(Api::all(world.client.clone()), queue).await;
    for index in 0..100 {
        world.deploy(&format!("d{index:02}"), json!({"queue": "batch"})).await;
    }
    let queues: Api<CapacityQueue> = Api::all(world.client.clone());
    eventually("ten granted, ninety waiting", || async {
        let status = queues.get("batch").await.ok()?.status?;
        (status.used_devices == 10 && status.waiting == 90).then_some(())
    })
    .await;
    let message = world.condition("d99", "CapacityAvailable", "False", "QuotaExceeded").await;
    assert_eq!(message, "queue batch: 10 of 10 devices used; needs 1 more");
    let placements = world.api::<ExpertPlacement>().list(&ListParams::default()).await.unwrap();
    assert_eq!(placements.items.len(), 10);
    let calls = at_rest(&world).await;
    let total: usize = calls.values().sum();
    println!("{total} calls for 100 deployments: {calls:#?}");
    // Per deployment: its status when first seen and when its grant or runner changed, with an event each;
    // per instance its placement and runner. Queue statuses are coalesced.
    assert!(total <= 100 * 8, "{total} calls: {calls:#?}");
    world.api::<ModelDeployment>().delete("d00", &DeleteParams::default()).await.unwrap();
    world.nothing_left_of("d00").await;
    eventually("the next in line runs", || async {
        let names = world.names::<ExpertPlacement>("d10").await;
        (names.len() == 1).then_some(())
    })
    .await;
    world.end().await;
}

/// The calls so far, once a second passed without one.
async fn at_rest(world: &World) -> BTreeMap<(String, String), usize> {
    let mut before = world.calls();
    for _ in 0..60 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = world.calls();
        if now == before {
            return now;
        }
        before = now;
    }
    panic!("the operator never rests: {before:#?}");
}
