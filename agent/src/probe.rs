//! Validation of devices by a probe process, one device at a time, under a deadline: of those that may have come back, as
//! soon as the ledger asks for it, and of idle ones in turn, so that silent corruption is found before a program finds it.
//! The outcome is a fact for the ledger, which alone decides what it means.
//!
//! An idle look never touches a device that holds or is to hold experts, that another program may use, or that is not well.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use berth_runtime::Clock;
use berth_types::{DeviceId, DeviceState, NodeName};
use rand::Rng;
use tokio::{
    process::Command,
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;

use crate::{
    health::fact::{Fact, Local, What},
    node::Snapshot,
    orders::{Desired, Wanted},
    vendor::{Facts, Seen},
    workers::{View, WorkerConfig},
};

/// A probe that has not ended by then has failed.
const LIMIT: Duration = Duration::from_secs(60);
/// A device that was busy when its turn came is looked at again after this.
const BUSY: Duration = Duration::from_secs(60);

/// What a probe came to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    /// Every bit right.
    Sound,
    /// Not what it should be, or no answer.
    Unsound(String),
    /// The probe could not be made: this says nothing about the device.
    NotMade(String),
}

/// Probes devices.
#[derive(Debug)]
pub struct Prober {
    /// Time.
    pub clock: Clock,
    /// This node.
    pub node: NodeName,
    /// How workers are started: a probe computes on the same.
    pub worker: WorkerConfig,
    /// Where the kernel lists PCI devices.
    pub pci_devices: PathBuf,
    /// What is known of the devices.
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    /// Devices that are due.
    pub due: mpsc::Receiver<Local>,
    /// Where outcomes are told.
    pub facts: Facts,
    /// When idle devices are looked at.
    pub idle: Option<Idle>,
    /// What resets have to do with it.
    pub resets: Option<Resets>,
}

/// A probe and a reset of one device keep out of each other's way: whoever comes second waits, or does not begin.
#[derive(Debug)]
pub struct Resets {
    /// Devices that are being reset, or are about to be.
    pub emptied: watch::Receiver<BTreeSet<Local>>,
    /// The device that is probed.
    pub probed: watch::Sender<Option<Local>>,
    /// Devices that were due while they were being reset.
    waiting: BTreeSet<Local>,
}

impl Resets {
    /// What is being reset, and where it is said what is probed.
    #[must_use]
    pub const fn new(emptied: watch::Receiver<BTreeSet<Local>>, probed: watch::Sender<Option<Local>>) -> Self {
        Self { emptied, probed, waiting: BTreeSet::new() }
    }

    /// A device that was due and is no longer being reset.
    fn next(&mut self) -> Option<Local> {
        let emptied = self.emptied.borrow_and_update();
        let next = self.waiting.iter().find(|local| !emptied.contains(*local)).cloned()?;
        drop(emptied);
        self.waiting.take(&next)
    }

    /// Waits until other devices are reset. Cancel-safe: only waits.
    async fn changed(resets: &mut Option<Self>) {
        let changed = match resets {
            Some(resets) => resets.emptied.changed().await.is_ok(),
            None => false,
        };
        if !changed {
            std::future::pending().await
        }
    }
}

/// Idle devices, and when each is looked at next.
#[derive(Debug)]
pub struct Idle {
    /// Between two looks at a device, give or take a quarter.
    pub every: Duration,
    /// What the workers hold.
    pub workers: watch::Receiver<View>,
    /// What they are to hold.
    pub desired: watch::Receiver<Arc<Desired>>,
    /// Whether the node is ours to use.
    pub wanted: watch::Receiver<Wanted>,
    turns: Turns,
}

/// When each device has its turn. Pure.
#[derive(Debug, Default)]
struct Turns(BTreeMap<Local, Duration>);

impl Turns {
    /// Takes up devices that are new, each with a first turn that `first` chooses, and drops those that are gone.
    fn follow<'a>(&mut self, devices: impl Iterator<Item = &'a Local>, mut first: impl FnMut() -> Duration) {
        let mut turns = BTreeMap::new();
        for local in devices {
            let turn = self.0.get(local).copied().unwrap_or_else(&mut first);
            turns.insert(local.clone(), turn);
        }
        self.0 = turns;
    }

    /// The device whose turn comes first, and when.
    fn next(&self) -> Option<(Duration, &Local)> {
        self.0.iter().map(|(local, turn)| (*turn, local)).min()
    }
}

impl Idle {
    /// Looks at each idle device about once in `every`.
    #[must_use]
    pub fn new(
        every: Duration,
        workers: watch::Receiver<View>,
        desired: watch::Receiver<Arc<Desired>>,
        wanted: watch::Receiver<Wanted>,
    ) -> Self {
        Self { every, workers, desired, wanted, turns: Turns::default() }
    }

