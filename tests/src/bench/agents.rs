//! Many agents against one real API server: what they write when they start, when nothing changes, when a rack is lost
//! and when it comes back, and what that costs the server.

use std::{collections::BTreeMap, time::Duration};

use berth_crds::AcceleratorNode;
use jiff::Timestamp;
use kube::{Api, api::ListParams};
use serde::Serialize;

use super::{
    audit::{self, Call},
    fleet::{self, Fleet, USER},
    process::{Cost, Sample, number},
};
use crate::{ControlPlane, Error, Result, control_plane::ControlPlaneConfig};

/// A phase has settled within this, or has not.
const SETTLE_LIMIT: Duration = Duration::from_secs(180);
/// Longer than an agent's pause between two writes and the room in which it gathers news.
const QUIET: Duration = Duration::from_secs(3);
/// Between two looks at all objects.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The audit log is written behind the calls.
const LOG_LAG: Duration = Duration::from_millis(500);

/// What is played.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How many agents.
    pub agents: u32,
    /// Devices of each.
    pub devices: u32,
    /// All of them start evenly within this.
    pub ramp: Duration,
    /// How long nothing changes.
    pub window: Duration,
    /// Programs that fail meanwhile, in the whole fleet, per minute.
    pub failures_per_minute: u32,
    /// Nodes that are lost at once, and come back at once.
    pub rack: u32,
}

/// What came of one phase.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    /// Its name.
    pub name: &'static str,
    /// How long it was watched.
    pub seconds: f64,
    /// From its beginning until the last write.
    pub settled_s: f64,
    /// Writes of all agents.
    pub writes: u64,
    /// The same, per second.
    pub writes_per_second: f64,
    /// Answers 429.
    pub throttled: u64,
    /// The shortest time between two writes of one object, seconds.
    pub shortest_pause_s: Option<f64>,
    /// All calls by kind; a watch is counted when it ends.
    pub calls: BTreeMap<String, u64>,
    /// The API server.
    pub apiserver: Cost,
    /// Its store.
    pub etcd: Cost,
    #[serde(skip)]
    log: Vec<Call>,
}

impl Phase {
    /// Between the first and the last write of different objects, the jitter of writes that one moment caused.
    #[must_use]
    pub fn spread(&self) -> Duration {
        let times = || self.log.iter().filter(|call| call.writes()).map(|call| call.at);
        let span = times().min().zip(times().max()).map(|(first, last)| last.duration_since(first));
        span.and_then(|span| Duration::try_from(span).ok()).unwrap_or_default()
    }
}

/// What came of all.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// How many agents.
    pub agents: u32,
    /// Devices of each.
    pub devices: u32,
    /// The phases, in order.
    pub phases: Vec<Phase>,
    /// Bytes of one AcceleratorNode as JSON.
    pub object_bytes: usize,
    /// Resident bytes of the API server before the first agent, MiB.
    pub apiserver_before_mib: f64,
}

struct Bench {
    plane: ControlPlane,
    objects: Api<AcceleratorNode>,
    fleet: Fleet,
    options: Options,
}

/// Plays all phases on a control plane of their own; `say` hears of each as it ends.
///
/// # Errors
/// When the control plane does not start, or a phase does not settle.
pub async fn run(name: &str, options: Options, mut say: impl FnMut(&Phase)) -> Result<Report> {
    let mut bench = Bench::start(name, options).await?;
    let apiserver_before_mib =
        bench.sample("kube-apiserver")?.since(&bench.sample("kube-apiserver")?, "-").resident_mib;
    let Options { agents, devices, rack, .. } = options;
    let mut phases = Vec::new();
    let mut keep = |phase: Phase| {
        say(&phase);
        phases.push(phase);
    };
    keep(bench.phase("start", Bench::start_all, |_, schedulable| schedulable == devices).await?);
    keep(bench.phase("steady", Bench::rest, |_, schedulable| schedulable == devices).await?);
    let lost = move |number: u32, schedulable: u32| schedulable == if number < rack { 0 } else { devices };
    keep(bench.phase("rack lost", Bench::lose_rack, lost).await?);
    keep(bench.phase("rack back", Bench::return_rack, |_, schedulable| schedulable == devices).await?);
    let object = bench.objects.get(&fleet::name(0)).await.map_err(Error::api("read an AcceleratorNode"))?;
    let object_bytes = serde_json::to_string(&object).map_or(0, |text| text.len());
    Ok(Report { agents, devices, phases, object_bytes, apiserver_before_mib })
}

impl Bench {
    async fn start(name: &str, options: Options) -> Result<Self> {
        // Nodes without a kubelet would be written to as lost; that is not what is measured.
        let controllers = vec!["--controllers=*,-node-lifecycle-controller".to_owned()];
        let config = ControlPlaneConfig { controller_manager_args: controllers, ..ControlPlaneConfig::named(name) };
        let plane = ControlPlane::start(config).await?;
        let client = plane.client()?;
        super::install_definitions(&client).await?;
        fleet::make_nodes(&client, options.agents).await?;
        let fleet = Fleet::new(&plane, options.devices).await?;
        let bench = Self { plane, objects: Api::all(client), fleet, options };
        bench.served().await?;
        Ok(bench)
    }

