//! One native model instance: attention, routing, KV cache; routed experts by the workers of its placement.
//!
//! It must never fail a request because a placement changed or a device was lost while another replica lives, never log
//! a prompt or an activation, and never write a Kubernetes object: it hears routes from the scheduler and says what it
//! uses. `README.md` has the map.

pub mod control;
pub mod engine;
pub mod error;
pub mod experts;
pub mod load;
pub mod metrics;
pub mod model;
mod num;
pub mod routes;
mod serve;
pub mod served;
mod step;

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use berth_kernels::{Checkpoint, CheckpointError, Roots};
use berth_runtime::{Clock, Part, PartConfig, PartError, admin::Check};
use berth_types::{PlacementName, Revision};
use tokio::{net::TcpListener, runtime::Handle};
use tokio_util::sync::CancellationToken;

use crate::{
    control::{Control, FindScheduler},
    engine::{Engine, EngineConfig, EngineError},
    error::ModelError,
    experts::{Experts, ExpertsConfig},
    model::Model,
    serve::Door,
};

/// A silent control loop makes the process not live after this long.
const ALIVE_WITHIN: Duration = Duration::from_secs(60);
/// How often a draining runner looks whether it is done.
const LOOK: Duration = Duration::from_millis(50);

/// What a runner is told.
#[derive(Debug)]
pub struct Config {
    /// Checkpoint folder: a path or a `file://` URI.
    pub weights: String,
    /// Folders that checkpoints may lie in.
    pub roots: Roots,
    /// Identity that the weights must have; `None` = whatever is there.
    pub digest: Option<String>,
    /// The placement it serves.
    pub placement: PlacementName,
    /// Its own name: the pod's.
    pub runner: String,
    /// Address of the `Serve` service.
    pub listen: SocketAddr,
    /// Address of the admin endpoints.
    pub admin_listen: SocketAddr,
    /// Finds the scheduler's leader.
    pub scheduler: Arc<dyn FindScheduler>,
    /// Bounds of the engine.
    pub engine: EngineConfig,
    /// Bounds of the client of workers.
    pub experts: ExpertsConfig,
    /// How often it says that it lives; the scheduler counts 5 s of silence as its end.
    pub beat: Duration,
    /// Length of a load window.
    pub window: Duration,
    /// How long it takes new requests after it was asked to stop, not ready any more: so long may clients and
    /// status take to hear of it.
    pub linger: Duration,
    /// How long running requests may go on after that.
    pub drain: Duration,
}

