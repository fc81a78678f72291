//! The turn's middle: plans that are due, handed to the writer, and what became of them.

use std::{sync::Arc, time::Duration};

use berth_planner::{
    Checked, Decision, Layout, Plan, Problem, Proposed, Standing, check, diff, problem::Survive, solve,
};
use berth_types::{PlacementName, Revision};

use super::{RETRY, Ring};
use crate::{
    commit::{CommitError, Order, Receipt},
    facts::Fact,
    index::{Index, Memory, Placement, Stored},
    replan::{self, Cause},
    snapshot::{snapshot, survive},
    status,
    store::StoreError,
};

impl Ring {
    fn due(&self, now: Duration, name: &PlacementName) -> Option<Cause> {
        let placement = self.index.placements().get(name)?;
        let facts = facts(&self.index, now, name, placement);
        replan::decide(now, &facts)
    }

    /// Makes a plan if one is due, and hands it to the writer.
    pub(super) fn plan(&mut self, now: Duration, name: &PlacementName) {
        let adopted = self.index.adopted(now, name);
        if !adopted || self.index.placements().get(name).is_some_and(|known| now < known.memory.retry_at) {
            self.later.insert(name.clone());
        }
        let Some(cause) = self.due(now, name) else { return };
        let world = self.index.world();
        let Some((problem, previous)) = snapshot(&self.index, now, name, cause) else { return };
        let Some(placement) = self.index.placement_mut(name) else { return };
        placement.memory.seen = Some((world, placement.generation));
        placement.memory.stale = false;
        placement.memory.planned_at = now;
        let (began, began_unix) = (self.clock.now(), self.clock.unix());
        let rest = placement.memory.rest.take().filter(|_| cause == Cause::Wave);
        let outcome = propose(&problem, previous.as_deref(), rest);
        self.metrics.solved(self.clock.now().saturating_sub(began));
        match outcome {
            Ok((plan, survives)) => {
                placement.memory.problem = None;
                placement.memory.survives = Some(survives);
                let changed = plan.decision().waves.len() > 1 || plan.first() != previous.as_deref();
                if changed {
                    let id = format!("{name}-{}", plan.decision().revision);
                    let trace_id = self.decisions.planned(name, cause, began_unix, &id);
                    tracing::info!(placement = %name, plan = id, trace_id, %cause, outcome = %plan, "planned");
                    if let Some(layout) = plan.first() {
                        tracing::debug!(placement = %name, changes = diff(previous.as_deref(), layout), "moves");
                    }
                    self.commit(now, name, cause, plan);
                }
            }
            Err(reason) => {
                self.metrics.refused("planner");
                tracing::warn!(placement = %name, %cause, reason, "cannot be planned");
                placement.memory.problem = Some(reason);
            }
        }
    }

    fn commit(&mut self, now: Duration, name: &PlacementName, cause: Cause, plan: Plan<Checked>) {
        let wall = self.wall();
        let Decision { moves, moved_bytes, certificate, .. } = plan.decision();
        let why = format!("{cause}: {moves} moves, {moved_bytes}; {certificate}");
        let before = self.index.placements().get(name).map(|placement| placement.memory.clone());
        let Some(placement) = self.index.placement_mut(name) else { return };
        let uid = placement.uid.clone();
        let retained = placement.cutover.retained();
        let spare: Vec<Revision> =
            placement.revisions.keys().filter(|revision| !retained.contains(revision)).copied().collect();
        placement.memory.pending = Some(plan.decision().revision);
        placement.memory.promised = plan.first().cloned().map(Arc::new);
        // The status that goes with the plan speaks of the plan.
        (placement.memory.why, placement.memory.moved) = (why, plan.decision().moved_bytes);
        let told = status::status(&self.index, now, wall, name).unwrap_or_default();
        if let (Some(before), Some(placement)) = (before, self.index.placement_mut(name)) {
            let Memory { why, moved, .. } = before;
            (placement.memory.why, placement.memory.moved) = (why, moved);
        }
        let (writer, facts, name) = (self.writer.clone(), self.facts.clone(), name.clone());
        let (clock, metrics) = (self.clock.clone(), self.metrics.clone());
        self.jobs.spawn(async move {
            let bytes = plan.decision().moved_bytes;
            let outcome = writer.commit(Order { uid: uid.clone(), plan, status: told, spare }).await;
            match &outcome {
                Ok(_) => {
                    metrics.planned(cause.as_str(), bytes.get(), clock.now().saturating_sub(now));
                }
                Err(error) => metrics.refused(error.as_str()),
            }
            // The ring may have ended meanwhile; the next leader reads what was stored.
            let _ = facts.send(Fact::Committed { name, uid, outcome: outcome.into() }).await;
        });
    }

