//! Generates: several sequences at once, one step after another, on one thread of its own.
//!
//! Continuous batching: each step takes one token of every sequence that is decoding and fills what is left of the
//! step with chunks of prompts, oldest first. A sequence is admitted when the cache has room for its prompt and all
//! that it may generate, so no sequence is ever pushed out by another. Greedy: the largest logit, ties to the lowest id.
//! A request whose receiver is dropped is forgotten, and its cache freed, before the next step.

mod desk;
mod profile;
mod sequence;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
    time::Duration,
};

use berth_runtime::Clock;
use berth_types::Revision;
use tokio::sync::mpsc;

pub use self::profile::PhaseTimes;
use self::{desk::Desk, sequence::Sequence};
pub use crate::model::Phase;
use crate::{
    experts::{CallCounts, ExpertCalls},
    load::LoadCounter,
    model::Model,
    num::usize_of,
    step,
};

/// What to generate.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// Tokens of the prompt, the model's first token included; at least one.
    pub prompt_ids: Vec<u32>,
    /// Tokens to generate at most; at least one. Prompt and these together fit the model's context.
    pub max_tokens: u32,
    /// Go on past a token that ends the sequence.
    pub ignore_eos: bool,
    /// Give every position's logits and chosen experts.
    pub trace: bool,
    /// How long it may take, waiting included; `None` = the engine's own limit.
    pub deadline: Option<Duration>,
}

/// What happens to a request, in this order: `Prompt`, then `Trace` and `Token`, then `Finished`, always.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The request was accepted.
    Prompt {
        /// Its tokens.
        ids: Vec<u32>,
    },
    /// A position was computed; only if the request asked for it.
    Trace(Trace),
    /// A token was generated.
    Token {
        /// Its id.
        id: u32,
        /// Text that became certain with it; may be empty. The last token brings what was held back.
        text: String,
        /// Placement revision of the step that made it.
        revision: Revision,
    },
    /// It is over.
    Finished(Finished),
}

/// One position, as computed.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// Position in the sequence, from 0.
    pub position: usize,
    /// [vocab].
    pub logits: Vec<f32>,
    /// By expert layer: the chosen experts, [top_k].
    pub experts: Vec<Vec<u32>>,
}

/// How a request ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Finished {
    /// Why.
    pub reason: Reason,
    /// For `Error`: what happened and what to do; else empty.
    pub error: String,
    /// Expert calls of the steps that the request took part in.
    pub counts: CallCounts,
    /// From acceptance to the end.
    pub seconds: f64,
}

/// Why a request ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reason {
    /// As many tokens as wanted.
    Length,
    /// A token that ends the sequence.
    Stop,
    /// Something failed.
    #[default]
    Error,
    /// Nobody waits for it any more.
    Cancelled,
}

/// Bounds of an engine.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Time.
    pub clock: Clock,
    /// Bytes of cache that all sequences together may reserve.
    pub cache_bytes: u64,
    /// Tokens of one step.
    pub step_tokens: usize,
    /// Tokens of one sequence's prompt in one step.
    pub prefill_tokens: usize,
    /// Sequences generated at once.
    pub sequences: usize,
    /// Requests that wait for room; more are refused.
    pub queue: usize,
    /// Time limit of requests that have none of their own.
    pub deadline: Duration,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            clock: Clock::real(),
            cache_bytes: 1 << 30,
            step_tokens: 256,
            prefill_tokens: 128,
            sequences: 64,
            queue: 1024,
            deadline: Duration::from_secs(600),
        }
    }
}

/// What an engine has done and is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Requests accepted.
    pub accepted: u64,
    /// Requests that were accepted and are over.
    pub ended: u64,
    /// Requests refused at the door.
    pub refused: u64,
    /// Requests that ended with an error after they were accepted.
    pub failed: u64,
    /// Requests that needed at least one retried expert call.
    pub retried: u64,
    /// Steps finished.
    pub steps: u64,
    /// Tokens generated.
    pub tokens: u64,
    /// Sequences being generated now.
    pub sequences: u64,
    /// Requests waiting now.
    pub waiting: u64,
    /// Bytes of cache reserved now.
    pub cache_bytes: u64,
    /// Where the time of all steps went.
    pub times: PhaseTimes,
}

/// A running engine; clones share it. It stops when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct Engine {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    model: Arc<Model>,
    load: Arc<LoadCounter>,
    config: EngineConfig,
    stats: Arc<Mutex<EngineStats>>,
    closed: AtomicBool,
    stop: Arc<AtomicBool>,
    door: SyncSender<Sequence>,
}

