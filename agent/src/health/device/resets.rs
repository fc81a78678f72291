//! The driver's recovery action, resets and validation of one device: how it is taken back.

use std::time::Duration;

use berth_types::{Action, Admission, Health, Reason};

use super::{
    Device, Effect, Phase, ResetStep,
    ladder::{CAUSES, climb},
};
use crate::health::{
    catalog,
    condition::{Clears, Condition, Origin, Words, next_step},
    neighbours::Cause,
};

/// A validation waits so long for a reading that is good.
const TRUST: Duration = Duration::from_secs(10);
/// A reset that was not heard of again after this is over.
const RESET_LIMIT: Duration = Duration::from_secs(600);

impl Device {
    /// A line of the kernel log about the recovery action; without a value the device is asked.
    pub(super) fn recovery_line(&mut self, now: Duration, value: Option<u32>, effects: &mut Vec<Effect>) {
        match value {
            Some(value) => {
                self.recovery_line = Some(now);
                self.recovery_value(now, value, &format!("Xid 154, recovery action {value}"));
            }
            None => effects.push(Effect::Reread),
        }
        self.decide_waiting(now, effects);
    }

    /// The recovery action is `value`.
    pub(super) fn recovery_value(&mut self, now: Duration, value: u32, evidence: &str) {
        let before = self.recovery.replace(value);
        if before != Some(value) {
            self.unburden();
        }
        let row = catalog::recovery(value);
        let reset_began = |since: Duration| self.resetting.or(self.reset_done).is_some_and(|at| at >= since);
        let latched = self.conditions.get(&(Reason::ResetRequired, Origin::Recovery));
        // A reset answers a wish; only its validation takes the wish back. Otherwise the driver does.
        let stays = latched.is_some_and(|wish| wish.phase != Phase::Active || reset_began(wish.since));
        for reason in [Reason::ResetRequired, Reason::FabricDegraded, Reason::UnknownFault] {
            let wanted = row.is_some_and(|row| row.reason == reason);
            let stays = reason == Reason::ResetRequired && stays;
            if !wanted && !stays {
                self.end(reason, Origin::Recovery);
            }
        }
        let Some(row) = row else { return };
        let explained = row.reason == Reason::ResetRequired
            && self.conditions.iter_mut().any(|((reason, origin), cause)| {
                let cause_of =
                    CAUSES.contains(reason) && *origin == Origin::Vendor && !matches!(cause.phase, Phase::Probation(_));
                // Before the reset's reading the old value says nothing new.
                cause_of && cause.words.worsened(row.words) == cause.words
            });
        if explained {
            return;
        }
        let known = self.conditions.get(&(row.reason, Origin::Recovery));
        let same = known.is_some_and(|known| known.phase == Phase::Active && before == Some(value));
        if !same {
            self.begin(now, row, Origin::Recovery, evidence);
            // The wish may have become milder: it is the driver's to say.
            if let Some(wish) = self.conditions.get_mut(&(row.reason, Origin::Recovery)) {
                wish.words = row.words;
            }
        }
        self.absorb();
    }

    /// The driver says something else than before: what its wish made worse is as it was, unless a reset has begun to
    /// answer it.
    fn unburden(&mut self) {
        let reset = self.resetting.or(self.reset_done);
        let active = self.conditions.values_mut().filter(|condition| condition.phase == Phase::Active);
        for condition in active.filter(|condition| reset.is_none_or(|at| at < condition.since)) {
            if let Some(own) = condition.own.take() {
                (condition.words, condition.clears) = own;
            }
        }
    }

    /// Whether an ordered reset goes on; one that was not heard of again is over.
    pub(super) fn in_reset(&mut self, now: Duration) -> bool {
        self.resetting = self.resetting.filter(|at| now.saturating_sub(*at) <= RESET_LIMIT);
        self.resetting.is_some()
    }

