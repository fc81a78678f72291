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
            let mean = dot(row, row) / f32_of(self.gain.len());
            let scale = 1.0 / (mean + self.epsilon).sqrt();
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
