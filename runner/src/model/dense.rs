//! The gated feed-forward block that every token passes through (SwiGLU, arXiv 2002.05202):
//! `down( silu(gate x) ⊙ up x )`. Dense layers are one of these, and so are a layer's shared experts together.
//!
//! V4 bounds both factors first, `gate ≤ L` and `-L ≤ up ≤ L` (`swiglu_limit`).

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
    limit: Option<f32>,
}

impl Dense {
    /// Names of gate, up and down in V3's checkpoints.
    pub(crate) const V3: [&'static str; 3] = ["gate_proj", "up_proj", "down_proj"];
    /// The same in V4's.
    pub(crate) const V4: [&'static str; 3] = ["w1", "w3", "w2"];

    /// Loads the block under `prefix`.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub(crate) fn load(
        source: &Source<'_>,
        prefix: &str,
        [gate, up, down]: [&str; 3],
        (hidden, width): (usize, usize),
        limit: Option<f32>,
    ) -> Result<Self, ModelError> {
        Ok(Self {
            gate: source.linear(&format!("{prefix}.{gate}.weight"), width, hidden)?,
            up: source.linear(&format!("{prefix}.{up}.weight"), width, hidden)?,
            down: source.linear(&format!("{prefix}.{down}.weight"), hidden, width)?,
            limit,
        })
    }

    /// The block's output for `rows` rows of `x` ([rows × hidden]).
    ///
    /// # Errors
    /// Too little memory.
    pub(crate) fn forward(&self, x: &[f32], rows: usize) -> Result<Vec<f32>, StepError> {
        let mut inner = apply(&self.gate, x, rows)?;
        for (gate, mut up) in inner.iter_mut().zip(apply(&self.up, x, rows)?) {
            if let Some(limit) = self.limit {
                // Comparisons, not `min`: a NaN stays one.
                *gate = if *gate > limit { limit } else { *gate };
                up = up.clamp(-limit, limit);
            }
            *gate = silu(*gate) * up;
        }
        apply(&self.down, &inner, rows)
    }
}
