//! `berth scheduler`: the door to the part that keeps placements true.

use std::{net::SocketAddr, time::Duration};

use anyhow::Context;
use berth_runtime::{Clock, shutdown::on_signals, telemetry::export_traces};
use clap::Args;

use crate::{
    store::StoreArgs,
    telemetry::{self, TraceArgs},
    verdict::Verdict,
};

/// Keep expert placements true: one leader decides, the others wait.
#[derive(Debug, Args)]
pub(crate) struct SchedulerArgs {
    /// Name of this pod.
    #[arg(long, env = "BERTH_POD_NAME")]
    pod_name: String,
    /// Namespace of this pod.
    #[arg(long, env = "BERTH_POD_NAMESPACE")]
    pod_namespace: String,
    /// Lease that the leader holds, as <namespace>/<name>; by default berth-scheduler in the pod's namespace.
    #[arg(long, env = "BERTH_SCHEDULER_LEASE")]
    lease: Option<String>,
    /// Address of the control endpoint for agents and runners.
    #[arg(long, env = "BERTH_LISTEN", default_value = "127.0.0.1:7400")]
    listen: SocketAddr,
    /// Address of the admin endpoints.
    #[arg(long, env = "BERTH_ADMIN_LISTEN", default_value = "127.0.0.1:7401")]
    admin_listen: SocketAddr,
    /// Seconds that work in hand may take after a signal to stop; below the pod's grace period.
    #[arg(long, env = "BERTH_DRAIN_SECONDS", default_value_t = 20)]
    drain_seconds: u64,
    /// Seconds that a revision may load before it is planned around the workers that are late.
    #[arg(long, env = "BERTH_LOAD_LIMIT_SECONDS", default_value_t = 60)]
    load_limit_seconds: u64,
    #[command(flatten)]
    store: StoreArgs,
    /// Log filter, as EnvFilter writes it.
    #[arg(long, env = "BERTH_LOG", default_value = "info")]
    log: String,
    #[command(flatten)]
    trace: TraceArgs,
}

/// Runs the scheduler until a signal.
pub(crate) fn run(args: SchedulerArgs) -> anyhow::Result<Verdict> {
    let SchedulerArgs {
        pod_name,
        pod_namespace,
        lease,
        listen,
        admin_listen,
        drain_seconds,
        load_limit_seconds,
        store,
        log,
        trace,
    } = args;
    telemetry::begin("scheduler", vec![("pod", pod_name.clone())], &log)?;
    let lease = lease.unwrap_or_else(|| format!("{pod_namespace}/berth-scheduler"));
    let (lease_namespace, lease) = lease
        .split_once('/')
        .map(|(space, name)| (space.to_owned(), name.to_owned()))
        .with_context(|| format!("BERTH_SCHEDULER_LEASE is {lease:?}: write it as <namespace>/<name>"))?;
    let drain_limit = Duration::from_secs(drain_seconds);
    let load_limit = Duration::from_secs(load_limit_seconds);
    let config = berth_scheduler::Config {
        pod: pod_name,
        lease_namespace,
        lease,
        listen,
        admin_listen,
        drain_limit,
        load_limit,
        store: store.config()?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let stop = on_signals()?;
        export_traces(&trace.otlp_endpoint)?;
        let client = kube::Client::try_default().await.context("no access to a cluster")?;
        berth_scheduler::run(config, client, Clock::real(), stop).await?;
        Ok(Verdict::Pass)
    })
}
