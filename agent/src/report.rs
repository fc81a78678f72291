//! The stream to the scheduler's leader: what is so goes up at once, orders come down.
//!
//! It opens with Hello and the whole of what is so; whatever changes is sent whole again. The stream's
//! end is no loss of anything: the next one begins in the same way. It decides nothing.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use berth_proto::{
    MESSAGE_LIMIT, PROTO,
    v1::{self, agent_message::Message, agent_order::Order, control_client::ControlClient},
};
use berth_runtime::{
    Clock,
    discovery::{DiscoverError, discover},
};
use berth_types::{Epoch, Health, NodeName};
use kube::Client;
use rand::Rng as _;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use crate::{
    metrics::Metrics,
    orders::{Desired, Gate},
    published::{Device, Published},
    workers::View,
};

/// Sent when nothing else was: a stream that is silent for 3 s counts as lost.
const BEAT: Duration = Duration::from_secs(1);
/// Connecting has so long.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// Pause before the leader is looked for again, and spread of the clients of a failed one.
const JITTER: Duration = Duration::from_millis(500);
/// The pause doubles up to this while nobody leads: every agent of the cluster asks the API server.
const PAUSE_MOST: Duration = Duration::from_secs(2);
/// A leader that says nothing to a new stream for so long is not one.
const HELLO_LIMIT: Duration = Duration::from_secs(5);

