//! What a device's record is worth after the agent was away: kept whole within one boot of the node; over a reboot,
//! which is a reset of everything, kept as what still has to be proven.

use std::time::Duration;

use berth_types::{Action, Admission, DeviceState, Health, Reason, Scope};

use super::{Device, DeviceInfo, Phase, Settings, readings::HostLinkWatch};
use crate::health::{
    catalog::Row,
    condition::{Clears, Origin, Words},
};

impl Device {
    /// Takes up what was remembered: facts are history again until [`Device::settle`]. Nothing becomes better by it.
    pub(crate) fn resume(&mut self, now: Duration, rebooted: bool, settings: Settings) {
        (self.settings, self.replaying) = (settings, true);
        // The worker that would not end was another process's child; its device is asked anew.
        self.end(Reason::AgentBlind, Origin::Worker);
        if rebooted {
            // The boot reset the device: what must be validated is due once it reads well.
            (self.resetting, self.reset_done, self.validated) = (None, Some(now), None);
            // Volatile counters, the driver's word and its serial numbers began anew.
            (self.last, self.recovery, self.recovery_line, self.clique) = (None, None, None, None);
            (self.uncorrected, self.links_seen_down, self.gsp_timeouts) = (None, None, 0);
            self.host_link = HostLinkWatch::default();
            self.waiting.clear();
            self.traces.clear();
            self.seen.clear();
            self.corrected.clear();
            self.replays.clear();
            self.npu.reboot();
        }
    }

    /// Whether it is of any use to remember a device that nobody has spoken of since the node booted.
    pub(crate) fn outlives_boot(&self) -> bool {
        self.met || self.state().0 != DeviceState::HEALTHY
    }

    /// Remembered, and nobody has spoken of it since the agent began: it cannot be said to be well.
    pub(crate) fn unmet(&mut self, now: Duration) {
        if self.met || self.info.is_none() {
            return;
        }
        let words = Words::new(Health::Unknown, Admission::Schedulable, Action::None, Scope::Device);
        let row = Row { reason: Reason::AgentBlind, words, clears: Clears::Reading };
        self.begin(now, row, Origin::Vendor, "not seen since the agent restarted");
    }

    /// The library lists it. Another device in its place has a record of its own.
    pub(super) fn listed(&mut self, info: &DeviceInfo) {
        let known = self.info.as_ref().map(|known| known.uuid.as_str()).unwrap_or_default();
        if !known.is_empty() && !info.uuid.is_empty() && known != info.uuid {
            let (replaying, settings) = (self.replaying, self.settings);
            *self = Self { met: true, ..Self::new(replaying, settings) };
        }
        self.info = Some(info.clone());
    }

    /// A person vouches for it as of `since`: what only a person may end is due for a validation, and what came too
    /// often is counted anew. What a reading still says stays.
    pub(crate) fn release(&mut self, now: Duration, since: Duration) {
        let mut released = Vec::new();
        for ((reason, origin), condition) in &mut self.conditions {
            let ours = condition.clears == Clears::Release && condition.phase == Phase::Active;
            if ours && condition.since <= since {
                (condition.clears, condition.last) = (Clears::Probe, condition.since);
                released.push((*reason, *origin));
            }
        }
        if released.is_empty() {
            return;
        }
        (self.reset_done, self.invalid) = (Some(now), None);
        for (reason, origin) in released {
            if reason == Reason::RepeatedFault {
                self.begun.clear();
                self.returned.clear();
                self.failures.clear();
            }
            if let Origin::Code(code) = origin {
                self.npu.forget(code);
            }
        }
    }
}
