//! A checkpoint's own reference outputs: `reference.json` (prompts and greedy tokens) and, where it is,
//! `reference.safetensors` (logits and chosen experts of each prompt position).

use std::{collections::BTreeSet, path::Path};

use anyhow::{Context, bail};
use berth_kernels::Checkpoint;
use berth_runner::engine::Trace;
use serde::{Deserialize, Serialize};

/// Largest difference of a logit, in standard deviations of the reference's logits.
pub(crate) const LOGITS_GATE: f64 = 1e-3;

/// One prompt of the reference.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Case {
    /// The prompt as text, where it has one.
    pub(crate) text: Option<String>,
    /// Its tokens.
    pub(crate) prompt_ids: Vec<u32>,
    /// The tokens that follow.
    pub(crate) greedy_ids: Vec<u32>,
}

#[derive(Deserialize)]
struct File {
    cases: Vec<Case>,
}

/// Reads `reference.json` of a checkpoint.
pub(crate) fn cases(checkpoint: &Path) -> anyhow::Result<Vec<Case>> {
    let path = checkpoint.join("reference.json");
    let text = std::fs::read(&path)
        .with_context(|| format!("{}: --reference needs it: give a checkpoint that has one", path.display()))?;
    let cases =
        parse(&text).with_context(|| format!("{}: expected cases with prompt_ids and greedy_ids", path.display()))?;
    if cases.is_empty() {
        bail!("{}: field cases is empty: give at least one prompt", path.display());
    }
    Ok(cases)
}

/// Reads the bytes of a `reference.json`.
pub(crate) fn parse(text: &[u8]) -> serde_json::Result<Vec<Case>> {
    serde_json::from_slice(text).map(|File { cases }| cases)
}

/// How our positions compare with the reference's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Comparison {
    /// Positions compared.
    pub(crate) positions: usize,
    /// Largest difference of a logit, in standard deviations of the reference's logits.
    pub(crate) logits_worst: f64,
    /// (layer, position) pairs at which other experts were chosen.
    pub(crate) experts_wrong: usize,
}

impl Comparison {
    /// Whether it is within the gates.
    pub(crate) fn passed(&self) -> bool {
        self.logits_worst <= LOGITS_GATE && self.experts_wrong == 0
    }
}

/// Compares the prompt positions of case `index`; `None` without a `reference.safetensors`.
pub(crate) fn compare(checkpoint: &Path, index: usize, trace: &[Trace]) -> anyhow::Result<Option<Comparison>> {
    let path = checkpoint.join("reference.safetensors");
    if !path.exists() {
        return Ok(None);
    }
    let file = Checkpoint::open_file(&path)?;
    let (logits, experts) = (format!("prompt{index}.logits"), format!("prompt{index}.experts"));
    let (positions, vocab) = match file.shape(&logits)? {
        [positions, vocab] => (*positions, *vocab),
        other => bail!("{}: {logits} has shape {other:?}: expected [positions, vocabulary]", path.display()),
    };
    let (layers, top_k) = match file.shape(&experts)? {
        [layers, also, top_k] if *also == positions && *top_k > 0 => (*layers, *top_k),
        other => bail!("{}: {experts} has shape {other:?}: expected [layers, {positions}, top_k]", path.display()),
    };
    if trace.len() < positions || trace.iter().any(|at| at.logits.len() != vocab || at.experts.len() != layers) {
        bail!("{}: {logits} and {experts} are not of this model: take all files of one checkpoint", path.display());
    }
    let logits_worst = worst(&file.vector(&logits)?, trace);
    let chosen = file.ints(&experts)?;
    let differs = |(at, reference): (usize, &[i64])| {
        let reference: BTreeSet<i64> = reference.iter().copied().collect();
        let ours = trace.get(at % positions).and_then(|trace| trace.experts.get(at / positions));
        ours.is_none_or(|ours| ours.iter().map(|expert| i64::from(*expert)).collect::<BTreeSet<_>>() != reference)
    };
    let experts_wrong = chosen.chunks_exact(top_k).enumerate().filter(|pair| differs(*pair)).count();
    Ok(Some(Comparison { positions, logits_worst, experts_wrong }))
}

/// Largest difference in standard deviations; NaN anywhere is infinitely far.
fn worst(reference: &[f32], trace: &[Trace]) -> f64 {
    let Ok(count) = u32::try_from(reference.len()) else { return f64::INFINITY };
    let wide = || reference.iter().copied().map(f64::from);
    let mean = wide().sum::<f64>() / f64::from(count);
    let deviation = (wide().map(|value| (value - mean).powi(2)).sum::<f64>() / f64::from(count)).sqrt();
    let ours = trace.iter().flat_map(|at| &at.logits).copied().map(f64::from);
    let differences = ours.zip(wide()).map(|(ours, reference)| (ours - reference).abs() / deviation);
    differences.fold(0.0, |worst, next| if next.is_nan() { f64::INFINITY } else { worst.max(next) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(logits: &[f32]) -> Trace {
        Trace { position: 0, logits: logits.to_vec(), experts: vec![] }
    }

    #[test]
    fn the_worst_logit_is_in_deviations_of_the_reference() {
        let reference = [1.0, -1.0, 1.0, -1.0];
        assert!((worst(&reference, &[trace(&[1.0, -1.0]), trace(&[1.25, -1.0])]) - 0.25).abs() < 1e-9);
        assert_eq!(worst(&reference, &[trace(&[f32::NAN; 4])]), f64::INFINITY);
    }

    #[test]
    fn a_reference_that_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = format!("{:#}", cases(dir.path()).unwrap_err());
        assert!(error.contains("reference.json: --reference needs it"), "{error}");
        std::fs::write(dir.path().join("reference.json"), r#"{"cases":[{"prompt_ids":[0]}]}"#).unwrap();
        let error = format!("{:#}", cases(dir.path()).unwrap_err());
        assert!(error.contains("greedy_ids"), "{error}");
        std::fs::write(dir.path().join("reference.json"), r#"{"cases":[]}"#).unwrap();
        assert!(cases(dir.path()).unwrap_err().to_string().contains("cases is empty"));
    }
}
