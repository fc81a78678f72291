//! One trace per decision: a fault is seen, classified, planned for, applied, loaded and served by different parts,
//! and each adds its step to the same trace. The context travels as W3C `traceparent` text in messages that exist
//! anyway; whoever does not know it begins a trace of its own.
//!
//! Contexts are always made, so that log lines of all parts carry the same `trace_id`; steps leave the process only
//! when an OTLP endpoint was named. A step that cannot be exported is dropped: nothing waits for a trace. Names and
//! attributes are fixed words and ids of objects, never prompts or activations.

use std::{
    fmt,
    str::FromStr,
    sync::OnceLock,
    time::{Duration, UNIX_EPOCH},
};

use opentelemetry::{
    InstrumentationScope, KeyValue,
    trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState},
};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::{
    Resource,
    trace::{BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor as _},
};

use super::Process;

/// Longest time from a step to its export.
const DELAY: Duration = Duration::from_secs(1);
/// One export, and the last one at the end.
const LIMIT: Duration = Duration::from_secs(2);
/// Steps that wait for their export; more are dropped.
const ROOM: usize = 1024;

/// Where a decision's trace stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TraceContext {
    trace: u128,
    step: u64,
}

/// A text that is no trace context.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no trace context: write it as 00-<32 hexadecimal digits>-<16 hexadecimal digits>-01")]
pub struct NoContext;

impl TraceContext {
    /// A new trace.
    #[must_use]
    pub fn begin() -> Self {
        // Zero means "none" on the wire.
        Self { trace: rand::random::<u128>().max(1), step: rand::random::<u64>().max(1) }
    }

    /// A further step of the same trace.
    #[must_use]
    pub fn child(self) -> Self {
        Self { step: rand::random::<u64>().max(1), ..self }
    }

    /// The trace's id, as log lines and backends write it.
    #[must_use]
    pub fn trace_id(&self) -> String {
        format!("{:032x}", self.trace)
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-01", self.trace, self.step)
    }
}

impl FromStr for TraceContext {
    type Err = NoContext;

    fn from_str(text: &str) -> Result<Self, NoContext> {
        let mut parts = text.split('-');
        let mut hex = |digits: usize| {
            let part = parts.next().filter(|part| part.len() == digits).ok_or(NoContext)?;
            let lower = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
            if part.bytes().all(lower) { u128::from_str_radix(part, 16).map_err(|_| NoContext) } else { Err(NoContext) }
        };
        let (version, trace, step, _flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
        let step = u64::try_from(step).map_err(|_| NoContext)?;
        if version == 0xff || trace == 0 || step == 0 { Err(NoContext) } else { Ok(Self { trace, step }) }
    }
}

/// One step of a decision.
#[derive(Clone, Debug)]
pub struct Step {
    /// What was done, as `fault.classified`.
    pub name: &'static str,
    /// The step before; none = this one begins the trace.
    pub parent: Option<TraceContext>,
    /// When it began and ended, since 1970.
    pub at: (Duration, Duration),
    /// To what.
    pub attributes: Vec<(&'static str, String)>,
}

impl Step {
    /// Tells of the step, and returns where the trace then stands.
    pub fn tell(self) -> TraceContext {
        let context = self.parent.map_or_else(TraceContext::begin, TraceContext::child);
        self.tell_as(context);
        context
    }

    /// Tells of the step whose context is already known to others.
    pub fn tell_as(self, context: TraceContext) {
        if let Some(exporter) = EXPORTER.get() {
            exporter.on_end(self.span(context));
        }
    }

