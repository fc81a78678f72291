//! What happened in a pod, to the status a kubelet would write. Pure: the time is an argument.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus, HostIP,
    Pod, PodCondition, PodIP, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

/// Everything known of a pod's containers.
#[derive(Debug, Clone)]
pub(super) struct PodFacts {
    pub init: Vec<ContainerFacts>,
    pub main: Vec<ContainerFacts>,
    /// Its volumes are there.
    pub prepared: bool,
    pub start_time: Timestamp,
}

/// Everything known of one container.
#[derive(Debug, Clone)]
pub(super) struct ContainerFacts {
    pub name: String,
    pub image: String,
    pub image_id: String,
    pub state: State,
    pub last: Option<Ended>,
    pub id: Option<String>,
    /// The container's first process, as this machine numbers it.
    pub pid: Option<i32>,
    pub restarts: i32,
    pub started: bool,
    pub ready: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    Waiting { reason: String, message: Option<String> },
    Running { since: Timestamp },
    Ended(Ended),
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ended {
    pub exit_code: i32,
    pub reason: String,
    pub message: Option<String>,
    pub started_at: Timestamp,
    pub finished_at: Timestamp,
    pub id: Option<String>,
}

/// The addresses of a pod and its node.
#[derive(Debug, Clone)]
pub(super) struct Addresses {
    pub pod: String,
    pub host: String,
}

impl State {
    pub(super) fn waiting(reason: &str) -> Self {
        Self::Waiting { reason: reason.into(), message: None }
    }

    pub(super) fn waiting_because(reason: &str, message: impl Into<String>) -> Self {
        Self::Waiting { reason: reason.into(), message: Some(message.into()) }
    }
}

impl ContainerFacts {
    pub(super) fn new(name: &str, image: &str, restarts: i32) -> Self {
        Self {
            name: name.into(),
            image: image.into(),
            image_id: String::new(),
            state: State::waiting("ContainerCreating"),
            last: None,
            id: None,
            pid: None,
            restarts,
            started: false,
            ready: false,
        }
    }

    fn status(&self) -> ContainerStatus {
        ContainerStatus {
            name: self.name.clone(),
            image: self.image.clone(),
            image_id: self.image_id.clone(),
            container_id: self.id.clone(),
            ready: self.ready,
            started: Some(self.started),
            restart_count: self.restarts,
            state: Some(self.state.clone().into()),
            last_state: self.last.clone().map(|ended| State::Ended(ended).into()),
            ..ContainerStatus::default()
        }
    }

    fn succeeded(&self) -> bool {
        matches!(&self.state, State::Ended(ended) if ended.exit_code == 0)
    }
}

impl From<State> for ContainerState {
    fn from(state: State) -> Self {
        let mut out = Self::default();
        match state {
            State::Waiting { reason, message } => {
                out.waiting = Some(ContainerStateWaiting { reason: Some(reason), message });
            }
            State::Running { since } => out.running = Some(ContainerStateRunning { started_at: Some(Time(since)) }),
            State::Ended(ended) => {
                out.terminated = Some(ContainerStateTerminated {
                    exit_code: ended.exit_code,
                    reason: Some(ended.reason),
                    message: ended.message,
                    started_at: Some(Time(ended.started_at)),
                    finished_at: Some(Time(ended.finished_at)),
                    container_id: ended.id,
                    signal: None,
                });
            }
        }
        out
    }
}

/// The part of a pod's status that a kubelet writes. `conditions` holds only the kubelet's own ones, with
/// their transition times taken from `written`, the status written last.
pub(super) fn pod_status(
    pod: &Pod,
    facts: &PodFacts,
    addresses: &Addresses,
    written: Option<&PodStatus>,
    now: Timestamp,
) -> PodStatus {
    let statuses = |list: &[ContainerFacts]| {
        (!list.is_empty()).then(|| list.iter().map(ContainerFacts::status).collect::<Vec<_>>())
    };
    let phase = phase(pod, facts);
    PodStatus {
        conditions: Some(conditions(pod, facts, phase, written, now)),
        phase: Some(phase.into()),
        host_ip: Some(addresses.host.clone()),
        host_ips: Some(vec![HostIP { ip: addresses.host.clone() }]),
        pod_ip: Some(addresses.pod.clone()),
        pod_ips: Some(vec![PodIP { ip: addresses.pod.clone() }]),
        start_time: Some(Time(facts.start_time)),
        init_container_statuses: statuses(&facts.init),
        container_statuses: statuses(&facts.main),
        observed_generation: pod.metadata.generation,
        ..PodStatus::default()
    }
}

/// `Always`, `OnFailure` or `Never`.
pub(super) fn restart_policy(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|s| s.restart_policy.as_deref()).unwrap_or("Always")
}

