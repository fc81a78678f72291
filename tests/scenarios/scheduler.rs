//! The scheduler on a real control plane. Agents are played by the scenario over real streams; objects,
//! lease, watches and the API server's rules are real.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use berth_crds::{AcceleratorNode, ExpertPlacement, PlacementMap};
use berth_proto::{
    convert,
    v1::{self, control_client::ControlClient},
};
use berth_runtime::{Clock, discovery};
use berth_scheduler::{Config, store::StoreConfig};
use berth_tests::control_plane::{ControlPlane, ControlPlaneConfig};
use berth_types::{Admission, DeviceState, Health};
use kube::{
    Api, Client,
    api::{DeleteParams, ListParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use tokio::{
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::{cluster::eventually, crd_rules};

const LEASE: &str = "berth-scheduler";

/// A scheduler replica in this process.
pub(crate) struct Replica {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Replica {
    fn start(pod: &str, client: Client) -> Self {
        Self::with_store(pod, client, StoreConfig::default())
    }

    pub(crate) fn with_store(pod: &str, client: Client, store: StoreConfig) -> Self {
        let listen = "127.0.0.1:0".parse().unwrap();
        let config = Config {
            pod: pod.to_owned(),
            lease_namespace: "default".to_owned(),
            lease: LEASE.to_owned(),
            listen,
            admin_listen: listen,
            drain_limit: Duration::from_secs(10),
            load_limit: berth_scheduler::cutover::LOAD_LIMIT,
            store,
        };
        let stop = CancellationToken::new();
        let run = berth_scheduler::run(config, client, Clock::real(), stop.clone());
        Self { stop, task: tokio::spawn(async move { run.await.unwrap() }) }
    }

    pub(crate) async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

/// Agents that load at once whatever they are ordered, each until its token is cancelled.
pub(crate) struct Agents {
    pub(crate) client: Client,
    pub(crate) tasks: JoinSet<()>,
}

impl Agents {
    /// Keeps a node's agent connected to whoever leads; the devices in `lost` are barred.
    pub(crate) fn start(&mut self, node: &'static str, lost: tokio::sync::watch::Receiver<BTreeSet<String>>) {
        let client = self.client.clone();
        self.tasks.spawn(async move {
            loop {
                let leader =
                    discovery::discover(client.clone(), &Clock::real(), "default", LEASE, Duration::ZERO).await;
                if let Ok(leader) = leader {
                    let _ = serve(node, &format!("http://{}", leader.endpoint), lost.clone()).await;
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        });
    }
}

async fn serve(
    node: &str,
    endpoint: &str,
    mut lost: tokio::sync::watch::Receiver<BTreeSet<String>>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    use v1::agent_message::Message;
    let devices: Vec<String> = (1..3).map(|at| format!("{node}/0000:0{at}:00.0")).collect();
    let (say, said) = mpsc::channel(16);
    let send = async |message| say.send(v1::AgentMessage { message: Some(message) }).await;
    let hello = v1::AgentHello { node: node.to_owned(), boot_id: "b".to_owned(), hosting: true, hello: None };
    send(Message::Hello(hello)).await?;
    let mut orders =
        ControlClient::connect(endpoint.to_owned()).await?.agent(ReceiverStream::new(said)).await?.into_inner();
    let mut held: BTreeMap<String, Vec<v1::Shelf>> = BTreeMap::new();
    for sequence in 1.. {
        let barred = lost.borrow_and_update().clone();
        send(Message::Health(health(&devices, &barred, sequence))).await?;
        send(Message::Workers(workers(&devices, &held))).await?;
        tokio::select! {
            order = orders.message() => match order? {
                None => break,
                Some(v1::AgentOrder { order: Some(v1::agent_order::Order::Desired(desired)) }) => {
                    held = desired.devices.into_iter().map(|entry| (entry.device, entry.shelves)).collect();
                }
                Some(_) => {}
            },
            changed = lost.changed() => changed?,
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
    }
    Ok(())
}

fn health(devices: &[String], barred: &BTreeSet<String>, sequence: u64) -> v1::HealthReport {
    let device = |id: &String| {
        let mut state = DeviceState::HEALTHY;
        if barred.contains(id) {
            (state.health, state.admission) = (Health::Unhealthy, Admission::Barred);
        }
        v1::DeviceHealth {
            device: id.clone(),
            vendor: "nvidia".to_owned(),
            product: "h200".to_owned(),
            memory_bytes: 1 << 30,
            ..convert::state_to_wire(state)
        }
    };
    let devices = devices.iter().map(device).collect();
    v1::HealthReport { boot_id: "b".to_owned(), sequence, devices, ..Default::default() }
}

fn workers(devices: &[String], held: &BTreeMap<String, Vec<v1::Shelf>>) -> v1::WorkersReport {
    let shelf = |shelf: &v1::Shelf| v1::ShelfState {
        placement_uid: shelf.placement_uid.clone(),
        revision: shelf.revision,
        phase: v1::ShelfPhase::Ready.into(),
        ..Default::default()
    };
    let worker = |device: &String| v1::WorkerState {
        device: device.clone(),
        phase: v1::WorkerPhase::Serving.into(),
        endpoint: "127.0.0.1:9000".to_owned(),
        shelves: held.get(device).into_iter().flatten().map(shelf).collect(),
        instance: 1,
        ..Default::default()
    };
    v1::WorkersReport { workers: devices.iter().map(worker).collect() }
}

pub(crate) async fn add_node(client: &Client, name: &str) {
    let api: Api<AcceleratorNode> = Api::all(client.clone());
    let object = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "AcceleratorNode", "metadata": {"name": name}, "spec": {"native": true}});
    api.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap();
    let status = json!({"status": {"bootId": "b", "sequence": 1}});
    api.patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await.unwrap();
}

pub(crate) fn placement(name: &str) -> ExpertPlacement {
    let geometry = json!({"layers": 4, "denseLayers": 1, "experts": 16, "topK": 4, "groups": 4, "groupsKept": 2,
                          "scoring": "sigmoid", "hidden": 64, "expertWidth": 32, "format": "bf16"});
    let object = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "ExpertPlacement",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"model": "v3-tiny", "geometry": geometry, "nonExpertBytes": 1000,
                 "weights": {"uri": "file:///models/v3"}, "devices": {"perInstance": 4},
                 "redundancy": {"survive": "node"}}});
    serde_json::from_value(object).unwrap()
}

/// Waits until the status of a placement is as wanted and gives it.
pub(crate) async fn status(client: &Client, name: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    let api: Api<ExpertPlacement> = Api::namespaced(client.clone(), "default");
    eventually(&format!("{name}: {what}"), || async {
        let live = serde_json::to_value(api.get(name).await.ok()?.status?).ok()?;
        is(&live).then_some(live)
    })
    .await
}

pub(crate) fn number(status: &Value, pointer: &str) -> u64 {
    status.pointer(pointer).and_then(Value::as_u64).unwrap_or(0)
}

pub(crate) fn is_true(conditions: &Value, kind: &str) -> bool {
    let all = conditions.as_array().cloned().unwrap_or_default();
    all.iter().any(|condition| condition["type"] == kind && condition["status"] == "True")
}

#[tokio::test(flavor = "multi_thread")]
async fn scheduler_places_repairs_hands_over_and_leaves_nothing() {
    let plane = ControlPlane::start(ControlPlaneConfig::named("scheduler")).await.unwrap();
    let client = plane.client().unwrap();
    crd_rules::install(&client).await;
    let first = Replica::start("one", client.clone());
    let (lose, lost) = tokio::sync::watch::channel(BTreeSet::new());
    let mut agents = Agents { client: client.clone(), tasks: JoinSet::new() };
    for node in ["n1", "n2"] {
        add_node(&client, node).await;
        agents.start(node, lost.clone());
    }
    let placements: Api<ExpertPlacement> = Api::namespaced(client.clone(), "default");
    let maps: Api<PlacementMap> = Api::namespaced(client.clone(), "default");
    placements.create(&PostParams::default(), &placement("p")).await.unwrap();
    let live = status(&client, "p", "revision 1 serves", |live| {
        number(live, "/servingRevision") == 1 && is_true(&live["conditions"], "Ready")
    })
    .await;
    let epoch = number(&live, "/assignment/epoch");
    assert!(epoch > 0 && number(&live, "/observedGeneration") == 1, "{live}");
    let nodes: Api<AcceleratorNode> = Api::all(client.clone());
    eventually("both nodes are Reachable", || async {
        let all = nodes.list(&ListParams::default()).await.ok()?;
        let heard = |node: &AcceleratorNode| {
            let status = serde_json::to_value(node.status.clone()).unwrap_or_default();
            status["bootId"] == "b" && is_true(&status["conditions"], "Reachable")
        };
        all.items.iter().all(heard).then_some(())
    })
    .await;

    lose.send_replace(["n1/0000:01:00.0".to_owned()].into());
    let live = status(&client, "p", "revision 2 serves", |live| number(live, "/servingRevision") == 2).await;
    let devices = live.pointer("/assignment/devices").and_then(Value::as_array).cloned().unwrap_or_default();
    assert!(devices.len() == 3 && !devices.contains(&json!("n1/0000:01:00.0")), "{live}");
    assert_eq!(maps.list(&ListParams::default()).await.unwrap().items.len(), 2);

    first.end().await;
    let second = Replica::start("two", client.clone());
    let live =
        status(&client, "p", "claimed by the next leader", |live| number(live, "/assignment/epoch") > epoch).await;
    assert_eq!(number(&live, "/assignment/revision"), 2, "a new leader goes on with what is stored");
    let stale = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "ExpertPlacement",
        "status": {"assignment": {"epoch": epoch, "revision": 3, "digest": live.pointer("/assignment/digest"), "devices": []}}});
    let refused = placements.patch_status("p", &PatchParams::default(), &Patch::Merge(&stale)).await.unwrap_err();
    assert!(refused.to_string().contains("epoch never falls"), "{refused}");

    lose.send_replace(BTreeSet::new());
    status(&client, "p", "the device that came back is used again", |live| {
        number(live, "/servingRevision") == 3
            && live.pointer("/assignment/devices").and_then(Value::as_array).is_some_and(|devices| devices.len() == 4)
    })
    .await;
    placements.delete("p", &DeleteParams::background()).await.unwrap();
    eventually("no map is left", || async {
        maps.list(&ListParams::default()).await.ok()?.items.is_empty().then_some(())
    })
    .await;
    agents.tasks.shutdown().await;
    second.end().await;
}