    /// Whether nobody else uses the device: the node is ours, and nothing is or is to be on it.
    fn is_free(&self, local: &str) -> bool {
        let ordered = self.desired.borrow().get(local).is_some_and(|shelves| !shelves.is_empty());
        self.wanted.borrow().native && !ordered && !self.workers.borrow().holds(local)
    }
}

/// A duration between three and five quarters of `every`.
fn about(every: Duration) -> Duration {
    every.mul_f64(rand::rng().random_range(0.75..1.25))
}

impl Prober {
    /// Probes until `stop` is cancelled; a probe that runs then is ended.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            if let Some(local) = self.resets.as_mut().and_then(Resets::next) {
                // Cancel-safe: as below.
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = self.attend(local, false) => {}
                }
                continue;
            }
            let turn = self.turn();
            let (at, idle) = turn.map_or((Duration::MAX, None), |(at, local)| (at, Some(local)));
            // Cancel-safe: `recv` loses nothing, the others only wait.
            let work = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                due = self.due.recv() => match due {
                    Some(local) => Some((local, false)),
                    None => return,
                },
                changed = self.snapshots.changed() => match changed {
                    Ok(()) => None,
                    Err(_) => return,
                },
                () = Resets::changed(&mut self.resets) => None,
                () = self.clock.sleep_until(at) => idle.map(|local| (local, true)),
            };
            let Some((local, idle)) = work else { continue };
            // Cancel-safe: a probe that is dropped is killed, and the ledger asks again after a restart.
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.attend(local, idle) => {}
            }
        }
    }

    /// The next idle device and when its turn is.
    fn turn(&mut self) -> Option<(Duration, Local)> {
        let snapshot = self.snapshots.borrow_and_update().clone()?;
        let (now, idle) = (self.clock.now(), self.idle.as_mut()?);
        let every = idle.every;
        // Spread from the start, so that nodes that begin together do not probe together.
        let first = || now.saturating_add(every.mul_f64(rand::rng().random_range(0.0..1.0)));
        idle.turns.follow(snapshot.devices.keys(), first);
        idle.turns.next().map(|(at, local)| (at, local.clone()))
    }

    /// Probes a device; one that is being reset has its turn after that.
    async fn attend(&mut self, local: Local, idle: bool) {
        // Said before it is asked: an order that begins in between waits.
        self.say_probed(Some(local.clone()));
        match &mut self.resets {
            Some(resets) if resets.emptied.borrow().contains(&local) => {
                if !idle {
                    resets.waiting.insert(local);
                }
            }
            _ => self.look(local, idle).await,
        }
        self.say_probed(None);
    }

    fn say_probed(&self, local: Option<Local>) {
        if let Some(resets) = &self.resets {
            resets.probed.send_replace(local);
        }
    }

    async fn look(&mut self, local: Local, idle: bool) {
        if !idle {
            let outcome = self.probe(&local).await;
            let fact = Fact::device(local, What::Validated(outcome == Outcome::Sound));
            return self.facts.send(Seen::Fact(fact), None).await;
        }
        let free = self.may_look(&local);
        let again = match &self.idle {
            // A node that hosts nothing is not looked at again and again.
            Some(idle) if free || !idle.wanted.borrow().native => about(idle.every),
            _ => BUSY,
        };
        if let Some(idle) = &mut self.idle {
            idle.turns.0.insert(local.clone(), self.clock.now().saturating_add(again));
        }
        if !free {
            return;
        }
        // One bad look may be the probe's own; a device that is unsound is so twice.
        if let Outcome::Unsound(_) = self.probe(&local).await
            && self.may_look(&local)
            && let Outcome::Unsound(why) = self.probe(&local).await
        {
            self.facts.send(Seen::Fact(Fact::device(local, What::Unsound(why))), None).await;
        }
    }

    /// Whether an idle look may touch the device now.
    fn may_look(&self, local: &str) -> bool {
        let snapshot = self.snapshots.borrow().clone();
        let shown = snapshot.as_ref().and_then(|snapshot| snapshot.devices.get(local));
        let well = shown.is_some_and(|shown| shown.standing.state == DeviceState::HEALTHY);
        well && self.idle.as_ref().is_some_and(|idle| idle.is_free(local))
    }

    async fn probe(&self, local: &str) -> Outcome {
        let Ok(device) = DeviceId::new(&self.node, local) else {
            return Outcome::NotMade(format!("{local} is no name of a device"));
        };
        let outcome = self.process(&device, local).await;
        match &outcome {
            Outcome::Sound => tracing::info!(%device, "validated"),
            Outcome::Unsound(why) => tracing::warn!(%device, why, "validation failed"),
            Outcome::NotMade(why) => tracing::warn!(%device, why, "validation could not be made"),
        }
        outcome
    }

    async fn process(&self, device: &DeviceId, local: &str) -> Outcome {
        let snapshot = self.snapshots.borrow().clone();
        let pci = snapshot.and_then(|snapshot| snapshot.devices.get(local)?.info.pci);
        let child = Command::new(&self.worker.program)
            .arg("probe")
            .args(["--device", device.as_str()])
            .args(["--backend", &self.worker.backend.to_string()])
            .arg("--pci-devices")
            .arg(&self.pci_devices)
            .args(pci.map(|pci| format!("--pci={pci}")))
            .args(self.worker.threads.map(|threads| format!("--threads={threads}")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(error) => {
                return Outcome::NotMade(format!("starting {}: {error}", self.worker.program.display()));
            }
        };
        match self.clock.timeout(LIMIT, child.wait_with_output()).await {
            Ok(Ok(output)) if output.status.success() => Outcome::Sound,
            Ok(Ok(output)) => {
                let why = format!("{}: {}", output.status, last_line(&output.stderr));
                // 1 = it looked and something is wrong; any other code = it could not look. A signal came from a driver,
                // or from a system that is short of memory.
                match output.status.code() {
                    Some(1) => Outcome::Unsound(why),
                    Some(_) => Outcome::NotMade(why),
                    None if killed(output.status) => Outcome::NotMade(why),
                    None => Outcome::Unsound(why),
                }
            }
            Ok(Err(error)) => Outcome::NotMade(error.to_string()),
            Err(elapsed) => Outcome::Unsound(elapsed.to_string()),
        }
    }
}

