//! How replicas share tokens: parts against all splits on a grid, weights that the checker refuses.

use berth_types::LayerId;

use super::fixtures::{problem, sites};
use crate::{Plan, Problem, Sharing, check::findings, share, solve};

fn weighted() -> Problem {
    let mut problem = problem(6, sites(2, 2));
    problem.instance.devices = Some(4);
    problem.instance.extra_replicas = 4;
    problem.instance.sharing = Sharing::Weighted;
    problem.devices[1].speed = 0.5;
    problem.devices[3].speed = 0.25;
    problem.instance.loads = [(LayerId(1), vec![90, 31, 10, 17, 5, 23])].into();
    problem
}

#[test]
fn a_slower_device_takes_a_smaller_part() {
    let parts = share::split(&[vec![0, 1]], &[3.0], &[1.0, 0.5]);
    assert!((parts[0][0] - 2.0 / 3.0).abs() < 1e-9 && (parts[0][1] - 1.0 / 3.0).abs() < 1e-9, "{parts:?}");
    // A device that is full already takes nothing.
    let parts = share::split(&[vec![0, 1], vec![1]], &[1.0, 5.0], &[1.0, 1.0]);
    assert_eq!(parts[0], [1.0, 0.0]);
}

#[test]
fn no_split_on_a_grid_is_better() {
    let homes = [vec![0, 1], vec![1, 2], vec![0, 2], vec![2]];
    let (loads, speeds) = ([5.0, 4.0, 3.0, 2.0], [1.0, 0.7, 0.45]);
    let slowest = |parts: &[Vec<f64>]| {
        let mut carried = [0.0; 3];
        for ((homes, load), parts) in homes.iter().zip(&loads).zip(parts) {
            homes.iter().zip(parts).for_each(|(home, part)| carried[*home] += load * part);
        }
        carried.iter().zip(&speeds).map(|(load, speed)| load / speed).fold(0.0, f64::max)
    };
    let found = slowest(&share::split(&homes, &loads, &speeds));
    let grid = || (0..=40).map(|at| f64::from(at) / 40.0);
    let pair = |part: f64| vec![part, 1.0 - part];
    for (one, two, three) in
        grid().flat_map(|one| grid().flat_map(move |two| grid().map(move |three| (one, two, three))))
    {
        assert!(found <= slowest(&[pair(one), pair(two), pair(three), vec![1.0]]) + 1e-5, "{one} {two} {three}");
    }
}

#[test]
fn weighted_plans_carry_weights_and_are_at_least_as_fast() {
    let problem = weighted();
    let plan = solve(&problem, None).unwrap();
    assert_eq!(findings(&problem, None, &plan), []);
    let mut even = problem.clone();
    even.instance.sharing = Sharing::Even;
    let even = solve(&even, None).unwrap();
    let makespan = |plan: &Plan<crate::Proposed>| plan.decision().certificate.makespan;
    assert!(makespan(&plan) < makespan(&even), "{plan}\n{even}");
    assert!(plan.to_string().contains("by weight"), "{plan}");
    let committed = crate::check(&problem, None, plan).unwrap().committed();
    assert_eq!(committed.weights().unwrap().len(), 3);
}

#[test]
fn weights_that_are_no_split_are_refused() {
    let problem = weighted();
    let good = solve(&problem, None).unwrap().decision().clone();
    let faults = |change: &dyn Fn(&mut crate::Decision)| {
        let mut decision = good.clone();
        change(&mut decision);
        let found = findings(&problem, None, &Plan::propose(decision));
        found.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    };
    let row = |decision: &mut crate::Decision| decision.weights[0].remove(&LayerId(1)).unwrap();
    let text = faults(&|decision| decision.weights.clear());
    assert!(text.contains("weights for 0 layouts, 1 need some"), "{text}");
    let text = faults(&|decision| {
        let mut weights = row(decision);
        weights[0] -= 1;
        decision.weights[0].insert(LayerId(1), weights);
    });
    assert!(text.contains("layer 1: the weights of expert") && text.contains("not to 65535"), "{text}");
    let text = faults(&|decision| _ = row(decision));
    assert!(text.contains("weights are of other layers"), "{text}");
    let text = faults(&|decision| {
        let held = decision.waves[0].layers[&LayerId(1)].clone();
        let mut weights = row(decision);
        for (slot, weight) in weights.iter_mut().enumerate().filter(|(slot, _)| held[*slot].is_some()) {
            *weight = if held[..slot].contains(&held[slot]) { 0 } else { share::WHOLE };
        }
        decision.weights[0].insert(LayerId(1), weights);
    });
    assert!(text.contains("the makespan is"), "{text}");
    let text = faults(&|decision| decision.sharing = Sharing::Even);
    assert!(text.contains("weights for 1 layouts, 0 need some"), "{text}");
}
