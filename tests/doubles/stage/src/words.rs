//! Words of a script that every library reads alike.

use serde::Deserialize;

/// A number, or the code that the call answers instead.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(untagged)]
pub enum Value {
    /// The value.
    Number(u64),
    /// The call fails.
    Code {
        /// With this.
        #[serde(rename = "return")]
        code: i32,
    },
}

impl Default for Value {
    fn default() -> Self {
        Self::Number(0)
    }
}

impl Value {
    /// The number.
    ///
    /// # Errors
    /// The code to return instead.
    pub fn get(self) -> Result<u64, i32> {
        match self {
            Self::Number(number) => Ok(number),
            Self::Code { code } => Err(code),
        }
    }
}

/// A number written as `"0x8"` or plainly.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(try_from = "serde_json::Value")]
pub struct Hex(pub u64);

impl TryFrom<serde_json::Value> for Hex {
    type Error = String;

    fn try_from(value: serde_json::Value) -> Result<Self, String> {
        let number = match &value {
            serde_json::Value::Number(number) => number.as_u64(),
            serde_json::Value::String(text) => match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
                Some(hex) => u64::from_str_radix(hex, 16).ok(),
                None => text.parse().ok(),
            },
            _ => None,
        };
        number.map(Self).ok_or_else(|| format!("{value} is no number: write 8 or \"0x8\""))
    }
}