fn killed(status: std::process::ExitStatus) -> bool {
    use std::os::unix::process::ExitStatusExt;
    status.signal() == Some(libc::SIGKILL)
}

/// What a probe said last, cut short.
fn last_line(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().chars().take(400).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_has_its_own_turn_and_keeps_it() {
        let mut turns = Turns::default();
        let (a, b) = ("a".to_owned(), "b".to_owned());
        let mut firsts = [5, 3].map(Duration::from_secs).into_iter();
        turns.follow([&a, &b].into_iter(), || firsts.next().unwrap());
        assert_eq!(turns.next(), Some((Duration::from_secs(3), &b)));
        turns.follow([&a, &b].into_iter(), || unreachable!());
        turns.follow([&a].into_iter(), || unreachable!());
        assert_eq!(turns.next(), Some((Duration::from_secs(5), &a)));
    }

    #[test]
    fn looks_are_spread_around_their_interval() {
        for _ in 0..100 {
            let next = about(Duration::from_secs(100)).as_secs();
            assert!((75..125).contains(&next), "{next}");
        }
    }

    fn prober(program: &str) -> (Prober, mpsc::Receiver<(Seen, Option<berth_runtime::clock::InFlight>)>) {
        let (facts, told) = Facts::line(8);
        let worker = WorkerConfig {
            program: program.into(),
            backend: berth_kernels::BackendKind::Cpu,
            address: std::net::Ipv4Addr::LOCALHOST.into(),
            roots: Vec::new(),
            memory: None,
            threads: None,
        };
        let node: NodeName = "gpu-07".parse().unwrap();
        let pci_devices = "/nonexistent".into();
        let (snapshots, due) = (watch::channel(None).1, mpsc::channel(1).1);
        let clock = Clock::real();
        (Prober { clock, node, worker, pci_devices, snapshots, due, facts, idle: None, resets: None }, told)
    }

    #[tokio::test]
    async fn a_probe_that_fails_accuses_and_one_that_cannot_be_made_does_not() {
        let device = "0000:3b:00.0";
        assert_eq!(prober("true").0.probe(device).await, Outcome::Sound);
        assert!(matches!(prober("false").0.probe(device).await, Outcome::Unsound(_)));
        assert!(matches!(prober("/nonexistent/berth").0.probe(device).await, Outcome::NotMade(_)));
        // `cp` without what it needs ends with 1, `test` with a word it does not know with 2.
        assert!(matches!(prober("/usr/bin/test").0.probe(device).await, Outcome::NotMade(_)));
    }

    #[tokio::test]
    async fn a_device_that_is_being_reset_is_probed_after_that() {
        let (mut prober, mut told) = prober("true");
        let device = "0.0".to_owned();
        let (orders, emptied) = watch::channel(BTreeSet::from([device.clone()]));
        let (probed, see_probed) = watch::channel(None);
        prober.resets = Some(Resets::new(emptied, probed));
        prober.attend(device, false).await;
        assert!(told.try_recv().is_err(), "nothing was looked at");
        assert_eq!(*see_probed.borrow(), None);
        assert_eq!(prober.resets.as_mut().unwrap().next(), None);
        orders.send_replace(BTreeSet::new());
        // Nobody tells what else is due, which ends it, after this.
        prober.run(CancellationToken::new()).await;
        assert!(told.try_recv().is_ok(), "now it is");
    }

    #[tokio::test]
    async fn a_validation_that_cannot_be_made_has_not_passed() {
        let (mut prober, mut told) = prober("/nonexistent/berth");
        prober.attend("0000:3b:00.0".to_owned(), false).await;
        let (seen, _) = told.recv().await.unwrap();
        assert!(matches!(seen, Seen::Fact(Fact { what: What::Validated(false), .. })));
    }
}
