//! The gated feed-forward block that every token passes through (SwiGLU, arXiv 2002.05202):
//! `down( silu(gate x) ⊙ up x )`. Dense layers are one of these, and so are a layer's shared experts together.

use berth_kernels::Linear;

use super::{
    linear::{Source, apply},
    maths::silu,
};
use crate::error::{ModelError, StepError};

/// One block: gate and up are [width, hidden], down is [hidden, width].
#[derive(Debug)]
pub(crate) struct Dense {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Dense {
    /// Loads the block under `prefix`.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub(crate) fn load(source: &Source<'_>, prefix: &str, hidden: usize, width: usize) -> Result<Self, ModelError> {
        Ok(Self {
            gate: source.linear(&format!("{prefix}.gate_proj.weight"), width, hidden)?,
            up: source.linear(&format!("{prefix}.up_proj.weight"), width, hidden)?,
            down: source.linear(&format!("{prefix}.down_proj.weight"), hidden, width)?,
        })
    }

    /// The block's output for `rows` rows of `x` ([rows × hidden]).
    ///
    /// # Errors
    /// Too little memory.
    pub(crate) fn forward(&self, x: &[f32], rows: usize) -> Result<Vec<f32>, StepError> {
        let mut inner = apply(&self.gate, x, rows)?;
        for (gate, up) in inner.iter_mut().zip(apply(&self.up, x, rows)?) {
            *gate = silu(*gate) * up;
        }
        apply(&self.down, &inner, rows)
    }
}
