//! Workers on this machine, for the tools that serve a model without a cluster. It is their supervisor:
//! it starts one process per device on loopback, orders one revision, and tells who died. It plans
//! nothing beyond an even spread, and no worker outlives it.

use std::{
    collections::BTreeSet,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use berth_kernels::BackendKind;
use berth_proto::{
    MESSAGE_LIMIT,
    convert::{Shelf, SlotWeights, Slots},
    v1::{self, ShelfPhase, worker_client::WorkerClient},
};
use berth_runner::routes::{RouteDevice, RouteTable};
use berth_runtime::Clock;
use berth_types::{Bytes, DeviceId, Epoch, ExpertId, LayerId, Revision};
use futures::future::try_join_all;
use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, ChildStdin, Command},
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// How long a worker may take to say where it serves, and to end.
const START: Duration = Duration::from_secs(30);
const END: Duration = Duration::from_secs(10);
/// The one revision that a fleet holds.
const REVISION: Revision = Revision(1);
/// The placement's name and uid: there is no object behind it.
const PLACEMENT: &str = "local/generate";
const PLACEMENT_UID: &str = "local";

/// What to start.
#[derive(Debug)]
pub(crate) struct FleetConfig {
    /// Workers, one device each.
    pub(crate) workers: NonZeroUsize,
    /// Copies of each expert, on different devices.
    pub(crate) replicas: NonZeroUsize,
    /// What computes.
    pub(crate) backend: BackendKind,
    /// The checkpoint's folder.
    pub(crate) checkpoint: PathBuf,
    /// Memory of each device.
    pub(crate) memory: Bytes,
    /// Threads of each worker.
    pub(crate) threads: NonZeroUsize,
    /// What workers log, on standard error.
    pub(crate) log: String,
}

/// Spreads the experts of each layer evenly: copy `r` of expert `e` is on device `(e + r) mod devices`, so
/// no device has two copies of one expert.
pub(crate) fn spread(
    layers: &[LayerId],
    experts: u32,
    devices: NonZeroUsize,
    replicas: NonZeroUsize,
) -> anyhow::Result<Vec<Slots>> {
    if replicas > devices {
        bail!("--replicas {replicas} is more than --agents {devices}: copies of an expert need different devices");
    }
    let mut placed = vec![Slots::new(); devices.get()];
    for layer in layers {
        for expert in 0..experts {
            let first = usize::try_from(expert)?;
            for copy in 0..replicas.get() {
                let device = (first + copy) % devices.get();
                placed[device].entry(*layer).or_default().push(Some(ExpertId(expert)));
            }
        }
    }
    Ok(placed)
}

/// One worker process and what it said last.
#[derive(Debug)]
struct Member {
    device: DeviceId,
    endpoint: String,
    slots: Slots,
    orders: mpsc::Sender<v1::WorkerOrder>,
    reports: watch::Receiver<v1::WorkerReport>,
    /// Its end of the worker's standard input: closing it ends the worker.
    _lifeline: ChildStdin,
}

/// Running workers.
#[derive(Debug)]
pub(crate) struct Fleet {
    members: Vec<Member>,
    dead: watch::Receiver<BTreeSet<DeviceId>>,
    ends: JoinSet<()>,
    clock: Clock,
}

/// What a worker prints when it serves.
#[derive(Deserialize)]
struct Announcement {
    endpoint: String,
}

impl Fleet {
    /// Starts the workers, spreads `layers` × `experts` over them and waits until all of it is loaded.
    /// `progress` hears of pids and of slots ready.
    pub(crate) async fn start(
        config: &FleetConfig,
        layers: &[LayerId],
        experts: u32,
        progress: impl Fn(&str),
    ) -> anyhow::Result<Self> {
        let placed = spread(layers, experts, config.workers, config.replicas)?;
        let clock = Clock::real();
        let started = placed.into_iter().enumerate().map(|(index, slots)| start_one(config, index, slots, &clock));
        let (tell_dead, dead) = watch::channel(BTreeSet::new());
        let (mut members, mut ends) = (Vec::new(), JoinSet::new());
        for (member, mut child) in try_join_all(started).await? {
            let pid = child.id().unwrap_or_default();
            progress(&format!("worker {} pid {pid} serves on {}", member.device, member.endpoint));
            let (device, tell_dead) = (member.device.clone(), tell_dead.clone());
            ends.spawn(async move {
                // However it ended, it is not there any more.
                let _ = child.wait().await;
                tell_dead.send_modify(|dead| {
                    dead.insert(device);
                });
            });
            members.push(member);
        }
        let fleet = Self { members, dead, ends, clock };
        fleet.hold(&config.checkpoint, progress).await?;
        Ok(fleet)
    }

