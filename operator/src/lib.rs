//! Keeps Kubernetes objects true: ModelDeployments become ExpertPlacements and runners, queues admit, nodes
//! become hosts. It speaks only Kubernetes objects, never the wire, and writes only while it leads.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use berth_crds::ModelDeployment;
use berth_runtime::{
    Clock, Part, PartConfig, PartError, Term,
    lease::{LeaseConfig, next_term},
};
use futures::{Stream, StreamExt, stream};
use k8s_openapi::{api::core::v1::Node, jiff::Timestamp};
use kube::{
    Client, Resource, ResourceExt,
    runtime::{
        controller::{self, Action, applier},
        reflector::{ObjectRef, Store},
    },
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

pub mod accelerator_node;
pub mod allocation;
pub mod capacity;
pub mod error;
pub mod fleet;
pub mod metrics;
pub mod model_deployment;
pub mod survey;
pub mod watches;
pub mod writes;

use accelerator_node::{
    book::Book,
    remediation::{self, RemediationPass},
};
use capacity::{CapacityPass, Grants};
use error::{Category, requeue};
use metrics::OperatorMetrics;
pub use model_deployment::{build::RunnerConfig, validate::Roots};
use watches::{Signals, Stores, Touched, key_of};
use writes::Writes;

/// Objects of one kind that are looked at at the same time.
const CONCURRENCY: u16 = 4;
/// Touches of one object within this time make one pass.
const GATHER: Duration = Duration::from_millis(20);
/// Control without a turn for so long makes the process not live.
const ALIVE_WITHIN: Duration = Duration::from_secs(60);

/// What the operator is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Admin address and drain limit.
    pub part: PartConfig,
    /// The Lease it stands for.
    pub lease: LeaseConfig,
    /// What runners are told.
    pub runner: RunnerConfig,
    /// Name of this process in events: its pod.
    pub instance: Option<String>,
    /// What may be done about devices that are not well.
    pub remediation: remediation::Settings,
}

/// Runs the operator until `stop` is cancelled.
///
/// # Errors
/// [`PartError`], when the admin address cannot be had or a task failed.
pub async fn run(config: Config, client: Client, clock: Clock, stop: CancellationToken) -> Result<(), PartError> {
    let Config { part, lease, runner, instance, remediation } = config;
    let part = Part::start(part, clock, stop).await?;
    let metrics = part.metrics.register(OperatorMetrics::register);
    let mut leadership = part.lead(client.clone(), lease);
    let (tasks, clock) = (part.tasks.clone(), part.clock.clone());
    let alive = part.admin.heartbeat("control", ALIVE_WITHIN);
    part.tasks.keep("control", async move {
        while let Some(term) = alive.during(next_term(&mut leadership, tasks.stopping())).await {
            tracing::info!(epoch = %term.epoch(), "leading");
            let may_write = term.clone();
            let may_write = Arc::new(move || may_write.check().map(drop));
            let writes = Writes::new(client.clone(), clock.clone(), metrics.clone(), may_write, instance.clone());
            let chosen = (runner.clone(), remediation.clone());
            alive.during(control(&client, writes, chosen, &clock, &metrics, &term)).await;
            metrics.resigned();
            tracing::info!(epoch = %term.epoch(), "no longer leading");
        }
        Ok::<_, PartError>(())
    });
    part.finish().await
}

