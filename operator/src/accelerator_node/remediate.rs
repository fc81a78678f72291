//! Decides what is done about devices that are not well. Pure: what is so, what is remembered and the time in; what is
//! remembered from now on, what to tell and what to advise out. The same in gives the same out.
//!
//! Nothing is ordered for a device that holds a replica, unless it is Barred, and then its replicas are gone already:
//! members of an operation are emptied first. Operations never exceed the budget. A step that fails climbs.

use std::collections::{BTreeMap, BTreeSet};

use berth_crds::accelerator_node::OrderPhase;
use berth_types::{Action, Admission, DeviceId, Health};

use super::book::{Book, Incident, Operation, Phase};
pub use super::world::{Decision, DeviceFacts, Mode, NodeFacts, PlacementFacts, Policy, Told, World};

/// An agent may say so long after an order's deadline what became of it.
const GRACE: i64 = 120;
/// An order that nobody knows the outcome of has shown after so long whether it was carried out.
const UNCLEAR: i64 = 60;

/// One pass. Operations go one step further at most, but for one that begins with nothing to empty.
#[must_use]
pub fn remediate(world: &World, book: &Book, policy: &Policy, now: i64) -> Decision {
    let mut pass = Pass { world, policy, now, book: book.clone(), told: Vec::new(), waiting: BTreeMap::new() };
    for id in book.operations.keys() {
        pass.advance(id);
    }
    pass.forget();
    let (mut advice, mut wanting) = (BTreeMap::new(), pass.wanting());
    // Lost ones first: they serve nobody, and come back with nothing to move. Then the milder action.
    wanting.sort_by_key(|(device, facts, action)| (facts.admission != Admission::Barred, *action, (*device).clone()));
    for (device, facts, action) in wanting {
        if let Err(why) = pass.begin(device, facts, action) {
            advice.insert(device.clone(), (action, why));
        }
    }
    Decision { book: pass.book, told: pass.told, advice, waiting: pass.waiting }
}

struct Pass<'a> {
    world: &'a World,
    policy: &'a Policy,
    now: i64,
    book: Book,
    told: Vec<Told>,
    waiting: BTreeMap<&'static str, u32>,
}

impl<'a> Pass<'a> {
    /// Devices that want an action and are in no operation.
    fn wanting(&self) -> Vec<(&'a DeviceId, &'a DeviceFacts, Action)> {
        let busy: BTreeSet<DeviceId> = self.book.operations.values().flat_map(|one| one.members.clone()).collect();
        let devices = self.world.nodes.values().flat_map(|node| &node.devices);
        let wants = |(device, facts): (&'a DeviceId, &'a DeviceFacts)| {
            let least = self.book.incidents.get(device).map_or(Action::None, |incident| incident.step);
            let action = fitting(facts.action.max(least), !facts.group.is_empty());
            let wants = facts.action >= Action::ResetDevice && !busy.contains(device);
            wants.then_some((device, facts, action))
        };
        devices.filter_map(wants).collect()
    }

    /// Begins an operation, or says why not.
    fn begin(&mut self, device: &DeviceId, facts: &DeviceFacts, action: Action) -> Result<(), String> {
        let Some(node) = self.world.nodes.get(device.node()) else { return Err("its node is not known".to_owned()) };
        let along = |other: &DeviceFacts| match action {
            Action::RebootNode => true,
            Action::ResetGroup => other.group == facts.group,
            _ => false,
        };
        let members = node.devices.iter().filter(|(_, other)| along(other)).map(|(member, _)| member.clone());
        let members: BTreeSet<DeviceId> = members.chain([device.clone()]).collect();
        self.permitted(node, device, action, &members)?;
        let pools =
            members.iter().filter_map(|member| node.devices.get(member)).map(|facts| facts.pool.clone()).collect();
        if let Some((budget, spent)) = self.policy.budget.refuses(&self.book, &pools, &node.domain) {
            let waiting = self.waiting.entry(budget).or_default();
            *waiting = waiting.saturating_add(1);
            return Err(spent);
        }
        self.book.begun = self.book.begun.saturating_add(1);
        let id = format!("{}-{}-{}", action.as_str().to_ascii_lowercase(), self.now, self.book.begun);
        let operation = Operation {
            device: device.clone(),
            pools,
            domain: node.domain.clone(),
            action,
            why: facts.why.clone(),
            phase: Phase::Emptying,
            since: self.now,
            deadline: self.now.saturating_add(self.policy.empty_limit),
            cordoned: BTreeSet::new(),
            ordered: false,
            unclear: false,
            members,
        };
        let others = operation.members.len() - 1;
        let along = if others == 0 { String::new() } else { format!(" with {others} that go with it") };
        self.tell(
            device,
            "RemediationBegan",
            false,
            format!("{id}: {device}{along} is emptied for {action}: {}", facts.why),
        );
        self.book.incidents.entry(device.clone()).or_default();
        self.book.operations.insert(id.clone(), operation);
        self.advance(&id);
        Ok(())
    }

