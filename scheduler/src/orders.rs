//! Out: what each agent must hold and where each runner sends its calls. Built from the index alone and
//! sent when it differs from what was sent; a line that is full is tried again at the next pass.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use berth_planner::{Layout, Standing, Weights};
use berth_proto::{PROTO, convert, v1};
use berth_types::{DeviceId, Epoch, PlacementName, Revision};
use tokio::sync::mpsc;
use tonic::Status;

use crate::{
    index::{Index, Node, Placement},
    metrics::SchedulerMetrics,
};

/// Where orders for one agent go.
pub type AgentLine = mpsc::Sender<Result<v1::AgentOrder, Status>>;
/// Where orders for one runner go.
pub type RunnerLine = mpsc::Sender<Result<v1::RunnerOrder, Status>>;

/// The scheduler's first word on a stream.
#[must_use]
pub fn hello(epoch: Epoch) -> v1::SchedulerHello {
    let hello = v1::Hello { build: env!("CARGO_PKG_VERSION").to_owned(), proto: PROTO, features: Vec::new() };
    v1::SchedulerHello { hello: Some(hello), epoch: epoch.0 }
}

/// Everything that `node`'s devices must hold; `None` while the node has not said what its devices are and a
/// placement names formats by vendor: a shelf whose format changes under its revision would be loaded twice.
#[must_use]
pub fn desired(index: &Index, node: &str) -> Option<Vec<v1::DeviceShelves>> {
    let known = index.nodes().get(node).map(Node::devices).filter(|devices| !devices.is_empty());
    let mut devices: BTreeMap<DeviceId, Vec<v1::Shelf>> = BTreeMap::new();
    for (name, placement) in index.placements() {
        let formats = &placement.spec.vendor_formats;
        for revision in placement.cutover.retained() {
            let Some(layout) = placement.layout(revision) else { continue };
            let here = layout.devices.iter().filter(|entry| entry.device.node() == node && entry.slots > 0);
            for device in here.map(|entry| &entry.device) {
                if known.is_none() && !formats.is_empty() {
                    return None;
                }
                let vendor = known.and_then(|devices| devices.get(device)).map(|device| device.vendor);
                let shelf = convert::Shelf {
                    placement: name.clone(),
                    placement_uid: placement.uid.clone(),
                    revision,
                    uri: placement.spec.weights.uri.clone(),
                    digest: placement.spec.weights.digest.clone(),
                    format: vendor.and_then(|vendor| formats.get(&vendor)).copied(),
                    slots: layout.slots_of(device),
                };
                devices.entry(device.clone()).or_default().push(v1::Shelf::from(&shelf));
            }
        }
    }
    let entry = |(device, shelves): (DeviceId, _)| v1::DeviceShelves { device: device.to_string(), shelves };
    Some(devices.into_iter().map(entry).collect())
}

/// The routes of the revision that `placement` serves: devices with a live replica. With the revision's weights for a
/// runner that `weighs`.
#[must_use]
pub fn routes(index: &Index, now: Duration, epoch: Epoch, placement: &Placement, weighs: bool) -> Option<v1::Routes> {
    let revision = placement.cutover.serving();
    let layout = placement.layout(revision)?;
    let weights = placement.weights(revision).filter(|_| weighs);
    let route = |device: &DeviceId| {
        let worker = index.live(now, &placement.uid, revision, device)?;
        let layers = convert::slots_to_wire(&layout.slots_of(device));
        let weights = weights.map(|weights| convert::weights_to_wire(&weights_of(layout, weights, device)));
        let (device, endpoint, weights) = (device.to_string(), worker.endpoint.clone(), weights.unwrap_or_default());
        Some(v1::RouteDevice { device, endpoint, layers, weights })
    };
    let used = layout.devices.iter().filter(|entry| entry.slots > 0);
    Some(v1::Routes {
        epoch: epoch.0,
        placement_uid: placement.uid.clone(),
        revision: revision.0,
        devices: used.filter_map(|entry| route(&entry.device)).collect(),
        traceparent: placement.traceparent.clone(),
    })
}

/// The weights of a device's slots.
fn weights_of(layout: &Layout, weights: &Weights, device: &DeviceId) -> convert::SlotWeights {
    let Some((_, range)) = layout.ranges().find(|(id, _)| *id == device) else { return convert::SlotWeights::new() };
    let part = |row: &Vec<u16>| row.get(range.clone()).unwrap_or_default().to_vec();
    weights.iter().map(|(layer, row)| (*layer, part(row))).collect()
}

/// Devices of `placement` whose replicas do not answer now: gone, or without a worker that has the shelf.
#[must_use]
pub fn gone(index: &Index, now: Duration, placement: &Placement) -> v1::DevicesGone {
    let mut devices: Vec<String> = Vec::new();
    for revision in placement.cutover.retained().into_iter().filter(|one| *one <= placement.cutover.serving()) {
        let Some(layout) = placement.layout(revision) else { continue };
        for device in layout.devices.iter().filter(|entry| entry.slots > 0).map(|entry| &entry.device) {
            let serves = revision == placement.cutover.serving();
            let lost = index.standing(now, device) == Standing::Gone
                || (serves && index.live(now, &placement.uid, revision, device).is_none());
            if lost {
                devices.push(device.to_string());
            }
        }
    }
    devices.sort();
    devices.dedup();
    v1::DevicesGone { devices }
}

