//! When an Ascend device does not answer: whether that is a loss, a blind agent, or what a reset does. Also
//! the values that decide nothing alone: the port's own health and the memory's pages.

use std::time::Duration;

use berth_types::{Action, Admission, Health, Reason, Scope};
use serde::{Deserialize, Serialize};

use super::{Device, Effect, Phase, readings::WORN};
use crate::health::{
    alarms::{self, Level},
    catalog::{self, Row},
    condition::{Clears, Origin, Words},
    fact::{NpuReading, Read},
};

/// Not ready; may pass by itself.
const NOT_READY: i32 = -8012;
/// No such device.
const NOT_EXIST: i32 = -8008;
/// Inner error of the library.
const INNER: i32 = -8005;
/// Timeout, upgrading, occupied: worth a second look.
const RETRY: [i32; 3] = [-8006, -8017, -8020];
/// NVML: its library or a function of it is missing, it does not fit the driver, or it does not know.
const BROKEN: [i32; 4] = [12, 13, 18, 999];
/// Health of a device that is absent or not started.
const GONE: u32 = u32::MAX;
/// The worst health that a device can have.
const WORST: u32 = 3;
/// Started.
const BOOTED: u32 = 16;
/// A second look that must say the same comes no sooner.
const AGAIN: Duration = Duration::from_secs(1);
/// A chip that is asked to start has so long, be it reset or not.
const BOOT_LIMIT: Duration = Duration::from_secs(150);
/// A port that had been down for too long is trusted again after this.
pub(super) const NETWORK_HOLD: Duration = Duration::from_secs(60);
/// A reset explains silence for so long at most.
const RESET_LIMIT: Duration = Duration::from_secs(600);

/// What is known of a device's silence.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Silence {
    /// An ordered reset began: silence is expected.
    announced: Option<Duration>,
    /// The chip said that it started since then.
    started: bool,
    /// The order says that it is done.
    done: bool,
    /// The first answer that must be borne out by a second, and whether that was asked for.
    doubted: Option<(Duration, bool)>,
    /// Since when it has not been started.
    booting: Option<Duration>,
}

impl Silence {
    /// An ordered reset begins.
    pub(super) fn announce(&mut self, now: Duration) {
        (self.announced, self.started, self.done, self.doubted) = (Some(now), false, false, None);
    }

    /// The order says that it is done; the device's own word is still to come.
    pub(super) fn done(&mut self) {
        self.done = true;
    }

    /// The reset is over, or did not work.
    pub(super) fn end(&mut self) {
        self.announced = None;
    }

    /// The chip's own word.
    pub(super) fn chip_started(&mut self) {
        self.started = true;
    }

    /// Whether a reset explains silence.
    pub(super) fn expected(&self, now: Duration) -> bool {
        self.announced.is_some_and(|at| now.saturating_sub(at) <= RESET_LIMIT)
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        let doubted = self.doubted.filter(|(_, asked)| !asked).map(|(at, _)| at.saturating_add(AGAIN));
        let boot = self.booting.map(|since| since.saturating_add(BOOT_LIMIT));
        doubted.into_iter().chain(boot).min()
    }
}

impl Device {
    /// Whether the device answers, and what it means if not.
    pub(super) fn listen(&mut self, now: Duration, reading: &NpuReading) {
        self.read_boot(now, reading);
        if self.npu.silence.done && self.npu_good().is_some() {
            self.npu.silence.end();
        }
        if self.npu.silence.expected(now) {
            return;
        }
        match reading.health {
            Read::Value(GONE) => self.lost_npu(now, "DCMI health 0xFFFFFFFF (absent or not started)"),
            Read::Failed(NOT_EXIST) => self.lost_npu(now, "DCMI -8008 (device does not exist)"),
            Read::Absent | Read::Missed if reading.codes == Read::Failed(NOT_EXIST) => {
                self.lost_npu(now, "DCMI -8008 (device does not exist)");
            }
            Read::Failed(NOT_READY) if self.card_dropped() => self.lost_npu(now, "DCMI -8012, 0x40F84E00"),
            _ => {}
        }
        let retry = [reading.health.failed(), reading.codes.failed()]
            .into_iter()
            .flatten()
            .find(|code| *code == NOT_READY || RETRY.contains(code));
        let blind = reading.blind();
        match (retry, blind) {
            (Some(code), _) if self.borne_out(now, reading) => {
                if code == NOT_READY && reading.health.failed() == Some(NOT_READY) {
                    self.lost_npu(now, "DCMI health -8012 (not ready), twice");
                } else {
                    self.blind(now, &format!("DCMI {code}, twice"));
                }
            }
            (Some(_), _) => {}
            (None, Some(what)) => {
                self.npu.silence.doubted = None;
                self.blind(now, &what);
            }
            (None, None) => {
                self.npu.silence.doubted = None;
                self.end(Reason::AgentBlind, Origin::Vendor);
            }
        }
    }