/// Where the leader is.
#[derive(Clone)]
pub enum Leader {
    /// Whoever holds this Lease.
    Lease {
        /// For reading it.
        client: Client,
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// Always here.
    Fixed(SocketAddr),
}

impl std::fmt::Debug for Leader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lease { namespace, name, .. } => write!(f, "lease {namespace}/{name}"),
            Self::Fixed(address) => write!(f, "{address}"),
        }
    }
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error(transparent)]
    Discover(#[from] DiscoverError),
    #[error("connecting to {endpoint}: {source}")]
    Connect { endpoint: SocketAddr, source: tonic::transport::Error },
    #[error("{0}")]
    Elapsed(#[from] berth_runtime::clock::Elapsed),
    #[error("the scheduler ended the stream: {0}")]
    Status(#[from] tonic::Status),
    #[error("the scheduler ended the stream")]
    Ended,
}

/// Reports and takes orders.
#[derive(Debug)]
pub struct Reporter {
    /// Time.
    pub clock: Clock,
    /// This node.
    pub node: NodeName,
    /// Where the leader is.
    pub leader: Leader,
    /// What is said of health.
    pub published: watch::Receiver<Option<Arc<Published>>>,
    /// What the workers do.
    pub workers: watch::Receiver<View>,
    /// Where orders go.
    pub desired: watch::Sender<Arc<Desired>>,
    /// Counts.
    pub metrics: Metrics,
    /// When health was last told on a stream; what is older was told then.
    pub told: Duration,
}

impl Reporter {
    /// Keeps a stream open until `stop` is cancelled.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut gate = Gate::default();
        let mut last = String::new();
        let mut pause = JITTER;
        loop {
            // Cancel-safe: a stream that is dropped begins anew, whole.
            let ended = tokio::select! {
                () = stop.cancelled() => return,
                ended = self.stream(&mut gate) => ended,
            };
            let connected = self.metrics.connected.set(0) == 1;
            pause = if connected { JITTER } else { pause.saturating_mul(2).min(PAUSE_MOST) };
            if let Err(error) = ended {
                let text = error.to_string();
                // The same trouble is told once.
                if text != last {
                    tracing::warn!(error = %text, leader = ?self.leader, "no stream to the scheduler");
                    last = text;
                }
            } else {
                last.clear();
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.clock.sleep(pause.mul_f64(rand::rng().random_range(0.5..1.0))) => {}
            }
        }
    }

    async fn stream(&mut self, gate: &mut Gate) -> Result<(), StreamError> {
        // Nothing is said before the devices are known.
        if self.published.wait_for(Option::is_some).await.is_err() {
            return Ok(());
        }
        let endpoint = match &self.leader {
            Leader::Fixed(address) => *address,
            Leader::Lease { client, namespace, name } => {
                discover(client.clone(), &self.clock, namespace, name, JITTER).await?.endpoint
            }
        };
        let connect = |source| StreamError::Connect { endpoint, source };
        let channel = Endpoint::from_shared(format!("http://{endpoint}"))
            .map_err(connect)?
            .connect_timeout(CONNECT_LIMIT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(1))
            .keep_alive_timeout(Duration::from_secs(2))
            .keep_alive_while_idle(true)
            .connect()
            .await
            .map_err(connect)?;
        let mut client = ControlClient::new(channel)
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT);
        let (up, outgoing) = mpsc::channel(16);
        for message in self.opening() {
            let _ = up.try_send(message);
        }
        let answered = self.clock.timeout(HELLO_LIMIT, client.agent(ReceiverStream::new(outgoing))).await??;
        gate.connected();
        self.metrics.connected.set(1);
        tracing::info!(%endpoint, "connected to the scheduler");
        self.converse(gate, up, answered.into_inner()).await
    }

    /// Hello, then the whole of what is so.
    fn opening(&mut self) -> Vec<v1::AgentMessage> {
        let published = self.published.borrow_and_update().clone();
        let workers = self.workers.borrow_and_update().to_wire();
        // What is told now was not a fact a moment ago.
        self.told = self.clock.now();
        let hello = published.as_ref().map(|published| Message::Hello(self.hello(published)));
        let health = published.map(|published| Message::Health(published.to_wire()));
        let messages = hello.into_iter().chain(health).chain([Message::Workers(workers)]);
        messages.map(|message| v1::AgentMessage { message: Some(message) }).collect()
    }

    fn hello(&self, published: &Published) -> v1::AgentHello {
        v1::AgentHello {
            hello: Some(v1::Hello { build: env!("CARGO_PKG_VERSION").to_owned(), proto: PROTO, features: Vec::new() }),
            node: self.node.to_string(),
            boot_id: published.boot_id.clone(),
            hosting: published.wanted.native,
        }
    }

    async fn converse(
        &mut self,
        gate: &mut Gate,
        up: mpsc::Sender<v1::AgentMessage>,
        mut orders: tonic::Streaming<v1::AgentOrder>,
    ) -> Result<(), StreamError> {
        let mut native = self.published.borrow().as_ref().is_some_and(|published| published.wanted.native);
        loop {
            // Cancel-safe: `changed` and `sleep` only look; `message` keeps a partial one in the stream.
            let messages = tokio::select! {
                biased;
                changed = self.published.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    let published = self.published.borrow_and_update().clone();
                    let Some(published) = published else { continue };
                    let mut messages = Vec::new();
                    if published.wanted.native != native {
                        native = published.wanted.native;
                        messages.push(Message::Hello(self.hello(&published)));
                    }
                    messages.push(Message::Health(published.to_wire()));
                    self.acted(&published);
                    messages
                }
                changed = self.workers.changed() => {
                    if changed.is_err() {
                        return Ok(());
                    }
                    vec![Message::Workers(self.workers.borrow_and_update().to_wire())]
                }
                order = orders.message() => {
                    let order = order?.ok_or(StreamError::Ended)?;
                    self.obey(gate, order);
                    continue;
                }
                () = self.clock.sleep(BEAT) => vec![Message::Beat(v1::Beat {})],
            };
            for message in messages {
                // A scheduler that takes nothing for so long is not there.
                let message = v1::AgentMessage { message: Some(message) };
                let sent = self.clock.timeout(CONNECT_LIMIT, up.send(message)).await?;
                sent.map_err(|_| StreamError::Ended)?;
            }
        }
    }

    /// Counts how long what became worse took from its fact to this stream; once for each.
    fn acted(&mut self, published: &Published) {
        let now = self.clock.now();
        let worse =
            |device: &&Device| device.standing.state.health != Health::Healthy && device.standing.since > self.told;
        for device in published.devices.iter().filter(worse) {
            self.metrics.acted(device.info.vendor, now.saturating_sub(device.standing.since));
        }
        self.told = now;
    }

    fn obey(&self, gate: &mut Gate, order: v1::AgentOrder) {
        let refused = match order.order {
            Some(Order::Hello(hello)) => gate.admit(Epoch(hello.epoch)).err(),
            Some(Order::Desired(desired)) => {
                let held = self.workers.borrow().held();
                match gate.accept(self.node.as_str(), &desired, &held) {
                    Ok(desired) => {
                        self.desired.send_if_modified(|current| {
                            let changed = **current != desired;
                            if changed {
                                *current = Arc::new(desired);
                            }
                            changed
                        });
                        None
                    }
                    Err(refused) => Some(refused),
                }
            }
            // A newer scheduler may say what this build does not know.
            None => None,
        };
        if let Some(refused) = refused {
            self.metrics.refused_orders.get_or_create(&vec![("why", refused.label().to_owned())]).inc();
            tracing::warn!(%refused, "order refused");
        }
    }
}
