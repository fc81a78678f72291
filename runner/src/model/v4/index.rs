//! The lightning indexer of sparse attention (V4's paper, §2.3.1, eq. 13–17): which entries a query sees. With index keys
//! `K` (entries of a compressor of its own, `index_head_dim` wide) and index queries `q` made from the compressed query:
//!
//! ```text
//! score(s) = Σ_h w_h · relu( q_h · K_s / √d ) / √heads          kept: the top_k best closed entries
//! ```
//!
//! Ties fall as `ties` says. A query with no more than `top_k` closed entries sees all of them; then nothing is scored.

use berth_kernels::Linear;
use rayon::prelude::*;

use super::{
    super::{linear::Source, rope::Angles},
    cache::Blocks,
    config::{IndexConfig, V4Config},
    ties::settle,
};
use crate::{
    error::{ModelError, StepError},
    model::{linear::apply, maths::dot},
    num::{f32_near, f64_of, u32_of, usize_of},
};

/// One layer's indexer, its compressor aside.
#[derive(Debug)]
pub(crate) struct Indexer {
    shape: IndexConfig,
    /// [heads × head, query_rank].
    queries: Linear,
    /// [heads, hidden].
    weights: Linear,
    scale: f32,
}

/// One row that asks: how many entries are closed before it, and its sequence's index keys.
pub(crate) struct Asking<'a> {
    pub(crate) closed: usize,
    pub(crate) keys: &'a Blocks,
}

impl Indexer {
    /// Loads the indexer under `prefix` (`layers.N.attn.indexer`).
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub(crate) fn load(
        source: &Source<'_>,
        prefix: &str,
        shape: IndexConfig,
        config: &V4Config,
    ) -> Result<Self, ModelError> {
        let rank = config.attention.query_rank;
        Ok(Self {
            queries: source.linear(&format!("{prefix}.wq_b.weight"), shape.heads * shape.head, rank)?,
            weights: source.linear(&format!("{prefix}.weights_proj.weight"), shape.heads, config.hidden)?,
            scale: f32_near(1.0 / (f64_of(shape.head) * f64_of(shape.heads)).sqrt()),
            shape,
        })
    }

    /// The entries that each row sees, rising; `None` = all that are closed. `x` is [T × hidden], `latent` the compressed
    /// queries, [T × query_rank].
    ///
    /// # Errors
    /// Too little memory.
    pub(crate) fn choose(
        &self,
        x: &[f32],
        latent: &[f32],
        angles: &[Angles],
        asking: &[Asking<'_>],
    ) -> Result<Vec<Option<Vec<u32>>>, StepError> {
        if asking.iter().all(|row| row.closed <= self.shape.top_k) {
            return Ok(vec![None; asking.len()]);
        }
        let mut queries = apply(&self.queries, latent, asking.len())?;
        let weights = apply(&self.weights, x, asking.len())?;
        let IndexConfig { heads, head, .. } = self.shape;
        let rows = queries.par_chunks_exact_mut(heads * head).zip(weights.par_chunks_exact(heads));
        let chosen = rows.zip(angles).zip(asking).map(|(((query, weights), angles), asking)| {
            if asking.closed <= self.shape.top_k {
                return None;
            }
            query.chunks_exact_mut(head).for_each(|head| angles.turn_neighbours(head));
            let keys = &asking.keys.entries[..asking.closed * head];
            let score = |key| {
                let one = |(query, weight): (&[f32], &f32)| weight * dot(query, key).max(0.0);
                // Added to zero, so that no sign of zero breaks a tie.
                query.chunks_exact(head).zip(weights).map(one).fold(0.0, |sum: f32, one| sum + one) * self.scale
            };
            Some(best(&keys.chunks_exact(head).map(score).collect::<Vec<_>>(), self.shape.top_k))
        });
        Ok(chosen.collect())
    }
}

/// The `count` indices with the largest scores, rising. `count` is less than there are.
fn best(scores: &[f32], count: usize) -> Vec<u32> {
    let value = |at: &u32| scores[usize_of(*at)];
    let mut order: Vec<u32> = (0..u32_of(scores.len())).collect();
    order.select_nth_unstable_by(count - 1, |a, b| value(b).total_cmp(&value(a)).then(a.cmp(b)));
    let lost = order[count..].iter().map(value).fold(f32::NEG_INFINITY, f32::max);
    if value(&order[count - 1]) == lost
        && let Some(settled) = settle(scores, count)
    {
        return settled;
    }
    order.truncate(count);
    order.sort_unstable();
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_kept_in_the_order_of_their_blocks() {
        assert_eq!(best(&[0.0, 2.0, 1.0, 0.5, 3.0], 3), [1, 2, 4]);
        assert_eq!(best(&[-1.0, f32::NAN, -2.0], 1), [1]);
    }

    #[test]
    fn ties_beyond_many_entries_go_to_the_lowest() {
        assert_eq!(best(&[0.0; 640], 10), (0..10).collect::<Vec<_>>());
    }
}
