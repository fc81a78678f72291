//! What re-plans do that single steps cannot, and what weights spare.

use berth_types::{ExpertId, LayerId};

use super::{
    after,
    fixtures::{problem, sites},
};
use crate::{
    Balance, Effort, Goal, Sharing,
    check::findings,
    experts::{Budget, Duty, Fleet, Rows, Site, Task, arrange},
    solve,
};

#[test]
fn two_slots_on_a_device_do_not_hold_a_replan_back() {
    let site = |at| Site { slots: 2, speed: 1.0, node: at / 8, card: at, bytes: 1, closed: false };
    let sites: Vec<Site> = (0..64).map(site).collect();
    let fleet = Fleet::new(&sites);
    let load = |at: usize| f64::from(u32::try_from(40 + at * at * 7 % 911).unwrap());
    let loads = vec![(0..90).map(load).collect::<Vec<f64>>()];
    let turned = vec![(0..90).map(|at| load((at * 37 + 11) % 90)).collect::<Vec<f64>>()];
    let duty = Duty { copies: 1, apart: false };
    let budget = Budget { moves: None, bytes: None, price: 0.0, least: 0.001 };
    let task = Task { fleet: &fleet, duty, loads: &loads, previous: None, budget, effort: Effort::DEFAULT, threads: 1 };
    let before: Vec<Rows> = arrange(&task).unwrap().into_iter().map(|layer| layer.rows).collect();
    let anew = arrange(&Task { loads: &turned, ..task }).unwrap().remove(0);
    let moved = arrange(&Task { loads: &turned, previous: Some(&before), ..task }).unwrap().remove(0);
    assert!(moved.makespan <= anew.makespan + 0.06, "{} after moves, {} from nothing", moved.makespan, anew.makespan);
    let kept = moved.rows.iter().zip(&before[0]).map(|(row, old)| row.iter().filter(|held| old.contains(held)).count());
    assert!(kept.sum::<usize>() > 20, "some replicas stay where they are");
}

#[test]
fn weights_even_out_a_drift_without_a_byte_moved() {
    let mut problem = problem(4, sites(2, 1));
    problem.instance.devices = Some(2);
    problem.instance.extra_replicas = 4;
    let (one, other) = (LayerId(1), LayerId(2));
    problem.instance.loads = [(one, vec![100; 4]), (other, vec![100; 4])].into();
    problem.devices[1].speed = 0.5;
    let layout = solve(&problem, None).unwrap().first().unwrap().clone();
    let mut next = after(&problem, &layout);
    next.goal = Goal::Rebalance { moves: None, bytes: None };
    next.instance.sharing = Sharing::Weighted;
    next.instance.loads = [(one, vec![150, 50, 120, 80]), (other, vec![90, 110, 150, 50])].into();
    let plan = solve(&next, Some(&layout)).unwrap();
    assert_eq!(findings(&next, Some(&layout), &plan), []);
    assert_eq!(plan.decision().moves, 0);
    assert!(matches!(plan.decision().balance, Balance::Close { .. }), "{plan}");
    assert!(plan.decision().certificate.makespan < 1.01, "{plan}");
}

#[test]
fn a_replan_says_why_it_moves_nothing_or_something() {
    let mut problem = problem(16, sites(2, 4));
    problem.instance.devices = Some(8);
    let layout = solve(&problem, None).unwrap().first().unwrap().clone();
    let mut next = after(&problem, &layout);
    next.goal = Goal::Rebalance { moves: None, bytes: None };
    // Two devices have all that is hot.
    let hot: Vec<ExpertId> = layout
        .devices
        .iter()
        .take(2)
        .flat_map(|entry| layout.slots_of(&entry.device)[&LayerId(1)].clone())
        .flatten()
        .collect();
    let tokens = |at: u32| if hot.contains(&ExpertId(at)) { 400 } else { 20 };
    next.instance.loads = [(LayerId(1), (0..16).map(tokens).collect())].into();
    let said = |next: &crate::Problem| solve(next, Some(&layout)).unwrap();
    let paid = said(&next);
    let Balance::Paid { gain, cost } = paid.decision().balance else { panic!("{paid}") };
    assert!(gain > cost && paid.decision().moves > 0, "{paid}");
    assert!(paid.to_string().contains("moves pay back: they gain"), "{paid}");
    // The same gain for a second, at a crawl.
    next.payback.lasts_s = 1.0;
    next.payback.bytes_per_s = 1000.0;
    let unpaid = said(&next);
    assert_eq!(unpaid.decision().moves, 0);
    assert!(unpaid.to_string().contains("nothing moves: moves would gain"), "{unpaid}");
    next.goal = Goal::Rebalance { moves: None, bytes: Some(berth_types::Bytes(1)) };
    assert_eq!(said(&next).decision().moves, 0, "a byte budget of one byte");
}

/// The layer's slots after a repair that finds nothing missing.
fn kept(sites: &[Site], copies: usize, before: Rows) -> Rows {
    let fleet = Fleet::new(sites);
    let (loads, previous) = (vec![vec![5.0, 4.0, 3.0]], vec![before]);
    let duty = Duty { copies, apart: false };
    let previous = Some(previous.as_slice());
    let effort = Effort::DEFAULT;
    let task = Task { fleet: &fleet, duty, loads: &loads, previous, budget: Budget::NONE, effort, threads: 1 };
    arrange(&task).unwrap().remove(0).rows
}

#[test]
fn a_device_without_slots_is_no_device_that_joins() {
    let site = |slots, node| Site { slots, speed: 1.0, node, card: node, bytes: 1, closed: false };
    let before = vec![vec![Some(0), Some(1)], vec![], vec![Some(2), None]];
    assert_eq!(kept(&[site(2, 0), site(0, 1), site(2, 2)], 1, before.clone()), before);
}

#[test]
fn copies_of_one_node_are_spread_by_whichever_of_them_can_go() {
    let site = |card, slots| Site { slots, speed: 1.0, node: card / 2, card, bytes: 1, closed: false };
    let sites: Vec<Site> = [3, 1, 2, 2].into_iter().enumerate().map(|(card, slots)| site(card, slots)).collect();
    // Expert 0 is twice on the first node; its busier device holds all that could come for it.
    let pair = vec![Some(1), Some(2)];
    let rows = kept(&sites, 2, vec![vec![Some(0), Some(1), Some(2)], vec![Some(0)], pair.clone(), pair]);
    assert!(rows[2..].iter().flatten().any(|held| *held == Some(0)), "{rows:?}");
}