    /// Orders the revision and waits until every worker is ready.
    async fn hold(&self, checkpoint: &Path, progress: impl Fn(&str)) -> anyhow::Result<()> {
        for member in &self.members {
            let shelf = Shelf {
                placement: PLACEMENT.parse()?,
                placement_uid: PLACEMENT_UID.to_owned(),
                revision: REVISION,
                uri: checkpoint.display().to_string(),
                digest: String::new(),
                format: None,
                slots: member.slots.clone(),
            };
            let order = v1::WorkerOrder { shelves: vec![v1::Shelf::from(&shelf)], ..Default::default() };
            member.orders.send(order).await.with_context(|| format!("worker {} took no order", member.device))?;
        }
        let mut said = 0;
        loop {
            let (mut ready, mut slots, mut total) = (0, 0, 0);
            for member in &self.members {
                let report = member.reports.borrow();
                for shelf in &report.shelves {
                    if shelf.phase() == ShelfPhase::Failed {
                        bail!("worker {}: {}", member.device, shelf.error);
                    }
                    ready += usize::from(shelf.phase() == ShelfPhase::Ready);
                    slots += shelf.slots_ready;
                    total += shelf.slots_total;
                }
            }
            if slots > said {
                progress(&format!("{slots} of {total} expert slots loaded"));
                said = slots;
            }
            if ready == self.members.len() {
                return Ok(());
            }
            self.changed().await?;
        }
    }

    /// Waits until a worker reports; an error when one is dead.
    async fn changed(&self) -> anyhow::Result<()> {
        let mut dead = self.dead.clone();
        let mut waiting: JoinSet<()> = JoinSet::new();
        for member in &self.members {
            let mut reports = member.reports.clone();
            reports.mark_unchanged();
            waiting.spawn(async move {
                let _ = reports.changed().await;
            });
        }
        // Cancel-safe: all arms only wait. The clock's arm makes up for a report that came in between.
        tokio::select! {
            gone = dead.wait_for(|dead| !dead.is_empty()) => {
                let names = gone.map(|gone| names(&gone)).unwrap_or_default();
                Err(anyhow!("worker {names} ended while it loaded: see its words above"))
            }
            _ = waiting.join_next() => Ok(()),
            () = self.clock.sleep(Duration::from_millis(200)) => Ok(()),
        }
    }

    /// Where every expert is.
    pub(crate) fn routes(&self) -> RouteTable {
        let device = |member: &Member| RouteDevice {
            device: member.device.clone(),
            endpoint: member.endpoint.clone(),
            slots: member.slots.clone(),
            weights: SlotWeights::new(),
        };
        RouteTable {
            placement_uid: PLACEMENT_UID.to_owned(),
            epoch: Epoch(1),
            revision: REVISION,
            devices: self.members.iter().map(device).collect(),
        }
    }

    /// Devices whose worker is gone, as it changes.
    pub(crate) fn dead(&self) -> watch::Receiver<BTreeSet<DeviceId>> {
        self.dead.clone()
    }

    /// An expert that nobody has any more when these devices are gone.
    pub(crate) fn orphan(&self, gone: &BTreeSet<DeviceId>) -> Option<(LayerId, ExpertId)> {
        let experts = |member: &Member| -> BTreeSet<(LayerId, ExpertId)> {
            let of_layer = |(layer, slots): (&LayerId, &Vec<Option<ExpertId>>)| {
                slots.iter().flatten().map(|expert| (*layer, *expert)).collect::<Vec<_>>()
            };
            member.slots.iter().flat_map(of_layer).collect()
        };
        let live = self.members.iter().filter(|member| !gone.contains(&member.device)).flat_map(experts);
        let live: BTreeSet<_> = live.collect();
        self.members.iter().flat_map(experts).find(|expert| !live.contains(expert))
    }

