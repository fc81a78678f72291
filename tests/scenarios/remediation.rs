//! What is done about devices that are not well, on a real control plane: the chart installed, real agents on doubled
//! libraries, resets by the doubles of what vendors publish for it. Looked at only from outside, as `kubectl` shows it.

use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    path::PathBuf,
    time::Duration,
};

use berth_crds::{
    AcceleratorNode, ExpertPlacement,
    accelerator_node::{DeviceStatus, OrderPhase, OrderStatus},
};
use berth_operator::accelerator_node::{remediation::OBJECT, signs};
use berth_tests::{
    control_plane::target_dir,
    demo::{
        Options,
        cluster::{self, Cluster},
        nodes::Fleet,
        objects::{self, DEPLOYMENT},
    },
};
use berth_types::{Action, Admission, Health};
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::{Api, ResourceExt as _, api::ListParams};
use serde_json::json;

mod device_taints;

const GPU: &str = "gpu-01/0000:3b:00.0";
/// The second device of a card.
const NPU: &str = "npu-01/0.1";
/// The first, which has no fault.
const SIBLING: &str = "npu-01/0.0";
/// A device of another card.
const LOST: &str = "npu-02/0.0";
const FLEET: Fleet = Fleet::BOTH;
/// A fault, an emptied device, a reset and a probation fit in.
const PATIENCE: Duration = Duration::from_secs(120);
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/berth");

struct World {
    cluster: Cluster,
}

impl World {
    async fn install() -> Self {
        let checkpoint = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/data/reference/models/v4-tiny"));
        let options = Options {
            name: "remediation".into(),
            fleet: FLEET,
            checkpoint: checkpoint.clone(),
            report: PathBuf::new(),
            kubeconfig: None,
            keep: false,
        };
        let cluster = Cluster::start(&options).await.unwrap();
        let tool = target_dir().join("debug/berth-double-nvidia-smi");
        assert!(tool.is_file(), "{} is missing: cargo build -p berth-double-nvml --bins", tool.display());
        let values = ["operator.remediation.mode=DryRun".to_owned(), format!("agent.nvidiaSmi={}", tool.display())];
        cluster.install_with(&values).await.unwrap();
        objects::nodes_are_healthy(cluster.client(), FLEET.len(), PATIENCE).await.unwrap();
        cluster.apply_profile(&checkpoint).await.unwrap();
        let devices = json!({"perInstance": FLEET.len() * 2, "crossVendor": true});
        cluster.apply_deployment(DEPLOYMENT, &checkpoint, &devices).await.unwrap();
        objects::deployment_is_ready(cluster.client(), DEPLOYMENT, PATIENCE).await.unwrap();
        Self { cluster }
    }

    async fn node(&self, device: &str) -> AcceleratorNode {
        let api: Api<AcceleratorNode> = Api::all(self.cluster.client().clone());
        api.get(device.split_once('/').unwrap().0).await.unwrap()
    }

    async fn device(&self, device: &str) -> DeviceStatus {
        let status = self.node(device).await.status.unwrap();
        status.devices.into_iter().find(|one| one.device.to_string() == device).unwrap()
    }

    /// Waits until the node of `device` is as `check` wants it; a failure shows the object.
    async fn until<T>(&self, what: &str, device: &str, check: impl Fn(&AcceleratorNode) -> Option<T>) -> T {
        objects::wait_for(what, PATIENCE, || async {
            let node = self.node(device).await;
            let book = self.book().await;
            Ok(check(&node).ok_or_else(|| format!("{}\n{}\n{book}", json!(node.spec), json!(node.status))))
        })
        .await
        .unwrap()
    }

    async fn book(&self) -> String {
        let api: Api<ConfigMap> = Api::namespaced(self.cluster.client().clone(), cluster::NAMESPACE);
        json!(api.get(OBJECT).await.unwrap().data).to_string()
    }

