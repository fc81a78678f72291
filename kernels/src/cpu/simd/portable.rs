//! The inner loops in plain Rust: what every other level must equal, bit for bit.

use super::{LANES, Lane};
use crate::format::codes::{bf16_to_f32, e4m3_to_f32};
use crate::num::signed;

pub(super) fn accumulate(w: &[f32], xs: &[&[f32]], acc: &mut [Lane]) {
    for (x, acc) in xs.iter().zip(acc) {
        let mut sum: Lane = [0.0; LANES];
        for (column, &x) in w.as_chunks::<LANES>().0.iter().zip(*x) {
            for (sum, &w) in sum.iter_mut().zip(column) {
                *sum = x.mul_add(w, *sum);
            }
        }
        acc.iter_mut().zip(sum).for_each(|(acc, sum)| *acc += sum);
    }
}

pub(super) fn decode_bf16(codes: &[u8], out: &mut [f32]) {
    for (out, &code) in out.iter_mut().zip(codes.as_chunks::<2>().0) {
        *out = bf16_to_f32(u16::from_le_bytes(code));
    }
}

pub(super) fn decode_e4m3(codes: &[u8], scale: &Lane, out: &mut [f32]) {
    each(codes, scale, out, |code| E4M3[usize::from(code)]);
}

pub(super) fn decode_int8(codes: &[u8], scale: &Lane, out: &mut [f32]) {
    each(codes, scale, out, |code| f32::from(signed(code)));
}

pub(super) fn decode_nibbles(codes: &[u8], table: &[i8; 16], scale: &Lane, out: &mut [f32]) {
    for (pair, codes) in out.chunks_mut(2 * LANES).zip(codes.as_chunks::<LANES>().0) {
        for (column, out) in pair.chunks_mut(LANES).enumerate() {
            for (lane, out) in out.iter_mut().enumerate() {
                let code = if column == 0 { codes[lane] & 0xf } else { codes[lane] >> 4 };
                *out = f32::from(table[usize::from(code)]) * scale[lane];
            }
        }
    }
}

fn each(codes: &[u8], scale: &Lane, out: &mut [f32], value: impl Fn(u8) -> f32) {
    for (out, codes) in out.chunks_mut(LANES).zip(codes.chunks(LANES)) {
        for ((out, &code), &scale) in out.iter_mut().zip(codes).zip(scale) {
            *out = value(code) * scale;
        }
    }
}

static E4M3: std::sync::LazyLock<[f32; 256]> = std::sync::LazyLock::new(|| {
    let mut table = [0.0; 256];
    table.iter_mut().zip(0..=255u8).for_each(|(value, code)| *value = e4m3_to_f32(code));
    table
});

pub(super) fn spin(rounds: u64) -> (u64, f32) {
    let mut sums: Lane = std::hint::black_box([1.0; LANES]);
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = sum.mul_add(0.999_999, 2e-6);
        }
    }
    (rounds * 64, sums.iter().sum())
}