/// What every pass can use.
pub struct Context {
    /// Caches.
    pub stores: Stores,
    /// The door.
    pub writes: Writes,
    /// What runners are told.
    pub runner: RunnerConfig,
    /// What deployments may have.
    pub grants: watch::Receiver<Grants>,
    /// What may be done about devices that are not well.
    pub remediation: remediation::Settings,
    /// What is being done about them; `None` = not read in this term.
    pub book: watch::Receiver<Option<Arc<Book>>>,
    /// Time.
    pub clock: Clock,
    metrics: OperatorMetrics,
    /// Errors in a row, by kind and object; an object without errors has no entry.
    attempts: Mutex<HashMap<(&'static str, String), u32>>,
}

impl Context {
    /// Counts an error and says when to look again.
    fn failed(&self, kind: &'static str, object: String, category: Category, error: &dyn fmt::Display) -> Action {
        self.metrics.failed(kind, category.as_str());
        let seed = object.bytes().fold(0u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let mut attempts = self.attempts.lock().unwrap_or_else(PoisonError::into_inner);
        let attempt = attempts.entry((kind, object.clone())).or_default();
        *attempt = attempt.saturating_add(1);
        let attempt = *attempt;
        drop(attempts);
        match category {
            Category::Conflict => tracing::debug!(kind, object, attempt, %error, "written in between, again"),
            Category::Bug => tracing::error!(kind, object, attempt, %error, "the operator is wrong"),
            _ => tracing::warn!(kind, object, attempt, %error, "pass failed"),
        }
        requeue(category, attempt, seed)
    }

    fn succeeded(&self, kind: &'static str, object: &str) {
        let mut attempts = self.attempts.lock().unwrap_or_else(PoisonError::into_inner);
        attempts.remove(&(kind, object.to_owned()));
    }
}

/// Works through one term. Returns when it is over and the passes in hand are done.
async fn control(
    client: &Client,
    writes: Writes,
    (runner, remediation): (RunnerConfig, remediation::Settings),
    clock: &Clock,
    metrics: &OperatorMetrics,
    term: &Term,
) {
    let ended = term.ended().clone();
    let signals = Signals::default();
    let (stores, pumps) = Stores::watch(client, &signals);
    let (publish, grants) = watch::channel(Grants::default());
    let (remember, book) = watch::channel(None);
    let roots = runner.roots.clone();
    let (settings, metrics, clock) = (remediation.clone(), metrics.clone(), clock.clone());
    let attempts = Mutex::default();
    let context = Context { stores, writes, runner, grants, remediation, book, clock, metrics, attempts };
    let context = Arc::new(context);
    let Context { stores, writes, clock, metrics, .. } = &*context;
    let work = async {
        // Both arms only wait.
        tokio::select! {
            () = ended.cancelled() => return,
            ready = stores.ready() => if ready.is_err() { return },
        }
        tracing::info!(deployments = stores.deployments.len(), nodes = stores.nodes.len(), "caches filled");
        signals.capacity.notify_one();
        let (signals, roots, settings) = (&signals, &roots, &settings);
        let pass = CapacityPass { stores, signals, writes, clock, metrics, roots, grants: publish };
        let remedies = RemediationPass { stores, signals, writes, clock, settings, metrics, book: remember };
        tokio::join!(
            pass.keep(&ended),
            remedies.keep(&ended),
            deployments(&signals.deployments, &stores.deployments, &context, &ended),
            nodes(&signals.nodes, &stores.nodes, &context, &ended),
        );
    };
    // The pumps only fill caches; when the work is done nobody reads these any more.
    tokio::select! {
        () = pumps => {}
        () = work => {}
    }
}

/// The touched objects until `ended`, as references.
fn touched<'a, K, T>(
    touched: &'a Touched<T>,
    ended: &'a CancellationToken,
    reference: impl Fn(T) -> ObjectRef<K> + Copy + 'a,
) -> impl Stream<Item = Result<ObjectRef<K>, std::convert::Infallible>> + 'a
where
    K: Resource<DynamicType = ()> + 'a,
    T: Ord + 'a,
{
    let keys = stream::unfold((), move |()| async move { Some((Ok(reference(touched.next().await)), ())) });
    keys.take_until(ended.cancelled())
}

async fn deployments(
    signals: &Touched<allocation::Key>,
    store: &Store<ModelDeployment>,
    context: &Arc<Context>,
    ended: &CancellationToken,
) {
    const KIND: &str = "ModelDeployment";
    let queue = touched(signals, ended, |key: allocation::Key| {
        ObjectRef::<ModelDeployment>::new(&key.name).within(&key.namespace)
    });
    let name = |object: &ModelDeployment| {
        let key = key_of(object);
        format!("{}/{}", key.namespace, key.name)
    };
    let one = move |object: Arc<ModelDeployment>, context: Arc<Context>| {
        Box::pin(async move {
            let pass = context.metrics.begin(KIND, &context.clock);
            let span = tracing::info_span!("reconcile", deployment = name(&object));
            let done = model_deployment::reconcile(&object, &context).instrument(span).await;
            pass.finish(done.is_ok());
            let done = done?;
            context.succeeded(KIND, &name(&object));
            Ok::<_, model_deployment::ReconcileError>(done)
        })
    };
    let policy =
        move |object: Arc<ModelDeployment>, error: &model_deployment::ReconcileError, context: Arc<Context>| {
            context.failed(KIND, name(&object), error.category(), error)
        };
    let passes = applier(one, policy, Arc::clone(context), store.clone(), Box::pin(queue), settings());
    passes.for_each(|_| std::future::ready(())).await;
}

async fn nodes(signals: &Touched<String>, store: &Store<Node>, context: &Arc<Context>, ended: &CancellationToken) {
    const KIND: &str = "Node";
    let queue = touched(signals, ended, |name: String| ObjectRef::<Node>::new(&name));
    let one = move |object: Arc<Node>, context: Arc<Context>| {
        Box::pin(async move {
            let pass = context.metrics.begin(KIND, &context.clock);
            let span = tracing::info_span!("reconcile", node = object.name_any());
            let done = accelerator_node::reconcile(&object, &context).instrument(span).await;
            pass.finish(done.is_ok());
            let done = done?;
            context.succeeded(KIND, &object.name_any());
            Ok::<_, accelerator_node::NodeError>(done)
        })
    };
    let policy = move |object: Arc<Node>, error: &accelerator_node::NodeError, context: Arc<Context>| {
        context.failed(KIND, object.name_any(), error.category(), error)
    };
    let passes = applier(one, policy, Arc::clone(context), store.clone(), Box::pin(queue), settings());
    passes.for_each(|_| std::future::ready(())).await;
}

fn settings() -> controller::Config {
    controller::Config::default().concurrency(CONCURRENCY).debounce(GATHER)
}

/// The time of day, for people and objects to read.
pub(crate) fn timestamp(clock: &Clock) -> Timestamp {
    let seconds = i64::try_from(clock.unix_ms() / 1000).unwrap_or(i64::MAX);
    // Whole seconds, as objects hold them: a finer one would differ from what is read back.
    Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH)
}
