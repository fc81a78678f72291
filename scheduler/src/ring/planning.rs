//! The turn's middle: plans that are due, made beside the ring, and handed to the writer. What happened while one was made
//! counts: a plan whose world has changed is checked against the new one, and made anew if it does not hold there.

use std::{sync::Arc, time::Duration};

use berth_crds::expert_placement::{PlanCertificate, PlanDecision};
use berth_planner::{Standing, check, diff};
use berth_types::{PlacementName, Revision};

use super::{RETRY, Ring};
use crate::{
    commit::{CommitError, Order, Receipt},
    drafting::{Draft, Drafted, draft},
    facts::{Fact, Made},
    index::{Index, Pending, Placement, Stored, Ticket, Told},
    replan::{self, BALANCE_PAUSE, Cause, TOKENS_A_DEVICE},
    snapshot::{snapshot, survive},
    status,
    store::StoreError,
    weighing,
};

impl Ring {
    fn due(&self, now: Duration, name: &PlacementName) -> Option<Cause> {
        let placement = self.index.placements().get(name)?;
        let facts = facts(&self.index, now, name, placement, self.settle);
        replan::decide(now, &facts)
    }

    /// Begins a plan if one is due and its lane is free.
    pub(super) fn plan(&mut self, now: Duration, name: &PlacementName) {
        let adopted = self.index.adopted(now, name);
        if !adopted || self.index.placements().get(name).is_some_and(|known| now < known.memory.retry_at) {
            self.later.insert(name.clone());
        }
        let Some(cause) = self.due(now, name) else { return };
        if self.lanes.contains(&cause.lane()) {
            self.waiting.insert(name.clone());
            return;
        }
        let Some(snapshot) = snapshot(&self.index, now, name, cause) else { return };
        let Some(placement) = self.index.placement_mut(name) else { return };
        self.tickets += 1;
        let ticket = Ticket { number: self.tickets, cause };
        let memory = &mut placement.memory;
        memory.seen = Some((snapshot.stamp.world, snapshot.stamp.generation));
        memory.stale = false;
        memory.planning = Some(ticket);
        memory.looked = placement.heard;
        let rest = memory.rest.take().filter(|_| cause == Cause::Wave);
        self.lanes.insert(cause.lane());
        let (stamp, uid, name) = (snapshot.stamp, placement.uid.clone(), name.clone());
        let (clock, facts, began) = (self.clock.clone(), self.facts.clone(), (self.clock.now(), self.clock.unix()));
        let left = rest.clone();
        self.jobs.spawn(async move {
            let drafted = tokio::task::spawn_blocking(move || draft(snapshot, rest)).await;
            let drafted = drafted.unwrap_or_else(|error| {
                tracing::error!(placement = %name, %error, "the planner died: this is a bug");
                Drafted::Impossible("the planner died over this placement, please report this".to_owned())
            });
            let made = Made { ticket, stamp, began: began.1, took: clock.now().saturating_sub(began.0), drafted, left };
            // The ring may have ended meanwhile; the next leader plans for itself.
            let _ = facts.send(Fact::Planned { name, uid, made: made.into() }).await;
        });
    }

    /// A plan was made: follows it, unless something more urgent has passed it or it holds no longer.
    pub(super) fn planned(&mut self, now: Duration, name: &PlacementName, uid: &str, made: Made) {
        let Made { ticket, stamp, began, took, drafted, left } = made;
        self.lanes.remove(&ticket.cause.lane());
        for waiting in std::mem::take(&mut self.waiting) {
            self.index.touch(&waiting);
        }
        self.metrics.solved(took);
        let fresh = self.index.stamp(name) == stamp;
        let Some(placement) = self.index.placement_mut(name).filter(|known| known.uid == uid) else { return };
        if placement.memory.planning != Some(ticket) || placement.memory.pending.is_some() {
            tracing::info!(placement = %name, cause = %ticket.cause, "plan dropped: a more urgent one passed it");
            self.metrics.refused("passed");
            return;
        }
        placement.memory.planning = None;
        self.index.touch(name);
        let drafted = if fresh { Some(drafted) } else { self.again(now, name, ticket.cause, stamp.assigned, drafted) };
        let Some(drafted) = drafted else {
            tracing::info!(placement = %name, cause = %ticket.cause, "plan dropped: the world has changed meanwhile");
            self.metrics.refused("stale");
            if let Some(placement) = self.index.placement_mut(name) {
                placement.memory.stale = true;
                placement.memory.looked = 0;
                placement.memory.rest = placement.memory.rest.take().or(left);
            }
            return;
        };
        self.follow(now, name, ticket.cause, began, drafted);
    }

    /// What was drafted in another world, if it holds in this one.
    fn again(
        &self,
        now: Duration,
        name: &PlacementName,
        cause: Cause,
        from: Revision,
        drafted: Drafted,
    ) -> Option<Drafted> {
        let Drafted::Change(draft) = drafted else { return None };
        let snapshot = snapshot(&self.index, now, name, cause)?;
        if snapshot.stamp.assigned != from || snapshot.problem.instance.revision != draft.plan.decision().revision {
            return None;
        }
        let Draft { proposed, weighed, certificate, .. } = *draft;
        let plan = check(&snapshot.problem, snapshot.previous.as_deref(), proposed.clone()).ok()?;
        Some(Drafted::Change(Draft { plan, proposed, weighed, certificate }.into()))
    }

