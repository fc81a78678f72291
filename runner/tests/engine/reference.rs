//! The models against the published implementation, and against an independent one where that has no model.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use berth_kernels::Checkpoint;
use serde_json::Value;

use crate::tiny;

/// The published implementation's model, and shapes it does not cover (`make_shapes.py`, `make_v4_shapes.py`); or what the variable names.
fn folders() -> Vec<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    match std::env::var_os("BERTH_TEST_MODEL") {
        Some(folder) => vec![folder.into()],
        None => vec![
            here.join("../tests/data/reference/models/v3-tiny"),
            here.join("../tests/data/reference/models/v4-tiny"),
            here.join("tests/data/one-group-yarn"),
            here.join("tests/data/tied-grouped"),
            here.join("tests/data/v4-first-form"),
            here.join("tests/data/v4-current-form"),
        ],
    }
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

fn cases(folder: &Path) -> Vec<Value> {
    let note: Value = serde_json::from_slice(&std::fs::read(folder.join("reference.json")).unwrap()).unwrap();
    note["cases"].as_array().unwrap().clone()
}

#[test]
fn greedy_tokens_equal_the_reference() {
    folders().iter().for_each(|folder| compare_tokens(folder));
}

fn compare_tokens(folder: &Path) {
    let loaded = tiny::load(folder);
    let engine = tiny::engine(&loaded.model, Arc::new(loaded.local), 7);
    for case in cases(folder) {
        let prompt = loaded.model.encode(case["text"].as_str().unwrap()).unwrap();
        assert_eq!(prompt, ids(&case["prompt_ids"]));
        let expected = ids(&case["greedy_ids"]);
        let outcome = tiny::generate(&engine, &prompt, u32::try_from(expected.len()).unwrap(), false);
        assert_eq!(outcome.prompt, prompt);
        assert_eq!(outcome.ids, expected);
        assert_eq!(outcome.text, loaded.model.decode(&expected));
    }
}

#[test]
fn logits_and_chosen_experts_equal_the_reference() {
    folders().iter().for_each(|folder| compare_logits(folder));
}

fn compare_logits(folder: &Path) {
    let loaded = tiny::load(folder);
    let engine = tiny::engine(&loaded.model, Arc::new(loaded.local), 16);
    let reference = Checkpoint::open_file(&folder.join("reference.safetensors")).unwrap();
    for (index, case) in cases(folder).iter().enumerate() {
        let prompt = ids(&case["prompt_ids"]);
        let outcome = tiny::generate(&engine, &prompt, 1, true);
        assert_eq!(outcome.trace.len(), prompt.len());
        let logits = reference.vector(&format!("prompt{index}.logits")).unwrap();
        let ours: Vec<f32> = outcome.trace.iter().flat_map(|trace| trace.logits.clone()).collect();
        let worst = worst_in_deviations(&ours, &logits);
        println!("{}: prompt {index}: largest difference of a logit {worst:.2e} standard deviations", folder.display());
        assert!(worst < 1e-3, "{worst}");
        let name = format!("prompt{index}.experts");
        let chosen = reference.ints(&name).unwrap();
        let shape = reference.shape(&name).unwrap().to_vec();
        for (at, chosen) in chosen.chunks_exact(shape[2]).enumerate() {
            let (layer, position) = (at / shape[1], at % shape[1]);
            let expected: BTreeSet<u32> = chosen.iter().map(|id| u32::try_from(*id).unwrap()).collect();
            let ours: BTreeSet<u32> = outcome.trace[position].experts[layer].iter().copied().collect();
            assert_eq!(ours, expected, "prompt {index}, expert layer {layer}, position {position}");
        }
    }
}

fn worst_in_deviations(ours: &[f32], reference: &[f32]) -> f64 {
    assert_eq!(ours.len(), reference.len());
    let count = f64::from(u32::try_from(reference.len()).unwrap());
    let mean = reference.iter().copied().map(f64::from).sum::<f64>() / count;
    let variance = reference.iter().map(|value| (f64::from(*value) - mean).powi(2)).sum::<f64>() / count;
    let worst = ours.iter().zip(reference).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
    worst / variance.sqrt()
}
