//! `berth operator`: arguments to `berth_operator::Config`, nothing else.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context as _;
use berth_operator::{
    Config, Roots, RunnerConfig,
    accelerator_node::{
        book::Budget,
        remediate::{Mode, Policy},
        remediation::Settings,
    },
};
use berth_runtime::{
    Clock, PartConfig, discovery::Holder, election::Timing, lease::LeaseConfig, shutdown, telemetry::export_traces,
};
use berth_types::Epoch;
use clap::Args;

use crate::{
    telemetry::{self, TraceArgs},
    verdict::Verdict,
};

/// The Lease that operators stand for, in their own namespace.
const LEASE: &str = "berth-operator";
/// How long passes in hand may take after SIGTERM.
const DRAIN_LIMIT: Duration = Duration::from_secs(20);

/// Keeps ModelDeployments, ExpertPlacements, runners, queues and nodes true.
#[derive(Debug, Args)]
pub(crate) struct OperatorArgs {
    /// Name of this pod.
    #[arg(long, env = "BERTH_POD_NAME")]
    pod_name: String,
    /// Namespace of this pod, and of the Lease.
    #[arg(long, env = "BERTH_POD_NAMESPACE")]
    pod_namespace: String,
    /// Address of the admin endpoints.
    #[arg(long, env = "BERTH_ADMIN_LISTEN", default_value = "127.0.0.1:8081")]
    admin_listen: SocketAddr,
    /// Log filter, as in `info` or `berth_operator=debug,info`.
    #[arg(long, env = "BERTH_LOG", default_value = "info")]
    log: String,
    /// Image of the runners.
    #[arg(long, env = "BERTH_RUNNER_IMAGE")]
    runner_image: String,
    /// When the runners' image is pulled.
    #[arg(long, env = "BERTH_RUNNER_PULL_POLICY", default_value = "IfNotPresent",
          value_parser = ["Always", "IfNotPresent", "Never"])]
    runner_pull_policy: String,
    /// ServiceAccount of the runners; empty = the default one of their namespace.
    #[arg(long, env = "BERTH_RUNNER_SERVICE_ACCOUNT", default_value = "")]
    runner_service_account: String,
    /// The scheduler's Lease, `<namespace>/<name>`.
    #[arg(long, env = "BERTH_SCHEDULER_LEASE")]
    scheduler_lease: String,
    /// Folders of the nodes that weights may lie in.
    #[arg(long, env = "BERTH_WEIGHTS_ROOTS", value_delimiter = ',')]
    weights_roots: Vec<PathBuf>,
    /// Of these, those that runners mount by a PersistentVolumeClaim of their namespace: `<folder>=<claim>`.
    #[arg(long, env = "BERTH_WEIGHTS_CLAIMS", value_delimiter = ',', value_parser = claim)]
    weights_claims: Vec<(PathBuf, String)>,
    #[command(flatten)]
    remediation: RemediationArgs,
    #[command(flatten)]
    trace: TraceArgs,
}

/// What may be done about devices that are not well.
#[derive(Debug, Args)]
struct RemediationArgs {
    /// Whether devices that are not well are reset by order, or people are told what should be done.
    #[arg(long, env = "BERTH_REMEDIATION_MODE", value_enum, default_value_t = ModeArg::Advise)]
    remediation_mode: ModeArg,
    /// Operations at a time in the cluster.
    #[arg(long, env = "BERTH_REMEDIATION_CLUSTER", default_value_t = 4)]
    remediation_cluster: u32,
    /// Operations at a time in a pool.
    #[arg(long, env = "BERTH_REMEDIATION_POOL", default_value_t = 2)]
    remediation_pool: u32,
    /// Operations at a time in a failure domain.
    #[arg(long, env = "BERTH_REMEDIATION_DOMAIN", default_value_t = 1)]
    remediation_domain: u32,
    /// Seconds that emptying devices may take.
    #[arg(long, env = "BERTH_REMEDIATION_EMPTY_SECONDS", default_value_t = 900)]
    remediation_empty_seconds: u32,
    /// Seconds that an order may take.
    #[arg(long, env = "BERTH_REMEDIATION_ORDER_SECONDS", default_value_t = 600)]
    remediation_order_seconds: u32,
    /// Seconds until a device that was reset has proven itself.
    #[arg(long, env = "BERTH_REMEDIATION_VALIDATE_SECONDS", default_value_t = 300)]
    remediation_validate_seconds: u32,
    /// Order agents to boot their nodes again; they must be allowed to, too.
    #[arg(long, env = "BERTH_REMEDIATION_REBOOT")]
    remediation_reboot: bool,
    /// Node labels by which other remediators say that they have a node in hand.
    #[arg(
        long,
        env = "BERTH_OTHER_REMEDIATORS",
        value_delimiter = ',',
        default_value = "dgxc.nvidia.com/nvsentinel-state,nvidia.com/gpu-driver-upgrade-state"
    )]
    other_remediators: Vec<String>,
    /// Leave Nodes without our condition, taint and device taints.
    #[arg(long, env = "BERTH_NO_NODE_SIGNS")]
    no_node_signs: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum ModeArg {
    /// Say what should be done.
    #[value(name = "Advise")]
    Advise,
    /// Say what would be done next.
    #[value(name = "DryRun")]
    DryRun,
    /// Do it.
    #[value(name = "Act")]
    Act,
}

