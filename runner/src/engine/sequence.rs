//! One request on its way: its tokens, its cache and who hears about it.

use std::time::Duration;

use berth_types::Revision;
use tokio::sync::mpsc;

use super::{Event, Finished, Reason, Request, Trace};
use crate::{
    experts::CallCounts,
    model::{Cache, Model, maths::argmax, tokenizer::Pieces},
    num::usize_of,
    step::{PartOutput, Wanted},
};

/// A request that was accepted.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// Prompt, then what was generated.
    pub(crate) ids: Vec<u32>,
    /// Positions that are in the cache.
    pub(crate) done: usize,
    pub(crate) cache: Cache,
    /// From the prompt alone, so that a batch changes nothing.
    pub(crate) salt: u64,
    /// Cache bytes reserved for the whole sequence.
    pub(crate) bytes: u64,
    pub(crate) counts: CallCounts,
    /// On the engine's clock.
    pub(crate) deadline: Duration,
    prompt: usize,
    max_tokens: usize,
    ignore_eos: bool,
    trace: bool,
    started: Duration,
    pieces: Pieces,
    events: mpsc::Sender<Event>,
}

impl Sequence {
    /// Takes a request that was checked.
    pub(crate) fn new(
        request: Request,
        events: mpsc::Sender<Event>,
        model: &Model,
        bytes: u64,
        (started, deadline): (Duration, Duration),
    ) -> Self {
        let Request { prompt_ids, max_tokens, ignore_eos, trace, deadline: _ } = request;
        let sequence = Self {
            done: 0,
            cache: model.new_cache(prompt_ids.len().saturating_add(usize_of(max_tokens))),
            salt: salt(&prompt_ids),
            bytes,
            counts: CallCounts::default(),
            deadline,
            prompt: prompt_ids.len(),
            max_tokens: usize_of(max_tokens),
            ignore_eos,
            trace,
            started,
            pieces: Pieces::default(),
            events,
            ids: prompt_ids,
        };
        sequence.say(Event::Prompt { ids: sequence.ids.clone() });
        sequence
    }

    /// Tokens that are not in the cache yet; at least one while it runs.
    pub(crate) fn remaining(&self) -> usize {
        self.ids.len() - self.done
    }

    /// Which logits are wanted of a part of `tokens` tokens.
    pub(crate) fn wanted(&self, tokens: usize) -> Wanted {
        match (self.trace, tokens == self.remaining()) {
            (true, _) => Wanted::Every,
            (false, true) => Wanted::Last,
            (false, false) => Wanted::Nothing,
        }
    }

    /// Whether nobody hears about it any more.
    pub(crate) fn cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Who hears about it.
    pub(crate) fn listener(&self) -> mpsc::Sender<Event> {
        self.events.clone()
    }

    /// Takes the output for the next `tokens` tokens. Gives how the request ended, if it did.
    pub(crate) fn advance(
        &mut self,
        model: &Model,
        tokens: usize,
        output: PartOutput,
        revision: Revision,
    ) -> Option<(Reason, String)> {
        self.tell_trace(model, tokens, &output);
        self.done += tokens;
        if self.remaining() > 0 {
            return None;
        }
        let last = output.logits.chunks_exact(model.vocab()).last().unwrap_or_default();
        let best = argmax(last);
        if !last.get(best).is_some_and(|logit| logit.is_finite()) {
            let problem = "the model's logits are not finite: check the weights against their digest".to_owned();
            return Some((Reason::Error, problem));
        }
        let id = crate::num::u32_of(best);
        self.ids.push(id);
        let ended = if model.ends(id) && !self.ignore_eos {
            Some((Reason::Stop, String::new()))
        } else {
            (self.ids.len() - self.prompt >= self.max_tokens).then(|| (Reason::Length, String::new()))
        };
        let mut text = self.pieces.push(&model.text, id);
        if ended.is_some() {
            text += &self.pieces.finish(&model.text);
        }
        self.say(Event::Token { id, text, revision });
        ended
    }

    fn tell_trace(&self, model: &Model, tokens: usize, output: &PartOutput) {
        if !self.trace {
            return;
        }
        for (row, logits) in output.logits.chunks_exact(model.vocab()).enumerate() {
            let of_row = |layer: &Vec<u32>| {
                let top_k = layer.len() / tokens.max(1);
                layer[row * top_k..(row + 1) * top_k].to_vec()
            };
            let experts = output.experts.iter().map(of_row).collect();
            self.say(Event::Trace(Trace { position: self.done + row, logits: logits.to_vec(), experts }));
        }
    }

    /// Says how it ended.
    pub(crate) fn finish(self, now: Duration, reason: Reason, error: String) {
        let finished =
            Finished { reason, error, counts: self.counts, seconds: now.saturating_sub(self.started).as_secs_f64() };
        self.say(Event::Finished(finished));
    }

    fn say(&self, event: Event) {
        // The channel has room for every event of a request; what fails is a receiver that left.
        let _ = self.events.try_send(event);
    }
}

/// FNV-1a of the tokens.
fn salt(ids: &[u32]) -> u64 {
    let bytes = ids.iter().flat_map(|id| id.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
