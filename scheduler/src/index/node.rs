//! One node in memory: its stream, its devices' health, its workers. Decides what may be done with a
//! device from what is known and how old it is; takes time as an argument.

use std::{collections::BTreeMap, time::Duration};

use berth_crds::AcceleratorNode;
use berth_planner::Standing;
use berth_proto::convert::DeviceHealth;
use berth_types::{Admission, Bytes, DeviceId, DeviceState, Revision};

/// A stream that is silent for so long counts as lost.
pub const SILENT: Duration = Duration::from_secs(3);
/// After so long without a stream, or without a serving worker, replicas count as gone.
pub const GONE: Duration = Duration::from_secs(10);

/// How far a device is with a shelf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Being loaded.
    Loading,
    /// Served.
    Ready,
    /// Given up, with what the worker says.
    Failed(String),
}

/// One shelf, as its worker reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shelf {
    /// How far it is.
    pub phase: Phase,
    /// Slots loaded.
    pub slots_ready: u64,
    /// Bytes read for it, those that only told which checkpoint it is among them.
    pub read: Bytes,
}

/// The worker of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Worker {
    /// Whether it answers calls.
    pub serving: bool,
    /// `ip:port` of its Expert service.
    pub endpoint: String,
    /// Its memory budget; 0 = not known.
    pub memory: Bytes,
    /// Changes with each process.
    pub instance: u64,
    /// Shelves by (placement uid, revision).
    pub shelves: BTreeMap<(String, Revision), Shelf>,
}

/// The stream of a node's agent.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Link {
    /// Not heard since this scheduler began to lead.
    Never { since: Duration },
    /// Open and not silent.
    Up { conn: u64, heard: Duration },
    /// Closed (`conn` is `None`) or silent since.
    Lost { conn: Option<u64>, since: Duration },
}

/// What the operator and the administrator want of a node.
#[derive(Clone, Debug, Default, PartialEq)]
struct Wishes {
    native: bool,
    drain: bool,
    rack: Option<String>,
    cordoned: Vec<DeviceId>,
}

/// One node.
#[derive(Clone, Debug)]
pub struct Node {
    link: Link,
    hosting: bool,
    wishes: Option<Wishes>,
    has_status: bool,
    boot_id: String,
    sequence: u64,
    state: DeviceState,
    devices: BTreeMap<DeviceId, DeviceHealth>,
    workers: BTreeMap<DeviceId, Worker>,
    /// Since when a device has no serving worker.
    idle: BTreeMap<DeviceId, Duration>,
}

/// A health report, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Health {
    /// Boot id of the node's kernel.
    pub boot_id: String,
    /// Rises with every report of a boot.
    pub sequence: u64,
    /// The node's own state.
    pub state: DeviceState,
    /// All its devices.
    pub devices: Vec<DeviceHealth>,
}

impl Node {
    /// A node that was heard of at `now`.
    #[must_use]
    pub fn new(now: Duration) -> Self {
        Self {
            link: Link::Never { since: now },
            hosting: false,
            wishes: None,
            has_status: false,
            boot_id: String::new(),
            sequence: 0,
            state: DeviceState::HEALTHY,
            devices: BTreeMap::new(),
            workers: BTreeMap::new(),
            idle: BTreeMap::new(),
        }
    }

    /// Its agent opened stream `conn`, which replaces an earlier one.
    pub fn open(&mut self, now: Duration, conn: u64, hosting: bool) {
        self.link = Link::Up { conn, heard: now };
        self.hosting = hosting;
        // The order of reports is kept within a stream: an agent that restarted may count anew.
        self.sequence = 0;
        for since in self.idle.values_mut() {
            *since = now;
        }
    }

    /// Something was heard on stream `conn`; says whether that is the node's stream.
    pub fn hear(&mut self, now: Duration, conn: u64) -> bool {
        let ours = self.conn() == Some(conn);
        if ours {
            self.link = Link::Up { conn, heard: now };
        }
        ours
    }

    /// Stream `conn` ended; says whether it was the node's stream.
    pub fn close(&mut self, now: Duration, conn: u64) -> bool {
        let ours = self.conn() == Some(conn);
        if ours {
            let since = if let Link::Lost { since, .. } = self.link { since } else { now };
            self.link = Link::Lost { conn: None, since };
        }
        ours
    }

    /// Lets time pass; says whether the stream has just become silent.
    pub fn advance(&mut self, now: Duration) -> bool {
        match self.link {
            Link::Up { conn, heard } if now.saturating_sub(heard) >= SILENT => {
                self.link = Link::Lost { conn: Some(conn), since: heard };
                true
            }
            _ => false,
        }
    }

    /// Its open stream.
    #[must_use]
    pub fn conn(&self) -> Option<u64> {
        match self.link {
            Link::Up { conn, .. } => Some(conn),
            Link::Lost { conn, .. } => conn,
            Link::Never { .. } => None,
        }
    }

    /// Whether its agent is heard.
    #[must_use]
    pub fn reachable(&self) -> bool {
        matches!(self.link, Link::Up { .. })
    }

    /// Whether nothing was ever heard of it and little time has passed.
    #[must_use]
    pub fn awaited(&self, now: Duration) -> bool {
        let hosts = self.wishes.as_ref().is_some_and(|wishes| wishes.native);
        hosts && matches!(self.link, Link::Never { since } if now.saturating_sub(since) < GONE)
    }

    /// A report from its stream; an older one of the same boot changes nothing.
    pub fn health(&mut self, now: Duration, health: Health) -> bool {
        if health.boot_id == self.boot_id && health.sequence < self.sequence {
            return false;
        }
        self.take(now, health)
    }