    /// Whether this answer repeats one of a second ago or more; otherwise it is the first.
    fn borne_out(&mut self, now: Duration, reading: &NpuReading) -> bool {
        match self.npu.silence.doubted {
            Some((first, _)) => reading.begun >= first.saturating_add(AGAIN),
            None => {
                self.npu.silence.doubted = Some((now, false));
                false
            }
        }
    }

    /// Asks for the second look when it is time.
    pub(super) fn listen_again(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        if let Some((first, asked)) = &mut self.npu.silence.doubted
            && !*asked
            && now >= first.saturating_add(AGAIN)
        {
            *asked = true;
            effects.push(Effect::Reread);
        }
        self.stuck_boot(now);
    }

    fn read_boot(&mut self, now: Duration, reading: &NpuReading) {
        let Read::Value(boot) = reading.boot else { return };
        if boot != BOOTED {
            self.npu.silence.booting.get_or_insert(now);
            return self.stuck_boot(now);
        }
        self.npu.silence.booting = None;
        if self.npu.silence.started {
            self.npu.silence.end();
        }
    }

    fn stuck_boot(&mut self, now: Duration) {
        if self.npu.silence.booting.is_some_and(|since| now.saturating_sub(since) >= BOOT_LIMIT) {
            self.npu.silence.booting = None;
            let row = Row { reason: Reason::FirmwareHang, words: catalog::RESET, clears: Clears::Probe };
            let stuck = (Reason::FirmwareHang, Origin::Vendor);
            if !self.conditions.contains_key(&stuck) {
                self.begin(now, row, Origin::Vendor, "the chip does not finish starting");
            }
        }
    }

    fn card_dropped(&self) -> bool {
        self.hinted(alarms::CARD_DROP) || self.npu.active.contains_key(&alarms::CARD_DROP)
    }

    pub(super) fn lost_npu(&mut self, now: Duration, evidence: &str) {
        self.unreachable = Some(now);
        let key = (Reason::DeviceLost, Origin::Vendor);
        if self.conditions.get(&key).is_some_and(|open| open.phase == Phase::Active) {
            return;
        }
        let words = Level::Restart.words(self.grouped());
        self.begin(now, Row { reason: Reason::DeviceLost, words, clears: Clears::Probe }, Origin::Vendor, evidence);
    }

    fn blind(&mut self, now: Duration, what: &str) {
        let words = Words::new(Health::Unknown, Admission::Schedulable, Action::None, Scope::Device);
        let row = Row { reason: Reason::AgentBlind, words, clears: Clears::Reading };
        self.begin(now, row, Origin::Vendor, what);
    }

    /// The port's own health: 0 well, 6 not known yet, anything else a port that does not reach its peer.
    pub(super) fn read_network(&mut self, now: Duration, reading: &NpuReading) {
        let Read::Value(network) = reading.network else { return };
        let key = (Reason::NetworkDown, Origin::Vendor);
        let known = self.conditions.get(&key).map(|known| (known.phase, known.words.admission));
        // The port's own alarm says it already.
        let said = self.conditions.iter().any(|((reason, origin), condition)| {
            *reason == Reason::NetworkDown && *origin != Origin::Vendor && condition.phase == Phase::Active
        });
        if known.is_none() && said {
            return;
        }
        match (network, known) {
            (6, _) | (0, None | Some((Phase::Held(_) | Phase::Probation(_), _))) => {}
            (0, Some((Phase::Active, Admission::Schedulable))) => self.end(Reason::NetworkDown, Origin::Vendor),
            (0, Some((Phase::Active, _))) => {
                if let Some(condition) = self.conditions.get_mut(&key) {
                    condition.phase = Phase::Held(now.saturating_add(NETWORK_HOLD));
                }
            }
            (_, Some((Phase::Active, _))) => {}
            (result, _) if !self.npu.silence.expected(now) => {
                let row = Row { reason: Reason::NetworkDown, words: catalog::WATCH, clears: Clears::Reading };
                self.begin(now, row, Origin::Vendor, &format!("network health {result}"));
            }
            _ => {}
        }
    }

