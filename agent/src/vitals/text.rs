//! Prometheus' text format, version 0.0.4, as exporters of vendors serve it: counters there keep their names
//! without an ending, which OpenMetrics forbids.

use std::fmt::Write as _;

/// The content type of the format.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Labels of one sample, in the order in which they are written.
pub(super) type Labels = Vec<(&'static str, String)>;

/// Text that families are written to.
#[derive(Debug, Default)]
pub(super) struct Text(String);

impl Text {
    /// Writes one family; nothing of it when it has no sample. `kind` is `gauge` or `counter`.
    pub(super) fn family<'a>(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        samples: impl IntoIterator<Item = (&'a Labels, f64)>,
    ) {
        let mut samples = samples.into_iter().peekable();
        if samples.peek().is_none() {
            return;
        }
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            self.0.push_str(name);
            for (index, (label, text)) in labels.iter().enumerate() {
                let open = if index == 0 { '{' } else { ',' };
                let _ = write!(self.0, "{open}{label}=\"{}\"", escaped(text));
            }
            let close = if labels.is_empty() { "" } else { "}" };
            let _ = writeln!(self.0, "{close} {value}");
        }
    }

    pub(super) fn finish(self) -> String {
        self.0
    }
}

fn escaped(text: &str) -> String {
    text.replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_and_a_family_without_samples_is_not_written() {
        let mut text = Text::default();
        text.family("none", "gauge", "None", []);
        let labels = vec![("a", "x\"y\\z\n".to_owned()), ("b", String::new())];
        text.family("one", "counter", "One thing.", [(&labels, 0.5), (&Vec::new(), 3.0)]);
        let expected = "# HELP one One thing.\n# TYPE one counter\none{a=\"x\\\"y\\\\z\\n\",b=\"\"} 0.5\none 3\n";
        assert_eq!(text.finish(), expected);
    }
}
