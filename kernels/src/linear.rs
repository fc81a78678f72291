//! A plain matrix product for the non-expert maths: y = W x, weights packed as stored.
//!
//! Same tiles, same order of sums and the same promise as the CPU backend: a row's bits depend on that row alone.

use rayon::prelude::*;

use crate::cpu::packed::PackedMatrix;
use crate::cpu::simd::{LANES, Lane, Level, Simd};
use crate::cpu::tile::multiply;
use crate::error::{KernelError, check_len, zeroed};
use crate::format::StoredMatrix;

/// Below this many multiply-adds a product stays on the caller's thread.
const ALONE: usize = 1 << 20;

/// A packed [rows × cols] matrix.
#[derive(Debug)]
pub struct Linear {
    matrix: PackedMatrix,
    simd: Simd,
}

impl Linear {
    /// Packs a stored matrix of any format.
    ///
    /// # Errors
    /// `Memory` if it does not fit.
    pub fn from_stored(stored: &StoredMatrix) -> Result<Self, KernelError> {
        Self::at_level(stored, Level::detect())
    }

    /// As [`Linear::from_stored`], with the highest instruction set to use.
    ///
    /// # Errors
    /// `Memory` if it does not fit.
    pub fn at_level(stored: &StoredMatrix, level: Level) -> Result<Self, KernelError> {
        Ok(Self { matrix: PackedMatrix::pack(stored)?, simd: Simd::at_most(level) })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.matrix.rows()
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.matrix.cols()
    }

    /// Bytes it holds.
    pub fn bytes(&self) -> u64 {
        self.matrix.bytes()
    }

    /// `out[t] = W x[t]` for T rows: `x` is [T × cols], `out` [T × rows], overwritten.
    ///
    /// Large products use the current rayon pool.
    ///
    /// # Errors
    /// `Length` if the buffers do not match, `Memory` if there is none for the result.
    pub fn apply(&self, x: &[f32], out: &mut [f32]) -> Result<(), KernelError> {
        let (rows, cols) = (self.rows(), self.cols());
        let count = x.len() / cols;
        check_len("x", x.len(), count * cols, || format!("a whole number of rows of {cols}"))?;
        check_len("out", out.len(), count * rows, || format!("{count} rows of {rows}"))?;
        if count == 0 {
            return Ok(());
        }
        let mut blocks: Vec<f32> = zeroed("a product", self.matrix.tiles() * count * LANES)?;
        let tile = |(tile, block): (usize, &mut [f32])| self.apply_tile(tile, x, block.as_chunks_mut::<LANES>().0);
        if count.saturating_mul(rows).saturating_mul(cols) > ALONE {
            blocks.par_chunks_exact_mut(count * LANES).enumerate().for_each(tile);
        } else {
            blocks.chunks_exact_mut(count * LANES).enumerate().for_each(tile);
        }
        for (t, out) in out.chunks_exact_mut(rows).enumerate() {
            for (tile, out) in out.chunks_mut(LANES).enumerate() {
                out.copy_from_slice(&blocks[(tile * count + t) * LANES..][..out.len()]);
            }
        }
        Ok(())
    }

    fn apply_tile(&self, tile: usize, x: &[f32], acc: &mut [Lane]) {
        let cols = self.cols();
        multiply(self.simd, &self.matrix, tile, acc, |t, start, end| &x[t * cols..][start..end]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_is_the_product() {
        let weights: Vec<f32> = (0..6u8).map(f32::from).collect();
        let linear = Linear::from_stored(&StoredMatrix::from_f32(2, 3, &weights).unwrap()).unwrap();
        let mut out = [9.0; 4];
        linear.apply(&[1.0, 2.0, 3.0, 0.0, 0.0, 1.0], &mut out).unwrap();
        assert_eq!(out, [8.0, 26.0, 2.0, 5.0]);
        assert_eq!((linear.rows(), linear.cols()), (2, 3));
    }

    #[test]
    fn buffers_of_the_wrong_length_are_refused() {
        let linear = Linear::from_stored(&StoredMatrix::from_f32(2, 3, &[0.0; 6]).unwrap()).unwrap();
        assert!(linear.apply(&[0.0; 4], &mut [0.0; 2]).is_err());
        assert!(linear.apply(&[0.0; 3], &mut [0.0; 3]).is_err());
        linear.apply(&[], &mut []).unwrap();
    }
}
