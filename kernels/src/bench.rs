//! How fast a backend runs the experts of a model's shape.
//!
//! Weights are random and few: a table of all the layer's experts points at as many distinct ones as exceed the caches,
//! so memory stays bounded while every expert that a batch names is really read from memory. It measures time, never
//! correctness; that is `conformance`.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::backend::{Backend, Batch, PackedExpert, StoredExpert};
use crate::error::KernelError;
use crate::format::{ScaleType, StoredFormat, StoredMatrix};
use crate::num::{f32_near, f64_of, f64_of_u64, low_u8, low_u32, u64_of};

/// Distinct experts hold at least this much together (and number at least two).
const RESIDENT: u64 = 384 << 20;

/// A layer's experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    /// Input and output features.
    pub hidden: usize,
    /// Inner features.
    pub width: usize,
    /// Routed experts of the layer.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// How their weights are stored.
    pub format: StoredFormat,
    /// Their swiglu limit.
    pub limit: Option<f32>,
}

/// One measured batch size.
#[derive(Debug, Clone, Serialize)]
pub struct Measurement {
    /// Rows in the batch, each with top_k experts drawn evenly.
    pub tokens: usize,
    /// Experts that received a row, on average.
    pub experts_used: f64,
    /// Median time of one layer's experts.
    pub seconds: f64,
    /// Calls measured.
    pub calls: usize,
    /// Rows through one layer's experts.
    pub tokens_per_s: f64,
    /// Multiply-adds counted as two.
    pub flops_per_s: f64,
    /// Packed weight bytes of the experts used.
    pub bytes_per_s: f64,
}

/// Experts of one shape, packed and ready to be timed.
#[derive(Debug)]
pub struct Bench<'a> {
    backend: &'a dyn Backend,
    shape: Shape,
    table: Vec<PackedExpert>,
    random: Random,
}

impl<'a> Bench<'a> {
    /// Draws and packs the experts.
    ///
    /// # Errors
    /// `Invalid` if a size is zero or top_k exceeds the experts; `Memory`.
    pub fn new(backend: &'a dyn Backend, shape: Shape) -> Result<Self, KernelError> {
        if shape.top_k == 0 || shape.top_k > shape.experts {
            return Err(KernelError::invalid("top_k", format!("is {} of {} experts", shape.top_k, shape.experts)));
        }
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut distinct = Vec::new();
        let mut bytes = 0;
        while distinct.len() < shape.experts && (bytes < RESIDENT || distinct.len() < 2) {
            let expert = backend.pack(&random_expert(shape, &mut random)?)?;
            bytes += expert.bytes();
            distinct.push(expert);
        }
        let table = (0..shape.experts).map(|e| distinct[e % distinct.len()].clone()).collect();
        Ok(Self { backend, shape, table, random })
    }

    /// Times batches of `tokens` rows for at least `span` and three calls, after one call to warm up.
    ///
    /// # Errors
    /// `Invalid` for no tokens; whatever the backend refuses.
    pub fn measure(&mut self, tokens: usize, span: Duration) -> Result<Measurement, KernelError> {
        if tokens == 0 {
            return Err(KernelError::invalid("tokens", "is 0: measure at least one"));
        }
        let (hidden, k) = (self.shape.hidden, self.shape.top_k);
        let rows: Vec<f32> = (0..tokens * hidden).map(|_| self.random.unit()).collect();
        let offsets: Vec<u32> = (0..=tokens).map(|t| low_u32(u64_of(t * k))).collect();
        let weights = vec![1.0 / f32_near(f64_of(k)); tokens * k];
        let mut out = vec![0.0; rows.len()];
        let (mut times, mut used) = (Vec::new(), 0);
        let begin = Instant::now();
        while times.len() < 4 || begin.elapsed() < span {
            let experts = self.random.draw(tokens, k, self.shape.experts);
            let mut distinct = experts.clone();
            distinct.sort_unstable();
            distinct.dedup();
            used += distinct.len();
            let batch = Batch {
                hidden,
                rows: &rows,
                offsets: &offsets,
                experts: &experts,
                weights: &weights,
                table: &self.table,
            };
            let start = Instant::now();
            self.backend.forward(&batch, &mut out)?;
            times.push(start.elapsed().as_secs_f64());
        }
        let experts_used = f64_of(used) / f64_of(times.len());
        times.remove(0);
        times.sort_by(f64::total_cmp);
        let seconds = times[times.len() / 2];
        let flops = 6.0 * f64_of(hidden) * f64_of(self.shape.width) * f64_of(tokens * k);
        let expert_bytes = self.table.first().map_or(0, PackedExpert::bytes);
        Ok(Measurement {
            tokens,
            experts_used,
            seconds,
            calls: times.len(),
            tokens_per_s: f64_of(tokens) / seconds,
            flops_per_s: flops / seconds,
            bytes_per_s: experts_used * f64_of_u64(expert_bytes) / seconds,
        })
    }
}

