//! The stream to one worker: requests out, answers back by call id. Connects when first used and again, with growing
//! pauses, after it broke. Plaintext goes to loopback only.
//!
//! A call ends when its answer comes or the stream breaks; how long to wait is the caller's business. Dropping a call
//! forgets it: a late answer is thrown away.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use berth_proto::{MESSAGE_LIMIT, v1, v1::expert_client::ExpertClient};
use berth_runtime::Clock;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Endpoint;

/// Calls that wait for the stream; more wait for a place.
const QUEUE: usize = 64;
/// Pause after the first break; doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How soon a silent peer is noticed.
const PROBE: Duration = Duration::from_secs(2);
/// Flow control window of a stream: several chunks of activations.
const WINDOW: u32 = 16 << 20;

/// Why the stream cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Broken(pub(crate) String);

/// The stream to one worker.
#[derive(Debug)]
pub(crate) struct Link {
    endpoint: String,
    connect: Duration,
    clock: Clock,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    session: Option<Session>,
    /// Breaks without a good answer between them.
    breaks: u32,
    /// No new session before this.
    until: Duration,
    reason: String,
}

#[derive(Clone, Debug)]
struct Session {
    requests: mpsc::Sender<v1::ForwardRequest>,
    waiting: Waiting,
}

/// Calls without an answer; `None` once the stream is over.
type Waiting = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<v1::ForwardResponse>>>>>;

impl Link {
    pub(crate) fn new(endpoint: &str, connect: Duration, clock: Clock) -> Self {
        Self { endpoint: endpoint.to_owned(), connect, clock, state: Arc::default() }
    }

    /// Whether a call may be tried now.
    pub(crate) fn usable(&self) -> bool {
        let state = lock(&self.state);
        state.session.is_some() || self.clock.now() >= state.until
    }

    /// Sends a call and awaits its answer. Must run within a tokio runtime.
    ///
    /// # Errors
    /// When the stream cannot be had or breaks first.
    pub(crate) async fn call(&self, request: v1::ForwardRequest) -> Result<v1::ForwardResponse, Broken> {
        let session = self.session()?;
        let id = request.call_id;
        let (answer, answered) = oneshot::channel();
        match lock(&session.waiting).as_mut() {
            Some(waiting) => drop(waiting.insert(id, answer)),
            None => return Err(self.broken()),
        }
        let _forget = Forget { waiting: &session.waiting, id };
        if session.requests.send(request).await.is_err() {
            return Err(self.broken());
        }
        answered.await.map_err(|_| self.broken())
    }

    fn broken(&self) -> Broken {
        Broken(lock(&self.state).reason.clone())
    }

    /// The running session, or a new one if the pause is over.
    fn session(&self) -> Result<Session, Broken> {
        let mut state = lock(&self.state);
        if let Some(session) = &state.session {
            return Ok(session.clone());
        }
        if self.clock.now() < state.until {
            return Err(Broken(state.reason.clone()));
        }
        let (requests, outgoing) = mpsc::channel(QUEUE);
        let waiting: Waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        let session = Session { requests, waiting: Arc::clone(&waiting) };
        state.session = Some(session.clone());
        let (state, clock) = (Arc::clone(&self.state), self.clock.clone());
        let (endpoint, connect) = (self.endpoint.clone(), self.connect);
        tokio::spawn(async move {
            let reason = converse(&endpoint, connect, outgoing, &waiting, &state).await;
            let mut state = lock(&state);
            let pause = FIRST_PAUSE.saturating_mul(1 << state.breaks.min(6)).min(LONGEST_PAUSE);
            state.breaks = state.breaks.saturating_add(1);
            // Clients of one failed worker come back at different times.
            state.until = clock.now() + pause.mul_f64(rand::random_range(0.5..1.0));
            if state.reason != reason {
                // A worker that stays away is said once.
                tracing::info!(endpoint = %endpoint, reason = %reason, "no stream to a worker");
                state.reason = reason;
            }
            state.session = None;
            drop(state);
            // Only now: whoever learns that its call broke must find the reason and the pause.
            lock(&waiting).take();
        });
        Ok(session)
    }
}

/// Runs one stream to its end; gives the reason.
async fn converse(
    endpoint: &str,
    connect: Duration,
    outgoing: mpsc::Receiver<v1::ForwardRequest>,
    waiting: &Waiting,
    state: &Mutex<State>,
) -> String {
    let channel = match address(endpoint, connect) {
        Ok(address) => address.connect().await.map_err(|error| describe(&error)),
        Err(problem) => Err(problem),
    };
    let channel = match channel {
        Ok(channel) => channel,
        Err(problem) => return problem,
    };
    let mut client =
        ExpertClient::new(channel).max_decoding_message_size(MESSAGE_LIMIT).max_encoding_message_size(MESSAGE_LIMIT);
    let mut answers = match client.forward(ReceiverStream::new(outgoing)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return status.message().to_owned(),
    };
    loop {
        match answers.message().await {
            Ok(Some(answer)) => {
                lock(state).breaks = 0;
                let place = lock(waiting).as_mut().and_then(|waiting| waiting.remove(&answer.call_id));
                if let Some(place) = place {
                    // A call that was given up has no receiver.
                    let _ = place.send(answer);
                }
            }
            Ok(None) => return "the worker ended the stream".to_owned(),
            Err(status) => return status.message().to_owned(),
        }
    }
}

fn address(endpoint: &str, connect: Duration) -> Result<Endpoint, String> {
    let address: SocketAddr = endpoint.parse().map_err(|_| format!("{endpoint:?} is not ip:port"))?;
    if !address.ip().is_loopback() {
        return Err(format!("{endpoint} is not on loopback: plaintext goes nowhere else, set up certificates"));
    }
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| describe(&error))?;
    Ok(endpoint
        .connect_timeout(connect)
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .http2_keep_alive_interval(PROBE)
        .keep_alive_timeout(PROBE))
}

fn describe(error: &tonic::transport::Error) -> String {
    let source = std::error::Error::source(error).map_or_else(String::new, |source| format!(": {source}"));
    format!("{error}{source}")
}

/// Takes a call out of the waiting ones when it is over or given up.
struct Forget<'a> {
    waiting: &'a Waiting,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        if let Some(waiting) = lock(self.waiting).as_mut() {
            waiting.remove(&self.id);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values, whole between statements: a panic elsewhere cannot tear them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
