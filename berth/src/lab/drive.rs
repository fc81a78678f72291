//! Plays a script to a real agent: its detectors and ledger on discrete time, its vendor library a
//! double that it opens as it opens the real one.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::Duration,
};

use anyhow::Context;
use berth_agent::{
    Eyes, Observation,
    health::{
        fact::{Fact, PciAddress, ResetStep, What as Seen},
        kmsg::{KernelLog, Read},
        ledger::Report,
        log,
    },
    metrics::Metrics,
    observe, vendor,
    vendor::{dcmi, grip::Grip, nvml},
};
use berth_runtime::{Clock, clock::InFlight};
use berth_types::Vendor;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::{
    ffi::Double,
    judge::Said,
    script::{Event, Outcome, Script, What},
};

/// Between two lines of one moment: enough for the first to be consumed whole.
const STEP: Duration = Duration::from_micros(1);
/// A vendor's library in the lab.
pub(super) struct Vendored {
    /// Who makes the devices.
    pub(super) vendor: Vendor,
    /// The double.
    pub(super) double: PathBuf,
}

impl Vendored {
    /// Its field of the header's `libraries`.
    const fn field(&self) -> &'static str {
        match self.vendor {
            Vendor::Nvidia => "nvml",
            Vendor::Ascend => "dcmi",
        }
    }
}

/// Plays `script` with the doubles of its vendors; answers what the agent said.
pub(super) fn play(script: Arc<Script>, vendors: &[Vendored]) -> anyhow::Result<Vec<Said>> {
    let folder = tempfile::tempdir().context("making the lab's folder")?;
    let clock = Clock::discrete();
    let mut doubles = BTreeMap::new();
    for vendor in vendors {
        let library = folder.path().join(super::library(vendor.vendor));
        if let Some(double) = install(&script, vendor, &library, &clock)? {
            doubles.insert(vendor.vendor, double);
        }
    }
    let (now, path) = (clock.clone(), folder.path().to_owned());
    let said =
        clock.run(async move { Lab { script, clock: now, doubles }.run(&path).await }).context("running the lab")??;
    drop(folder);
    Ok(said)
}

/// Puts the double where the agent will look for the library, unless the script says that there is none.
fn install(script: &Script, from: &Vendored, to: &Path, clock: &Clock) -> anyhow::Result<Option<Double>> {
    let header = script.header.pointer(&format!("/libraries/{}", from.field()));
    if header.is_some_and(Value::is_null) {
        return Ok(None);
    }
    let mut bytes = fs::read(&from.double).with_context(|| format!("reading {}", from.double.display()))?;
    let missing = header.and_then(|library| library.get("missing")).and_then(Value::as_array);
    for symbol in missing.into_iter().flatten().filter_map(Value::as_str) {
        hide(&mut bytes, symbol);
    }
    fs::write(to, bytes).with_context(|| format!("writing {}", to.display()))?;
    Double::open(to, &script.header.to_string(), clock).map(Some)
}

/// Stretches longer than this without a line or a report are run through in strides: no poll can see
/// anything new then.
const QUIET: Duration = Duration::from_secs(1200);
/// Polls are so far apart then.
const STRIDE: Duration = Duration::from_secs(3600);

/// Renames an exported symbol in the library's string table, so that nobody finds it.
fn hide(bytes: &mut [u8], symbol: &str) {
    let name = format!("\0{symbol}\0").into_bytes();
    let mut at = 0;
    while let Some(found) = bytes.get(at..).and_then(|rest| rest.windows(name.len()).position(|window| window == name))
    {
        at = at.saturating_add(found).saturating_add(1);
        if let Some(first) = bytes.get_mut(at) {
            *first = b'_';
        }
    }
}

struct Lab {
    script: Arc<Script>,
    clock: Clock,
    doubles: BTreeMap<Vendor, Double>,
}

impl Lab {
    async fn run(self, folder: &Path) -> anyhow::Result<Vec<Said>> {
        let (records, log) = mpsc::channel();
        let past = self.script.events.iter().take_while(|event| event.at_us < 0);
        let mut sequence = 0;
        for event in past {
            self.before(event, &records, &mut sequence).with_context(|| format!("line {}", event.line))?;
        }
        let _ = records.send(Entry::CaughtUp);
        let (observer, mut reports) = tokio::sync::mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let eyes = Eyes {
            nvml: self.nvml(folder),
            dcmi: self.dcmi(folder),
            log: Some(log::once(LabLog(log))),
            observer: Some(observer),
            ..Eyes::default()
        };
        let mut observation = observe(eyes, &self.clock, &Metrics::default(), &stop, |_, task| {
            tokio::spawn(task);
        })?;
        observation.snapshots.wait_for(Option::is_some).await.context("the agent ended")?;
        let zero = self.clock.now();
        let mut said: Vec<Said> = drain(&mut reports, zero, true);
        for event in self.script.events.iter().skip_while(|event| event.at_us < 0) {
            self.pass(moment(zero, event.at_us), zero, &mut reports, &mut said).await;
            self.now(event, &records, &observation, &mut sequence)
                .await
                .with_context(|| format!("line {}", event.line))?;
            self.clock.sleep(STEP).await;
        }
        let end = moment(zero, self.script.end_us()).saturating_add(STEP);
        self.pass(end, zero, &mut reports, &mut said).await;
        stop.cancel();
        self.doubles.values().for_each(Double::stop);
        Ok(said)
    }

