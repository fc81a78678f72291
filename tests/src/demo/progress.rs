//! A line per step for the person who watches, and the seconds per step for the report. Writes to stdout only.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::time::Instant;

/// Prints steps and remembers how long they took.
#[derive(Debug)]
pub(super) struct Progress {
    started: Instant,
    step: Option<(String, Instant)>,
    seconds: BTreeMap<String, f64>,
}

impl Progress {
    /// Starts the watch.
    #[must_use]
    pub(super) fn start() -> Self {
        Self { started: Instant::now(), step: None, seconds: BTreeMap::new() }
    }

    /// Begins a step: `name` is its key in the report, `line` what the person reads.
    pub(super) fn step(&mut self, name: &str, line: &str) {
        self.end_step();
        self.print(&format!("[{:>6.1}s] {line}", self.started.elapsed().as_secs_f64()));
        self.step = Some((name.to_owned(), Instant::now()));
    }

    /// A detail of the running step.
    pub(super) fn detail(&self, line: &str) {
        for line in line.trim_end().lines() {
            self.print(&format!("          {line}"));
        }
    }

    fn end_step(&mut self) {
        if let Some((name, since)) = self.step.take() {
            *self.seconds.entry(name).or_default() += since.elapsed().as_secs_f64();
        }
    }

    /// Ends the last step; seconds per step and in total.
    #[must_use]
    pub(super) fn finish(mut self) -> BTreeMap<String, f64> {
        self.end_step();
        self.seconds.insert("total".to_owned(), self.started.elapsed().as_secs_f64());
        self.seconds
    }

    fn print(&self, line: &str) {
        let mut out = std::io::stdout().lock();
        // A closed pipe must not end the demo before it has cleaned up.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}
