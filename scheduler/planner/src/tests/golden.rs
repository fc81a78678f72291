//! Plans that a person can read, and what is said when there is none.

use berth_types::{Bytes, ExpertId, LayerId};

use super::{
    after,
    fixtures::{device, problem, sites},
};
use crate::{Goal, Layout, Problem, Standing, Survive, check::findings, diff, solve};

fn planned(problem: &Problem) -> Layout {
    solve(problem, None).unwrap().first().unwrap().clone()
}

/// The difference that `change` of the fleet makes.
fn changed(problem: &Problem, layout: &Layout, change: impl FnOnce(&mut Problem)) -> String {
    let mut next = after(problem, layout);
    change(&mut next);
    let plan = solve(&next, Some(layout)).unwrap();
    assert_eq!(findings(&next, Some(layout), &plan), []);
    format!("{plan}\n{}", diff(Some(layout), plan.decision().waves.last().unwrap()))
}

fn survivor() -> Problem {
    let mut problem = problem(6, sites(2, 2));
    problem.instance.survive = Survive::Node;
    problem.instance.devices = Some(4);
    problem.instance.loads = [(LayerId(1), vec![90, 10, 10, 10, 10, 10])].into();
    problem
}

#[test]
fn a_first_placement_reads_as_a_table() {
    insta::assert_snapshot!(diff(None, &planned(&survivor())));
}

#[test]
fn a_lost_device_is_replaced_in_its_failure_domain() {
    let problem = survivor();
    let layout = planned(&problem);
    insta::assert_snapshot!(changed(&problem, &layout, |next| next.devices[0].standing = Standing::Gone));
}

#[test]
fn a_lost_node_leaves_a_placement_that_says_what_it_survives() {
    let problem = survivor();
    let layout = planned(&problem);
    insta::assert_snapshot!(changed(&problem, &layout, |next| {
        next.devices[0].standing = Standing::Gone;
        next.devices[1].standing = Standing::Gone;
    }));
}

#[test]
fn a_device_that_came_back_takes_its_part() {
    let problem = survivor();
    let layout = planned(&problem);
    let mut without = after(&problem, &layout);
    without.devices[0].standing = Standing::Gone;
    let three = solve(&without, Some(&layout)).unwrap().first().unwrap().clone();
    insta::assert_snapshot!(changed(&problem, &three, |_| {}));
}

#[test]
fn what_does_not_fit_says_how_much_is_missing() {
    let refusal = |change: &dyn Fn(&mut Problem)| {
        let mut problem = problem(16, sites(2, 2));
        change(&mut problem);
        solve(&problem, None).unwrap_err().to_string()
    };
    let slot = problem(16, sites(1, 1)).instance.expert_bytes(berth_types::Vendor::Nvidia).get() * 3;
    let room = |slots: u64| Bytes(slot * (slots + 1) * 100 / 90);
    let texts = [
        refusal(&|problem| problem.devices.clear()),
        refusal(&|problem| problem.instance.products = vec!["910C".to_owned()]),
        refusal(&|problem| problem.instance.devices = Some(6)),
        refusal(&|problem| problem.devices.iter_mut().for_each(|device| device.memory = room(3))),
        refusal(&|problem| {
            problem.devices.truncate(2);
            problem.instance.survive = Survive::Node;
        }),
        refusal(&|problem| problem.instance.granted = Some(0)),
    ];
    insta::assert_snapshot!(texts.join("\n"));
}

#[test]
fn a_move_that_does_not_fit_at_once_goes_in_waves() {
    let mut problem = problem(12, sites(1, 3));
    let expert = problem.instance.expert_bytes(berth_types::Vendor::Nvidia).get();
    // Room for four slots a layer and one expert beside them.
    for device in &mut problem.devices {
        device.memory = Bytes((expert * 3 * 4 + expert) * 100 / 91);
    }
    problem.instance.devices = Some(3);
    let layout = planned(&problem);
    let mut next = after(&problem, &layout);
    // All that is hot is on the first device: evening it out changes more than can be loaded at once.
    let hot = |layer: LayerId| layout.slots_of(&layout.devices[0].device)[&layer].clone();
    let tokens =
        |layer: LayerId| (0..12).map(|at| if hot(layer).contains(&Some(ExpertId(at))) { 900 } else { 10 }).collect();
    next.instance.loads = (1..4).map(|layer| (LayerId(layer), tokens(LayerId(layer)))).collect();
    next.goal = Goal::Rebalance { moves: None, bytes: None };
    let plan = solve(&next, Some(&layout)).unwrap();
    assert!(plan.decision().waves.len() > 1, "{plan}");
    assert_eq!(findings(&next, Some(&layout), &plan), []);
}

#[test]
fn fast_devices_carry_more() {
    let mut problem = problem(32, sites(2, 2));
    problem.devices[2].speed = 0.25;
    problem.devices[3].speed = 0.25;
    problem.instance.devices = Some(4);
    let plan = solve(&problem, None).unwrap();
    let slots: Vec<u32> = plan.first().unwrap().devices.iter().map(|entry| entry.slots).collect();
    assert_eq!(slots.iter().sum::<u32>(), 32);
    assert!(slots[0] >= 3 * slots[2], "{slots:?}");
    assert!(plan.decision().certificate.makespan < 1.1, "{plan}");
}

#[test]
fn an_interconnect_domain_is_preferred_to_scattered_devices() {
    let mut problem = problem(8, sites(4, 1));
    for at in [1, 3] {
        problem.devices[at].domain = Some("nvlink-a".to_owned());
    }
    problem.instance.devices = Some(2);
    let used: Vec<String> = planned(&problem).devices.iter().map(|entry| entry.device.node().to_owned()).collect();
    assert_eq!(used, ["node-1", "node-3"]);
}

#[test]
fn vendors_mix_only_when_declared() {
    let mut problem = problem(8, vec![device("a/0000:01:00.0"), device("b/0.0")]);
    problem.devices[1].vendor = berth_types::Vendor::Ascend;
    problem.instance.devices = Some(2);
    assert!(solve(&problem, None).is_err());
    problem.instance.cross_vendor = true;
    assert_eq!(planned(&problem).devices.len(), 2);
}

#[test]
fn the_checker_names_every_fault_of_a_bad_plan() {
    let problem = survivor();
    let good = solve(&problem, None).unwrap();
    let mut decision = good.decision().clone();
    let row = decision.waves[0].layers.get_mut(&LayerId(1)).unwrap();
    row[0] = row[1];
    row[2] = Some(ExpertId(77));
    decision.waves[0].layers.remove(&LayerId(2));
    let faults: Vec<String> =
        findings(&problem, None, &crate::Plan::propose(decision)).iter().map(ToString::to_string).collect();
    insta::assert_snapshot!(faults.join("\n"));
}
