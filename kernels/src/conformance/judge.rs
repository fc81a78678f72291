//! Distances and gates. Pure: a case and what was computed in, a verdict out.
//!
//! A backend is judged by the row of the tolerance table that describes its arithmetic. All of ours keep activations
//! in `f32`, so `y` and its parts are gated at that row; `y_a8`, where activations are quantised too, is reported only.

use serde::Serialize;

use super::case::Case;
use super::{CaseReport, Computed, add};
use crate::num::f64_of;

/// Limits on the distance from a reference, in units of its root mean square.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Gate {
    /// Root mean square of the difference.
    pub nrmse: f64,
    /// Largest difference.
    pub max: f64,
}

/// `float32` maths on dequantised weights.
pub const FLOAT32: Gate = Gate { nrmse: 1e-5, max: 1e-4 };

/// Largest relative error of a routing weight.
pub const ROUTING_WEIGHT: f64 = 1e-5;

/// Distance from one reference tensor, over good rows.
#[derive(Debug, Clone, Serialize)]
pub struct OutputReport {
    /// The reference.
    pub tensor: String,
    /// rms(y - ref) / rms(ref).
    pub nrmse: f64,
    /// max|y - ref| / rms(ref).
    pub max: f64,
    /// The gate, if this backend's arithmetic has one against this reference.
    pub gate: Option<Gate>,
    /// Within the gate, or not gated.
    pub passed: bool,
}

/// How routing compares, over good rows.
#[derive(Debug, Clone, Serialize)]
pub struct RoutingReport {
    /// Every row chose the reference's experts, as sets.
    pub exact: bool,
    /// Rows that did not.
    pub rows_wrong: Vec<usize>,
    /// Largest relative error of a weight of a commonly chosen expert.
    pub weight_error: f64,
    /// Exact, and weights within 1e-5.
    pub passed: bool,
}

pub(super) fn judge(case: &Case, computed: &Computed) -> CaseReport {
    let routing = judge_routing(case, computed);
    let y: Vec<f32> = computed.routed.iter().zip(&computed.shared).map(|(&a, &b)| add(a, b)).collect();
    let mut outputs = vec![
        distance(case, "test.y", &y, &case.y, Some(FLOAT32)),
        distance(case, "test.y_routed", &computed.routed, &case.y_routed, Some(FLOAT32)),
        distance(case, "test.y_shared", &computed.shared, &case.y_shared, Some(FLOAT32)),
    ];
    let mut push = |name, ours: Option<&Vec<f32>>, reference: Option<&Vec<f32>>, gate| {
        if let (Some(ours), Some(reference)) = (ours, reference) {
            outputs.push(distance(case, name, ours, reference, gate));
        }
    };
    let nolimit = computed.shared_nolimit.as_ref();
    push("test.y_shared_nolimit", nolimit, case.y_shared_nolimit.as_ref(), Some(FLOAT32));
    push("test.slot_out", computed.slot_out.as_ref(), case.slot_out.as_ref(), Some(FLOAT32));
    push("test.y_a8", Some(&y), case.y_a8.as_ref(), None);
    let bad_rows_contained = (!case.bad_rows.is_empty()).then(|| contained(case, &y));
    let passed =
        routing.passed && outputs.iter().all(|o| o.passed) && bad_rows_contained != Some(false) && computed.invariant;
    CaseReport {
        case: case.name.clone(),
        format: case.format.clone(),
        tokens: case.tokens,
        passed,
        routing,
        outputs,
        bad_rows_contained,
        batch_invariant: computed.invariant,
    }
}

fn good_rows(case: &Case) -> impl Iterator<Item = usize> + '_ {
    (0..case.tokens).filter(|t| !case.bad_rows.contains(t))
}

fn judge_routing(case: &Case, computed: &Computed) -> RoutingReport {
    let k = case.router.top_k;
    let mut report = RoutingReport { exact: true, rows_wrong: Vec::new(), weight_error: 0.0, passed: false };
    for t in good_rows(case) {
        let row = t * k..(t + 1) * k;
        let (ids, expected) = (&computed.ids[row.clone()], &case.topk_ids[row.clone()]);
        let weights = &case.topk_weights[row.clone()];
        let mut wrong = false;
        for (&id, &weight) in ids.iter().zip(&computed.weights[row]) {
            match expected.iter().position(|&e| e == id) {
                None => wrong = true,
                Some(at) => {
                    let reference = f64::from(weights[at]);
                    let error = (f64::from(weight) - reference).abs() / reference.abs().max(1e-30);
                    report.weight_error = worse(report.weight_error, error);
                }
            }
        }
        if wrong || has_twice(ids) {
            report.rows_wrong.push(t);
        }
    }
    report.exact = report.rows_wrong.is_empty();
    report.passed = report.exact && report.weight_error <= ROUTING_WEIGHT;
    report
}

fn has_twice(ids: &[u32]) -> bool {
    ids.iter().enumerate().any(|(i, id)| ids[..i].contains(id))
}

/// The larger error; one that is not a number is the largest of all.
fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() { f64::NAN } else { a.max(b) }
}

fn distance(case: &Case, tensor: &str, ours: &[f32], reference: &[f32], gate: Option<Gate>) -> OutputReport {
    let row_len = reference.len().checked_div(case.tokens).unwrap_or(0);
    let (mut square, mut scale, mut largest, mut count) = (0.0f64, 0.0f64, 0.0f64, 0usize);
    for t in good_rows(case) {
        let row = t * row_len..(t + 1) * row_len;
        for (&a, &b) in ours[row.clone()].iter().zip(&reference[row]) {
            let (a, b) = (f64::from(a), f64::from(b));
            square += (a - b) * (a - b);
            scale += b * b;
            largest = worse(largest, (a - b).abs());
            count += 1;
        }
    }
    let count = f64_of(count.max(1));
    let rms = (scale / count).sqrt() + 1e-30;
    let (nrmse, max) = ((square / count).sqrt() / rms, largest / rms);
    let passed = gate.is_none_or(|g| nrmse <= g.nrmse && max <= g.max);
    OutputReport { tensor: tensor.to_owned(), nrmse, max, gate, passed }
}

/// Bad rows are non-finite, all others finite.
fn contained(case: &Case, y: &[f32]) -> bool {
    y.chunks_exact(case.hidden).enumerate().all(|(t, row)| {
        if case.bad_rows.contains(&t) { row.iter().all(|v| !v.is_finite()) } else { row.iter().all(|v| v.is_finite()) }
    })
}