    /// Whether an operation may begin, the budget left aside.
    fn permitted(
        &self,
        node: &NodeFacts,
        device: &DeviceId,
        action: Action,
        members: &BTreeSet<DeviceId>,
    ) -> Result<(), String> {
        let incident = self.book.incidents.get(device);
        let refuse = |why: &str| Err(why.to_owned());
        match action {
            Action::ServiceHardware => return refuse("a person must service the hardware; no order helps"),
            Action::RebootNode if !self.policy.reboot => {
                return refuse(
                    "agents may not boot nodes here: drain the node, boot it again by hand or by what does so here",
                );
            }
            _ => {}
        }
        if self.policy.mode == Mode::Advise {
            return refuse("operator.remediation.mode is Advise");
        }
        if let Some(label) = &node.other {
            return Err(format!("the node is in the hands of another remediator: {label}"));
        }
        if !node.native {
            return refuse("the node is not native: what runs on its devices is not Berth's");
        }
        if node.silent {
            return refuse("the node's agent is not heard");
        }
        if self.policy.paused {
            return refuse("remediation is paused");
        }
        if incident.is_some_and(|incident| incident.released) {
            return refuse("a person took its cordon or order back");
        }
        if incident.is_some_and(|incident| incident.retry_at > self.now) {
            return refuse("it could not be emptied a while ago");
        }
        if self.book.operations.values().any(|one| !one.members.is_disjoint(members)) {
            return refuse("a device that goes with it is in another operation");
        }
        let held = |placement: &&PlacementFacts| {
            placement.paused && placement.devices.iter().any(|one| members.contains(one) && !barred(node, one))
        };
        match self.world.placements.iter().find(held) {
            Some(placement) => Err(format!("{} is paused and holds experts there", placement.name)),
            None => Ok(()),
        }
    }

    /// One step further for one operation.
    fn advance(&mut self, id: &str) {
        let Some(mut operation) = self.book.operations.get(id).cloned() else { return };
        let Some(node) = self.world.nodes.get(operation.node()) else {
            self.close(id, "RemediationEnded", false, "the node is gone", |_| {});
            return;
        };
        let freed = operation.members.iter().any(|member| operation.freed(member, node));
        let recalled = operation.phase == Phase::Ordered && operation.recalled(id, node);
        operation.cordoned.extend(node.cordons.intersection(&operation.members).cloned());
        operation.ordered |= node.orders.contains(id);
        let fate = node.fates.get(id).map(|(phase, message)| (*phase, message.as_str()));
        let waiting = matches!(fate, None | Some((OrderPhase::Pending | OrderPhase::Cancelled, _)));
        if freed || recalled {
            self.incident(&operation.device).released = true;
        }
        if (freed || recalled) && waiting {
            self.close(
                id,
                "RemediationCancelled",
                false,
                "taken back by a person: left alone until it is healthy",
                |_| {},
            );
            return;
        }
        let device = node.devices.get(&operation.device).cloned();
        self.book.operations.insert(id.to_owned(), operation.clone());
        match operation.phase {
            Phase::Emptying => self.empty(id, &operation, node, device),
            Phase::Ordered => self.follow(id, &operation, node, fate),
            Phase::Validating => self.validate(id, &operation, node),
        }
    }

