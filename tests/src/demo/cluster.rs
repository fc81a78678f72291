//! The demo's cluster: a control plane, the process kubelet with simulated nodes, and the chart on top.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_crds::{ExpertPlacement, ModelDeployment, PlacementMap};
use berth_types::{DeviceId, Geometry, WeightFormat};
use kube::{Api, Client};
use serde_json::{Value, json};

use super::nodes::{DeviceNode, Loss, ResetFault};
use super::{Options, objects};
use crate::control_plane::ControlPlaneConfig;
use crate::process_kubelet::{KubeletConfig, SimulatedNode};
use crate::{ControlPlane, Error, ProcessKubelet, Result};

/// Claim by which runners mount the weights.
const CLAIM: &str = "weights";
/// Name of the ModelProfile.
pub const PROFILE: &str = "demo-model";
/// Namespace of the release.
pub const NAMESPACE: &str = "berth-system";
/// A node without accelerators: native nodes are tainted, so the control plane's pods need another.
const PLAIN: &str = "cpu-01";
/// How long a device that came back is watched before it is used, in place of ten minutes.
const PROBATION: Duration = Duration::from_secs(2);
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
        let berth = built("berth")?;
        let folder = plane.dir().join("devices");
        fs::create_dir_all(&folder).map_err(Error::file("make", &folder))?;
        let nodes = options.fleet.nodes(&folder)?;
        let mut simulated: Vec<_> = nodes.iter().map(DeviceNode::simulated).collect::<Result<_>>()?;
        simulated.push(SimulatedNode::named(PLAIN));
        for node in &mut simulated {
            node.host_paths.insert(weights.clone(), weights.clone());
        }
        let kubelet = KubeletConfig {
            nodes: simulated,
            images: ["berth:dev", "berth-agent:dev"].map(|image| (image.to_owned(), berth.clone())).into(),
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

    /// What it runs on.
    #[must_use]
    pub fn plane(&self) -> &ControlPlane {
        &self.plane
    }

    /// The binary.
    #[must_use]
    pub fn berth(&self) -> &Path {
        &self.berth
    }

    /// Runs kubectl.
    ///
    /// # Errors
    /// When it does not succeed.
    pub async fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.plane.kubectl(args).await
    }

    /// What `berth` answers to a question about the cluster.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn ask(&self, args: &[&str]) -> Result<String> {
        let mut command = tokio::process::Command::new(&self.berth);
        command.args(args).arg("--kubeconfig").arg(self.plane.kubeconfig());
        let answer = command.output().await;
        let answer = answer.map_err(|source| Error::Start { program: format!("berth {}", args.join(" ")), source })?;
        Ok([answer.stdout, answer.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat())
    }

    /// Installs the chart.
    ///
    /// # Errors
    /// When a part does not become ready in time.
    pub async fn install(&self) -> Result<()> {
        self.install_with(&[]).await
    }

    /// Installs the chart with further values, each as `--set` takes it.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub async fn install_with(&self, values: &[String]) -> Result<()> {
        let weights = format!("agent.weightsRoots={{{}}}", self.weights.display());
        let claimed = format!("runner.weightsClaims[0].root={}", self.weights.display());
        let claim = format!("runner.weightsClaims[0].claim={CLAIM}");
        let probation = format!("agent.probationSeconds={}", PROBATION.as_secs());
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
            "--set",
            &probation,
            "--set",
            &claim,
            "--set",
            &claimed,
        ];
        let more = values.iter().flat_map(|value| ["--set", value.as_str()]);
        let install: Vec<&str> = install.into_iter().chain(more).collect();
        self.plane.helm(&install).await?;
        Ok(())
    }

    /// Installs the chart so that the operator orders resets and agents carry them out, NVIDIA's by the double of
    /// `nvidia-smi`; with further values.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub async fn install_acting(&self, values: &[String]) -> Result<()> {
        let tool = format!("agent.nvidiaSmi={}", built("berth-double-nvidia-smi")?.display());
        let acting = ["operator.remediation.mode=Act".to_owned(), tool];
        self.install_with(&[acting.as_slice(), values].concat()).await
    }

    /// Applies a ModelProfile made from the checkpoint's config.json.
    ///
    /// # Errors
    /// When the config cannot be imported or the API server refuses.
    pub async fn apply_profile(&self, checkpoint: &Path) -> Result<()> {
        let config = checkpoint.join("config.json").display().to_string();
        let import = tokio::process::Command::new(&self.berth)
            .args(["profile", "import", &config, "--name", PROFILE])
            .args(vendor_formats(checkpoint))
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
        Ok(())
    }

    /// Applies a ModelDeployment of that profile, on `devices`.
    ///
    /// # Errors
    /// When the API server refuses.
    pub async fn apply_deployment(&self, name: &str, checkpoint: &Path, devices: &Value) -> Result<()> {
        // Runners are admitted where the restricted Pod Security Standard is enforced.
        let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
        let metadata = json!({"name": objects::NAMESPACE, "labels": labels});
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata});
        let [volume, claim] = objects::weights(CLAIM, &self.weights);
        let deployment = objects::deployment(name, PROFILE, checkpoint, devices);
        let all = json!({"apiVersion": "v1", "kind": "List", "items": [namespace, volume, claim, deployment]});
        self.plane.kubectl_with_input(&["apply", "-f", "-"], &all.to_string()).await?;
        Ok(())
    }

    /// The loss of `device` and of all that is on its card, ready to happen.
    ///
    /// # Errors
    /// When the device is on none of the nodes.
    pub fn loss_of(&self, device: &DeviceId) -> Result<Loss> {
        let node = self.nodes.iter().find(|node| node.name() == device.node());
        let loss = node.and_then(|node| node.loss_of(device));
        loss.ok_or_else(|| Error::Unknown { what: "device", name: device.to_string() })
    }

    /// A fault of `device` that only a reset ends, ready to happen; `code` is the vendor's: an Xid, or `0x…`.
    ///
    /// # Errors
    /// When the device is on none of the nodes.
    pub fn reset_fault_of(&self, device: &DeviceId, code: &str) -> Result<ResetFault> {
        let node = self.nodes.iter().find(|node| node.name() == device.node());
        let fault = node.and_then(|node| node.reset_fault_of(device, code));
        fault.ok_or_else(|| Error::Unknown { what: "device", name: device.to_string() })
    }

    /// When the agent's ledger had decided that all of `loss` is lost, milliseconds of Unix time: by the agent's own log,
    /// since objects tell whole seconds.
    ///
    /// # Errors
    /// When a log cannot be read.
    pub fn decided_ms(&self, loss: &Loss) -> Result<Option<f64>> {
        let mut last: Option<f64> = None;
        for device in loss.devices() {
            let Some(decided) = self.decided_over(device)? else { return Ok(None) };
            last = Some(last.map_or(decided, |last| last.max(decided)));
        }
        Ok(last)
    }

    fn decided_over(&self, device: &DeviceId) -> Result<Option<f64>> {
        let node = format!("\"node\":\"{}\"", device.node());
        for (namespace, pod, container, _) in self.kubelet.running() {
            if container != "agent" {
                continue;
            }
            let log = self.kubelet.log(&namespace, &pod, &container)?;
            if log.contains(&node) {
                return Ok(lost_since(&log, device.local()));
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
        let claims =
            ["-n", objects::NAMESPACE, "delete", "persistentvolumeclaim", CLAIM, "--ignore-not-found", "--wait=false"];
        self.plane.kubectl(&claims).await?;
        self.plane.kubectl(&["delete", "persistentvolume", CLAIM, "--ignore-not-found", "--wait=false"]).await?;
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

/// Since when an agent's log says that the device `local` is Unhealthy; nothing if it is not, as far as the log goes.
fn lost_since(log: &str, local: &str) -> Option<f64> {
    let mut since = None;
    for line in log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let field = |name: &str| line.get(name).and_then(Value::as_str);
        if field("message") != Some("health") || field("device") != Some(local) {
            continue;
        }
        let at = field("timestamp").and_then(|text| text.parse::<jiff::Timestamp>().ok());
        // What is done about it next changes its words, not when it was lost.
        since = match (field("health"), at) {
            (Some("Unhealthy"), Some(at)) => since.or(Some(at.as_duration().as_millis_f64())),
            _ => None,
        };
    }
    since
}

/// A file that cargo built beside this program.
pub(super) fn built(name: &str) -> Result<PathBuf> {
    let program = std::env::current_exe().map_err(Error::file("find", "this program"))?;
    let beside = program.ancestors().skip(1).take(2).map(|folder| folder.join(name));
    beside.into_iter().find(|path| path.is_file()).ok_or_else(|| Error::Unknown {
        what: "built file (run `cargo build -p berth -p berth-double-nvml` first)",
        name: name.to_owned(),
    })
}

/// The chips of the simulated Ascend nodes have no FP4: their workers hold MXFP4 experts as bfloat16, in which each of
/// its values is exact, so that the tokens stay the reference's. Other checkpoints are held as stored.
fn vendor_formats(checkpoint: &Path) -> &'static [&'static str] {
    let config = fs::read(checkpoint.join("config.json")).ok();
    let config = config.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    match config.and_then(|config| Geometry::from_config(&config).ok()) {
        Some(geometry) if geometry.format == WeightFormat::Mxfp4 => &["--vendor-format", "ascend=bf16"],
        _ => &[],
    }
}
