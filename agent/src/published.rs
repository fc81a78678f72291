//! What this node says of its health: the ledger's words under the operator's will, in one order. The
//! stream and the object carry the same numbers, so that the older of two is always known.

use std::{sync::Arc, time::Duration};

use berth_crds::accelerator_node::{DeviceStatus, NodeHealth};
use berth_kernels::{BackendKind, computes};
use berth_proto::{convert, v1};
use berth_runtime::{Clock, telemetry::trace::TraceContext};
use berth_types::{Admission, Bytes, DeviceId, NodeName, Vendor, WeightFormat};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    health::{
        fact::{DeviceInfo, Local, Subject},
        ledger::{Report, Standing},
    },
    node::{Shown, Snapshot},
    orders::Wanted,
    workers::View,
};

/// One device as it is said.
#[derive(Clone, Debug, PartialEq)]
pub struct Device {
    /// Its id.
    pub id: DeviceId,
    /// What it is.
    pub info: DeviceInfo,
    /// How it stands, the operator's will included.
    pub standing: Standing,
    /// Since when, milliseconds of Unix time.
    pub since_unix_ms: i64,
    /// Trace of the fault that led to this.
    pub trace: Option<TraceContext>,
    /// Formats that its worker's kernels compute with.
    pub computes: &'static [WeightFormat],
}

/// What is said.
#[derive(Clone, Debug, PartialEq)]
pub struct Published {
    /// Boot id of the node.
    pub boot_id: String,
    /// Rises with every change, over restarts of the agent too.
    pub sequence: u64,
    /// Devices, by local id.
    pub devices: Vec<Device>,
    /// The node's own entry.
    pub node: Standing,
    /// Notes not said before.
    pub notes: Vec<Report>,
    /// What the operator wants, as it was taken into account.
    pub wanted: Wanted,
}

/// Makes [`Published`] from the ledger's snapshots and the operator's will.
#[derive(Debug)]
pub struct Publisher {
    /// Time.
    pub clock: Clock,
    /// This node.
    pub node: NodeName,
    /// Its boot.
    pub boot_id: String,
    /// Milliseconds since boot when this process began: where the sequence starts.
    pub uptime_ms: u64,
    /// What its workers compute on.
    pub backend: BackendKind,
}

impl Publisher {
    /// Publishes until `stop` is cancelled.
    pub async fn run(
        self,
        mut snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
        mut wanted: watch::Receiver<Wanted>,
        published: watch::Sender<Option<Arc<Published>>>,
        stop: CancellationToken,
    ) {
        let mut sequence = self.uptime_ms;
        let mut noted = 0;
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            let will = wanted.borrow_and_update().clone();
            if let Some(snapshot) = snapshot {
                sequence = sequence.saturating_add(1);
                published.send_replace(Some(Arc::new(self.make(&snapshot, &will, sequence, noted))));
                noted = snapshot.sequence;
            }
            // Cancel-safe: `changed` only looks.
            tokio::select! {
                () = stop.cancelled() => return,
                changed = snapshots.changed() => if changed.is_err() { return },
                changed = wanted.changed() => if changed.is_err() { return },
            }
        }
    }

    fn make(&self, snapshot: &Snapshot, wanted: &Wanted, sequence: u64, noted: u64) -> Published {
        let device = |(local, shown): (&Local, &Shown)| {
            let id = DeviceId::new(&self.node, local).ok()?;
            let mut standing = shown.standing.clone();
            let (admission, why) = wanted.admission(local, standing.state.admission);
            standing.state.admission = admission;
            if let Some(why) = why {
                let sep = if standing.evidence.is_empty() { "" } else { "; " };
                standing.evidence = format!("{}{sep}{why}", standing.evidence);
            }
            let since_unix_ms = self.unix_ms(standing.since);
            let computes = computes(self.backend, &shown.info.product);
            Some(Device { id, info: shown.info.clone(), standing, since_unix_ms, trace: shown.trace, computes })
        };
        Published {
            boot_id: self.boot_id.clone(),
            sequence,
            devices: snapshot.devices.iter().filter_map(device).collect(),
            node: snapshot.node.clone(),
            notes: snapshot.notes.iter().filter(|(at, _)| *at > noted).map(|(_, report)| report.clone()).collect(),
            wanted: wanted.clone(),
        }
    }

    fn unix_ms(&self, at: Duration) -> i64 {
        let ago = self.clock.now().saturating_sub(at).as_millis();
        let now = i64::try_from(self.clock.unix_ms()).unwrap_or(i64::MAX);
        now.saturating_sub(i64::try_from(ago).unwrap_or(i64::MAX))
    }
}

