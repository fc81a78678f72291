//! What ExpertPlacement.status says, from the index alone. Writes nothing.

use std::time::Duration;

use berth_crds::{
    ExpertPlacementStatus,
    conditions::{ConditionType, Wanted, merge},
};
use berth_planner::Layout;
use berth_types::{Bytes, PlacementName, Revision};
use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Condition, jiff::Timestamp};

use crate::{
    balance,
    index::{Index, Phase, Placement, Told},
    snapshot::{expert_bytes, survive},
    speeds::speeds,
    weighing,
};

/// The status of `name` at `now`, which the wall clock calls `wall`.
#[must_use]
pub fn status(index: &Index, now: Duration, wall: Timestamp, name: &PlacementName) -> Option<ExpertPlacementStatus> {
    let placement = index.placements().get(name)?;
    let view = View::new(index, now, name, placement);
    let mut status = placement.status.clone();
    let generation = placement.memory.seen.map(|(_, generation)| generation);
    status.observed_generation = generation.or(status.observed_generation);
    status.serving_revision = placement.cutover.serving().0;
    status.draining_revision = placement.cutover.draining().0;
    (status.slots_ready, status.slots_total) = view.slots;
    status.experts_lost = view.lost;
    status.balancedness = balancedness(index, placement);
    status.expert_bytes = view.bytes;
    let Told { why, moved, certificate, decisions } = placement.memory.told.clone();
    (status.why, status.moved_bytes, status.certificate, status.decisions) = (why, moved, certificate, decisions);
    status.conditions = merge(&status.conditions, &view.conditions(placement), generation, wall);
    Some(status)
}

/// The `Reachable` condition of a node.
#[must_use]
pub fn reachable(reachable: bool, wall: Timestamp) -> Option<Condition> {
    let (reason, message) = if reachable {
        ("StreamOpen", "the scheduler hears from the node's agent")
    } else {
        (
            "StreamLost",
            "the scheduler does not hear from the node's agent: nothing new is placed, and its replicas count as gone after 10 s",
        )
    };
    let message = message.to_owned();
    let wanted = Wanted { kind: ConditionType::Reachable, status: Some(reachable), reason, message };
    merge(&[], &[wanted], None, wall).pop()
}

/// What the conditions depend on.
struct View {
    slots: (u64, u64),
    lost: u64,
    bytes: Bytes,
    loaded: bool,
    /// Reason and sentence of a load that does not come to its end.
    failure: Option<(&'static str, String)>,
    cutting: bool,
    serving: Revision,
}

impl View {
    fn new(index: &Index, now: Duration, name: &PlacementName, placement: &Placement) -> Self {
        let assigned = placement.cutover.assigned();
        let layout = placement.assigned();
        let progress = index.progress(now, name);
        let serving = placement.cutover.serving();
        let key = (placement.uid.clone(), assigned);
        let shelf = |device: &berth_types::DeviceId| {
            index
                .nodes()
                .get(device.node())
                .and_then(|node| node.worker(device))
                .and_then(|worker| worker.shelves.get(&key))
        };
        let devices = layout.iter().flat_map(|layout| layout.devices.iter().map(|entry| &entry.device));
        let shelves: Vec<_> = devices.filter_map(|device| Some((device, shelf(device)?))).collect();
        let failure = shelves.iter().find_map(|(device, shelf)| match &shelf.phase {
            Phase::Failed(error) => Some(("LoadFailed", format!("{device}: {error}"))),
            Phase::Loading => placement.avoided.contains_key(*device).then(|| {
                let what = "its worker reads nothing more: look at the storage of the weights and at the node's agent";
                ("LoadStalled", format!("{device}: {what}"))
            }),
            Phase::Ready => None,
        });
        Self {
            slots: (
                shelves.iter().map(|(_, shelf)| shelf.slots_ready).sum(),
                layout.map_or(0, |layout| filled(layout)),
            ),
            lost: index.lost(now, placement, serving).unwrap_or(0),
            bytes: layout.map_or(Bytes::ZERO, |layout| layout_bytes(index, placement, layout)),
            loaded: layout.is_some() && progress.late.is_empty() && progress.covered,
            failure,
            cutting: placement.cutover.loading() || placement.cutover.draining().0 > 0,
            serving,
        }
    }

