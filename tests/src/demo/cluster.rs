//! The demo's cluster: a control plane, the process kubelet with simulated nodes, and the chart on top. Device faults
//! are what a real node would show: a record in the kernel log, and a library that no longer finds the device.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_crds::{ExpertPlacement, ModelDeployment, PlacementMap};
use berth_types::DeviceId;
use kube::{Api, Client};
use serde_json::json;

use super::{Options, objects};
use crate::control_plane::ControlPlaneConfig;
use crate::process_kubelet::{KubeletConfig, SimulatedNode};
use crate::{ControlPlane, Error, ProcessKubelet, Result};

/// Namespace of the release.
pub const NAMESPACE: &str = "berth-system";
/// Simulated nodes.
pub const NODES: usize = 2;
/// A node without accelerators: native nodes are tainted, so the control plane's pods need another.
const PLAIN: &str = "cpu-01";
/// PCI addresses of each node's devices.
const DEVICES: [&str; 2] = ["0000:3b:00.0", "0000:5e:00.0"];
/// How the configuration space of a device begins: NVIDIA, H100. And of one that left its bus.
const PRESENT: &[u8] = &[0xDE, 0x10, 0x30, 0x23];
const ABSENT: &[u8] = &[0xFF; 4];
/// Memory of each simulated device, bytes.
const DEVICE_BYTES: u64 = 85_899_345_920;
/// Longest time for the objects of a deployment to vanish.
const VANISH: Duration = Duration::from_secs(60);
/// Chart that is shipped with the project.
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/berth");

/// Everything that runs for the demo. Dropped, it ends every process it started.
pub struct Cluster {
    client: Client,
    nodes: Vec<DeviceNode>,
    berth: PathBuf,
    /// Folder of every node that weights lie in.
    weights: PathBuf,
    // Dropped in this order: pods end before the API server does.
    kubelet: ProcessKubelet,
    plane: ControlPlane,
}

/// Files of one simulated node.
#[derive(Clone, Debug)]
struct DeviceNode {
    name: String,
    kmsg: PathBuf,
    script: PathBuf,
    /// What `/sys/bus/pci/devices` is on a real node.
    pci: PathBuf,
}

impl Cluster {
    /// Starts everything below Berth: control plane and nodes. Weights may lie beside the checkpoint.
    ///
    /// # Errors
    /// When a process or node does not start; the error names its log.
    pub async fn start(options: &Options) -> Result<Self> {
        let checkpoint = options.checkpoint.canonicalize().map_err(Error::file("find", &options.checkpoint))?;
        let weights = checkpoint.parent().unwrap_or(&checkpoint).to_owned();
        let config = ControlPlaneConfig::named(&options.name);
        let plane = match &options.kubeconfig {
            Some(kubeconfig) => ControlPlane::attach(config, kubeconfig).await?,
            None => ControlPlane::start(config).await?,
        };
        let (berth, double) = (built("berth")?, built("libberth_double_nvml.so")?);
        let folder = plane.dir().join("devices");
        fs::create_dir_all(&folder).map_err(Error::file("make", &folder))?;
        let nodes = (1..=NODES).map(|number| DeviceNode::make(&folder, number)).collect::<Result<Vec<_>>>()?;
        let mut simulated: Vec<_> = nodes.iter().map(|node| node.simulated(&double)).collect();
        simulated.push(SimulatedNode::named(PLAIN));
        for node in &mut simulated {
            node.host_paths.insert(weights.clone(), weights.clone());
        }
        let kubelet = KubeletConfig {
            nodes: simulated,
            images: BTreeMap::from([("berth:dev".to_owned(), berth.clone())]),
            ..KubeletConfig::default()
        };
        let kubelet = ProcessKubelet::start(&plane, kubelet).await?;
        Ok(Self { client: plane.client()?, nodes, berth, weights, kubelet, plane })
    }

