//! What this machine can do at most, measured: the yardstick beside every benchmark figure.
//!
//! Measured in the same run and on the same threads as what it is compared with, because neighbours on a host move both.

use std::hint::black_box;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::{CpuBackend, Level};
use crate::error::{KernelError, zeroed};
use crate::num::{f64_of, f64_of_u64};

/// Bytes read by the stream probe: beyond the caches of one socket.
const STREAM_BYTES: usize = 512 << 20;

/// Measured limits of the threads that a backend uses.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Peaks {
    /// Single precision fused multiply-adds in registers, counted as two operations.
    pub flops_per_s: f64,
    /// Sequential reads.
    pub bytes_per_s: f64,
    /// Threads that were used.
    pub threads: usize,
}

impl CpuBackend {
    /// Measures both limits; takes about two seconds and 512 MiB.
    ///
    /// # Errors
    /// `Memory` if the stream's buffer does not fit.
    pub fn measure_peaks(&self) -> Result<Peaks, KernelError> {
        let mut buffer: Vec<u64> = zeroed("the read stream", STREAM_BYTES / 8)?;
        buffer.iter_mut().step_by(512).for_each(|word| *word = 1);
        let best = |run: &dyn Fn() -> f64| {
            let until = Instant::now() + Duration::from_millis(600);
            let mut best = run();
            while Instant::now() < until {
                best = best.max(run());
            }
            best
        };
        Ok(Peaks {
            flops_per_s: best(&|| self.on_threads(|| self.spin())),
            bytes_per_s: best(&|| self.on_threads(|| stream(&buffer))),
            threads: self.threads(),
        })
    }

    fn on_threads<T: Send>(&self, run: impl Fn() -> T + Send + Sync) -> T {
        match &self.pool {
            Some(pool) => pool.install(run),
            None => run(),
        }
    }

    fn spin(&self) -> f64 {
        let rounds = if self.level() == Level::Portable { 20_000 } else { 2_000_000 };
        let start = Instant::now();
        let flops: u64 = match &self.pool {
            Some(pool) => pool.broadcast(|_| black_box(self.simd.spin(black_box(rounds))).0).iter().sum(),
            None => black_box(self.simd.spin(black_box(rounds))).0,
        };
        f64_of_u64(flops) / start.elapsed().as_secs_f64()
    }
}

fn stream(buffer: &[u64]) -> f64 {
    let start = Instant::now();
    let part = |words: &[u64]| {
        let mut sums = [0u64; 16];
        for line in words.as_chunks::<16>().0 {
            sums.iter_mut().zip(line).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
        }
        sums.iter().fold(0u64, |a, b| a.wrapping_add(*b))
    };
    let sum = buffer.par_chunks(1 << 18).map(part).reduce(|| 0, u64::wrapping_add);
    black_box(sum);
    f64_of(buffer.len() * 8) / start.elapsed().as_secs_f64()
}
