//! Reset of an Ascend device by the driver's own call, in band. It decides nothing: who calls has an order, and has
//! ended every worker on the devices that go with it.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, c_int},
    thread,
    time::Duration,
};

use berth_runtime::Clock;

use super::{Dcmi, ffi::At};
use crate::health::fact::Local;

/// Boot status of a device that has fully started.
const BOOTED: u32 = 16;
/// Between two looks at the boot status.
const LOOK: Duration = Duration::from_millis(500);

/// Why a reset did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum ResetError {
    /// The library cannot be used.
    #[error(transparent)]
    Open(#[from] super::OpenError),
    /// It is no `<card>.<device>`.
    #[error("{0:?} names no card and device")]
    Name(String),
    /// The driver refused, or failed.
    #[error("{symbol} answers {code}")]
    Refused {
        /// What was called.
        symbol: &'static str,
        /// DCMI's code.
        code: i32,
    },
    /// A device did not start again.
    #[error("{0} did not start again: boot status {1:?}")]
    NotBooted(String, Result<u32, i32>),
}

/// Resets `device` through the library at `path` and waits until every one of `members` has started again, by `until` on
/// `clock`. Blocks: call it on a lane.
///
/// # Errors
/// [`ResetError`].
pub fn reset(
    path: &OsStr,
    device: &str,
    members: &BTreeSet<Local>,
    clock: &Clock,
    until: Duration,
) -> Result<(), ResetError> {
    let library = Dcmi::open(path)?;
    let at = library.place(device)?;
    let symbol = if library.second { "dcmiv2_reset_device" } else { "dcmi_set_device_reset" };
    library.api.reset(at).map_err(|code| ResetError::Refused { symbol, code })?;
    for member in members {
        let at = library.place(member)?;
        loop {
            // While it starts, any answer is expected.
            let boot = library.api.boot(at);
            if boot == Ok(BOOTED) {
                break;
            }
            if clock.now() >= until {
                return Err(ResetError::NotBooted(member.clone(), boot));
            }
            thread::sleep(LOOK);
        }
    }
    Ok(())
}

impl Dcmi {
    /// Where the device `<card>.<device>` is asked.
    fn place(&self, local: &str) -> Result<At, ResetError> {
        let numbers = local
            .split_once('.')
            .and_then(|(card, device)| Some((card.parse::<c_int>().ok()?, device.parse::<c_int>().ok()?)));
        let (card, device) = numbers.ok_or_else(|| ResetError::Name(local.to_owned()))?;
        Ok(if self.second { At::Second { device: card } } else { At::First { card, device } })
    }
}
