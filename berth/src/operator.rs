//! `berth operator`: arguments to `berth_operator::Config`, nothing else.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context as _;
use berth_operator::{Config, Roots, RunnerConfig};
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
    trace: TraceArgs,
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
        trace,
    } = args;
    telemetry::begin("operator", vec![("pod", pod_name.clone())], &log)?;
    let config = Config {
        part: PartConfig { name: "operator", admin_listen, drain_limit: DRAIN_LIMIT },
        lease: LeaseConfig {
            namespace: pod_namespace,
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
    };
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(async {
        let stop = shutdown::on_signals()?;
        export_traces(&trace.otlp_endpoint)?;
        let client = kube::Client::try_default().await.context("no way to the API server")?;
        berth_operator::run(config, client, Clock::real(), stop).await?;
        Ok(Verdict::Pass)
    })
}