    /// A client with all rights.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Folder of all logs.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.plane.dir()
    }

    /// What the pods run on, for tests that end processes.
    #[must_use]
    pub fn kubelet(&self) -> &ProcessKubelet {
        &self.kubelet
    }

    /// Runs kubectl.
    ///
    /// # Errors
    /// When it does not succeed.
    pub async fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.plane.kubectl(args).await
    }

    /// Installs the chart.
    ///
    /// # Errors
    /// When a part does not become ready in time.
    pub async fn install(&self) -> Result<()> {
        let weights = format!("agent.weightsRoots={{{}}}", self.weights.display());
        let install = [
            "install",
            "berth",
            CHART,
            "--namespace",
            NAMESPACE,
            "--create-namespace",
            "--wait",
            "--timeout",
            "90s",
            "--set",
            "image.repository=berth",
            "--set",
            "image.tag=dev",
            "--set",
            &weights,
        ];
        self.plane.helm(&install).await?;
        Ok(())
    }

    /// Applies a ModelProfile made from the checkpoint's config.json, and the ModelDeployment.
    ///
    /// # Errors
    /// When the config cannot be imported or the API server refuses.
    pub async fn apply_model(&self, checkpoint: &Path) -> Result<()> {
        const PROFILE: &str = "demo-model";
        let config = checkpoint.join("config.json").display().to_string();
        let import = tokio::process::Command::new(&self.berth)
            .args(["profile", "import", &config, "--name", PROFILE])
            .output()
            .await
            .map_err(|source| Error::Start { program: "berth profile import".into(), source })?;
        if !import.status.success() {
            return Err(Error::Command {
                command: "berth profile import".into(),
                status: import.status.to_string(),
                stderr: String::from_utf8_lossy(&import.stderr).trim().into(),
            });
        }
        let profile = String::from_utf8_lossy(&import.stdout);
        self.plane.kubectl_with_input(&["apply", "-f", "-"], &profile).await?;
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": objects::NAMESPACE}});
        let deployment = objects::deployment(PROFILE, checkpoint);
        let both = json!({"apiVersion": "v1", "kind": "List", "items": [namespace, deployment]});
        self.plane.kubectl_with_input(&["apply", "-f", "-"], &both.to_string()).await?;
        Ok(())
    }

    /// The loss of `device`, ready to happen.
    ///
    /// # Errors
    /// When the device is on none of the nodes.
    pub fn loss_of(&self, device: &DeviceId) -> Result<Loss> {
        let node = self.nodes.iter().find(|node| node.name == device.node()).cloned();
        let node = node.ok_or_else(|| Error::Unknown { what: "node", name: device.node().to_owned() })?;
        Ok(Loss { node, device: device.clone() })
    }

    /// When the agent's ledger decided that `device` is lost, milliseconds of Unix time: by the agent's own log, since
    /// objects tell whole seconds.
    ///
    /// # Errors
    /// When a log cannot be read.
    pub fn decided_ms(&self, device: &DeviceId) -> Result<Option<f64>> {
        let node = format!("\"node\":\"{}\"", device.node());
        for (namespace, pod, container, _) in self.kubelet.running() {
            if container != "agent" {
                continue;
            }
            let log = self.kubelet.log(&namespace, &pod, &container)?;
            if log.contains(&node) {
                return Ok(log.lines().rev().find_map(|line| lost_at(line, device.local())));
            }
        }
        Ok(None)
    }

    /// Commands for a person who looks around.
    #[must_use]
    pub fn how_to_look(&self) -> String {
        let cluster = self.plane.tool().cluster();
        format!(
            "export KUBECONFIG={}\n{} kubectl get berth -A\nlogs: {}",
            self.plane.kubeconfig().display(),
            cluster.display(),
            self.plane.dir().join("kubelet").display()
        )
    }

    /// Deletes the deployment, sees that nothing of it is left, uninstalls, and ends every process.
    ///
    /// # Errors
    /// When something is left.
    pub async fn end(self) -> Result<()> {
        let deployment = ["-n", objects::NAMESPACE, "delete", "modeldeployment", "--all", "--ignore-not-found"];
        let deleted = self.plane.kubectl(&deployment).await;
        let vanished = if deleted.is_ok() { self.nothing_is_left().await } else { Ok(()) };
        let uninstalled =
            self.plane.helm(&["uninstall", "berth", "--namespace", NAMESPACE, "--ignore-not-found", "--wait"]).await;
        deleted?;
        vanished?;
        uninstalled?;
        Ok(())
    }

    async fn nothing_is_left(&self) -> Result<()> {
        let space = objects::NAMESPACE;
        let deployments: Api<ModelDeployment> = Api::namespaced(self.client.clone(), space);
        let placements: Api<ExpertPlacement> = Api::namespaced(self.client.clone(), space);
        let maps: Api<PlacementMap> = Api::namespaced(self.client.clone(), space);
        let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::namespaced(self.client.clone(), space);
        let all = Default::default();
        objects::wait_for("the deployment's objects and pods to vanish", VANISH, || async {
            let list = "list what is left";
            let left = [
                deployments.list_metadata(&all).await.map_err(Error::api(list))?.items.len(),
                placements.list_metadata(&all).await.map_err(Error::api(list))?.items.len(),
                maps.list_metadata(&all).await.map_err(Error::api(list))?.items.len(),
                pods.list_metadata(&all).await.map_err(Error::api(list))?.items.len(),
            ];
            let [deployments, placements, maps, pods] = left;
            let state = format!("{deployments} deployments, {placements} placements, {maps} maps, {pods} pods");
            Ok(if left == [0; 4] { Ok(()) } else { Err(state) })
        })
        .await
    }
}

