//! The one place where number types meet.
//!
//! Each function says why its conversion is safe or what it rounds; the rest of the crate never writes `as`.
#![expect(clippy::as_conversions, reason = "the crate's single home of numeric casts")]

/// A 32-bit index as a length. Lossless: Berth needs at least 32-bit addresses.
#[inline]
pub(crate) fn usize_of(value: u32) -> usize {
    value as usize
}

/// A byte count or length as `u64`. Lossless on every supported target.
#[inline]
pub(crate) fn u64_of(value: usize) -> u64 {
    value as u64
}

/// A length as an exact float up to 2^53; larger ones round.
#[inline]
pub(crate) fn f64_of(value: usize) -> f64 {
    value as f64
}

/// An integer as a float, exact up to 2^24.
#[inline]
pub(crate) fn f32_of_i32(value: i32) -> f32 {
    value as f32
}

/// The nearest `f32`; overflow becomes an infinity, which callers keep as such.
#[inline]
pub(crate) fn f32_near(value: f64) -> f32 {
    value as f32
}

/// A byte's bits read as two's complement.
#[inline]
pub(crate) fn signed(byte: u8) -> i8 {
    byte as i8
}

/// A signed byte's bits.
#[inline]
pub(crate) fn byte_of(value: i8) -> u8 {
    value as u8
}

/// The whole number `value` as a byte, saturating; NaN becomes 0.
#[inline]
pub(crate) fn f32_to_i8(value: f32) -> i8 {
    value as i8
}

/// A 64-bit count as a float; rounds above 2^53.
#[inline]
pub(crate) fn f64_of_u64(value: u64) -> f64 {
    value as f64
}

/// The low 32 bits.
#[inline]
pub(crate) fn low_u32(value: u64) -> u32 {
    value as u32
}

/// The low eight bits.
#[inline]
pub(crate) fn low_u8(value: u64) -> u8 {
    value as u8
}
