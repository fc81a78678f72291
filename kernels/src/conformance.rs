//! One suite for all backends: reference cases, what a backend computes of them, and whether that is good enough.
//!
//! Used by the command, by tests and by health probes. The cases' format, tensor names and gates are those of
//! `tests/data/reference/README.md`. The suite judges; it never adjusts a gate to what it measured.

mod case;
mod judge;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::backend::{Backend, Batch, PackedExpert};
use crate::checkpoint::CheckpointError;
use crate::error::KernelError;
use crate::linear::Linear;
use crate::num::{f32_near, usize_of};

pub use case::Case;
pub use judge::{FLOAT32, Gate, OutputReport, ROUTING_WEIGHT, RoutingReport};

/// What went wrong before anything could be judged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConformanceError {
    /// The case's file cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The backend refused the case.
    #[error("{case}: {source}")]
    Kernel {
        /// The case.
        case: String,
        /// Why.
        source: KernelError,
    },
    /// The case's description is not one this suite knows.
    #[error("{}: case.{field}: {problem}: write the case again with make_reference.py", path.display())]
    Case {
        /// The file.
        path: PathBuf,
        /// The field of the header key `case`.
        field: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// There is nothing to check.
    #[error("{}: no *.safetensors case in this folder: give the folder of the reference cases", path.display())]
    Empty {
        /// The folder.
        path: PathBuf,
    },
}

/// The verdict on one case.
#[derive(Debug, Clone, Serialize)]
pub struct CaseReport {
    /// The case's name.
    pub case: String,
    /// Stored format of the routed experts.
    pub format: String,
    /// Rows in the case.
    pub tokens: usize,
    /// Everything below holds.
    pub passed: bool,
    /// Chosen experts and their weights.
    pub routing: RoutingReport,
    /// Distance from each `test.y*` (and `test.slot_out`).
    pub outputs: Vec<OutputReport>,
    /// Bad rows came out non-finite and no good row did; absent if the case has no bad row.
    pub bad_rows_contained: Option<bool>,
    /// Each row alone gives the same bits as in the batch.
    pub batch_invariant: bool,
}