    /// Waits until the API server has made room for the new kind: until then it answers 429 to whoever asks.
    async fn served(&self) -> Result<()> {
        let listed = async {
            while self.objects.list(&ListParams::default().match_any()).await.is_err() {
                tokio::time::sleep(LOG_LAG).await;
            }
        };
        let late = |_| Error::Wait { what: "a served kind".into(), waited: SETTLE_LIMIT, state: "refused".into() };
        tokio::time::timeout(SETTLE_LIMIT, listed).await.map_err(late)
    }

    fn sample(&self, component: &str) -> Result<Sample> {
        let pid = self.plane.processes().find_map(|(name, pid)| (name == component).then_some(pid));
        Sample::of(pid.ok_or_else(|| Error::Unknown { what: "process", name: component.to_owned() })?)
    }

    /// Makes something happen, waits until every object shows `wanted` of its number and its schedulable devices, and
    /// counts what that took.
    async fn phase(
        &mut self,
        name: &'static str,
        cause: impl AsyncFnOnce(&mut Self) -> Result<()>,
        wanted: impl Fn(u32, u32) -> bool,
    ) -> Result<Phase> {
        let began = Timestamp::now();
        let before = (self.sample("kube-apiserver")?, self.sample("etcd")?);
        cause(self).await?;
        self.settle(name, wanted).await?;
        self.quieten(name, began).await?;
        let log = audit::calls(&self.plane.audit_log(), USER, began)?;
        let span = |from: Timestamp, to: Timestamp| Duration::try_from(to.duration_since(from)).unwrap_or_default();
        let seconds = span(began, Timestamp::now()).as_secs_f64();
        let last = log.iter().filter(|call| call.writes()).map(|call| call.at).max().unwrap_or(began);
        let writes = count(&log, Call::writes);
        Ok(Phase {
            name,
            seconds,
            settled_s: span(began, last).as_secs_f64(),
            writes,
            writes_per_second: number(writes) / seconds,
            throttled: count(&log, Call::throttled),
            shortest_pause_s: audit::shortest_pause(&log).map(|pause| pause.as_secs_f64()),
            calls: audit::counts(&log),
            apiserver: self.sample("kube-apiserver")?.since(&before.0, "-"),
            etcd: self.sample("etcd")?.since(&before.1, "-"),
            log,
        })
    }

    async fn settle(&self, name: &str, wanted: impl Fn(u32, u32) -> bool) -> Result<()> {
        let look = async {
            loop {
                let all =
                    self.objects.list(&ListParams::default()).await.map_err(Error::api("list AcceleratorNodes"))?;
                let shown: BTreeMap<String, u32> = all
                    .into_iter()
                    .filter_map(|object| Some((object.metadata.name?, object.status?.summary.schedulable)))
                    .collect();
                let so = |number: &u32| shown.get(&fleet::name(*number)).is_some_and(|count| wanted(*number, *count));
                if (0..self.options.agents).all(|number| so(&number)) {
                    return Ok(());
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        let late =
            || Error::Wait { what: name.to_owned(), waited: SETTLE_LIMIT, state: "not all objects are true".into() };
        tokio::time::timeout(SETTLE_LIMIT, look).await.map_err(|_| late())?
    }

    /// Waits until nothing was written for so long that no agent has a second word left, which belongs to this phase too.
    async fn quieten(&self, name: &str, began: Timestamp) -> Result<()> {
        let look = async {
            loop {
                tokio::time::sleep(LOG_LAG).await;
                let log = audit::calls(&self.plane.audit_log(), USER, began)?;
                let last = log.iter().filter(|call| call.writes()).map(|call| call.at).max().unwrap_or(began);
                if Duration::try_from(Timestamp::now().duration_since(last)).unwrap_or_default() >= QUIET {
                    return Ok(());
                }
            }
        };
        let late = |_| Error::Wait { what: name.to_owned(), waited: SETTLE_LIMIT, state: "still written to".into() };
        tokio::time::timeout(SETTLE_LIMIT, look).await.map_err(late)?
    }

    async fn start_all(&mut self) -> Result<()> {
        let pause = self.options.ramp / self.options.agents.max(1);
        for number in 0..self.options.agents {
            self.fleet.start(number)?;
            tokio::time::sleep(pause).await;
        }
        Ok(())
    }

    /// Nothing changes; programs fail, which is told to the scheduler alone.
    async fn rest(&mut self) -> Result<()> {
        let end = tokio::time::Instant::now() + self.options.window;
        let every = Duration::from_secs(60) / self.options.failures_per_minute.max(1);
        for process in 1_000_u32.. {
            tokio::time::sleep_until((tokio::time::Instant::now() + every).min(end)).await;
            if tokio::time::Instant::now() >= end {
                break;
            }
            // One after the other, far apart: every node gets its share.
            let number = process.wrapping_mul(2_654_435_761) % self.options.agents.max(1);
            self.fleet.fail_program(number, process);
        }
        Ok(())
    }

    async fn lose_rack(&mut self) -> Result<()> {
        (0..self.options.rack).for_each(|number| self.fleet.lose_devices(number));
        Ok(())
    }

    async fn return_rack(&mut self) -> Result<()> {
        (0..self.options.rack).for_each(|number| self.fleet.end(number));
        (0..self.options.rack).try_for_each(|number| self.fleet.start(number))
    }
}

fn count(log: &[Call], is: impl Fn(&Call) -> bool) -> u64 {
    u64::try_from(log.iter().filter(|call| is(call)).count()).unwrap_or(u64::MAX)
}
