//! Repetition: what the same fault means when it comes back, how long a device is watched after it, and how the driver's
//! wish joins the fault that explains it.

use std::time::Duration;

use berth_types::{Action, Admission, Health, Reason};

use super::Device;
use crate::health::{
    catalog,
    condition::{Clears, Condition, DAY, Origin, Phase, Words, next_step},
};

/// Conditions that the driver's recovery action can be the consequence of.
pub(super) const CAUSES: [Reason; 9] = [
    Reason::DeviceLost,
    Reason::MemoryUncorrectable,
    Reason::MemoryRemapPending,
    Reason::MemoryRemapFailed,
    Reason::EngineFault,
    Reason::FirmwareHang,
    Reason::FabricLinkDown,
    Reason::PcieFault,
    Reason::UnknownFault,
];
/// Incidents of one reason within a day that make it a repeated fault.
const REPEATED: usize = 3;

impl Device {
    /// The words of a new incident: one step up the ladder when the reason came back too soon.
    pub(super) fn climbed(&mut self, now: Duration, reason: Reason, words: Words) -> Words {
        if words.action == Action::None || self.replaying {
            return words;
        }
        // Another code of the same incident is no new one.
        if self.conditions.iter().any(|((of, origin), open)| {
            *of == reason && *origin != Origin::Sibling && !matches!(open.phase, Phase::Probation(_))
        }) {
            return words;
        }
        let often = self.too_often(now, reason);
        let again = self.returned.get(&reason).is_some_and(|at| now.saturating_sub(*at) <= DAY);
        let words = if again { climb(words, self.grouped()) } else { words };
        if often || (again && words.action == Action::ServiceHardware) {
            self.give_up(now, &format!("{reason} came back"));
        }
        words
    }

    /// Counts one more incident; Ascend's codes say themselves how often is too often.
    pub(super) fn too_often(&mut self, now: Duration, reason: Reason) -> bool {
        let npu = self.is_npu();
        let begun = self.begun.entry(reason).or_default();
        begun.retain(|at| now.saturating_sub(*at) <= DAY);
        begun.push(now);
        begun.len() >= REPEATED && !npu
    }

    pub(super) fn give_up(&mut self, now: Duration, evidence: &str) {
        let fresh = || Condition::begun(now, catalog::SERVICE, Clears::Release, evidence);
        self.conditions.entry((Reason::RepeatedFault, Origin::Vendor)).or_insert_with(fresh);
    }

    /// The driver's wish joins the fault that explains it.
    pub(super) fn absorb(&mut self) {
        let key = (Reason::ResetRequired, Origin::Recovery);
        let Some(wish) = self.conditions.get(&key).filter(|wish| wish.phase == Phase::Active).cloned() else { return };
        let cause = self
            .conditions
            .iter_mut()
            .filter(|((reason, origin), cause)| {
                CAUSES.contains(reason) && *origin == Origin::Vendor && !matches!(cause.phase, Phase::Probation(_))
            })
            .max_by_key(|(_, cause)| (cause.words.health, cause.words.admission, cause.words.action));
        if let Some((_, cause)) = cause {
            cause.own.get_or_insert((cause.words, cause.clears));
            cause.words = cause.words.worsened(wish.words);
            cause.phase = Phase::Active;
            // What is to be reset is not well before it was.
            if wish.words.action >= Action::ResetDevice && matches!(cause.clears, Clears::Reading | Clears::ReadingHeld)
            {
                cause.clears = Clears::Probe;
            }
            self.conditions.remove(&key);
        }
    }

    pub(super) fn probation(&self, now: Duration, reason: Reason) -> Duration {
        let begun = self
            .begun
            .get(&reason)
            .map_or(0, |begun| begun.iter().filter(|at| now.saturating_sub(**at) <= DAY).count());
        let doubled = u32::try_from(begun.saturating_sub(1)).unwrap_or(u32::MAX).min(16);
        self.settings.probation.saturating_mul(1 << doubled).min(DAY)
    }
}

/// One step up; from a reset on, a step that did not help bars the device.
pub(super) fn climb(words: Words, grouped: bool) -> Words {
    let admission = if words.action >= Action::ResetDevice { Admission::Barred } else { words.admission };
    let health = if admission == Admission::Barred { Health::Unhealthy } else { words.health };
    Words { health, admission, action: next_step(words.action, grouped), scope: words.scope }
}