impl Published {
    /// As the scheduler hears it.
    #[must_use]
    pub fn to_wire(&self) -> v1::HealthReport {
        v1::HealthReport {
            boot_id: self.boot_id.clone(),
            sequence: self.sequence,
            devices: self.devices.iter().map(|device| v1::DeviceHealth::from(&device.to_wire())).collect(),
            notes: self.notes.iter().map(|note| self.note(note)).collect(),
            node: Some(v1::DeviceHealth {
                evidence: self.node.evidence.clone(),
                ..convert::state_to_wire(self.node.state)
            }),
        }
    }

    fn note(&self, report: &Report) -> v1::HealthNote {
        let local = match &report.of {
            Subject::Node => None,
            Subject::Device(local) => Some(local),
        };
        let id = local.and_then(|local| self.devices.iter().find(|device| device.info.local == *local));
        v1::HealthNote {
            device: id.map(|device| device.id.to_string()).unwrap_or_default(),
            reason: report.state.reason.map(|reason| reason.as_str().to_owned()).unwrap_or_default(),
            evidence: report.evidence.clone(),
        }
    }

    /// The node's entry in the object.
    #[must_use]
    pub fn node_health(&self) -> NodeHealth {
        let Standing { state, evidence, .. } = &self.node;
        NodeHealth {
            health: state.health,
            admission: state.admission,
            action: state.action,
            scope: state.scope,
            reason: state.reason,
            evidence: evidence.clone(),
        }
    }

    /// The devices in the object, with what their workers do.
    #[must_use]
    pub fn device_status(&self, workers: &View) -> Vec<DeviceStatus> {
        self.devices.iter().map(|device| device.to_status(workers)).collect()
    }

    /// Vendors that are here, once each.
    #[must_use]
    pub fn vendors(&self) -> Vec<Vendor> {
        let mut vendors: Vec<Vendor> = self.devices.iter().map(|device| device.info.vendor).collect();
        vendors.sort_unstable();
        vendors.dedup();
        vendors
    }
}

impl Device {
    fn to_wire(&self) -> convert::DeviceHealth {
        convert::DeviceHealth {
            id: self.id.clone(),
            state: self.standing.state,
            evidence: self.standing.evidence.clone(),
            vendor: self.info.vendor,
            product: self.info.product.clone(),
            memory: Bytes(self.info.memory_bytes),
            interconnect_domain: self.info.interconnect_domain.clone(),
            card: self.info.card.clone(),
            since_unix_ms: self.since_unix_ms,
            traceparent: self.trace.map(|trace| trace.to_string()).unwrap_or_default(),
            computes: self.computes.to_vec(),
        }
    }

    fn to_status(&self, workers: &View) -> DeviceStatus {
        let Standing { state, evidence, .. } = &self.standing;
        let local = &self.info.local;
        let leaves = state.admission != Admission::Schedulable;
        DeviceStatus {
            device: self.id.clone(),
            vendor: self.info.vendor,
            product: self.info.product.clone(),
            uuid: self.info.uuid.clone(),
            memory_bytes: Bytes(self.info.memory_bytes),
            interconnect_domain: self.info.interconnect_domain.clone(),
            card: self.info.card.clone(),
            reset_group: self.info.reset_group.clone().unwrap_or_default(),
            health: state.health,
            admission: state.admission,
            action: state.action,
            scope: state.scope,
            reason: state.reason,
            evidence: evidence.clone(),
            since: Timestamp::from_millisecond(self.since_unix_ms).ok().map(Time),
            computes: self.computes.to_vec(),
            worker: workers.word(local),
            holds: if leaves { workers.placements(local) } else { Vec::new() },
        }
    }
}