    fn append(&self, file: &str, line: &str) {
        let path = self.cluster.dir().join("devices").join(file);
        let mut file = OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Resets that the doubles were asked for.
    fn resets(&self, node: &str) -> Vec<String> {
        let path = self.cluster.dir().join("devices").join(format!("{node}.jsonl.resets"));
        fs::read_to_string(path).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    /// Reasons of the events about a node's devices.
    async fn events(&self, device: &str) -> Vec<String> {
        let node = device.split_once('/').unwrap().0;
        let field = format!("involvedObject.kind=AcceleratorNode,involvedObject.name={node}");
        let path = "jsonpath={range .items[*]}{.reason}: {.message}{\"\\n\"}{end}";
        let events =
            self.cluster.kubectl(&["get", "events", "-A", "--field-selector", &field, "-o", path]).await.unwrap();
        events.lines().map(str::to_owned).collect()
    }

    async fn told(&self, device: &str, reason: &str) -> String {
        objects::wait_for(&format!("an event {reason} about {device}"), PATIENCE, || async {
            let events = self.events(device).await;
            Ok(events.iter().find(|event| event.starts_with(reason)).cloned().ok_or_else(|| events.join("\n")))
        })
        .await
        .unwrap()
    }

    async fn condition(&self, node: &str) -> (String, String) {
        let api: Api<Node> = Api::all(self.cluster.client().clone());
        let conditions = api.get(node).await.unwrap().status.unwrap_or_default().conditions.unwrap_or_default();
        let ours = conditions.into_iter().find(|condition| condition.type_ == signs::CONDITION);
        ours.map(|ours| (ours.status, ours.message.unwrap_or_default())).unwrap_or_default()
    }

    /// Waits until experts are on all of these.
    async fn used<const N: usize>(&self, devices: [&str; N]) {
        objects::wait_for(&format!("experts on {devices:?}"), PATIENCE, || async {
            for device in devices {
                if !self.assigned(device).await {
                    return Ok(Err(format!("none on {device}")));
                }
            }
            Ok(Ok(()))
        })
        .await
        .unwrap();
    }

    async fn assigned(&self, device: &str) -> bool {
        let api: Api<ExpertPlacement> = Api::namespaced(self.cluster.client().clone(), objects::NAMESPACE);
        let placements = api.list(&ListParams::default()).await.unwrap().items;
        let mut devices = placements.into_iter().filter_map(|one| one.status?.assignment).flat_map(|one| one.devices);
        devices.any(|one| one.to_string() == device)
    }
}

fn fate(node: &AcceleratorNode, device: &str) -> Option<OrderStatus> {
    let orders = node.status.as_ref()?.orders.iter();
    orders.rev().find(|order| order.device.to_string() == device).cloned()
}

fn shown(node: &AcceleratorNode, device: &str) -> Option<DeviceStatus> {
    node.status.as_ref()?.devices.iter().find(|one| one.device.to_string() == device).cloned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_is_emptied_reset_validated_and_comes_back_and_a_failed_reset_climbs() {
    let world = World::install().await;
    a_dry_run_says_what_it_would_do_and_does_nothing(&world).await;
    let upgrade =
        ["upgrade", "berth", CHART, "--namespace", cluster::NAMESPACE, "--reuse-values", "--wait", "--timeout", "90s"];
    let act = ["--set", "operator.remediation.mode=Act"];
    world.cluster.plane().helm(&[&upgrade[..], &act[..]].concat()).await.unwrap();
    the_device_is_reset_and_comes_back(&world).await;
    a_card_is_emptied_with_the_sibling_that_is_well_and_reset_once(&world).await;
    a_reset_that_fails_climbs_to_a_person(&world).await;
    world.cluster.end().await.unwrap();
}

async fn a_dry_run_says_what_it_would_do_and_does_nothing(world: &World) {
    let xid = "4,1000,1000000,-;NVRM: Xid (PCI:0000:3b:00): 48, pid='<unknown>', name=<unknown>, DBE (double bit error) ECC Error";
    world.append("gpu-01.kmsg", xid);
    let faulty =
        world.until("the fault", GPU, |node| shown(node, GPU).filter(|one| one.action == Action::ResetDevice)).await;
    assert_eq!((faulty.health, faulty.admission), (Health::Unhealthy, Admission::Draining));
    let told = world.told(GPU, "DryRun").await;
    assert!(told.contains("would be"), "{told}");
    let code = world.told(GPU, "MemoryUncorrectable").await;
    assert!(code.contains("Xid 48") && code.contains("ResetDevice"), "{code}");
    let book = world.book().await;
    assert!(book.contains("ResetDevice of gpu-01/0000:3b:00.0: would be"), "{book}");
    let node = world.node(GPU).await;
    assert!(node.spec.orders.is_empty() && node.spec.cordoned_devices.is_empty(), "{:?}", node.spec);
    assert!(node.status.unwrap().orders.is_empty() && world.resets("gpu-01").is_empty());
    let (status, message) = world.condition("gpu-01").await;
    assert!(status == "False" && message.contains("Xid 48"), "{message}");
}

async fn the_device_is_reset_and_comes_back(world: &World) {
    let order = world.until("the order", GPU, |node| fate(node, GPU)).await;
    assert!(
        order.phase.is_final() || !world.assigned(GPU).await,
        "nothing is assigned to a device that is ordered to be reset"
    );
    assert_eq!((order.action, order.device.to_string()), (Action::ResetDevice, GPU.to_owned()));
    let done = world.until("the reset", GPU, |node| fate(node, GPU).filter(|one| one.phase.is_final())).await;
    assert_eq!((done.id, done.phase), (order.id, OrderPhase::Succeeded), "{}", done.message);
    assert!(done.message.contains("successfully reset"), "{}", done.message);
    let back = |node: &AcceleratorNode| {
        let device = shown(node, GPU)?;
        let well = (device.health, device.admission) == (Health::Healthy, Admission::Schedulable);
        (well && node.spec.orders.is_empty() && node.spec.cordoned_devices.is_empty()).then_some(device)
    };
    let device = world.until("the return", GPU, back).await;
    assert!(device.holds.is_empty(), "told only while it matters");
    assert_eq!(world.resets("gpu-01"), ["0000:3b:00.0"], "once");
    for reason in
        ["RemediationBegan", "RemediationOrdered", "RemediationCarriedOut", "RemediationSucceeded", "Recovered"]
    {
        world.told(GPU, reason).await;
    }
    objects::wait_for("the node's condition", PATIENCE, || async {
        let (status, message) = world.condition("gpu-01").await;
        Ok(if status == "True" { Ok(()) } else { Err(message) })
    })
    .await
    .unwrap();
    assert_eq!(world.node(GPU).await.status.unwrap().orders.len(), 1, "it stays to be seen");
}

async fn a_card_is_emptied_with_the_sibling_that_is_well_and_reset_once(world: &World) {
    world.used([NPU, SIBLING]).await;
    let line =
        r#"{"dcmi":[0,1],"set":{"health":1,"error_codes":["0x80AD8009"]},"fault":{"id":"0x80AD8009","severity":1}}"#;
    world.append("npu-01.jsonl", line);
    let faulty = world.until("the fault", NPU, |node| shown(node, NPU).filter(|one| one.action > Action::None)).await;
    assert_eq!((faulty.admission, faulty.action), (Admission::Draining, Action::ResetGroup), "{}", faulty.evidence);
    assert_eq!(world.device(SIBLING).await.health, Health::Healthy);
    let cordoned = |node: &AcceleratorNode| {
        let devices: Vec<_> = node.spec.cordoned_devices.iter().map(|one| one.device.to_string()).collect();
        (devices == [SIBLING, NPU]).then_some(())
    };
    world.until("the cordons", NPU, cordoned).await;
    let order = world.until("the order", NPU, |node| fate(node, NPU)).await;
    if !order.phase.is_final() {
        let used = (world.assigned(NPU).await, world.assigned(SIBLING).await);
        assert_eq!(used, (false, false), "what goes along is emptied too");
    }
    let done = world.until("the reset", NPU, |node| fate(node, NPU).filter(|one| one.phase.is_final())).await;
    assert_eq!((done.id, done.phase), (order.id, OrderPhase::Succeeded), "{}", done.message);
    for device in [NPU, SIBLING] {
        let back = |node: &AcceleratorNode| {
            let one = shown(node, device)?;
            let well = (one.health, one.admission) == (Health::Healthy, Admission::Schedulable);
            (well && node.spec.orders.is_empty() && node.spec.cordoned_devices.is_empty()).then_some(())
        };
        world.until("the return", device, back).await;
    }
    assert_eq!(world.resets("npu-01"), ["0.1"], "once for both, and nothing ran on either");
    for reason in ["RemediationOrdered", "RemediationCarriedOut", "RemediationSucceeded", "Recovered"] {
        world.told(NPU, reason).await;
    }
    world.used([NPU, SIBLING]).await;
}

async fn a_reset_that_fails_climbs_to_a_person(world: &World) {
    let calls =
        r#"{"dcmi_get_device_health":-8012,"dcmi_get_device_errorcode_v2":-8012,"dcmi_set_device_reset":-8015}"#;
    let line = format!(r#"{{"dcmi":[0,0],"set":{{"return":{calls}}},"fault":{{"id":"0x40F84E00","severity":3}}}}"#);
    world.append("npu-02.jsonl", &line);
    let failed =
        world.until("the failed reset", LOST, |node| fate(node, LOST).filter(|one| one.phase.is_final())).await;
    assert_eq!((failed.action, failed.phase), (Action::ResetGroup, OrderPhase::Failed), "{}", failed.message);
    assert!(failed.message.contains("dcmi_set_device_reset answers -8015"), "{}", failed.message);
    assert_eq!(world.resets("npu-02"), ["0.0 refused"]);
    let climbed = |node: &AcceleratorNode| shown(node, LOST).filter(|one| one.action == Action::RebootNode);
    let device = world.until("the next step", LOST, climbed).await;
    assert_eq!(device.admission, Admission::Barred);
    let told = world.told(LOST, "RebootNeeded").await;
    assert!(told.contains("may not boot nodes"), "{told}");
    let needed = |node: &AcceleratorNode| node.annotations().get("berth.dev/reboot-needed").cloned();
    let needed = world.until("the annotation", LOST, needed).await;
    assert!(needed.contains("0.0 DeviceLost"), "{needed}");
    let node =
        world.until("an end of the operation", LOST, |node| node.spec.orders.is_empty().then(|| node.clone())).await;
    assert!(node.spec.cordoned_devices.is_empty(), "{:?}", node.spec);
    let fine = world.device("npu-02/0.1").await;
    assert!(fine.reset_group.starts_with("module"), "{fine:?}");
}
