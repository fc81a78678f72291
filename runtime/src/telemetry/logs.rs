//! Log lines. For programs, one JSON object a line with stable keys: `timestamp`, `level`, `target`, `message`,
//! who speaks (`part`, `node`, `pod`, `device`), then the fields of the spans around the event and its own. A
//! later field of the same name wins, so that a line names each thing once. Prompts and activations never get
//! here.

use std::{
    fmt::{self, Write as _},
    io::{self, IsTerminal},
    sync::Mutex,
};

use jiff::Timestamp;
use serde_json::Value;
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
};
use tracing_subscriber::{
    EnvFilter, Layer,
    layer::{Context, SubscriberExt},
    registry::LookupSpan,
    util::SubscriberInitExt,
};

use super::Process;
use crate::Clock;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

impl LogFormat {
    /// Text when standard error is a terminal, else JSON.
    #[must_use]
    pub fn detect() -> Self {
        if io::stderr().is_terminal() { Self::Text } else { Self::Json }
    }
}

/// Why logs could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is not in the form of `EnvFilter`.
    #[error("log filter {filter:?} is invalid ({reason}): write it as info or berth_scheduler=debug,info")]
    Filter {
        /// As it was given.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Called twice.
    #[error("logs are already set up")]
    Again,
}

/// Sends logs to standard error.
///
/// # Errors
/// [`LogError`], when `filter` is malformed or logs were set up before.
pub(super) fn init(process: &Process, filter: &str, format: LogFormat) -> Result<(), LogError> {
    let filter = EnvFilter::try_new(filter)
        .map_err(|error| LogError::Filter { filter: filter.to_owned(), reason: error.to_string() })?;
    let layer = match format {
        LogFormat::Json => JsonLines::new(process, Clock::real(), io::stderr()).boxed(),
        LogFormat::Text => tracing_subscriber::fmt::layer().with_writer(io::stderr).boxed(),
    };
    tracing_subscriber::registry().with(layer).with(filter).try_init().map_err(|_| LogError::Again)
}

/// Fields in the order in which they were first named.
#[derive(Clone, Debug, Default)]
struct Fields(Vec<(String, Value)>);

impl Fields {
    fn set(&mut self, name: &str, value: Value) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => *known = value,
            None => self.0.push((name.to_owned(), value)),
        }
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field.name(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field.name(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field.name(), value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field.name(), value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field.name(), value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field.name(), format!("{value:?}").into());
    }
}

/// The layer that writes JSON.
struct JsonLines<W> {
    process: Fields,
    clock: Clock,
    out: Mutex<W>,
}

impl<W: io::Write> JsonLines<W> {
    fn new(process: &Process, clock: Clock, out: W) -> Self {
        let mut fields = Fields::default();
        fields.set("part", process.part.into());
        for (name, value) in process.names.iter().filter(|(_, value)| !value.is_empty()) {
            fields.set(name, value.as_str().into());
        }
        Self { process: fields, clock, out: Mutex::new(out) }
    }

    fn write(&self, line: &Fields) {
        let mut text = String::from("{");
        for (index, (name, value)) in line.0.iter().enumerate() {
            let comma = if index > 0 { "," } else { "" };
            // Writing to a String cannot fail.
            let _ = write!(text, "{comma}{}:{value}", Value::from(name.as_str()));
        }
        text.push_str("}\n");
        if let Ok(mut out) = self.out.lock() {
            // Whoever reads the logs is gone: there is nobody to tell.
            let _ = out.write_all(text.as_bytes());
        }
    }
}

impl<S, W> Layer<S> for JsonLines<W>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    W: io::Write + Send + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        span.extensions_mut().insert(fields);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut extensions = span.extensions_mut();
        if let Some(fields) = extensions.get_mut::<Fields>() {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut own = Fields::default();
        event.record(&mut own);
        let mut line = Fields::default();
        let micros = i64::try_from(self.clock.unix().as_micros()).unwrap_or(i64::MAX);
        let at = Timestamp::from_microsecond(micros).unwrap_or(Timestamp::UNIX_EPOCH);
        line.set("timestamp", format!("{at:.6}").into());
        line.set("level", event.metadata().level().as_str().into());
        line.set("target", event.metadata().target().into());
        line.set("message", Value::Null);
        self.process.0.iter().for_each(|(name, value)| line.set(name, value.clone()));
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(fields) = span.extensions().get::<Fields>() {
                fields.0.iter().for_each(|(name, value)| line.set(name, value.clone()));
            }
        }
        own.0.into_iter().for_each(|(name, value)| line.set(&name, value));
        self.write(&line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[derive(Clone, Debug, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Page {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn lines(names: Vec<(&'static str, String)>, say: impl FnOnce()) -> Vec<Value> {
        let page = Page::default();
        let process = Process { part: "agent", names, config: String::new() };
        let layer = JsonLines::new(&process, Clock::discrete(), page.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), say);
        let text = String::from_utf8(page.0.lock().unwrap().clone()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_line_carries_who_speaks_the_spans_around_and_its_own_fields() {
        let names = vec![("node", "gpu-01".to_owned()), ("pod", String::new())];
        let lines = lines(names, || {
            let outer = tracing::info_span!("placement", placement = "models/v3-0", plan = tracing::field::Empty);
            let _outer = outer.enter();
            outer.record("plan", "models/v3-0-7");
            let _inner = tracing::info_span!("device", device = "gpu-01/0").entered();
            tracing::warn!(revision = 7, reason = ?Some("x"), ok = true, "revision \"serves\"");
        });
        let expected = serde_json::json!({
            "timestamp": "2026-01-01T00:00:00.000000Z", "level": "WARN", "target": module_path!(),
            "message": "revision \"serves\"", "part": "agent", "node": "gpu-01", "placement": "models/v3-0",
            "plan": "models/v3-0-7", "device": "gpu-01/0", "revision": 7, "reason": "Some(\"x\")", "ok": true,
        });
        assert_eq!(lines, [expected]);
    }

    #[test]
    fn the_nearest_field_of_a_name_wins_and_stands_once() {
        let lines = lines(vec![("node", "here".to_owned())], || {
            let _span = tracing::info_span!("of", node = "there").entered();
            tracing::info!("span");
            tracing::info!(node = "elsewhere", "event");
        });
        let nodes: Vec<_> = lines.iter().map(|line| line["node"].as_str().unwrap()).collect();
        assert_eq!(nodes, ["there", "elsewhere"]);
    }
}
