//! The words that `remediate` reads and answers in: no Kubernetes object, no client, no clock.

use std::collections::{BTreeMap, BTreeSet};

use berth_crds::accelerator_node::OrderPhase;
use berth_types::{Action, Admission, DeviceId, Health};

use super::book::{Book, Budget};

/// What is so.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct World {
    /// Nodes by name.
    pub nodes: BTreeMap<String, NodeFacts>,
    /// Placements.
    pub placements: Vec<PlacementFacts>,
}

/// One node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// It hosts experts and nothing else.
    pub native: bool,
    /// Its failure domain.
    pub domain: String,
    /// Label of another remediator that has it in hand.
    pub other: Option<String>,
    /// Its agent is not heard.
    pub silent: bool,
    /// Devices.
    pub devices: BTreeMap<DeviceId, DeviceFacts>,
    /// Devices that the spec shows as cordoned by remediation.
    pub cordons: BTreeSet<DeviceId>,
    /// Orders in the spec.
    pub orders: BTreeSet<String>,
    /// What became of orders.
    pub fates: BTreeMap<String, (OrderPhase, String)>,
    /// Orders that were under way when their agent ended.
    pub unclear: BTreeSet<String>,
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Vendor and product.
    pub pool: String,
    /// Devices with the same group reset together; empty = it resets alone.
    pub group: String,
    /// Its health.
    pub health: Health,
    /// What may be placed on it.
    pub admission: Admission,
    /// What its agent advises.
    pub action: Action,
    /// Reason and evidence.
    pub why: String,
    /// Its worker holds experts.
    pub holds: bool,
}

/// One placement.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlacementFacts {
    /// `<namespace>/<name>`.
    pub name: String,
    /// Nothing is planned for it.
    pub paused: bool,
    /// Devices of its assignment.
    pub devices: BTreeSet<DeviceId>,
}

/// What remediation may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Say what should be done.
    Advise,
    /// Say what would be done next, the budget included.
    DryRun,
    /// Do it.
    Act,
}

/// What the cluster's owner chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What it may do.
    pub mode: Mode,
    /// Operations at a time.
    pub budget: Budget,
    /// Seconds that emptying may take.
    pub empty_limit: i64,
    /// Seconds that an order may take.
    pub order_limit: i64,
    /// Seconds until a device that was reset has proven itself.
    pub validate_limit: i64,
    /// Agents may boot their nodes again.
    pub reboot: bool,
    /// Nothing new is begun and nothing ordered.
    pub paused: bool,
}

/// Something that happened, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// The device.
    pub device: DeviceId,
    /// CamelCase.
    pub reason: &'static str,
    /// Whether somebody should look.
    pub warning: bool,
    /// One sentence.
    pub note: String,
}

/// What follows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// What is remembered from now on.
    pub book: Book,
    /// What happened.
    pub told: Vec<Told>,
    /// What should be done about devices that nothing is done about, and why nothing is.
    pub advice: BTreeMap<DeviceId, (Action, String)>,
    /// Of these, devices that only a spent budget keeps waiting, by the budget's name.
    pub waiting: BTreeMap<&'static str, u32>,
}
