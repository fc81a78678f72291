//! Wild inputs, drawn from seeds: fleets, models, loads, windows and changes as clusters see them, far beyond what the
//! other tests draw. Every answer is judged by the checker and by what can be counted without the planner; nothing
//! may panic, and a refusal must be true.

mod draw;
mod fleets;
mod windows;

use berth_types::Vendor;

use self::draw::Draw;
use super::after;
use crate::{
    Device, Goal, Infeasible, Layout, Plan, Problem, Proposed, Standing, Survive, check::findings, num, solve,
};

/// Chains of plans.
const CHAINS: u64 = 600;
/// Plans in a chain.
const PLANS: usize = 6;

#[test]
fn wild_problems_get_plans_without_findings_or_true_refusals() {
    let (mut plans, mut refusals, mut faults) = (0, 0, Vec::new());
    for seed in 0..CHAINS {
        let mut draw = Draw::new(seed);
        let mut problem = fleets::any(&mut draw);
        let mut live: Option<Layout> = None;
        for step in 0..PLANS {
            if step > 1 && live.is_none() {
                break;
            }
            let other = step > 0 && fleets::change(&mut draw, &mut problem);
            if let Some(layout) = &live {
                problem = after(&problem, layout);
            }
            let mut fault = |what: String| faults.push(format!("seed {seed}, plan {step}: {what}"));
            match solve(&problem, live.as_ref()) {
                Ok(plan) => {
                    let found = findings(&problem, live.as_ref(), &plan);
                    found.iter().for_each(|finding| fault(format!("{finding}: {plan}")));
                    wrong(&problem, live.as_ref().filter(|_| !other), &plan).into_iter().for_each(&mut fault);
                    let (moves, bytes) = moved(&problem, live.as_ref(), plan.decision());
                    if (plan.decision().moves, plan.decision().moved_bytes.get()) != (moves, bytes) {
                        fault(format!("{moves} moves and {bytes} bytes: {plan}"));
                    }
                    live = plan.decision().waves.last().cloned();
                    plans += 1;
                }
                Err(error) => {
                    falsehood(&problem, live.as_ref(), &error)
                        .into_iter()
                        .for_each(|why| fault(format!("{why}: {error}")));
                    refusals += 1;
                }
            }
        }
    }
    assert_eq!(faults, Vec::<String>::new());
    assert!(plans > refusals && refusals > 100, "{plans} plans, {refusals} refusals: both are to be seen");
}

/// What is wrong with a plan beside the checker's findings. `calm`: the layout before it, where nothing but loads and
/// budgets changed.
fn wrong(problem: &Problem, calm: Option<&Layout>, plan: &Plan<Proposed>) -> Vec<String> {
    let decision = plan.decision();
    let certificate = &decision.certificate;
    let mut wrong = Vec::new();
    let mut expect = |holds: bool, what: &str| {
        if !holds {
            wrong.push(format!("{what}: {plan}"));
        }
    };
    expect(certificate.makespan.is_finite() && certificate.bound >= 1.0 - 1e-9, "a certificate of nothing");
    expect(certificate.makespan >= certificate.bound * (1.0 - 1e-6), "below the bound");
    expect(certificate.gap >= -1e-6, "a gap below nothing");
    let Some(previous) = calm else { return wrong };
    let experts = num::index(problem.instance.geometry.experts);
    let silent = |tokens: &Vec<u64>| tokens.iter().take(experts).all(|tokens| *tokens == 0);
    let mut layers = problem.instance.geometry.expert_layer_ids();
    if layers.all(|layer| problem.instance.loads.get(&layer).is_none_or(silent)) {
        expect(decision.waves.last() == Some(previous), "no loads, yet something changes");
    }
    let (most, most_bytes) = match problem.goal {
        Goal::Repair => (Some(0), None),
        Goal::Rebalance { moves, bytes } => (moves, bytes),
    };
    expect(most.is_none_or(|most| decision.moves <= u64::from(most)), "more moves than allowed");
    expect(most_bytes.is_none_or(|most| decision.moved_bytes <= most), "more bytes than allowed");
    wrong
}

/// Replicas that devices load over all waves, and their bytes, counted slot by slot.
fn moved(problem: &Problem, previous: Option<&Layout>, decision: &crate::Decision) -> (u64, u64) {
    let mut before: Vec<&Layout> = problem.held.iter().chain(previous).collect();
    let mut sum = (0, 0);
    for wave in &decision.waves {
        let held: Vec<_> = before.iter().map(|layout| layout.replicas()).collect();
        for (device, replicas) in wave.replicas() {
            let has = |replica| held.iter().any(|held| held.get(device).is_some_and(|held| held.contains(replica)));
            let new = num::count(replicas.iter().filter(|replica| !has(*replica)).count());
            let vendor = problem.devices.iter().find(|known| known.id == *device).map(|known| known.vendor);
            let expert = vendor.map_or(0, |vendor| problem.instance.expert_bytes(vendor).get());
            sum = (sum.0 + new, sum.1 + new * expert);
        }
        before = vec![wave];
    }
    sum
}

/// Why a refusal is not true: experts would find their slots on devices that may be used.
fn falsehood(problem: &Problem, previous: Option<&Layout>, error: &Infeasible) -> Option<String> {
    let error = match error {
        Infeasible::Format { cause, .. } => cause,
        other => other,
    };
    let said = match error {
        Infeasible::BytesShort { slots, room, short, .. } => *short > 0 && room + short == *slots,
        Infeasible::DevicesShort { wanted, usable, missing } => *missing > 0 && usable + missing == *wanted,
        Infeasible::NoTransition { short, .. } => previous.is_some() && short.get() > 0,
        Infeasible::NoDevices { seen, .. } => *seen == problem.devices.len(),
        Infeasible::DomainsShort { .. } => {
            problem.instance.survive > Survive::Nothing || problem.instance.blast_radius_percent.is_some()
        }
        // The slots of silent devices are of no use to others.
        Infeasible::Arrangement { .. } => problem.devices.iter().any(|device| device.standing == Standing::Frozen),
        Infeasible::Format { .. } => false,
    };
    if !said {
        return Some(format!("{error:?} does not add up"));
    }
    let instance = &problem.instance;
    let may = |device: &&Device| {
        device.standing == Standing::Open && instance.allows(device) && instance.is_computed_on(device)
    };
    let usable: Vec<&Device> = problem.devices.iter().filter(may).collect();
    let room = |vendor: Option<Vendor>| {
        let of = usable.iter().filter(|device| vendor.is_none_or(|vendor| device.vendor == vendor));
        let rooms: Vec<usize> = of.map(|device| instance.capacity(device, 1)).filter(|room| *room > 0).collect();
        let enough = |most: Option<u32>| most.is_none_or(|most| num::index(most) >= rooms.len());
        // A first placement takes what is asked for, or nothing; a repair makes do with less.
        let free = previous.is_some()
            || (instance.survive == Survive::Nothing
                && instance.blast_radius_percent.is_none()
                && instance.devices.is_none());
        (free && enough(instance.granted) && enough(instance.devices)).then(|| rooms.iter().sum::<usize>())
    };
    let rooms = if instance.cross_vendor {
        vec![room(None)]
    } else {
        vec![room(Some(Vendor::Nvidia)), room(Some(Vendor::Ascend))]
    };
    let experts = num::index(instance.geometry.experts);
    let fits = rooms.into_iter().flatten().any(|room| room >= experts);
    let moving = matches!(error, Infeasible::NoTransition { .. });
    (fits && !moving).then(|| format!("{experts} experts have room"))
}
