//! Which expert is in which slot, layer by layer, and the order of moves. Chooses no devices: those come
//! from `gang`.

mod board;
mod improve;
pub mod layer;
mod waves;

use std::collections::BTreeMap;

use berth_types::{ExpertId, LayerId};

use crate::{
    gang::{Gang, Infeasible},
    num,
    plan::{DeviceSlots, Layout},
    problem::{Device, Goal, Problem, Survive},
};

pub use layer::{LayerProblem, LayerShort, Site, solve_layer};
pub(crate) use waves::{moved, order};

/// Least relative gain of the slowest device, mean over layers, for which replicas are moved.
pub const LEAST_GAIN: f64 = 0.03;

/// The layout of all layers on the gang's devices, and its makespan (mean over layers).
///
/// # Errors
/// [`Infeasible::Arrangement`] naming the layer.
pub(crate) fn place(problem: &Problem, gang: &Gang, previous: Option<&Layout>) -> Result<(Layout, f64), Infeasible> {
    let devices: Vec<(&Device, usize)> =
        gang.members.iter().filter_map(|(index, slots)| Some((problem.devices.get(*index)?, *slots))).collect();
    let sites = sites(&devices, gang.survives);
    let (kept, before) = place_layers(problem, gang, &devices, &sites, previous, Goal::Repair)?;
    let Goal::Rebalance { .. } = problem.goal else { return Ok((kept, before)) };
    let (moved, after) = place_layers(problem, gang, &devices, &sites, previous, problem.goal)?;
    // A re-plan must pay back: without a gain that shows, nothing moves.
    if after < before * (1.0 - LEAST_GAIN) { Ok((moved, after)) } else { Ok((kept, before)) }
}

fn place_layers(
    problem: &Problem,
    gang: &Gang,
    devices: &[(&Device, usize)],
    sites: &[Site],
    previous: Option<&Layout>,
    goal: Goal,
) -> Result<(Layout, f64), Infeasible> {
    let geometry = &problem.instance.geometry;
    let experts = num::index(geometry.experts);
    let old: Vec<_> = devices.iter().map(|(device, _)| previous.map(|layout| layout.slots_of(&device.id))).collect();
    let moves = match goal {
        Goal::Repair => Some(0),
        Goal::Rebalance { moves } => moves.map(|moves| num::index(moves) / num::index(geometry.expert_layers().max(1))),
    };
    let mut layers = BTreeMap::new();
    let mut spans = 0.0;
    for layer in geometry.expert_layer_ids() {
        let input = LayerProblem {
            experts,
            loads: loads(problem, layer, experts),
            sites,
            copies: gang.survives.copies(),
            previous: previous.is_some().then(|| {
                let row = |slots: &Option<BTreeMap<LayerId, Vec<Option<ExpertId>>>>| {
                    let row = slots.as_ref().and_then(|slots| slots.get(&layer));
                    row.into_iter().flatten().map(|slot| slot.map(|expert| num::index(expert.0))).collect()
                };
                old.iter().map(row).collect()
            }),
            moves,
            effort: problem.effort,
        };
        let solved = solve_layer(&input).map_err(|short| Infeasible::Arrangement {
            layer: layer.0,
            devices: sites.len(),
            why: short.to_string(),
        })?;
        spans += solved.makespan;
        let row = solved.rows.into_iter().flatten().map(|slot| slot.map(|expert| ExpertId(num::small(expert))));
        layers.insert(layer, row.collect());
    }
    let slots =
        devices.iter().map(|(device, slots)| DeviceSlots { device: device.id.clone(), slots: num::small(*slots) });
    let layout = Layout { devices: slots.collect(), layers };
    Ok((layout, spans / f64::from(geometry.expert_layers().max(1))))
}

/// Tokens by expert of one layer; without a record every expert counts one.
fn loads(problem: &Problem, layer: LayerId, experts: usize) -> Vec<f64> {
    match problem.instance.loads.get(&layer) {
        Some(tokens) if tokens.iter().any(|count| *count > 0) => {
            (0..experts).map(|expert| num::real(tokens.get(expert).copied().unwrap_or(0))).collect()
        }
        _ => vec![1.0; experts],
    }
}

/// The devices as a layer sees them: failure domains become numbers.
fn sites(devices: &[(&Device, usize)], level: Survive) -> Vec<Site> {
    let numbered = |name: &dyn Fn(&Device) -> String| {
        let mut numbers = BTreeMap::new();
        let names: Vec<_> = devices.iter().map(|(device, _)| name(device)).collect();
        for name in &names {
            let next = numbers.len();
            numbers.entry(name.clone()).or_insert(next);
        }
        names.iter().map(|name| numbers.get(name).copied().unwrap_or(0)).collect::<Vec<_>>()
    };
    let domains = numbered(&|device| device.failure_domain(level).to_owned());
    let nodes = numbered(&|device| device.failure_domain(level.max(Survive::Node)).to_owned());
    let cards = numbered(&|device| match device.card.as_str() {
        "" => device.id.to_string(),
        card => format!("{} card {card}", device.id.node()),
    });
    let numbers = domains.into_iter().zip(nodes).zip(cards);
    devices
        .iter()
        .zip(numbers)
        .map(|((device, slots), ((domain, node), card))| Site {
            slots: *slots,
            speed: device.speed,
            domain,
            node,
            card,
        })
        .collect()
}
