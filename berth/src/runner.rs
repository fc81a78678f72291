//! `berth runner`: one native model instance. Reads arguments, finds the scheduler's leader, runs the part.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use berth_kernels::Roots;
use berth_runner::{Config, control::FindScheduler, engine::EngineConfig, experts::ExpertsConfig};
use berth_runtime::{Clock, discovery, shutdown, telemetry::export_traces};
use berth_types::{Bytes, PlacementName};
use futures::future::BoxFuture;

use crate::{
    telemetry::{self, TraceArgs},
    verdict::Verdict,
};

/// Computes everything of a model but its routed experts, which the workers of its placement compute.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Checkpoint folder, as a path or file:// URI
    #[arg(long, env = "BERTH_WEIGHTS")]
    checkpoint: String,
    /// Folders that checkpoints may lie in, separated by commas
    #[arg(long, env = "BERTH_WEIGHTS_ROOTS", value_delimiter = ',', required = true)]
    weights_roots: Vec<PathBuf>,
    /// Digest that the checkpoint must have, sha256:<hex>; it is read through before anything is served
    #[arg(long, env = "BERTH_WEIGHTS_DIGEST")]
    digest: Option<String>,
    /// The ExpertPlacement it serves, <namespace>/<name>
    #[arg(long, env = "BERTH_PLACEMENT")]
    placement: PlacementName,
    /// Where to serve requests
    #[arg(long, env = "BERTH_LISTEN", default_value = "127.0.0.1:7500")]
    listen: SocketAddr,
    /// Where to serve metrics and probes
    #[arg(long, env = "BERTH_ADMIN_LISTEN", default_value = "127.0.0.1:8081")]
    admin: SocketAddr,
    /// Lease that the scheduler's leader holds, <namespace>/<name>
    #[arg(long, env = "BERTH_SCHEDULER_LEASE", required_unless_present = "scheduler")]
    scheduler_lease: Option<PlacementName>,
    /// Address of the scheduler, instead of its Lease
    #[arg(long, env = "BERTH_SCHEDULER", conflicts_with = "scheduler_lease")]
    scheduler: Option<SocketAddr>,
    /// Name of this pod
    #[arg(long, env = "BERTH_POD_NAME", default_value = "runner")]
    pod_name: String,
    /// Namespace of this pod
    #[arg(long, env = "BERTH_POD_NAMESPACE", default_value = "default")]
    pod_namespace: String,
    /// Bytes of KV cache for all sequences together
    #[arg(long, env = "BERTH_CACHE", default_value = "1GiB")]
    cache: Bytes,
    /// Sequences generated at once
    #[arg(long, env = "BERTH_SEQUENCES", default_value_t = 64)]
    sequences: usize,
    /// How long an expert may have no live replica before a request fails, in milliseconds
    #[arg(long, env = "BERTH_EXPERT_DEADLINE_MS", default_value_t = 60_000)]
    expert_deadline_ms: u64,
    /// Length of a load window, in milliseconds
    #[arg(long, env = "BERTH_LOAD_WINDOW_MS", default_value_t = 10_000)]
    load_window_ms: u64,
    /// How long new requests are still taken after it was asked to stop, in milliseconds: so long may clients take to
    /// hear that it ends
    #[arg(long, env = "BERTH_LINGER_MS", default_value_t = 2_000)]
    linger_ms: u64,
    /// How long running requests may go on after that, in milliseconds
    #[arg(long, env = "BERTH_DRAIN_MS", default_value_t = 20_000)]
    drain_ms: u64,
    /// What to log: error, warn, info, debug or a filter per module
    #[arg(long, env = "BERTH_LOG", default_value = "info")]
    log: String,
    #[command(flatten)]
    trace: TraceArgs,
}

/// Runs until a signal comes.
pub(crate) fn run(args: Args) -> anyhow::Result<Verdict> {
    let pod = format!("{}/{}", args.pod_namespace, args.pod_name);
    telemetry::begin("runner", vec![("pod", pod), ("placement", args.placement.to_string())], &args.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        let stop = shutdown::on_signals()?;
        export_traces(&args.trace.otlp_endpoint)?;
        berth_runner::run(configure(args).await?, stop).await.map_err(anyhow::Error::from)
    });
    // A checkpoint that is still being read for its digest keeps nobody waiting.
    runtime.shutdown_timeout(Duration::from_secs(1));
    outcome.map(|()| Verdict::Pass)
}

async fn configure(args: Args) -> anyhow::Result<Config> {
    let Args {
        checkpoint,
        weights_roots,
        digest,
        placement,
        listen,
        admin,
        scheduler_lease,
        scheduler,
        pod_name,
        pod_namespace,
        cache,
        sequences,
        expert_deadline_ms,
        load_window_ms,
        linger_ms,
        drain_ms,
        log: _,
        trace: _,
    } = args;
    let clock = Clock::real();
    let scheduler: Arc<dyn FindScheduler> = match (scheduler, scheduler_lease) {
        (Some(address), _) => Arc::new(address),
        (None, Some(lease)) => Arc::new(Leader {
            client: kube::Client::try_default().await.context("reading the scheduler's lease needs a cluster")?,
            clock: clock.clone(),
            lease,
        }),
        (None, None) => anyhow::bail!("neither --scheduler nor --scheduler-lease is given: name one"),
    };
    Ok(Config {
        weights: checkpoint,
        roots: Roots::new(&weights_roots).context("--weights-roots")?,
        digest: digest.filter(|digest| !digest.is_empty()),
        placement,
        runner: format!("{pod_namespace}/{pod_name}"),
        listen,
        admin_listen: admin,
        scheduler,
        engine: EngineConfig { clock: clock.clone(), cache_bytes: cache.get(), sequences, ..EngineConfig::default() },
        experts: ExpertsConfig {
            clock,
            deadline: Duration::from_millis(expert_deadline_ms),
            ..ExpertsConfig::default()
        },
        beat: Duration::from_secs(1),
        window: Duration::from_millis(load_window_ms),
        linger: Duration::from_millis(linger_ms),
        drain: Duration::from_millis(drain_ms),
    })
}

/// Whoever holds the scheduler's Lease.
struct Leader {
    client: kube::Client,
    clock: Clock,
    lease: PlacementName,
}

impl std::fmt::Debug for Leader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Leader({})", self.lease)
    }
}

impl FindScheduler for Leader {
    fn find(&self) -> BoxFuture<'_, Result<SocketAddr, String>> {
        Box::pin(async {
            let (client, jitter) = (self.client.clone(), Duration::from_millis(200));
            let (namespace, name) = (self.lease.namespace(), self.lease.name());
            let holder = discovery::discover(client, &self.clock, namespace, name, jitter).await;
            holder.map(|holder| holder.endpoint).map_err(|error| error.to_string())
        })
    }
}