/// Checks every `*.safetensors` case of a folder, in order of name.
///
/// # Errors
/// `Empty`, or the first case that cannot be read or that the backend refuses.
pub fn check_folder(backend: &dyn Backend, folder: &Path) -> Result<Vec<CaseReport>, ConformanceError> {
    let io = |source| CheckpointError::Io { path: folder.to_owned(), doing: "listing the cases".into(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(ConformanceError::Empty { path: folder.to_owned() });
    }
    files.iter().map(|file| check_file(backend, file)).collect()
}

/// Checks one case.
///
/// # Errors
/// If it cannot be read or the backend refuses it. A wrong answer is a report, not an error.
pub fn check_file(backend: &dyn Backend, file: &Path) -> Result<CaseReport, ConformanceError> {
    let case = Case::read(file)?;
    let computed =
        compute(backend, &case).map_err(|source| ConformanceError::Kernel { case: case.name.clone(), source })?;
    Ok(judge::judge(&case, &computed))
}

/// What a backend made of a case.
pub(crate) struct Computed {
    pub(crate) ids: Vec<u32>,
    pub(crate) weights: Vec<f32>,
    /// [T × K × H], unweighted; for the reference's own choice of experts.
    pub(crate) slot_out: Option<Vec<f32>>,
    pub(crate) routed: Vec<f32>,
    pub(crate) shared: Vec<f32>,
    pub(crate) shared_nolimit: Option<Vec<f32>>,
    pub(crate) invariant: bool,
}

fn compute(backend: &dyn Backend, case: &Case) -> Result<Computed, KernelError> {
    let mut logits = vec![0.0; case.tokens * case.experts.len()];
    Linear::from_stored(&case.gate)?.apply(&case.x, &mut logits)?;
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    let forced = case.forced.as_deref();
    case.router.route_experts(case.experts.len(), &logits, case.bias.as_deref(), forced, &mut ids, &mut weights)?;
    let table = case.experts.iter().map(|e| backend.pack(e)).collect::<Result<Vec<_>, _>>()?;
    let routed = grouped(backend, case, &table, case.router.top_k, &ids, &weights)?;
    let invariant = same_alone(backend, case, &table, &ids, &weights, &routed)?;
    let slot_out = match &case.slot_out {
        Some(_) => Some(slots(backend, case, &table)?),
        None => None,
    };
    let shared = single(backend, case, &backend.pack(&case.shared)?)?;
    let shared_nolimit = match &case.y_shared_nolimit {
        Some(_) => {
            let mut free = case.shared.clone();
            free.limit = None;
            Some(single(backend, case, &backend.pack(&free)?)?)
        }
        None => None,
    };
    Ok(Computed { ids, weights, slot_out, routed, shared, shared_nolimit, invariant })
}

/// Every row with `k` experts.
fn grouped(
    backend: &dyn Backend,
    case: &Case,
    table: &[PackedExpert],
    k: usize,
    ids: &[u32],
    weights: &[f32],
) -> Result<Vec<f32>, KernelError> {
    forward(backend, case.hidden, &case.x, table, k, ids, weights)
}

fn forward(
    backend: &dyn Backend,
    hidden: usize,
    rows: &[f32],
    table: &[PackedExpert],
    k: usize,
    ids: &[u32],
    weights: &[f32],
) -> Result<Vec<f32>, KernelError> {
    let count = rows.len() / hidden;
    let offsets: Vec<u32> = (0..=count).map(|t| u32::try_from(t * k).unwrap_or(u32::MAX)).collect();
    let mut out = vec![0.0; rows.len()];
    backend.forward(&Batch { hidden, rows, offsets: &offsets, experts: ids, weights, table }, &mut out)?;
    Ok(out)
}

/// Whether each row alone, with only its own experts, gives the bits it has in the batch.
fn same_alone(
    backend: &dyn Backend,
    case: &Case,
    table: &[PackedExpert],
    ids: &[u32],
    weights: &[f32],
    together: &[f32],
) -> Result<bool, KernelError> {
    let (k, hidden) = (case.router.top_k, case.hidden);
    for t in 0..case.tokens {
        let own: Vec<PackedExpert> = ids[t * k..][..k].iter().map(|&e| table[usize_of(e)].clone()).collect();
        let order: Vec<u32> = (0..k).map(|i| u32::try_from(i).unwrap_or(u32::MAX)).collect();
        let row = &case.x[t * hidden..][..hidden];
        let alone = forward(backend, hidden, row, &own, k, &order, &weights[t * k..][..k])?;
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        if !alone.iter().zip(&together[t * hidden..]).all(same) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Each slot's expert output, unweighted, for the reference's choice: one call per slot.
fn slots(backend: &dyn Backend, case: &Case, table: &[PackedExpert]) -> Result<Vec<f32>, KernelError> {
    let (k, hidden) = (case.router.top_k, case.hidden);
    let mut out = vec![0.0; case.tokens * k * hidden];
    let ones = vec![1.0; case.tokens];
    for slot in 0..k {
        let ids: Vec<u32> = case.topk_ids.chunks_exact(k).map(|row| row[slot]).collect();
        let values = grouped(backend, case, table, 1, &ids, &ones)?;
        for (t, row) in values.chunks_exact(hidden).enumerate() {
            out[(t * k + slot) * hidden..][..hidden].copy_from_slice(row);
        }
    }
    Ok(out)
}

/// Every row through one expert with weight 1.
fn single(backend: &dyn Backend, case: &Case, expert: &PackedExpert) -> Result<Vec<f32>, KernelError> {
    let (ids, ones) = (vec![0; case.tokens], vec![1.0; case.tokens]);
    grouped(backend, case, std::slice::from_ref(expert), 1, &ids, &ones)
}

/// Rounds a sum of two `f32` results once.
pub(crate) fn add(a: f32, b: f32) -> f32 {
    f32_near(f64::from(a) + f64::from(b))
}