/// An expert of random codes whose values stay of order one.
fn random_expert(shape: Shape, random: &mut Random) -> Result<StoredExpert, KernelError> {
    let (hidden, width) = (shape.hidden, shape.width);
    Ok(StoredExpert {
        gate: random_matrix(width, hidden, shape.format, random)?,
        up: random_matrix(width, hidden, shape.format, random)?,
        down: random_matrix(hidden, width, shape.format, random)?,
        limit: shape.limit,
    })
}

fn random_matrix(
    rows: usize,
    cols: usize,
    format: StoredFormat,
    random: &mut Random,
) -> Result<StoredMatrix, KernelError> {
    let refuse = || KernelError::invalid("shape", format!("{rows}×{cols} as {format:?} does not fit memory"));
    let (data, scales) = format.sizes(rows, cols).ok_or_else(refuse)?;
    let small = 1.0 / f32_near(f64_of(cols).sqrt());
    let data: Vec<u8> = match format {
        StoredFormat::F32 => (0..data / 4).flat_map(|_| (random.unit() * small).to_le_bytes()).collect(),
        StoredFormat::Bf16 => {
            (0..data / 2).flat_map(|_| half::bf16::from_f32(random.unit() * small).to_le_bytes()).collect()
        }
        // Keep away from the two NaN codes: half the range of exponents is enough.
        StoredFormat::Fp8E4m3 { .. } => (0..data).map(|_| random.byte() & 0xbf).collect(),
        _ => (0..data).map(|_| random.byte()).collect(),
    };
    let scales = match format.scale_block(cols) {
        Some((_, ScaleType::E8m0)) => vec![120; scales],
        _ => (0..scales / 4).flat_map(|_| (small / 64.0).to_le_bytes()).collect(),
    };
    StoredMatrix::new(rows, cols, format, data, scales)
}

/// A seeded generator (splitmix64), so that every run draws the same.
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn byte(&mut self) -> u8 {
        low_u8(self.next() >> 56)
    }

    /// Even in (-1, 1).
    pub(crate) fn unit(&mut self) -> f32 {
        f32_near(f64_of_u64(self.next() >> 11) / f64_of_u64(1 << 52) - 1.0)
    }

    /// `k` distinct experts for each token.
    fn draw(&mut self, tokens: usize, k: usize, experts: usize) -> Vec<u32> {
        let mut ids = Vec::with_capacity(tokens * k);
        for token in 0..tokens {
            while ids.len() < (token + 1) * k {
                let id = low_u32(self.next() % u64_of(experts));
                if !ids[token * k..].contains(&id) {
                    ids.push(id);
                }
            }
        }
        ids
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{CpuBackend, CpuOptions};

    #[test]
    fn a_small_shape_is_measured_and_its_figures_agree() {
        let backend = CpuBackend::with(CpuOptions { threads: Some(1), level: None }).unwrap();
        let shape =
            Shape { hidden: 64, width: 32, experts: 4, top_k: 2, format: StoredFormat::Mxfp4, limit: Some(10.0) };
        let mut bench = Bench::new(&backend, shape).unwrap();
        let m = bench.measure(3, Duration::ZERO).unwrap();
        assert_eq!(m.calls, 3);
        assert!((m.flops_per_s * m.seconds - 6.0 * 64.0 * 32.0 * 6.0).abs() < 1.0);
        assert!(m.experts_used >= 2.0 && m.experts_used <= 4.0);
        assert!(bench.measure(0, Duration::ZERO).is_err());
        assert!(Bench::new(&backend, Shape { top_k: 5, ..shape }).is_err());
    }
}
