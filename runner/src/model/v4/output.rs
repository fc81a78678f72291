//! The grouped output projection (V4's paper, §2.3.1): the heads' outputs are far wider than the residual, so they are
//! divided into `groups` of neighbouring heads, each is brought to `group_rank` features by a matrix of its own, and one
//! matrix brings all of them to `hidden`:
//!
//! ```text
//! y = W_b · concat_g( W_a[g] · heads of group g )
//! ```

use berth_kernels::Linear;

use super::{super::linear::Source, config::V4Config};
use crate::{
    error::{ModelError, StepError},
    model::linear::apply,
};

/// One layer's output projection.
#[derive(Debug)]
pub(crate) struct GroupedOutput {
    /// By group: [group_rank, heads / groups × head].
    groups: Vec<Linear>,
    /// [hidden, groups × group_rank].
    join: Linear,
}

impl GroupedOutput {
    /// Loads `wo_a` and `wo_b` under `prefix` (`layers.N.attn`).
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub(crate) fn load(source: &Source<'_>, prefix: &str, config: &V4Config) -> Result<Self, ModelError> {
        let shape = &config.attention;
        let (rank, width) = (shape.group_rank, shape.heads / shape.groups * shape.head);
        Ok(Self {
            groups: source.stacked(&format!("{prefix}.wo_a.weight"), shape.groups, rank, width)?,
            join: source.linear(&format!("{prefix}.wo_b.weight"), config.hidden, shape.groups * rank)?,
        })
    }

    /// [T × hidden] of the heads' outputs `x`, [T × heads × head].
    ///
    /// # Errors
    /// Too little memory.
    pub(crate) fn forward(&self, x: &[f32], rows: usize) -> Result<Vec<f32>, StepError> {
        let rank = self.groups.first().map_or(0, Linear::rows);
        let width = self.groups.first().map_or(0, Linear::cols);
        let joined = self.join.cols();
        let mut parts = vec![0.0; rows * joined];
        let mut own = Vec::with_capacity(rows * width);
        for (at, group) in self.groups.iter().enumerate() {
            own.clear();
            x.chunks_exact(self.groups.len() * width)
                .for_each(|row| own.extend_from_slice(&row[at * width..][..width]));
            let out = apply(group, &own, rows)?;
            for (part, out) in parts.chunks_exact_mut(joined).zip(out.chunks_exact(rank)) {
                part[at * rank..][..rank].copy_from_slice(out);
            }
        }
        apply(&self.join, &parts, rows)
    }
}
