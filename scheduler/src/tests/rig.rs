//! A leader on loopback, with agents and runners that a test speaks for.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use berth_crds::{
    ExpertPlacement, ExpertPlacementSpec, ExpertPlacementStatus,
    model_deployment::{DeviceChoice, Redundancy, Survive, Weights},
};
use berth_proto::v1::{self, control_client::ControlClient, control_server::ControlServer};
use berth_runtime::{Clock, lease::Deposed, telemetry::Metrics};
use berth_types::{Bytes, DeviceState, Epoch, Geometry, PlacementName, Scoring, WeightFormat};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Streaming, transport::Channel};

use super::LIMIT;
use crate::{
    commit::{CommitError, Door, Fence, Writer},
    facts::Fact,
    metrics::SchedulerMetrics,
    reports::{Chair, Reports, Seat},
    ring::Ring,
    store::memory::MemoryStore,
    term::load,
};

struct TestFence {
    epoch: u64,
    deposed: AtomicBool,
}

impl Fence for TestFence {
    fn check(&self) -> Result<Epoch, Deposed> {
        let epoch = Epoch(self.epoch);
        if self.deposed.load(Ordering::SeqCst) { Err(Deposed { epoch }) } else { Ok(epoch) }
    }
}

#[derive(Default)]
struct TestDoor(Mutex<(usize, BTreeMap<String, ExpertPlacementStatus>)>);

#[async_trait]
impl Door for TestDoor {
    async fn placement(
        &self,
        name: &PlacementName,
        _: &str,
        status: &ExpertPlacementStatus,
    ) -> Result<(), CommitError> {
        let mut written = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        written.0 += 1;
        written.1.insert(name.to_string(), status.clone());
        Ok(())
    }

    async fn reachable(&self, _: &str, _: &Condition) -> Result<(), CommitError> {
        Ok(())
    }
}

/// A leader.
pub(super) struct Rig {
    pub(super) store: Arc<MemoryStore>,
    door: Arc<TestDoor>,
    fence: Arc<TestFence>,
    metrics: Metrics,
    facts: mpsc::Sender<Fact>,
    endpoint: String,
    ended: CancellationToken,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.ended.cancel();
    }
}

impl Rig {
    pub(super) async fn start(epoch: u64) -> Self {
        Self::over(epoch, Arc::new(MemoryStore::default())).await
    }

    /// Ends this leader and starts another over the same store.
    pub(super) async fn succeed(self, epoch: u64) -> Self {
        self.ended.cancel();
        Self::over(epoch, self.store.clone()).await
    }

