//! Wild cases through the benchmark, in the form of its files, and wild windows through the forecast.

use std::collections::BTreeSet;

use super::draw::Draw;
use crate::{
    Effort, Forecast,
    bench::{BenchError, Case, Event, Mode, Options, Pool, run},
    num,
};

const CASES: u64 = 100;

fn any_case(draw: &mut Draw, seed: u64) -> Case {
    let large = draw.one_in(15);
    let experts = if large { 384 } else { draw.pick(&[1, 2, 16, 32, 64, 128]) };
    let total = if large { 320 } else { draw.pick(&[1, 4, 8, 24, 40]) };
    let pools = draw.size(1, 3);
    let roomy = draw.pick(&[0.9, 1.0, 1.1, 1.5, 3.0]);
    let slots = num::ceil(num::real_size(experts) * roomy / num::real_size(total)).max(1);
    let pool = |draw: &mut Draw| {
        let each = draw.pick(&[1, 2, 8]);
        Pool {
            nodes: (total / pools / each).max(1),
            devices_per_node: each,
            slots_per_layer: (slots + draw.size(0, 2)).saturating_sub(draw.size(0, 1)),
            speed: draw.pick(&[1.0, 1.0, 0.7, 0.45, 2.5]),
        }
    };
    let pools: Vec<Pool> = (0..pools).map(|_| pool(draw)).collect();
    let nodes: usize = pools.iter().map(|pool| pool.nodes).sum();
    let windows = draw.size(1, if large { 3 } else { 7 });
    let mut events = Vec::new();
    for window in 1..windows {
        if draw.one_in(3) {
            let node = Some(draw.size(0, nodes - 1));
            let lost = draw.one_in(2);
            events.push(Event { window, remove_node: node.filter(|_| lost), return_node: node.filter(|_| !lost) });
        }
    }
    Case { id: format!("seed-{seed}"), layers: draw.size(1, 4), experts, expert_bytes: 9, windows, pools, events }
}

fn any_loads(draw: &mut Draw, case: &Case) -> Vec<u8> {
    let mut rows: Vec<Vec<u64>> = (0..case.layers).map(|_| draw.tokens(case.experts)).collect();
    let mut bytes = Vec::new();
    for _ in 0..case.windows {
        for row in &mut rows {
            if draw.one_in(5) {
                *row = draw.tokens(case.experts);
            }
            let wobble = |draw: &mut Draw, tokens: u64| tokens.min(4_000_000_000) / 10 * num::count(draw.size(9, 10));
            bytes.extend(row.iter().flat_map(|tokens| num::small(num::index64(wobble(draw, *tokens))).to_le_bytes()));
        }
    }
    bytes
}

/// Slots of each device of a case, and its node.
fn devices(case: &Case) -> Vec<(usize, usize)> {
    let nodes = case.pools.iter().flat_map(|pool| std::iter::repeat_n(pool, pool.nodes)).enumerate();
    nodes.flat_map(|(node, pool)| std::iter::repeat_n((pool.slots_per_layer, node), pool.devices_per_node)).collect()
}

fn gone(case: &Case, window: usize) -> BTreeSet<usize> {
    let mut gone = BTreeSet::new();
    for event in case.events.iter().filter(|event| event.window <= window) {
        gone.extend(event.remove_node);
        event.return_node.iter().for_each(|node| _ = gone.remove(node));
    }
    gone
}

#[test]
fn wild_cases_are_placed_by_the_rules_or_say_how_many_slots_are_short() {
    let mut short_cases = 0;
    for seed in 0..CASES {
        let mut draw = Draw::new(1_000_000 + seed);
        let case = any_case(&mut draw, seed);
        let loads = any_loads(&mut draw, &case);
        let options = Options {
            mode: draw.pick(&[Mode::Oracle, Mode::Forecast]),
            effort: Effort::FAST,
            threads: draw.size(1, 3),
            moved_percent: draw.pick(&[None, Some(0), Some(6), Some(100)]),
            moved_bytes: draw.pick(&[None, None, Some(0), Some(100)]),
        };
        let devices = devices(&case);
        let room = |window: usize| -> usize {
            let gone = gone(&case, window);
            let living = devices.iter().filter(|(_, node)| !gone.contains(node));
            living.map(|(slots, _)| (*slots).min(case.experts)).sum()
        };
        match run(&case, &loads, options, || 0.0) {
            Err(BenchError::Slots { window, short, .. }) => {
                assert_eq!(room(window) + short, case.experts, "seed {seed}");
                short_cases += 1;
            }
            Err(error) => panic!("seed {seed}: {error}"),
            Ok((results, plan)) => {
                assert_eq!(results.len(), case.windows);
                for result in &results {
                    let good = |value: f64| value.is_finite() && value >= 0.0;
                    assert!(good(result.balancedness) && result.makespan >= 1.0 - 1e-9, "seed {seed}: {result:?}");
                    assert_eq!(result.violations, 0, "seed {seed}: {result:?}");
                }
                assert_eq!(wrong(&case, &devices, &plan), Vec::<String>::new(), "seed {seed}");
            }
        }
    }
    assert!(short_cases > 10 && num::count(short_cases) < CASES / 2, "{short_cases} cases are short of slots");
}

