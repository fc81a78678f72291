//! The demo's report, as `docs` and checks outside the project read it. Times are milliseconds from the moment
//! a fault was injected.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::{Error, Result};

/// Everything the demo found.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// Folder of the checkpoint that was served.
    pub checkpoint: PathBuf,
    /// Every prompt that was served, in order.
    pub prompts: Vec<PromptReport>,
    /// The placement before the first fault and after the last repair.
    pub placement: PlacementReport,
    /// Every fault.
    pub fault: Vec<FaultReport>,
    /// Seconds per step.
    pub durations_s: BTreeMap<String, f64>,
}

/// One prompt.
#[derive(Debug, Clone, Serialize)]
pub struct PromptReport {
    /// When it was served: before, during or after the fault.
    pub phase: &'static str,
    /// Its token ids.
    pub prompt_ids: Vec<u32>,
    /// What the system generated.
    pub generated_ids: Vec<u32>,
    /// What it should generate, where that is known.
    pub expected_ids: Option<Vec<u32>>,
}

impl PromptReport {
    /// Whether the system generated what is expected, where that is known.
    #[must_use]
    pub fn is_right(&self) -> bool {
        self.expected_ids.as_ref().is_none_or(|expected| *expected == self.generated_ids)
    }
}

/// The placement's figures.
#[derive(Debug, Default, Serialize)]
pub struct PlacementReport {
    /// Revision before the first fault.
    pub revision_before: u64,
    /// Revision after the last repair.
    pub revision_after: u64,
    /// Mean over layers of mean ÷ max device load after the repair; null = no load was seen yet.
    pub balancedness: Option<f64>,
    /// Expert bytes that the repair made devices load.
    pub moved_bytes: u64,
}

/// One fault.
#[derive(Debug, Clone, Serialize)]
pub struct FaultReport {
    /// The device that was lost.
    pub device: String,
    /// Until the agent's ledger had decided.
    pub detected_ms: f64,
    /// Until a call that the lost device refused was answered by another.
    pub rerouted_ms: f64,
    /// Until the first step ran on the repaired placement.
    pub repaired_ms: f64,
    /// Requests that failed.
    pub failed_requests: u64,
    /// Requests of which at least one expert call was made again on another replica.
    pub retried_requests: u64,
    /// Expert calls that the lost device refused.
    pub refused_calls: u64,
}

impl Report {
    /// Writes the report, making its folder.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(Error::file("make", folder))?;
        }
        let text = serde_json::to_string_pretty(self).map_err(|error| Error::file("write", path)(error.into()))?;
        std::fs::write(path, text + "\n").map_err(Error::file("write", path))
    }
}
