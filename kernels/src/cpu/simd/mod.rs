//! The inner loops, once per instruction set, chosen at run time.
//!
//! Every level computes the same bits: a tile of 32 output rows is 32 lanes, each lane one chain of fused
//! multiply-adds over rising columns, and every decoded weight is its code times its scale, rounded once. So a node's
//! answers do not depend on its processor, and the portable level is the test of the others.
//! This file holds no unsafe arithmetic: it checks lengths, then calls a level.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

/// Output rows of one tile.
pub(crate) const LANES: usize = 32;

/// One value per output row of a tile.
pub(crate) type Lane = [f32; LANES];

/// Rows of activations that one call of [`Level::accumulate`] takes at most.
pub(crate) const MAX_ROWS: usize = 8;

/// An instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Plain Rust.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F and BW.
    Avx512,
}

impl Level {
    /// The best level of this processor.
    pub fn detect() -> Self {
        Self::supported().into_iter().max().unwrap_or(Self::Portable)
    }

    /// Every level that this processor can run.
    pub fn supported() -> Vec<Self> {
        let mut levels = vec![Self::Portable];
        levels.extend(Self::vectors());
        levels
    }

    #[cfg(not(target_arch = "x86_64"))]
    const fn vectors() -> [Self; 0] {
        []
    }

    #[cfg(target_arch = "x86_64")]
    fn vectors() -> Vec<Self> {
        let avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let avx512 = avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        [(avx2, Self::Avx2), (avx512, Self::Avx512)]
            .into_iter()
            .filter_map(|(has, level)| has.then_some(level))
            .collect()
    }

    /// Rows of activations that fill this level's registers.
    pub(crate) fn rows(self) -> usize {
        match self {
            Self::Portable => 2,
            Self::Avx2 => 3,
            Self::Avx512 => 8,
        }
    }
}

/// A level that was checked against the processor: the proof that its instructions may run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Simd(Level);

impl Simd {
    /// The wanted level, or the best this processor has below it.
    pub(crate) fn at_most(wanted: Level) -> Self {
        Self(Level::supported().into_iter().filter(|l| *l <= wanted).max().unwrap_or(Level::Portable))
    }

    pub(crate) fn level(self) -> Level {
        self.0
    }

    /// `acc[t][r] += Σ_k x[t][k] · w[k][r]`: `w` is [K × 32], each of `xs` at least K long, at most [`MAX_ROWS`] of them.
    ///
    /// The sum starts from zero and is added to `acc` once, so its bits depend on K and the values alone.
    pub(crate) fn accumulate(self, w: &[f32], xs: &[&[f32]], acc: &mut [Lane]) {
        let k = w.len() / LANES;
        assert!(xs.len() == acc.len() && xs.iter().all(|x| x.len() >= k), "activation rows shorter than their weights");
        match self.0 {
            Level::Portable => portable::accumulate(w, xs, acc),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2::accumulate(w, xs, acc),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => avx512::accumulate(w, xs, acc),
            #[cfg(not(target_arch = "x86_64"))]
            _ => portable::accumulate(w, xs, acc),
        }
    }

    /// Little-endian bfloat16 to `f32`.
    pub(crate) fn decode_bf16(self, codes: &[u8], out: &mut [f32]) {
        assert_eq!(codes.len(), out.len() * 2, "two bytes a value");
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 => avx2::decode_bf16(codes, out),
            _ => portable::decode_bf16(codes, out),
        }
    }

    /// E4M3 times the lane's scale. `nan` says that a NaN code may be among them.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(unused_variables, reason = "portable code decodes NaN like any code")
    )]
    pub(crate) fn decode_e4m3(self, codes: &[u8], scale: &Lane, nan: bool, out: &mut [f32]) {
        assert_eq!(codes.len(), out.len(), "one byte a value");
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 if !nan => avx2::decode_e4m3(codes, scale, out),
            _ => portable::decode_e4m3(codes, scale, out),
        }
    }

    /// Signed bytes times the lane's scale.
    pub(crate) fn decode_int8(self, codes: &[u8], scale: &Lane, out: &mut [f32]) {
        assert_eq!(codes.len(), out.len(), "one byte a value");
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 => avx2::decode_int8(codes, scale, out),
            _ => portable::decode_int8(codes, scale, out),
        }
    }

    /// Nibbles looked up in `table`, times the lane's scale. Byte r of 32 holds lane r of an even column (low nibble)
    /// and of the next (high nibble); a last column without partner leaves the high nibbles unread.
    pub(crate) fn decode_nibbles(self, codes: &[u8], table: &[i8; 16], scale: &Lane, out: &mut [f32]) {
        assert_eq!(codes.len() / LANES, (out.len() / LANES).div_ceil(2), "two columns a byte");
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 => avx2::decode_nibbles(codes, table, scale, out),
            _ => portable::decode_nibbles(codes, table, scale, out),
        }
    }

    /// Runs `rounds` rounds of independent multiply-adds in registers; the floating point operations done, and a value
    /// that depends on all of them.
    pub(crate) fn spin(self, rounds: u64) -> (u64, f32) {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => avx512::spin(rounds),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2::spin(rounds),
            _ => portable::spin(rounds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_level_sums_to_the_same_bits_for_any_number_of_rows() {
        let mut random = crate::bench::Random(5);
        for columns in [1, 7, 128] {
            let w: Vec<f32> = (0..columns * LANES).map(|_| random.unit()).collect();
            let x: Vec<Vec<f32>> = (0..MAX_ROWS).map(|_| (0..columns).map(|_| random.unit()).collect()).collect();
            for rows in 0..=MAX_ROWS {
                let xs: Vec<&[f32]> = x[..rows].iter().map(Vec::as_slice).collect();
                let run = |level| {
                    let mut acc = vec![[0.25f32; LANES]; rows];
                    Simd::at_most(level).accumulate(&w, &xs, &mut acc);
                    acc.iter().flatten().map(|v| v.to_bits()).collect::<Vec<_>>()
                };
                for level in Level::supported() {
                    assert_eq!(run(level), run(Level::Portable), "{level:?}, {columns} columns, {rows} rows");
                }
            }
        }
    }

    #[test]
    fn a_level_above_the_processors_is_never_used() {
        assert!(Level::supported().contains(&Simd::at_most(Level::Avx512).level()));
        assert_eq!(Simd::at_most(Level::Portable).level(), Level::Portable);
    }

    #[test]
    #[should_panic(expected = "activation rows shorter")]
    fn short_rows_are_caught_before_any_load() {
        Simd::at_most(Level::detect()).accumulate(&[0.0; 4 * LANES], &[&[0.0; 3]], &mut [[0.0; LANES]]);
    }
}