    fn empty(&mut self, id: &str, operation: &Operation, node: &NodeFacts, device: Option<DeviceFacts>) {
        let stopped = match (self.policy.mode, &node.other, device.as_ref().map(|facts| facts.action)) {
            (Mode::Advise, ..) => Some("operator.remediation.mode is Advise".to_owned()),
            (_, Some(label), _) => Some(format!("the node is in the hands of another remediator: {label}")),
            (.., Some(action)) if action < Action::ResetDevice => Some("no longer needed".to_owned()),
            (.., Some(action)) if action > operation.action => Some(format!("{action} is wanted by now")),
            (.., None) => Some("the device is gone".to_owned()),
            _ if !node.native => Some("the node is not native any more".to_owned()),
            _ => None,
        };
        if let Some(why) = stopped {
            return self.close(id, "RemediationEnded", false, &why, |_| {});
        }
        if self.policy.paused {
            return;
        }
        let full = operation.members.iter().find_map(|member| self.occupied(node, member));
        match full {
            None => {
                let deadline = self.now.saturating_add(self.policy.order_limit);
                self.enter(id, Phase::Ordered, deadline);
                let note = format!("{id}: {} of {} is ordered: {}", operation.action, operation.device, operation.why);
                self.tell(&operation.device, "RemediationOrdered", false, note);
            }
            Some(why) if self.now >= operation.deadline => {
                let retry_at = self.now.saturating_add(self.policy.empty_limit);
                self.close(id, "RemediationStuck", true, &format!("not emptied in time: {why}"), |incident| {
                    incident.retry_at = retry_at;
                });
            }
            Some(_) => {}
        }
    }

    /// What is still on a device, or may still come.
    fn occupied(&self, node: &NodeFacts, member: &DeviceId) -> Option<String> {
        if barred(node, member) {
            return None;
        }
        let facts = node.devices.get(member)?;
        if facts.admission < Admission::Draining {
            return Some(format!("{member} does not show its cordon yet"));
        }
        let placement = self.world.placements.iter().find(|placement| placement.devices.contains(member));
        match placement {
            Some(placement) => Some(format!("{} is assigned to {member}", placement.name)),
            None => facts.holds.then(|| format!("the worker of {member} still holds experts")),
        }
    }

    fn follow(&mut self, id: &str, operation: &Operation, node: &NodeFacts, fate: Option<(OrderPhase, &str)>) {
        match fate {
            Some((OrderPhase::Succeeded, message)) => {
                self.enter(id, Phase::Validating, self.now.saturating_add(self.policy.validate_limit));
                let note = format!(
                    "{id}: {} of {} is done ({message}); it must prove itself",
                    operation.action, operation.device
                );
                self.tell(&operation.device, "RemediationCarriedOut", false, note);
            }
            Some((OrderPhase::Failed, message))
                if node.unclear.contains(id)
                    && self.book.incidents.get(&operation.device).is_none_or(|incident| incident.unclear == 0) =>
            {
                let limit = self.policy.validate_limit.min(UNCLEAR);
                self.enter(id, Phase::Validating, self.now.saturating_add(limit));
                if let Some(operation) = self.book.operations.get_mut(id) {
                    operation.unclear = true;
                }
                let note = format!("{id}: {message}; {} shows within {limit} s whether it was", operation.device);
                self.tell(&operation.device, "RemediationUnclear", true, note);
            }
            Some((OrderPhase::Failed, message)) => self.fail(id, operation, &format!("failed: {message}")),
            Some((OrderPhase::Expired, message)) => self.fail(id, operation, &format!("expired: {message}")),
            // Somebody else's doing: what is not in the spec is cancelled.
            Some((OrderPhase::Cancelled, message)) => self.fail(id, operation, &format!("cancelled: {message}")),
            None | Some((OrderPhase::Pending | OrderPhase::Started, _)) => {
                if self.now >= operation.deadline.saturating_add(GRACE) {
                    self.fail(id, operation, "expired: the agent did not say what became of it");
                }
            }
        }
    }

    fn validate(&mut self, id: &str, operation: &Operation, node: &NodeFacts) {
        match node.devices.get(&operation.device) {
            Some(facts) if proven(facts) && unproven(operation, node).is_none() => {
                let note = format!(
                    "{} helped: {} is {}/{}",
                    operation.action, operation.device, facts.health, facts.admission
                );
                self.close(id, "RemediationSucceeded", false, &note, |incident| incident.step = Action::None);
            }
            Some(facts) if facts.action > operation.action => {
                self.fail(id, operation, &format!("did not help: {}", facts.why))
            }
            _ if self.now >= operation.deadline && operation.unclear => {
                let note = "it was not carried out, as far as the device shows: once more";
                self.close(id, "RemediationEnded", true, note, |incident| incident.unclear = 1);
            }
            _ if self.now >= operation.deadline => {
                self.fail(id, operation, "did not help: the device did not prove itself in time")
            }
            _ => {}
        }
    }