impl RemediationArgs {
    fn settings(self, namespace: String) -> Settings {
        let Self {
            remediation_mode,
            remediation_cluster,
            remediation_pool,
            remediation_domain,
            remediation_empty_seconds,
            remediation_order_seconds,
            remediation_validate_seconds,
            remediation_reboot,
            other_remediators,
            no_node_signs,
        } = self;
        let mode = match remediation_mode {
            ModeArg::Advise => Mode::Advise,
            ModeArg::DryRun => Mode::DryRun,
            ModeArg::Act => Mode::Act,
        };
        let policy = Policy {
            mode,
            budget: Budget { cluster: remediation_cluster, pool: remediation_pool, domain: remediation_domain },
            empty_limit: remediation_empty_seconds.into(),
            order_limit: remediation_order_seconds.into(),
            validate_limit: remediation_validate_seconds.into(),
            reboot: remediation_reboot,
            paused: false,
        };
        let others = other_remediators.into_iter().filter(|label| !label.is_empty()).collect();
        Settings { policy, others, signs: !no_node_signs, namespace }
    }
}

/// `<folder>=<claim>`.
fn claim(text: &str) -> Result<(PathBuf, String), String> {
    match text.rsplit_once('=') {
        Some((root, claim)) if root.starts_with('/') && !claim.is_empty() => Ok((root.into(), claim.to_owned())),
        _ => Err(format!("{text:?}: write it as /folder=claim")),
    }
}

/// Runs the operator until SIGTERM.
pub(crate) fn run(args: OperatorArgs) -> anyhow::Result<Verdict> {
    let OperatorArgs {
        pod_name,
        pod_namespace,
        admin_listen,
        log,
        runner_image,
        runner_pull_policy,
        runner_service_account,
        scheduler_lease,
        weights_roots,
        weights_claims,
        remediation,
        trace,
    } = args;
    telemetry::begin("operator", vec![("pod", pod_name.clone())], &log)?;
    let config = Config {
        part: PartConfig { name: "operator", admin_listen, drain_limit: DRAIN_LIMIT },
        lease: LeaseConfig {
            namespace: pod_namespace.clone(),
            name: LEASE.to_owned(),
            identity: Holder { pod: pod_name.clone(), endpoint: admin_listen }.to_string(),
            timing: Timing::default(),
            floor: Epoch(0),
        },
        runner: RunnerConfig {
            image: runner_image,
            image_pull_policy: runner_pull_policy,
            service_account: runner_service_account,
            scheduler_lease,
            otlp_endpoint: trace.otlp_endpoint.clone(),
            // An unset list reads as one empty folder, which would allow every path.
            roots: Roots(weights_roots.into_iter().filter(|root| root.is_absolute()).collect()),
            claims: weights_claims.into_iter().collect(),
        },
        instance: Some(pod_name),
        remediation: remediation.settings(pod_namespace),
    };
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(async {
        let stop = shutdown::on_signals()?;
        export_traces(&trace.otlp_endpoint)?;
        let client = kube::Client::try_default().await.context("no way to the API server")?;
        berth_operator::run(config, client, Clock::real(), stop).await?;
        Ok(Verdict::Pass)
    })
}