/// Why a runner ended otherwise than by being asked to.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// The checkpoint cannot be opened.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model cannot be served.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The weights are not those that were ordered.
    #[error("the weights in {weights} have digest {found}, ordered is {ordered}: correct the uri or the digest")]
    Digest {
        /// Where they are.
        weights: String,
        /// What they are.
        found: String,
        /// What they should be.
        ordered: String,
    },
    /// The engine could not be started.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The address could not be had.
    #[error("listening on {listen}: {source}: choose another address")]
    Listen {
        /// The address.
        listen: SocketAddr,
        /// The system's words.
        source: io::Error,
    },
    /// A thread that loads weights died.
    #[error("loading was abandoned: {0}")]
    Abandoned(#[from] tokio::task::JoinError),
    /// A part of the process failed.
    #[error(transparent)]
    Part(#[from] PartError),
}

/// Loads the model, serves, and ends in order when `stop` is cancelled: not ready, after `config.linger`
/// no new requests, running ones finish within `config.drain`.
///
/// # Errors
/// The first thing that kept it from serving.
pub async fn run(config: Config, stop: CancellationToken) -> Result<(), RunnerError> {
    let Config {
        weights,
        roots,
        digest,
        placement,
        runner,
        listen,
        admin_listen,
        scheduler,
        engine,
        experts,
        beat,
        window,
        linger,
        drain,
    } = config;
    let clock = engine.clock.clone();
    let part = PartConfig { name: "runner", admin_listen, drain_limit: linger + drain + Duration::from_secs(5) };
    let part = Part::start(part, clock.clone(), stop).await?;
    let routed = part.admin.check("routes");
    let listener = TcpListener::bind(listen).await.map_err(|source| RunnerError::Listen { listen, source })?;
    let (model, found) = tokio::task::spawn_blocking(move || load(&weights, &roots, digest)).await??;
    tracing::info!(placement = %placement, digest = found.get().map_or("not read yet", String::as_str), "model loaded");
    let experts = Experts::new(experts, Handle::current());
    let engine = Engine::start(Arc::clone(&model), Arc::new(experts.clone()), engine)?;
    metrics::register(&part.metrics, &engine, &experts);
    let (stopping, closing, drained) =
        (part.tasks.stopping().clone(), CancellationToken::new(), CancellationToken::new());
    let digesting = Arc::clone(&found);
    // Reading a large checkpoint takes minutes; nothing waits for it unless a digest was ordered.
    tokio::task::spawn_blocking(move || digesting.get_or_init(|| model.digest().to_owned()).len());
    let door =
        Door { engine: engine.clone(), experts: experts.clone(), placement: placement.to_string(), digest: found };
    part.tasks.keep("serve", door.serve(listener, closing.clone()));
    part.tasks.keep("ready", ready(routed, experts.clone(), stopping.clone()));
    part.tasks.keep("linger", wait(clock.clone(), linger, stopping, closing.clone()));
    part.tasks.keep("drain", finish(engine.clone(), clock.clone(), drain, closing, drained.clone()));
    let (windows, closed) = tokio::sync::watch::channel(0);
    part.tasks
        .keep("load", control::count(engine.load(), experts.clone(), clock.clone(), window, windows, drained.clone()));
    let control = Control {
        clock,
        scheduler,
        placement: placement.to_string(),
        runner,
        experts,
        load: engine.load(),
        beat,
        closed,
        alive: part.admin.heartbeat("control", ALIVE_WITHIN),
        epoch: 0,
        said: String::new(),
        switch: None,
    };
    part.tasks.keep("control", async move {
        control.run(drained).await;
        Ok::<_, io::Error>(())
    });
    Ok(part.finish().await?)
}

type Loaded = (Arc<Model>, Arc<OnceLock<String>>);

/// Opens and loads; compares the digest before anything is served, if one was ordered.
fn load(weights: &str, roots: &Roots, ordered: Option<String>) -> Result<Loaded, RunnerError> {
    let dir = roots.resolve(weights)?;
    let checkpoint = Arc::new(Checkpoint::open_within(&dir, roots)?);
    let found = Arc::new(OnceLock::new());
    if let Some(ordered) = ordered {
        let digest = found.get_or_init(|| checkpoint.digest().to_owned());
        if *digest != ordered {
            return Err(RunnerError::Digest { weights: weights.to_owned(), found: digest.clone(), ordered });
        }
    }
    Ok((Model::load(checkpoint, &dir)?, found))
}

/// Passes the readiness check once there are routes. They never go away.
async fn ready(routed: Check, experts: Experts, stopping: CancellationToken) -> Result<(), io::Error> {
    let mut in_use = experts.in_use();
    let some = in_use.wait_for(|in_use| in_use.current != Revision(0));
    // Cancel-safe: both arms only wait.
    tokio::select! {
        () = stopping.cancelled() => return Ok(()),
        waited = some => if waited.is_ok() { routed.pass() },
    }
    stopping.cancelled().await;
    Ok(())
}

/// Cancels `closing` when `linger` has passed since `stopping`.
async fn wait(
    clock: Clock,
    linger: Duration,
    stopping: CancellationToken,
    closing: CancellationToken,
) -> Result<(), io::Error> {
    stopping.cancelled().await;
    clock.sleep(linger).await;
    closing.cancel();
    Ok(())
}

/// Lets running requests finish after `closing`, ends the others, then says that it is done.
async fn finish(
    engine: Engine,
    clock: Clock,
    limit: Duration,
    closing: CancellationToken,
    drained: CancellationToken,
) -> Result<(), io::Error> {
    closing.cancelled().await;
    engine.close();
    let idle = async {
        while !engine.idle() {
            clock.sleep(LOOK).await;
        }
    };
    if clock.timeout(limit, idle).await.is_err() {
        tracing::warn!(sequences = engine.stats().sequences, "running requests took too long and are ended");
    }
    engine.stop();
    drained.cancel();
    Ok(())
}
