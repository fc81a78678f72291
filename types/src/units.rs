//! Units as types, so that bytes are never added to tokens. Arithmetic saturates: a quantity from
//! outside can be absurd, and an absurd sum must stay comparable instead of wrapping.

use std::{fmt, iter::Sum, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A number of bytes (decimal and binary suffixes are accepted when parsing text).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Bytes(#[schemars(range(min = 0))] pub u64);

impl Bytes {
    /// No bytes.
    pub const ZERO: Self = Self(0);

    /// The plain number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// `self + other`, at most `u64::MAX`.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// `self - other`, at least zero.
    #[must_use]
    pub const fn minus(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// `self × count`, at most `u64::MAX`.
    #[must_use]
    pub const fn times(self, count: u64) -> Self {
        Self(self.0.saturating_mul(count))
    }

    /// `self × numerator ÷ denominator`, rounded down; a zero denominator gives zero.
    #[must_use]
    pub fn scaled(self, numerator: u64, denominator: u64) -> Self {
        if denominator == 0 {
            return Self::ZERO;
        }
        let wide = u128::from(self.0) * u128::from(numerator) / u128::from(denominator);
        Self(u64::try_from(wide).unwrap_or(u64::MAX))
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, Self::plus)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const STEPS: [(u64, &str); 4] =
            [(1_000_000_000_000, "TB"), (1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB")];
        for (size, name) in STEPS {
            if self.0 >= size {
                let tenths = self.0 / (size / 10);
                return write!(f, "{}.{} {name}", tenths / 10, tenths % 10);
            }
        }
        write!(f, "{} B", self.0)
    }
}

/// Why a text is not a [`Bytes`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is not a number of bytes: write digits and, if you like, one of kB MB GB TB KiB MiB GiB TiB")]
pub struct ParseBytesError {
    text: String,
}

impl FromStr for Bytes {
    type Err = ParseBytesError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseBytesError { text: text.to_owned() };
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
        let (digits, suffix) = trimmed.split_at(split);
        let factor: u64 = match suffix.trim() {
            "" | "B" => 1,
            "kB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "TB" => 1_000_000_000_000,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "TiB" => 1 << 40,
            _ => return Err(error()),
        };
        let number: u64 = digits.parse().map_err(|_| error())?;
        number.checked_mul(factor).map(Self).ok_or_else(error)
    }
}

/// Throughput in tokens per second; always finite and not negative.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "f64", into = "f64")]
pub struct TokensPerSecond(f64);

/// Why a number is not a [`TokensPerSecond`].
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("{value} is not a throughput: give a finite number of tokens per second that is not negative")]
pub struct NotAThroughput {
    value: f64,
}

impl TokensPerSecond {
    /// The plain number.
    #[must_use]
    pub const fn get(self) -> f64 {
        self.0
    }
}

impl TryFrom<f64> for TokensPerSecond {
    type Error = NotAThroughput;

    fn try_from(value: f64) -> Result<Self, Self::Error> {
        if value.is_finite() && value >= 0.0 { Ok(Self(value)) } else { Err(NotAThroughput { value }) }
    }
}

impl From<TokensPerSecond> for f64 {
    fn from(value: TokensPerSecond) -> Self {
        value.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bytes_read_both_kinds_of_suffix() {
        assert_eq!("80GB".parse(), Ok(Bytes(80_000_000_000)));
        assert_eq!("2 GiB".parse(), Ok(Bytes(2 << 30)));
        assert!("".parse::<Bytes>().is_err());
        assert!("3 potatoes".parse::<Bytes>().is_err());
        assert!("99999999999 TB".parse::<Bytes>().is_err());
    }

    #[test]
    fn throughput_refuses_what_is_no_number() {
        assert!(TokensPerSecond::try_from(f64::NAN).is_err());
        assert!(TokensPerSecond::try_from(-1.0).is_err());
        assert!(serde_json::from_str::<TokensPerSecond>("-3").is_err());
    }

    proptest! {
        #[test]
        fn bytes_never_wrap(a: u64, b: u64, c in 0u64..4096) {
            prop_assert!(Bytes(a).plus(Bytes(b)) >= Bytes(a));
            prop_assert!(Bytes(a).minus(Bytes(b)) <= Bytes(a));
            prop_assert!(c == 0 || Bytes(a).times(c) >= Bytes(a));
            prop_assert!(Bytes(a).scaled(1, 1) == Bytes(a));
        }
    }
}
