//! XIDs and events of one device: what each begins or joins. What programs do is told in `programs`.

use std::time::Duration;

use berth_types::{Action, Admission, Reason, Scope};
use serde::{Deserialize, Serialize};

use super::{Device, Effect};
use crate::health::{
    catalog::{self, Row, Treat},
    condition::{Clears, Origin, Phase, WINDOW, Words},
    fact::{Source, Xid},
    nvlink,
};

/// How long a note waits for the process's number, and a disputed code for the driver's word. Well below
/// the 250 ms in which a report must leave.
pub(super) const PATIENCE: Duration = Duration::from_millis(150);
/// How often, and how long after each other, a device that a line calls lost is asked again while it answers.
const LOOKS: u8 = 3;
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// A line and an event of one number within this are one XID.
pub(super) const SAME: Duration = Duration::from_secs(2);
/// The very same line again within this is one record that was delivered twice.
const INSTANT: Duration = Duration::from_millis(20);
/// Lines that are remembered for [`INSTANT`].
const LINES: usize = 16;
/// GSP timeouts of one incident after which nothing may stay on the device.
const SILENT: u32 = 3;
/// Notes, and XIDs told by one source, that a device remembers at once: a storm on one device costs no more per line
/// the longer it lasts.
pub(super) const REMEMBERED: usize = 64;

/// What is decided a little later.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Waiting {
    /// A note whose process is not known yet.
    Note { xid: Xid, reason: Reason, until: Duration },
    /// A code that the driver's recovery action decides.
    Driver { xid: Xid, firm: Row, soft: Option<Row>, at: Duration, until: Duration },
    /// An event of a link whose line may tell which end is at fault.
    Line { xid: Xid, row: Row, until: Duration },
    /// A link error that follows from another; `program` = one by which a program lost.
    Secondary {
        evidence: String,
        #[serde(default)]
        program: bool,
        until: Duration,
    },
    /// A device that a line calls lost and that still answers: it is asked again, so often more.
    Lost { until: Duration, left: u8 },
}

impl Waiting {
    pub(super) fn until(&self) -> Duration {
        match self {
            Self::Note { until, .. }
            | Self::Driver { until, .. }
            | Self::Line { until, .. }
            | Self::Secondary { until, .. }
            | Self::Lost { until, .. } => *until,
        }
    }
}

/// A note that was made: later facts of the same kind join it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Trace {
    pub(super) number: u16,
    pub(super) pid: Option<u32>,
    pub(super) last: Duration,
}

/// An XID that one source told of and the other may still tell of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Seen {
    number: u16,
    source: Source,
    at: Duration,
}

/// A line of the kernel log, and when it came.
pub(super) type Line = (Duration, Xid);