    pub(super) fn reset(&mut self, now: Duration, step: ResetStep, effects: &mut Vec<Effect>) {
        match step {
            ResetStep::Started => {
                (self.resetting, self.reset_done, self.validated) = (Some(now), None, None);
                self.npu.silence.announce(now);
            }
            ResetStep::Done => {
                (self.resetting, self.reset_done) = (None, Some(now));
                self.npu.silence.done();
                effects.push(Effect::Reread);
            }
            ResetStep::Failed => {
                self.resetting = None;
                self.npu.silence.end();
                self.fail(now, Action::ResetDevice, "reset failed");
            }
            // It may still be starting; whether it was reset its own readings say, or the next reset.
            ResetStep::Left => {
                if self.resetting.take().is_some() {
                    self.npu.silence.done();
                }
                effects.push(Effect::Reread);
            }
        }
    }

    pub(super) fn validate(&mut self, now: Duration, ok: bool, effects: &mut Vec<Effect>) {
        if ok {
            self.validated = Some(now);
            self.come_back(now);
            effects.push(Effect::Reread);
            return;
        }
        (self.validated, self.invalid) = (None, Some(now));
        let step = if self.reset_done.is_some() { Action::ResetDevice } else { Action::None };
        self.fail(now, step, "validation failed");
    }

    /// One step up for every fault that the failed step was meant to end.
    fn fail(&mut self, now: Duration, step: Action, how: &str) {
        let mut worn = false;
        let grouped = self.grouped();
        // A device of a group was reset with all of it.
        let step = if grouped && step == Action::ResetDevice { Action::ResetGroup } else { step };
        for condition in self.conditions.values_mut().filter(|condition| condition.words.action != Action::None) {
            let before = condition.words;
            let failed = if step == Action::None { before.action } else { step };
            let mut words = climb(catalog::RESET, false);
            (words.scope, words.action) = (before.scope, next_step(failed, grouped).max(before.action));
            if failed < Action::ResetDevice {
                (words.health, words.admission) = (before.health, before.admission);
            }
            condition.words = before.worsened(words);
            (condition.phase, condition.own) = (Phase::Active, None);
            condition.evidence = format!("{}; {how}", condition.evidence);
            worn |= condition.words.action == Action::ServiceHardware && before.action != Action::ServiceHardware;
        }
        if worn {
            self.give_up(now, how);
        }
    }

    /// Starts probation, once validation passed and the device's own values are good.
    pub(super) fn come_back(&mut self, now: Duration) {
        let resetting = self.in_reset(now);
        let Some(validated) = self.validated.filter(|at| now.saturating_sub(*at) <= TRUST) else { return };
        let Some(begun) = self.good_reading() else { return };
        let fresh = self.reset_done.is_none_or(|done| begun >= done);
        if !fresh || begun.saturating_add(TRUST) < validated || resetting {
            return;
        }
        self.validated = None;
        let returning: Vec<_> = self
            .conditions
            .iter()
            .filter(|((reason, origin), condition)| {
                if self.holds(*origin) {
                    return false;
                }
                let probed = condition.clears == Clears::Probe
                    || (condition.clears == Clears::ReadingHeld && condition.words.action == Action::RestartWorkload);
                // What came after the probe was not probed.
                let late = condition.last > validated || matches!(condition.phase, Phase::Probation(_));
                probed && !late && self.proven(*reason, condition)
            })
            .map(|(key, _)| *key)
            .collect();
        for key in returning {
            let until = now.saturating_add(self.probation(now, key.0));
            if let Some(condition) = self.conditions.get_mut(&key) {
                condition.phase = Phase::Probation(until);
                condition.words.admission = match condition.words.admission {
                    Admission::Schedulable => Admission::Schedulable,
                    Admission::Draining | Admission::Barred => Admission::Draining,
                };
                if key.1 != Origin::Sibling {
                    self.returned.insert(key.0, now);
                }
            }
        }
    }

