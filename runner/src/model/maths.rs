//! Sums in a fixed order. Every reduction of the model outside `berth-kernels` goes through here, so that
//! a token's value never depends on batch size, chunking or thread count.

/// Independent partial sums, enough for two vector registers; added up pairwise at the end.
const LANES: usize = 16;

/// `Σ a[i] · b[i]` over the shorter of both, in lanes `i mod 16`, then pairwise.
#[inline]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let mut left = a.chunks_exact(LANES);
    let mut right = b.chunks_exact(LANES);
    for (x, y) in left.by_ref().zip(right.by_ref()) {
        for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
            *lane += x * y;
        }
    }
    for ((lane, x), y) in lanes.iter_mut().zip(left.remainder()).zip(right.remainder()) {
        *lane += x * y;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `y[i] += factor · x[i]`.
#[inline]
pub(crate) fn add_scaled(y: &mut [f32], factor: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}

/// `y[i] += x[i]`.
#[inline]
pub(crate) fn add(y: &mut [f32], x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}

/// Softmax of `scores` in place: `exp(s - max) / Σ exp(s - max)`, summed in index order.
pub(crate) fn softmax(scores: &mut [f32]) {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0_f32;
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += *score;
    }
    for score in scores.iter_mut() {
        *score /= sum;
    }
}

/// Softmax of `scores` and one more score, `sink`, whose share is left out: `exp(s - max) / (Σ exp(s - max) + exp(sink - max))`.
pub(crate) fn softmax_with_sink(scores: &mut [f32], sink: f32) {
    let max = scores.iter().copied().fold(sink, f32::max);
    let mut sum = 0.0_f32;
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += *score;
    }
    sum += (sink - max).exp();
    for score in scores.iter_mut() {
        *score /= sum;
    }
}

/// `1 / (1 + e^-x)`.
#[inline]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// `x · sigmoid(x)` (arXiv 1702.03118).
#[inline]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// Index of the largest value; ties go to the lowest index. NaN is never chosen; 0 for a row of nothing else.
pub(crate) fn argmax(row: &[f32]) -> usize {
    let mut best = (0, f32::NEG_INFINITY);
    for (index, &value) in row.iter().enumerate() {
        if value > best.1 {
            best = (index, value);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dot_takes_every_element_of_any_length() {
        for len in [0_u8, 1, 15, 16, 17, 33] {
            let ones: Vec<f32> = (0..len).map(|_| 1.0).collect();
            assert_eq!(dot(&ones, &ones), f32::from(len));
        }
    }

    #[test]
    fn ties_go_to_the_lowest_index_and_nan_is_never_chosen() {
        assert_eq!(argmax(&[0.0, 2.0, 2.0, f32::NAN]), 1);
        assert_eq!(argmax(&[f32::NAN, -1.0]), 1);
    }

    #[test]
    fn a_sink_takes_its_share_and_gives_nothing() {
        let mut scores = [2.0, 2.0];
        softmax_with_sink(&mut scores, 2.0);
        assert_eq!(scores, [1.0 / 3.0; 2]);
        let mut scores = [500.0, -500.0];
        softmax_with_sink(&mut scores, 1000.0);
        assert_eq!(scores, [0.0; 2]);
    }

    #[test]
    fn softmax_survives_large_scores() {
        let mut scores = [1000.0, 1000.0];
        softmax(&mut scores);
        assert_eq!(scores, [0.5, 0.5]);
    }
}