    fn take(&mut self, now: Duration, health: Health) -> bool {
        let Health { boot_id, sequence, state, devices } = health;
        (self.boot_id, self.sequence) = (boot_id, sequence);
        let devices: BTreeMap<_, _> = devices.into_iter().map(|device| (device.id.clone(), device)).collect();
        let changed = devices != self.devices || state != self.state;
        for device in devices.keys() {
            if !self.serves(device) {
                self.idle.entry(device.clone()).or_insert(now);
            }
        }
        (self.devices, self.state) = (devices, state);
        changed
    }

    /// All its workers, from its stream.
    pub fn set_workers(&mut self, now: Duration, workers: BTreeMap<DeviceId, Worker>) -> bool {
        let changed = workers != self.workers;
        self.workers = workers;
        let devices: Vec<DeviceId> = self.devices.keys().cloned().collect();
        for device in devices {
            if self.serves(&device) {
                self.idle.remove(&device);
            } else {
                self.idle.entry(device).or_insert(now);
            }
        }
        changed
    }

    /// Its object. The status serves only while there is no stream, and never overwrites a later report.
    pub fn object(&mut self, now: Duration, object: &AcceleratorNode) -> bool {
        let spec = &object.spec;
        let wishes = Wishes {
            native: spec.native,
            drain: spec.drain,
            rack: Some(spec.rack.clone()).filter(|rack| !rack.is_empty()),
            cordoned: spec.cordoned_devices.iter().map(|entry| entry.device.clone()).collect(),
        };
        let mut changed = self.wishes.as_ref() != Some(&wishes);
        self.wishes = Some(wishes);
        self.has_status = object.status.as_ref().is_some_and(|status| !status.boot_id.is_empty());
        if let (Some(health), false) = (health_of(object), self.reachable()) {
            let never = matches!(self.link, Link::Never { .. });
            let later = health.boot_id == self.boot_id && health.sequence >= self.sequence;
            if later || (never && health.boot_id != self.boot_id) {
                changed |= self.take(now, health);
            }
        }
        changed
    }

    /// Its object is gone: what the stream says still holds.
    pub fn forget_object(&mut self) {
        self.wishes = None;
        self.has_status = false;
    }

    /// Whether its object has a status of its agent, beside which a condition may be written.
    #[must_use]
    pub const fn has_status(&self) -> bool {
        self.has_status
    }

    /// Whether neither an object nor a stream speaks of it any more.
    #[must_use]
    pub fn is_forgotten(&self, now: Duration) -> bool {
        self.wishes.is_none() && self.conn().is_none() && self.away(now) >= GONE
    }

    fn away(&self, now: Duration) -> Duration {
        match self.link {
            Link::Up { .. } => Duration::ZERO,
            Link::Never { since } | Link::Lost { since, .. } => now.saturating_sub(since),
        }
    }

    fn serves(&self, device: &DeviceId) -> bool {
        self.workers.get(device).is_some_and(|worker| worker.serving)
    }

    /// What may be done with `device` at `now`.
    #[must_use]
    pub fn standing(&self, now: Duration, device: &DeviceId) -> Standing {
        let Some(health) = self.devices.get(device) else {
            return if self.away(now) >= GONE || self.reachable() { Standing::Gone } else { Standing::Frozen };
        };
        let admission = health.state.admission.max(self.state.admission);
        let idle = self.idle.get(device).map_or(Duration::ZERO, |since| now.saturating_sub(*since));
        if admission == Admission::Barred || self.away(now) >= GONE || idle >= GONE {
            return Standing::Gone;
        }
        let wishes = self.wishes.clone().unwrap_or(Wishes { native: self.hosting, ..Wishes::default() });
        let leaving = admission == Admission::Draining
            || wishes.drain
            || wishes.cordoned.contains(device)
            // What the agent said at its hello is older than the object: only without one does it count.
            || (self.reachable() && !wishes.native);
        if leaving {
            Standing::Leaving
        } else if self.reachable() && self.serves(device) {
            Standing::Open
        } else {
            Standing::Frozen
        }
    }

    /// Its rack, when one is known.
    #[must_use]
    pub fn rack(&self) -> Option<&str> {
        self.wishes.as_ref()?.rack.as_deref()
    }

    /// Its devices.
    #[must_use]
    pub const fn devices(&self) -> &BTreeMap<DeviceId, DeviceHealth> {
        &self.devices
    }

    /// The worker of `device`, if it answers calls.
    #[must_use]
    pub fn worker(&self, device: &DeviceId) -> Option<&Worker> {
        self.workers.get(device).filter(|worker| worker.serving)
    }
}

fn health_of(object: &AcceleratorNode) -> Option<Health> {
    let status = object.status.as_ref().filter(|status| !status.boot_id.is_empty())?;
    let state = status.node.as_ref().map_or(DeviceState::HEALTHY, |node| DeviceState {
        health: node.health,
        admission: node.admission,
        action: node.action,
        scope: node.scope,
        reason: node.reason,
    });
    let devices = status.devices.iter().map(|device| DeviceHealth {
        id: device.device.clone(),
        state: DeviceState {
            health: device.health,
            admission: device.admission,
            action: device.action,
            scope: device.scope,
            reason: device.reason,
        },
        evidence: device.evidence.clone(),
        vendor: device.vendor,
        product: device.product.clone(),
        memory: device.memory_bytes,
        interconnect_domain: device.interconnect_domain.clone(),
        card: device.card.clone(),
        since_unix_ms: 0,
        traceparent: String::new(),
        computes: device.computes.clone(),
    });
    Some(Health { boot_id: status.boot_id.clone(), sequence: status.sequence, state, devices: devices.collect() })
}
