//! A simulated node: its Node object, its Lease, its heartbeats. Must never renew anything for a node whose
//! heartbeats are stopped.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{
    DaemonEndpoint, Node as NodeObject, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeSpec, NodeStatus,
    NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference, Time};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;

use super::SimulatedNode;
use crate::address::Address;
use crate::cluster_tool::KUBERNETES_VERSION;
use crate::{Error, Result};

/// Where nodes keep their leases.
const LEASE_NAMESPACE: &str = "kube-node-lease";
/// As a kubelet has it.
const LEASE_SECONDS: i32 = 40;
/// Where each node's logs are served, as a kubelet does.
pub(super) const LOG_PORT: u16 = 10250;
/// A status is written again after so long even when nothing changed.
const STATUS_EVERY: Duration = Duration::from_secs(10);

/// One node and what it is doing.
pub(super) struct Node {
    pub wanted: SimulatedNode,
    /// The API hears from it: heartbeats and what becomes of its pods.
    pub reachable: watch::Sender<bool>,
    /// Pods run.
    pub powered: watch::Sender<bool>,
    address: Address,
}

impl Node {
    pub(super) fn new(wanted: SimulatedNode, address: Address) -> Self {
        Self { wanted, address, reachable: watch::Sender::new(true), powered: watch::Sender::new(true) }
    }

    pub(super) fn ip(&self) -> Ipv4Addr {
        self.address.ip()
    }

    /// Makes the Node object, or brings an existing one's labels and taints up to what is wanted.
    pub(super) async fn register(&self, client: &Client) -> Result<NodeObject> {
        let name = &self.wanted.name;
        let api: Api<NodeObject> = Api::all(client.clone());
        let object = self.object();
        let doing = || Error::api(format!("register node {name}"));
        let node = match api.create(&PostParams::default(), &object).await {
            Err(kube::Error::Api(answer)) if answer.code == 409 => {
                let labels = serde_json::json!({ "metadata": { "labels": object.metadata.labels } });
                api.patch(name, &PatchParams::default(), &Patch::Merge(labels)).await.map_err(doing())?
            }
            made => made.map_err(doing())?,
        };
        self.write_status(client).await.map_err(doing())?;
        Ok(node)
    }

    /// Renews the lease and the status for ever, or while the node has power and is not told to be silent.
    pub(super) async fn beat(&self, client: Client, object: NodeObject, every: Duration) {
        let (mut reachable, mut powered) = (self.reachable.subscribe(), self.powered.subscribe());
        let mut status_at = Instant::now();
        loop {
            let was_silent = !*reachable.borrow() || !*powered.borrow();
            if reachable.wait_for(|r| *r).await.is_err() || powered.wait_for(|p| *p).await.is_err() {
                return;
            }
            if let Err(error) = self.renew_lease(&client, &object).await {
                tracing::debug!(%error, node = self.wanted.name, "lease not renewed");
            }
            if was_silent || status_at.elapsed() >= STATUS_EVERY {
                status_at = Instant::now();
                if let Err(error) = self.write_status(&client).await {
                    tracing::debug!(%error, node = self.wanted.name, "node status not written");
                }
            }
            tokio::select! {
                // A lost tick only makes the next one earlier.
                () = tokio::time::sleep(every) => {}
                _ = reachable.changed() => {}
                _ = powered.changed() => {}
            }
        }
    }

    async fn renew_lease(&self, client: &Client, node: &NodeObject) -> kube::Result<()> {
        let name = &self.wanted.name;
        let api: Api<Lease> = Api::namespaced(client.clone(), LEASE_NAMESPACE);
        let spec = LeaseSpec {
            holder_identity: Some(name.clone()),
            lease_duration_seconds: Some(LEASE_SECONDS),
            renew_time: Some(MicroTime(Timestamp::now())),
            ..LeaseSpec::default()
        };
        let patch = Patch::Merge(serde_json::json!({ "spec": spec }));
        match api.patch(name, &PatchParams::default(), &patch).await {
            Err(kube::Error::Api(answer)) if answer.code == 404 => {
                let owner = OwnerReference {
                    api_version: "v1".into(),
                    kind: "Node".into(),
                    name: name.clone(),
                    uid: node.metadata.uid.clone().unwrap_or_default(),
                    ..OwnerReference::default()
                };
                let metadata =
                    ObjectMeta { name: Some(name.clone()), owner_references: Some(vec![owner]), ..Default::default() };
                api.create(&PostParams::default(), &Lease { metadata, spec: Some(spec) }).await.map(drop)
            }
            answer => answer.map(drop),
        }
    }

