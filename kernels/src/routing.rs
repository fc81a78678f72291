//! Which experts a token goes to, in `float32`, as the published V3 and V4 inference code computes it.
//!
//! Pure: logits in, choices and weights out. Ties go to the lowest index. A row with a NaN logit still gets valid,
//! distinct experts, its weights are NaN, and no other row notices.
//!
//! V3 (arXiv 2412.19437, eq. 16 and its repository's `Gate`): sigmoid scores; the bias only chooses; a group's score is
//! the sum of its two best. V2 (arXiv 2405.04434): softmax; a group's score is its best. V4: sqrt(softplus), no groups,
//! hash layers choose by token id.

use crate::error::{KernelError, check_len};
use crate::num::usize_of;

/// From logit to score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// 1 / (1 + e^-x): V3.
    Sigmoid,
    /// sqrt(ln(1 + e^x)): V4.
    SqrtSoftplus,
    /// Over all experts of the row: V2.
    Softmax,
}

/// How a layer routes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Router {
    /// From logit to score.
    pub scoring: Scoring,
    /// Experts per row.
    pub top_k: usize,
    /// Groups that experts are divided into, in index order; 0 or 1: none.
    pub groups: usize,
    /// Groups that may be chosen from.
    pub groups_kept: usize,
    /// Divide a row's weights by their sum (+ 1e-20).
    pub renormalise: bool,
    /// Multiplies every weight at the end.
    pub scaling: f32,
}

impl Router {
    /// Routes T rows; E follows from `bias`, else from `forced`.
    ///
    /// `ids` and `weights` are overwritten: [T × top_k], by falling selection score, or in the order of `forced`.
    ///
    /// # Errors
    /// As [`Router::route_experts`], and if neither `bias` nor `forced` says how many experts there are.
    pub fn route(
        &self,
        logits: &[f32],
        bias: Option<&[f32]>,
        forced: Option<&[u32]>,
        ids: &mut Vec<u32>,
        weights: &mut Vec<f32>,
    ) -> Result<(), KernelError> {
        let experts = match (bias, forced) {
            (Some(bias), _) => bias.len(),
            (None, Some(forced)) if self.top_k > 0 && forced.len() >= self.top_k => {
                logits.len() / (forced.len() / self.top_k)
            }
            (None, Some(_)) if logits.is_empty() => self.top_k,
            _ => {
                return Err(KernelError::invalid(
                    "bias",
                    "is absent, so the number of experts is unknown: call route_experts with it",
                ));
            }
        };
        self.route_experts(experts, logits, bias, forced, ids, weights)
    }

    /// Routes T rows over `experts` experts.
    ///
    /// # Arguments
    /// `logits` [T × experts]; `bias` [experts], added to scores for choosing only; `forced` [T × top_k], experts fixed
    /// by a hash table: only their weights are computed.
    ///
    /// # Errors
    /// Lengths that do not match, more choices than experts (or than the kept groups hold), groups that do not divide
    /// the experts, or a forced id outside them.
    pub fn route_experts(
        &self,
        experts: usize,
        logits: &[f32],
        bias: Option<&[f32]>,
        forced: Option<&[u32]>,
        ids: &mut Vec<u32>,
        weights: &mut Vec<f32>,
    ) -> Result<(), KernelError> {
        self.check(experts, logits.len(), bias, forced)?;
        ids.clear();
        weights.clear();
        let mut row = Row { scores: vec![0.0; experts], choice: vec![0.0; experts], groups: Vec::new() };
        for (t, logits) in logits.chunks_exact(experts).enumerate() {
            self.score(logits, &mut row.scores);
            let start = ids.len();
            match forced {
                Some(forced) => ids.extend_from_slice(&forced[t * self.top_k..][..self.top_k]),
                None => self.choose(&mut row, bias, ids),
            }
            let poisoned = logits.iter().any(|l| l.is_nan());
            self.weigh(&row.scores, &ids[start..], poisoned, weights);
        }
        Ok(())
    }

