//! The turn's end: status, written when it changed: news at once, progress now and then.

use std::time::Duration;

use berth_crds::ExpertPlacementStatus;
use berth_types::PlacementName;

use super::{RETRY, Ring};
use crate::{commit::CommitError, facts::Fact, status};

/// Least time between two status writes of a placement that tell of progress only.
const STATUS_PAUSE: Duration = Duration::from_millis(500);

/// What is known of the status writes of one object.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) last: Option<ExpertPlacementStatus>,
    pub(super) in_flight: bool,
    /// The last write was refused: the object says something else.
    pub(super) failed: bool,
    pub(super) not_before: Duration,
}

/// What is known of the writes of one node's condition.
#[derive(Debug, Default)]
pub(super) struct NodeWritten {
    pub(super) last: Option<bool>,
    pub(super) in_flight: Option<bool>,
    pub(super) not_before: Duration,
}

impl Ring {
    /// Writes a placement's status if it changed: news at once, progress now and then.
    pub(super) fn tell(&mut self, now: Duration, name: &PlacementName) {
        let Some(mut status) = status::status(&self.index, now, self.wall(), name) else {
            self.written.remove(name);
            return;
        };
        if let Some(assignment) = &mut status.assignment {
            assignment.epoch = self.epoch.0;
        }
        let Some(placement) = self.index.placements().get(name) else { return };
        let written = self.written.entry(name.clone()).or_default();
        // A placement of an earlier leader differs by its epoch at least: it is written once to claim it.
        let known = written.last.as_ref().unwrap_or(&placement.status);
        if *known == status && !written.failed {
            return;
        }
        let wait = written.in_flight
            || placement.memory.pending.is_some()
            || (now < written.not_before && (written.failed || known.conditions == status.conditions))
            || !self.index.adopted(now, name);
        if wait {
            self.later.insert(name.clone());
            return;
        }
        written.in_flight = true;
        written.failed = false;
        written.not_before = now.saturating_add(STATUS_PAUSE);
        let (writer, facts, name, uid) = (self.writer.clone(), self.facts.clone(), name.clone(), placement.uid.clone());
        written.last = Some(status.clone());
        if let Some(placement) = self.index.placement_mut(&name) {
            placement.status = status.clone();
        }
        self.jobs.spawn(async move {
            let outcome = writer.status(&name, &uid, status).await.map(|_| ());
            // As above.
            let _ = facts.send(Fact::Written { name, outcome }).await;
        });
    }

    pub(super) fn status_written(&mut self, now: Duration, name: &PlacementName, outcome: Result<(), CommitError>) {
        let Some(written) = self.written.get_mut(name) else { return };
        written.in_flight = false;
        self.metrics.told("ExpertPlacement", if outcome.is_ok() { "done" } else { "failed" });
        if let Err(error) = outcome {
            tracing::warn!(placement = %name, %error, "status not written");
            self.metrics.refused(error.as_str());
            written.failed = true;
            written.not_before = now.saturating_add(RETRY.1 / 10);
            self.later.insert(name.clone());
        }
    }

    pub(super) fn tell_nodes(&mut self, now: Duration) {
        let wall = self.wall();
        self.nodes_written.retain(|name, _| self.index.nodes().contains_key(name));
        for (name, node) in self.index.nodes().iter().filter(|(_, node)| node.has_status()) {
            let heard = node.reachable();
            let written = self.nodes_written.entry(name.clone()).or_default();
            let waits = written.in_flight.is_some() || now < written.not_before || node.awaited(now);
            if written.last == Some(heard) || waits {
                continue;
            }
            let Some(condition) = status::reachable(heard, wall) else { continue };
            written.in_flight = Some(heard);
            let (writer, facts, node) = (self.writer.clone(), self.facts.clone(), name.clone());
            self.jobs.spawn(async move {
                let outcome = writer.reachable(&node, &condition).await;
                // As above.
                let _ = facts.send(Fact::NodeWritten { node, outcome }).await;
            });
        }
    }

    pub(super) fn node_written(&mut self, now: Duration, node: &str, outcome: Result<(), CommitError>) {
        let Some(written) = self.nodes_written.get_mut(node) else { return };
        let told = written.in_flight.take();
        self.metrics.told("AcceleratorNode", if outcome.is_ok() { "done" } else { "failed" });
        match outcome {
            Ok(()) => written.last = told,
            Err(error) => {
                tracing::warn!(node, %error, "reachability not written");
                written.not_before = now.saturating_add(RETRY.1);
            }
        }
    }
}
