//! The engine's thread: who comes in, who is computed next, who leaves. Owns every sequence; nobody else touches them.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::Duration,
};

use super::{EngineConfig, EngineStats, Reason, profile::Stopwatch, sequence::Sequence};
use crate::{
    error::StepError,
    experts::{CallCounts, ExpertCalls},
    load::LoadCounter,
    model::Model,
    num::u64_of,
    step::{self, Part, StepOutput},
};

/// How often an idle engine looks whether it should end.
const LOOK: Duration = Duration::from_millis(50);

/// State of the engine's thread.
pub(crate) struct Desk {
    model: Arc<Model>,
    experts: Arc<dyn ExpertCalls>,
    load: Arc<LoadCounter>,
    config: EngineConfig,
    stats: Arc<Mutex<EngineStats>>,
    stop: Arc<AtomicBool>,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
}

impl Desk {
    pub(crate) fn new(
        model: Arc<Model>,
        experts: Arc<dyn ExpertCalls>,
        load: Arc<LoadCounter>,
        mut config: EngineConfig,
        stats: Arc<Mutex<EngineStats>>,
        stop: Arc<AtomicBool>,
    ) -> Self {
        config.sequences = config.sequences.max(1);
        config.prefill_tokens = config.prefill_tokens.max(1);
        // Every running sequence gets its token in every step, and a prompt at least one.
        config.step_tokens = config.step_tokens.max(config.sequences + 1);
        Self { model, experts, load, config, stats, stop, waiting: VecDeque::new(), running: Vec::new() }
    }

    /// Serves until told to stop, or until nobody can send requests any more and all are served.
    pub(crate) fn run(mut self, arrivals: &Receiver<Sequence>) {
        while self.arrive(arrivals) && !self.stop.load(Ordering::Acquire) {
            self.sweep();
            self.admit();
            if self.running.is_empty() {
                continue;
            }
            if self.experts.ready() {
                self.step();
            } else {
                // Requests wait for the first routes as for everything else: until their deadline.
                std::thread::sleep(LOOK);
            }
        }
        let stopping = "the runner is stopping: send the request to another instance";
        let rest: Vec<Sequence> =
            self.running.drain(..).chain(self.waiting.drain(..)).chain(arrivals.try_iter()).collect();
        for sequence in rest {
            self.end(sequence, Reason::Error, stopping.to_owned());
        }
        self.report();
    }

    /// Takes what has arrived; waits for it when there is nothing to do. False when all is done for good.
    fn arrive(&mut self, arrivals: &Receiver<Sequence>) -> bool {
        if self.running.is_empty() && self.waiting.is_empty() {
            self.report();
            match arrivals.recv_timeout(LOOK) {
                Ok(sequence) => self.waiting.push_back(sequence),
                Err(RecvTimeoutError::Timeout) => return true,
                Err(RecvTimeoutError::Disconnected) => return false,
            }
        }
        // What is in `waiting` is bounded like the channel: beyond that, senders are refused.
        let room = self.config.queue.max(1).saturating_sub(self.waiting.len());
        self.waiting.extend(arrivals.try_iter().take(room));
        true
    }

    /// Lets go of what nobody waits for and of what took too long.
    fn sweep(&mut self) {
        let now = self.config.clock.now();
        let over = |sequence: &Sequence| sequence.cancelled() || now >= sequence.deadline;
        let mut leaving: Vec<Sequence> = self.running.extract_if(.., |sequence| over(sequence)).collect();
        let (gone, kept) = self.waiting.drain(..).partition::<Vec<_>, _>(over);
        leaving.extend(gone);
        self.waiting.extend(kept);
        for sequence in leaving {
            self.leave(sequence);
        }
    }

    fn leave(&mut self, sequence: Sequence) {
        if sequence.cancelled() {
            self.end(sequence, Reason::Cancelled, String::new());
        } else {
            let why = if self.experts.ready() { "allow more time" } else { "no placement is routed yet" };
            self.end(sequence, Reason::Error, format!("the request's deadline has passed: {why}"));
        }
    }

    /// Moves waiting sequences in, oldest first, while there is room. One that does not fit makes the others wait.
    fn admit(&mut self) {
        let mut reserved: u64 = self.running.iter().map(|sequence| sequence.bytes).sum();
        while self.running.len() < self.config.sequences {
            let fits = |next: &Sequence| reserved.saturating_add(next.bytes) <= self.config.cache_bytes;
            let Some(next) = self.waiting.pop_front_if(|next| fits(next)) else { break };
            reserved = reserved.saturating_add(next.bytes);
            self.running.push(next);
        }
        self.report();
    }

