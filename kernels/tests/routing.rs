//! Routing against a plain double precision version that sorts instead of selecting.

use berth_kernels::{Router, Scoring};
use proptest::prelude::*;

fn score(scoring: Scoring, row: &[f64]) -> Vec<f64> {
    match scoring {
        Scoring::Sigmoid => row.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
        Scoring::SqrtSoftplus => row.iter().map(|x| x.exp().ln_1p().sqrt()).collect(),
        Scoring::Softmax => {
            let sum: f64 = row.iter().map(|x| x.exp()).sum();
            row.iter().map(|x| x.exp() / sum).collect()
        }
    }
}

/// Chosen experts by falling score, their weights, and how close the closest decision was.
fn naive(router: &Router, row: &[f64], bias: &[f64]) -> (Vec<usize>, Vec<f64>, f64) {
    let scores = score(router.scoring, row);
    let mut choice: Vec<f64> = scores.iter().zip(bias).map(|(s, b)| s + b).collect();
    let mut margin = f64::INFINITY;
    if router.groups > 1 {
        let size = choice.len() / router.groups;
        let mut groups: Vec<(f64, usize)> = (0..router.groups)
            .map(|g| {
                let mut part = choice[g * size..][..size].to_vec();
                part.sort_by(|a, b| b.total_cmp(a));
                let best = if router.scoring == Scoring::Softmax || size == 1 { part[0] } else { part[0] + part[1] };
                (best, g)
            })
            .collect();
        groups.sort_by(|a, b| b.0.total_cmp(&a.0));
        for pair in groups.windows(2) {
            margin = margin.min(pair[0].0 - pair[1].0);
        }
        for &(_, g) in &groups[router.groups_kept.min(router.groups)..] {
            choice[g * size..][..size].fill(f64::NEG_INFINITY);
        }
    }
    let mut order: Vec<usize> = (0..choice.len()).collect();
    order.sort_by(|&a, &b| choice[b].total_cmp(&choice[a]));
    for pair in order.windows(2).filter(|p| choice[p[1]].is_finite()) {
        margin = margin.min(choice[pair[0]] - choice[pair[1]]);
    }
    order.truncate(router.top_k);
    let total: f64 = order.iter().map(|&e| scores[e]).sum();
    let total = if router.renormalise { total + 1e-20 } else { 1.0 };
    let weights = order.iter().map(|&e| scores[e] / total * f64::from(router.scaling)).collect();
    (order, weights, margin)
}

fn any_router() -> impl Strategy<Value = (Router, usize)> {
    let scoring = prop_oneof![Just(Scoring::Sigmoid), Just(Scoring::SqrtSoftplus), Just(Scoring::Softmax)];
    (
        scoring,
        1usize..5,
        1usize..6,
        any::<prop::sample::Index>(),
        any::<prop::sample::Index>(),
        any::<bool>(),
        0.5f32..3.0,
    )
        .prop_map(|(scoring, groups, size, kept, k, renormalise, scaling)| {
            let groups_kept = 1 + kept.index(groups);
            let top_k = 1 + k.index(groups_kept * size);
            (Router { scoring, top_k, groups, groups_kept, renormalise, scaling }, groups * size)
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn choices_and_weights_equal_plain_double_precision(
        (router, experts) in any_router(),
        values in prop::collection::vec(-12.0f32..12.0, 25 * 4),
        bias in prop::collection::vec(-0.5f32..0.5, 25),
    ) {
        let bias = &bias[..experts];
        let rows = values.len() / experts;
        let logits = &values[..rows * experts];
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        router.route(logits, Some(bias), None, &mut ids, &mut weights).unwrap();
        prop_assert_eq!((ids.len(), weights.len()), (rows * router.top_k, rows * router.top_k));
        let bias: Vec<f64> = bias.iter().map(|&b| f64::from(b)).collect();
        for (t, row) in logits.chunks(experts).enumerate() {
            let wide: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
            let (expected, reference, margin) = naive(&router, &wide, &bias);
            let got = &ids[t * router.top_k..][..router.top_k];
            if margin > 1e-5 {
                let got: Vec<usize> = got.iter().map(|&id| usize::try_from(id).unwrap()).collect();
                prop_assert_eq!(got, expected);
                for (w, r) in weights[t * router.top_k..].iter().zip(reference) {
                    prop_assert!((f64::from(*w) - r).abs() <= 1e-5 * r.abs() + 1e-12, "{} is not {}", w, r);
                }
            }
        }
    }

    #[test]
    fn any_bits_as_logits_give_valid_distinct_experts_and_touch_no_other_row(
        (router, experts) in any_router(),
        bits in prop::collection::vec(any::<u32>(), 25),
        clean in prop::collection::vec(-3.0f32..3.0, 25),
    ) {
        let wild: Vec<f32> = bits[..experts].iter().map(|&b| f32::from_bits(b)).collect();
        let clean = &clean[..experts];
        let zero = vec![0.0; experts];
        let run = |logits: &[f32]| {
            let (mut ids, mut weights) = (Vec::new(), Vec::new());
            router.route(logits, Some(&zero), None, &mut ids, &mut weights).unwrap();
            (ids, weights)
        };
        let alone = run(clean);
        let (ids, weights) = run(&[&wild, clean].concat());
        prop_assert_eq!(&ids[router.top_k..], &alone.0[..]);
        prop_assert_eq!(&weights[router.top_k..], &alone.1[..]);
        let mut wild_ids = ids[..router.top_k].to_vec();
        wild_ids.sort_unstable();
        wild_ids.dedup();
        prop_assert_eq!(wild_ids.len(), router.top_k);
        prop_assert!(wild_ids.iter().all(|&id| usize::try_from(id).unwrap() < experts));
        if wild.iter().any(|x| x.is_nan()) {
            prop_assert!(weights[..router.top_k].iter().all(|w| w.is_nan()));
        }
    }
}
