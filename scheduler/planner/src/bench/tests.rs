//! Cases through the benchmark, judged from the outside.

use super::*;

fn case(text: &str) -> Case {
    serde_json::from_str(text).unwrap()
}

const TWO_NODES: &str = r#"{"id": "t", "layers": 2, "experts": 6, "expert_bytes": 10, "windows": 3,
    "pools": [{"nodes": 2, "devices_per_node": 2, "slots_per_layer": 3, "speed": 1.0}],
    "events": [{"window": 1, "remove_node": 0}, {"window": 2, "return_node": 0}]}"#;

fn loads(counts: impl Iterator<Item = u32>) -> Vec<u8> {
    counts.flat_map(u32::to_le_bytes).collect()
}

#[test]
fn a_lost_node_is_empty_and_returns_empty() {
    let case = case(TWO_NODES);
    let (results, plan) = run(&case, &loads((0..36).map(|at| at % 7)), Options::default(), || 0.0).unwrap();
    assert_eq!((results.len(), plan.len()), (3, 3 * 2 * 12 * 2));
    assert!(results.iter().all(|result| result.violations == 0 && result.makespan >= 1.0 - 1e-9));
    let window = |at: usize| &plan[at * 48..(at + 1) * 48];
    assert!(window(1)[..12].iter().all(|byte| *byte == 0xFF), "slots of the lost node are empty");
    assert!(results[1].moved_replicas > 0 && results[1].moved_bytes == results[1].moved_replicas * 10);
    assert_ne!(&window(2)[..12], &window(1)[..12], "the node that came back is used");
}

#[test]
fn every_public_case_is_placed_without_a_violation() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/placement");
    let manifest = std::fs::read_to_string(folder.join("manifest.json")).unwrap();
    let manifest: Manifest = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest.cases.len(), 15);
    for case in &manifest.cases {
        let loads = std::fs::read(folder.join(format!("data/{}.u32le", case.id))).unwrap();
        let options = Options { effort: Effort::FAST, threads: 2, ..Options::default() };
        let (results, plan) = run(case, &loads, options, || 0.0).unwrap();
        assert_eq!(results.len(), case.windows, "{}", case.id);
        let slots: usize =
            case.pools.iter().map(|pool| pool.nodes * pool.devices_per_node * pool.slots_per_layer).sum();
        for row in plan.chunks(slots * 2) {
            let held: std::collections::BTreeSet<&[u8]> = row.chunks(2).collect();
            let missing = (0..case.experts)
                .filter(|expert| !held.contains(&u16::try_from(*expert).unwrap().to_le_bytes()[..]))
                .count();
            assert_eq!(missing, 0, "{}", case.id);
        }
        for result in results {
            assert_eq!(result.violations, 0, "{}", case.id);
            assert!(result.makespan < 1.6, "{}: {}", case.id, result.makespan);
        }
    }
}

#[test]
fn plans_do_not_depend_on_threads() {
    let case = case(TWO_NODES);
    let loads = loads((0..36).map(|at| at * at % 11));
    let of = |threads| run(&case, &loads, Options { threads, ..Options::default() }, || 0.0).unwrap();
    assert_eq!(of(1), of(4));
}

#[test]
fn too_few_slots_say_by_how_many() {
    let mut case = case(TWO_NODES);
    case.pools[0].slots_per_layer = 2;
    let error = run(&case, &loads(0..36), Options::default(), || 0.0).unwrap_err().to_string();
    assert!(error.contains("case t, window 1") && error.contains("2 short"), "{error}");
}

#[test]
fn a_load_file_of_another_size_is_refused() {
    let error = run(&case(TWO_NODES), &[0; 7], Options::default(), || 0.0).unwrap_err().to_string();
    assert!(error.contains("7 bytes") && error.contains("144"), "{error}");
}

#[test]
fn a_forecast_never_sees_its_own_window() {
    let case = case(TWO_NODES);
    let forecast = Options { mode: Mode::Forecast, ..Options::default() };
    let of = |last: u32| {
        let counts = (0..36).map(move |at| if at < 24 { at % 5 + 1 } else { at * last % 13 });
        run(&case, &loads(counts), forecast, || 0.0).unwrap().1
    };
    assert_eq!(of(1), of(7));
}

