//! Which entries win when equal scores straddle the indexer's cut. Any choice is right by the paper; so that results agree
//! with the published implementation entry by entry, ties fall as in its cached decoding on a CPU: `torch.topk` over the
//! closed entries, which leaves them to libstdc++'s `nth_element` (introselect). Only tied scores come here, which
//! takes queries whose heads all give zero; beyond 64 entries for each one kept, where torch selects otherwise, and after
//! too many rounds, ties go to the lowest entry.

use crate::num::{u32_of, usize_of};

/// The `count` entries that win, rising; `None` where ties go to the lowest.
pub(super) fn settle(scores: &[f32], count: usize) -> Option<Vec<u32>> {
    if count.saturating_mul(64) <= scores.len() {
        return None;
    }
    let better = |a: u32, b: u32| {
        let (a, b) = (scores[usize_of(a)], scores[usize_of(b)]);
        (a.is_nan() && !b.is_nan()) || a > b
    };
    let mut order: Vec<u32> = (0..u32_of(scores.len())).collect();
    let (mut first, mut last, nth) = (0, order.len(), count - 1);
    let mut rounds = 2 * order.len().ilog2();
    while last - first > 3 {
        rounds = rounds.checked_sub(1)?;
        let cut = partition(&mut order[first..last], better) + first;
        if cut <= nth {
            first = cut;
        } else {
            last = cut;
        }
    }
    insertion_sort(&mut order[first..last], better);
    order.truncate(count);
    order.sort_unstable();
    Some(order)
}

/// Brings a pivot to the front and the better ones before the others; where the others begin.
fn partition(part: &mut [u32], better: impl Fn(u32, u32) -> bool) -> usize {
    let (a, b, c) = (1, part.len() / 2, part.len() - 1);
    let beats = |x: usize, y: usize| better(part[x], part[y]);
    let median = match (beats(a, b), beats(b, c), beats(a, c)) {
        (true, true, _) | (false, false, false) => b,
        (true, false, true) | (false, true, false) => c,
        (true, false, false) | (false, _, true) => a,
    };
    part.swap(0, median);
    let (pivot, mut low, mut high) = (part[0], 1, part.len());
    loop {
        while better(part[low], pivot) {
            low += 1;
        }
        high -= 1;
        while better(pivot, part[high]) {
            high -= 1;
        }
        if low >= high {
            return low;
        }
        part.swap(low, high);
        low += 1;
    }
}

/// Best first; equals keep their order.
fn insertion_sort(part: &mut [u32], better: impl Fn(u32, u32) -> bool) {
    for at in 1..part.len() {
        let mut to = at;
        while to > 0 && better(part[to], part[to - 1]) {
            part.swap(to, to - 1);
            to -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Scores 0 to 3 and what `torch.topk` (2.15) keeps of them.
    const KEPT: [(&str, &[u32]); 12] = [
        ("1300011323112132", &[1, 6, 7, 8, 9, 12, 13, 14, 15]),
        ("013202122223013210211203230313301021132", &[11, 25, 27, 29, 30]),
        ("3003303000223303112011010220020", &[0, 3, 4, 6, 10, 11, 12, 13, 15, 16, 17, 18, 20, 21, 23, 24, 25, 26, 29]),
        ("3220031110031001133003302000000", &[0, 1, 2, 5, 6, 7, 8, 11, 12, 15, 16, 17, 18, 21, 22, 24, 30]),
        ("2033113000003", &[0, 1, 2, 3, 4, 5, 6, 10, 11, 12]),
        ("00002030122010331211", &[4, 6, 9, 10, 12, 14, 15, 17, 18, 19]),
        ("303030101323032", &[0, 2, 4, 6, 7, 8, 9, 10, 11, 13, 14]),
        ("13313032311100030320123000322", &[6, 8, 15, 17, 22]),
        ("10101231013011", &[5, 6, 9, 10, 12, 13]),
        (
            "21312122212322032311130012130",
            &[0, 1, 2, 3, 4, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 18, 21, 24, 25, 26, 27],
        ),
        ("210020130120230023332203", &[0, 1, 2, 4, 6, 7, 9, 10, 12, 13, 16, 17, 18, 19, 20, 21, 22, 23]),
        ("02232311202310220", &[1, 3, 5, 8, 10, 11]),
    ];

    #[test]
    fn ties_fall_as_in_the_published_implementation() {
        for (scores, kept) in KEPT {
            let scores: Vec<f32> = scores.bytes().map(|digit| f32::from(digit - b'0')).collect();
            assert_eq!(settle(&scores, kept.len()).unwrap(), kept, "{scores:?}");
        }
    }

    proptest! {
        #[test]
        fn none_that_loses_is_better_than_one_that_wins(
            scores in proptest::collection::vec(prop_oneof![(0_u8..4).prop_map(f32::from), Just(f32::NAN)], 2..200),
            share in 0.0_f64..1.0,
        ) {
            let count = 1 + (0..scores.len() - 1).take_while(|at| crate::num::f64_of(*at) < share * 50.0).count();
            if let Some(kept) = settle(&scores, count.min(scores.len() - 1)) {
                prop_assert_eq!(kept.len(), count.min(scores.len() - 1));
                let worst = kept.iter().map(|at| scores[usize_of(*at)]).filter(|s| !s.is_nan()).fold(9.0, f32::min);
                let lost = (0..u32_of(scores.len())).filter(|at| !kept.contains(at)).map(|at| scores[usize_of(at)]);
                prop_assert!(lost.into_iter().all(|lost| lost.is_nan() || lost <= worst));
            }
        }
    }
}
