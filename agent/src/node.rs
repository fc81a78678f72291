//! The keeper of the ledger: takes facts from the detectors as they come, lets time pass, and shows what
//! is so to whoever watches. The only task that touches the ledger.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use berth_runtime::{
    Clock,
    clock::InFlight,
    telemetry::trace::{Step, TraceContext},
};
use berth_types::Health;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    health::{
        device::Settings,
        fact::{DeviceInfo, Local, Subject, What},
        incidents::Incidents,
        ledger::{Ledger, Outcome, Report, Standing},
    },
    metrics::Metrics,
    state_file::{self, Here, Kept, Resumed},
    vendor::{Bells, Seen},
};

/// A detector that has not settled by then is not waited for.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);
/// Notes kept for those who connect late.
const NOTES: usize = 32;
/// Between two writes of what is to outlive this process.
const KEEP_EVERY: Duration = Duration::from_secs(1);

/// One device as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// What it is.
    pub info: DeviceInfo,
    /// How it stands.
    pub standing: Standing,
    /// Trace of the fault that led to this; none = nothing did.
    pub trace: Option<TraceContext>,
}

/// What is so on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Rises with every report; with the boot id it orders the reports of this node.
    pub sequence: u64,
    /// Every device.
    pub devices: BTreeMap<Local, Shown>,
    /// The node's own entry.
    pub node: Standing,
    /// The last notes, with the sequence each came with.
    pub notes: VecDeque<(u64, Report)>,
    /// The last incidents.
    pub incidents: Arc<Incidents>,
}

/// Where what is to outlive this process goes.
#[derive(Debug)]
pub struct Keeping {
    /// The text of the state file, as it is to be.
    pub to: watch::Sender<Arc<Vec<u8>>>,
    /// Where and when the agent began.
    pub here: Here,
    /// What the clock showed then.
    pub began: Duration,
}

/// The keeper.
#[derive(Debug)]
pub struct Keeper {
    /// Time.
    pub clock: Clock,
    /// Facts as they come.
    pub facts: mpsc::Receiver<(Seen, Option<InFlight>)>,
    /// Rung where values must be read.
    pub bells: Bells,
    /// Detectors that must settle before anything is said.
    pub detectors: BTreeSet<&'static str>,
    /// Counts.
    pub metrics: Metrics,
    /// Every report as it is said, for the node lab.
    pub observer: Option<mpsc::UnboundedSender<Report>>,
    /// Where devices that are due for validation are named; `None` = validations come as facts alone.
    pub probes: Option<mpsc::Sender<Local>>,
    /// What the cluster's owner chose.
    pub settings: Settings,
    /// What an agent before this one knew.
    pub resumed: Resumed,
    /// Where what this one knows is kept; `None` = nowhere.
    pub keeping: Option<Keeping>,
}