    fn nvml(&self, folder: &Path) -> Option<nvml::watch::WatchConfig> {
        let expected = self.script.expected(Vendor::Nvidia)?;
        let present = self.script.devices.iter().filter(|device| !device.absent);
        let kernel_lists = present.filter_map(|device| device.local.parse::<PciAddress>().ok()).collect();
        let library = Some(folder.join(nvml::LIBRARY).into());
        Some(nvml::watch::WatchConfig { library, kernel_lists, expected, grip: Grip::default() })
    }

    fn dcmi(&self, folder: &Path) -> Option<dcmi::watch::WatchConfig> {
        let expected = self.script.expected(Vendor::Ascend)?;
        // One double plays both libraries.
        let library: OsString = folder.join(dcmi::LIBRARY).into();
        Some(dcmi::watch::WatchConfig { library: Some(library.clone()), switch_library: Some(library), expected })
    }

    fn apply(&self, vendor: Vendor, line: &str) -> anyhow::Result<()> {
        self.doubles.get(&vendor).map_or(Ok(()), |double| double.apply(line))
    }

    /// Lets time pass until `end`, and collects what is said.
    async fn pass(&self, end: Duration, zero: Duration, reports: &mut Reports, said: &mut Vec<Said>) {
        loop {
            self.clock.sleep_until(self.clock.now().saturating_add(QUIET).min(end)).await;
            said.extend(drain(reports, zero, false));
            if self.clock.now() >= end {
                return;
            }
            // A call that hangs changes what is known of a device without a line.
            let stride = (!self.script.hangs).then_some(STRIDE);
            self.clock.leap(stride);
            // Cancel-safe: `recv` loses nothing, the other only waits.
            tokio::select! {
                biased;
                report = reports.recv() => said.extend(report.map(|report| of(report, zero, false))),
                () = self.clock.sleep_until(end) => {}
            }
            self.clock.leap(None);
        }
    }

    /// An event from before the agent started: records wait in the ring, settings hold, the rest is gone.
    fn before(&self, event: &Event, records: &mpsc::Sender<Entry>, sequence: &mut u64) -> anyhow::Result<()> {
        match &event.what {
            What::Kmsg { text, priority } => {
                let _ = records.send(Entry::Record(record(*priority, sequence, 0, text), None));
            }
            What::Double(vendor, line) => self.apply(*vendor, line)?,
            What::KmsgLost | What::Reset { .. } | What::Validated { .. } => {}
        }
        Ok(())
    }

    async fn now(
        &self,
        event: &Event,
        records: &mpsc::Sender<Entry>,
        observation: &Observation,
        sequence: &mut u64,
    ) -> anyhow::Result<()> {
        match &event.what {
            What::Kmsg { text, priority } => {
                let micros = u64::try_from(self.clock.now().as_micros())?;
                let bytes = record(*priority, sequence, micros, text);
                let _ = records.send(Entry::Record(bytes, Some(self.clock.in_flight())));
            }
            What::KmsgLost => {
                let _ = records.send(Entry::Lost(self.clock.in_flight()));
            }
            What::Double(vendor, line) => self.apply(*vendor, line)?,
            What::Reset { local, outcome } => {
                let step = match outcome {
                    Outcome::Started => ResetStep::Started,
                    Outcome::Ok => ResetStep::Done,
                    Outcome::Failed => ResetStep::Failed,
                };
                let fact = Fact::device(local.clone(), Seen::Reset(step));
                observation.facts.send(vendor::Seen::Fact(fact), None).await;
            }
            What::Validated { local, ok } => {
                let fact = Fact::device(local.clone(), Seen::Validated(*ok));
                observation.facts.send(vendor::Seen::Fact(fact), None).await;
            }
        }
        Ok(())
    }
}

type Reports = tokio::sync::mpsc::UnboundedReceiver<Report>;

fn drain(reports: &mut Reports, zero: Duration, initial: bool) -> Vec<Said> {
    std::iter::from_fn(|| reports.try_recv().ok()).map(|report| of(report, zero, initial)).collect()
}

fn of(report: Report, zero: Duration, initial: bool) -> Said {
    let after = i64::try_from(report.at.saturating_sub(zero).as_micros()).unwrap_or(i64::MAX);
    Said { at_us: after, report, initial }
}

fn moment(zero: Duration, at_us: i64) -> Duration {
    zero.saturating_add(Duration::from_micros(u64::try_from(at_us).unwrap_or(0)))
}

/// A record as /dev/kmsg gives it; `text` already has its escapes.
fn record(priority: u32, sequence: &mut u64, micros: u64, text: &str) -> Vec<u8> {
    *sequence = sequence.saturating_add(1);
    format!("{priority},{sequence},{micros},-;{text}\n").into_bytes()
}

enum Entry {
    Record(Vec<u8>, Option<InFlight>),
    Lost(InFlight),
    CaughtUp,
}

struct LabLog(mpsc::Receiver<Entry>);

impl KernelLog for LabLog {
    fn read(&mut self) -> io::Result<Read> {
        Ok(match self.0.recv() {
            Ok(Entry::Record(bytes, guard)) => Read::Record(bytes, guard),
            Ok(Entry::Lost(guard)) => Read::Lost(Some(guard)),
            Ok(Entry::CaughtUp) => Read::CaughtUp,
            Err(_) => Read::Ended,
        })
    }
}
