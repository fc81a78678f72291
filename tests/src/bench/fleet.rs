//! Many agents in one process: each with its own connections, its own ledger and the code by which an agent keeps its
//! AcceleratorNode. Their devices are facts and lines of a kernel log; they have no workers and no stream.

use std::{collections::BTreeMap, io, sync::mpsc, time::Duration};

use berth_agent::{
    Eyes,
    health::{
        fact::{DeviceInfo, Fact, Read as Value, Reading, Rows, What},
        kmsg::{KernelLog, Read},
        log,
    },
    metrics::Metrics,
    node_status::{NodeStatus, OrderBook},
    observe,
    orders::Wanted,
    published::Publisher,
    vendor::{Facts, Seen},
    workers::View,
};
use berth_kernels::BackendKind;
use berth_runtime::Clock;
use berth_types::{NodeName, Vendor};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Node, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use kube::{
    Api, Client,
    api::{ObjectMeta, PostParams},
};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{ControlPlane, Error, Result};

/// Their service account.
const ACCOUNT: &str = "bench-agent";
/// How the API server calls them.
pub const USER: &str = "system:serviceaccount:default:bench-agent";
/// A device is read so often.
const READ_EVERY: Duration = Duration::from_millis(4_500);
/// Their token is good for so long.
const TOKEN_SECONDS: i64 = 7_200;

/// The agents.
pub struct Fleet {
    clock: Clock,
    config: kube::Config,
    devices: u32,
    agents: BTreeMap<u32, Agent>,
}

impl std::fmt::Debug for Fleet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fleet({} agents of {} devices)", self.agents.len(), self.devices)
    }
}

struct Agent {
    log: mpsc::Sender<Entry>,
    stop: CancellationToken,
    sequence: u64,
}

/// The name of a node.
#[must_use]
pub fn name(number: u32) -> String {
    format!("bench-{number:05}")
}

/// The name of a device on its node.
fn local(device: u32) -> String {
    format!("0000:{:02x}:00.0", device.saturating_add(0x10))
}

impl Fleet {
    /// No agents yet; an identity for them, with the rights that the chart gives an agent.
    ///
    /// # Errors
    /// When the API server refuses the identity.
    pub async fn new(plane: &ControlPlane, devices: u32) -> Result<Self> {
        let client = plane.client()?;
        let token = identify(&client).await?;
        let mut config = plane.client_config().clone();
        config.auth_info = kube::config::AuthInfo { token: Some(token.into()), ..kube::config::AuthInfo::default() };
        Ok(Self { clock: Clock::real(), config, devices, agents: BTreeMap::new() })
    }

    /// Starts the agent of node `number`, as if its process began now.
    ///
    /// # Errors
    /// When the system refuses a thread or a client cannot be set up.
    pub fn start(&mut self, number: u32) -> Result<()> {
        let client = Client::try_from(self.config.clone()).map_err(Error::api("set up an agent's client"))?;
        let agent = Agent::start(&self.clock, client, number, self.devices)?;
        self.agents.insert(number, agent);
        Ok(())
    }

    /// Ends the agent of node `number`, as a node that loses its power does.
    pub fn end(&mut self, number: u32) {
        self.agents.remove(&number);
    }

    /// A program on a device of node `number` fails, which is no matter of the device.
    pub fn fail_program(&mut self, number: u32, process: u32) {
        let device = local(process % self.devices.max(1));
        let message = "Graphics SM Warp Exception on (GPC 1, TPC 3, SM 0): Out Of Range Address";
        self.log(number, &xid(&device, 13, &format!("pid={process}, name=python3, {message}")));
    }

    /// All devices of node `number` leave their bus.
    pub fn lose_devices(&mut self, number: u32) {
        for device in 0..self.devices {
            let message = "pid='<unknown>', name=<unknown>, GPU has fallen off the bus.";
            self.log(number, &xid(&local(device), 79, message));
        }
    }

    fn log(&mut self, number: u32, text: &str) {
        if let Some(agent) = self.agents.get_mut(&number) {
            agent.sequence = agent.sequence.saturating_add(1);
            let record = format!("4,{},{},-;{text}\n", agent.sequence, agent.sequence);
            // An agent whose log is no longer read has ended.
            let _ = agent.log.send(Entry::Record(record.into_bytes()));
        }
    }
}