    pub(super) fn committed(
        &mut self,
        now: Duration,
        name: &PlacementName,
        uid: &str,
        outcome: Result<Receipt, CommitError>,
    ) {
        let Some(placement) = self.index.placement_mut(name).filter(|known| known.uid == uid) else { return };
        placement.memory.pending = None;
        placement.memory.promised = None;
        match outcome {
            Ok(Receipt { revision, layout, digest, status, deleted, rest }) => {
                let trace_id = self.decisions.applied(name, revision);
                tracing::info!(placement = %name, revision = revision.0, plan = %format_args!("{name}-{revision}"),
                    trace_id, why = status.why, "revision assigned");
                placement.revisions.retain(|known, _| !deleted.contains(known));
                placement.revisions.insert(revision, Stored { layout, digest });
                placement.cutover.assign(now, revision);
                let memory = &mut placement.memory;
                (memory.rest, memory.refused) = (rest, 0);
                (memory.why, memory.moved) = (status.why.clone(), status.moved_bytes);
                placement.status = status.clone();
                self.written.entry(name.clone()).or_default().last = Some(status);
            }
            Err(error) => {
                tracing::warn!(placement = %name, %error, "plan not stored");
                if let CommitError::Store(StoreError::Exists { revision, .. }) = &error {
                    placement.memory.burned = placement.memory.burned.max(*revision);
                }
                if let CommitError::Store(full @ (StoreError::TooLarge { .. } | StoreError::Full { .. })) = &error {
                    placement.memory.problem = Some(full.to_string());
                }
                let memory = &mut placement.memory;
                memory.stale = true;
                memory.rest = None;
                memory.retry_at = now.saturating_add(pause(memory.refused));
                memory.refused = memory.refused.saturating_add(1);
            }
        }
        self.index.touch(name);
    }
}

/// Pause after so many refusals in a row.
fn pause(refused: u32) -> Duration {
    RETRY.0.saturating_mul(1 << refused.min(10)).min(RETRY.1)
}

/// A checked plan, from the rest of the last one or from the solver, and what it survives; else a sentence.
fn propose(
    problem: &Problem,
    previous: Option<&Layout>,
    rest: Option<Plan<Proposed>>,
) -> Result<(Plan<Checked>, Survive), String> {
    if let Some(rest) = rest {
        let survives = rest.decision().survives;
        // What no longer holds is planned anew.
        if let Ok(plan) = check(problem, previous, rest) {
            return Ok((plan, survives));
        }
    }
    let plan = solve(problem, previous).map_err(|infeasible| infeasible.to_string())?;
    let survives = plan.decision().survives;
    let plan = check(problem, previous, plan).map_err(|rejected| {
        tracing::error!(findings = ?rejected.findings, "the checker refused a plan: this is a bug");
        format!("the planner made a plan that its checker refuses, please report this: {rejected}")
    })?;
    Ok((plan, survives))
}

fn facts(index: &Index, now: Duration, name: &PlacementName, placement: &Placement) -> replan::Facts {
    let layout = placement.assigned();
    let devices = || layout.iter().flat_map(|layout| layout.devices.iter().map(|entry| &entry.device));
    let count = |standing| devices().filter(|device| index.standing(now, device) == standing).count();
    let memory = &placement.memory;
    let late = devices().filter(|device| {
        let worker = index.nodes().get(device.node()).and_then(|node| node.worker(device));
        placement.avoided.get(*device).is_some_and(|failed| worker.is_some_and(|worker| worker.instance == *failed))
    });
    let wanted =
        placement.spec.devices.per_instance.unwrap_or(0).min(placement.spec.granted_devices.unwrap_or(u32::MAX));
    let fewer = devices().count() < usize::try_from(wanted).unwrap_or(usize::MAX);
    let declared = survive(placement.spec.redundancy.survive);
    replan::Facts {
        paused: placement.spec.paused,
        adopted: index.adopted(now, name),
        pending: memory.pending.is_some(),
        retry_at: memory.retry_at,
        changed: memory.stale || memory.seen != Some((index.world(), placement.generation)),
        assigned: placement.cutover.assigned().0 > 0,
        cutting: placement.cutover.loading() || placement.cutover.draining().0 > 0,
        gone: count(Standing::Gone),
        leaving: count(Standing::Leaving),
        late: late.count(),
        spec_changed: memory.seen.is_none_or(|(_, generation)| generation != placement.generation),
        short: fewer || memory.survives.is_none_or(|survives| survives < declared),
        waves: memory.rest.is_some(),
        balancedness: status::balancedness(placement),
        planned_at: memory.planned_at,
    }
}
