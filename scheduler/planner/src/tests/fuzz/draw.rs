//! Numbers that look random and are the same in every run, and token counts of the kinds that traffic has. Judges
//! nothing.

use crate::{experts::dice::Dice, num};

/// A seeded source.
pub(super) struct Draw(Dice);

impl Draw {
    pub(super) fn new(seed: u64) -> Self {
        Self(Dice(seed.wrapping_mul(0xD134_2543_DE82_EF95)))
    }

    /// From `from` to `to`, both included.
    pub(super) fn size(&mut self, from: usize, to: usize) -> usize {
        from + self.0.below(to - from + 1)
    }

    pub(super) fn one_in(&mut self, of: usize) -> bool {
        self.size(1, of) == 1
    }

    pub(super) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.size(0, of.len() - 1)]
    }

    /// From 0 to below 1.
    pub(super) fn unit(&mut self) -> f64 {
        self.0.unit()
    }

    /// Tokens of a layer's experts.
    pub(super) fn tokens(&mut self, experts: usize) -> Vec<u64> {
        let skew = self.pick(&[0.0, 0.3, 0.8, 1.6, 3.0]);
        let hot = self.size(0, experts - 1);
        let kind = self.size(0, 9);
        let tokens = |draw: &mut Self, at: usize| match kind {
            0 => 0,
            1 => num::count(usize::from(at == hot)) * 100_000,
            2 => 7,
            3 if at == hot => u64::MAX / 4,
            4 if draw.one_in(2) => 0,
            _ => {
                let normal = (0..12).map(|_| draw.unit()).sum::<f64>() - 6.0;
                num::count(num::ceil((normal * skew).exp() * 1000.0))
            }
        };
        (0..experts).map(|at| tokens(self, at)).collect()
    }
}
