//! One worker per device: which ones there must be, and what all of them do. Each is tended by a task of
//! its own (`tend`). This file decides when a device has a worker and nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    num::NonZeroUsize,
    path::PathBuf,
    sync::Arc,
};

use berth_kernels::BackendKind;
use berth_proto::v1::{self, ShelfState};
use berth_runtime::Clock;
use berth_types::{Bytes, DeviceId, NodeName, Revision};
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    health::fact::{Local, PciAddress},
    metrics::Metrics,
    node::Snapshot,
    orders::{Desired, Held, Wanted},
    tend::Tender,
    vendor::Facts,
};

/// How workers are started.
#[derive(Clone, Debug)]
pub struct WorkerConfig {
    /// The program; its first argument will be `worker`.
    pub program: PathBuf,
    /// The backend that computes, as `berth worker --backend` takes it.
    pub backend: BackendKind,
    /// Where workers listen; each takes a free port.
    pub address: IpAddr,
    /// Folders that weights may be read from.
    pub roots: Vec<PathBuf>,
    /// Bytes a worker may take at most; `None` = its device's. For devices whose memory is not really there.
    pub memory: Option<Bytes>,
    /// Threads of each worker.
    pub threads: Option<NonZeroUsize>,
}

/// What one worker does.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WorkerView {
    /// Starting, serving or dead.
    pub phase: v1::WorkerPhase,
    /// Where it serves.
    pub endpoint: String,
    /// Its budget.
    pub memory_bytes: u64,
    /// What it holds.
    pub shelves: Vec<ShelfState>,
    /// Changes with each process.
    pub instance: u64,
}

/// What all workers do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View(BTreeMap<DeviceId, WorkerView>);

impl View {
    /// As the scheduler hears it.
    #[must_use]
    pub fn to_wire(&self) -> v1::WorkersReport {
        let worker = |(device, view): (&DeviceId, &WorkerView)| v1::WorkerState {
            device: device.to_string(),
            phase: view.phase.into(),
            endpoint: view.endpoint.clone(),
            memory_bytes: view.memory_bytes,
            shelves: view.shelves.clone(),
            instance: view.instance,
        };
        v1::WorkersReport { workers: self.0.iter().map(worker).collect() }
    }

    /// Revisions that some worker still holds or loads.
    #[must_use]
    pub fn held(&self) -> Held {
        let shelves = self.0.values().flat_map(|view| &view.shelves);
        shelves.map(|shelf| (shelf.placement_uid.clone(), Revision(shelf.revision))).collect()
    }

    /// Whether the worker of a device holds or loads anything.
    #[must_use]
    pub fn holds(&self, local: &str) -> bool {
        self.0.iter().any(|(device, view)| device.local() == local && !view.shelves.is_empty())
    }

    /// What the worker of a device does, in the object's word; empty = there is none.
    #[must_use]
    pub fn word(&self, local: &str) -> String {
        let view = self.0.iter().find(|(device, _)| device.local() == local).map(|(_, view)| view);
        match view.map(|view| view.phase) {
            Some(v1::WorkerPhase::Starting) => "Starting",
            Some(v1::WorkerPhase::Serving) => "Serving",
            Some(v1::WorkerPhase::Dead) => "Dead",
            Some(v1::WorkerPhase::Unspecified) | None => "",
        }
        .to_owned()
    }

    /// Whether a device has a worker, be it dead.
    #[must_use]
    pub fn has(&self, local: &str) -> bool {
        self.0.keys().any(|device| device.local() == local)
    }

    /// Placements whose experts the worker of a device holds or loads.
    #[must_use]
    pub fn placements(&self, local: &str) -> Vec<String> {
        let views = self.0.iter().filter(|(device, _)| device.local() == local).map(|(_, view)| view);
        let names: BTreeSet<&str> =
            views.flat_map(|view| &view.shelves).map(|shelf| shelf.placement.as_str()).collect();
        names.into_iter().map(str::to_owned).collect()
    }

    pub(crate) fn set(&mut self, device: &DeviceId, view: WorkerView) {
        self.0.insert(device.clone(), view);
    }

