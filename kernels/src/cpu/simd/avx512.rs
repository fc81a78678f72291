//! AVX-512 F: two registers hold the 32 lanes of a tile, so eight rows of activations fit beside them.
//!
//! Only the multiply-add loop differs from AVX2; decoding is shared with it.
#![expect(unsafe_code, reason = "calls functions compiled for instructions that were detected at run time")]

use std::arch::x86_64::{
    __m512, _mm512_add_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};

use std::hint::black_box;

use super::{LANES, Lane};

/// Sums over the columns of `w` for each row of `xs`. See `Simd::accumulate`, which checks the lengths.
pub(super) fn accumulate(w: &[f32], xs: &[&[f32]], acc: &mut [Lane]) {
    let (mut xs, mut acc) = (xs, acc);
    while !xs.is_empty() {
        let n = if xs.len() >= 8 {
            8
        } else if xs.len() >= 4 {
            4
        } else {
            xs.len().min(2)
        };
        let (now, later) = xs.split_at(n);
        let (out, rest) = acc.split_at_mut(n);
        // SAFETY: `Simd` holds `Level::Avx512` only after AVX-512 F and BW were detected.
        unsafe {
            match *now {
                [a, b, c, d, e, f, g, h] => block::<8>(w, [a, b, c, d, e, f, g, h], out),
                [a, b, c, d] => block::<4>(w, [a, b, c, d], out),
                [a, b] => block::<2>(w, [a, b], out),
                [a] => block::<1>(w, [a], out),
                _ => {}
            }
        }
        (xs, acc) = (later, rest);
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
fn block<const N: usize>(w: &[f32], xs: [&[f32]; N], acc: &mut [Lane]) {
    let columns = w.as_chunks::<LANES>().0;
    let mut xs = xs;
    for x in &mut xs {
        *x = &x[..columns.len()];
    }
    let mut sums = [[_mm512_setzero_ps(); 2]; N];
    for (k, column) in columns.iter().enumerate() {
        let w = [load(column, 0), load(column, 1)];
        for n in 0..N {
            let x = _mm512_set1_ps(xs[n][k]);
            for part in 0..2 {
                sums[n][part] = _mm512_fmadd_ps(x, w[part], sums[n][part]);
            }
        }
    }
    for (acc, sums) in acc.iter_mut().zip(sums) {
        for (part, sum) in sums.into_iter().enumerate() {
            let total = _mm512_add_ps(load(acc, part), sum);
            store(acc, part, total);
        }
    }
}

/// Sixteen lanes from 16·part.
#[target_feature(enable = "avx512f,avx512bw")]
fn load(lane: &Lane, part: usize) -> __m512 {
    let sixteen = &lane.as_chunks::<16>().0[part];
    // SAFETY: `sixteen` is sixteen readable floats.
    unsafe { _mm512_loadu_ps(sixteen.as_ptr()) }
}

/// Writes sixteen lanes from 16·part.
#[target_feature(enable = "avx512f,avx512bw")]
fn store(lane: &mut Lane, part: usize, value: __m512) {
    let sixteen = &mut lane.as_chunks_mut::<16>().0[part];
    // SAFETY: `sixteen` is sixteen writable floats.
    unsafe { _mm512_storeu_ps(sixteen.as_mut_ptr(), value) }
}

/// Sixteen chains of multiply-adds, enough to hide their latency.
pub(super) fn spin(rounds: u64) -> (u64, f32) {
    // SAFETY: as in `accumulate`.
    (rounds * 16 * 16 * 2, unsafe { spin_chains(rounds) })
}

#[target_feature(enable = "avx512f,avx512bw")]
fn spin_chains(rounds: u64) -> f32 {
    let (factor, term) = (_mm512_set1_ps(black_box(0.999_999)), _mm512_set1_ps(black_box(1e-6)));
    let mut sums = [_mm512_setzero_ps(); 16];
    for sum in &mut sums {
        *sum = _mm512_set1_ps(black_box(1.0));
    }
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, factor, term);
        }
    }
    let mut lane: Lane = [0.0; LANES];
    for sum in sums {
        let total = _mm512_add_ps(load(&lane, 0), sum);
        store(&mut lane, 0, total);
    }
    lane.iter().sum()
}
