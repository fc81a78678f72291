//! When a device is due for its validation: it was reset, or lost and found again, and its own readings are good.

use berth_types::Reason;

use super::Device;
use crate::health::condition::{Clears, Phase};

impl Device {
    /// Whether only a validation is missing for a fault here to be over. A validation that failed is not repeated
    /// before something new was done to the device.
    #[must_use]
    pub fn awaits_validation(&self) -> bool {
        let Some(reading) = self.good_reading() else { return false };
        if self.resetting.is_some() || self.validated.is_some() {
            return false;
        }
        let untried = |at: &_| self.invalid.is_none_or(|failed| *at > failed);
        let reset = self.reset_done.filter(untried).filter(|done| reading >= *done);
        let found = self.unreachable.filter(untried).filter(|lost| reading > *lost);
        self.conditions.iter().any(|((reason, _), condition)| {
            let back = reset.is_some_and(|done| done >= condition.last)
                || (*reason == Reason::DeviceLost && found.is_some_and(|lost| lost >= condition.since));
            condition.clears == Clears::Probe && condition.phase == Phase::Active && back
        })
    }
}