    fn check(
        &self,
        experts: usize,
        logits: usize,
        bias: Option<&[f32]>,
        forced: Option<&[u32]>,
    ) -> Result<(), KernelError> {
        if self.top_k == 0 || self.top_k > experts {
            return Err(KernelError::invalid(
                "top_k",
                format!("is {} of {experts} experts: choose 1 to {experts}", self.top_k),
            ));
        }
        if u32::try_from(experts).is_err() {
            return Err(KernelError::invalid("experts", format!("are {experts}: at most 2^32 - 1")));
        }
        if !logits.is_multiple_of(experts) {
            return Err(KernelError::invalid("logits", format!("are {logits}, not a multiple of {experts} experts")));
        }
        if let Some(bias) = bias {
            check_len("bias", bias.len(), experts, || "one per expert".to_owned())?;
        }
        if let Some(forced) = forced {
            let rows = logits / experts;
            check_len("forced", forced.len(), rows * self.top_k, || format!("{rows} rows × top_k {}", self.top_k))?;
            if let Some(id) = forced.iter().find(|&&id| usize_of(id) >= experts) {
                return Err(KernelError::invalid(
                    "forced",
                    format!("names expert {id} of {experts}: check the hash table"),
                ));
            }
            return Ok(());
        }
        if self.groups > 1 {
            if !experts.is_multiple_of(self.groups) {
                return Err(KernelError::invalid("groups", format!("{} do not divide {experts} experts", self.groups)));
            }
            let reachable = self.groups_kept.min(self.groups) * (experts / self.groups);
            if reachable < self.top_k {
                return Err(KernelError::invalid(
                    "groups_kept",
                    format!(
                        "{} groups hold {reachable} experts, fewer than top_k {}: keep more groups",
                        self.groups_kept, self.top_k
                    ),
                ));
            }
        }
        Ok(())
    }

    fn score(&self, logits: &[f32], scores: &mut [f32]) {
        match self.scoring {
            Scoring::Sigmoid => scores.iter_mut().zip(logits).for_each(|(s, &x)| *s = 1.0 / (1.0 + (-x).exp())),
            Scoring::SqrtSoftplus => {
                scores.iter_mut().zip(logits).for_each(|(s, &x)| *s = softplus(x).sqrt());
            }
            Scoring::Softmax => {
                let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                scores.iter_mut().zip(logits).for_each(|(s, &x)| *s = (x - top).exp());
                let sum: f32 = scores.iter().sum();
                scores.iter_mut().for_each(|s| *s /= sum);
            }
        }
    }

    /// Appends the `top_k` best by score + bias within the kept groups.
    fn choose(&self, row: &mut Row, bias: Option<&[f32]>, ids: &mut Vec<u32>) {
        for (i, (choice, &score)) in row.choice.iter_mut().zip(&row.scores).enumerate() {
            let value = score + bias.map_or(0.0, |b| b[i]);
            *choice = if value.is_nan() { f32::NEG_INFINITY } else { value };
        }
        let size = row.choice.len() / self.groups.max(1);
        row.groups.clear();
        row.groups.resize(self.groups.max(1), true);
        if self.groups > 1 {
            let best_two = self.scoring != Scoring::Softmax;
            let group_scores: Vec<f32> = row.choice.chunks_exact(size).map(|g| group_score(g, best_two)).collect();
            row.groups.fill(false);
            for _ in 0..self.groups_kept.min(self.groups) {
                if let Some(best) = best_open(&group_scores, |g| !row.groups[g]) {
                    row.groups[best] = true;
                }
            }
        }
        let start = ids.len();
        for _ in 0..self.top_k {
            let taken = &ids[start..];
            let open = |e: usize| row.groups[e / size] && !taken.iter().any(|&t| usize_of(t) == e);
            if let Some(best) = best_open(&row.choice, open) {
                ids.push(u32::try_from(best).unwrap_or(u32::MAX));
            }
        }
    }

    fn weigh(&self, scores: &[f32], ids: &[u32], poisoned: bool, weights: &mut Vec<f32>) {
        let chosen = ids.iter().map(|&id| scores[usize_of(id)]);
        let total = if self.renormalise { chosen.clone().sum::<f32>() + 1e-20 } else { 1.0 };
        weights.extend(chosen.map(|s| if poisoned { f32::NAN } else { s / total * self.scaling }));
    }
}

/// Scratch of one row.
struct Row {
    scores: Vec<f32>,
    choice: Vec<f32>,
    groups: Vec<bool>,
}

/// ln(1 + e^x) without overflow. NaN stays NaN.
fn softplus(x: f32) -> f32 {
    let positive = if x > 0.0 { x } else { 0.0 };
    if x.is_nan() { x } else { positive + (-x.abs()).exp().ln_1p() }
}

/// The sum of a group's two best, or its best.
fn group_score(group: &[f32], best_two: bool) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &value in group {
        if value > first {
            (first, second) = (value, first);
        } else if value > second {
            second = value;
        }
    }
    if best_two && group.len() > 1 { first + second } else { first }
}

