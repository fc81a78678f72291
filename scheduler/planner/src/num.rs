//! The crate's only conversions between number types. Each says what happens at the edge of a range, so
//! that no other file needs `as`.

/// `value` as an index; on a target whose `usize` is narrower it saturates.
pub(crate) fn index(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// `value` as a count, saturating.
pub(crate) fn index64(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// `value` as a plain number, saturating.
pub(crate) fn count(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

/// `value` as an id or a small count, saturating.
pub(crate) fn small(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// `value` as a float; exact below 2^53, rounded above.
#[expect(clippy::as_conversions, reason = "u64 to f64 has no From; rounding above 2^53 is intended")]
pub(crate) fn real(value: u64) -> f64 {
    value as f64
}

/// `value` as a float.
pub(crate) fn real_size(value: usize) -> f64 {
    real(count(value))
}

/// `value` as a short signed count, saturating.
pub(crate) fn short(value: usize) -> i16 {
    i16::try_from(value).unwrap_or(i16::MAX)
}

/// The least index that is not below `value`; 0 for what is no number above 0, the largest beyond the range.
#[expect(clippy::as_conversions, reason = "f64 to usize saturates, which is what is wanted")]
pub(crate) fn ceil(value: f64) -> usize {
    value.ceil() as usize
}

/// `value` as a signed number, saturating.
pub(crate) fn whole(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// `value` as a float, rounded beyond 2^53.
#[expect(clippy::as_conversions, reason = "i64 to f64 has no From; rounding beyond 2^53 is intended")]
pub(crate) fn signed_real(value: i64) -> f64 {
    value as f64
}

/// `value` rounded down to a weight; 0 for what is no number above 0, the largest beyond the range.
#[expect(clippy::as_conversions, reason = "f64 to u16 saturates, which is what is wanted")]
pub(crate) fn fixed(value: f64) -> u16 {
    value.floor() as u16
}
