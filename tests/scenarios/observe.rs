//! What a person sees of a running cluster: every query of the board answered by a real Prometheus, every metric as
//! the documentation lists it, log lines of one decision joined over three parts, and its trace in a collector.

mod board;
mod compatible;
pub(crate) mod metrics;
mod vouching;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use berth_tests::{
    collector::{Collector, Span},
    demo::{
        Options,
        cluster::{self, Cluster},
        nodes::Fleet,
        objects,
        prompts::{self, Runner},
    },
    prometheus::{Prometheus, Sample, Target},
};
use berth_types::{DeviceId, Vendor};
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, api::ListParams};
use serde_json::{Value, json};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

/// Its simulated nodes.
const FLEET: Fleet = Fleet::BOTH;
/// Longest time for anything that is waited for.
const PATIENCE: Duration = Duration::from_secs(90);
/// The steps of a repair, each with the part that takes it.
const STEPS: [(&str, &str); 6] = [
    ("berth-agent", "fault.seen"),
    ("berth-agent", "fault.classified"),
    ("berth-scheduler", "placement.planned"),
    ("berth-scheduler", "placement.applied"),
    ("berth-scheduler", "placement.loaded"),
    ("berth-runner", "placement.served"),
];

/// A cluster that serves, watched by a Prometheus and a collector.
struct Watched {
    prometheus: Prometheus,
    collector: Collector,
    cluster: Cluster,
    checkpoint: PathBuf,
}

impl Watched {
    async fn start() -> Self {
        let checkpoint = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/data/reference/models/v3-tiny"));
        let options = Options {
            name: "observe".into(),
            fleet: FLEET,
            checkpoint: checkpoint.clone(),
            report: PathBuf::new(),
            kubeconfig: None,
            keep: false,
        };
        let collector = Collector::start().await.expect("a collector");
        let cluster = Cluster::start(&options).await.expect("a cluster");
        let prometheus = Prometheus::start(cluster.dir()).await.expect("a Prometheus");
        let tracing = format!("tracing.otlpEndpoint={}", collector.endpoint());
        let pages = "agent.compat.dcgm=true,agent.compat.npu=true".to_owned();
        cluster.install_with(&[tracing, pages]).await.expect("the chart installed");
        let watched = Self { prometheus, collector, cluster, checkpoint };
        watched.scrape().await;
        objects::nodes_are_healthy(watched.cluster.client(), FLEET.len(), PATIENCE).await.expect("healthy nodes");
        let checkpoint = watched.checkpoint.canonicalize().expect("a path");
        watched.cluster.apply_profile(&checkpoint).await.expect("a profile");
        let devices = json!({"perInstance": FLEET.len() * 2, "crossVendor": true});
        watched.cluster.apply_deployment(objects::DEPLOYMENT, &checkpoint, &devices).await.expect("a deployment");
        watched.add_a_deployment_that_waits().await;
        objects::deployment_is_ready(watched.cluster.client(), objects::DEPLOYMENT, PATIENCE)
            .await
            .expect("a ready deployment");
        watched.scrape().await;
        watched
    }

