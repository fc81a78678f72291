//! What must hold of layers as the solver fills them, judged without its code: tiny ones against every
//! layout there is, others against the rules.

use std::collections::BTreeSet;

use proptest::prelude::*;

use crate::{
    Effort,
    experts::{Arranged, Budget, Duty, Fleet, Rows, Site, Task, arrange},
};

const ONE: Duty = Duty { copies: 1, apart: false };

fn site(slots: usize, speed: f64, node: usize, card: usize) -> Site {
    Site { slots, speed, node, card, bytes: 1, closed: false }
}

/// Devices of three speeds on up to four nodes.
fn any_sites() -> impl Strategy<Value = Vec<Site>> {
    let device = (1_usize..5, prop::sample::select(vec![1.0, 0.7, 0.45]), 0_usize..4);
    prop::collection::vec(device, 1..14).prop_map(|devices| {
        let site = |(card, (slots, speed, node)): (usize, (usize, f64, usize))| site(slots, speed, node, card);
        devices.into_iter().enumerate().map(site).collect()
    })
}

/// Loads of some layers, one of them dead now and then.
fn any_loads() -> impl Strategy<Value = Vec<Vec<f64>>> {
    let load = prop_oneof![4 => 0_u32..300, 1 => 300_u32..6000].prop_map(f64::from);
    (2_usize..12, 1_usize..4).prop_flat_map(move |(experts, layers)| {
        let layer = prop_oneof![9 => prop::collection::vec(load.clone(), experts), 1 => Just(vec![0.0; experts])];
        prop::collection::vec(layer, layers)
    })
}

fn task<'a>(fleet: &'a Fleet, loads: &'a [Vec<f64>], previous: Option<&'a [Rows]>, budget: Budget) -> Task<'a> {
    Task { fleet, duty: ONE, loads, previous, budget, effort: Effort::FAST, threads: 1 }
}

fn rows(arranged: Vec<Arranged>) -> Vec<Rows> {
    arranged.into_iter().map(|layer| layer.rows).collect()
}

/// Load ÷ speed of the slowest device.
fn slowest(sites: &[Site], loads: &[f64], rows: &Rows) -> f64 {
    let copies = |expert: usize| rows.iter().flatten().filter(|held| **held == Some(expert)).count();
    let share = |expert: &usize| loads[*expert] / f64::from(u32::try_from(copies(*expert)).unwrap());
    let time = |(row, site): (&Vec<Option<usize>>, &Site)| row.iter().flatten().map(share).sum::<f64>() / site.speed;
    rows.iter().zip(sites).map(time).fold(0.0, f64::max)
}

/// What is wrong with one layer; `moved` replicas were not there before.
fn faults(sites: &[Site], experts: usize, rows: &Rows) -> Vec<String> {
    let mut faults = Vec::new();
    for (row, site) in rows.iter().zip(sites) {
        let held: Vec<usize> = row.iter().flatten().copied().collect();
        if row.len() != site.slots || held.iter().collect::<BTreeSet<_>>().len() < held.len() {
            faults.push(format!("{row:?} in {} slots", site.slots));
        }
    }
    let nodes: BTreeSet<usize> = sites.iter().map(|site| site.node).collect();
    for expert in 0..experts {
        let homes: Vec<usize> =
            rows.iter().zip(sites).filter(|(row, _)| row.contains(&Some(expert))).map(|(_, site)| site.node).collect();
        let spread = homes.iter().collect::<BTreeSet<_>>().len();
        if homes.is_empty() || (homes.len() > 1 && nodes.len() > 1 && spread < 2) {
            faults.push(format!("expert {expert} on nodes {homes:?}"));
        }
    }
    faults
}

fn moved(rows: &Rows, before: &Rows) -> usize {
    let new = |(row, old): (&Vec<Option<usize>>, &Vec<Option<usize>>)| {
        row.iter().filter(|held| held.is_some() && !old.contains(held)).count()
    };
    rows.iter().zip(before).map(new).sum()
}

