//! XIDs and events of one device: what each begins, joins or only notes.

use std::time::Duration;

use berth_types::{Action, Admission, Reason, Scope};
use serde::{Deserialize, Serialize};

use super::{Device, Effect};
use crate::health::{
    catalog::{self, Row, Treat},
    condition::{Clears, DAY, Origin, WINDOW, Words},
    fact::{Source, Xid},
    nvlink,
};

/// How long a note waits for the process's number, and a disputed code for the driver's word. Well below
/// the 250 ms in which a report must leave.
const PATIENCE: Duration = Duration::from_millis(150);
/// A line and an event of one number within this are one XID.
const SAME: Duration = Duration::from_secs(2);
/// Processes that must fail on one device before it is suspected.
const SUSPICIOUS: usize = 4;
/// GSP timeouts of one incident after which nothing may stay on the device.
const SILENT: u32 = 3;
/// Notes, and XIDs told by one source, that a device remembers at once: a storm on one device costs no more per line
/// the longer it lasts.
const REMEMBERED: usize = 64;

/// What is decided a little later.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Waiting {
    /// A note whose process is not known yet.
    Note { xid: Xid, reason: Reason, until: Duration },
    /// A code that the driver's recovery action decides.
    Driver { xid: Xid, firm: Row, soft: Option<Row>, at: Duration, until: Duration },
    /// An event of a link whose line may tell which end is at fault.
    Line { xid: Xid, row: Row, until: Duration },
    /// A link error that follows from another.
    Secondary { evidence: String, until: Duration },
}

impl Waiting {
    pub(super) fn until(&self) -> Duration {
        match self {
            Self::Note { until, .. }
            | Self::Driver { until, .. }
            | Self::Line { until, .. }
            | Self::Secondary { until, .. } => *until,
        }
    }
}

/// A note that was made: later facts of the same kind join it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Trace {
    number: u16,
    pid: Option<u32>,
    last: Duration,
}

/// An XID that one source told of and the other may still tell of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Seen {
    number: u16,
    source: Source,
    at: Duration,
}

impl Device {
    pub(super) fn xid(&mut self, now: Duration, xid: &Xid, effects: &mut Vec<Effect>) {
        if self.replaying {
            return self.replay(now, xid);
        }
        if self.told_twice(now, xid) {
            return self.refine(now, xid, effects);
        }
        match catalog::treat(xid.number) {
            Treat::Count => {}
            Treat::Note => self.program(now, xid, effects),
            Treat::Torn => self.torn(now, xid, effects),
            Treat::Contained => {
                if !self.traced(now, |trace| trace.number == 94) {
                    self.remember(Trace { number: 94, pid: xid.pid, last: now });
                    self.note_soon(now, xid, Reason::MemoryUncorrectable, effects);
                }
            }
            Treat::Device(row) if nvlink::line_decides(xid) => {
                let until = now.saturating_add(PATIENCE);
                self.waiting.push(Waiting::Line { xid: xid.clone(), row, until });
            }
            Treat::Device(row) => {
                self.device_row(now, xid, row);
                effects.push(Effect::Reread);
            }
            Treat::Driver(firm, soft) => self.ask_driver(now, xid, firm, soft, effects),
            Treat::Node(_) => {}
        }
    }

    pub(super) fn event(&mut self, now: Duration, bits: u64, effects: &mut Vec<Effect>) {
        let mut begin = |reason, words, clears| {
            self.begin(now, Row { reason, words, clears }, Origin::Vendor, &format!("NVML event {bits:#x}"));
        };
        match bits {
            0x2 | 0x2000 => begin(Reason::MemoryUncorrectable, catalog::RESET, Clears::Probe),
            0x200 => begin(Reason::MemoryCorrectableBurst, catalog::WATCH, Clears::ReadingHeld),
            0x800 => begin(Reason::MemoryRemapFailed, catalog::RESET, Clears::Release),
            0x4000 => self.lost(now, "NVML event 0x4000 (unavailable)"),
            _ => {}
        }
        effects.push(Effect::Reread);
    }

    /// History: only what a device-level code began, for [`Device::settle`] to judge.
    fn replay(&mut self, now: Duration, xid: &Xid) {
        if let Treat::Device(row) | Treat::Driver(row, _) = catalog::treat(xid.number)
            && row.reason != Reason::UnknownFault
            && row.reason != Reason::FabricDegraded
        {
            self.begin(now, row, Origin::Vendor, &xid.evidence());
        }
    }

    fn told_twice(&mut self, now: Duration, xid: &Xid) -> bool {
        self.seen.retain(|seen| now.saturating_sub(seen.at) <= SAME);
        let other = |seen: &Seen| seen.number == xid.number && seen.source != xid.source;
        if let Some(at) = self.seen.iter().position(other) {
            self.seen.remove(at);
            return true;
        }
        self.seen.push_back(Seen { number: xid.number, source: xid.source, at: now });
        if self.seen.len() > REMEMBERED {
            self.seen.pop_front();
        }
        false
    }

