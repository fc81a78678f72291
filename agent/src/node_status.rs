//! The node's own AcceleratorNode: made if it is absent, its status written on transitions, its spec read.
//!
//! Writes are coalesced, jittered and rate-limited: the object serves people and the operator, the stream
//! serves the scheduler. It never writes the spec, nor the `Reachable` condition, nor by force.

use std::{sync::Arc, time::Duration};

use berth_crds::{
    AcceleratorNode, AcceleratorNodeSpec, AcceleratorNodeStatus,
    accelerator_node::{NodeSummary, OrderStatus},
    conditions::{self, ConditionType},
};
use berth_runtime::{Clock, clock::Elapsed};
use berth_types::{Action, Admission, Health, NodeName};
use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use k8s_openapi::{api::core::v1::Node, apimachinery::pkg::apis::meta::v1::Condition};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
    runtime::{
        WatchStreamExt,
        watcher::{self, Event},
    },
};
use rand::Rng;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    docket::Remembered,
    health::fact::{Fact, What},
    metrics::Metrics,
    orders::Wanted,
    published::Published,
    releases::{self, Release},
    vendor::{Facts, Seen},
    workers::View,
};

/// Field manager of everything written here.
const MANAGER: &str = "berth-agent";
/// Changes within this are written together; up to as much again is added at random.
const COALESCE: Duration = Duration::from_millis(250);
/// Between two writes.
const PACE: Duration = Duration::from_secs(1);
/// One answer of the API server.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Longest pause after a write that failed.
const RETRY_MOST: Duration = Duration::from_secs(30);

/// Why the object could not be written.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// The API server did not answer in time.
    #[error("the API server gave {0}")]
    Elapsed(#[from] Elapsed),
    /// The API server refused, or was not reached.
    #[error(transparent)]
    Api(#[from] kube::Error),
}

/// Keeps the object.
pub struct NodeStatus {
    /// Time.
    pub clock: Clock,
    /// The API server.
    pub client: Client,
    /// This node.
    pub node: NodeName,
    /// What is said of health.
    pub published: watch::Receiver<Option<Arc<Published>>>,
    /// What the workers do.
    pub workers: watch::Receiver<View>,
    /// Where the operator's will goes.
    pub wanted: watch::Sender<Wanted>,
    /// Orders, as they are said and as they were.
    pub orders: OrderBook,
    /// Where what people say of devices goes.
    pub facts: Facts,
    /// Counts.
    pub metrics: Metrics,
}

/// Orders on their way to the object and from it.
#[derive(Debug)]
pub struct OrderBook {
    /// What became of each; `None` = nobody knows yet, what the object held is kept.
    pub fates: watch::Receiver<Option<Arc<Vec<OrderStatus>>>>,
    /// What the object holds.
    pub recorded: watch::Sender<Arc<Vec<OrderStatus>>>,
    /// What the object held when it was first seen.
    pub remembered: watch::Sender<Option<Remembered>>,
}

impl std::fmt::Debug for NodeStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NodeStatus({})", self.node)
    }
}

/// Reads the Node itself.
///
/// # Errors
/// [`StatusError`].
pub async fn read_node(client: &Client, clock: &Clock, node: &NodeName) -> Result<Node, StatusError> {
    let api: Api<Node> = Api::all(client.clone());
    Ok(clock.timeout(CALL_LIMIT, api.get(node.as_str())).await??)
}

/// How many devices a Node promises, by vendor; `None` = it does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// By GPU feature discovery's label.
    pub nvidia: Option<usize>,
    /// By the capacity that Ascend's device plugin registered: one unit is one logical device.
    pub ascend: Option<usize>,
}

/// Resources that Ascend's device plugin registers, whole devices only.
const NPUS: [&str; 4] = ["huawei.com/Ascend910", "huawei.com/npu", "huawei.com/Ascend310P", "huawei.com/Ascend310"];

/// What the Node promises.
#[must_use]
pub fn expected_devices(node: &Node) -> Expected {
    let capacity = node.status.as_ref().and_then(|status| status.capacity.as_ref());
    let count = |name: &&str| capacity?.get(*name)?.0.parse::<usize>().ok();
    Expected {
        nvidia: node.labels().get("nvidia.com/gpu.count").and_then(|count| count.parse().ok()),
        ascend: NPUS.iter().filter_map(count).reduce(usize::saturating_add).filter(|count| *count > 0),
    }
}

