//! What must hold of every plan, whatever the problem.

mod fixtures;
mod fuzz;
mod gang;
mod golden;
mod layers;
mod replans;
mod sharing;

use std::collections::BTreeSet;

use crate::{Effort, Goal, Infeasible, Layout, Problem, Sharing, Standing, Survive, check::findings, solve};
use berth_types::{Bytes, ExpertId, WeightFormat};
use fixtures::{device, problem, sites};
use proptest::prelude::*;

/// A fleet and an instance of any size that is still fast to solve.
fn any_problem() -> impl Strategy<Value = Problem> {
    let fleet = (1_usize..5, 1_usize..4, 1_u64..40, any::<bool>());
    let instance = (4_u32..24, 0_u32..6, 0_usize..4, prop::option::of(1_u32..10), prop::option::of(20_u32..101));
    (fleet, instance, prop::collection::vec(0_u64..500, 72), 0_u64..4).prop_map(
        |((nodes, each, slots, racks), (experts, extra, survive, devices, blast), loads, seed)| {
            let mut problem = problem(experts, sites(nodes, each));
            problem.seed = seed;
            problem.effort = Effort::FAST;
            let experts_size = usize::try_from(experts).unwrap();
            problem.instance.extra_replicas = extra;
            problem.instance.devices = devices;
            problem.instance.sharing = if seed % 2 == 0 { Sharing::Even } else { Sharing::Weighted };
            problem.instance.blast_radius_percent = blast;
            problem.instance.survive = [Survive::Nothing, Survive::Device, Survive::Node, Survive::Rack][survive];
            for (layer, tokens) in problem.instance.geometry.expert_layer_ids().zip(loads.chunks(24)) {
                problem.instance.loads.insert(layer, tokens[..experts_size].to_vec());
            }
            let bytes = problem.instance.expert_bytes(problem.devices[0].vendor);
            for (at, device) in problem.devices.iter_mut().enumerate() {
                let slots = slots + if at % 3 == 0 { 2 } else { 0 };
                device.memory = Bytes(bytes.get() * 3 * (slots + 2) * 100 / 90);
                device.speed = if at % 2 == 0 { 1.0 } else { 0.45 };
                device.rack = racks.then(|| format!("rack-{}", at / 4));
            }
            problem
        },
    )
}

/// The problem of the next plan.
fn after(problem: &Problem, layout: &Layout) -> Problem {
    let mut next = problem.clone();
    next.instance.revision = next.instance.revision.next();
    next.held = vec![layout.clone()];
    next
}