/// The least slowest time over every layout that keeps the rules.
fn optimum(sites: &[Site], loads: &[f64]) -> f64 {
    let slots: usize = sites.iter().map(|site| site.slots).sum();
    let choices = loads.len() + 1;
    let mut best = f64::INFINITY;
    for code in 0..choices.pow(u32::try_from(slots).unwrap()) {
        let mut left = code;
        let mut digit = || {
            let digit = left % choices;
            left /= choices;
            digit.checked_sub(1)
        };
        let rows: Rows = sites.iter().map(|site| (0..site.slots).map(|_| digit()).collect()).collect();
        if faults(sites, loads.len(), &rows).is_empty() {
            best = best.min(slowest(sites, loads, &rows));
        }
    }
    best
}

#[test]
fn tiny_layers_are_as_good_as_the_best_of_all_layouts() {
    let fleets = [
        vec![site(2, 1.0, 0, 0), site(2, 1.0, 1, 1), site(1, 1.0, 1, 2)],
        vec![site(2, 1.0, 0, 0), site(2, 0.5, 1, 1), site(1, 0.7, 2, 2)],
        vec![site(1, 1.0, 0, 0), site(1, 1.0, 0, 1), site(1, 0.45, 1, 2), site(2, 0.7, 1, 3)],
        vec![site(3, 1.0, 0, 0), site(2, 1.0, 1, 1)],
    ];
    let layers = [vec![8.0, 1.0, 1.0], vec![5.0, 4.0, 3.0], vec![1.0, 1.0, 1.0, 1.0], vec![9.0, 7.0, 2.0, 1.0]];
    let (mut sum, mut count) = (0.0, 0.0);
    for sites in &fleets {
        for loads in &layers {
            let fleet = Fleet::new(sites);
            let ideal = loads.iter().sum::<f64>() / sites.iter().map(|site| site.speed).sum::<f64>();
            let best = optimum(sites, loads) / ideal;
            let all = [loads.clone()];
            let own = Effort { units: 50_000, close: 1e-6 };
            let solved = arrange(&Task { effort: own, ..task(&fleet, &all, None, Budget::NONE) }).unwrap().remove(0);
            assert!(solved.bound <= best + 1e-9, "bound {} above the optimum {best}", solved.bound);
            assert!(solved.makespan >= best - 1e-9, "{sites:?} {loads:?}: better than the best of all layouts");
            sum += solved.makespan / best;
            count += 1.0;
            assert!(solved.makespan <= best * 1.34, "{sites:?} {loads:?}: {} for {best}", solved.makespan);
        }
    }
    assert!(sum / count < 1.05, "mean distance from the optimum {}", sum / count);
}