impl Keeper {
    /// Keeps the ledger until `stop` is cancelled. Shows nothing until every detector has settled.
    pub async fn run(mut self, shown: watch::Sender<Option<Arc<Snapshot>>>, stop: CancellationToken) {
        let mut ledger = self.resumed.ledger.take().unwrap_or_else(|| Ledger::new(self.settings));
        let mut probed = BTreeSet::new();
        let mut diary = Diary { log_sequence: self.resumed.log_sequence, ..Diary::default() };
        let incidents = Arc::new(std::mem::take(&mut self.resumed.incidents));
        let mut board = Board { shown, sequence: 0, notes: VecDeque::new(), traces: BTreeMap::new(), incidents };
        let settle_by = self.clock.now().saturating_add(SETTLE_LIMIT);
        let mut started = false;
        loop {
            let wake = if started { ledger.deadline().into_iter().chain(diary.due()).min() } else { Some(settle_by) };
            let wake = wake.unwrap_or(Duration::MAX);
            // Cancel-safe: `recv` loses nothing, the others only wait.
            let (outcome, seen_at, guard) = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                seen = self.facts.recv() => match seen {
                    Some((seen, guard)) => {
                        let seen_at = self.clock.unix();
                        diary.note(&seen);
                        (self.take(&mut ledger, seen), seen_at, guard)
                    }
                    None => break,
                },
                () = self.clock.sleep_until(wake) => {
                    if !started {
                        tracing::warn!(detectors = ?self.detectors, "not settled: started without");
                        self.detectors.clear();
                    }
                    (ledger.tick(self.clock.now()), self.clock.unix(), None)
                }
            };
            if !started && self.detectors.is_empty() {
                started = true;
                let reports = ledger.start(self.clock.now());
                self.tell(&reports, &board);
                board.record(&ledger, &reports, self.clock.unix_ms());
                diary.changed = true;
                board.show(&ledger, &[], &self.metrics);
            }
            self.follow(&outcome);
            self.probe(&ledger, &mut probed);
            if started && !outcome.reports.is_empty() {
                board.trace(&outcome.reports, (seen_at, self.clock.unix()));
                self.tell(&outcome.reports, &board);
                board.record(&ledger, &outcome.reports, self.clock.unix_ms());
                board.show(&ledger, &outcome.reports, &self.metrics);
                diary.changed = true;
            }
            if started && diary.due().is_some_and(|at| at <= self.clock.now()) {
                self.keep(&ledger, &board, &mut diary);
            }
            drop(guard);
        }
        if started {
            self.keep(&ledger, &board, &mut diary);
        }
    }

    /// Hands on what is to outlive this process.
    fn keep(&self, ledger: &Ledger, board: &Board, diary: &mut Diary) {
        let now = self.clock.now();
        (diary.changed, diary.kept) = (false, Some(now));
        let Some(Keeping { to, here, began }) = &self.keeping else { return };
        let here = Here { uptime: here.uptime.saturating_add(now.saturating_sub(*began)), ..here.clone() };
        let kept = Kept { ledger, incidents: &board.incidents, log_sequence: diary.log_sequence };
        match state_file::write_text(&kept, now, &here) {
            Ok(text) => drop(to.send_replace(Arc::new(text))),
            Err(error) => tracing::error!(%error, "the agent's state cannot be written down"),
        }
    }

    fn take(&mut self, ledger: &mut Ledger, seen: Seen) -> Outcome {
        match seen {
            Seen::Fact(fact) => {
                self.metrics.facts.get_or_create(&vec![("kind", kind(&fact.what).to_owned())]).inc();
                self.metrics.board.take(&fact);
                ledger.take(self.clock.now(), &fact)
            }
            Seen::Settled(detector) => {
                self.detectors.remove(detector);
                Outcome::default()
            }
            Seen::LogLost => {
                self.bells.ring_all();
                Outcome::default()
            }
            Seen::Logged(_) => Outcome::default(),
        }
    }

    /// Names each device that has become due, once until it no longer is.
    fn probe(&self, ledger: &Ledger, probed: &mut BTreeSet<Local>) {
        let Some(probes) = &self.probes else { return };
        let due: BTreeSet<Local> = ledger.awaiting_validation().cloned().collect();
        probed.retain(|local| due.contains(local));
        for local in due {
            // One that finds no room is named again with the next fact.
            if !probed.contains(&local) && probes.try_send(local.clone()).is_ok() {
                probed.insert(local);
            }
        }
    }

    fn follow(&self, outcome: &Outcome) {
        outcome.reread.iter().for_each(|local| self.bells.ring(local));
        self.metrics.swallowed.inc_by(u64::from(outcome.swallowed));
    }

    fn tell(&self, reports: &[Report], board: &Board) {
        for report in reports {
            let Report { of, note, state, evidence, .. } = report;
            let device = match of {
                Subject::Node => "node",
                Subject::Device(local) => local.as_str(),
            };
            let label = vec![("reason", state.reason.map_or("none", |reason| reason.as_str()).to_owned())];
            if *note {
                self.metrics.notes.get_or_create(&label).inc();
                tracing::info!(device, reason = ?state.reason, evidence, "health note");
            } else {
                self.metrics.transitions.get_or_create(&label).inc();
                let trace_id = board.traces.get(device).map(|trace| trace.trace_id());
                tracing::info!(
                    device,
                    trace_id,
                    health = %state.health,
                    admission = %state.admission,
                    action = %state.action,
                    reason = ?state.reason,
                    evidence,
                    "health"
                );
            }
            if let Some(observer) = &self.observer {
                let _ = observer.send(report.clone());
            }
        }
    }
}

fn kind(what: &What) -> &'static str {
    match what {
        What::Listed(_) | What::Unspoken(_) => "device",
        What::Xid(_) => "xid",
        What::Recovery(_) => "recovery",
        What::BusLoss(_) => "bus_loss",
        What::Switch { .. } => "switch",
        What::Killed(_) | What::DriverLoaded(_) | What::SlotDown(_) => "kernel",
        What::Event(_) => "event",
        What::Reading(_) | What::Npu(_) => "reading",
        What::Alarm(_) => "alarm",
        What::Fabric { .. } | What::Fabrics { .. } => "fabric",
        What::Driver(_) => "driver",
        What::NoLibrary { .. } | What::Library(_) | What::Inventory { .. } => "library",
        What::LogBlind(_) => "log",
        What::Count { .. } => "count",
        What::Reset(_) | What::Validated(_) | What::Unsound(_) | What::Released(_) => "reset",
        What::WorkerDied(_) | What::WorkerStuck(_) => "worker",
    }
}

