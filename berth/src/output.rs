//! What commands say: lines for a person on standard output, progress on standard error, and the one JSON
//! document of `--json`.

use std::{
    io::{self, Write},
    path::Path,
};

use anyhow::Context;
use serde::Serialize;

/// Writes a line to standard output.
pub(crate) fn say(line: &str) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{line}")
}

/// Writes a part of a line to standard output, at once.
pub(crate) fn say_part(part: &str) -> io::Result<()> {
    let mut output = io::stdout().lock();
    output.write_all(part.as_bytes())?;
    output.flush()
}

/// Writes a line of progress to standard error.
pub(crate) fn progress(line: &str) {
    // Progress is for whoever looks; nobody looking is no error.
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Writes the document that `--json` asked for.
pub(crate) fn write_json(path: Option<&Path>, document: &impl Serialize) -> anyhow::Result<()> {
    let Some(path) = path else { return Ok(()) };
    let text = serde_json::to_string_pretty(document)?;
    std::fs::write(path, text + "\n").with_context(|| format!("writing --json {}", path.display()))
}
