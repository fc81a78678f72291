//! Keeps expert placements true: hears agents and runners, plans when it must, stores what was decided and
//! tells everybody. Wiring only; the README names the files in the order in which data walks them.

pub mod balance;
pub mod commit;
pub mod cutover;
pub mod decisions;
pub mod drafting;
pub mod facts;
pub mod index;
pub mod metrics;
pub mod orders;
pub mod replan;
pub mod reports;
pub mod ring;
pub mod snapshot;
pub mod speeds;
pub mod status;
pub mod store;
pub mod term;
#[cfg(test)]
mod tests;
mod watches;
pub mod weighing;

use std::{net::SocketAddr, time::Duration};

use berth_proto::{MESSAGE_LIMIT, v1::control_server::ControlServer};
use berth_runtime::{
    Clock, Part, PartConfig, PartError, admin, discovery::Holder, election::Timing, lease::LeaseConfig,
};
use kube::Client;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::{
    metrics::SchedulerMetrics,
    reports::{Chair, Reports},
    store::{ConfigError, StoreConfig, Stores},
    term::Office,
};

/// Metadata beyond this is no report.
const SILENCE: Duration = Duration::from_secs(1);

/// What the scheduler is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Name of this pod.
    pub pod: String,
    /// Namespace of the lease.
    pub lease_namespace: String,
    /// Name of the lease.
    pub lease: String,
    /// Where Control is served; its port is told in the lease.
    pub listen: SocketAddr,
    /// Where the admin endpoints are served.
    pub admin_listen: SocketAddr,
    /// How long work in hand may take after the part was asked to stop.
    pub drain_limit: Duration,
    /// How long a revision may load before it is planned around what is late.
    pub load_limit: Duration,
    /// Where placement maps are kept.
    pub store: StoreConfig,
}

/// Why the scheduler ended otherwise than by being asked to.
#[derive(Debug, thiserror::Error)]
pub enum SchedulerError {
    /// The frame or a task failed.
    #[error(transparent)]
    Part(#[from] PartError),
    /// The store cannot be meant.
    #[error(transparent)]
    Store(#[from] ConfigError),
    /// Control could not be served.
    #[error("control endpoint: {0}")]
    Listen(#[source] std::io::Error),
    /// The API server could not be used.
    #[error("API server: {0}")]
    Api(#[from] kube::Error),
}

/// Runs the scheduler until `stop`.
///
/// # Errors
/// [`SchedulerError`] when it cannot start or a task fails.
pub async fn run(config: Config, client: Client, clock: Clock, stop: CancellationToken) -> Result<(), SchedulerError> {
    let Config { pod, lease_namespace, lease, listen, admin_listen, drain_limit, load_limit, store } = config;
    let stores = Stores::new(store, client.clone(), &clock)?;
    let part = PartConfig { name: "scheduler", admin_listen, drain_limit };
    let part = Part::start(part, clock.clone(), stop).await?;
    let metrics = SchedulerMetrics::register(&part.metrics);
    let listener = admin::bind(listen).await.map_err(SchedulerError::Listen)?;
    let endpoint = listener.local_addr().map_err(SchedulerError::Listen)?;

    let (chair, seen) = watch::channel(Chair::Elsewhere(None));
    let control = ControlServer::new(Reports::new(seen, clock.clone(), metrics.clone()))
        .max_decoding_message_size(MESSAGE_LIMIT)
        .max_encoding_message_size(MESSAGE_LIMIT);
    let stopping = part.tasks.stopping().clone();
    let serve = Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(SILENCE))
        .http2_keepalive_timeout(Some(SILENCE * 2))
        .add_service(control)
        .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopping.cancelled_owned());
    part.tasks.keep("control", serve);

    let identity = Holder { pod, endpoint }.to_string();
    let ready = part.admin.check("lease");
    let client_of_office = client.clone();
    let office = Office {
        client: client_of_office,
        stores,
        identity: identity.clone(),
        clock,
        metrics,
        chair,
        ready,
        load_limit,
    };
    let floor = office.floor(part.tasks.stopping()).await;
    let lease = LeaseConfig { namespace: lease_namespace, name: lease, identity, timing: Timing::default(), floor };
    let leadership = part.lead(client, lease);
    let heartbeat = part.admin.heartbeat("ring", Duration::from_secs(10));
    part.tasks.keep("terms", office.serve(leadership, part.tasks.stopping().clone(), heartbeat));
    Ok(part.finish().await?)
}