    /// Pages that wait for a reset to be isolated.
    pub(super) fn read_pages(&mut self, reading: &NpuReading, now: Duration) {
        let Read::Value(pages) = reading.next_isolated else { return };
        let key = (Reason::MemoryRemapPending, Origin::Vendor);
        let known = self.conditions.contains_key(&key);
        if pages > 0 && !known {
            let clears = Clears::ReadingAfterReset;
            let row = Row { reason: Reason::MemoryRemapPending, words: catalog::WATCH, clears };
            self.begin(now, row, Origin::Vendor, &format!("{pages} pages wait for a reset to be isolated"));
        } else if pages == 0 && known && self.reset_done.is_some_and(|done| reading.begun >= done) {
            self.end(key.0, key.1);
        }
    }

    /// Links whose errors grow faster than those of a good one ever do.
    pub(super) fn read_links_errors(&mut self, reading: &NpuReading, now: Duration) {
        if let Read::Value(errors) = reading.host_errors {
            self.npu.host_errors.take(now, errors);
            let row = Row { reason: Reason::PcieFault, words: catalog::WATCH, clears: Clears::Reading };
            self.worn(now, row, self.npu.host_errors.growth(), "errors on the host link");
        }
        if let Read::Value(errors) = reading.fabric_errors {
            self.npu.fabric_errors.take(now, errors);
            let row = Row { reason: Reason::FabricDegraded, words: catalog::FABRIC, clears: Clears::Reading };
            self.worn(now, row, self.npu.fabric_errors.growth(), "damaged and repeated packets on the scale-up links");
        }
    }

    fn worn(&mut self, now: Duration, row: Row, growth: u64, what: &str) {
        let known = self.conditions.contains_key(&(row.reason, Origin::Vendor));
        if growth < WORN {
            self.end(row.reason, Origin::Vendor);
        } else if !known && !self.npu.silence.expected(now) {
            self.begin(now, row, Origin::Vendor, &format!("{growth} {what} in 10 min"));
        }
    }

    /// When the last reading began, if it lets the device come back.
    pub(super) fn npu_good(&self) -> Option<Duration> {
        let last = self.npu.last.as_ref()?;
        let answers = matches!(last.health, Read::Absent | Read::Value(0..=3)) && last.blind().is_none();
        let started = matches!(last.boot, Read::Absent | Read::Value(BOOTED) | Read::Missed | Read::Failed(_));
        (answers && started).then_some(last.begun)
    }

    /// Whether the library says anything of it, be it that it cannot.
    pub(crate) fn answers(&self) -> bool {
        self.npu.last.is_some() || self.last.as_ref().is_some_and(|last| !last.lost)
    }

    /// What every call that decides fails with, if it is a code that says more of the library or driver than of the
    /// device.
    pub(crate) fn driver_error(&self) -> Option<String> {
        if let Some(last) = &self.npu.last {
            let inner = last.health.failed() == Some(INNER) && last.codes.failed() == Some(INNER);
            return inner.then(|| format!("DCMI {INNER} (inner error) from every call"));
        }
        let last = self.last.as_ref()?;
        let codes = [last.recovery.failed(), last.rows.failed(), last.ecc_uncorrected.failed()];
        let answered =
            last.recovery.value().is_some() || last.rows.value().is_some() || last.ecc_uncorrected.value().is_some();
        let code = codes.into_iter().flatten().next().filter(|_| !answered && !last.lost)?;
        let broken = codes.into_iter().flatten().all(|code| BROKEN.contains(&code));
        broken.then(|| format!("NVML {code} from every call"))
    }
}

impl NpuReading {
    /// A deciding value that did not come in time or failed for good: its name and what happened.
    #[must_use]
    pub fn blind(&self) -> Option<String> {
        if let Read::Value(health) = self.health
            && health > WORST
            && health != GONE
        {
            return Some(format!("health: DCMI says {health}, which means nothing"));
        }
        if self.health == Read::Absent && self.codes == Read::Absent {
            return Some("this driver tells neither health nor codes".to_owned());
        }
        let named = |name: &str, failed: Option<i32>, missed: bool| {
            let failed = failed.map(|code| format!("{name}: DCMI {code}"));
            failed.or_else(|| missed.then(|| format!("{name}: no answer in time")))
        };
        named("health", self.health.failed(), self.health == Read::Missed)
            .or_else(|| named("error list", self.codes.failed(), self.codes == Read::Missed))
    }
}