#[test]
fn a_chip_that_lacks_the_format_holds_nothing_and_what_would_do_is_said() {
    let mut problem = problem(8, sites(2, 2));
    for device in problem.devices.iter_mut().skip(1) {
        device.computes = vec![WeightFormat::Int8PerRow];
    }
    problem.instance.survive = Survive::Device;
    let error = solve(&problem, None).unwrap_err().to_string();
    assert!(error.contains("3 more do not compute with bf16: set vendorFormats.nvidia"), "{error}");
    assert!(error.ends_with("to one of int8_per_channel"), "{error}");
    problem.devices[1].computes.clear();
    let plan = solve(&problem, None).unwrap();
    assert_eq!(plan.first().unwrap().devices.len(), 2);
    // A layout that uses such a device is found by the checker, whoever made it.
    problem.devices[1].computes = vec![WeightFormat::Mxfp4];
    let wrong = findings(&problem, None, &plan);
    assert!(wrong.iter().any(|finding| finding.to_string().contains("does not compute")), "{wrong:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_plan_passes_the_checker(problem in any_problem()) {
        if let Ok(plan) = solve(&problem, None) {
            prop_assert_eq!(findings(&problem, None, &plan), vec![]);
        }
    }

    #[test]
    fn solving_twice_gives_the_same_plan(problem in any_problem()) {
        prop_assert_eq!(solve(&problem, None), solve(&problem, None));
    }

    #[test]
    fn solving_again_moves_nothing(problem in any_problem()) {
        if let Ok(plan) = solve(&problem, None) {
            let layout = plan.first().unwrap().clone();
            let next = after(&problem, &layout);
            let again = solve(&next, Some(&layout)).unwrap();
            prop_assert_eq!(again.first(), Some(&layout));
            prop_assert_eq!((again.decision().moves, again.decision().waves.len()), (0, 1));
        }
    }

    #[test]
    fn balancing_for_the_loads_that_were_planned_for_moves_nothing(problem in any_problem()) {
        if let Ok(plan) = solve(&problem, None) {
            let layout = plan.first().unwrap().clone();
            let mut next = after(&problem, &layout);
            next.goal = Goal::Rebalance { moves: None, bytes: None };
            prop_assert_eq!(solve(&next, Some(&layout)).unwrap().decision().moves, 0);
        }
    }

    #[test]
    fn a_lost_device_is_repaired_and_only_its_replicas_move(problem in any_problem(), lost in 0_usize..64) {
        let Ok(plan) = solve(&problem, None) else { return Ok(()) };
        let layout = plan.first().unwrap().clone();
        let lost = layout.devices[lost % layout.devices.len()].device.clone();
        let mut next = after(&problem, &layout);
        for device in next.devices.iter_mut().filter(|device| device.id == lost) {
            device.standing = Standing::Gone;
        }
        match solve(&next, Some(&layout)) {
            Ok(repair) => {
                prop_assert_eq!(findings(&next, Some(&layout), &repair), vec![]);
                prop_assert!(repair.decision().waves.last().unwrap().devices.iter().all(|entry| entry.device != lost));
            }
            // Only the lack of memory may leave an instance without a repair.
            Err(error) => prop_assert!(
                matches!(
                    error,
                    Infeasible::BytesShort { .. } | Infeasible::NoDevices { .. } | Infeasible::DomainsShort { .. }
                        | Infeasible::NoTransition { .. } | Infeasible::DevicesShort { .. }
                ),
                "{}", error
            ),
        }
    }

    #[test]
    fn rebalancing_stays_within_its_moves(problem in any_problem(), moves in 0_u32..30, shift in 1_usize..20) {
        let Ok(plan) = solve(&problem, None) else { return Ok(()) };
        let layout = plan.first().unwrap().clone();
        let mut next = after(&problem, &layout);
        for tokens in next.instance.loads.values_mut() {
            let shift = shift % tokens.len();
            tokens.rotate_left(shift);
        }
        next.goal = Goal::Rebalance { moves: Some(moves), bytes: None };
        match solve(&next, Some(&layout)) {
            Ok(moved) => {
                prop_assert_eq!(findings(&next, Some(&layout), &moved), vec![]);
                prop_assert!(moved.decision().moves <= u64::from(moves));
            }
            Err(error) => prop_assert!(matches!(error, Infeasible::NoTransition { .. }), "{}", error),
        }
    }

    #[test]
    fn weights_make_no_layout_slower(problem in any_problem()) {
        let (mut even, mut weighted) = (problem.clone(), problem);
        even.instance.sharing = Sharing::Even;
        weighted.instance.sharing = Sharing::Weighted;
        let (Ok(even), Ok(weighted)) = (solve(&even, None), solve(&weighted, None)) else { return Ok(()) };
        let makespan = |plan: &crate::Plan<crate::Proposed>| plan.decision().certificate.makespan;
        // Rounded to weights.
        prop_assert!(makespan(&weighted) <= makespan(&even) * (1.0 + 1e-4));
        prop_assert_eq!(even.weights(), None);
    }

    #[test]
    fn surplus_copies_never_share_a_device(problem in any_problem()) {
        let Ok(plan) = solve(&problem, None) else { return Ok(()) };
        let layout = plan.first().unwrap();
        for (_, range) in layout.ranges() {
            for row in layout.layers.values() {
                let held: Vec<ExpertId> = row[range.clone()].iter().copied().flatten().collect();
                prop_assert_eq!(held.iter().collect::<BTreeSet<_>>().len(), held.len());
            }
        }
    }
}

#[test]
fn an_idle_device_joins_only_when_it_is_wanted() {
    let problem = problem(16, sites(2, 2));
    let plan = solve(&problem, None).unwrap();
    let layout = plan.first().unwrap().clone();
    let mut next = after(&problem, &layout);
    next.devices.push(device("node-9/0000:01:00.0"));
    assert_eq!(solve(&next, Some(&layout)).unwrap().decision().moves, 0);
    next.instance.devices = Some(5);
    let grown = solve(&next, Some(&layout)).unwrap();
    assert_eq!(grown.decision().waves.last().unwrap().devices.len(), 5);
}

#[test]
fn a_silent_device_keeps_what_it_holds_and_takes_nothing_new() {
    let problem = problem(16, sites(2, 2));
    let layout = solve(&problem, None).unwrap().first().unwrap().clone();
    let mut next = after(&problem, &layout);
    next.devices[0].standing = Standing::Frozen;
    next.devices[3].standing = Standing::Gone;
    let plan = solve(&next, Some(&layout)).unwrap();
    assert_eq!(findings(&next, Some(&layout), &plan), []);
    let silent = &next.devices[0].id;
    assert_eq!(plan.decision().waves.last().unwrap().slots_of(silent), layout.slots_of(silent));
}