    /// Computes one step and tells everyone in it.
    fn step(&mut self) {
        let shares = self.shares();
        let listeners: Vec<_> = self.running.iter().map(|sequence| (sequence.listener(), sequence.deadline)).collect();
        let stop = Arc::clone(&self.stop);
        let clock = self.config.clock.clone();
        let nobody_waits = move || {
            let now = clock.now();
            stop.load(Ordering::Acquire)
                || listeners.iter().all(|(events, deadline)| events.is_closed() || now >= *deadline)
        };
        let nobody_waits = Arc::new(nobody_waits);
        let parts = self
            .running
            .iter_mut()
            .zip(&shares)
            .filter(|(_, share)| **share > 0)
            .map(|(sequence, share)| Part {
                wanted: sequence.wanted(*share),
                tokens: &sequence.ids[sequence.done..sequence.done + share],
                start: sequence.done,
                cache: &mut sequence.cache,
                salt: sequence.salt,
            })
            .collect();
        let mut counts = CallCounts::default();
        let cancelled = move || nobody_waits();
        let watch = Stopwatch::new(self.config.clock.clone());
        let ended = |phase| watch.ended(phase);
        let (model, load) = (&self.model, &self.load);
        let result = step::run(model, self.experts.as_ref(), load, parts, &cancelled, &ended, &mut counts);
        self.count(|stats| stats.times.add(&watch.times()));
        for (sequence, share) in self.running.iter_mut().zip(&shares) {
            if *share > 0 {
                sequence.counts.add(counts);
            }
        }
        match result {
            Ok(output) => self.tell(&shares, output),
            Err(error) => self.fail(&shares, &error),
        }
    }

    /// Tokens of each running sequence in the next step: one for those that decode, then chunks of prompts.
    fn shares(&self) -> Vec<usize> {
        let mut room = self.config.step_tokens;
        let mut shares: Vec<usize> =
            self.running.iter().map(|sequence| usize::from(sequence.remaining() == 1)).collect();
        room = room.saturating_sub(shares.iter().sum());
        for (share, sequence) in shares.iter_mut().zip(&self.running) {
            if *share == 0 {
                *share = sequence.remaining().min(self.config.prefill_tokens).min(room);
                room -= *share;
            }
        }
        shares
    }

    /// Hands out a step's tokens. It is counted before anyone hears that it is done, so whoever does finds it counted.
    fn tell(&mut self, shares: &[usize], output: StepOutput) {
        let mut parts = output.parts.into_iter();
        let (mut kept, mut leaving, mut tokens) = (Vec::with_capacity(self.running.len()), Vec::new(), 0);
        for (mut sequence, share) in std::mem::take(&mut self.running).into_iter().zip(shares) {
            let part = if *share == 0 { None } else { parts.next() };
            let before = sequence.ids.len();
            let ended = part.and_then(|part| sequence.advance(&self.model, *share, part, output.revision));
            tokens += sequence.ids.len() - before;
            match ended {
                None => kept.push(sequence),
                Some((reason, error)) => leaving.push((sequence, reason, error)),
            }
        }
        self.running = kept;
        self.count(|stats| {
            stats.steps += 1;
            stats.tokens += u64_of(tokens);
        });
        self.report();
        for (sequence, reason, error) in leaving {
            self.end(sequence, reason, error);
        }
    }

    /// Ends the sequences of a step that failed: their caches are unfinished.
    fn fail(&mut self, shares: &[usize], error: &StepError) {
        let mut kept = Vec::new();
        for (sequence, share) in std::mem::take(&mut self.running).into_iter().zip(shares) {
            match error {
                _ if *share == 0 => kept.push(sequence),
                StepError::Cancelled if self.stop.load(Ordering::Acquire) => kept.push(sequence),
                StepError::Cancelled => self.leave(sequence),
                error => self.end(sequence, Reason::Error, error.to_string()),
            }
        }
        self.running = kept;
        self.report();
    }

    fn end(&self, sequence: Sequence, reason: Reason, error: String) {
        self.count(|stats| {
            stats.ended += 1;
            stats.failed += u64::from(reason == Reason::Error);
            stats.retried += u64::from(sequence.counts.retried > 0);
        });
        sequence.finish(self.config.clock.now(), reason, error);
    }

    fn report(&self) {
        self.count(|stats| {
            stats.cache_bytes = self.running.iter().map(|sequence| sequence.bytes).sum();
            stats.sequences = u64_of(self.running.len());
        });
    }

    fn count(&self, change: impl FnOnce(&mut EngineStats)) {
        change(&mut self.stats.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
