//! The demo's report, as `docs` and checks outside the project read it. Times are milliseconds from the moment
//! a fault was injected.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use berth_types::{Action, Vendor};
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
    /// What a skewed load led to, once it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rebalance: Option<RebalanceReport>,
    /// The node that was drained, once it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainReport>,
    /// What came back, fault by fault.
    #[serde(rename = "return")]
    pub returned: Vec<ReturnReport>,
    /// What was reset by order, vendor by vendor.
    pub reset: Vec<ResetReport>,
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
    /// Expert bytes that the repairs made devices load.
    pub moved_bytes: u64,
}

/// One fault.
#[derive(Debug, Clone, Serialize)]
pub struct FaultReport {
    /// The device that was lost, or the first of several.
    pub device: String,
    /// All devices that were lost together.
    pub devices: Vec<String>,
    /// Until the agent's ledger had decided over all of them.
    pub detected_ms: f64,
    /// Until a call that a lost device refused was answered by another.
    pub rerouted_ms: f64,
    /// Until the first step ran on the repaired placement.
    pub repaired_ms: f64,
    /// Requests that failed.
    pub failed_requests: u64,
    /// Requests of which at least one expert call was made again on another replica.
    pub retried_requests: u64,
    /// Expert calls that lost devices refused.
    pub refused_calls: u64,
}

/// Replicas that moved because the load had drifted.
#[derive(Debug, Clone, Serialize)]
pub struct RebalanceReport {
    /// Revision before.
    pub revision_before: u64,
    /// Revision after.
    pub revision_after: u64,
    /// Mean over layers of mean ÷ max device load under the skewed load before, as the runner counted it.
    pub balancedness_before: f64,
    /// The same on the revision after, under the same load.
    pub balancedness_after: f64,
    /// What the plan expected it to be.
    pub expected_after: Option<f64>,
    /// Replicas that devices loaded for it.
    pub moved_replicas: u64,
    /// Bytes of those replicas.
    pub moved_bytes: u64,
    /// Seconds until the gain has paid for the moves.
    pub pays_back_s: Option<f64>,
    /// The scheduler's reason.
    pub why: String,
    /// Requests that were served meanwhile.
    pub requests: u64,
    /// Requests among them that failed or gave other tokens than the first.
    pub failed_requests: u64,
}

/// A node that was cordoned.
#[derive(Debug, Clone, Serialize)]
pub struct DrainReport {
    /// The node.
    pub node: String,
    /// Until no expert of it was in use any more.
    pub drained_ms: f64,
    /// Requests that were served meanwhile.
    pub requests: u64,
    /// Requests that failed meanwhile.
    pub failed_requests: u64,
}

/// Devices that came back.
#[derive(Debug, Clone, Serialize)]
pub struct ReturnReport {
    /// The devices.
    pub devices: Vec<String>,
    /// Until they were validated and out of probation.
    pub healthy_ms: f64,
    /// Until the placement used them again.
    pub used_ms: f64,
}

/// A device that was reset by order. Each time is from its fault to when the objects first said so.
#[derive(Debug, Clone, Serialize)]
pub struct ResetReport {
    /// Its vendor.
    pub vendor: Vendor,
    /// The device with the fault.
    pub device: String,
    /// All devices that were reset together.
    pub devices: Vec<String>,
    /// The vendor's code.
    pub code: String,
    /// What its agent advised.
    pub action: Action,
    /// The order's id.
    pub order: String,
    /// Until the AcceleratorNode told the fault and what is to be done.
    pub told_ms: f64,
    /// Until no expert was placed on any of the devices.
    pub emptied_ms: f64,
    /// Until the operator had ordered the reset.
    pub ordered_ms: f64,
    /// Until the agent said that it is carried out.
    pub reset_ms: f64,
    /// Until the device had passed its validation; its probation begins.
    pub validated_ms: f64,
    /// Until all devices were Healthy and Schedulable, and nothing cordoned them.
    pub healthy_ms: f64,
    /// Until the placement used all of them again.
    pub used_ms: f64,
    /// Resets that the vendor's own call was asked for on that node, with why one was refused.
    pub asked: Vec<String>,
    /// Requests that were served meanwhile.
    pub requests: u64,
    /// Requests among them that failed or gave other tokens.
    pub failed_requests: u64,
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
