//! The tasks of an agent that speak and work, joined by watch channels. Decides nothing.

use std::{collections::BTreeSet, convert::Infallible, sync::Arc, time::Duration};

use berth_runtime::{Clock, Tasks, admin::Admin};
use berth_types::NodeName;
use futures::future::BoxFuture;
use kube::Client;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    Observation,
    executor::{Executor, Told, Tools},
    health::fact::Local,
    metrics::Metrics,
    node::Snapshot,
    node_status::{NodeStatus, OrderBook},
    orders::{Desired, Wanted},
    probe::{Idle, Prober, Resets},
    published::Publisher,
    report::{Leader, Reporter},
    vendor::{Facts, grip::Grip},
    workers::{View, WorkerConfig, Workers},
};

/// A task without a turn for so long makes the process not live.
const ALIVE_WITHIN: Duration = Duration::from_secs(60);

/// The tasks of an agent, each with a sign of life, and the token of those that end last.
pub(crate) struct Organs {
    pub(crate) tasks: Tasks,
    pub(crate) admin: Admin,
    pub(crate) last: CancellationToken,
}

/// What validates, and how often it looks at idle devices.
pub(crate) struct Probing {
    pub(crate) prober: Prober,
    pub(crate) idle: Option<Duration>,
}

/// What is needed to talk to the cluster.
pub(crate) struct Speech {
    pub(crate) clock: Clock,
    pub(crate) node: NodeName,
    pub(crate) client: Client,
    pub(crate) scheduler_lease: (String, String),
    pub(crate) metrics: Metrics,
    pub(crate) means: Means,
}

/// What orders are carried out with.
pub(crate) struct Means {
    pub(crate) tools: Tools,
    pub(crate) grip: Grip,
    pub(crate) boot_id: String,
}

/// What the executor of orders sees and tells.
type Seen = (watch::Receiver<Wanted>, watch::Receiver<Option<Arc<Snapshot>>>, watch::Receiver<View>, Facts);

impl Organs {
    /// Runs `task` until the agent ends; it is not live when the task has no turn.
    pub(crate) fn keep(&self, name: &'static str, task: BoxFuture<'static, ()>) {
        let alive = self.admin.heartbeat(name, ALIVE_WITHIN);
        self.tasks.keep(name, async move {
            alive.during(task).await;
            Ok::<_, Infallible>(())
        });
    }

    /// Joins what watches, what speaks and what works by watch channels.
    pub(crate) fn join(
        &self,
        speech: Speech,
        publisher: Publisher,
        worker: WorkerConfig,
        observation: Observation,
        Probing { mut prober, idle }: Probing,
    ) {
        let Speech { clock, node, client, scheduler_lease: (namespace, name), metrics, means } = speech;
        let Observation { snapshots, facts } = observation;
        let (wanted, see_wanted) = watch::channel(Wanted::default());
        let (view, see_view) = watch::channel(View::default());
        let (desired, see_desired) = watch::channel(Arc::<Desired>::default());
        let (publish, published) = watch::channel(None);
        let last = &self.last;
        prober.idle = idle.map(|every| Idle::new(every, see_view.clone(), see_desired.clone(), see_wanted.clone()));
        let (emptied, see_emptied) = watch::channel(BTreeSet::new());
        let (probed, see_probed) = watch::channel(None);
        prober.resets = Some(Resets::new(see_emptied.clone(), probed));
        self.keep("prober", Box::pin(prober.run(last.clone())));
        let publishing = publisher.run(snapshots.clone(), see_wanted.clone(), publish, last.clone());
        self.keep("published", Box::pin(publishing));
        let told = (see_wanted.clone(), snapshots.clone(), see_view.clone(), facts.clone());
        let orders = self.carry_out(&clock, &node, means, told, (emptied, see_probed));
        let status = NodeStatus {
            clock: clock.clone(),
            client: client.clone(),
            node: node.clone(),
            published: published.clone(),
            workers: see_view.clone(),
            wanted,
            orders,
            facts: facts.clone(),
            metrics: metrics.clone(),
        };
        self.keep("node status", Box::pin(status.run(last.clone())));
        let reporter = Reporter {
            clock: clock.clone(),
            node: node.clone(),
            leader: Leader::Lease { client, namespace, name },
            published,
            workers: see_view,
            desired,
            metrics: metrics.clone(),
            told: Duration::ZERO,
        };
        self.keep("report", Box::pin(reporter.run(last.clone())));
        let workers = Workers {
            clock,
            node,
            config: worker,
            snapshots,
            wanted: see_wanted,
            desired: see_desired,
            emptied: see_emptied,
            facts,
            view,
            metrics,
        };
        let (stopping, last) = (self.tasks.stopping().clone(), last.clone());
        let working = async move {
            workers.run(stopping.child_token()).await;
            stopping.cancelled().await;
            last.cancel();
        };
        self.keep("workers", Box::pin(working));
    }

    /// Starts the executor of orders; answers the other ends of what it tells.
    fn carry_out(
        &self,
        clock: &Clock,
        node: &NodeName,
        Means { tools, grip, boot_id }: Means,
        (wanted, snapshots, workers, facts): Seen,
        (emptied, probed): (watch::Sender<BTreeSet<Local>>, watch::Receiver<Option<Local>>),
    ) -> OrderBook {
        let (remember, remembered) = watch::channel(None);
        let (tell, fates) = watch::channel(None);
        let (record, recorded) = watch::channel(Arc::default());
        let executor = Executor {
            clock: clock.clone(),
            node: node.clone(),
            boot_id,
            tools,
            wanted,
            remembered,
            snapshots,
            workers,
            grip,
            facts,
            emptied,
            probed,
            told: Told { fates: tell, recorded },
        };
        self.keep("executor", Box::pin(executor.run(self.last.clone())));
        OrderBook { fates, recorded: record, remembered: remember }
    }
}
