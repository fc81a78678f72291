//! One round: a real agent on doubled libraries, the scheduler's own stream service on loopback, a storm of the
//! kernel log, and faults at random times. Real time; nothing of it outlives the process.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::Write as _,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, ensure};
use berth_agent::{
    Eyes,
    health::{device::Settings, fact::Subject, ledger::Report, log, tail::Tail},
    metrics::Metrics,
    observe,
    orders::Wanted,
    published::Publisher,
    report::{Leader, Reporter},
    vendor::{dcmi, grip::Grip, nvml},
    workers::View,
};
use berth_kernels::BackendKind;
use berth_proto::v1::control_server::ControlServer;
use berth_runtime::Clock;
use berth_scheduler::{
    facts::{AgentSaid, Fact as Heard},
    metrics::SchedulerMetrics,
    reports::{Chair, Reports, Seat},
};
use berth_types::{Epoch, Health, NodeName, Vendor};
use rand::{SeedableRng, rngs::SmallRng};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;

use super::{
    Outcome,
    faults::{self, Fault, Fleet, Road, Shows},
    storm::Storm,
};
use crate::lab::{self, Double, Doubles};

/// The agent must have told of all devices by then.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// The storm writes so often.
const TICK: Duration = Duration::from_millis(1);
/// Facts that wait on the scheduler's side.
const ROOM: usize = 1024;
/// Threads that are not the agent's.
const OURS: [&str; 3] = ["storm", "scheduler", "berth"];

/// What is to be played.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// By what faults show.
    pub(super) road: Road,
    /// Of everything that chance decides.
    pub(super) seed: u64,
    /// How many faults.
    pub(super) faults: u32,
    /// Lines of noise per second.
    pub(super) storm: u32,
}

/// What the scheduler's side heard.
#[derive(Clone, Debug, Default)]
struct Told {
    /// Devices of the last report.
    devices: usize,
    /// Reports.
    reports: u64,
    /// When each device was first said to be Unhealthy.
    unhealthy: BTreeMap<String, Duration>,
}

/// Plays one round.
pub(super) fn play(plan: Plan, doubles: &Doubles) -> anyhow::Result<Outcome> {
    let folder = tempfile::tempdir().context("making the round's folder")?;
    let clock = Clock::real();
    let fleet = Fleet::of(plan.road);
    let header = fleet.header().to_string();
    let mut libraries = BTreeMap::new();
    for vendor in [Vendor::Nvidia, Vendor::Ascend] {
        if fleet.failing.iter().chain(&fleet.noisy).any(|device| device.vendor == vendor) {
            let library = folder.path().join(lab::library(vendor));
            let double = doubles.find(vendor)?;
            std::fs::copy(&double, &library).with_context(|| format!("copying {}", double.display()))?;
            libraries.insert(vendor, Double::open(&library, &header, &clock)?);
        }
    }
    let log = folder.path().join("kmsg");
    File::create(&log).context("making the kernel log")?;
    let (tell, told) = watch::channel(Told::default());
    let address = listen(&clock, tell)?;
    let stop = CancellationToken::new();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("agent").enable_all().build()?;
    let (observer, said) = mpsc::unbounded_channel();
    let _end = runtime.block_on(start_agent(folder.path(), &libraries, &clock, address, observer, &stop))?;
    let all = fleet.failing.len().saturating_add(fleet.noisy.len());
    wait(&clock, &told, READY_LIMIT, |told| told.devices == all).context("the agent told of its devices")?;
    let outcome = weather(plan, &fleet, &libraries, &log, &clock, told, said)?;
    stop.cancel();
    libraries.values().for_each(Double::stop);
    runtime.shutdown_timeout(Duration::from_secs(2));
    Ok(outcome)
}

/// Serves the scheduler's streams on a thread of its own; tells what arrives, when it has arrived.
fn listen(clock: &Clock, tell: watch::Sender<Told>) -> anyhow::Result<SocketAddr> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).context("listening on loopback")?;
    let address = listener.local_addr()?;
    let (facts, mut heard) = mpsc::channel(ROOM);
    let seat = Seat { epoch: Epoch(1), facts, ended: CancellationToken::new() };
    let (chair, seen) = watch::channel(Chair::Taken(seat));
    let service = Reports::new(seen, clock.clone(), SchedulerMetrics::default());
    let clock = clock.clone();
    let serving = async move {
        let server = tonic::transport::Server::builder().tcp_nodelay(true).add_service(ControlServer::new(service));
        let incoming = TcpListenerStream::new(listener);
        tokio::spawn(server.serve_with_incoming(incoming));
        // Whoever lets go of an orders' line ends its stream.
        let mut lines = Vec::new();
        while let Some(fact) = heard.recv().await {
            let now = clock.now();
            match fact {
                Heard::AgentOpened { line, .. } => lines.push(line),
                Heard::Agent { said: AgentSaid::Health(health), .. } => tell.send_modify(|told| {
                    told.devices = health.devices.len();
                    told.reports = told.reports.saturating_add(1);
                    for device in health.devices.iter().filter(|device| device.state.health == Health::Unhealthy) {
                        told.unhealthy.entry(device.id.local().to_owned()).or_insert(now);
                    }
                }),
                _ => {}
            }
        }
        drop(chair);
    };
    std::thread::Builder::new().name("scheduler".to_owned()).spawn(move || runtime.block_on(serving))?;
    Ok(address)
}

