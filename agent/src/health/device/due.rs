//! When a device is due for its validation: it was reset, or lost and found again, or its driver took a fault back,
//! and its own readings are good.

use berth_types::Reason;

use super::Device;
use crate::health::condition::{Clears, Origin, Phase};

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
        let over = self.npu.ended.filter(untried);
        self.conditions.iter().any(|((reason, origin), condition)| {
            if self.holds(*origin) {
                return false;
            }
            let taken_back = matches!(origin, Origin::Code(_)) && over.is_some_and(|ended| ended >= condition.since);
            let back = reset.is_some_and(|done| done >= condition.last)
                || (*reason == Reason::DeviceLost && found.is_some_and(|lost| lost >= condition.since))
                || taken_back;
            condition.clears == Clears::Probe && condition.phase == Phase::Active && back
        })
    }
}
