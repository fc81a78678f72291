//! Programs that fail on one device: which lines are one program's, what a fault of the device explains, and when so
//! many programs fail that the device is suspected.

use std::time::Duration;

use berth_types::{Action, Health, Reason, Scope};

use super::{
    Device, Effect,
    xids::{PATIENCE, REMEMBERED, SAME, Trace, Waiting},
};
use crate::health::{
    condition::{DAY, WINDOW},
    fact::Xid,
};

/// Processes that must fail on one device before it is suspected.
const SUSPICIOUS: usize = 4;

impl Device {
    /// Memory lost in one program. Another program that is hit is another note.
    pub(super) fn contained(&mut self, now: Duration, xid: &Xid, effects: &mut Vec<Effect>) {
        let joins = |trace: &mut Trace| {
            let together = now.saturating_sub(trace.last) <= SAME && (trace.pid.is_none() || xid.pid.is_none());
            trace.number == 94 && (together || (trace.pid.is_some() && trace.pid == xid.pid))
        };
        if !self.traced(now, joins) {
            self.remember(Trace { number: 94, pid: xid.pid, last: now });
            self.note_soon(now, xid, Reason::MemoryUncorrectable, effects);
        }
    }

    /// A program's own error, unless something else explains it.
    pub(super) fn program(&mut self, now: Duration, xid: &Xid, effects: &mut Vec<Effect>) {
        if self.explained(now) {
            return;
        }
        let follows = xid.number == 43 && self.traced(now, |trace| matches!(trace.number, 13 | 31));
        let same = |trace: &mut Trace| {
            trace.number == xid.number && (trace.pid == xid.pid || trace.pid.is_none() || xid.pid.is_none())
        };
        if follows || self.traced(now, same) {
            return;
        }
        self.remember(Trace { number: xid.number, pid: xid.pid, last: now });
        self.note_soon(now, xid, Reason::ProcessFault, effects);
    }

    /// Channels torn down: a victim of what came before.
    pub(super) fn torn(&mut self, now: Duration, xid: &Xid, effects: &mut Vec<Effect>) {
        for trace in self.traces.iter_mut().filter(|trace| trace.number == 94 && trace.pid.is_none()) {
            trace.pid = xid.pid.filter(|_| now.saturating_sub(trace.last) <= SAME);
        }
        let mut named = false;
        for waiting in &mut self.waiting {
            if let Waiting::Note { xid: known, until, .. } = waiting
                && known.pid.is_none()
                && xid.pid.is_some()
            {
                (known.pid, known.process) = (xid.pid, xid.process.clone());
                (*until, named) = (now, true);
            }
        }
        if named {
            self.decide_waiting(now, effects);
        }
        if !self.explained(now) && !self.traced(now, |_| true) {
            self.remember(Trace { number: xid.number, pid: xid.pid, last: now });
            self.note_soon(now, xid, Reason::ProcessFault, effects);
        }
    }

    /// Whether a device-level fault of the last minute explains what programs say; it goes on if so.
    fn explained(&mut self, now: Duration) -> bool {
        let mut explained = false;
        for ((reason, _), condition) in &mut self.conditions {
            let weak = match reason {
                Reason::AgentBlind | Reason::ThermalThrottle | Reason::RepeatedFault => true,
                // What only makes a device less good crashes no program.
                Reason::MemoryCorrectableBurst
                | Reason::MemoryRemapPending
                | Reason::PowerFault
                | Reason::PcieFault
                | Reason::NetworkDown => condition.words.health < Health::Unhealthy,
                _ => false,
            };
            if !weak && condition.words.scope != Scope::Process && condition.explains(now) {
                condition.last = now;
                explained = true;
            }
        }
        explained
    }

    pub(super) fn traced(&mut self, now: Duration, mut joins: impl FnMut(&mut Trace) -> bool) -> bool {
        self.traces.retain(|trace| now.saturating_sub(trace.last) <= WINDOW);
        let mut found = false;
        for trace in self.traces.iter_mut() {
            if joins(trace) {
                (trace.last, found) = (now, true);
            }
        }
        found
    }

    /// Keeps a note for later facts to join, in the place of the one that was longest without any.
    pub(super) fn remember(&mut self, trace: Trace) {
        if self.traces.len() >= REMEMBERED
            && let Some((oldest, _)) = self.traces.iter().enumerate().min_by_key(|(_, trace)| trace.last)
        {
            self.traces.swap_remove(oldest);
        }
        self.traces.push(trace);
    }

    fn note_soon(&mut self, now: Duration, xid: &Xid, reason: Reason, effects: &mut Vec<Effect>) {
        let until = if xid.pid.is_some() { now } else { now.saturating_add(PATIENCE) };
        self.waiting.push(Waiting::Note { xid: xid.clone(), reason, until });
        self.decide_waiting(now, effects);
    }

    pub(super) fn say(&mut self, now: Duration, xid: &Xid, reason: Reason, effects: &mut Vec<Effect>) {
        effects.push(Effect::Note {
            reason,
            action: Action::RestartWorkload,
            scope: Scope::Process,
            evidence: xid.evidence(),
        });
        let Some(pid) = xid.pid.filter(|_| matches!(xid.number, 13 | 31)) else { return };
        self.failures.retain(|(at, known)| now.saturating_sub(*at) <= DAY && *known != pid);
        self.failures.push_back((now, pid));
        if self.failures.len() > SUSPICIOUS {
            self.failures.pop_front();
        }
        if self.failures.len() >= SUSPICIOUS {
            effects.push(Effect::Suspect);
        }
    }
}
