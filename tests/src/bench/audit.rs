//! What one identity asked of the API server, by the audit log. Reads; judges nothing.

use std::{collections::BTreeMap, path::Path, time::Duration};

use jiff::Timestamp;
use serde_json::Value;

use crate::{Error, Result};

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// When it arrived.
    pub at: Timestamp,
    /// `<verb> <resource>[/<subresource>]`.
    pub what: String,
    /// Of which object; empty = of a collection.
    pub object: String,
    /// The answer.
    pub code: u16,
}

impl Call {
    /// Whether it asked for a change.
    #[must_use]
    pub fn writes(&self) -> bool {
        ["create ", "update ", "patch ", "delete"].iter().any(|verb| self.what.starts_with(verb))
    }

    /// Whether the API server said that it is asked too much.
    #[must_use]
    pub const fn throttled(&self) -> bool {
        self.code == 429
    }
}

/// Calls of the user `name` that arrived from `from` on, in the log's order. A watch is logged when it ends.
///
/// # Errors
/// When the log cannot be read.
pub fn calls(log: &Path, name: &str, from: Timestamp) -> Result<Vec<Call>> {
    let text = std::fs::read_to_string(log).map_err(Error::file("read", log))?;
    let lines = text.lines().filter(|line| line.contains(name)).filter_map(|line| serde_json::from_str(line).ok());
    Ok(lines.filter_map(|event: Value| call(&event, name)).filter(|call| call.at >= from).collect())
}

fn call(event: &Value, name: &str) -> Option<Call> {
    let field = |path: &str| event.pointer(path).and_then(Value::as_str).unwrap_or_default();
    let at = field("/requestReceivedTimestamp").parse().ok()?;
    let resource = match (field("/objectRef/resource"), field("/objectRef/subresource")) {
        (resource, "") => resource.to_owned(),
        (resource, subresource) => format!("{resource}/{subresource}"),
    };
    let code = event.pointer("/responseStatus/code").and_then(Value::as_u64).and_then(|code| u16::try_from(code).ok());
    (field("/user/username") == name).then(|| Call {
        at,
        what: format!("{} {resource}", field("/verb")),
        object: field("/objectRef/name").to_owned(),
        code: code.unwrap_or(0),
    })
}

/// How often each kind of call was made.
#[must_use]
pub fn counts(calls: &[Call]) -> BTreeMap<String, u64> {
    let mut counts = BTreeMap::new();
    for call in calls {
        let what = if call.code < 400 { call.what.clone() } else { format!("{}: {}", call.what, call.code) };
        let count: &mut u64 = counts.entry(what).or_default();
        *count = count.saturating_add(1);
    }
    counts
}

/// The shortest time between two writes of one object's status; `None` = none was written twice.
#[must_use]
pub fn shortest_pause(calls: &[Call]) -> Option<Duration> {
    let mut last: BTreeMap<&str, Timestamp> = BTreeMap::new();
    let mut shortest: Option<Duration> = None;
    for call in calls.iter().filter(|call| call.what == "patch acceleratornodes/status") {
        if let Some(before) = last.insert(&call.object, call.at) {
            let pause = Duration::try_from(call.at.duration_since(before)).unwrap_or_default();
            shortest = Some(shortest.map_or(pause, |shortest| shortest.min(pause)));
        }
    }
    shortest
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = r#"{"requestReceivedTimestamp":"2026-01-01T00:00:01.000000Z","verb":"patch","user":{"username":"x"},"objectRef":{"resource":"acceleratornodes","subresource":"status","name":"n"},"responseStatus":{"code":200}}"#;

    #[test]
    fn calls_of_one_identity_are_counted_and_their_pauses_measured() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("audit.log");
        let later = ONE.replace(":01.0", ":02.5");
        let refused = ONE.replace(":01.0", ":03.0").replace(":200", ":429");
        let other = ONE.replace("\"x\"", "\"y\"");
        std::fs::write(&log, [ONE, &later, &refused, &other, "{torn"].join("\n")).unwrap();
        let all = calls(&log, "x", Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(all.len(), 3);
        assert!(all.iter().all(Call::writes));
        assert_eq!(all.iter().filter(|call| call.throttled()).count(), 1);
        let counts = counts(&all);
        assert_eq!(counts.get("patch acceleratornodes/status"), Some(&2));
        assert_eq!(counts.get("patch acceleratornodes/status: 429"), Some(&1));
        assert_eq!(shortest_pause(&all), Some(Duration::from_millis(500)));
        let from = "2026-01-01T00:00:02Z".parse().unwrap();
        assert_eq!(calls(&log, "x", from).unwrap().len(), 2);
    }
}
