//! Root mean square normalisation (arXiv 1910.07467, eq. 4): `y = x / sqrt(mean(x²) + ε) · g`.
//!
//! The sum of squares runs over fixed lanes in index order, so a row's result never depends on other rows.

use super::maths::dot;
use crate::num::f32_of;

/// The gain `g` of one normalisation and its `ε`.
#[derive(Debug)]
pub(crate) struct Norm {
    gain: Vec<f32>,
    epsilon: f32,
}

impl Norm {
    /// `gain` has one entry per feature.
    pub(crate) fn new(gain: Vec<f32>, epsilon: f32) -> Self {
        Self { gain, epsilon }
    }

    /// Features of a row.
    pub(crate) fn width(&self) -> usize {
        self.gain.len()
    }

    /// Normalises each row of `x` ([T × width]) in place.
    pub(crate) fn apply_in_place(&self, x: &mut [f32]) {
        for row in x.chunks_exact_mut(self.gain.len().max(1)) {
            let scale = unit(row, self.epsilon);
            for (value, gain) in row.iter_mut().zip(&self.gain) {
                *value = *gain * (*value * scale);
            }
        }
    }

    /// Normalised copy of `x` ([T × width]).
    pub(crate) fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut y = x.to_vec();
        self.apply_in_place(&mut y);
        y
    }
}

/// `1 / sqrt(mean(x²) + ε)` of one row: what it is multiplied with to have unit mean square.
pub(crate) fn unit(row: &[f32], epsilon: f32) -> f32 {
    1.0 / (dot(row, row) / f32_of(row.len().max(1)) + epsilon).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_gets_unit_mean_square_times_gain() {
        let norm = Norm::new(vec![1.0, 2.0], 0.0);
        let y = norm.apply(&[3.0, 3.0, 0.5, -0.5]);
        assert_eq!(y, [1.0, 2.0, 1.0, -2.0]);
    }
}