    /// Ends every worker and waits until it is gone.
    pub(crate) async fn end(self) -> anyhow::Result<()> {
        let Self { members, dead: _, mut ends, clock } = self;
        drop(members);
        let all = async { while ends.join_next().await.is_some() {} };
        clock.timeout(END, all).await.context("workers did not end, they are killed")
    }
}

/// Devices in words.
pub(crate) fn names(devices: &BTreeSet<DeviceId>) -> String {
    devices.iter().map(DeviceId::to_string).collect::<Vec<_>>().join(", ")
}

async fn start_one(config: &FleetConfig, index: usize, slots: Slots, clock: &Clock) -> anyhow::Result<(Member, Child)> {
    let device: DeviceId = format!("local/{index}.0").parse()?;
    let program = std::env::current_exe().context("finding this program")?;
    let mut child = Command::new(program)
        .arg("worker")
        .args(["--device", device.as_str(), "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
        .args(["--backend", &config.backend.to_string(), "--memory", &config.memory.get().to_string()])
        .args(["--threads", &config.threads.to_string(), "--log", &config.log])
        .arg("--weights-roots")
        .arg(&config.checkpoint)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("starting worker {device}"))?;
    let lifeline = child.stdin.take().ok_or_else(|| anyhow!("worker {device} has no standard input"))?;
    let output = child.stdout.take().ok_or_else(|| anyhow!("worker {device} has no standard output"))?;
    let mut lines = BufReader::new(output).lines();
    let line =
        clock.timeout(START, lines.next_line()).await.with_context(|| format!("worker {device} serves nothing"))?;
    let line = line?.ok_or_else(|| anyhow!("worker {device} ended at once: see its words above"))?;
    let Announcement { endpoint } =
        serde_json::from_str(&line).with_context(|| format!("worker {device} said {line:?}"))?;
    let channel = Channel::from_shared(format!("http://{endpoint}"))?.connect_timeout(START).connect().await?;
    let (orders, outbound) = mpsc::channel(4);
    let mut client = WorkerClient::new(channel).max_encoding_message_size(MESSAGE_LIMIT);
    let mut inbound = client.supervise(ReceiverStream::new(outbound)).await?.into_inner();
    let (tell, reports) = watch::channel(v1::WorkerReport::default());
    tokio::spawn(async move {
        while let Ok(Some(report)) = inbound.message().await {
            if tell.send(report).is_err() {
                return;
            }
        }
    });
    Ok((Member { device, endpoint, slots, orders, reports, _lifeline: lifeline }, child))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(number: usize) -> NonZeroUsize {
        NonZeroUsize::new(number).unwrap()
    }

    #[test]
    fn every_expert_has_its_copies_on_different_devices_and_devices_are_level() {
        for (devices, replicas) in [(1, 1), (2, 1), (5, 2), (3, 3), (7, 2)] {
            let placed = spread(&[LayerId(1), LayerId(2)], 16, count(devices), count(replicas)).unwrap();
            for layer in [LayerId(1), LayerId(2)] {
                let held: Vec<&Vec<_>> = placed.iter().filter_map(|slots| slots.get(&layer)).collect();
                for expert in 0..16 {
                    let has =
                        |slots: &&&Vec<_>| slots.iter().filter(|slot| **slot == Some(ExpertId(expert))).count() == 1;
                    assert_eq!(held.iter().filter(has).count(), replicas);
                }
                let (least, most) = (held.iter().map(|s| s.len()).min(), held.iter().map(|s| s.len()).max());
                assert!(most.unwrap() - least.unwrap() <= replicas, "{devices} devices, {replicas} replicas");
            }
        }
    }

    #[test]
    fn more_copies_than_devices_are_refused() {
        let error = spread(&[LayerId(1)], 4, count(2), count(3)).unwrap_err().to_string();
        assert_eq!(error, "--replicas 3 is more than --agents 2: copies of an expert need different devices");
    }
}