fn phase(pod: &Pod, facts: &PodFacts) -> &'static str {
    let policy = restart_policy(pod);
    if let Some(open) = facts.init.iter().find(|c| !c.succeeded()) {
        let failed = matches!(open.state, State::Ended(_)) && policy == "Never";
        return if failed { "Failed" } else { "Pending" };
    }
    let is_new = |c: &&ContainerFacts| matches!(c.state, State::Waiting { .. }) && c.last.is_none();
    if facts.main.iter().any(|c| is_new(&c)) {
        return "Pending";
    }
    let ended = |c: &ContainerFacts| matches!(c.state, State::Ended(_));
    if policy == "Always" || !facts.main.iter().all(ended) {
        return "Running";
    }
    if facts.main.iter().all(ContainerFacts::succeeded) {
        return "Succeeded";
    }
    if policy == "Never" { "Failed" } else { "Running" }
}

fn conditions(
    pod: &Pod,
    facts: &PodFacts,
    phase: &str,
    written: Option<&PodStatus>,
    now: Timestamp,
) -> Vec<PodCondition> {
    let initialized = facts.init.iter().all(ContainerFacts::succeeded);
    let unready: Vec<&str> = facts.main.iter().filter(|c| !c.ready).map(|c| c.name.as_str()).collect();
    let why_unready = match phase {
        "Succeeded" => Some(("PodCompleted", String::new())),
        "Failed" => Some(("PodFailed", String::new())),
        _ if unready.is_empty() => None,
        _ => Some(("ContainersNotReady", format!("containers with unready status: [{}]", unready.join(" ")))),
    };
    let why_not_ready = why_unready.clone().or_else(|| closed_gate(pod));
    let incomplete: Vec<&str> = facts.init.iter().filter(|c| !c.succeeded()).map(|c| c.name.as_str()).collect();
    let why_uninitialized = (!initialized).then(|| {
        ("ContainersNotInitialized", format!("containers with incomplete status: [{}]", incomplete.join(" ")))
    });
    let unprepared = (!facts.prepared).then(|| ("VolumesNotReady", String::new()));
    [
        ("PodReadyToStartContainers", unprepared),
        ("Initialized", why_uninitialized),
        ("ContainersReady", why_unready),
        ("Ready", why_not_ready),
    ]
    .into_iter()
    .map(|(kind, why_false)| condition(pod, kind, why_false, written, now))
    .collect()
}

/// The first readiness gate whose condition is not True.
fn closed_gate(pod: &Pod) -> Option<(&'static str, String)> {
    let gates = pod.spec.as_ref()?.readiness_gates.as_ref()?;
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default();
    let is_open = |kind: &str| conditions.iter().any(|c| c.type_ == kind && c.status == "True");
    let closed = gates.iter().find(|gate| !is_open(&gate.condition_type))?;
    Some(("ReadinessGatesNotReady", format!("condition {:?} is not \"True\"", closed.condition_type)))
}

fn condition(
    pod: &Pod,
    kind: &str,
    why_false: Option<(&str, String)>,
    written: Option<&PodStatus>,
    now: Timestamp,
) -> PodCondition {
    let status = if why_false.is_none() { "True" } else { "False" };
    let before = written.and_then(|s| s.conditions.as_ref()).into_iter().flatten().find(|c| c.type_ == kind);
    let since = before.filter(|c| c.status == status).and_then(|c| c.last_transition_time.clone());
    let (reason, message) = why_false.unzip();
    PodCondition {
        type_: kind.into(),
        status: status.into(),
        // Empty text, not an absent field: a merged patch would keep the old one.
        reason: Some(reason.unwrap_or_default().into()),
        message: Some(message.unwrap_or_default()),
        last_transition_time: Some(since.unwrap_or(Time(now))),
        last_probe_time: None,
        observed_generation: pod.metadata.generation,
    }
}