    /// One step up, for every device that the step was for.
    fn fail(&mut self, id: &str, operation: &Operation, why: &str) {
        let grouped = operation.action == Action::ResetGroup;
        let step = next_step(operation.action, grouped);
        let note = format!("{} {why}; next: {step}", operation.action);
        self.close(id, "RemediationFailed", true, &note, |incident| {
            incident.step = incident.step.max(step);
            incident.failures = incident.failures.saturating_add(1);
        });
        if !grouped {
            return;
        }
        // What did not help one of a group helps none that wants the same: it is not tried again for each.
        let node = self.world.nodes.get(operation.node());
        let wants = |member: &&DeviceId| {
            let facts = node.and_then(|node| node.devices.get(*member));
            **member != operation.device && facts.is_some_and(|facts| facts.action >= Action::ResetDevice)
        };
        for member in operation.members.iter().filter(wants) {
            let incident = self.incident(member);
            incident.step = incident.step.max(step);
        }
    }

    fn enter(&mut self, id: &str, phase: Phase, deadline: i64) {
        if let Some(operation) = self.book.operations.get_mut(id) {
            (operation.phase, operation.deadline) = (phase, deadline);
        }
    }

    fn close(&mut self, id: &str, reason: &'static str, warning: bool, note: &str, change: impl FnOnce(&mut Incident)) {
        let Some(operation) = self.book.operations.remove(id) else { return };
        let incident = self.incident(&operation.device);
        incident.last = format!("{id}: {note}").chars().take(300).collect();
        change(incident);
        self.tell(&operation.device, reason, warning, format!("{id}: {note}"));
    }

    fn incident(&mut self, device: &DeviceId) -> &mut Incident {
        self.book.incidents.entry(device.clone()).or_default()
    }

    /// Incidents of devices that are healthy again, or whose node is gone, are over.
    fn forget(&mut self) {
        let busy: BTreeSet<&DeviceId> = self.book.operations.values().map(|one| &one.device).collect();
        let world = self.world;
        self.book.incidents.retain(|device, _| {
            let node = world.nodes.get(device.node());
            let healthy = |facts: &DeviceFacts| facts.health == Health::Healthy && facts.action == Action::None;
            let over = node.is_none_or(|node| node.devices.get(device).is_some_and(healthy));
            !over || busy.contains(device)
        });
    }

    fn tell(&mut self, device: &DeviceId, reason: &'static str, warning: bool, note: String) {
        self.told.push(Told { device: device.clone(), reason, warning, note });
    }
}

/// Whether a device wants nothing more of what was done.
fn proven(facts: &DeviceFacts) -> bool {
    facts.action < Action::ResetDevice && facts.admission != Admission::Barred
}

/// A device that was reset along with another, wanted it too, and has not proven itself: a second reset would only take
/// the whole group out of use again.
fn unproven<'a>(operation: &'a Operation, node: &NodeFacts) -> Option<&'a DeviceId> {
    let waits = |member: &&DeviceId| {
        let facts = node.devices.get(*member);
        facts.is_some_and(|facts| [Action::ResetDevice, Action::ResetGroup].contains(&facts.action))
    };
    operation.members.iter().filter(|_| operation.action == Action::ResetGroup).find(waits)
}

fn barred(node: &NodeFacts, device: &DeviceId) -> bool {
    node.devices.get(device).is_some_and(|facts| facts.admission == Admission::Barred)
}

/// The reset that a device can have.
const fn fitting(action: Action, grouped: bool) -> Action {
    match action {
        Action::ResetDevice if grouped => Action::ResetGroup,
        Action::ResetGroup if !grouped => Action::ResetDevice,
        other => other,
    }
}

/// The next rung of the ladder.
const fn next_step(action: Action, grouped: bool) -> Action {
    match action {
        Action::None | Action::RestartWorkload => fitting(Action::ResetDevice, grouped),
        Action::ResetDevice | Action::ResetGroup => Action::RebootNode,
        Action::RebootNode | Action::ServiceHardware => Action::ServiceHardware,
    }
}