/// Starts what an agent does between its devices and the scheduler; letting go of the answer ends the log.
async fn start_agent(
    folder: &Path,
    libraries: &BTreeMap<Vendor, Double>,
    clock: &Clock,
    scheduler: SocketAddr,
    observer: mpsc::UnboundedSender<Report>,
    stop: &CancellationToken,
) -> anyhow::Result<std::io::PipeWriter> {
    let node: NodeName = "bench".parse().context("the node's name")?;
    let (ended, end) = std::io::pipe().context("a pipe")?;
    let log = Tail::open(&folder.join("kmsg"), ended).context("opening the kernel log")?;
    let library = |vendor: Vendor| libraries.contains_key(&vendor).then(|| folder.join(lab::library(vendor)));
    let nvml = library(Vendor::Nvidia).map(|path| nvml::watch::WatchConfig {
        library: Some(path.into()),
        kernel_lists: Vec::new(),
        expected: None,
        grip: Grip::default(),
    });
    let dcmi = library(Vendor::Ascend).map(|path| dcmi::watch::WatchConfig {
        library: Some(path.clone().into()),
        switch_library: Some(path.into()),
        expected: None,
    });
    let settings = Settings::default();
    let log = Some(log::once(log));
    let eyes = Eyes { nvml, dcmi, log, observer: Some(observer), settings, ..Eyes::default() };
    let metrics = Metrics::default();
    let observation = observe(eyes, clock, &metrics, stop, |_, task| {
        tokio::spawn(task);
    })?;
    let (wanted, see_wanted) = watch::channel(Wanted::default());
    let (view, workers) = watch::channel(View::default());
    let (desired, see_desired) = watch::channel(Arc::default());
    let (publish, published) = watch::channel(None);
    let backend = BackendKind::Cpu;
    let publisher =
        Publisher { clock: clock.clone(), node: node.clone(), boot_id: "bench".to_owned(), uptime_ms: 0, backend };
    tokio::spawn(publisher.run(observation.snapshots, see_wanted, publish, stop.clone()));
    let leader = Leader::Fixed(scheduler);
    let clock = clock.clone();
    let told = Duration::ZERO;
    let reporter = Reporter { clock, node, leader, published, workers, desired, metrics, told };
    let (stop, facts) = (stop.clone(), observation.facts);
    tokio::spawn(async move {
        reporter.run(stop).await;
        drop((wanted, view, see_desired, facts));
    });
    Ok(end)
}

/// Waits until what was told holds `check`.
fn wait(
    clock: &Clock,
    told: &watch::Receiver<Told>,
    limit: Duration,
    check: impl Fn(&Told) -> bool,
) -> anyhow::Result<()> {
    let end = clock.now().saturating_add(limit);
    while !check(&told.borrow()) {
        ensure!(clock.now() < end, "not within {limit:?}: {:?}", *told.borrow());
        clock.in_flight().block_until(clock.now().saturating_add(TICK));
    }
    Ok(())
}