    /// A queue that is too small for the deployment that names it.
    async fn add_a_deployment_that_waits(&self) {
        let checkpoint = self.checkpoint.canonicalize().expect("a path");
        let mut waiting = objects::deployment("waits", cluster::PROFILE, &checkpoint, &json!({}));
        waiting["spec"]["queue"] = json!("small");
        let queue = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "CapacityQueue", "metadata": {"name": "small"},
            "spec": {"quotaDevices": 1, "borrowLimitDevices": 0}});
        let both = json!({"apiVersion": "v1", "kind": "List", "items": [queue, waiting]});
        let file = self.cluster.dir().join("waits.json");
        std::fs::write(&file, both.to_string()).expect("written");
        self.cluster.kubectl(&["apply", "-f", &file.display().to_string()]).await.expect("applied");
    }

    /// The pods of Berth that serve metrics: component, namespace, name, node, address.
    async fn pods(&self) -> Vec<[String; 5]> {
        let api: Api<Pod> = Api::all(self.cluster.client().clone());
        let ours = api.list(&ListParams::default().labels("berth.dev/component")).await.expect("pods").items;
        let pod = |pod: Pod| {
            let component = pod.metadata.labels?.get("berth.dev/component")?.clone();
            let spec = pod.spec?;
            let ports = spec.containers.first()?.ports.clone()?;
            let port = ports.into_iter().find(|port| port.name.as_deref() == Some("admin"))?.container_port;
            let address = format!("{}:{port}", pod.status?.pod_ip?);
            Some([component, pod.metadata.namespace?, pod.metadata.name?, spec.node_name?, address])
        };
        ours.into_iter().filter_map(pod).collect()
    }

    /// Scrapes what the chart's monitors select, with the labels that they set.
    async fn scrape(&self) {
        let target = |[job, namespace, pod, node, address]: [String; 5]| {
            let labels = [("job", job), ("namespace", namespace), ("pod", pod), ("node", node)];
            let labels = labels.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            Target { address: address.parse::<SocketAddr>().expect("an address"), labels }
        };
        let mut targets: Vec<_> = self.pods().await.into_iter().map(target).collect();
        let agents = targets.iter().filter(|target| target.labels["job"] == "agent");
        let pages = agents.flat_map(|agent| ["dcgm", "npu"].map(|page| compatible::target(agent, page)));
        targets.extend(pages.collect::<Vec<_>>());
        self.prometheus.scrape(&targets).expect("told");
    }

    /// Prompts all the while, so that rates are not zero.
    async fn traffic(&self, stop: &CancellationToken) -> AbortOnDropHandle<usize> {
        let deployment =
            objects::deployment_is_ready(self.cluster.client(), objects::DEPLOYMENT, PATIENCE).await.expect("ready");
        let endpoint = deployment.status.expect("a status").instances.first().expect("an instance").endpoint.clone();
        let cases = prompts::read_cases(&self.checkpoint).expect("a reference");
        let (runner, stop) = (Runner::at(&endpoint).expect("an address"), stop.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            let mut served = 0;
            while !stop.is_cancelled() {
                let case = &cases[served % cases.len()];
                let answer = runner.generate(case, case.max_tokens, |_| ()).await.expect("an answer");
                assert_eq!(Some(&answer.ids), case.expected.as_ref(), "{:?}", answer.finished);
                served += 1;
            }
            served
        }))
    }

    /// Loses a device of the placement and waits until it is repaired.
    async fn lose_a_device(&self) -> DeviceId {
        let before = objects::placement(self.cluster.client()).await.expect("a placement").status.expect("a status");
        let vendors = objects::vendors(self.cluster.client()).await.expect("devices");
        let devices = before.assignment.expect("assigned").devices;
        let device = devices.into_iter().find(|device| vendors.get(device) == Some(&Vendor::Nvidia)).expect("a device");
        let loss = self.cluster.loss_of(&device).expect("a device of ours");
        loss.leave_bus().expect("left");
        loss.driver_notices().expect("noticed");
        let repaired = objects::repaired(self.cluster.client(), before.serving_revision, PATIENCE).await;
        repaired.expect("a repaired placement");
        device
    }

    /// All log lines of the pods of a component that are JSON.
    fn log(&self, component: &str) -> Vec<Value> {
        let running = self.cluster.kubelet().running();
        let ours = running.into_iter().filter(|(_, _, container, _)| container == component);
        let logs =
            ours.filter_map(|(space, pod, container, _)| self.cluster.kubelet().log(&space, &pod, &container).ok());
        logs.flat_map(|log| log.lines().map(|line| serde_json::from_str(line).expect(line)).collect::<Vec<_>>())
            .collect()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_cluster_answers_every_query_of_the_board_and_tells_each_decision_once() {
    let watched = Arc::new(Watched::start().await);
    let stop = CancellationToken::new();
    let traffic = watched.traffic(&stop).await;
    objects::measured_balance(watched.cluster.client(), PATIENCE).await.expect("a load window");
    let device = watched.lose_a_device().await;
    board::every_query_is_answered(&watched).await;
    compatible::boards_for_vendors_exporters_go_on_showing(&watched).await;
    metrics::every_metric_is_as_documented(&watched).await;
    let trace = one_trace_tells_the_repair(&watched, &device).await;
    logs_of_three_parts_name_the_same_trace(&watched, &device, &trace);
    vouching::incidents_are_asked_of_the_agent_of_a_node(&watched, &device).await;
    vouching::a_person_vouches_for_a_device(&watched, &device).await;
    stop.cancel();
    assert!(traffic.await.expect("no request failed") > 0);

    let Some(Watched { prometheus, collector, cluster, .. }) = Arc::into_inner(watched) else {
        panic!("still watched")
    };
    let pid = prometheus.process().pid();
    drop((prometheus, collector));
    let alive = || std::path::Path::new(&format!("/proc/{pid}/task")).exists();
    assert!(!alive(), "Prometheus outlives its test");
    cluster.end().await.expect("nothing left");
}

/// The trace of the fault of `device`, once all its steps came.
async fn one_trace_tells_the_repair(watched: &Watched, device: &DeviceId) -> String {
    let spans = objects::wait_for("the trace of the repair", PATIENCE, || async {
        let spans = watched.collector.spans();
        let of = |span: &&Span| {
            span.name == "fault.seen" && span.attributes.contains(&("device".into(), device.local().into()))
        };
        let Some(first) = spans.iter().find(of) else { return Ok(Err(format!("{spans:?}"))) };
        let ours: Vec<Span> = spans.iter().filter(|span| span.trace_id == first.trace_id).cloned().collect();
        Ok(path(&ours).ok_or_else(|| format!("{ours:#?}")))
    })
    .await
    .expect("a whole trace");
    // A plan for another cause in the middle of a repair is a step of it: the scheduler's steps may come twice.
    let told = |step: &(&str, &str)| spans.iter().any(|span| (span.service.as_str(), span.name.as_str()) == *step);
    assert!(STEPS.iter().all(told) && spans[0].name == STEPS[0].1, "{spans:#?}");
    for pair in spans.windows(2) {
        assert!(pair[1].began >= pair[0].began, "{:?} begins before the step before it", pair[1]);
    }
    assert!(spans.iter().all(|span| span.ended >= span.began), "{spans:#?}");
    spans[0].trace_id.clone()
}

/// The steps from the first to the runner's, once each of them came; parts export on their own, in no order.
fn path(spans: &[Span]) -> Option<Vec<Span>> {
    let last = spans.iter().find(|span| span.name == STEPS[STEPS.len() - 1].1)?;
    let mut path = vec![last.clone()];
    while !path.last()?.parent_id.is_empty() && path.len() <= spans.len() {
        let parent = &path.last()?.parent_id;
        path.push(spans.iter().find(|span| span.span_id == *parent)?.clone());
    }
    path.reverse();
    Some(path)
}

/// The lines that tell of the same decision carry its trace, and say who speaks and of what.
fn logs_of_three_parts_name_the_same_trace(watched: &Watched, device: &DeviceId, trace: &str) {
    let line = |component: &str, message: &str| -> Value {
        let lines = watched.log(component);
        let ours = lines.iter().find(|line| line["message"] == message && line["trace_id"] == trace);
        ours.unwrap_or_else(|| panic!("no {message:?} of trace {trace} in {lines:#?}")).clone()
    };
    let classified = line("agent", "health");
    assert_eq!((&classified["node"], &classified["device"]), (&json!(device.node()), &json!(device.local())));
    let (planned, assigned) = (line("scheduler", "planned"), line("scheduler", "revision assigned"));
    let (serves, taken) = (line("scheduler", "revision serves"), line("runner", "revision taken"));
    for told in [&planned, &assigned, &serves, &taken] {
        for key in ["timestamp", "level", "target", "part", "pod", "placement", "plan"] {
            assert!(told[key].is_string(), "{key} in {told}");
        }
        assert_eq!((&told["plan"], &told["placement"]), (&planned["plan"], &planned["placement"]));
    }
    let reconciled = watched.log("operator");
    assert!(reconciled.iter().all(|line| line["part"] == "operator" && line["pod"].is_string()));
}

/// A figure for whoever watches.
#[expect(clippy::print_stdout, reason = "the test runner keeps what is printed with the test it belongs to")]
fn say(line: &str) {
    println!("{line}");
}

/// A sample that a panel can draw.
fn is_drawn(sample: &Sample) -> bool {
    !sample.value.is_nan()
}

/// Names of labels in a sample.
fn label_names(sample: &str) -> BTreeSet<String> {
    let labels = sample.split_once('{').and_then(|(_, rest)| rest.rsplit_once('}')).map_or("", |(labels, _)| labels);
    let mut names = BTreeSet::new();
    let mut rest = labels;
    while let Some((name, after)) = rest.split_once("=\"") {
        names.insert(name.trim_start_matches(',').to_owned());
        // Values of ours hold no quotes.
        rest = after.split_once('"').map_or("", |(_, rest)| rest);
    }
    names
}

type Families = BTreeMap<String, (String, BTreeSet<String>)>;
