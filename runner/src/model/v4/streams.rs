//! Manifold-constrained hyper-connections (mHC; arXiv 2512.24880, and V4's paper, §2.2): a layer's residual is `n`
//! parallel streams instead of one. Per token, from the `n · hidden` features `X` of all streams and
//! `H = W · X / rms(X)`:
//!
//! ```text
//! pre  = sigmoid(α₁ H₁ + b₁) + ε          [n]        what the block reads:    x = Σ preᵢ Xᵢ
//! post = 2 sigmoid(α₂ H₂ + b₂)            [n]        where its output goes:   X'ⱼ = postⱼ · block(x) + Σ combᵢⱼ Xᵢ
//! comb = sinkhorn(softmax(α₃ H₃ + b₃)+ε)  [n × n]    how streams mix: doubly stochastic, so that nothing grows
//! ```
//!
//! Sinkhorn and Knopp's rounds divide rows and columns by their sums in turn, columns first and last. After the last
//! layer the streams are read once more in the manner of `pre`, with weights of their own.

use berth_kernels::Linear;
use rayon::prelude::*;

use super::{super::linear::Source, config::V4Config};
use crate::{
    error::{ModelError, StepError},
    model::{
        linear::apply,
        maths::{add_scaled, sigmoid, softmax},
        norm::unit,
    },
};

/// The connection of one block (attention, or experts) to the streams.
#[derive(Debug)]
pub(crate) struct HyperConnection {
    /// [(2 + n) · n, n · hidden].
    weights: Linear,
    /// [(2 + n) · n].
    base: Vec<f32>,
    /// Of pre, post and comb.
    scale: Vec<f32>,
    streams: usize,
    rounds: usize,
    epsilon: f32,
    norm_epsilon: f32,
}

/// How one block's output goes back into the streams of each row.
#[derive(Debug)]
pub(crate) struct Mix {
    /// [T × n].
    post: Vec<f32>,
    /// [T × n × n], from stream, to stream.
    comb: Vec<f32>,
}

impl HyperConnection {
    /// Loads the connection under `prefix` (`layers.N.hc_attn`).
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub(crate) fn load(source: &Source<'_>, prefix: &str, config: &V4Config) -> Result<Self, ModelError> {
        let streams = config.streams.count;
        let outputs = (2 + streams) * streams;
        Ok(Self {
            weights: source.linear(&format!("{prefix}_fn"), outputs, streams * config.hidden)?,
            base: source.vector(&format!("{prefix}_base"), outputs)?,
            scale: source.vector(&format!("{prefix}_scale"), 3)?,
            streams,
            rounds: config.streams.rounds,
            epsilon: config.streams.epsilon,
            norm_epsilon: config.epsilon,
        })
    }

    /// What the block reads ([T × hidden]) of the streams `x` ([T × n · hidden]), and how its output goes back.
    ///
    /// # Errors
    /// Too little memory.
    pub(crate) fn enter(&self, x: &[f32], rows: usize) -> Result<(Vec<f32>, Mix), StepError> {
        let n = self.streams;
        let coefficients = coefficients(&self.weights, x, rows, self.norm_epsilon)?;
        let mut pre = Vec::with_capacity(rows * n);
        let mut mix = Mix { post: Vec::with_capacity(rows * n), comb: Vec::with_capacity(rows * n * n) };
        for row in coefficients.chunks_exact(self.base.len()) {
            let value = |at: usize, part: usize| row[at] * self.scale[part] + self.base[at];
            pre.extend((0..n).map(|at| sigmoid(value(at, 0)) + self.epsilon));
            mix.post.extend((n..2 * n).map(|at| 2.0 * sigmoid(value(at, 1))));
            let start = mix.comb.len();
            mix.comb.extend((2 * n..row.len()).map(|at| value(at, 2)));
            sinkhorn(&mut mix.comb[start..], n, self.rounds, self.epsilon);
        }
        Ok((collapse(x, &pre, rows, n), mix))
    }

    /// The streams after the block: `out` is the block's output, [T × hidden].
    pub(crate) fn leave(&self, x: &mut [f32], out: &[f32], mix: &Mix) {
        let n = self.streams;
        let hidden = out.len() / (mix.post.len() / n).max(1);
        let rows = x.par_chunks_exact_mut(n * hidden).zip(out.par_chunks_exact(hidden));
        rows.zip(mix.post.par_chunks_exact(n).zip(mix.comb.par_chunks_exact(n * n))).for_each(
            |((x, out), (post, comb))| {
                let mut next = vec![0.0; x.len()];
                for (to, next) in next.chunks_exact_mut(hidden).enumerate() {
                    for (from, stream) in x.chunks_exact(hidden).enumerate() {
                        add_scaled(next, comb[from * n + to], stream);
                    }
                    add_scaled(next, post[to], out);
                }
                x.copy_from_slice(&next);
            },
        );
    }
}