/// What has changed since it was last kept.
#[derive(Debug, Default)]
struct Diary {
    changed: bool,
    kept: Option<Duration>,
    log_sequence: Option<u64>,
}

impl Diary {
    fn note(&mut self, seen: &Seen) {
        match seen {
            Seen::Logged(sequence) => self.log_sequence = self.log_sequence.max(Some(*sequence)),
            // What is read again and again is read again after a restart.
            Seen::Fact(fact) => {
                let repeats = matches!(
                    fact.what,
                    What::Reading(_) | What::Npu(_) | What::Fabrics { .. } | What::Driver(_) | What::Count { .. }
                );
                self.changed |= !repeats;
            }
            Seen::Settled(_) | Seen::LogLost => {}
        }
    }

    /// When it is to be kept.
    fn due(&self) -> Option<Duration> {
        self.changed.then(|| self.kept.map_or(Duration::ZERO, |kept| kept.saturating_add(KEEP_EVERY)))
    }
}

struct Board {
    shown: watch::Sender<Option<Arc<Snapshot>>>,
    sequence: u64,
    notes: VecDeque<(u64, Report)>,
    /// Trace of the fault that each device has, or that it has just recovered from.
    traces: BTreeMap<Local, TraceContext>,
    incidents: Arc<Incidents>,
}

impl Board {
    /// Writes reports into the list of incidents.
    fn record(&mut self, ledger: &Ledger, reports: &[Report], unix_ms: u64) {
        let unix_ms = i64::try_from(unix_ms).unwrap_or(i64::MAX);
        let incidents = Arc::make_mut(&mut self.incidents);
        for report in reports {
            let info = match &report.of {
                Subject::Node => None,
                Subject::Device(local) => ledger.info(local),
            };
            incidents.take(report, info, unix_ms);
        }
    }

    /// Each device's way from its first fault until it is well again is one trace.
    fn trace(&mut self, reports: &[Report], at: (Duration, Duration)) {
        for report in reports.iter().filter(|report| !report.note) {
            let Subject::Device(local) = &report.of else { continue };
            let well = report.state.health == Health::Healthy;
            let attributes = || {
                let reason = report.state.reason.map(|reason| reason.to_string()).unwrap_or_default();
                vec![("device", local.clone()), ("health", report.state.health.to_string()), ("reason", reason)]
            };
            let known = self.traces.remove(local);
            let parent = known.unwrap_or_else(|| {
                Step { name: "fault.seen", parent: None, at: (at.0, at.0), attributes: attributes() }.tell()
            });
            let name = if well { "fault.cleared" } else { "fault.classified" };
            let trace = Step { name, parent: Some(parent), at, attributes: attributes() }.tell();
            if !well {
                self.traces.insert(local.clone(), trace);
            }
        }
    }

    fn show(&mut self, ledger: &Ledger, reports: &[Report], metrics: &Metrics) {
        self.sequence = self.sequence.saturating_add(1);
        for report in reports.iter().filter(|report| report.note) {
            self.notes.push_back((self.sequence, report.clone()));
        }
        while self.notes.len() > NOTES {
            self.notes.pop_front();
        }
        let devices = ledger.devices().map(|(local, info)| {
            let standing = ledger.standing(&Subject::Device(local.clone()));
            let info = info.cloned().unwrap_or_else(|| unknown(local));
            let trace = self.traces.get(local).copied();
            (local.clone(), Shown { info, standing, trace })
        });
        let devices = devices.collect();
        let node = ledger.standing(&Subject::Node);
        metrics.show(&devices, &node);
        let snapshot = Snapshot {
            sequence: self.sequence,
            devices,
            node,
            notes: self.notes.clone(),
            incidents: Arc::clone(&self.incidents),
        };
        self.shown.send_replace(Some(Arc::new(snapshot)));
    }
}

/// A device that only a line of the kernel log named.
fn unknown(local: &str) -> DeviceInfo {
    DeviceInfo {
        local: local.to_owned(),
        vendor: berth_types::Vendor::Nvidia,
        product: String::new(),
        uuid: String::new(),
        memory_bytes: 0,
        interconnect_domain: None,
        card: local.to_owned(),
        pci: local.parse().ok(),
        reset_group: None,
        driver_branch: None,
    }
}
