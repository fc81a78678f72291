//! The one place of this crate where number types meet. Each function says why its conversion is safe
//! or what it rounds; the rest of the crate never writes `as`.
#![expect(clippy::as_conversions, reason = "the crate's single home of numeric casts")]

/// A 32-bit index as a length. Lossless: Berth needs at least 32-bit addresses.
#[inline]
pub(crate) fn usize_of(value: u32) -> usize {
    value as usize
}

/// A length that the wire counts in 32 bits; what is longer becomes the largest count, which no buffer matches.
#[inline]
pub(crate) fn u32_of(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// A length as `u64`. Lossless on every supported target.
#[inline]
pub(crate) fn u64_of(value: usize) -> u64 {
    value as u64
}

/// A length as `f32`; rounds above 2^24.
#[inline]
pub(crate) fn f32_of(value: usize) -> f32 {
    value as f32
}

/// The nearest `f32`; overflow becomes an infinity.
#[inline]
pub(crate) fn f32_near(value: f64) -> f32 {
    value as f32
}

/// A length as `f64`; rounds above 2^53.
#[inline]
pub(crate) fn f64_of(value: usize) -> f64 {
    value as f64
}

/// `value % count` as an index; 0 when there is nothing to index.
#[inline]
pub(crate) fn index_of(value: u64, count: usize) -> usize {
    if count == 0 { 0 } else { (value % count as u64) as usize }
}

/// Whole milliseconds, at most `u32::MAX`.
#[inline]
pub(crate) fn millis_of(value: std::time::Duration) -> u32 {
    u32::try_from(value.as_millis()).unwrap_or(u32::MAX)
}

/// A count as `f64`; rounds above 2^53.
#[inline]
pub(crate) fn f64_of_u64(value: u64) -> f64 {
    value as f64
}

/// Milliseconds of Unix time as the wire has them.
#[inline]
pub(crate) fn i64_of(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
