//! The file of `--logits`: for prompt `i` the tensors `prompt{i}.logits` [positions, vocabulary] in float32 and
//! `prompt{i}.experts` [expert layers, positions, top_k] in int32, as `reference.safetensors` has them. The
//! positions of the prompt come first, then those of the generated tokens but the last.

use std::{borrow::Cow, path::Path};

use anyhow::Context;
use berth_runner::engine::Trace;
use safetensors::{Dtype, View};

/// Writes the traces of all prompts.
pub(crate) fn write(path: &Path, traces: &[Vec<Trace>]) -> anyhow::Result<()> {
    let mut tensors = Vec::new();
    for (index, trace) in traces.iter().enumerate() {
        let vocab = trace.first().map_or(0, |at| at.logits.len());
        let layers = trace.first().map_or(0, |at| at.experts.len());
        let top_k = trace.first().and_then(|at| at.experts.first()).map_or(0, Vec::len);
        let logits = trace.iter().flat_map(|at| &at.logits).flat_map(|value| value.to_le_bytes()).collect();
        let chosen = |layer: usize| trace.iter().filter_map(move |at| at.experts.get(layer)).flatten();
        let experts = (0..layers).flat_map(chosen).flat_map(|expert| expert.to_le_bytes()).collect();
        let positions = trace.len();
        tensors.push((format!("prompt{index}.logits"), Tensor(Dtype::F32, vec![positions, vocab], logits)));
        tensors.push((format!("prompt{index}.experts"), Tensor(Dtype::I32, vec![layers, positions, top_k], experts)));
    }
    safetensors::serialize_to_file(tensors, None, path).with_context(|| format!("writing --logits {}", path.display()))
}

/// Type, shape and little-endian values.
struct Tensor(Dtype, Vec<usize>, Vec<u8>);

impl View for Tensor {
    fn dtype(&self) -> Dtype {
        self.0
    }

    fn shape(&self) -> &[usize] {
        &self.1
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.2.as_slice().into()
    }

    fn data_len(&self) -> usize {
        self.2.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_kernels::Checkpoint;

    #[test]
    fn what_is_written_can_be_read_as_a_reference() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("logits.safetensors");
        let at = |position: u8| Trace {
            position: position.into(),
            logits: vec![position.into(), 0.5],
            experts: vec![vec![position.into()], vec![9]],
        };
        write(&path, &[vec![at(0), at(1), at(2)]]).unwrap();
        let file = Checkpoint::open_file(&path).unwrap();
        assert_eq!(file.shape("prompt0.logits").unwrap(), [3, 2]);
        assert_eq!(file.vector("prompt0.logits").unwrap(), [0.0, 0.5, 1.0, 0.5, 2.0, 0.5]);
        assert_eq!(file.shape("prompt0.experts").unwrap(), [2, 3, 1]);
        assert_eq!(file.ints("prompt0.experts").unwrap(), [0, 1, 2, 9, 9, 9]);
    }
}
