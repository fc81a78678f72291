//! The library of the scale-up fabric's switches. Only a 910C has one, so that a node without it is well; its
//! error numbers are those of DCMI with other meanings, and none is passed on.

use std::{ffi::OsString, sync::Arc, time::Duration};

use super::{
    SWITCH_LIBRARY,
    ffi::{OK, RawSwitch, Switches},
};
use crate::{health::fact::SwitchFault, vendor::lane::Lane};

/// Opening and subscribing has so long.
const LIMIT: Duration = Duration::from_secs(5);

impl std::fmt::Debug for Switches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Switches")
    }
}

/// Opens the library and subscribes to its events; `None` = there is none, or it is of no use.
pub(super) async fn open(lane: &mut Lane, configured: Option<OsString>) -> Option<Arc<Switches>> {
    let path = configured.unwrap_or_else(|| OsString::from(SWITCH_LIBRARY));
    let opened = lane.call(LIMIT, Duration::default, move || {
        let library = Switches::open(&path).map_err(|error| error.to_string())?;
        match library.init() {
            OK => {
                let events = library.subscribe();
                Ok((library, events))
            }
            code => Err(format!("lq_dcmi_init answers {code}")),
        }
    });
    match opened.await {
        Ok(Ok((library, events))) => {
            tracing::info!(events = events.is_ok(), "switches of the scale-up fabric are watched");
            Some(Arc::new(library))
        }
        Ok(Err(why)) => {
            tracing::debug!(why, "no switches of a scale-up fabric");
            None
        }
        Err(error) => {
            tracing::warn!(%error, "the library of the scale-up fabric's switches: not watched");
            None
        }
    }
}

/// A fault in our words. Number 0xFFFFFFFF means that the alarm has no fault of its own, and a port of
/// 0xFFFF that the whole chip is meant, whatever the peer says.
pub(super) const fn fault(raw: &RawSwitch) -> SwitchFault {
    let RawSwitch { alarm, fault, peer, chip, port, .. } = *raw;
    let peer = match peer {
        _ if port == u16::MAX => "na",
        0 => "cpu",
        1 => "npu",
        2 => "L2",
        _ => "na",
    };
    let fault = if fault == u32::MAX { None } else { Some(fault) };
    SwitchFault { alarm, fault, peer, chip, port }
}
