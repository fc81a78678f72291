//! The control plane that the scenarios share, and how they wait. It ends with this process: its children
//! watch for that themselves.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use berth_tests::control_plane::ControlPlaneConfig;
use berth_tests::process_kubelet::{KubeletConfig, SimulatedNode};
use berth_tests::{ControlPlane, ProcessKubelet};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client};
use tokio::sync::OnceCell;

/// Longer than anything should take on a busy machine; a failure says what was still missing.
const DEADLINE: Duration = Duration::from_secs(60);

/// A control plane and a kubelet with the nodes `a` and `b`; the image `shell` is `/bin/sh`.
pub(crate) struct Cluster {
    pub(crate) plane: ControlPlane,
    pub(crate) kubelet: ProcessKubelet,
}

/// The shared cluster, started by whoever asks first.
pub(crate) async fn shared() -> &'static Cluster {
    static SHARED: OnceCell<Cluster> = OnceCell::const_new();
    SHARED.get_or_init(|| Cluster::start("scenarios")).await
}

impl Cluster {
    /// Starts one.
    pub(crate) async fn start(name: &str) -> Self {
        let config = ControlPlaneConfig {
            controller_manager_args: vec!["--node-monitor-grace-period=8s".into(), "--node-monitor-period=1s".into()],
            ..ControlPlaneConfig::named(name)
        };
        let plane = ControlPlane::start(config).await.expect("a control plane");
        let mut a = SimulatedNode::named("a");
        a.env = BTreeMap::from([("NODE_VARIABLE".into(), "of a".into())]);
        let nodes = vec![a, SimulatedNode::named("b")];
        let images = BTreeMap::from([("shell".to_owned(), PathBuf::from("/bin/sh"))]);
        let config = KubeletConfig { nodes, images, ..KubeletConfig::default() };
        let kubelet = ProcessKubelet::start(&plane, config).await.expect("a kubelet");
        Self { plane, kubelet }
    }

    /// A namespace of the scenario's own, and a client.
    pub(crate) async fn namespace(&self, name: &str) -> Client {
        self.plane.kubectl(&["create", "namespace", name]).await.expect("a namespace");
        self.plane.client().expect("a client")
    }

    /// Applies a manifest.
    pub(crate) async fn apply(&self, namespace: &str, manifest: &str) {
        let args = ["apply", "-n", namespace, "-f", "-"];
        self.plane.kubectl_with_input(&args, manifest).await.expect("applied");
    }

    /// Waits until a pod is as wanted, and returns it.
    pub(crate) async fn pod(&self, client: &Client, ns: &str, name: &str, is_right: impl Fn(&Pod) -> bool) -> Pod {
        let api: Api<Pod> = Api::namespaced(client.clone(), ns);
        let mut last = None;
        let deadline = Instant::now() + DEADLINE;
        loop {
            let found = api.get_opt(name).await.expect("an answer");
            if let Some(pod) = found.clone().filter(|p| is_right(p)) {
                return pod;
            }
            last = found.or(last);
            assert!(Instant::now() < deadline, "pod {ns}/{name} is {:#?}", last.and_then(|p| p.status));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Waits until `check` gives something.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut check: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {DEADLINE:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The condition of that type is `True`.
pub(crate) fn has(pod: &Pod, condition: &str) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|c| c.type_ == condition && c.status == "True")
}

/// True while a process of this pid exists.
pub(crate) fn is_alive(pid: i32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}