fn public(id: &str) -> (Case, Vec<u8>) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/placement");
    let manifest = std::fs::read_to_string(folder.join("manifest.json")).unwrap();
    let manifest: Manifest = serde_json::from_str(&manifest).unwrap();
    let case = manifest.cases.into_iter().find(|case| case.id.starts_with(id)).unwrap();
    let loads = std::fs::read(folder.join(format!("data/{}.u32le", case.id))).unwrap();
    (case, loads)
}

#[test]
fn public_cases_reach_their_bars() {
    let bars = [
        ("p01", 0.9990),
        ("p02", 0.9985),
        ("p03", 0.9990),
        ("p04", 0.9985),
        ("p05", 0.9990),
        ("p06", 0.9800),
        ("p07", 0.9990),
        ("p10", 0.9950),
        ("p13", 0.9950),
    ];
    for (id, bar) in bars {
        let (case, loads) = public(id);
        let (results, _) = run(&case, &loads, Options { threads: 2, ..Options::default() }, || 0.0).unwrap();
        assert!(results[0].balancedness >= bar, "{id}: {}", results[0].balancedness);
    }
    let (case, loads) = public("p14");
    let (results, _) = run(&case, &loads, Options { threads: 2, ..Options::default() }, || 0.0).unwrap();
    assert!(results[0].makespan <= 1.003, "p14: {}", results[0].makespan);
}

#[test]
fn drifting_loads_are_followed_calmly() {
    let (case, loads) = public("p08");
    let (results, _) = run(&case, &loads, Options { threads: 2, ..Options::default() }, || 0.0).unwrap();
    let next: Vec<f64> = results.iter().filter_map(|result| result.next_balancedness).collect();
    let mean = next.iter().sum::<f64>() / f64::from(u32::try_from(next.len()).unwrap());
    assert!(mean >= 0.920, "next balancedness {mean}");
    let most = u64::try_from(288 * case.layers * 6 / 100).unwrap();
    assert!(results.iter().all(|result| result.moved_replicas <= most), "at most {most} may move");
}

#[test]
fn a_lost_node_costs_few_moves_and_only_what_had_one_copy() {
    let (case, loads) = public("p15");
    let (results, plan) = run(&case, &loads, Options { threads: 2, ..Options::default() }, || 0.0).unwrap();
    let lost = u64::try_from(8 * 11 * case.layers).unwrap();
    assert!(results[3].moved_replicas * 10 <= lost * 13, "{} for {lost} lost", results[3].moved_replicas);
    // In the plan before the loss no expert with several copies has them all on the lost node.
    let (row, node) = (352 * 2, 8 * 11 * 2);
    for layer in plan[2 * case.layers * row..3 * case.layers * row].chunks(row) {
        let copies = |part: &[u8]| {
            part.chunks(2).map(<[u8]>::to_vec).fold(std::collections::BTreeMap::new(), |mut counts, expert| {
                *counts.entry(expert).or_insert(0) += 1;
                counts
            })
        };
        let all = copies(layer);
        let there = copies(&layer[node..2 * node]);
        assert!(there.iter().all(|(expert, count)| *count == 1 || all[expert] > *count));
    }
}

#[test]
fn the_same_window_again_moves_nothing() {
    let (mut case, loads) = public("p01");
    case.windows = 3;
    let loads = loads.repeat(3);
    let (results, _) = run(&case, &loads, Options::default(), || 0.0).unwrap();
    assert!(results.iter().all(|result| result.moved_replicas == 0));
}

#[test]
fn plans_of_public_cases_are_the_same_to_the_byte_on_any_number_of_threads() {
    for (id, windows) in [("p01", 1), ("p06", 1), ("p08", 4), ("p14", 1), ("p15", 5)] {
        let (mut case, mut loads) = public(id);
        case.windows = windows;
        case.events.retain(|event| event.window < windows);
        loads.truncate(windows * case.layers * case.experts * 4);
        let of = |threads| {
            let options = Options { threads, effort: Effort::FAST, ..Options::default() };
            run(&case, &loads, options, || 0.0).unwrap()
        };
        let one = of(1);
        assert!(one == of(2) && one == of(5), "{id}");
    }
}