impl Shared {
    fn count(&self, change: impl FnOnce(&mut EngineStats)) {
        change(&mut self.stats.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

/// An engine that could not be started.
#[derive(Debug, thiserror::Error)]
#[error("starting the engine's thread: {0}: raise the process limit")]
pub struct EngineError(#[from] std::io::Error);

impl Engine {
    /// Starts an engine.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(model: Arc<Model>, experts: Arc<dyn ExpertCalls>, config: EngineConfig) -> Result<Self, EngineError> {
        let (door, arrivals) = sync_channel(config.queue.max(1));
        let load = Arc::new(LoadCounter::new(model.experts()));
        let stats = Arc::new(Mutex::new(EngineStats::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let desk = Desk::new(
            Arc::clone(&model),
            experts,
            Arc::clone(&load),
            config.clone(),
            Arc::clone(&stats),
            Arc::clone(&stop),
        );
        std::thread::Builder::new().name("berth-engine".to_owned()).spawn(move || desk.run(&arrivals))?;
        let closed = AtomicBool::new(false);
        Ok(Self { shared: Arc::new(Shared { model, load, config, stats, closed, stop, door }) })
    }

    /// Begins a request. Events are never waited for: the channel has room for all of them. Dropping the receiver
    /// cancels the request. A request that cannot be served gets one `Finished` event with the reason.
    #[must_use]
    pub fn generate(&self, request: Request) -> mpsc::Receiver<Event> {
        let prompt = request.prompt_ids.len();
        let room = prompt.saturating_add(usize_of(request.max_tokens)).min(self.shared.model.context());
        let (events, receiver) = mpsc::channel(if request.trace { 2 * room + 4 } else { room + 4 });
        if let Err(problem) = self.admit(request, events.clone()) {
            self.shared.count(|stats| stats.refused += 1);
            let finished = Finished { error: problem, ..Finished::default() };
            // The channel is new and has room.
            let _ = events.try_send(Event::Finished(finished));
        }
        receiver
    }

    fn admit(&self, request: Request, events: mpsc::Sender<Event>) -> Result<(), String> {
        let model = &self.shared.model;
        let wanted = request.prompt_ids.len().saturating_add(usize_of(request.max_tokens));
        if request.prompt_ids.is_empty() || request.max_tokens == 0 {
            return Err("the request is empty: give at least one prompt token and max_tokens of at least 1".to_owned());
        }
        if wanted > model.context() {
            return Err(format!(
                "prompt and max_tokens are {wanted} tokens, the model's context is {}",
                model.context()
            ));
        }
        if !step::known(model, &request.prompt_ids) {
            return Err(format!("the prompt has a token id outside the model's {}", model.vocab()));
        }
        let bytes = model.cache_bytes(wanted);
        if bytes > self.shared.config.cache_bytes {
            let limit = self.shared.config.cache_bytes;
            return Err(format!("{wanted} tokens need {bytes} bytes of cache, the runner has {limit}: ask for fewer"));
        }
        if self.shared.closed.load(Ordering::Acquire) {
            return Err("the runner is stopping: send the request to another instance".to_owned());
        }
        let now = self.shared.config.clock.now();
        let deadline = now.saturating_add(request.deadline.unwrap_or(self.shared.config.deadline));
        let sequence = Sequence::new(request, events, model, bytes, (now, deadline));
        // Counted before it can be seen, so that `idle` never overlooks it.
        self.shared.count(|stats| stats.accepted += 1);
        let refused = match self.shared.door.try_send(sequence) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Full(_)) => "too many requests are waiting: try again later",
            Err(TrySendError::Disconnected(_)) => "the engine has stopped: send the request to another instance",
        };
        self.shared.count(|stats| stats.accepted -= 1);
        Err(refused.to_owned())
    }

    /// What it has done and is doing.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        let mut stats = *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats.waiting = stats.accepted.saturating_sub(stats.ended).saturating_sub(stats.sequences);
        stats
    }

    /// Tokens by expert.
    #[must_use]
    pub fn load(&self) -> Arc<LoadCounter> {
        Arc::clone(&self.shared.load)
    }

    /// The model it runs.
    #[must_use]
    pub fn model(&self) -> &Arc<Model> {
        &self.shared.model
    }

    /// Refuses new requests from now on; those that were accepted go on.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
    }

    /// Ends what is running with an error, after the step that is being computed.
    pub fn stop(&self) {
        self.close();
        self.shared.stop.store(true, Ordering::Release);
    }

    /// Whether nothing is being generated or waiting.
    #[must_use]
    pub fn idle(&self) -> bool {
        let stats = self.stats();
        stats.accepted == stats.ended
    }
}
