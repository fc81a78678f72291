//! What remediation remembers: operations under way and incidents it had to do with. It lives in one object of the
//! cluster, replaced with its resourceVersion, so that two leaders cannot spend one budget twice. Every cordon and order
//! in an AcceleratorNode's spec follows from it; nothing is written there that is not here first.

use std::collections::{BTreeMap, BTreeSet};

use berth_types::{Action, DeviceId};
use serde::{Deserialize, Serialize};

use super::remediate::NodeFacts;

/// How the reason of every cordon of remediation begins.
pub const CORDON: &str = "remediation ";

/// Operations and incidents.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Book {
    /// What is under way, by id, which is also the order's.
    pub operations: BTreeMap<String, Operation>,
    /// Devices that are not well and were in an operation.
    pub incidents: BTreeMap<DeviceId, Incident>,
    /// Operations begun so far.
    pub begun: u64,
}

/// One device, reset group or node on its way through emptying, order and validation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Operation {
    /// The device that wants it.
    pub device: DeviceId,
    /// Every device that it takes out of use.
    pub members: BTreeSet<DeviceId>,
    /// Pools of the members.
    pub pools: BTreeSet<String>,
    /// Failure domain of the node: its rack, else the node.
    pub domain: String,
    /// What is ordered.
    pub action: Action,
    /// Why, in the vocabulary's word and the vendor's.
    pub why: String,
    /// How far it is.
    pub phase: Phase,
    /// Since when, seconds of Unix time.
    pub since: i64,
    /// When the phase is given up, seconds of Unix time.
    pub deadline: i64,
    /// Members whose cordon was seen in the spec: one that is gone from there was taken out by a person.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub cordoned: BTreeSet<DeviceId>,
    /// The order was seen in the spec.
    #[serde(default, skip_serializing_if = "is_false")]
    pub ordered: bool,
    /// The agent ended in the middle: whether it was carried out, the device shows.
    #[serde(default, skip_serializing_if = "is_false")]
    pub unclear: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
const fn is_false(value: &bool) -> bool {
    !*value
}

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// Members are cordoned, replicas move away.
    Emptying,
    /// The agent has the order.
    Ordered,
    /// It is carried out; the device must prove itself.
    Validating,
}

/// What is remembered of a device until it is healthy again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Incident {
    /// The least that is tried next.
    pub step: Action,
    /// Steps that did not help.
    #[serde(default)]
    pub failures: u32,
    /// Orders of an unknown outcome that the device did not show to be carried out. The next such one climbs.
    #[serde(default)]
    pub unclear: u32,
    /// A person took its cordon or its order back: it is left alone until it is healthy.
    #[serde(default, skip_serializing_if = "is_false")]
    pub released: bool,
    /// Nothing is tried before, seconds of Unix time.
    #[serde(default)]
    pub retry_at: i64,
    /// How the last operation ended.
    #[serde(default)]
    pub last: String,
}

impl Default for Incident {
    fn default() -> Self {
        Self { step: Action::None, failures: 0, unclear: 0, released: false, retry_at: 0, last: String::new() }
    }
}

impl Operation {
    /// Its node.
    #[must_use]
    pub fn node(&self) -> &str {
        self.device.node()
    }

    /// Members that `node`'s spec should show as cordoned: not those that a person took out.
    pub fn cordons<'a>(&'a self, node: &'a NodeFacts) -> impl Iterator<Item = &'a DeviceId> {
        self.members.iter().filter(|member| !self.freed(member, node))
    }

    /// Whether a person took a member's cordon back.
    #[must_use]
    pub fn freed(&self, member: &DeviceId, node: &NodeFacts) -> bool {
        self.cordoned.contains(member) && !node.cordons.contains(member)
    }

    /// Whether a person took the order out of the spec.
    #[must_use]
    pub fn recalled(&self, id: &str, node: &NodeFacts) -> bool {
        self.ordered && !node.orders.contains(id)
    }
}

const CLUSTER: &str = "cluster";
const POOL: &str = "pool";
const DOMAIN: &str = "domain";
/// Every budget, by name.
pub const BUDGETS: [&str; 3] = [CLUSTER, POOL, DOMAIN];

/// Operations at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// In the cluster.
    pub cluster: u32,
    /// In a pool: devices of one vendor and product.
    pub pool: u32,
    /// In a failure domain: a rack, or a node without one.
    pub domain: u32,
}

impl Budget {
    /// What is exhausted so that an operation with these cannot begin, by its name among [`BUDGETS`] and in words; `None`
    /// = it may.
    #[must_use]
    pub fn refuses(&self, book: &Book, pools: &BTreeSet<String>, domain: &str) -> Option<(&'static str, String)> {
        let count = |of: &dyn Fn(&Operation) -> bool| {
            u32::try_from(book.operations.values().filter(|one| of(one)).count()).unwrap_or(u32::MAX)
        };
        if count(&|_| true) >= self.cluster {
            return Some((CLUSTER, format!("the cluster's budget of {} operations is spent", self.cluster)));
        }
        if let Some(pool) = pools.iter().find(|pool| count(&|one| one.pools.contains(*pool)) >= self.pool) {
            return Some((POOL, format!("the budget of {} operations of pool {pool} is spent", self.pool)));
        }
        let spent = count(&|one| one.domain == domain) >= self.domain;
        let why = || format!("the budget of {} operations of failure domain {domain} is spent", self.domain);
        spent.then(|| (DOMAIN, why()))
    }
}