    /// Whether a validation can end this fault: something was done to the device since, or it was seen to have passed;
    /// and nothing that is read says that it goes on.
    fn proven(&self, reason: Reason, condition: &Condition) -> bool {
        // An alarm of Ascend's has left the list by now.
        let Some(last) = &self.last else { return true };
        let since = |at: Option<Duration>| at.is_some_and(|at| at >= condition.since);
        match reason {
            Reason::DeviceLost => since(self.reset_done) || since(self.unreachable),
            Reason::FabricLinkDown => {
                let up = last.down().is_empty() && !last.links_down.unknown();
                up && (since(self.reset_done) || since(self.links_seen_down))
            }
            Reason::ThermalCritical => !last.too_hot() && !last.temperature.unknown(),
            _ => since(self.reset_done) || condition.words.action < Action::ResetDevice,
        }
    }

    /// When the last reading began, if it says nothing against this device.
    pub(crate) fn good_reading(&self) -> Option<Duration> {
        let Some(last) = &self.last else { return self.npu_good() };
        let good = !last.lost && last.blind().is_none() && !matches!(last.recovery.value(), Some(1 | 2 | 4));
        good.then_some(last.begun)
    }

    /// Whether the driver still lists the code of a condition.
    pub(super) fn holds(&self, origin: Origin) -> bool {
        matches!(origin, Origin::Code(code) if self.npu.active.contains_key(&code))
    }

    /// Why all devices of the reset group must be reset, if they must.
    pub(crate) fn needs_group_reset(&self) -> Option<(Reason, String)> {
        let wants = |condition: &Condition| {
            let words = condition.words;
            !matches!(condition.phase, Phase::Probation(_))
                && words.admission == Admission::Barred
                && matches!(words.action, Action::ResetGroup | Action::RebootNode)
        };
        let cause =
            self.conditions.iter().find(|((_, origin), condition)| *origin != Origin::Sibling && wants(condition));
        cause.map(|((reason, _), condition)| (*reason, condition.evidence.clone()))
    }

    /// Whether it stands by for another device of its group.
    pub(crate) fn is_sibling(&self) -> bool {
        self.conditions.keys().any(|(_, origin)| *origin == Origin::Sibling)
    }

    /// Another device of the reset group must be reset, or none must any more.
    pub(crate) fn sibling(&mut self, now: Duration, cause: Option<Cause>) {
        let known = self.conditions.iter().find(|((_, origin), _)| *origin == Origin::Sibling);
        let known = known.map(|(key, condition)| (*key, condition.clears));
        match (cause, known) {
            (Some(cause), None) => self.stand_by(now, &cause, Clears::Reading),
            // One that was reset itself comes back as such.
            (None, Some((key, Clears::Reading))) => self.end(key.0, key.1),
            (Some(_), Some(_)) | (None, _) => {}
        }
    }

    /// It is reset because another device of its group is.
    pub(crate) fn reset_along(&mut self, now: Duration, cause: &Cause, step: ResetStep, effects: &mut Vec<Effect>) {
        if step == ResetStep::Started {
            let known = self.conditions.iter_mut().find(|((_, origin), _)| *origin == Origin::Sibling);
            match known {
                Some((_, condition)) => (condition.clears, condition.phase) = (Clears::Probe, Phase::Active),
                None => self.stand_by(now, cause, Clears::Probe),
            }
        }
        self.reset(now, step, effects);
        if step == ResetStep::Left {
            // What only went along must prove itself, whether it was reset or not; a fault of its own is still read.
            self.reset_done = Some(now);
        }
    }

    /// Nothing is wrong with it, and nothing new is placed on it.
    fn stand_by(&mut self, now: Duration, (reason, scope, evidence): &Cause, clears: Clears) {
        let words = Words::new(Health::Healthy, Admission::Draining, Action::None, *scope);
        self.conditions.insert((*reason, Origin::Sibling), Condition::begun(now, words, clears, evidence));
    }
}