    /// The second teller of an XID: it may know the process and the text.
    fn refine(&mut self, now: Duration, xid: &Xid, effects: &mut Vec<Effect>) {
        let bare = format!("Xid {}", xid.number);
        for condition in self.conditions.values_mut().filter(|condition| condition.evidence == bare) {
            condition.evidence = xid.evidence();
        }
        let line = self
            .waiting
            .iter()
            .position(|waiting| matches!(waiting, Waiting::Line { xid: known, .. } if known.number == xid.number));
        if let Some(Waiting::Line { row, .. }) = line.map(|at| self.waiting.remove(at)) {
            self.device_row(now, xid, row);
            effects.push(Effect::Reread);
        }
        let mut ready = Vec::new();
        for waiting in &mut self.waiting {
            if let Waiting::Note { xid: known, until, .. } = waiting
                && known.number == xid.number
                && known.pid.is_none()
                && xid.source == Source::KernelLog
            {
                *known = xid.clone();
                *until = now;
                ready.push(xid.clone());
            }
        }
        if !ready.is_empty() {
            self.decide_waiting(now, effects);
        }
    }

    fn device_row(&mut self, now: Duration, xid: &Xid, row: Row) {
        let branch = self.info.as_ref().and_then(|info| info.driver_branch);
        match nvlink::judge(xid, branch) {
            nvlink::Verdict::Peer => {
                // Nothing is wrong here but the link, and that is the other end's to repair.
                let words = Words { admission: Admission::Draining, ..catalog::WATCH };
                let row = Row { reason: Reason::FabricLinkDown, words, clears: Clears::Reading };
                self.begin(now, row, Origin::Vendor, &xid.evidence());
            }
            nvlink::Verdict::Ours => self.begin(now, row, Origin::Vendor, &xid.evidence()),
            nvlink::Verdict::Lesser => {
                let row = Row { reason: Reason::FabricDegraded, words: catalog::FABRIC, clears: Clears::Reading };
                self.begin(now, row, Origin::Vendor, &xid.evidence());
            }
            nvlink::Verdict::Secondary => {
                let until = now.saturating_add(PATIENCE);
                self.waiting.push(Waiting::Secondary { evidence: xid.evidence(), until });
            }
            nvlink::Verdict::Ignored => {}
        }
        let hang = self.conditions.get_mut(&(Reason::FirmwareHang, Origin::Vendor));
        if let Some(hang) = hang.filter(|hang| hang.count >= SILENT && matches!(xid.number, 119 | 120)) {
            hang.words.admission = Admission::Barred;
        }
    }

    /// Whether a line may still tell which end of a link is at fault.
    pub(super) fn awaits_line(&self) -> bool {
        self.waiting.iter().any(|waiting| matches!(waiting, Waiting::Line { .. }))
    }

    /// A program's own error, unless something else explains it.
    fn program(&mut self, now: Duration, xid: &Xid, effects: &mut Vec<Effect>) {
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
    fn torn(&mut self, now: Duration, xid: &Xid, effects: &mut Vec<Effect>) {
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
            let weak = matches!(reason, Reason::AgentBlind | Reason::ThermalThrottle | Reason::RepeatedFault);
            if !weak && condition.words.scope != Scope::Process && condition.explains(now) {
                condition.last = now;
                explained = true;
            }
        }
        explained
    }

    fn traced(&mut self, now: Duration, mut joins: impl FnMut(&mut Trace) -> bool) -> bool {
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
    fn remember(&mut self, trace: Trace) {
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

    fn ask_driver(&mut self, now: Duration, xid: &Xid, firm: Row, soft: Option<Row>, effects: &mut Vec<Effect>) {
        let until = now.saturating_add(PATIENCE);
        self.waiting.push(Waiting::Driver { xid: xid.clone(), firm, soft, at: now, until });
        effects.push(Effect::Reread);
    }

    /// Decides what waited: at its time, or when the driver's word came.
    pub(super) fn decide_waiting(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        for waiting in std::mem::take(&mut self.waiting) {
            match waiting {
                Waiting::Note { xid, reason, until } if until <= now => self.say(now, &xid, reason, effects),
                Waiting::Secondary { evidence, until } if until <= now => effects.push(Effect::FabricNote(evidence)),
                Waiting::Line { xid, row, until } if until <= now => {
                    self.device_row(now, &xid, row);
                    effects.push(Effect::Reread);
                }
                Waiting::Driver { xid, firm, soft, at, until } => {
                    let read = self.last.as_ref().filter(|last| last.begun >= at);
                    let said = self.recovery_line.filter(|said| *said >= at);
                    if read.is_some() || said.is_some() || until <= now {
                        let fresh = read.is_some_and(|read| read.recovery.value().is_some()) || said.is_some();
                        let word = self.recovery.filter(|_| fresh);
                        self.by_driver(now, &xid, firm, soft, word, effects);
                    } else {
                        self.waiting.push(Waiting::Driver { xid, firm, soft, at, until });
                    }
                }
                later => self.waiting.push(later),
            }
        }
    }

    fn by_driver(
        &mut self,
        now: Duration,
        xid: &Xid,
        firm: Row,
        soft: Option<Row>,
        word: Option<u32>,
        effects: &mut Vec<Effect>,
    ) {
        match (word, soft) {
            (Some(0), Some(soft)) => self.begin(now, soft, Origin::Vendor, &xid.evidence()),
            // A code that nobody listed: with the driver content, or silent, it is only recorded.
            (Some(0) | None, None) => effects.push(Effect::Note {
                reason: firm.reason,
                action: Action::None,
                scope: Scope::Device,
                evidence: xid.evidence(),
            }),
            (Some(value), None) => {
                let words = catalog::recovery(value).map_or(firm.words, |row| row.words);
                self.begin(now, Row { words, ..firm }, Origin::Vendor, &xid.evidence());
            }
            _ => self.begin(now, firm, Origin::Vendor, &xid.evidence()),
        }
    }

    fn say(&mut self, now: Duration, xid: &Xid, reason: Reason, effects: &mut Vec<Effect>) {
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