    fn follow(&mut self, now: Duration, name: &PlacementName, cause: Cause, began: Duration, drafted: Drafted) {
        let wall = self.wall();
        let Some(placement) = self.index.placement_mut(name) else { return };
        let assigned = placement.cutover.assigned();
        let memory = &mut placement.memory;
        let draft = match drafted {
            Drafted::Change(draft) => *draft,
            Drafted::Same { survives, mut certificate, kept } => {
                memory.problem = None;
                memory.survives = Some(survives);
                certificate.revision = assigned.0;
                if let Some((before, kept)) = kept {
                    let kept = weighing::kept(wall, assigned, before, kept);
                    self.metrics.kept();
                    note(&mut memory.told, certificate, kept);
                }
                return;
            }
            Drafted::Impossible(reason) => {
                self.metrics.refused("planner");
                tracing::warn!(placement = %name, %cause, reason, "cannot be planned");
                weighing::remember(&mut memory.told.decisions, weighing::refused(wall, cause, assigned, &reason));
                memory.problem = Some(reason);
                return;
            }
        };
        memory.problem = None;
        memory.survives = Some(draft.plan.decision().survives);
        let revision = draft.plan.decision().revision;
        let trace_id = self.decisions.planned(name, cause, began, revision);
        tracing::info!(placement = %name, plan = %format_args!("{name}-{revision}"), trace_id, %cause, outcome = %draft.plan, "planned");
        if let Some(layout) = draft.plan.first() {
            tracing::debug!(placement = %name, changes = diff(placement.assigned().map(|one| &**one), layout), "moves");
        }
        self.commit(now, name, cause, draft);
    }

    fn commit(&mut self, now: Duration, name: &PlacementName, cause: Cause, draft: Draft) {
        let wall = self.wall();
        let Draft { plan, weighed, certificate, .. } = draft;
        let Some(placement) = self.index.placement_mut(name) else { return };
        let uid = placement.uid.clone();
        let retained = placement.cutover.retained();
        let spare: Vec<Revision> =
            placement.revisions.keys().filter(|revision| !retained.contains(revision)).copied().collect();
        let (from, to) = (placement.cutover.assigned(), plan.decision().revision);
        let pays_back = weighed.pays_back.unwrap_or_default();
        placement.memory.pending = Some(Pending { revision: to, cause, pays_back });
        placement.memory.promised = plan.first().cloned().map(Arc::new);
        // The status that goes with the plan speaks of the plan.
        let before = placement.memory.told.clone();
        let moved = weighing::moved(wall, cause, from, to, &weighed);
        let told = &mut placement.memory.told;
        (told.why, told.moved) = (moved.why.clone(), plan.decision().moved_bytes);
        // A certificate is of the last wave's layout.
        told.certificate = (plan.decision().waves.len() < 2).then_some(certificate);
        weighing::remember(&mut told.decisions, moved);
        let status = status::status(&self.index, now, wall, name).unwrap_or_default();
        if let Some(placement) = self.index.placement_mut(name) {
            placement.memory.told = before;
        }
        self.index.claim();
        let (writer, facts, name) = (self.writer.clone(), self.facts.clone(), name.clone());
        let (clock, metrics) = (self.clock.clone(), self.metrics.clone());
        self.jobs.spawn(async move {
            let bytes = plan.decision().moved_bytes;
            let outcome = writer.commit(Order { uid: uid.clone(), plan, status, spare }).await;
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
        let pending = placement.memory.pending.take();
        placement.memory.promised = None;
        match outcome {
            Ok(Receipt { revision, layout, weights, digest, status, deleted, rest }) => {
                let trace_id = self.decisions.applied(name, revision);
                tracing::info!(placement = %name, revision = revision.0, plan = %format_args!("{name}-{revision}"),
                    trace_id, why = status.why, "revision assigned");
                placement.revisions.retain(|known, _| !deleted.contains(known));
                placement.revisions.insert(revision, Stored { layout, weights, digest });
                placement.cutover.assign(now, revision);
                let memory = &mut placement.memory;
                (memory.rest, memory.refused) = (rest, 0);
                memory.told = Told::of(&status);
                memory.settled_at = now;
                if let Some(Pending { pays_back, .. }) = pending.filter(|pending| pending.cause == Cause::Rebalance) {
                    memory.balance_at = now.saturating_add(pays_back.max(BALANCE_PAUSE));
                }
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
        self.index.claim();
        self.index.touch(name);
    }
}

/// Notes a look at the balance that moved nothing. What differs in its last digits alone is no news: a look that says
/// the same again is not told.
fn note(told: &mut Told, certificate: PlanCertificate, kept: PlanDecision) {
    let last = told.decisions.first();
    if last.is_some_and(|last| (last.outcome, &last.why) == (kept.outcome, &kept.why)) {
        return;
    }
    weighing::remember(&mut told.decisions, kept);
    told.certificate = Some(certificate);
}

/// Pause after so many refusals in a row.
fn pause(refused: u32) -> Duration {
    RETRY.0.saturating_mul(1 << refused.min(10)).min(RETRY.1)
}

fn facts(index: &Index, now: Duration, name: &PlacementName, placement: &Placement, settle: Duration) -> replan::Facts {
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
        cutting: placement.is_cutting(),
        gone: count(Standing::Gone),
        leaving: count(Standing::Leaving),
        late: late.count(),
        spec_changed: memory.seen.is_none_or(|(_, generation)| generation != placement.generation),
        short: fewer || memory.survives.is_none_or(|survives| survives < declared),
        waves: memory.rest.is_some(),
        planning: memory.planning.map(|ticket| ticket.cause),
        window: placement.heard > memory.looked && says_enough(placement, devices().count()),
        balance_at: memory.balance_at.max(memory.settled_at.saturating_add(settle)),
    }
}

/// Whether the last load window tells how devices are loaded.
fn says_enough(placement: &Placement, devices: usize) -> bool {
    placement.last_tokens() >= TOKENS_A_DEVICE.saturating_mul(u64::try_from(devices).unwrap_or(u64::MAX))
}
