//! The door for whoever has a prompt: service `Serve`. Turns messages into requests and events into messages; decides
//! nothing. Prompts are never logged. Without certificates, only peers on loopback are accepted.

use std::{
    io,
    pin::Pin,
    sync::{Arc, OnceLock},
    time::Duration,
};

use berth_proto::v1::{
    self, DescribeRequest, DescribeResponse, GenerateEvent, GenerateRequest, generate_event, generate_request,
    serve_server::{Serve, ServeServer},
};
use futures::{Stream, StreamExt, future, stream};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, transport::Server};

use crate::{
    engine::{Engine, Event, Finished, Reason, Request as Wanted},
    experts::Experts,
    num::i64_of,
    served,
};

/// The service.
#[derive(Clone, Debug)]
pub(crate) struct Door {
    pub(crate) engine: Engine,
    pub(crate) experts: Experts,
    /// `<namespace>/<name>`.
    pub(crate) placement: String,
    /// Set once the checkpoint has been read through.
    pub(crate) digest: Arc<OnceLock<String>>,
}

impl Door {
    /// Serves until `stop`, then until the last stream has ended.
    ///
    /// # Errors
    /// When the listener breaks.
    pub(crate) async fn serve(
        self,
        listener: TcpListener,
        stop: CancellationToken,
    ) -> Result<(), tonic::transport::Error> {
        let peers = TcpListenerStream::new(listener).filter(|peer| future::ready(welcome(peer)));
        Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(10)))
            .add_service(ServeServer::new(self))
            .serve_with_incoming_shutdown(peers, stop.cancelled_owned())
            .await
    }
}

/// Whether a connection may speak plaintext. Errors pass: the server knows what to do with them.
fn welcome(peer: &io::Result<TcpStream>) -> bool {
    let Ok(stream) = peer else { return true };
    let local = stream.peer_addr().is_ok_and(|peer| peer.ip().is_loopback());
    if !local {
        tracing::warn!("refused a peer that is not on loopback: plaintext is accepted from nowhere else");
    }
    local
}

type Events = Pin<Box<dyn Stream<Item = Result<GenerateEvent, Status>> + Send>>;

#[tonic::async_trait]
impl Serve for Door {
    type GenerateStream = Events;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Events>, Status> {
        let GenerateRequest { request_id, prompt, max_tokens, deadline_ms, ignore_eos } = request.into_inner();
        let prompt_ids = match prompt {
            Some(generate_request::Prompt::Ids(ids)) => Ok(ids.ids),
            Some(generate_request::Prompt::Text(text)) => self.engine.model().encode(&text),
            None => return Err(Status::invalid_argument("field prompt is missing: send text or ids")),
        };
        let prompt_ids = match prompt_ids {
            Ok(ids) => ids,
            Err(problem) => {
                let finished = Finished { error: problem.to_string(), ..Finished::default() };
                let only = to_wire(Event::Finished(finished)).map(Ok);
                return Ok(Response::new(stream::iter(only).boxed()));
            }
        };
        let deadline = (deadline_ms > 0).then(|| Duration::from_millis(deadline_ms.into()));
        tracing::debug!(request = %request_id.chars().take(64).collect::<String>(), tokens = prompt_ids.len(), "request");
        let events = self.engine.generate(Wanted { prompt_ids, max_tokens, ignore_eos, trace: false, deadline });
        // Dropping the stream drops the receiver, which cancels the request.
        let events = ReceiverStream::new(events).filter_map(|event| future::ready(to_wire(event).map(Ok)));
        Ok(Response::new(events.boxed()))
    }

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let (engine, experts) = (self.engine.stats(), self.experts.stats());
        Ok(Response::new(DescribeResponse {
            placement: self.placement.clone(),
            revision: experts.in_use.current.0,
            epoch: experts.epoch,
            weights_digest: self.digest.get().cloned().unwrap_or_default(),
            calls: experts.counts.calls,
            refused: experts.counts.refused,
            retried: experts.counts.retried,
            sequences: engine.sequences,
            gone: experts.gone.iter().map(ToString::to_string).collect(),
            slow: experts.slow.iter().map(ToString::to_string).collect(),
            revision_since_unix_ms: i64_of(experts.revision_since_unix_ms),
            rerouted_unix_ms: i64_of(experts.rerouted_unix_ms),
            devices: served::to_wire(self.experts.served()),
        }))
    }
}

/// An event as it travels; traces do not.
fn to_wire(event: Event) -> Option<GenerateEvent> {
    let event = match event {
        Event::Prompt { ids } => generate_event::Event::Prompt(v1::PromptRead { ids }),
        Event::Token { id, text, revision } => {
            generate_event::Event::Token(v1::Token { id, text, revision: revision.0 })
        }
        Event::Trace(_) => return None,
        Event::Finished(Finished { reason, error, counts, seconds }) => {
            let reason = match reason {
                Reason::Length => v1::FinishReason::Length,
                Reason::Stop => v1::FinishReason::Stop,
                Reason::Error => v1::FinishReason::Error,
                Reason::Cancelled => v1::FinishReason::Cancelled,
            };
            generate_event::Event::Finished(v1::Finished {
                reason: reason.into(),
                error,
                calls: counts.calls,
                refused: counts.refused,
                retried: counts.retried,
                seconds,
            })
        }
    };
    Some(GenerateEvent { event: Some(event) })
}
