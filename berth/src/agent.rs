//! `berth agent`: one node's supervisor, as the chart's DaemonSet starts it.

use std::{ffi::OsString, net::SocketAddr, num::NonZeroUsize, path::PathBuf, time::Duration};

use anyhow::Context;
use berth_agent::{Compatible, Config, health::device::Settings, vitals::Holder, workers::WorkerConfig};
use berth_kernels::BackendKind;
use berth_runtime::{Clock, shutdown, telemetry::export_traces};
use berth_types::{Bytes, NodeName};

use crate::{
    telemetry::{self, TraceArgs},
    verdict::Verdict,
};

/// Which backend workers compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Backend {
    /// The device's own where this build has it, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// CUDA.
    Cuda,
    /// CANN.
    Ascend,
}

/// An exporter of a vendor whose names boards may be made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Exporter {
    /// NVIDIA's dcgm-exporter.
    Dcgm,
    /// Ascend's npu-exporter.
    Npu,
}

/// Watches a node's devices, runs one worker per device, reports and obeys.
#[derive(Debug, clap::Args)]
pub(crate) struct AgentArgs {
    /// Name of the node
    #[arg(long, env = "BERTH_NODE_NAME")]
    node_name: NodeName,
    /// Address of the pod: workers listen there
    #[arg(long, env = "BERTH_POD_IP")]
    pod_ip: std::net::IpAddr,
    /// Where to serve probes and metrics
    #[arg(long, env = "BERTH_ADMIN_LISTEN", default_value = "127.0.0.1:8082")]
    admin_listen: SocketAddr,
    /// The scheduler's Lease, <namespace>/<name>
    #[arg(long, env = "BERTH_SCHEDULER_LEASE")]
    scheduler_lease: String,
    /// Folders that weights may be read from, separated by commas
    #[arg(long, env = "BERTH_WEIGHTS_ROOTS", value_delimiter = ',')]
    weights_roots: Vec<PathBuf>,
    /// The kernel log, or a file or pipe of records in its format
    #[arg(long, env = "BERTH_KMSG", default_value = "/dev/kmsg")]
    kmsg: PathBuf,
    /// NVIDIA's management library; default: libnvidia-ml.so.1, as the dynamic linker finds it
    #[arg(long, env = "BERTH_NVML_LIBRARY")]
    nvml_library: Option<OsString>,
    /// Ascend's management library; default: libdcmi.so, as the dynamic linker finds it
    #[arg(long, env = "BERTH_DCMI_LIBRARY")]
    dcmi_library: Option<OsString>,
    /// The library of the switches of Ascend's scale-up fabric; default: liblingqu-dcmi.so
    #[arg(long, env = "BERTH_LINGQU_LIBRARY")]
    lingqu_library: Option<OsString>,
    /// Where the kernel lists PCI devices
    #[arg(long, env = "BERTH_PCI_DEVICES", default_value = "/sys/bus/pci/devices")]
    pci_devices: PathBuf,
    /// NVIDIA's program that resets a device
    #[arg(long, env = "BERTH_NVIDIA_SMI", default_value = "nvidia-smi")]
    nvidia_smi: PathBuf,
    /// Program and arguments that boot the node again, separated by spaces; empty: this agent may not
    #[arg(long, env = "BERTH_REBOOT_COMMAND", default_value = "")]
    reboot_command: String,
    /// What workers compute on
    #[arg(long, env = "BERTH_WORKER_BACKEND", value_enum, default_value_t = Backend::Auto)]
    worker_backend: Backend,
    /// Most memory a worker takes, for example 64MB; default: its device's. For devices that are not really there
    #[arg(long, env = "BERTH_WORKER_MEMORY")]
    worker_memory: Option<Bytes>,
    /// Threads of each worker; default: all cores
    #[arg(long, env = "BERTH_WORKER_THREADS")]
    worker_threads: Option<NonZeroUsize>,
    /// How long a device that came back is watched before it is used again, in seconds; it doubles for repeaters
    #[arg(long, env = "BERTH_PROBATION_SECONDS", default_value_t = 600)]
    probation_seconds: u64,
    /// Also serve the devices under the names of a vendor's exporter: dcgm at /metrics/dcgm, npu at /metrics/npu
    #[arg(long, env = "BERTH_COMPATIBLE_METRICS", value_enum, value_delimiter = ',')]
    compatible_metrics: Vec<Exporter>,
    /// Name of the pod, which holds the devices that it hosts
    #[arg(long, env = "BERTH_POD_NAME")]
    pod_name: Option<String>,
    /// Namespace of the pod
    #[arg(long, env = "BERTH_POD_NAMESPACE")]
    pod_namespace: Option<String>,
    /// About how long between two validations of a device that holds nothing, in seconds; 0 = idle devices are not validated
    #[arg(long, env = "BERTH_IDLE_PROBE_SECONDS", default_value_t = 3600)]
    idle_probe_seconds: u64,
    /// Folder of the node where counters, open faults and the last incidents are kept; empty = a restart forgets
    #[arg(long, env = "BERTH_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// What to log: error, warn, info, debug or a filter per module
    #[arg(long, env = "BERTH_LOG", default_value = "info")]
    log: String,
    #[command(flatten)]
    trace: TraceArgs,
}