    fn remove(&mut self, device: &DeviceId) {
        self.0.remove(device);
    }
}

/// The workers of a node.
#[derive(Debug)]
pub struct Workers {
    /// Time.
    pub clock: Clock,
    /// This node.
    pub node: NodeName,
    /// How they are started.
    pub config: WorkerConfig,
    /// Devices and their health.
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    /// What the operator wants.
    pub wanted: watch::Receiver<Wanted>,
    /// What the scheduler wants.
    pub desired: watch::Receiver<Arc<Desired>>,
    /// Devices that must have no worker: they are being reset.
    pub emptied: watch::Receiver<BTreeSet<Local>>,
    /// Where deaths are told.
    pub facts: Facts,
    /// Where what they do is shown.
    pub view: watch::Sender<View>,
    /// Counts.
    pub metrics: Metrics,
}

impl Workers {
    /// Keeps one worker per device while the node hosts; ends all when `stop` is cancelled.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut running: BTreeMap<Local, CancellationToken> = BTreeMap::new();
        let mut tending: JoinSet<Local> = JoinSet::new();
        if self.config.roots.is_empty() {
            tracing::warn!("no folder for weights is allowed (BERTH_WEIGHTS_ROOTS): this node hosts nothing");
        }
        loop {
            let devices = self.due();
            running.retain(|local, ends| {
                let due = devices.contains_key(local);
                if !due {
                    ends.cancel();
                }
                due
            });
            for (local, (memory, pci)) in devices {
                if !running.contains_key(&local)
                    && let Ok(device) = DeviceId::new(&self.node, &local)
                {
                    let ends = stop.child_token();
                    running.insert(local.clone(), ends.clone());
                    let tender = self.tender(device.clone(), local.clone(), memory, pci);
                    let view = self.view.clone();
                    tending.spawn(async move {
                        tender.run(ends).await;
                        view.send_modify(|view| view.remove(&device));
                        local
                    });
                }
            }
            // Cancel-safe: all arms only look.
            tokio::select! {
                () = stop.cancelled() => break,
                changed = self.snapshots.changed() => if changed.is_err() { break },
                changed = self.wanted.changed() => if changed.is_err() { break },
                changed = self.emptied.changed() => if changed.is_err() { break },
                Some(ended) = tending.join_next() => match ended {
                    // Only a device that is no longer due ends its tender.
                    Ok(local) => { running.remove(&local); }
                    Err(error) => if let Ok(panic) = error.try_into_panic() { std::panic::resume_unwind(panic) },
                },
            }
        }
        stop.cancel();
        while tending.join_next().await.is_some() {}
    }

    /// Devices that must have a worker, with its budget in bytes and the device's address on the bus.
    fn due(&mut self) -> BTreeMap<Local, (u64, Option<PciAddress>)> {
        let native = self.wanted.borrow_and_update().native;
        let snapshot = self.snapshots.borrow_and_update().clone();
        let Some(snapshot) = snapshot.filter(|_| native) else { return BTreeMap::new() };
        if self.config.roots.is_empty() {
            return BTreeMap::new();
        }
        // A device nobody could ask has no memory that could be promised.
        let emptied = self.emptied.borrow_and_update().clone();
        let known =
            snapshot.devices.iter().filter(|(local, shown)| shown.info.memory_bytes > 0 && !emptied.contains(*local));
        let limit = self.config.memory.map_or(u64::MAX, |memory| memory.get());
        known.map(|(local, shown)| (local.clone(), (shown.info.memory_bytes.min(limit), shown.info.pci))).collect()
    }

    fn tender(&self, device: DeviceId, local: Local, memory: u64, pci: Option<PciAddress>) -> Tender {
        Tender {
            clock: self.clock.clone(),
            device,
            local,
            memory,
            pci,
            config: self.config.clone(),
            snapshots: self.snapshots.clone(),
            desired: self.desired.clone(),
            facts: self.facts.clone(),
            view: self.view.clone(),
            metrics: self.metrics.clone(),
        }
    }
}
