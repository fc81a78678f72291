//! AVX2 + FMA + F16C: four registers hold the 32 lanes of a tile.
//!
//! Every loop loads and stores through slices of a checked, fixed length, so the only obligation left is that the
//! processor has the features, which `Simd` proves.
#![expect(unsafe_code, reason = "calls functions compiled for instructions that were detected at run time")]

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_and_si128, _mm_loadu_si128, _mm_or_si128, _mm_set1_epi8, _mm_set1_epi16,
    _mm_setzero_si128, _mm_shuffle_epi8, _mm_srli_epi16, _mm_srli_si128, _mm_unpackhi_epi8, _mm_unpacklo_epi8,
    _mm256_add_ps, _mm256_castsi256_ps, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32,
    _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_mul_ps, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_slli_epi32, _mm256_storeu_ps,
};

use std::hint::black_box;

use super::{LANES, Lane};

/// Sums over the columns of `w` for each row of `xs`. See `Simd::accumulate`, which checks the lengths.
pub(super) fn accumulate(w: &[f32], xs: &[&[f32]], acc: &mut [Lane]) {
    for (xs, acc) in xs.chunks(3).zip(acc.chunks_mut(3)) {
        // SAFETY: `Simd` holds `Level::Avx2` or above only after AVX2, FMA and F16C were detected.
        unsafe {
            match xs {
                [a] => block::<1>(w, [a], acc),
                [a, b] => block::<2>(w, [a, b], acc),
                [a, b, c] => block::<3>(w, [a, b, c], acc),
                _ => {}
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn block<const N: usize>(w: &[f32], xs: [&[f32]; N], acc: &mut [Lane]) {
    let columns = w.as_chunks::<LANES>().0;
    let mut xs = xs;
    for x in &mut xs {
        *x = &x[..columns.len()];
    }
    let mut sums = [[_mm256_setzero_ps(); 4]; N];
    for (k, column) in columns.iter().enumerate() {
        let mut x = [_mm256_setzero_ps(); N];
        for (x, row) in x.iter_mut().zip(&xs) {
            *x = _mm256_set1_ps(row[k]);
        }
        for part in 0..4 {
            let w = load(column, part);
            for (sums, &x) in sums.iter_mut().zip(&x) {
                sums[part] = _mm256_fmadd_ps(x, w, sums[part]);
            }
        }
    }
    for (acc, sums) in acc.iter_mut().zip(sums) {
        for (part, sum) in sums.into_iter().enumerate() {
            let total = _mm256_add_ps(load(acc, part), sum);
            store(acc, part, total);
        }
    }
}

pub(super) fn decode_bf16(codes: &[u8], out: &mut [f32]) {
    // SAFETY: as in `accumulate`.
    unsafe { bf16(codes, out) }
}

pub(super) fn decode_e4m3(codes: &[u8], scale: &Lane, out: &mut [f32]) {
    // SAFETY: as in `accumulate`.
    unsafe { e4m3(codes, scale, out) }
}

pub(super) fn decode_int8(codes: &[u8], scale: &Lane, out: &mut [f32]) {
    // SAFETY: as in `accumulate`.
    unsafe { int8(codes, scale, out) }
}

pub(super) fn decode_nibbles(codes: &[u8], table: &[i8; 16], scale: &Lane, out: &mut [f32]) {
    // SAFETY: as in `accumulate`.
    unsafe { nibbles(codes, table, scale, out) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn bf16(codes: &[u8], out: &mut [f32]) {
    let columns = out.as_chunks_mut::<LANES>().0;
    for (out, codes) in columns.iter_mut().zip(codes.as_chunks::<{ 2 * LANES }>().0) {
        for part in 0..4 {
            let wide = _mm256_cvtepu16_epi32(bytes(codes, part));
            store(out, part, _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)));
        }
    }
}

/// E4M3 bits, shifted, are an f16 of the same mantissa with an exponent bias larger by 8: value / 256, subnormals
/// included. NaN codes would become ±480, so matrices that hold any take the portable path.
#[target_feature(enable = "avx2,fma,f16c")]
fn e4m3(codes: &[u8], scale: &Lane, out: &mut [f32]) {
    let columns = out.as_chunks_mut::<LANES>().0;
    let lift = _mm256_set1_ps(256.0);
    let sign = _mm_set1_epi16(i16::MIN);
    let magnitude = _mm_set1_epi16(0x3f80);
    for (out, codes) in columns.iter_mut().zip(codes.as_chunks::<LANES>().0) {
        for half in 0..2 {
            let packed = bytes(codes, half);
            let zero = _mm_setzero_si128();
            let words = [_mm_unpacklo_epi8(zero, packed), _mm_unpackhi_epi8(zero, packed)];
            for (i, word) in words.into_iter().enumerate() {
                let shifted = _mm_and_si128(_mm_srli_epi16::<1>(word), magnitude);
                let value = _mm256_cvtph_ps(_mm_or_si128(_mm_and_si128(word, sign), shifted));
                let part = 2 * half + i;
                store(out, part, _mm256_mul_ps(_mm256_mul_ps(value, lift), load(scale, part)));
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn int8(codes: &[u8], scale: &Lane, out: &mut [f32]) {
    let columns = out.as_chunks_mut::<LANES>().0;
    for (out, codes) in columns.iter_mut().zip(codes.as_chunks::<LANES>().0) {
        for half in 0..2 {
            scaled(bytes(codes, half), half, scale, out);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles(codes: &[u8], table: &[i8; 16], scale: &Lane, out: &mut [f32]) {
    // SAFETY: `table` is 16 readable bytes.
    let table = unsafe { _mm_loadu_si128(table.as_ptr().cast()) };
    let low = _mm_set1_epi8(0xf);
    let columns = out.as_chunks_mut::<LANES>().0;
    for (pair, codes) in columns.chunks_mut(2).zip(codes.as_chunks::<LANES>().0) {
        for half in 0..2 {
            let packed = bytes(codes, half);
            let mut column = packed;
            for out in pair.iter_mut() {
                scaled(_mm_shuffle_epi8(table, _mm_and_si128(column, low)), half, scale, out);
                column = _mm_srli_epi16::<4>(packed);
            }
        }
    }
}

/// Sixteen signed bytes, times their lanes' scales, into lanes 16·half onwards.
#[target_feature(enable = "avx2,fma,f16c")]
fn scaled(values: __m128i, half: usize, scale: &Lane, out: &mut Lane) {
    for (i, values) in [values, _mm_srli_si128::<8>(values)].into_iter().enumerate() {
        let wide: __m256i = _mm256_cvtepi8_epi32(values);
        let part = 2 * half + i;
        store(out, part, _mm256_mul_ps(_mm256_cvtepi32_ps(wide), load(scale, part)));
    }
}

/// Eight lanes from 8·part.
#[target_feature(enable = "avx2,fma,f16c")]
fn load(lane: &Lane, part: usize) -> __m256 {
    let eight = &lane.as_chunks::<8>().0[part];
    // SAFETY: `eight` is eight readable floats.
    unsafe { _mm256_loadu_ps(eight.as_ptr()) }
}

/// Writes eight lanes from 8·part.
#[target_feature(enable = "avx2,fma,f16c")]
fn store(lane: &mut Lane, part: usize, value: __m256) {
    let eight = &mut lane.as_chunks_mut::<8>().0[part];
    // SAFETY: `eight` is eight writable floats.
    unsafe { _mm256_storeu_ps(eight.as_mut_ptr(), value) }
}

/// Sixteen bytes from 16·part.
#[target_feature(enable = "avx2,fma,f16c")]
fn bytes<const N: usize>(codes: &[u8; N], part: usize) -> __m128i {
    let sixteen = &codes.as_chunks::<16>().0[part];
    // SAFETY: `sixteen` is sixteen readable bytes.
    unsafe { _mm_loadu_si128(sixteen.as_ptr().cast()) }
}

/// Twelve chains of multiply-adds, enough to hide their latency.
pub(super) fn spin(rounds: u64) -> (u64, f32) {
    // SAFETY: as in `accumulate`.
    (rounds * 12 * 8 * 2, unsafe { spin_chains(rounds) })
}

#[target_feature(enable = "avx2,fma,f16c")]
fn spin_chains(rounds: u64) -> f32 {
    let (factor, term) = (_mm256_set1_ps(black_box(0.999_999)), _mm256_set1_ps(black_box(1e-6)));
    let mut sums = [_mm256_setzero_ps(); 12];
    for sum in &mut sums {
        *sum = _mm256_set1_ps(black_box(1.0));
    }
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, factor, term);
        }
    }
    let mut lane: Lane = [0.0; LANES];
    for sum in sums {
        let total = _mm256_add_ps(load(&lane, 0), sum);
        store(&mut lane, 0, total);
    }
    lane.iter().sum()
}
