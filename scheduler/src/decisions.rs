//! Decisions on their way: from what made a plan due to the revision that serves. Measures repairs, and carries each
//! decision's trace from the agent that classified a fault to the runners that serve without it. It decides nothing.

use std::{collections::BTreeMap, time::Duration};

use berth_planner::Standing;
use berth_runtime::{
    Clock,
    telemetry::trace::{Step, TraceContext},
};
use berth_types::{Admission, PlacementName, Revision};

use crate::{index::Index, metrics::SchedulerMetrics, replan::Cause};

/// One decision.
#[derive(Clone, Copy, Debug)]
struct Decision {
    /// Where its trace stands; none = it has no step yet.
    trace: Option<TraceContext>,
    /// When the step under way began, since 1970.
    since: Duration,
    /// When the loss was heard, on the clock that never falls; none = it repairs nothing.
    heard: Option<Duration>,
    /// What was planned; none = nothing yet.
    revision: Option<Revision>,
}

/// Those under way, one a placement.
#[derive(Debug)]
pub struct Decisions {
    of: BTreeMap<PlacementName, Decision>,
    clock: Clock,
    metrics: SchedulerMetrics,
}

impl Decisions {
    /// None yet.
    #[must_use]
    pub const fn new(clock: Clock, metrics: SchedulerMetrics) -> Self {
        Self { of: BTreeMap::new(), clock, metrics }
    }

    /// Looks whether `name` has lost a device; runners were told of it just now, `heard` is when this turn began.
    pub fn watch(&mut self, index: &Index, heard: Duration, name: &PlacementName) {
        let gone = index.placements().get(name).map(|_| losses(index, heard, name));
        let open = self.of.get(name).is_some_and(|decision| decision.heard.is_some());
        match gone {
            None => drop(self.of.remove(name)),
            Some(Losses { count: 0, .. }) => {
                // It came back before anything was planned: there is nothing to repair.
                self.of.retain(|known, decision| known != name || decision.heard.is_none() || decision.trace.is_some());
            }
            Some(Losses { trace, .. }) if !open => {
                let decision = Decision { trace, since: self.clock.unix(), heard: Some(heard), revision: None };
                self.of.insert(name.clone(), decision);
                self.metrics.repaired("told", self.clock.now().saturating_sub(heard));
            }
            Some(_) => {}
        }
        self.metrics.repairs_open(self.of.values().filter(|decision| decision.heard.is_some()).count());
    }

    /// A plan was made, to become `revision`; returns the id of its trace.
    pub fn planned(&mut self, name: &PlacementName, cause: Cause, began: Duration, revision: Revision) -> String {
        let (ended, plan) = (self.clock.unix(), format!("{name}-{revision}"));
        // A plan for another cause, in the middle of a repair, is a step of that repair.
        let known = self.of.get(name).copied();
        let decision = known.unwrap_or(Decision { trace: None, since: began, heard: None, revision: None });
        let trace =
            self.step("placement.planned", name, decision.trace, (decision.since, ended), &plan, cause.as_str());
        self.stage(&decision, "planned");
        let revision = Some(revision);
        self.of.insert(name.clone(), Decision { trace: Some(trace), since: ended, revision, ..decision });
        trace.trace_id()
    }

    /// The plan's revision was stored and assigned. One that was on its way when a repair began is no step of the repair.
    pub fn applied(&mut self, name: &PlacementName, revision: Revision) -> String {
        let theirs = |decision: &&Decision| decision.revision == Some(revision);
        let Some(decision) = self.of.get(name).filter(theirs).copied() else { return String::new() };
        let (ended, plan) = (self.clock.unix(), format!("{name}-{revision}"));
        let trace = self.step("placement.applied", name, decision.trace, (decision.since, ended), &plan, "");
        self.stage(&decision, "stored");
        self.of.insert(name.clone(), Decision { trace: Some(trace), since: ended, ..decision });
        trace.trace_id()
    }

    /// Workers have loaded the revision, and runners are sent to it: its decision is theirs from now on. An earlier revision
    /// that is loaded in the middle of a repair takes nothing from it.
    pub fn loaded(&mut self, name: &PlacementName, revision: Revision) -> Option<TraceContext> {
        let theirs = |decision: &&Decision| decision.revision.is_some_and(|planned| planned <= revision);
        let decision = *self.of.get(name).filter(theirs)?;
        self.of.remove(name);
        let plan = format!("{name}-{revision}");
        let at = (decision.since, self.clock.unix());
        let trace = self.step("placement.loaded", name, decision.trace, at, &plan, "");
        self.stage(&decision, "served");
        Some(trace)
    }

    fn step(
        &self,
        step: &'static str,
        name: &PlacementName,
        parent: Option<TraceContext>,
        at: (Duration, Duration),
        plan: &str,
        cause: &'static str,
    ) -> TraceContext {
        let attributes = [("placement", name.to_string()), ("plan", plan.to_owned()), ("cause", cause.to_owned())];
        let attributes = attributes.into_iter().filter(|(_, value)| !value.is_empty()).collect();
        Step { name: step, parent, at, attributes }.tell()
    }

    fn stage(&self, decision: &Decision, stage: &'static str) {
        if let Some(heard) = decision.heard {
            self.metrics.repaired(stage, self.clock.now().saturating_sub(heard));
        }
    }
}

/// What a placement has lost.
struct Losses {
    count: usize,
    /// Trace of the fault of the first device, if its agent told of one.
    trace: Option<TraceContext>,
}

fn losses(index: &Index, now: Duration, name: &PlacementName) -> Losses {
    let layout = index.placements().get(name).and_then(|placement| placement.assigned());
    let devices = layout.into_iter().flat_map(|layout| layout.devices.iter().map(|entry| &entry.device));
    let gone: Vec<_> = devices.filter(|device| index.standing(now, device) == Standing::Gone).collect();
    let trace = |device: &&berth_types::DeviceId| {
        let known = index.nodes().get(device.node())?.devices().get(*device)?;
        // A device that is gone because its node is silent has a trace of something earlier, if any.
        (known.state.admission == Admission::Barred).then(|| known.traceparent.parse().ok())?
    };
    Losses { count: gone.len(), trace: gone.iter().find_map(trace) }
}

#[cfg(test)]
mod tests {
    use berth_runtime::telemetry::Metrics;

    use super::*;

    #[test]
    fn a_revision_that_is_loaded_in_the_middle_of_a_repair_takes_nothing_from_it() {
        let clock = Clock::real();
        let metrics = SchedulerMetrics::register(&Metrics::new("scheduler"));
        let mut decisions = Decisions::new(clock.clone(), metrics);
        let name: PlacementName = "models/v3-0".parse().unwrap();
        let repair = decisions.planned(&name, Cause::Repair, clock.unix(), Revision(3));
        assert_eq!(decisions.applied(&name, Revision(2)), "");
        assert!(decisions.loaded(&name, Revision(2)).is_none());
        assert_eq!(decisions.applied(&name, Revision(3)), repair);
        let loaded = decisions.loaded(&name, Revision(3)).expect("the repair's trace");
        assert_eq!(loaded.trace_id(), repair);
        assert!(decisions.loaded(&name, Revision(3)).is_none());
    }
}