/// The lines to all agents and runners, with what was sent on each.
#[derive(Debug)]
pub struct Post {
    epoch: Epoch,
    sequence: u64,
    agents: BTreeMap<u64, (String, AgentLine, Option<Vec<v1::DeviceShelves>>)>,
    runners: BTreeMap<u64, RunnerPost>,
    /// What each placement retained when agents were last told.
    retained: BTreeMap<PlacementName, (String, BTreeSet<Revision>)>,
    metrics: SchedulerMetrics,
}

#[derive(Debug)]
struct RunnerPost {
    placement: PlacementName,
    /// It divides tokens by weights.
    weighs: bool,
    line: RunnerLine,
    routes: Option<v1::Routes>,
    gone: Option<v1::DevicesGone>,
    /// The line was full, or is new: look again although nothing changed.
    unsent: bool,
}

impl Post {
    /// No lines yet.
    #[must_use]
    pub fn new(epoch: Epoch, metrics: SchedulerMetrics) -> Self {
        Self {
            epoch,
            sequence: 0,
            agents: BTreeMap::new(),
            runners: BTreeMap::new(),
            retained: BTreeMap::new(),
            metrics,
        }
    }

    /// A line to the agent of `node`.
    pub fn agent(&mut self, conn: u64, node: &str, line: AgentLine) {
        self.agents.retain(|_, (known, _, _)| known != node);
        self.agents.insert(conn, (node.to_owned(), line, None));
    }

    /// A line to a runner of `placement`.
    pub fn runner(&mut self, conn: u64, placement: &PlacementName, weighs: bool, line: RunnerLine) {
        let placement = placement.clone();
        self.runners.insert(conn, RunnerPost { placement, weighs, line, routes: None, gone: None, unsent: true });
    }

    /// A stream ended.
    pub fn forget(&mut self, conn: u64) {
        self.agents.remove(&conn);
        self.runners.remove(&conn);
    }

    /// Tells runners of `touched` placements which devices are gone; they are told before anything is
    /// planned.
    pub fn tell_gone(&mut self, index: &Index, now: Duration, touched: &BTreeSet<PlacementName>) {
        for post in self.runners.values_mut().filter(|post| post.unsent || touched.contains(&post.placement)) {
            let Some(placement) = index.placements().get(&post.placement) else { continue };
            let gone = gone(index, now, placement);
            if post.gone.as_ref().map_or(gone.devices.is_empty(), |sent| *sent == gone) {
                continue;
            }
            let order = v1::RunnerOrder { order: Some(v1::runner_order::Order::Gone(gone.clone())) };
            if self.metrics.sent("devices_gone", post.line.try_send(Ok(order)).is_ok()) {
                post.gone = Some(gone);
            } else {
                post.unsent = true;
            }
        }
    }

    /// Sends routes to runners of `touched` placements and desired shelves to agents, where they differ
    /// from what was sent.
    pub fn send(&mut self, index: &Index, now: Duration, touched: &BTreeSet<PlacementName>) {
        for post in self.runners.values_mut().filter(|post| post.unsent || touched.contains(&post.placement)) {
            let Some(placement) = index.placements().get(&post.placement) else { continue };
            post.unsent = false;
            let Some(routes) = routes(index, now, self.epoch, placement, post.weighs) else { continue };
            if !post.routes.as_ref().is_none_or(|sent| adds(sent, &routes)) {
                continue;
            }
            let order = v1::RunnerOrder { order: Some(v1::runner_order::Order::Routes(routes.clone())) };
            if self.metrics.sent("routes", post.line.try_send(Ok(order)).is_ok()) {
                post.routes = Some(routes);
            } else {
                post.unsent = true;
            }
        }
        let changed = self.note_retained(index, touched);
        for (node, line, sent) in self.agents.values_mut().filter(|(_, _, sent)| changed || sent.is_none()) {
            let Some(devices) = desired(index, node) else {
                *sent = None;
                continue;
            };
            if sent.as_ref() == Some(&devices) {
                continue;
            }
            self.sequence += 1;
            let desired = v1::DesiredShelves { epoch: self.epoch.0, sequence: self.sequence, devices: devices.clone() };
            let order = v1::AgentOrder { order: Some(v1::agent_order::Order::Desired(desired)) };
            let delivered = self.metrics.sent("desired_shelves", line.try_send(Ok(order)).is_ok());
            *sent = delivered.then_some(devices);
        }
    }

    /// Whether what agents must hold has changed.
    fn note_retained(&mut self, index: &Index, touched: &BTreeSet<PlacementName>) -> bool {
        let mut changed = false;
        for name in touched {
            let now = index.placements().get(name).map(|known| (known.uid.clone(), known.cutover.retained()));
            if self.retained.get(name) != now.as_ref() {
                changed = true;
                match now {
                    Some(now) => self.retained.insert(name.clone(), now),
                    None => self.retained.remove(name),
                };
            }
        }
        changed
    }
}

/// Whether `new` says more than that devices of `sent` are gone, which runners are told otherwise.
fn adds(sent: &v1::Routes, new: &v1::Routes) -> bool {
    sent.revision != new.revision
        || sent.placement_uid != new.placement_uid
        || new.devices.iter().any(|device| !sent.devices.contains(device))
}