    fn conditions(&self, placement: &Placement) -> Vec<Wanted> {
        let placed = self.placed(placement);
        let (ready, total) = self.slots;
        let loaded = match (&self.failure, self.loaded) {
            (_, true) => wanted(ConditionType::WeightsLoaded, true, "Loaded", format!("all {total} slots are loaded")),
            (Some((reason, failure)), false) => wanted(ConditionType::WeightsLoaded, false, reason, failure.clone()),
            (None, false) => {
                let message =
                    format!("{ready} of {total} slots of revision {} are loaded", placement.cutover.assigned());
                wanted(ConditionType::WeightsLoaded, false, "Loading", message)
            }
        };
        let serving = match (self.serving.0, self.lost) {
            (0, _) => wanted(ConditionType::Serving, false, "NotLoaded", "no revision was ever loaded".to_owned()),
            (revision, 0) => {
                let message = format!("revision {revision} serves with every expert");
                wanted(ConditionType::Serving, true, "Serving", message)
            }
            (revision, lost) => {
                let message =
                    format!("{lost} experts of revision {revision} have no live replica; they are placed first");
                wanted(ConditionType::Serving, false, "ExpertsLost", message)
            }
        };
        let yes = |wanted: &Wanted| wanted.status == Some(true);
        let ready = yes(&placed) && yes(&serving);
        let summary = if ready { "placed and serving".to_owned() } else { first_false(&[&placed, &loaded, &serving]) };
        let busy = self.cutting || !self.loaded;
        let stalled = placement.memory.problem.is_some() || (self.failure.is_some() && self.serving.0 == 0);
        let reason = |is: bool| if is { "True" } else { "False" };
        let moving = wanted(
            ConditionType::Reconciling,
            busy && !stalled,
            if busy { "RevisionChanges" } else { "Settled" },
            format!("assigned {}, serving {}", placement.cutover.assigned(), self.serving),
        );
        let stall = if stalled { summary.clone() } else { "nothing is in the way".to_owned() };
        let stalled = wanted(ConditionType::Stalled, stalled, if stalled { "NeedsHelp" } else { "NotStalled" }, stall);
        let ready =
            wanted(ConditionType::Ready, ready, if reason(ready) == "True" { "Ready" } else { "NotReady" }, summary);
        vec![placed, loaded, serving, ready, moving, stalled]
    }

    fn placed(&self, placement: &Placement) -> Wanted {
        let kind = ConditionType::Placed;
        match (&placement.memory.problem, placement.assigned()) {
            (Some(problem), Some(_)) => wanted(kind, false, "CannotRepair", problem.clone()),
            (Some(problem), None) => wanted(kind, false, "DoesNotFit", problem.clone()),
            (None, None) if placement.spec.paused => {
                wanted(kind, false, "Paused", "spec.paused: nothing is planned".to_owned())
            }
            (None, None) => wanted(kind, false, "Pending", "no plan was made yet".to_owned()),
            (None, Some(layout)) => wanted(kind, true, "Placed", describe(placement, layout)),
        }
    }
}

/// Where a placement is, and what it has less of than was asked for.
fn describe(placement: &Placement, layout: &Layout) -> String {
    let mut message = format!("placed on {} devices", layout.devices.len());
    let declared = survive(placement.spec.redundancy.survive);
    let survives = placement.memory.survives.unwrap_or(declared);
    if survives < declared {
        let (survives, declared) = (survives.as_str(), declared.as_str());
        message.push_str(&format!("; survives the loss of {survives} instead of {declared}"));
    }
    let asked = usize::try_from(placement.spec.redundancy.extra_replicas).unwrap_or(usize::MAX);
    let experts = usize::try_from(placement.spec.geometry.experts).unwrap_or(usize::MAX);
    let fewest = layout.layers.values().map(|row| row.iter().flatten().count()).min().unwrap_or(0);
    let extra = fewest.saturating_sub(experts.saturating_mul(survives.copies()));
    if extra < asked {
        message.push_str(&format!(
            "; {extra} of {asked} extra replicas in a layer: its devices have no more slots, or hold every expert already"
        ));
    }
    message
}

fn wanted(kind: ConditionType, status: bool, reason: &'static str, message: String) -> Wanted {
    Wanted { kind, status: Some(status), reason, message }
}

fn first_false(conditions: &[&Wanted]) -> String {
    let first = conditions.iter().find(|wanted| wanted.status != Some(true));
    first.map(|wanted| wanted.message.clone()).unwrap_or_default()
}

/// Slots of all layers that hold an expert.
#[must_use]
pub fn filled(layout: &Layout) -> u64 {
    let slots: usize = layout.layers.values().map(|row| row.iter().flatten().count()).sum();
    u64::try_from(slots).unwrap_or(u64::MAX)
}

fn layout_bytes(index: &Index, placement: &Placement, layout: &Layout) -> Bytes {
    let device_bytes = |(device, range): (&berth_types::DeviceId, std::ops::Range<usize>)| {
        let known = index.nodes().get(device.node()).and_then(|node| node.devices().get(device));
        let vendor = known.map(|known| known.vendor)?;
        let rows = layout.layers.values();
        let held: usize = rows.map(|row| row.get(range.clone()).unwrap_or_default().iter().flatten().count()).sum();
        let each = expert_bytes(&placement.spec.geometry, &placement.spec.vendor_formats, vendor);
        Some(each.times(u64::try_from(held).unwrap_or(u64::MAX)))
    };
    layout.ranges().filter_map(device_bytes).sum()
}

/// Mean over layers of mean ÷ max device load of the serving revision: as measured, else as the last loads would lie on
/// it; `None` where no load was seen.
#[must_use]
pub fn balancedness(index: &Index, placement: &Placement) -> Option<f64> {
    let layout = placement.layout(placement.cutover.serving())?;
    let speeds = speeds(index, &placement.spec.speeds);
    let speed = |device: &berth_types::DeviceId| speeds.get(device).copied().unwrap_or(1.0);
    let measured = balance::measured(layout, &placement.answered(), speed);
    let weights = placement.weights(placement.cutover.serving());
    let spread = measured.or_else(|| balance::expected(layout, weights, &placement.loads(), speed))?;
    Some(weighing::rounded(spread.balancedness))
}