impl Device {
    pub(super) fn xid(&mut self, now: Duration, xid: &Xid, effects: &mut Vec<Effect>) {
        if self.replaying {
            return self.replay(now, xid);
        }
        if self.delivered_again(now, xid) {
            return;
        }
        if self.told_twice(now, xid) {
            return self.refine(now, xid, effects);
        }
        match catalog::treat(xid.number) {
            Treat::Count => {}
            Treat::Note => self.program(now, xid, effects),
            Treat::Torn => self.torn(now, xid, effects),
            Treat::Contained => self.contained(now, xid, effects),
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
            && nvlink::judge(xid, self.branch()) == nvlink::Verdict::Ours
        {
            self.begin(now, row, Origin::Vendor, &xid.evidence());
        }
    }

    /// A record may be delivered twice, as when the log is opened again; its second delivery says nothing.
    fn delivered_again(&mut self, now: Duration, xid: &Xid) -> bool {
        if xid.source != Source::KernelLog {
            return false;
        }
        self.lines.retain(|(at, _)| now.saturating_sub(*at) <= INSTANT);
        let again = self.lines.iter().any(|(_, known)| known == xid);
        if !again {
            if self.lines.len() >= LINES {
                self.lines.pop_front();
            }
            self.lines.push_back((now, xid.clone()));
        }
        again
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
        for waiting in &mut self.waiting {
            if let Waiting::Driver { xid: known, .. } = waiting
                && known.number == xid.number
                && known.source == Source::Event
            {
                *known = xid.clone();
            }
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
        let hang = (Reason::FirmwareHang, Origin::Vendor);
        let hung = self.conditions.get(&hang).is_some_and(|open| !matches!(open.phase, Phase::Probation(_)));
        match nvlink::judge(xid, self.branch()) {
            nvlink::Verdict::Peer => {
                // Nothing is wrong here but the link, and that is the other end's to repair.
                let words = Words { admission: Admission::Draining, ..catalog::WATCH };
                let row = Row { reason: Reason::FabricLinkDown, words, clears: Clears::Reading };
                self.begin(now, row, Origin::Vendor, &xid.evidence());
            }
            nvlink::Verdict::Ours => {
                self.begin(now, row, Origin::Vendor, &xid.evidence());
                if row.reason == Reason::DeviceLost {
                    self.await_loss(now);
                }
            }
            nvlink::Verdict::Lesser => {
                let row = Row { reason: Reason::FabricDegraded, words: catalog::FABRIC, clears: Clears::Reading };
                self.begin(now, row, Origin::Vendor, &xid.evidence());
            }
            nvlink::Verdict::Secondary => self.secondary(now, xid, false),
            nvlink::Verdict::Program => self.secondary(now, xid, true),
            nvlink::Verdict::Ignored => {}
        }
        if matches!(xid.number, 119 | 120) {
            self.gsp_timeouts = if hung { self.gsp_timeouts.saturating_add(1) } else { 1 };
            if let Some(hang) = self.conditions.get_mut(&hang).filter(|_| self.gsp_timeouts >= SILENT) {
                hang.words.admission = Admission::Barred;
            }
        } else if !hung {
            self.gsp_timeouts = 0;
        }
    }

    /// The driver may answer for a device a moment longer than it is there, and only a device that was seen to be away can
    /// be seen to come back without a reset.
    pub(super) fn await_loss(&mut self, now: Duration) {
        self.waiting.retain(|waiting| !matches!(waiting, Waiting::Lost { .. }));
        self.waiting.push(Waiting::Lost { until: now.saturating_add(PATIENCE), left: LOOKS });
    }

    /// Whether a line calls it lost and no reading has said so.
    fn not_seen_lost(&self) -> bool {
        let lost = self.conditions.get(&(Reason::DeviceLost, Origin::Vendor));
        lost.is_some_and(|lost| {
            lost.phase == Phase::Active && self.unreachable.is_none_or(|unreachable| unreachable < lost.since)
        })
    }

    fn branch(&self) -> Option<u16> {
        self.info.as_ref().and_then(|info| info.driver_branch)
    }

    /// A link error that follows from another: said a little later, if nothing explains it by then.
    fn secondary(&mut self, now: Duration, xid: &Xid, program: bool) {
        if !self.traced(now, |trace| trace.number == xid.number && trace.pid == xid.pid) {
            self.remember(Trace { number: xid.number, pid: xid.pid, last: now });
            let until = now.saturating_add(PATIENCE);
            self.waiting.push(Waiting::Secondary { evidence: xid.evidence(), program, until });
        }
    }

    /// Whether a link error of the last minute said that its cause is elsewhere.
    pub(super) fn follows_another(&self, now: Duration) -> bool {
        let link = |trace: &Trace| matches!(trace.number, 74 | 144..=150) && now.saturating_sub(trace.last) <= WINDOW;
        self.traces.iter().any(link)
    }

    /// Whether a line may still tell which end of a link is at fault.
    pub(super) fn awaits_line(&self) -> bool {
        self.waiting.iter().any(|waiting| matches!(waiting, Waiting::Line { .. }))
    }

    fn ask_driver(&mut self, now: Duration, xid: &Xid, firm: Row, soft: Option<Row>, effects: &mut Vec<Effect>) {
        effects.push(Effect::Reread);
        let asked =
            |waiting: &Waiting| matches!(waiting, Waiting::Driver { xid: known, .. } if known.number == xid.number);
        let noted = soft.is_none() && self.traced(now, |trace| trace.number == xid.number);
        if noted || self.waiting.iter().any(asked) {
            return;
        }
        if soft.is_none() {
            self.remember(Trace { number: xid.number, pid: xid.pid, last: now });
        }
        let until = now.saturating_add(PATIENCE);
        self.waiting.push(Waiting::Driver { xid: xid.clone(), firm, soft, at: now, until });
    }

    /// Decides what waited: at its time, or when the driver's word came.
    pub(super) fn decide_waiting(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        for waiting in std::mem::take(&mut self.waiting) {
            match waiting {
                Waiting::Note { xid, reason, until } if until <= now => self.say(now, &xid, reason, effects),
                Waiting::Secondary { evidence, program, until } if until <= now => {
                    effects.push(Effect::FabricNote { evidence, program });
                }
                Waiting::Line { xid, row, until } if until <= now => {
                    self.device_row(now, &xid, row);
                    effects.push(Effect::Reread);
                }
                Waiting::Lost { until, left } if until <= now => {
                    if self.not_seen_lost() {
                        effects.push(Effect::Reread);
                        if let Some(left) = left.checked_sub(1) {
                            self.waiting.push(Waiting::Lost { until: now.saturating_add(LOOK_AGAIN), left });
                        }
                    }
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
}
