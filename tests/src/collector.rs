//! An OTLP collector in this process: takes what the parts export, and shows it to a test.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value::Value};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status};

use crate::{Error, Result};

/// One exported step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Who told it.
    pub service: String,
    /// What was done.
    pub name: String,
    /// Its trace, in hexadecimal digits.
    pub trace_id: String,
    /// Itself.
    pub span_id: String,
    /// The step before; empty = it began the trace.
    pub parent_id: String,
    /// Nanoseconds since 1970.
    pub began: u64,
    /// Nanoseconds since 1970.
    pub ended: u64,
    /// Its attributes that are texts.
    pub attributes: Vec<(String, String)>,
}

/// A collector; ends when dropped.
#[derive(Debug)]
pub struct Collector {
    address: SocketAddr,
    spans: Arc<Mutex<Vec<Span>>>,
    _stop: DropGuard,
}

impl Collector {
    /// Listens on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// When there is none.
    pub async fn start() -> Result<Self> {
        let wrong = |error: std::io::Error| Error::Runner { doing: "listen".into(), why: error.to_string() };
        let listener = TcpListener::bind("127.0.0.1:0").await.map_err(wrong)?;
        let address = listener.local_addr().map_err(wrong)?;
        let (spans, stop) = (Arc::<Mutex<Vec<Span>>>::default(), CancellationToken::new());
        let service = TraceServiceServer::new(Taker(Arc::clone(&spans)));
        let serve = tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.clone().cancelled_owned());
        tokio::spawn(serve);
        Ok(Self { address, spans, _stop: stop.drop_guard() })
    }

    /// As the parts are told it.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Everything that came so far, in the order of the steps' beginning.
    #[must_use]
    pub fn spans(&self) -> Vec<Span> {
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone();
        spans.sort_by_key(|span| (span.began, span.ended));
        spans
    }
}

struct Taker(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Taker {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> std::result::Result<Response<ExportTraceServiceResponse>, Status> {
        let mut taken = Vec::new();
        for resource in request.into_inner().resource_spans {
            let of = resource.resource.map(|resource| texts(&resource.attributes)).unwrap_or_default();
            let service = of.into_iter().find(|(key, _)| key == "service.name").map(|(_, name)| name);
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                taken.push(Span {
                    service: service.clone().unwrap_or_default(),
                    name: span.name,
                    trace_id: hex(&span.trace_id),
                    span_id: hex(&span.span_id),
                    parent_id: hex(&span.parent_span_id),
                    began: span.start_time_unix_nano,
                    ended: span.end_time_unix_nano,
                    attributes: texts(&span.attributes),
                });
            }
        }
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(taken);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn texts(attributes: &[KeyValue]) -> Vec<(String, String)> {
    let text = |attribute: &KeyValue| match attribute.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some((attribute.key.clone(), text.clone())),
        _ => None,
    };
    attributes.iter().filter_map(text).collect()
}