impl DeviceNode {
    /// Makes the files of node `number`: an empty kernel log, and the script that lists its devices.
    fn make(folder: &Path, number: usize) -> Result<Self> {
        let name = format!("gpu-{number:02}");
        let (kmsg, script) = (folder.join(format!("{name}.kmsg")), folder.join(format!("{name}.jsonl")));
        File::create(&kmsg).map_err(Error::file("create", &kmsg))?;
        let pci = folder.join(format!("{name}.pci"));
        for device in DEVICES.map(|address| pci.join(address)) {
            fs::create_dir_all(&device).map_err(Error::file("make", &device))?;
            for (file, content) in [("vendor", &b"0x10de\n"[..]), ("class", b"0x030200\n"), ("config", PRESENT)] {
                let path = device.join(file);
                fs::write(&path, content).map_err(Error::file("write", &path))?;
            }
        }
        let devices = DEVICES.map(|pci| {
            let uuid = format!("GPU-{number:08x}-0000-4000-8000-{:0>12}", pci.replace([':', '.'], ""));
            json!({
                "pci": pci, "uuid": uuid, "product": "NVIDIA H100 80GB HBM3", "memory_bytes": DEVICE_BYTES,
                "serial": format!("16537{number:04}{}", pci.get(5..7).unwrap_or_default()),
            })
        });
        let header = json!({
            "node": name, "about": "simulated node", "nvidia": devices, "expected_devices": DEVICES.len(),
            "libraries": {"nvml": {"driver": "580.95.05", "events": "0x1f9f"}},
        });
        fs::write(&script, format!("{header}\n")).map_err(Error::file("write", &script))?;
        Ok(Self { name, kmsg, script, pci })
    }

    fn simulated(&self, double: &Path) -> SimulatedNode {
        let path = |path: &Path| path.display().to_string();
        SimulatedNode {
            labels: BTreeMap::from([
                ("berth.dev/mode".to_owned(), "native".to_owned()),
                ("nvidia.com/gpu.present".to_owned(), "true".to_owned()),
            ]),
            env: BTreeMap::from([
                ("BERTH_NVML_LIBRARY".to_owned(), path(double)),
                ("BERTH_DOUBLE_SCRIPT".to_owned(), path(&self.script)),
                ("BERTH_KMSG".to_owned(), path(&self.kmsg)),
                ("BERTH_PCI_DEVICES".to_owned(), path(&self.pci)),
                ("BERTH_WORKER_THREADS".to_owned(), "1".to_owned()),
            ]),
            ..SimulatedNode::named(&self.name)
        }
    }
}

/// A device that falls off the bus, in the two steps that a real node shows.
#[derive(Clone, Debug)]
pub struct Loss {
    node: DeviceNode,
    device: DeviceId,
}

impl Loss {
    /// The device.
    #[must_use]
    pub fn device(&self) -> &DeviceId {
        &self.device
    }

    /// From now on the device answers reads with ones.
    ///
    /// # Errors
    /// When its file cannot be written.
    pub fn leave_bus(&self) -> Result<()> {
        let config = self.node.pci.join(self.device.local()).join("config");
        fs::write(&config, ABSENT).map_err(Error::file("write", &config))
    }

    /// The driver has found out: the kernel log says so, and the library no longer finds the device.
    ///
    /// # Errors
    /// When the node's files cannot be written.
    pub fn driver_notices(&self) -> Result<()> {
        let slot = self.device.local().trim_end_matches(".0");
        let record = format!(
            "4,1000,1000000,-;NVRM: Xid (PCI:{slot}): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"
        );
        let line = json!({"nvml": self.device.local(), "set": {"lost": true}});
        append(&self.node.kmsg, &record)?;
        append(&self.node.script, &format!("{line}\n"))
    }
}

/// The time of a log line that says that the device `local` is lost.
fn lost_at(line: &str, local: &str) -> Option<f64> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    let field = |name: &str| line.get(name).and_then(serde_json::Value::as_str);
    if field("message") != Some("health") || field("device") != Some(local) || field("health") != Some("Unhealthy") {
        return None;
    }
    let at: jiff::Timestamp = field("timestamp")?.parse().ok()?;
    Some(at.as_duration().as_millis_f64())
}

fn append(path: &Path, text: &str) -> Result<()> {
    let mut file = OpenOptions::new().append(true).open(path).map_err(Error::file("open", path))?;
    file.write_all(text.as_bytes()).map_err(Error::file("write", path))
}

/// A file that cargo built beside this program.
fn built(name: &str) -> Result<PathBuf> {
    let program = std::env::current_exe().map_err(Error::file("find", "this program"))?;
    let beside = program.ancestors().skip(1).take(2).map(|folder| folder.join(name));
    beside.into_iter().find(|path| path.is_file()).ok_or_else(|| Error::Unknown {
        what: "built file (run `cargo build -p berth -p berth-double-nvml` first)",
        name: name.to_owned(),
    })
}