    fn span(self, context: TraceContext) -> SpanData {
        let Self { name, parent, at: (began, ended), attributes } = self;
        let id = |context: TraceContext| SpanId::from_bytes(context.step.to_be_bytes());
        let trace = TraceId::from_bytes(context.trace.to_be_bytes());
        SpanData {
            span_context: SpanContext::new(trace, id(context), TraceFlags::SAMPLED, false, TraceState::default()),
            parent_span_id: parent.map_or(SpanId::INVALID, id),
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: name.into(),
            start_time: UNIX_EPOCH + began,
            end_time: UNIX_EPOCH + ended.max(began),
            attributes: attributes.into_iter().map(|(key, value)| KeyValue::new(key, value)).collect(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Ok,
            instrumentation_scope: InstrumentationScope::builder("berth").build(),
        }
    }
}

static EXPORTER: OnceLock<BatchSpanProcessor> = OnceLock::new();

/// Why steps cannot be exported.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The endpoint is not one that this build speaks to.
    #[error(
        "OTLP endpoint {endpoint:?}: write it as http://<host>:<port>, where OTLP is taken over gRPC (usually 4317)"
    )]
    Endpoint {
        /// As it was given.
        endpoint: String,
    },
    /// The exporter could not be built.
    #[error("OTLP endpoint {endpoint:?}: {reason}")]
    Build {
        /// As it was given.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// Called twice.
    #[error("traces are already exported")]
    Again,
}

/// Exports steps to `endpoint` from now on; nothing if it is empty. Call it within the runtime that will carry the
/// calls. The endpoint need not be there: it is connected to when there is a step to export.
///
/// # Errors
/// [`TraceError`].
pub fn export_to(endpoint: &str, process: &Process) -> Result<(), TraceError> {
    if endpoint.is_empty() {
        return Ok(());
    }
    if !endpoint.starts_with("http://") {
        return Err(TraceError::Endpoint { endpoint: endpoint.to_owned() });
    }
    let built = SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(LIMIT).build();
    let exporter =
        built.map_err(|error| TraceError::Build { endpoint: endpoint.to_owned(), reason: error.to_string() })?;
    let config = BatchConfigBuilder::default().with_scheduled_delay(DELAY).with_max_queue_size(ROOM).build();
    let mut processor = BatchSpanProcessor::builder(exporter).with_batch_config(config).build();
    processor.set_resource(&resource(process));
    EXPORTER.set(processor).map_err(|_| TraceError::Again)?;
    tracing::info!(endpoint, "traces are exported");
    Ok(())
}

/// Who speaks, by OpenTelemetry's names.
fn resource(process: &Process) -> Resource {
    let name = |name: &str| match name {
        "pod" => "k8s.pod.name".to_owned(),
        "node" => "k8s.node.name".to_owned(),
        other => format!("berth.{other}"),
    };
    let named = process.names.iter().filter(|(_, value)| !value.is_empty());
    let named = named.map(|(key, value)| KeyValue::new(name(key), value.clone()));
    Resource::builder_empty()
        .with_service_name(format!("berth-{}", process.part))
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attributes(named)
        .build()
}

/// Exports what waits, for at most two seconds: for the end of a process.
pub(crate) async fn flush() {
    if EXPORTER.get().is_some() {
        // The call blocks; a failure is one of the endpoint, and there is nobody left to tell.
        let flushed = tokio::task::spawn_blocking(|| EXPORTER.get().map(|one| one.shutdown_with_timeout(LIMIT)));
        let _ = flushed.await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_context_survives_the_wire_and_its_children_share_its_trace() {
        let context = TraceContext::begin();
        assert_eq!(context.to_string().parse(), Ok(context));
        let child = context.child();
        assert!(child.trace_id() == context.trace_id() && child != context);
        let known = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let parsed: TraceContext = known.parse().unwrap();
        assert_eq!((parsed.to_string().as_str(), parsed.trace_id()), (known, known[3..35].to_owned()));
    }

    #[test]
    fn what_is_no_context_is_refused() {
        for text in [
            "",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-+bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            assert_eq!(text.parse::<TraceContext>(), Err(NoContext), "{text}");
        }
    }

    #[test]
    fn an_endpoint_that_is_not_plain_http_is_refused_with_the_form_to_write() {
        let process = Process { part: "test", names: Vec::new(), config: String::new() };
        let refusal = export_to("collector:4317", &process).unwrap_err().to_string();
        assert!(refusal.contains("collector:4317") && refusal.contains("http://<host>:<port>"), "{refusal}");
        assert!(export_to("", &process).is_ok());
    }

    #[test]
    fn a_step_names_its_parent_and_never_ends_before_it_began() {
        let parent = TraceContext::begin();
        let at = (Duration::from_secs(5), Duration::from_secs(3));
        let step =
            Step { name: "planned", parent: Some(parent), at, attributes: vec![("placement", "a/b".to_owned())] };
        let context = parent.child();
        let span = step.span(context);
        assert_eq!(span.parent_span_id, SpanId::from_bytes(parent.step.to_be_bytes()));
        assert_eq!(span.span_context.trace_id(), TraceId::from_bytes(context.trace.to_be_bytes()));
        assert_eq!(span.start_time, span.end_time);
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused(text in ".{0,80}") {
            let _ = text.parse::<TraceContext>();
        }
    }
}