/// The storm and the faults in it, on a thread of their own; then what came of each.
fn weather(
    plan: Plan,
    fleet: &Fleet,
    libraries: &BTreeMap<Vendor, Double>,
    log: &Path,
    clock: &Clock,
    told: watch::Receiver<Told>,
    mut said: mpsc::UnboundedReceiver<Report>,
) -> anyhow::Result<Outcome> {
    let mut chance = SmallRng::seed_from_u64(plan.seed);
    let faults = faults::draw(plan.road, fleet, plan.faults, &mut chance);
    let log = OpenOptions::new().append(true).open(log).context("opening the kernel log")?;
    let storm = Storm::new(&fleet.noisy, &fleet.failing, chance);
    let begun = (clock.now(), processor_seconds());
    let reports = told.borrow().reports;
    let sky = Sky { plan, clock: clock.clone(), log, storm, lines: 0 };
    let (injected, lines) = std::thread::scope(|scope| {
        let storming = std::thread::Builder::new().name("storm".to_owned());
        let thread = storming.spawn_scoped(scope, || sky.run(&faults, libraries, &told))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    let seconds = clock.now().saturating_sub(begun.0).as_secs_f64();
    let agent_seconds = processor_seconds() - begun.1;
    let told = told.borrow().clone();
    let reports = told.reports.saturating_sub(reports);
    let mut decided: BTreeMap<String, Duration> = BTreeMap::new();
    while let Ok(report) = said.try_recv() {
        if let (Subject::Device(local), Health::Unhealthy) = (report.of, report.state.health) {
            decided.entry(local).or_insert(report.at);
        }
    }
    let mut outcome = Outcome { lines, seconds, agent_seconds, reports, ..Outcome::default() };
    for (fault, at) in faults.iter().zip(injected) {
        let decided = decided.get(&fault.local).map(|decided| ms(decided.saturating_sub(at)));
        outcome.decided_ms.extend(decided);
        match told.unhealthy.get(&fault.local) {
            Some(heard) if *heard >= at => outcome.latencies_ms.push(ms(heard.saturating_sub(at))),
            Some(_) => outcome.false_alarms.push(fault.local.clone()),
            None => outcome.missed.push(format!("{}: {}", fault.local, fault.name)),
        }
    }
    let hit = |local: &String| faults.iter().any(|fault| fault.local == *local);
    outcome.false_alarms.extend(told.unhealthy.into_keys().filter(|local| !hit(local)));
    Ok(outcome)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

struct Sky {
    plan: Plan,
    clock: Clock,
    log: File,
    storm: Storm,
    lines: u64,
}

impl Sky {
    /// Storms until every fault was told, or will not be. Answers when each fault was injected.
    fn run(
        mut self,
        faults: &[Fault],
        libraries: &BTreeMap<Vendor, Double>,
        told: &watch::Receiver<Told>,
    ) -> anyhow::Result<(Vec<Duration>, u64)> {
        let zero = self.clock.now();
        let last = faults.last().map_or(Duration::ZERO, |fault| fault.at);
        let end = zero.saturating_add(last).saturating_add(self.plan.road.patience());
        let mut injected = Vec::new();
        loop {
            let now = self.clock.now();
            self.blow(now.saturating_sub(zero))?;
            for fault in faults.iter().skip(injected.len()) {
                if zero.saturating_add(fault.at) > self.clock.now() {
                    break;
                }
                injected.push(self.strike(fault, libraries)?);
            }
            let heard = |fault: &Fault| told.borrow().unhealthy.contains_key(&fault.local);
            if injected.len() == faults.len() && (now >= end || faults.iter().all(heard)) {
                return Ok((injected, self.lines));
            }
            self.clock.in_flight().block_until(now.saturating_add(TICK));
        }
    }

    /// As many lines of noise as are due after `passed`.
    fn blow(&mut self, passed: Duration) -> anyhow::Result<()> {
        let due = passed.as_millis().saturating_mul(u128::from(self.plan.storm)) / 1000;
        while u128::from(self.lines) < due {
            let line = self.storm.line();
            self.log.write_all(&line).context("writing to the kernel log")?;
            self.lines = self.lines.saturating_add(1);
        }
        Ok(())
    }

    fn strike(&mut self, fault: &Fault, libraries: &BTreeMap<Vendor, Double>) -> anyhow::Result<Duration> {
        match &fault.shows {
            Shows::Line(text) => {
                let record = self.storm.record(4, text);
                let at = self.clock.now();
                self.log.write_all(&record).context("writing to the kernel log")?;
                Ok(at)
            }
            Shows::Library(vendor, line) => {
                let double = libraries.get(vendor).context("a fault of a vendor that is not here")?;
                let at = self.clock.now();
                double.apply(line).with_context(|| fault.name.clone())?;
                Ok(at)
            }
        }
    }
}

/// Processor time of the agent's threads so far.
fn processor_seconds() -> f64 {
    let threads = std::fs::read_dir("/proc/self/task").map(|all| all.flatten().collect::<Vec<_>>()).unwrap_or_default();
    let of = |thread: &std::fs::DirEntry| {
        let read = |file: &str| std::fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        let nanoseconds = read("schedstat").split(' ').next().and_then(|text| text.parse().ok());
        if OURS.contains(&read("comm").trim()) { None } else { nanoseconds.map(Duration::from_nanos) }
    };
    threads.iter().filter_map(of).map(|time| time.as_secs_f64()).sum()
}
