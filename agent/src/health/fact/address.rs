//! Where a device is on its node's PCI bus. A damaged address is refused, never guessed at.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The place of a PCI device on its node, function left out. Compared as numbers, for drivers pad the
/// domain to four or eight digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PciAddress {
    /// Domain (segment).
    pub domain: u32,
    /// Bus.
    pub bus: u8,
    /// Device (slot).
    pub device: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.0", self.domain, self.bus, self.device)
    }
}

/// A text that is no PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no PCI address: write it as 0000:3b:00.0")]
pub struct NoAddress(pub String);

impl FromStr for PciAddress {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let error = || NoAddress(text.chars().take(40).collect());
        let (text, function) = text.split_once('.').unwrap_or((text, "0"));
        let mut parts = text.split(':');
        let mut hex = |digits: std::ops::RangeInclusive<usize>| {
            let part = parts.next().filter(|part| digits.contains(&part.len()))?;
            part.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u32::from_str_radix(part, 16).ok())?
        };
        let (domain, bus, device) = (hex(4..=8), hex(2..=2), hex(2..=2));
        let whole = parts.next().is_none() && function.len() == 1 && function.bytes().all(|byte| byte.is_ascii_digit());
        match (domain, bus.and_then(|bus| u8::try_from(bus).ok()), device.and_then(|at| u8::try_from(at).ok())) {
            (Some(domain), Some(bus), Some(device)) if whole && device < 32 => Ok(Self { domain, bus, device }),
            _ => Err(error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_compare_as_numbers() {
        let short: PciAddress = "0000:3B:00".parse().unwrap();
        assert_eq!(short, "00000000:3b:00.0".parse().unwrap());
        assert_eq!(short.to_string(), "0000:3b:00.0");
        assert_eq!("0018:01:00".parse::<PciAddress>().unwrap().to_string(), "0018:01:00.0");
    }

    #[test]
    fn damaged_addresses_are_refused() {
        for text in [
            "",
            "3b:00.0",
            "0000:3b",
            "0000:3b:00:1",
            "0000:3g:00",
            "+000:3b:00",
            "0000:3b:20",
            "0000:3b:00.x",
            "0000:3b:00.12",
        ] {
            assert!(text.parse::<PciAddress>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_an_address_or_refused(text in ".{0,40}") {
            if let Ok(address) = text.parse::<PciAddress>() {
                prop_assert_eq!(address.to_string().parse::<PciAddress>(), Ok(address));
            }
        }
    }
}
