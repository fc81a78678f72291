//! The control plane that the scenarios share, and how they wait. It ends with this process: its children
//! watch for that themselves.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use berth_tests::control_plane::ControlPlaneConfig;
use berth_tests::process_kubelet::{KubeletConfig, SimulatedNode};
use berth_tests::{ControlPlane, ProcessKubelet};
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod, Taint};
use kube::{Api, Client};
use tokio::sync::OnceCell;

/// Longer than anything should take on a busy machine; a failure says what was still missing.
const DEADLINE: Duration = Duration::from_secs(60);

/// A control plane and a kubelet; the image `shell` is `/bin/sh`. Pods go to the nodes `a` and `b`; `lonely` is
/// for those that tolerate its taint, and `gone` is for scenarios that break it.
pub(crate) struct Cluster {
    pub(crate) plane: ControlPlane,
    pub(crate) kubelet: ProcessKubelet,
}

/// The shared cluster, started by whoever asks first.
pub(crate) async fn shared() -> &'static Cluster {
    static SHARED: OnceCell<Cluster> = OnceCell::const_new();
    SHARED.get_or_init(Cluster::start).await
}

impl Cluster {
    async fn start() -> Self {
        let config = ControlPlaneConfig {
            controller_manager_args: vec!["--node-monitor-grace-period=8s".into(), "--node-monitor-period=1s".into()],
            ..ControlPlaneConfig::named("scenarios")
        };
        let plane = ControlPlane::start(config).await.expect("a control plane");
        let mut a = SimulatedNode::named("a");
        a.env = BTreeMap::from([("NODE_VARIABLE".into(), "of a".into())]);
        let doubled = plane.dir().join("kmsg-of-a");
        std::fs::write(&doubled, "a line of the kernel\n").expect("written");
        a.host_paths = BTreeMap::from([("/dev/kmsg".into(), doubled)]);
        a.capacity = BTreeMap::from([("example.com/device".into(), "4".into())]);
        a.labels = BTreeMap::from([("rack".into(), "r1".into())]);
        let mut gone = SimulatedNode::named("gone");
        gone.taints = vec![Taint { key: "gone".into(), effect: "NoSchedule".into(), ..Taint::default() }];
        let nodes = vec![a, SimulatedNode::named("b"), gone];
        let images = BTreeMap::from([
            ("shell".to_owned(), PathBuf::from("/bin/sh")),
            ("kubectl".to_owned(), plane.tool().dir().join("kubectl")),
            ("unbuilt".to_owned(), PathBuf::from("/nonexistent/binary")),
        ]);
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

    /// Applies a pod named `p` with one container named `main` that runs a shell script; `more` adds to the
    /// container, `spec` to the pod, both as YAML flow mappings without their braces.
    pub(crate) async fn run_shell(&self, namespace: &str, script: &str, more: &str, spec: &str) {
        let script = serde_json::to_string(script).expect("a string");
        let manifest = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: p, labels: {{l: value}}}}, spec: {{\
             terminationGracePeriodSeconds: 1, {spec} containers: [{{name: main, image: shell, {more} \
             args: [-c, {script}]}}]}}}}"
        );
        self.apply(namespace, &manifest).await;
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
            let status = || serde_json::to_string(&last.as_ref().and_then(|p| p.status.clone())).unwrap_or_default();
            assert!(Instant::now() < deadline, "pod {ns}/{name} is {}", status());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until a pod is gone from the API.
    pub(crate) async fn gone(&self, client: &Client, ns: &str, name: &str) {
        let api: Api<Pod> = Api::namespaced(client.clone(), ns);
        let absent = || async { api.get_opt(name).await.ok()?.is_none().then_some(()) };
        eventually("the pod's end", absent).await;
    }

    /// Waits until the log of the container `main` holds a text, and returns the log.
    pub(crate) async fn log_with(&self, ns: &str, pod: &str, text: &str) -> String {
        let what = format!("{text:?} in the log of {ns}/{pod}");
        eventually(&what, || async { self.kubelet.log(ns, pod, "main").ok().filter(|log| log.contains(text)) }).await
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

/// The status of a pod's first container.
pub(crate) fn first(pod: &Pod) -> ContainerStatus {
    let statuses = pod.status.as_ref().and_then(|s| s.container_statuses.as_deref()).unwrap_or_default();
    statuses.first().cloned().unwrap_or_default()
}

/// Why a container waits, and the whole sentence.
pub(crate) fn waiting(state: Option<ContainerState>) -> (String, String) {
    let waiting = state.and_then(|s| s.waiting).unwrap_or_default();
    (waiting.reason.unwrap_or_default(), waiting.message.unwrap_or_default())
}

/// True while a process of this pid exists.
pub(crate) fn is_alive(pid: i32) -> bool {
    std::path::Path::new(&format!("/proc/{pid}")).exists()
}