    async fn over(epoch: u64, store: Arc<MemoryStore>) -> Self {
        let clock = Clock::real();
        let metrics = Metrics::new("scheduler");
        let own = SchedulerMetrics::register(&metrics);
        let fence = Arc::new(TestFence { epoch, deposed: AtomicBool::new(false) });
        let door = Arc::new(TestDoor::default());
        let (facts, taken) = mpsc::channel(64);
        let ended = CancellationToken::new();
        let seat = Seat { epoch: Epoch(epoch), facts: facts.clone(), ended: ended.clone() };
        let (_, chair) = watch::channel(Chair::Taken(seat));
        let reports = Reports::new(chair, clock.clone(), own.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let stop = ended.clone().cancelled_owned();
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(ControlServer::new(reports))
                .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop),
        );
        let index = load(&*store, clock.now()).await.unwrap();
        let writer = Writer::new(fence.clone(), store.clone(), door.clone());
        let ring = Ring::new(index, Epoch(epoch), writer, clock, own, facts.clone()).with_settle(Duration::ZERO);
        tokio::spawn(ring.run(taken, ended.clone(), || {}));
        facts.send(Fact::NodesListed(BTreeSet::new())).await.unwrap();
        facts.send(Fact::PlacementsListed(["models/v3-0".parse().unwrap()].into())).await.unwrap();
        Self { store, door, fence, metrics, facts, endpoint, ended }
    }

    pub(super) fn depose(&self) {
        self.fence.deposed.store(true, Ordering::SeqCst);
    }

    pub(super) async fn apply(&self, object: &ExpertPlacement) {
        let name = "models/v3-0".parse().unwrap();
        self.facts.send(Fact::Placement(name, object.clone().into())).await.unwrap();
    }

    pub(super) async fn delete(&self, name: &str) {
        self.facts.send(Fact::PlacementGone(name.parse().unwrap())).await.unwrap();
    }

    pub(super) fn writes(&self) -> usize {
        self.door.0.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    async fn poll<T>(&self, what: &str, look: impl Fn() -> Option<T>) -> T {
        let found = async {
            loop {
                if let Some(found) = look() {
                    return found;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LIMIT, found).await.unwrap_or_else(|_| {
            panic!("no {what}; last statuses: {:#?}", self.door.0.lock().unwrap_or_else(PoisonError::into_inner).1)
        })
    }

    pub(super) async fn status_where(&self, is: impl Fn(&ExpertPlacementStatus) -> bool) -> ExpertPlacementStatus {
        let look = || self.door.0.lock().unwrap_or_else(PoisonError::into_inner).1.get("models/v3-0").cloned();
        self.poll("such status", || look().filter(&is)).await
    }

    pub(super) async fn wait_for(&self, what: &str, is: impl Fn(&str) -> bool) {
        self.poll(what, || is(&self.metrics.encode()).then_some(())).await;
    }

    async fn client(&self) -> ControlClient<Channel> {
        ControlClient::connect(self.endpoint.clone()).await.unwrap()
    }

    /// An agent with `devices` healthy devices whose workers serve.
    pub(super) async fn agent(&self, node: &str, devices: usize) -> Agent {
        self.agent_of(node, devices, "H200").await
    }

    /// The same with devices of `product`.
    pub(super) async fn agent_of(&self, node: &str, devices: usize, product: &'static str) -> Agent {
        let (say, said) = mpsc::channel(64);
        let hello = v1::AgentHello { node: node.to_owned(), boot_id: "boot".to_owned(), hosting: true, hello: None };
        let message = v1::AgentMessage { message: Some(v1::agent_message::Message::Hello(hello)) };
        say.send(message).await.unwrap();
        let orders = self.client().await.agent(ReceiverStream::new(said)).await.unwrap().into_inner();
        let devices = (1..=devices).map(|at| format!("{node}/0000:0{at}:00.0")).collect();
        let mut agent =
            Agent { say, orders, product, devices, lost: BTreeSet::new(), sequence: 0, held: BTreeMap::new() };
        agent.health().await;
        agent.workers().await;
        agent
    }

    /// Two nodes of two devices, `node-1` and `node-2`, with revision 1 of `object` on them.
    pub(super) async fn two_nodes(&self, object: &ExpertPlacement) -> (Agent, Agent) {
        let mut one = self.agent("node-1", 2).await;
        let mut two = self.agent("node-2", 2).await;
        self.apply(object).await;
        obey_both(&mut one, &mut two, &[1]).await;
        (one, two)
    }

    /// The same and a runner that uses revision 1, with its routes.
    pub(super) async fn served(&self, object: &ExpertPlacement) -> (Agent, Agent, Runner, v1::Routes) {
        let (one, two) = self.two_nodes(object).await;
        let mut runner = self.runner("models/v3-0").await;
        let routes = runner.routes_of(1).await;
        runner.use_revision(1, 1).await;
        (one, two, runner, routes)
    }

    pub(super) async fn runner(&self, placement: &str) -> Runner {
        self.runner_with(placement, &[]).await
    }

    pub(super) async fn runner_with(&self, placement: &str, features: &[&str]) -> Runner {
        let (say, said) = mpsc::channel(64);
        let features = features.iter().map(|feature| (*feature).to_owned()).collect();
        let hello = Some(v1::Hello { features, ..v1::Hello::default() });
        let hello = v1::RunnerHello { placement: placement.to_owned(), runner: "runner-0".to_owned(), hello };
        let message = v1::RunnerMessage { message: Some(v1::runner_message::Message::Hello(hello)) };
        say.send(message).await.unwrap();
        let orders = self.client().await.runner(ReceiverStream::new(said)).await.unwrap().into_inner();
        Runner { say, orders, epoch: None }
    }
}

/// An agent whose workers load at once whatever is ordered.
pub(super) struct Agent {
    say: mpsc::Sender<v1::AgentMessage>,
    orders: Streaming<v1::AgentOrder>,
    product: &'static str,
    devices: Vec<String>,
    lost: BTreeSet<String>,
    sequence: u64,
    held: BTreeMap<String, Vec<v1::Shelf>>,
}

/// What an agent was ordered to hold.
pub(super) struct Desired(v1::DesiredShelves);

impl Desired {
    pub(super) fn revisions(&self) -> Vec<u64> {
        let shelves = self.0.devices.iter().flat_map(|device| &device.shelves);
        shelves.map(|shelf| shelf.revision).collect::<BTreeSet<_>>().into_iter().collect()
    }
}

impl Agent {
    pub(super) async fn say(&mut self, message: v1::agent_message::Message) {
        self.say.send(v1::AgentMessage { message: Some(message) }).await.unwrap();
    }

    async fn health(&mut self) {
        self.sequence += 1;
        let device = |id: &String| {
            let mut state = DeviceState::HEALTHY;
            if self.lost.contains(id) {
                state.health = berth_types::Health::Unhealthy;
                state.admission = berth_types::Admission::Barred;
                state.reason = Some(berth_types::Reason::DeviceLost);
            }
            v1::DeviceHealth {
                device: id.clone(),
                vendor: "nvidia".to_owned(),
                product: self.product.to_owned(),
                memory_bytes: 1 << 30,
                ..berth_proto::convert::state_to_wire(state)
            }
        };
        let report = v1::HealthReport {
            boot_id: "boot".to_owned(),
            sequence: self.sequence,
            devices: self.devices.iter().map(device).collect(),
            ..Default::default()
        };
        self.say(v1::agent_message::Message::Health(report)).await;
    }

    async fn workers(&mut self) {
        let shelf = |shelf: &v1::Shelf| v1::ShelfState {
            placement: shelf.placement.clone(),
            placement_uid: shelf.placement_uid.clone(),
            revision: shelf.revision,
            phase: v1::ShelfPhase::Ready.into(),
            ..Default::default()
        };
        let worker = |(at, device): (usize, &String)| v1::WorkerState {
            device: device.clone(),
            phase: v1::WorkerPhase::Serving.into(),
            endpoint: format!("127.0.0.1:{}", 9000 + at),
            shelves: self.held.get(device).into_iter().flatten().map(shelf).collect(),
            instance: 1,
            ..Default::default()
        };
        let workers = self.devices.iter().enumerate().map(worker).collect();
        self.say(v1::agent_message::Message::Workers(v1::WorkersReport { workers })).await;
    }

    /// Bars the device and answers with its id.
    pub(super) async fn lose(&mut self, at: usize) -> String {
        let lost = self.devices[at].clone();
        self.lost.insert(lost.clone());
        self.health().await;
        lost
    }

    /// Loads whatever is ordered until `is`.
    pub(super) async fn obey_until(&mut self, is: impl Fn(&Desired) -> bool) {
        let obey = async {
            loop {
                let order = self.orders.message().await.unwrap().expect("orders go on");
                let Some(v1::agent_order::Order::Desired(desired)) = order.order else { continue };
                self.held = desired.devices.iter().map(|entry| (entry.device.clone(), entry.shelves.clone())).collect();
                self.workers().await;
                if is(&Desired(desired)) {
                    return;
                }
            }
        };
        tokio::time::timeout(LIMIT, obey).await.expect("such an order");
    }

    /// Waits for the scheduler to end the stream.
    pub(super) async fn ends(&mut self) {
        let end = async { while let Ok(Some(_)) = self.orders.message().await {} };
        tokio::time::timeout(LIMIT, end).await.expect("the stream ends");
    }
}

/// A runner.
pub(super) struct Runner {
    say: mpsc::Sender<v1::RunnerMessage>,
    orders: Streaming<v1::RunnerOrder>,
    epoch: Option<u64>,
}

impl Runner {
    async fn next(&mut self) -> v1::runner_order::Order {
        loop {
            let order = tokio::time::timeout(LIMIT, self.orders.message()).await.expect("an order").unwrap();
            match order.expect("orders go on").order.unwrap() {
                v1::runner_order::Order::Hello(hello) => self.epoch = Some(hello.epoch),
                order => return order,
            }
        }
    }

    /// The routes of `revision`; what comes before them is passed over.
    pub(super) async fn routes_of(&mut self, revision: u64) -> v1::Routes {
        loop {
            if let v1::runner_order::Order::Routes(routes) = self.next().await
                && routes.revision == revision
            {
                return routes;
            }
        }
    }

    /// The devices that are gone, if that is what comes next.
    pub(super) async fn gone(&mut self) -> Vec<String> {
        match self.next().await {
            v1::runner_order::Order::Gone(gone) => gone.devices,
            other => panic!("not told first: {other:?}"),
        }
    }

    /// A load window in which every expert layer of [`placement`] was asked for `tokens` by expert, all answered by the
    /// replicas of `routes` that share them evenly.
    pub(super) async fn load(&mut self, window: u64, tokens: &[u64], routes: &v1::Routes) {
        let copies = |layer: u32, expert: u32| {
            let held = routes.devices.iter().flat_map(|device| &device.layers).filter(|slots| slots.layer == layer);
            held.flat_map(|slots| &slots.experts).filter(|held| **held == expert).count()
        };
        let share = |layer: u32, expert: &u32| {
            let tokens = usize::try_from(*expert).ok().and_then(|at| tokens.get(at)).copied().unwrap_or(0);
            tokens / u64::try_from(copies(layer, *expert)).unwrap_or(1).max(1)
        };
        let answered = |slots: &v1::LayerSlots| v1::LayerTokens {
            layer: slots.layer,
            tokens: slots.experts.iter().map(|expert| share(slots.layer, expert)).sum(),
        };
        let devices = routes.devices.iter().map(|device| v1::DeviceLoad {
            device: device.device.clone(),
            layers: device.layers.iter().map(answered).collect(),
        });
        let layers = (1..4).map(|layer| v1::LayerLoad { layer, tokens: tokens.to_vec() }).collect();
        let load =
            v1::LoadWindow { window, revision: routes.revision, layers, devices: devices.collect(), length_ms: 10_000 };
        let message = v1::RunnerMessage { message: Some(v1::runner_message::Message::Load(load)) };
        self.say.send(message).await.unwrap();
    }

    /// A load window of [`large`] that asks a tenth of the experts for nearly everything.
    pub(super) async fn skew(&mut self, window: u64, routes: &v1::Routes) {
        let tokens: Vec<u64> = (0..256).map(|expert| if expert % 10 == 0 { 9000 + expert } else { 10 }).collect();
        let layers = (3..61).map(|layer| v1::LayerLoad { layer, tokens: tokens.clone() }).collect();
        let load = v1::LoadWindow { window, revision: routes.revision, layers, devices: Vec::new(), length_ms: 10_000 };
        let message = v1::RunnerMessage { message: Some(v1::runner_message::Message::Load(load)) };
        self.say.send(message).await.unwrap();
    }

    pub(super) async fn use_revision(&mut self, oldest: u64, current: u64) {
        let in_use = v1::runner_message::Message::InUse(v1::RevisionsInUse { oldest, current });
        self.say.send(v1::RunnerMessage { message: Some(in_use) }).await.unwrap();
    }
}

/// Both obey until each is ordered `revisions` and no others.
pub(super) async fn obey_both(one: &mut Agent, two: &mut Agent, revisions: &[u64]) {
    one.obey_until(|desired| desired.revisions() == revisions).await;
    two.obey_until(|desired| desired.revisions() == revisions).await;
}

/// Whether every expert of every layer is on some device.
pub(super) fn covers(routes: &v1::Routes, experts: u32) -> bool {
    let held: BTreeSet<(u32, u32)> = routes
        .devices
        .iter()
        .flat_map(|device| &device.layers)
        .flat_map(|layer| layer.experts.iter().map(|expert| (layer.layer, *expert)))
        .collect();
    (1..4).all(|layer| (0..experts).all(|expert| held.contains(&(layer, expert))))
}

pub(super) fn is_true(status: &ExpertPlacementStatus, kind: &str) -> bool {
    status.conditions.iter().any(|condition| condition.type_ == kind && condition.status == "True")
}

pub(super) fn message(status: &ExpertPlacementStatus, kind: &str) -> String {
    let found = status.conditions.iter().find(|condition| condition.type_ == kind);
    found.map(|condition| condition.message.clone()).unwrap_or_default()
}

/// A placement of a small model on `devices` devices that survives the loss of a node.
pub(super) fn placement(devices: u32) -> ExpertPlacement {
    let geometry = Geometry {
        layers: 4,
        dense_layers: 1,
        experts: 16,
        shared_experts: 1,
        top_k: 2,
        groups: 1,
        groups_kept: 1,
        scoring: Scoring::Sigmoid,
        hash_layers: 0,
        hidden: 64,
        expert_width: 32,
        format: WeightFormat::Bf16,
    };
    let spec = ExpertPlacementSpec {
        model: "v3-tiny".to_owned(),
        geometry,
        vendor_formats: BTreeMap::new(),
        non_expert_bytes: Bytes(0),
        kv_budget_bytes: Bytes(0),
        expert_loads: Vec::new(),
        speeds: Vec::new(),
        weights: Weights { uri: "file:///models/v3-tiny".to_owned(), digest: String::new() },
        devices: DeviceChoice { per_instance: Some(devices), ..DeviceChoice::default() },
        redundancy: Redundancy { survive: Survive::Node, extra_replicas: 0 },
        granted_devices: None,
        priority: 0,
        paused: false,
    };
    let mut object = ExpertPlacement::new("v3-0", spec);
    object.metadata.namespace = Some("models".to_owned());
    object.metadata.uid = Some("6c1f".to_owned());
    object.metadata.generation = Some(1);
    object
}

/// A placement of a model of V3's shape, but narrow, on `devices` devices.
pub(super) fn large(devices: u32) -> ExpertPlacement {
    let mut object = placement(devices);
    let geometry = &mut object.spec.geometry;
    (geometry.layers, geometry.dense_layers, geometry.experts, geometry.top_k) = (61, 3, 256, 8);
    (geometry.groups, geometry.groups_kept) = (8, 4);
    object
}