#[test]
fn two_slots_on_each_of_many_devices_are_within_nine_thousandths_of_the_bound() {
    let sites: Vec<Site> = (0..320).map(|at| site(2, 1.0, at / 8, at)).collect();
    let fleet = Fleet::new(&sites);
    // Log-logistic, in an order that follows no rule.
    let load = |power: f64| {
        let part = move |expert: u32| (f64::from(expert * 217 % 384) + 0.5) / 384.0;
        (0..384).map(move |expert| (part(expert) / (1.0 - part(expert))).powf(power).mul_add(1000.0, 1.0)).collect()
    };
    let loads: Vec<Vec<f64>> = [0.4, 0.45, 0.5].into_iter().map(load).collect();
    let solved = arrange(&Task { effort: Effort::DEFAULT, ..task(&fleet, &loads, None, Budget::NONE) }).unwrap();
    for (layer, loads) in solved.iter().zip(&loads) {
        assert_eq!(faults(&sites, loads.len(), &layer.rows), Vec::<String>::new());
        assert!(layer.makespan <= layer.bound + 0.009, "{} for {}", layer.makespan, layer.bound);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_layer_keeps_the_rules_or_says_how_many_slots_are_short(sites in any_sites(), loads in any_loads()) {
        let fleet = Fleet::new(&sites);
        let experts = loads[0].len();
        let room: usize = sites.iter().map(|site| site.slots.min(experts)).sum();
        match arrange(&task(&fleet, &loads, None, Budget::NONE)) {
            Err(short) => prop_assert_eq!(short.short, experts - room),
            Ok(arranged) => for (layer, loads) in arranged.iter().zip(&loads) {
                prop_assert_eq!(faults(&sites, experts, &layer.rows), Vec::<String>::new());
                prop_assert!(layer.makespan >= layer.bound - 1e-9);
                let ideal = loads.iter().sum::<f64>() / sites.iter().map(|site| site.speed).sum::<f64>();
                if ideal > 0.0 {
                    prop_assert!((slowest(&sites, loads, &layer.rows) / ideal - layer.makespan).abs() < 1e-6);
                }
            }
        }
    }

    #[test]
    fn like_devices_with_two_slots_keep_the_rules(devices in 1_usize..40, loads in any_loads(), nodes in 1_usize..5) {
        let sites: Vec<Site> = (0..devices).map(|at| site(2, 1.0, at % nodes, at)).collect();
        let fleet = Fleet::new(&sites);
        let own = Effort { units: 20_000, close: 1e-6 };
        let Ok(arranged) = arrange(&Task { effort: own, ..task(&fleet, &loads, None, Budget::NONE) }) else { return Ok(()) };
        for (layer, loads) in arranged.iter().zip(&loads) {
            prop_assert_eq!(faults(&sites, loads.len(), &layer.rows), Vec::<String>::new());
            prop_assert!(layer.makespan >= layer.bound - 1e-9);
        }
    }

    #[test]
    fn threads_change_nothing(sites in any_sites(), loads in any_loads()) {
        let fleet = Fleet::new(&sites);
        let one = task(&fleet, &loads, None, Budget::NONE);
        prop_assert_eq!(arrange(&one), arrange(&Task { threads: 3, ..one }));
    }

    #[test]
    fn a_replan_keeps_the_rules_and_its_budget(
        sites in any_sites(), loads in any_loads(), shift in 1_usize..8, moves in 0_usize..12, lost in 0_usize..14,
    ) {
        let fleet = Fleet::new(&sites);
        let Ok(arranged) = arrange(&task(&fleet, &loads, None, Budget::NONE)) else { return Ok(()) };
        let before = rows(arranged);
        let budget = Budget { moves: Some(moves), bytes: None, price: 0.0, least: 0.0 };
        let mut turned = loads.clone();
        turned.iter_mut().for_each(|layer| { let by = shift % layer.len(); layer.rotate_left(by) });
        let after = rows(arrange(&task(&fleet, &turned, Some(&before), budget)).unwrap());
        for (rows, loads) in after.iter().zip(&turned) {
            prop_assert_eq!(faults(&sites, loads.len(), rows), Vec::<String>::new());
        }
        prop_assert!(after.iter().zip(&before).map(|(rows, before)| moved(rows, before)).sum::<usize>() <= moves);
        // And after the loss of a device, if the rest can hold the experts.
        let lost = lost % sites.len();
        let without = |rows: &Rows| rows.iter().enumerate().filter(|(at, _)| *at != lost).map(|(_, row)| row.clone()).collect();
        let left: Vec<Site> = sites.iter().enumerate().filter(|(at, _)| *at != lost).map(|(_, site)| site.clone()).collect();
        let (fleet, before): (Fleet, Vec<Rows>) = (Fleet::new(&left), before.iter().map(without).collect());
        if let Ok(repaired) = arrange(&task(&fleet, &loads, Some(&before), budget)) {
            for (layer, loads) in repaired.iter().zip(&loads) {
                prop_assert_eq!(faults(&left, loads.len(), &layer.rows), Vec::<String>::new());
            }
        }
    }

    #[test]
    fn a_faster_or_a_further_device_never_makes_the_slowest_slower(
        sites in any_sites(), loads in any_loads(), at in 0_usize..14, speed in 0.1_f64..3.0, slots in 1_usize..5,
    ) {
        let fleet = Fleet::new(&sites);
        let Ok(arranged) = arrange(&task(&fleet, &loads, None, Budget::NONE)) else { return Ok(()) };
        let mut before = rows(arranged);
        let budget = Budget { moves: None, bytes: None, price: 0.0, least: 0.0 };
        // The sum over layers, each in units of its load: what a step takes.
        let step = |sites: &[Site], rows: &[Rows]| -> f64 {
            let layer = |(rows, loads): (&Rows, &Vec<f64>)| slowest(sites, loads, rows) / loads.iter().sum::<f64>().max(1.0);
            rows.iter().zip(&loads).map(layer).sum()
        };
        let old = step(&sites, &before);
        let mut faster = sites.clone();
        let count = faster.len();
        faster[at % count].speed *= 1.0 + speed;
        let new = rows(arrange(&task(&Fleet::new(&faster), &loads, Some(&before), budget)).unwrap());
        prop_assert!(step(&faster, &new) <= old * (1.0 + 1e-9));
        let mut more = sites.clone();
        // On a known node: a second failure domain comes before speed, and spreading to it may cost some.
        more.push(site(slots, speed, sites[0].node, 99));
        before.iter_mut().for_each(|rows| rows.push(vec![None; slots]));
        let new = rows(arrange(&task(&Fleet::new(&more), &loads, Some(&before), budget)).unwrap());
        prop_assert!(step(&more, &new) <= old * (1.0 + 1e-9));
    }
}

#[test]
fn what_only_slow_devices_have_room_for_bounds_a_layer_and_the_layer_reaches_it() {
    // 16 fast devices of 6 slots, 16 slow ones of 14: 160 of 256 experts have no fast device at all.
    let slow = |at: usize| if at < 16 { (6, 1.0) } else { (14, 0.4) };
    let sites: Vec<Site> = (0..32).map(|at| site(slow(at).0, slow(at).1, at / 8, at)).collect();
    let fleet = Fleet::new(&sites);
    let loads = [(1..=256).map(|at| 1e5 / f64::from(at).sqrt()).collect::<Vec<f64>>()];
    let coldest: f64 = loads[0][96..].iter().sum();
    let forced = coldest / 6.4 / (loads[0].iter().sum::<f64>() / 22.4);
    let layer = arrange(&task(&fleet, &loads, None, Budget::NONE)).unwrap().remove(0);
    assert!(forced > 1.2 && (layer.bound - forced).abs() < 1e-9, "bound {}, {forced} is forced", layer.bound);
    assert!(layer.makespan < forced * 1.01, "{} of {forced}", layer.makespan);
}

#[test]
fn a_hot_expert_stays_on_the_fast_devices_where_slow_ones_are_one_node() {
    let kind = |at: usize| if at < 16 { (12, 1.0, at / 8) } else { (6, 0.45, 2) };
    let sites: Vec<Site> = (0..32).map(|at| site(kind(at).0, kind(at).1, kind(at).2, at)).collect();
    let fleet = Fleet::new(&sites);
    let mut loads = [vec![275.0; 256]];
    loads[0][7] = 30_000.0;
    let layer =
        arrange(&Task { effort: Effort::DEFAULT, ..task(&fleet, &loads, None, Budget::NONE) }).unwrap().remove(0);
    assert_eq!(faults(&sites, 256, &layer.rows), Vec::<String>::new());
    // By hand: 16 copies of it, beside each nine others and two halves.
    assert!(layer.makespan < 1.08, "{}", layer.makespan);
}

#[test]
fn loads_that_say_nothing_keep_the_live_layout() {
    let sites: Vec<Site> = (0..4).map(|at| site(3, 1.0, at / 2, at)).collect();
    let fleet = Fleet::new(&sites);
    let loads = [vec![9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]];
    let before = rows(arrange(&task(&fleet, &loads, None, Budget::NONE)).unwrap());
    let budget = Budget { moves: None, bytes: None, price: 0.0, least: 0.0 };
    for nothing in [vec![0.0; 8], vec![f64::NAN; 8], vec![-1.0; 8]] {
        let kept = rows(arrange(&task(&fleet, &[nothing], Some(&before), budget)).unwrap());
        assert_eq!(kept, before);
    }
}