/// The index of the greatest open value; the lowest index among equals; `None` if nothing is open.
fn best_open(values: &[f32], open: impl Fn(usize) -> bool) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (i, &value) in values.iter().enumerate() {
        if open(i) && best.is_none_or(|b| value > values[b]) {
            best = Some(i);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    const V3: Router =
        Router { scoring: Scoring::Sigmoid, top_k: 2, groups: 2, groups_kept: 1, renormalise: true, scaling: 2.5 };

    fn run(router: &Router, logits: &[f32], bias: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        router.route(logits, Some(bias), None, &mut ids, &mut weights).unwrap();
        (ids, weights)
    }

    #[test]
    fn a_group_wins_by_its_two_best() {
        // Expert 0 is the best of all, but its group's second is poor.
        let (ids, weights) = run(&V3, &[3.0, -9.0, 2.0, 2.5], &[0.0; 4]);
        assert_eq!(ids, [3, 2]);
        assert!((weights.iter().sum::<f32>() - 2.5).abs() < 1e-6);
    }

    #[test]
    fn bias_chooses_but_does_not_weigh() {
        let router = Router { groups: 0, ..V3 };
        let (ids, weights) = run(&router, &[0.0, 0.0, 0.0, 0.0], &[0.0, 0.1, 0.3, 0.2]);
        assert_eq!(ids, [2, 3]);
        assert_eq!(weights, [1.25, 1.25]);
    }

    #[test]
    fn ties_go_to_the_lowest_index() {
        let router = Router { groups: 0, ..V3 };
        assert_eq!(run(&router, &[1.0; 4], &[0.0; 4]).0, [0, 1]);
    }

    #[test]
    fn a_masked_group_never_wins_even_over_negative_choices() {
        let (ids, _) = run(&V3, &[0.0; 4], &[-50.0, -50.0, -60.0, -60.0]);
        assert_eq!(ids, [0, 1]);
    }

    #[test]
    fn a_nan_row_is_contained() {
        let clean = run(&V3, &[3.0, -9.0, 2.0, 2.5], &[0.0; 4]);
        let (ids, weights) = run(&V3, &[f32::NAN, 1.0, 2.0, 3.0, 3.0, -9.0, 2.0, 2.5], &[0.0; 4]);
        assert_eq!(ids[2..], clean.0);
        assert_eq!(weights[2..], clean.1);
        assert!(weights[..2].iter().all(|w| w.is_nan()));
        assert!(ids[0] != ids[1] && ids[..2].iter().all(|&i| i < 4));
        let (ids, _) = run(&V3, &[f32::NAN; 4], &[0.0; 4]);
        assert_eq!(ids, [0, 1]);
    }

    #[test]
    fn hash_layers_keep_the_tables_order() {
        let router = Router { scoring: Scoring::SqrtSoftplus, groups: 0, scaling: 1.5, ..V3 };
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        router.route(&[1.0, 2.0, 3.0, -200.0], None, Some(&[2, 0]), &mut ids, &mut weights).unwrap();
        assert_eq!(ids, [2, 0]);
        let (a, b) = (3f64.exp().ln_1p().sqrt(), 1f64.exp().ln_1p().sqrt());
        assert!((f64::from(weights[0]) - 1.5 * a / (a + b)).abs() < 1e-6);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        let (mut i, mut w) = (Vec::new(), Vec::new());
        let mut error = |r: &Router, l: &[f32], b: Option<&[f32]>, f: Option<&[u32]>| {
            r.route(l, b, f, &mut i, &mut w).unwrap_err().to_string()
        };
        assert!(error(&V3, &[0.0; 4], None, None).starts_with("bias: "));
        assert!(error(&V3, &[0.0; 5], Some(&[0.0; 4]), None).starts_with("logits: "));
        assert!(error(&V3, &[0.0; 4], None, Some(&[0, 9])).contains("names expert 9 of 4"));
        assert!(error(&Router { top_k: 5, ..V3 }, &[0.0; 4], Some(&[0.0; 4]), None).starts_with("top_k: "));
        assert!(error(&Router { top_k: 3, ..V3 }, &[0.0; 4], Some(&[0.0; 4]), None).starts_with("groups_kept: "));
        assert!(error(&Router { groups: 3, ..V3 }, &[0.0; 4], Some(&[0.0; 4]), None).starts_with("groups: "));
    }

    #[test]
    fn no_rows_route_to_nothing() {
        assert_eq!(run(&V3, &[], &[0.0; 4]), (vec![], vec![]));
        let (mut ids, mut weights) = (vec![7], vec![1.0]);
        V3.route(&[], None, Some(&[]), &mut ids, &mut weights).unwrap();
        assert!(ids.is_empty() && weights.is_empty());
    }

    #[test]
    fn softmax_weights_sum_to_one_and_extremes_do_not_overflow() {
        let router = Router { scoring: Scoring::Softmax, groups: 0, renormalise: false, scaling: 1.0, top_k: 4, ..V3 };
        let (ids, weights) = run(&router, &[1e4, -1e4, 9.999e3, 0.0], &[0.0; 4]);
        assert_eq!(ids, [0, 2, 1, 3]);
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert_eq!(softplus(500.0), 500.0);
        assert!(softplus(-80.0) > 0.0);
    }
}
