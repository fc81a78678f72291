//! What comes in: every fact that the ring takes, whoever says it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use berth_crds::{AcceleratorNode, ExpertPlacement};
use berth_planner::{Plan, Proposed};
use berth_types::{DeviceId, PlacementName, Revision};

use crate::{
    commit::{CommitError, Receipt},
    drafting::Drafted,
    index::{Health, LoadWindow, Stamp, Ticket, Worker},
    orders::{AgentLine, RunnerLine},
};

/// One fact.
#[derive(Debug)]
pub enum Fact {
    /// An agent's stream opened.
    AgentOpened {
        /// The stream.
        conn: u64,
        /// Its node.
        node: String,
        /// Whether the node may hold shelves.
        hosting: bool,
        /// Where its orders go.
        line: AgentLine,
    },
    /// An agent said something.
    Agent {
        /// The stream.
        conn: u64,
        /// What.
        said: AgentSaid,
    },
    /// A runner's stream opened.
    RunnerOpened {
        /// The stream.
        conn: u64,
        /// Its placement.
        placement: PlacementName,
        /// It divides tokens by weights.
        weighs: bool,
        /// Where its orders go.
        line: RunnerLine,
    },
    /// A runner said something.
    Runner {
        /// The stream.
        conn: u64,
        /// What.
        said: RunnerSaid,
    },
    /// A stream ended.
    Closed {
        /// The stream.
        conn: u64,
    },
    /// A placement's object.
    Placement(PlacementName, Box<ExpertPlacement>),
    /// A placement's object is gone.
    PlacementGone(PlacementName),
    /// All placements were listed; there are no others.
    PlacementsListed(BTreeSet<PlacementName>),
    /// A node's object.
    Node(String, Box<AcceleratorNode>),
    /// A node's object is gone.
    NodeGone(String),
    /// All nodes were listed; there are no others.
    NodesListed(BTreeSet<String>),
    /// A plan was made, or could not be.
    Planned {
        /// The placement.
        name: PlacementName,
        /// Its uid when the plan was begun.
        uid: String,
        /// What came of it.
        made: Box<Made>,
    },
    /// A commit ended.
    Committed {
        /// The placement.
        name: PlacementName,
        /// Its uid when the commit began.
        uid: String,
        /// How it ended.
        outcome: Box<Result<Receipt, CommitError>>,
    },
    /// A status write ended.
    Written {
        /// The placement.
        name: PlacementName,
        /// How it ended.
        outcome: Result<(), CommitError>,
    },
    /// The maps of gone placements were deleted, but for those that are named.
    Swept(BTreeSet<(PlacementName, String)>),
    /// A write of a node's condition ended.
    NodeWritten {
        /// The node.
        node: String,
        /// How it ended.
        outcome: Result<(), CommitError>,
    },
}

/// What came of a plan that was begun.
#[derive(Debug)]
pub struct Made {
    /// Which plan.
    pub ticket: Ticket,
    /// What it depends on.
    pub stamp: Stamp,
    /// When it was begun, since 1970.
    pub began: Duration,
    /// How long it took.
    pub took: Duration,
    /// What was drafted.
    pub drafted: Drafted,
    /// The waves that it was to go on with.
    pub left: Option<Plan<Proposed>>,
}

/// What an agent says.
#[derive(Debug)]
pub enum AgentSaid {
    /// Health of all devices.
    Health(Health),
    /// All workers.
    Workers(BTreeMap<DeviceId, Worker>),
    /// It is there.
    Beat,
}

/// What a runner says.
#[derive(Debug)]
pub enum RunnerSaid {
    /// Which revisions it uses.
    InUse {
        /// The oldest with steps.
        oldest: Revision,
        /// The one it starts steps on.
        current: Revision,
    },
    /// A load window.
    Load(LoadWindow),
    /// It is there.
    Beat,
}
