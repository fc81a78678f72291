//! Blocks of tokens become one entry each (V4's paper, §2.3.1 eq. 9–12 and §2.3.2 eq. 20–23). Of every token `t`:
//! a contribution `C = W_kv x` and gates `Z = W_z x + B[t mod m]`, per feature. A block's entry is
//!
//! ```text
//! entry = rope( norm( Σ_j softmax_j(Z) ⊙ C_j ) )        at the position of the block's first token
//! ```
//!
//! over its `m` tokens (heavily compressed attention), or over `2 m`: where tokens contribute two series, the first series
//! of the block before and the second of its own (sparse attention and its indexer). The first block has none before it.

use berth_kernels::Linear;

use super::{
    super::{linear::Source, norm::Norm, rope::Rope},
    cache::{BlockShape, Blocks},
};
use crate::{
    error::{ModelError, StepError},
    model::{linear::apply, maths::add},
};

/// Makes entries of one kind in one layer.
#[derive(Debug)]
pub(crate) struct Compressor {
    shape: BlockShape,
    /// `W_kv`: [series · width, hidden].
    values: Linear,
    /// `W_z`: the same shape.
    gates: Linear,
    /// `B`, `ape` in checkpoints: [ratio × series · width].
    bias: Vec<f32>,
    norm: Norm,
}

/// Contributions of a step's rows: [T × series · width] each.
#[derive(Debug)]
pub(crate) struct Contributions {
    values: Vec<f32>,
    gates: Vec<f32>,
}

impl Compressor {
    /// Loads the compressor under `prefix` (`layers.N.attn.compressor`).
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub(crate) fn load(
        source: &Source<'_>,
        prefix: &str,
        shape: BlockShape,
        hidden: usize,
        epsilon: f32,
    ) -> Result<Self, ModelError> {
        let token = shape.token();
        let norm = source.vector(&format!("{prefix}.norm.weight"), shape.width)?;
        Ok(Self {
            shape,
            values: source.linear(&format!("{prefix}.wkv.weight"), token, hidden)?,
            gates: source.linear(&format!("{prefix}.wgate.weight"), token, hidden)?,
            bias: source.vector(&format!("{prefix}.ape"), shape.ratio * token)?,
            norm: Norm::new(norm, epsilon),
        })
    }

    /// What the rows `x` ([T × hidden]) contribute.
    ///
    /// # Errors
    /// Too little memory.
    pub(crate) fn contribute(&self, x: &[f32], rows: usize) -> Result<Contributions, StepError> {
        Ok(Contributions { values: apply(&self.values, x, rows)?, gates: apply(&self.gates, x, rows)? })
    }

    /// Adds `count` rows of a step, from row `first`, to the blocks of their sequence, and closes those that are full.
    pub(crate) fn append(&self, blocks: &mut Blocks, all: &Contributions, first: usize, count: usize, rope: &Rope) {
        blocks.reserve();
        let token = self.shape.token();
        let rows = first * token..(first + count) * token;
        let values = all.values[rows.clone()].chunks_exact(token);
        let gates = all.gates[rows].chunks_exact(token);
        for (value, gate) in values.zip(gates) {
            let at = blocks.open.len();
            blocks.open.extend_from_slice(value);
            blocks.gates.extend_from_slice(gate);
            add(&mut blocks.gates[at..], &self.bias[at..at + token]);
            if blocks.open.len() == self.bias.len() {
                self.close(blocks, rope);
            }
        }
    }

    fn close(&self, blocks: &mut Blocks, rope: &Rope) {
        let BlockShape { ratio, width, series } = self.shape;
        let own = (series - 1) * width;
        let mut entry = vec![0.0; width];
        for (feature, out) in entry.iter_mut().enumerate() {
            // Token by token: the series of the block before, then this block's own.
            let before = blocks.before.chunks_exact(width).zip(blocks.before_gates.chunks_exact(width));
            let now = blocks.open.chunks_exact(series * width).zip(blocks.gates.chunks_exact(series * width));
            let before = before.map(|(value, gate)| (value[feature], gate[feature]));
            let now = now.map(|(value, gate)| (value[own + feature], gate[own + feature]));
            *out = weighted(before.chain(now));
        }
        self.norm.apply_in_place(&mut entry);
        rope.angles(blocks.count() * ratio).turn_neighbours(&mut entry);
        blocks.entries.extend_from_slice(&entry);
        if series == 2 {
            for (kept, all) in [(&mut blocks.before, &blocks.open), (&mut blocks.before_gates, &blocks.gates)] {
                kept.clear();
                kept.reserve_exact(ratio * width);
                all.chunks_exact(series * width).for_each(|row| kept.extend_from_slice(&row[..width]));
            }
        }
        blocks.open.clear();
        blocks.gates.clear();
    }
}

/// `Σ softmax(gate) · value`, in the order given.
fn weighted(pairs: impl Iterator<Item = (f32, f32)> + Clone) -> f32 {
    let max = pairs.clone().map(|(_, gate)| gate).fold(f32::NEG_INFINITY, f32::max);
    let (mut sum, mut total) = (0.0_f32, 0.0_f32);
    for (value, gate) in pairs {
        let weight = (gate - max).exp();
        sum += weight * value;
        total += weight;
    }
    sum / total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weighted_sum_is_that_of_softmax() {
        let value = weighted([(1.0, 0.0), (3.0, 3.0_f32.ln())].into_iter());
        assert!((value - 2.5).abs() < 1e-6, "{value}");
        assert_eq!(weighted([(7.0, 1000.0), (1.0, -1000.0)].into_iter()), 7.0);
    }
}