/// Runs until a signal comes.
pub(crate) fn run(args: AgentArgs) -> anyhow::Result<Verdict> {
    telemetry::begin("agent", vec![("node", args.node_name.to_string())], &args.log)?;
    let trace = args.trace.clone();
    let config = config(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let stop = shutdown::on_signals()?;
        export_traces(&trace.otlp_endpoint)?;
        let client = kube::Client::try_default()
            .await
            .context("API server: give the pod a service account, or set KUBECONFIG")?;
        berth_agent::run(config, client, Clock::real(), stop).await?;
        anyhow::Ok(())
    })?;
    Ok(Verdict::Pass)
}

/// What the agent is told.
fn config(args: AgentArgs) -> anyhow::Result<Config> {
    let AgentArgs {
        node_name,
        pod_ip,
        admin_listen,
        scheduler_lease,
        weights_roots,
        kmsg,
        nvml_library,
        dcmi_library,
        lingqu_library,
        pci_devices,
        nvidia_smi,
        reboot_command,
        worker_backend,
        worker_memory,
        worker_threads,
        probation_seconds,
        compatible_metrics,
        pod_name,
        pod_namespace,
        idle_probe_seconds,
        state_dir,
        log: _,
        trace: _,
    } = args;
    let (namespace, name) = scheduler_lease
        .split_once('/')
        .with_context(|| format!("--scheduler-lease {scheduler_lease:?}: write it as <namespace>/<name>"))?;
    let worker = WorkerConfig {
        program: std::env::current_exe().context("finding this program, which workers are started from")?,
        backend: backend(worker_backend),
        address: pod_ip,
        roots: weights_roots.into_iter().filter(|root| !root.as_os_str().is_empty()).collect(),
        memory: worker_memory,
        threads: worker_threads,
    };
    Ok(Config {
        node: node_name,
        admin_listen,
        scheduler_lease: (namespace.to_owned(), name.to_owned()),
        kernel_log: kmsg,
        nvml_library,
        dcmi_library,
        lingqu_library,
        pci_devices,
        nvidia_smi,
        reboot: reboot_command.split_whitespace().map(str::to_owned).collect(),
        worker,
        compatible: compatible(&compatible_metrics, pod_namespace, pod_name),
        health: Settings { probation: Duration::from_secs(probation_seconds) },
        idle_probe: (idle_probe_seconds > 0).then(|| Duration::from_secs(idle_probe_seconds)),
        state: state_dir.filter(|folder| !folder.as_os_str().is_empty()),
    })
}

/// The container of the chart's agents that the workers run in.
const CONTAINER: &str = "agent";

fn compatible(wanted: &[Exporter], namespace: Option<String>, pod: Option<String>) -> Compatible {
    let holder = namespace.zip(pod).map(|(namespace, pod)| Holder { namespace, pod, container: CONTAINER.to_owned() });
    let has = |exporter| wanted.contains(&exporter);
    Compatible { dcgm: has(Exporter::Dcgm), npu: has(Exporter::Npu), holder }
}

fn backend(wanted: Backend) -> BackendKind {
    match wanted {
        Backend::Cpu => BackendKind::Cpu,
        Backend::Cuda => BackendKind::Cuda,
        Backend::Ascend => BackendKind::Ascend,
        Backend::Auto => {
            tracing::info!("worker backend auto: this build computes on the CPU only");
            BackendKind::Cpu
        }
    }
}
