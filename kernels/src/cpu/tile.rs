//! One tile of a matrix times many rows: the only place where weights meet activations.
//!
//! Sums run over chunks of 128 columns in order, so the bits of a row's result depend on the matrix and that row alone.

use super::packed::{CHUNK, PackedMatrix};
use super::simd::{LANES, Lane, MAX_ROWS, Simd};

/// `acc[t][r] += Σ_k x(t)[k] · matrix[32·tile + r][k]`.
///
/// `x(t, start, end)` gives columns `start..end` of row t; `start` is a multiple of 128 and `end - start` at most 128.
pub(crate) fn multiply<'x>(
    simd: Simd,
    matrix: &PackedMatrix,
    tile: usize,
    acc: &mut [Lane],
    x: impl Fn(usize, usize, usize) -> &'x [f32],
) {
    let mut decoded = [0.0f32; CHUNK * LANES];
    let rows = simd.level().rows().min(MAX_ROWS);
    for start in (0..matrix.cols()).step_by(CHUNK) {
        let end = matrix.cols().min(start + CHUNK);
        let weights = &mut decoded[..(end - start) * LANES];
        matrix.decode(simd, tile, start, end, weights);
        for (block, acc) in acc.chunks_mut(rows).enumerate() {
            let mut xs: [&[f32]; MAX_ROWS] = [&[]; MAX_ROWS];
            for (i, slot) in xs.iter_mut().enumerate().take(acc.len()) {
                *slot = x(block * rows + i, start, end);
            }
            simd.accumulate(weights, &xs[..acc.len()], acc);
        }
    }
}
