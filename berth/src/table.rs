//! Text for people: columns that line up, ages and sizes as kubectl writes them, and the documents that programs
//! read instead. It knows no object.

use std::fmt;

use clap::ValueEnum;
use serde::Serialize;

use crate::output;

/// How a command writes what it found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// Tables for people.
    #[default]
    Table,
    /// One JSON document.
    Json,
    /// One YAML document.
    Yaml,
}

impl Output {
    /// Writes `view` to standard output: `text` of it for people, all of it for programs.
    pub(crate) fn write<V: Serialize>(self, view: &V, text: impl FnOnce(&V) -> String) -> anyhow::Result<()> {
        let text = match self {
            Self::Table => text(view),
            Self::Json => serde_json::to_string_pretty(view)?,
            Self::Yaml => serde_saphyr::to_string(view)?,
        };
        output::say(text.trim_end())?;
        Ok(())
    }
}

/// Rows of cells under a head.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub(crate) fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|cell| (*cell).to_owned()).collect()] }
    }

    /// Adds a row; an empty cell is written as a dash.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let dashed = |cell: String| if cell.is_empty() { "-".to_owned() } else { cell };
        self.rows.push(cells.into_iter().map(dashed).collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width =
            |column: usize| self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
        let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(&format!("{cell:width$}   "));
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Seconds as kubectl writes ages.
pub(crate) fn age(seconds: i64) -> String {
    let seconds = seconds.max(0);
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7_199 => format!("{}m", seconds / 60),
        7_200..=172_799 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// `one thing`, `2 things`.
pub(crate) fn count(number: usize, thing: &str) -> String {
    let end = if number == 1 { "" } else { "s" };
    format!("{number} {thing}{end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_empty_cells_are_dashes() {
        let mut table = Table::new(&["NAME", "REV"]);
        table.row(["a-long-name".to_owned(), "7".to_owned()]);
        table.row(["ä".to_owned(), String::new()]);
        assert_eq!(table.to_string(), "NAME          REV\na-long-name   7\nä             -\n");
    }

    #[test]
    fn ages_have_one_unit() {
        for (seconds, text) in [(-5, "0s"), (90, "90s"), (120, "2m"), (7_200, "2h"), (172_800, "2d")] {
            assert_eq!(age(seconds), text);
        }
    }
}