fn xid(local: &str, number: u16, message: &str) -> String {
    format!("NVRM: Xid (PCI:{}): {number}, {message}", local.trim_end_matches(".0"))
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Agent {
    fn start(clock: &Clock, client: Client, number: u32, devices: u32) -> Result<Self> {
        let text = name(number);
        let node: NodeName = text.parse().map_err(|_| Error::Unknown { what: "node name", name: text.clone() })?;
        let stop = CancellationToken::new();
        let metrics = Metrics::default();
        let (send, records) = mpsc::channel();
        let eyes = Eyes { log: Some(log::once(Log(records))), ..Eyes::default() };
        let observation = observe(eyes, clock, &metrics, &stop, |_, task| {
            tokio::spawn(task);
        })
        .map_err(|source| Error::Start { program: text.clone(), source })?;
        let (wanted, see_wanted) = watch::channel(Wanted::default());
        let (view, workers) = watch::channel(View::default());
        let (publish, published) = watch::channel(None);
        let (boot_id, backend) = (text, BackendKind::Cpu);
        let publisher = Publisher { clock: clock.clone(), node: node.clone(), boot_id, uptime_ms: 0, backend };
        tokio::spawn(publisher.run(observation.snapshots, see_wanted, publish, stop.clone()));
        let orders = OrderBook::closed();
        let facts = observation.facts.clone();
        let status =
            NodeStatus { clock: clock.clone(), client, node, published, workers, wanted, orders, facts, metrics };
        tokio::spawn(until(stop.clone(), status.run(stop.clone()), view));
        let caught_up = send.clone();
        let reading = read(clock.clone(), observation.facts, devices, caught_up);
        tokio::spawn(until(stop.clone(), reading, ()));
        Ok(Self { log: send, stop, sequence: 0 })
    }
}

/// Runs `task` until `stop`, and keeps `held` so long.
async fn until<T>(stop: CancellationToken, task: impl Future<Output = ()>, held: T) {
    // Both arms may be dropped: what they send is whole.
    tokio::select! {
        () = stop.cancelled() => {}
        () = task => {}
    }
    drop(held);
}

/// Lists the devices, lets the log be read, then reads every device again and again.
async fn read(clock: Clock, facts: Facts, devices: u32, log: mpsc::Sender<Entry>) {
    for device in 0..devices {
        tell(&facts, device, What::Listed(info(device))).await;
    }
    let mut log = Some(log);
    loop {
        for device in 0..devices {
            let rows = Value::Value(Rows::default());
            let zero = Value::Value(0);
            let recovery = Value::Value(0);
            let reading = Reading { begun: clock.now(), recovery, rows, ecc_uncorrected: zero, ..Reading::default() };
            tell(&facts, device, What::Reading(Box::new(reading))).await;
        }
        if let Some(log) = log.take() {
            let _ = log.send(Entry::CaughtUp);
        }
        clock.sleep(READ_EVERY).await;
    }
}

async fn tell(facts: &Facts, device: u32, what: What) {
    facts.send(Seen::Fact(Fact::device(local(device), what)), None).await;
}

fn info(device: u32) -> DeviceInfo {
    let local = local(device);
    DeviceInfo {
        vendor: Vendor::Nvidia,
        product: "NVIDIA H100 80GB HBM3".to_owned(),
        uuid: format!("GPU-{device:08x}-c55b-d076-fa0e-d464e4c7e08b"),
        memory_bytes: 85_899_345_920,
        interconnect_domain: None,
        card: local.clone(),
        pci: local.parse().ok(),
        reset_group: None,
        driver_branch: Some(570),
        local,
    }
}

enum Entry {
    Record(Vec<u8>),
    CaughtUp,
}

struct Log(mpsc::Receiver<Entry>);

impl KernelLog for Log {
    fn read(&mut self) -> io::Result<Read> {
        Ok(match self.0.recv() {
            Ok(Entry::Record(bytes)) => Read::Record(bytes, None),
            Ok(Entry::CaughtUp) => Read::CaughtUp,
            Err(_) => Read::Ended,
        })
    }
}

/// Makes the identity, and answers its token.
async fn identify(client: &Client) -> Result<String> {
    let metadata = json!({"name": ACCOUNT});
    let rules = json!([
        {"apiGroups": ["berth.dev"], "resources": ["acceleratornodes"], "verbs": ["list", "watch", "create"]},
        {"apiGroups": ["berth.dev"], "resources": ["acceleratornodes/status"], "verbs": ["patch"]},
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]},
    ]);
    let role = json!({"metadata": metadata, "rules": rules});
    let subject = json!({"kind": "ServiceAccount", "name": ACCOUNT, "namespace": "default"});
    let of = json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": ACCOUNT});
    let binding = json!({"metadata": metadata, "roleRef": of, "subjects": [subject]});
    create::<ClusterRole>(&Api::all(client.clone()), role).await?;
    create::<ClusterRoleBinding>(&Api::all(client.clone()), binding).await?;
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "default");
    create(&accounts, json!({"metadata": metadata})).await?;
    let spec = TokenRequestSpec { expiration_seconds: Some(TOKEN_SECONDS), ..TokenRequestSpec::default() };
    let request = TokenRequest { metadata: ObjectMeta::default(), spec: Some(spec), status: None };
    let answer = accounts.create_token_request(ACCOUNT, &PostParams::default(), &request).await;
    let token = answer.map_err(Error::api("ask for the agents' token"))?.status.and_then(|status| status.token);
    token.ok_or_else(|| Error::Unknown { what: "token of", name: ACCOUNT.to_owned() })
}

/// Makes the Node of each of `count` agents.
///
/// # Errors
/// When the API server refuses one.
pub async fn make_nodes(client: &Client, count: u32) -> Result<()> {
    use futures::{StreamExt as _, TryStreamExt as _};
    let nodes: Api<Node> = Api::all(client.clone());
    let made = (0..count).map(|number| create(&nodes, json!({"metadata": {"name": name(number)}})));
    futures::stream::iter(made).buffer_unordered(16).try_collect::<Vec<()>>().await.map(|_| ())
}

async fn create<K>(api: &Api<K>, object: serde_json::Value) -> Result<()>
where
    K: Clone + std::fmt::Debug + serde::Serialize + serde::de::DeserializeOwned,
{
    let object: K = serde_json::from_value(object)
        .map_err(|error| Error::Unknown { what: "form of an object", name: error.to_string() })?;
    api.create(&PostParams::default(), &object).await.map_err(Error::api("make an object"))?;
    Ok(())
}