impl NodeStatus {
    /// Keeps the object until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        let api: Api<AcceleratorNode> = Api::all(self.client.clone());
        let (seen, known) = watch::channel(None);
        // Cancel-safe: a write that is dropped is written again by the next agent; a watch only looks.
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.watch(&api, &seen) => {}
            () = self.write(&api, known) => {}
        }
    }

    /// Follows the object: its spec is the operator's will.
    async fn watch(&self, api: &Api<AcceleratorNode>, seen: &watch::Sender<Option<AcceleratorNode>>) {
        let config = watcher::Config::default().fields(&format!("metadata.name={}", self.node));
        let mut events = watcher::watcher(api.clone(), config).default_backoff().boxed();
        let mut released = String::new();
        loop {
            match events.try_next().await {
                Ok(Some(Event::Apply(object) | Event::InitApply(object))) => {
                    let wanted = Wanted::from_spec(&object.spec, object.metadata.generation);
                    self.wanted.send_if_modified(|current| {
                        let changed = *current != wanted;
                        if changed {
                            *current = wanted;
                        }
                        changed
                    });
                    self.orders.remember(object.status.as_ref());
                    released = self.release(&object, released).await;
                    seen.send_replace(Some(object));
                }
                Ok(Some(Event::Delete(_))) => {
                    seen.send_replace(None);
                    self.wanted.send_replace(Wanted::default());
                }
                Ok(Some(Event::Init)) => {}
                // There is none, or it was seen just now.
                Ok(Some(Event::InitDone)) => self.orders.remember(None),
                Ok(None) => return,
                Err(error) => tracing::warn!(%error, "watching the AcceleratorNode"),
            }
        }
    }

    /// Tells the ledger which devices a person vouches for; `known` is what was told before.
    async fn release(&self, object: &AcceleratorNode, known: String) -> String {
        let text = object.annotations().get(releases::ANNOTATION).cloned().unwrap_or_default();
        if text != known {
            for Release { local, unix_ms } in releases::parse(&text) {
                // On the ledger's timeline; nobody can vouch for what is still to come.
                let ago = self.clock.unix_ms().saturating_sub(unix_ms);
                let since = self.clock.now().saturating_sub(Duration::from_millis(ago));
                tracing::info!(local, "released by a person");
                self.facts.send(Seen::Fact(Fact::device(local, What::Released(since))), None).await;
            }
        }
        text
    }

    async fn write(&self, api: &Api<AcceleratorNode>, mut known: watch::Receiver<Option<AcceleratorNode>>) {
        let (mut published, mut workers) = (self.published.clone(), self.workers.clone());
        let mut fates = self.orders.fates.clone();
        let mut orders_come = true;
        // What the object knows of orders must be read before it is written over.
        if self.orders.remembered.subscribe().wait_for(Option::is_some).await.is_err() {
            return;
        }
        let mut last: Option<AcceleratorNodeStatus> = None;
        let mut retry = PACE;
        loop {
            let jitter = COALESCE.mul_f64(rand::rng().random_range(1.0..2.0));
            self.clock.sleep(jitter).await;
            let now = published.borrow_and_update().clone();
            let view = workers.borrow_and_update().clone();
            let object = known.borrow_and_update().clone();
            let orders = fates.borrow_and_update().clone().unwrap_or_else(|| self.orders.memory());
            let outcome = match now {
                Some(now) => {
                    let status = self.status(&now, &view, &orders, last.as_ref(), object.as_ref());
                    let gone = object.is_none();
                    if last.as_ref().is_some_and(|last| says_nothing_new(last, &status)) && !gone {
                        Ok(())
                    } else {
                        let written = self.put(api, &status, gone).await;
                        if written.is_ok() {
                            last = Some(status);
                            self.orders.recorded.send_replace(orders);
                        }
                        written
                    }
                }
                None => Ok(()),
            };
            let pause = match outcome {
                Ok(()) => {
                    retry = PACE;
                    PACE
                }
                Err(error) => {
                    tracing::warn!(%error, "writing the AcceleratorNode");
                    retry = retry.saturating_mul(2).min(RETRY_MOST);
                    retry.mul_f64(rand::rng().random_range(0.5..1.0))
                }
            };
            self.clock.sleep(pause).await;
            let failed = retry > PACE;
            // Cancel-safe: all arms only look. What failed is tried again without a change.
            tokio::select! {
                () = std::future::ready(()), if failed => {}
                changed = published.changed() => if changed.is_err() { return },
                changed = workers.changed() => if changed.is_err() { return },
                changed = fates.changed(), if orders_come => orders_come = changed.is_ok(),
                changed = known.wait_for(Option::is_none), if object.is_some() => if changed.is_err() { return },
            }
        }
    }

    async fn put(
        &self,
        api: &Api<AcceleratorNode>,
        status: &AcceleratorNodeStatus,
        gone: bool,
    ) -> Result<(), StatusError> {
        if gone {
            self.create(api).await?;
        }
        let patch = Patch::Apply(serde_json::json!({
            "apiVersion": AcceleratorNode::api_version(&()),
            "kind": AcceleratorNode::kind(&()),
            "metadata": {"name": self.node.as_str()},
            "status": status,
        }));
        let params = PatchParams::apply(MANAGER);
        let write = api.patch_status(self.node.as_str(), &params, &patch);
        let written = self.clock.timeout(CALL_LIMIT, write).await;
        let label = if matches!(written, Ok(Ok(_))) { "written" } else { "failed" };
        self.metrics.status_writes.get_or_create(&vec![("outcome", label.to_owned())]).inc();
        written??;
        Ok(())
    }

    /// Makes the object, owned by the Node so that it goes with it; its spec is the operator's to fill.
    async fn create(&self, api: &Api<AcceleratorNode>) -> Result<(), StatusError> {
        let node = read_node(&self.client, &self.clock, &self.node).await?;
        let object = AcceleratorNode {
            metadata: ObjectMeta {
                name: Some(self.node.to_string()),
                owner_references: node.owner_ref(&()).map(|owner| vec![owner]),
                ..ObjectMeta::default()
            },
            spec: AcceleratorNodeSpec::default(),
            status: None,
        };
        let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        match self.clock.timeout(CALL_LIMIT, api.create(&params, &object)).await? {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn status(
        &self,
        now: &Published,
        view: &View,
        orders: &[OrderStatus],
        last: Option<&AcceleratorNodeStatus>,
        object: Option<&AcceleratorNode>,
    ) -> AcceleratorNodeStatus {
        let before = last.or(object.and_then(|object| object.status.as_ref()));
        let ours = |condition: &&Condition| condition.type_ == ConditionType::Ready.as_str();
        let before: Vec<Condition> =
            before.map(|status| status.conditions.iter().filter(ours).cloned().collect()).unwrap_or_default();
        let blind = now.node.state.health >= Health::Unknown;
        let ready = conditions::Wanted {
            kind: ConditionType::Ready,
            status: Some(!blind),
            reason: if blind { "AgentBlind" } else { "Watching" },
            message: if blind {
                now.node.evidence.clone()
            } else {
                format!("{} devices are watched", now.devices.len())
            },
        };
        let time = i64::try_from(self.clock.unix_ms()).ok().and_then(|ms| Timestamp::from_millisecond(ms).ok());
        AcceleratorNodeStatus {
            observed_generation: now.wanted.generation,
            boot_id: now.boot_id.clone(),
            sequence: now.sequence,
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            node: Some(now.node_health()),
            devices: now.device_status(view),
            orders: orders.to_vec(),
            summary: summary(now),
            conditions: conditions::merge(
                &before,
                &[ready],
                now.wanted.generation,
                time.unwrap_or(Timestamp::UNIX_EPOCH),
            ),
        }
    }
}

/// Whether `now` says no more than what was written: notes and refined evidence go up the stream alone, and a state that
/// did not change holds as long as it did, whatever the wall clock made of it.
fn says_nothing_new(written: &AcceleratorNodeStatus, now: &AcceleratorNodeStatus) -> bool {
    let (mut written, mut now) = (written.clone(), now.clone());
    for status in [&mut written, &mut now] {
        status.sequence = 0;
        if let Some(node) = &mut status.node {
            node.evidence.clear();
        }
        for device in &mut status.devices {
            device.evidence.clear();
            device.since = None;
        }
    }
    written == now
}

impl OrderBook {
    /// Of an agent that carries out no orders.
    #[must_use]
    pub fn closed() -> Self {
        let (_, fates) = watch::channel(Some(Arc::default()));
        Self { fates, recorded: watch::Sender::default(), remembered: watch::Sender::default() }
    }

    /// Keeps what the object knew at first sight, and nothing later: from then on this agent knows better.
    fn remember(&self, status: Option<&AcceleratorNodeStatus>) {
        self.remembered.send_if_modified(|remembered| {
            let first = remembered.is_none();
            if first {
                let known = |status: &AcceleratorNodeStatus| Remembered {
                    orders: status.orders.clone(),
                    boot_id: status.boot_id.clone(),
                };
                *remembered = Some(status.map(known).unwrap_or_default());
            }
            first
        });
    }

    fn memory(&self) -> Arc<Vec<OrderStatus>> {
        let remembered = self.remembered.borrow();
        Arc::new(remembered.as_ref().map(|remembered| remembered.orders.clone()).unwrap_or_default())
    }
}

fn summary(now: &Published) -> NodeSummary {
    let count = |matching: &dyn Fn(&crate::published::Device) -> bool| {
        u32::try_from(now.devices.iter().filter(|device| matching(device)).count()).unwrap_or(u32::MAX)
    };
    let joined = |values: Vec<String>| {
        let mut values: Vec<String> = values.into_iter().filter(|value| !value.is_empty()).collect();
        values.sort_unstable();
        values.dedup();
        values.join(",")
    };
    let action = now.devices.iter().map(|device| device.standing.state.action).max().unwrap_or(Action::None);
    let worst = now.devices.iter().max_by_key(|device| {
        let state = device.standing.state;
        (state.health, state.admission, state.action)
    });
    NodeSummary {
        vendor: now.vendors().iter().map(|vendor| vendor.as_str()).collect::<Vec<_>>().join(","),
        product: joined(now.devices.iter().map(|device| device.info.product.clone()).collect()),
        devices: count(&|_| true),
        healthy: count(&|device| device.standing.state.health == Health::Healthy),
        schedulable: count(&|device| device.standing.state.admission == Admission::Schedulable),
        action: action.max(now.node.state.action).to_string(),
        reason: worst
            .and_then(|device| device.standing.state.reason)
            .or(now.node.state.reason)
            .map(|reason| reason.to_string())
            .unwrap_or_default(),
        domain: joined(now.devices.iter().filter_map(|device| device.info.interconnect_domain.clone()).collect()),
    }
}
