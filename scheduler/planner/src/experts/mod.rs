//! Which expert is in which slot, all layers together, and the order of moves. Chooses no devices: those
//! come from `gang`.

mod arrange;
mod board;
mod construct;
pub(crate) mod dice;
mod divide;
mod fleet;
mod layer;
mod leap;
mod pairs;
mod repair;
mod replan;
mod search;
mod survey;
mod temper;
mod waves;

use std::collections::BTreeMap;

use berth_types::{Bytes, ExpertId, LayerId};

use crate::{
    gang::{Gang, Infeasible},
    num,
    plan::{Balance, Certificate, DeviceSlots, Layout, Limit},
    problem::{Device, Goal, Problem, Sharing, Standing, Survive},
    share,
};

pub use arrange::{Arranged, Short, Task, arrange, fill};
pub use fleet::{Fleet, Site};
pub use layer::Duty;
pub use repair::Rows;
pub use replan::Budget;
pub(crate) use waves::{moved, order};

/// Least gain after costs, as a share of the step time, for which replicas are moved.
pub const LEAST_GAIN: f64 = 0.01;

/// The layout of all layers on the gang's devices, and how good it is.
///
/// # Errors
/// [`Infeasible::Arrangement`] naming the first layer.
pub(crate) fn place(
    problem: &Problem,
    gang: &Gang,
    previous: Option<&Layout>,
) -> Result<(Layout, Certificate, Balance), Infeasible> {
    let devices: Vec<(&Device, usize)> =
        gang.members.iter().filter_map(|(index, slots)| Some((problem.devices.get(*index)?, *slots))).collect();
    let fleet = Fleet::new(&sites(problem, &devices, gang.survives));
    let layers: Vec<LayerId> = problem.instance.geometry.expert_layer_ids().collect();
    let loads: Vec<Vec<f64>> = layers.iter().map(|layer| loads(problem, *layer)).collect();
    let old = previous.map(|previous| layers.iter().map(|layer| rows(&devices, previous, *layer)).collect::<Vec<_>>());
    let task = Task {
        fleet: &fleet,
        duty: Duty { copies: gang.survives.copies(), apart: gang.survives > Survive::Device },
        loads: &loads,
        previous: old.as_deref(),
        budget: budget(problem, devices.len()),
        effort: problem.effort,
        threads: problem.threads,
    };
    let filled = |task: &Task<'_>| {
        let (arranged, balance) = fill(task).map_err(|short| Infeasible::Arrangement {
            layer: layers.first().map_or(0, |layer| layer.0),
            devices: devices.len(),
            why: short.to_string(),
        })?;
        let certificate = certify(&layers, &arranged);
        Ok((layout(&devices, &layers, arranged), certificate, balance))
    };
    // Where replicas are weighed, weights may even out what has drifted without a byte moved.
    let weighs = problem.instance.sharing == Sharing::Weighted && task.budget.moves != Some(0);
    if weighs && previous.is_some() {
        let (kept, mut certificate, _) = filled(&Task { budget: Budget::NONE, ..task })?;
        let even = certificate.clone();
        share::certify(problem, &kept, &share::weights(problem, &kept), &mut certificate);
        let slack = certificate.makespan - certificate.bound;
        if slack <= task.budget.least {
            return Ok((kept, even, Balance::Close { slack }));
        }
    }
    filled(&task)
}

fn layout(devices: &[(&Device, usize)], layers: &[LayerId], arranged: Vec<Arranged>) -> Layout {
    let slots =
        devices.iter().map(|(device, slots)| DeviceSlots { device: device.id.clone(), slots: num::small(*slots) });
    let row = |arranged: Arranged| {
        let slots = arranged.rows.into_iter().flatten();
        slots.map(|slot| slot.map(|expert| ExpertId(num::small(expert)))).collect()
    };
    let layers = layers.iter().copied().zip(arranged.into_iter().map(row)).collect();
    Layout { devices: slots.collect(), layers }
}

/// What may move for balance.
fn budget(problem: &Problem, devices: usize) -> Budget {
    match problem.goal {
        Goal::Repair => Budget::NONE,
        Goal::Rebalance { moves, bytes } => Budget {
            moves: moves.map(num::index),
            bytes: bytes.map(Bytes::get),
            price: problem.payback.price(devices),
            least: LEAST_GAIN,
        },
    }
}

fn certify(layers: &[LayerId], arranged: &[Arranged]) -> Certificate {
    let mean = |of: fn(&Arranged) -> f64| arranged.iter().map(of).sum::<f64>() / num::real_size(arranged.len().max(1));
    let gap = |arranged: &Arranged| arranged.makespan / arranged.bound - 1.0;
    let worst = layers
        .iter()
        .zip(arranged)
        .max_by(|(one, first), (other, second)| first.makespan.total_cmp(&second.makespan).then(other.cmp(one)));
    let limit = worst.and_then(|(layer, arranged)| {
        let (expert, relieved) = arranged.limit?;
        Some(Limit { layer: *layer, expert: ExpertId(num::small(expert)), makespan: arranged.makespan, relieved })
    });
    Certificate {
        makespan: mean(|arranged| arranged.makespan),
        bound: mean(|arranged| arranged.bound),
        gap: arranged.iter().map(gap).sum::<f64>() / num::real_size(arranged.len().max(1)),
        limit,
    }
}

/// Tokens by expert of one layer; all zero without a record.
fn loads(problem: &Problem, layer: LayerId) -> Vec<f64> {
    let tokens = problem.instance.loads.get(&layer).map(Vec::as_slice).unwrap_or_default();
    let experts = num::index(problem.instance.geometry.experts);
    (0..experts).map(|expert| num::real(tokens.get(expert).copied().unwrap_or(0))).collect()
}

/// What the slots of `devices` held in one layer.
fn rows(devices: &[(&Device, usize)], previous: &Layout, layer: LayerId) -> Rows {
    let row = previous.layers.get(&layer).map(Vec::as_slice).unwrap_or_default();
    let ranges: BTreeMap<_, _> = previous.ranges().collect();
    let held = |device: &Device| {
        let range = ranges.get(&device.id).cloned().unwrap_or_default();
        let slots = row.get(range).unwrap_or_default().iter();
        slots.map(|slot| slot.map(|expert| num::index(expert.0))).collect()
    };
    devices.iter().map(|(device, _)| held(device)).collect()
}

/// The devices as a layer sees them: failure domains become numbers.
fn sites(problem: &Problem, devices: &[(&Device, usize)], level: Survive) -> Vec<Site> {
    let numbered = |name: &dyn Fn(&Device) -> String| {
        let mut numbers = BTreeMap::new();
        let names: Vec<_> = devices.iter().map(|(device, _)| name(device)).collect();
        for name in &names {
            let next = numbers.len();
            numbers.entry(name.clone()).or_insert(next);
        }
        names.iter().map(|name| numbers.get(name).copied().unwrap_or(0)).collect::<Vec<_>>()
    };
    let nodes = numbered(&|device| device.failure_domain(level.max(Survive::Node)).to_owned());
    let cards = numbered(&|device| match device.card.as_str() {
        "" => device.id.to_string(),
        card => format!("{} card {card}", device.id.node()),
    });
    let site = |((device, slots), (node, card)): (&(&Device, usize), (usize, usize))| Site {
        slots: *slots,
        speed: device.speed,
        node,
        card,
        bytes: problem.instance.expert_bytes(device.vendor).get(),
        closed: device.standing == Standing::Frozen,
    };
    devices.iter().zip(nodes.into_iter().zip(cards)).map(site).collect()
}