    async fn write_status(&self, client: &Client) -> kube::Result<()> {
        let api: Api<NodeObject> = Api::all(client.clone());
        let patch = Patch::Strategic(serde_json::json!({ "status": self.status() }));
        api.patch_status(&self.wanted.name, &PatchParams::default(), &patch).await.map(drop)
    }

    fn object(&self) -> NodeObject {
        let mut labels = BTreeMap::from([
            ("kubernetes.io/hostname".to_owned(), self.wanted.name.clone()),
            ("kubernetes.io/os".to_owned(), "linux".to_owned()),
            ("kubernetes.io/arch".to_owned(), architecture().to_owned()),
        ]);
        labels.extend(self.wanted.labels.clone());
        NodeObject {
            metadata: ObjectMeta { name: Some(self.wanted.name.clone()), labels: Some(labels), ..Default::default() },
            spec: Some(NodeSpec { taints: Some(self.wanted.taints.clone()), ..NodeSpec::default() }),
            status: None,
        }
    }

    fn status(&self) -> NodeStatus {
        let mut capacity = BTreeMap::from([
            ("cpu".to_owned(), Quantity("64".into())),
            ("memory".to_owned(), Quantity("512Gi".into())),
            ("ephemeral-storage".to_owned(), Quantity("1Ti".into())),
            ("pods".to_owned(), Quantity("110".into())),
        ]);
        capacity.extend(self.wanted.capacity.iter().map(|(k, v)| (k.clone(), Quantity(v.clone()))));
        let address = |kind: &str, address: String| NodeAddress { type_: kind.into(), address };
        NodeStatus {
            allocatable: Some(capacity.clone()),
            capacity: Some(capacity),
            addresses: Some(vec![
                address("InternalIP", self.ip().to_string()),
                address("Hostname", self.wanted.name.clone()),
            ]),
            conditions: Some(conditions(Timestamp::now())),
            daemon_endpoints: Some(NodeDaemonEndpoints {
                kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(LOG_PORT) }),
            }),
            node_info: Some(node_info(&self.wanted.name)),
            ..NodeStatus::default()
        }
    }
}

/// A healthy node's conditions. The time of the last transition is left out: a patch then keeps it.
fn conditions(now: Timestamp) -> Vec<NodeCondition> {
    let condition = |kind: &str, status: &str, reason: &str| NodeCondition {
        type_: kind.into(),
        status: status.into(),
        reason: Some(reason.into()),
        message: Some(String::new()),
        last_heartbeat_time: Some(Time(now)),
        last_transition_time: None,
    };
    vec![
        condition("Ready", "True", "KubeletReady"),
        condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
        condition("DiskPressure", "False", "KubeletHasNoDiskPressure"),
        condition("PIDPressure", "False", "KubeletHasSufficientPID"),
    ]
}

fn node_info(name: &str) -> NodeSystemInfo {
    let read = |path: &str| std::fs::read_to_string(path).map(|t| t.trim().to_owned()).unwrap_or_default();
    NodeSystemInfo {
        architecture: architecture().into(),
        boot_id: read("/proc/sys/kernel/random/boot_id"),
        container_runtime_version: "process://1".into(),
        kernel_version: read("/proc/sys/kernel/osrelease"),
        kubelet_version: KUBERNETES_VERSION.into(),
        machine_id: name.into(),
        operating_system: "linux".into(),
        os_image: "process kubelet".into(),
        system_uuid: name.into(),
        ..NodeSystemInfo::default()
    }
}

/// As Kubernetes names it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