/// What is wrong with plans as they are written.
fn wrong(case: &Case, devices: &[(usize, usize)], plan: &[u8]) -> Vec<String> {
    let row: usize = devices.iter().map(|(slots, _)| slots).sum();
    let entries: Vec<u16> = plan.chunks(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
    let mut wrong = Vec::new();
    for (at, entries) in entries.chunks(row).enumerate() {
        let (window, layer) = (at / case.layers, at % case.layers);
        let gone = gone(case, window);
        let mut left = entries;
        let mut placed = BTreeSet::new();
        for (slots, node) in devices {
            let (own, rest) = left.split_at(*slots);
            left = rest;
            let held: Vec<u16> = own.iter().copied().filter(|entry| *entry != u16::MAX).collect();
            if held.iter().collect::<BTreeSet<_>>().len() < held.len() || (gone.contains(node) && !held.is_empty()) {
                wrong.push(format!("window {window}, layer {layer}, node {node}: {own:?}"));
            }
            placed.extend(held);
        }
        if placed.len() != case.experts || placed.iter().any(|expert| usize::from(*expert) >= case.experts) {
            wrong.push(format!("window {window}, layer {layer}: {} of {} experts", placed.len(), case.experts));
        }
    }
    wrong
}

#[test]
fn a_case_whose_numbers_cannot_be_is_refused_in_words() {
    let case = || any_case(&mut Draw::new(4), 4);
    let refused = |change: &dyn Fn(&mut Case)| {
        let mut case = case();
        change(&mut case);
        let loads = vec![1; case.windows * case.layers * case.experts * 4];
        run(&case, &loads, Options::default(), || 0.0).unwrap_err().to_string()
    };
    for speed in [f64::NAN, 0.0, -1.0, f64::INFINITY] {
        assert!(refused(&|case| case.pools[0].speed = speed).contains("pools.speed"));
    }
    assert!(refused(&|case| case.pools.clear()).contains("short"));
    assert!(refused(&|case| case.experts = 0).contains("above 0"));
    assert!(refused(&|case| case.windows = 0).contains("above 0"));
    let beyond = Event { window: 1, remove_node: Some(usize::MAX), return_node: None };
    assert!(refused(&|case| case.events = vec![beyond.clone()]).contains("events"));
}

#[test]
fn wild_windows_are_expected_to_be_loads_and_every_bad_number_is_named() {
    for seed in 0..200 {
        let mut draw = Draw::new(2_000_000 + seed);
        let experts: Vec<usize> = (0..draw.size(0, 4)).map(|_| draw.size(1, 40)).collect();
        let mut forecast = Forecast::new(experts.clone());
        for _ in 0..draw.size(1, 30) {
            let mut window: Vec<Vec<f64>> = Vec::new();
            let mut bad = 0;
            for experts in &experts {
                let mut row: Vec<f64> = draw.tokens(*experts).into_iter().map(num::real).collect();
                for load in &mut row {
                    if draw.one_in(60) {
                        *load = draw.pick(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, -1e300]);
                        bad += 1;
                    }
                }
                window.push(row);
            }
            if draw.one_in(10) {
                window.truncate(draw.size(0, experts.len()));
                let here = window.iter().flatten().filter(|load| !load.is_finite() || **load < 0.0).count();
                bad = here + experts.iter().skip(window.len()).sum::<usize>();
            }
            assert_eq!(forecast.observe(&window).len(), bad, "seed {seed}");
            let expected = forecast.expect().unwrap();
            assert!(expected.iter().map(Vec::len).eq(experts.iter().copied()), "seed {seed}");
            assert!(
                expected.iter().flatten().all(|load| load.is_finite() && *load >= 0.0),
                "seed {seed}: {expected:?}"
            );
            assert!((1.0..=64.0).contains(&forecast.lasts()), "seed {seed}: {}", forecast.lasts());
        }
    }
}