/// Reads the streams after the last layer.
#[derive(Debug)]
pub(crate) struct StreamsHead {
    /// [n, n · hidden].
    weights: Linear,
    /// [n].
    base: Vec<f32>,
    scale: f32,
    epsilon: f32,
    norm_epsilon: f32,
}

impl StreamsHead {
    /// Loads it.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub(crate) fn load(source: &Source<'_>, config: &V4Config) -> Result<Self, ModelError> {
        let streams = config.streams.count;
        Ok(Self {
            weights: source.linear("hc_head_fn", streams, streams * config.hidden)?,
            base: source.vector("hc_head_base", streams)?,
            scale: source.vector("hc_head_scale", 1)?[0],
            epsilon: config.streams.epsilon,
            norm_epsilon: config.epsilon,
        })
    }

    /// One row of `hidden` features for each row of streams.
    ///
    /// # Errors
    /// Too little memory.
    pub(crate) fn collapse(&self, x: &[f32], rows: usize) -> Result<Vec<f32>, StepError> {
        let n = self.base.len();
        let mut pre = coefficients(&self.weights, x, rows, self.norm_epsilon)?;
        for row in pre.chunks_exact_mut(n) {
            for (value, base) in row.iter_mut().zip(&self.base) {
                *value = sigmoid(*value * self.scale + base) + self.epsilon;
            }
        }
        Ok(collapse(x, &pre, rows, n))
    }
}

/// `W · X / rms(X)` of every row. The norm has no gain, so it may come after the product.
fn coefficients(weights: &Linear, x: &[f32], rows: usize, epsilon: f32) -> Result<Vec<f32>, StepError> {
    let mut out = apply(weights, x, rows)?;
    for (out, x) in out.chunks_exact_mut(weights.rows()).zip(x.chunks_exact(weights.cols())) {
        let scale = unit(x, epsilon);
        out.iter_mut().for_each(|value| *value *= scale);
    }
    Ok(out)
}

/// `Σ preᵢ Xᵢ` of every row.
fn collapse(x: &[f32], pre: &[f32], rows: usize, streams: usize) -> Vec<f32> {
    let hidden = x.len() / (rows * streams).max(1);
    let mut out = vec![0.0; rows * hidden];
    for ((out, x), pre) in
        out.chunks_exact_mut(hidden).zip(x.chunks_exact(streams * hidden)).zip(pre.chunks_exact(streams))
    {
        for (stream, pre) in x.chunks_exact(hidden).zip(pre) {
            add_scaled(out, *pre, stream);
        }
    }
    out
}

/// Makes `matrix` ([n × n], logits) doubly stochastic.
fn sinkhorn(matrix: &mut [f32], n: usize, rounds: usize, epsilon: f32) {
    for row in matrix.chunks_exact_mut(n) {
        softmax(row);
        row.iter_mut().for_each(|value| *value += epsilon);
    }
    divide_columns(matrix, n, epsilon);
    for _ in 1..rounds {
        for row in matrix.chunks_exact_mut(n) {
            let sum = row.iter().sum::<f32>() + epsilon;
            row.iter_mut().for_each(|value| *value /= sum);
        }
        divide_columns(matrix, n, epsilon);
    }
}

fn divide_columns(matrix: &mut [f32], n: usize, epsilon: f32) {
    for col in 0..n {
        let sum = (0..n).map(|row| matrix[row * n + col]).sum::<f32>() + epsilon;
        (0..n).for_each(|row| matrix[row * n + col] /= sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rows_and_columns_of_any_mix_sum_to_one(logits in proptest::collection::vec(-6.0_f32..6.0, 16)) {
            let mut matrix = logits;
            sinkhorn(&mut matrix, 4, 60, 1e-6);
            for at in 0..4 {
                let row: f32 = matrix[at * 4..][..4].iter().sum();
                let col: f32 = (0..4).map(|row| matrix[row * 4 + at]).sum();
                prop_assert!((row - 1.0).abs() < 2e-2 && (col - 1.0).abs() < 1e-4, "{row} {col}");
            }
        }
    }

    #[test]
    fn the_first_round_divides_columns_only() {
        let mut matrix = [0.0, 0.0, 3.0_f32.ln(), 0.0];
        sinkhorn(&mut matrix, 2, 1, 0.0);
        let expected = [0.5 / 1.25, 0.5 / 0.75, 0.75 / 1.25, 0.25 / 0.75];
        assert!(matrix.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{matrix:?}");
    }
}
