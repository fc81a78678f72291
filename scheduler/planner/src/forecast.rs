//! What experts will be asked for in the next load window, from those before. Keeps numbers only: whether
//! anything moves for it is decided elsewhere.
//!
//! Windows are noisy (few tokens per expert) and drift (the mixture of tasks walks), and both are common to
//! all layers. So the forecast is the last window plus multiples of its distances from earlier windows of the
//! same task, Σ b(j) · (x(w) − x(w − j)): a negative b smooths as exponential weights do, a positive one
//! follows a trend. The multiples are those that would have forecast the windows seen so far best (least
//! squares over all experts of all layers, older windows counting less, with a ridge). After a task switch,
//! seen as a distance far beyond noise and drift, only windows after it count, with the multiples learnt
//! before.

use std::collections::VecDeque;

use crate::num;

/// Tokens by layer and expert.
pub type Window = Vec<Vec<f64>>;

/// Windows remembered.
const KEPT: usize = 16;
/// Earlier windows that the forecast may use.
const LAGS: usize = 3;
/// What a window counts beside the next one in learning.
const FADE: f64 = 0.8;
/// Ridge, as a share of the mean diagonal.
const RIDGE: f64 = 0.02;
/// A window this many times further from the last than noise and drift explain is another task's.
const SWITCH: f64 = 2.5;
/// Drift that every task may have from window to window, as a share of the tokens.
const DRIFT: f64 = 0.02;

/// Sum of drift, as a share of the tokens, after which the loads count as changed.
const CHANGED: f64 = 0.1;
/// Most windows that anything is expected to last.
const LONGEST: f64 = 64.0;

/// A number that is no load.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error(
    "layer {layer}, expert {expert}: load {value} is no count of tokens; the last good window stands in for the layer"
)]
pub struct BadLoad {
    /// Layer, from the first expert layer.
    pub layer: usize,
    /// The expert.
    pub expert: usize,
    /// What was reported; absent counts as not a number.
    pub value: f64,
}

/// Load windows as they were seen, and what they say of the next.
#[derive(Clone, Debug, Default)]
pub struct Forecast {
    experts: Vec<usize>,
    kept: VecDeque<Kept>,
    /// Tokens of the last window by layer.
    totals: Vec<f64>,
    /// Distance between neighbouring windows of one task, smoothed.
    calm: Option<f64>,
    /// Distance that Poisson noise alone explains, smoothed.
    noise: f64,
    task: usize,
}

#[derive(Clone, Debug)]
struct Kept {
    /// Share of its layer's tokens by layer and expert, one after the other.
    shares: Vec<f64>,
    /// Products with the windows kept before it, the nearest first, itself at 0.
    products: Vec<f64>,
    task: usize,
}

impl Forecast {
    /// Nothing seen yet, `experts` by layer.
    #[must_use]
    pub fn new(experts: Vec<usize>) -> Self {
        Self { totals: vec![0.0; experts.len()], experts, ..Self::default() }
    }

    /// Windows seen and remembered.
    #[must_use]
    pub fn windows(&self) -> usize {
        self.kept.len()
    }

    /// Whether the last window was the first of another task.
    #[must_use]
    pub fn switched(&self) -> bool {
        let task = |back: usize| self.kept.iter().rev().nth(back).map(|kept| kept.task);
        task(1).is_some() && task(0) != task(1)
    }

    /// Notes a window. A layer with a number that is no load counts as in the last window; each such number
    /// is named.
    pub fn observe(&mut self, window: &[Vec<f64>]) -> Vec<BadLoad> {
        let mut bad = Vec::new();
        let mut shares = Vec::with_capacity(self.experts.iter().sum());
        let (mut noise, mut live, mut from) = (0.0, 0.0, 0);
        for (layer, experts) in self.experts.iter().copied().enumerate() {
            let row = window.get(layer).map(Vec::as_slice).unwrap_or_default();
            let value = |expert: usize| row.get(expert).copied().unwrap_or(f64::NAN);
            let found = bad.len();
            let fault = |expert: &usize| !value(*expert).is_finite() || value(*expert) < 0.0;
            bad.extend((0..experts).filter(fault).map(|expert| BadLoad { layer, expert, value: value(expert) }));
            let total: f64 = if bad.len() == found { row.iter().take(experts).sum() } else { 0.0 };
            if bad.len() > found {
                let last = self.kept.back().and_then(|kept| kept.shares.get(from..from + experts));
                shares.extend_from_slice(last.unwrap_or(&vec![0.0; experts]));
            } else {
                self.totals[layer] = total;
                shares.extend((0..experts).map(|expert| if total > 0.0 { value(expert) / total } else { 0.0 }));
            }
            if total > 0.0 {
                // Half the mean distance of two Poisson counts of mean n is 0.564 sqrt(n).
                noise += (0..experts).map(|expert| 0.564 * value(expert).sqrt()).sum::<f64>() / total;
                live += 1.0;
            }
            from += experts;
        }
        self.keep(shares, if live > 0.0 { noise / live } else { 0.0 }, live);
        bad
    }

    fn keep(&mut self, shares: Vec<f64>, noise: f64, live: f64) {
        if let (Some(last), true) = (self.kept.back(), live > 0.0) {
            let apart: f64 = last.shares.iter().zip(&shares).map(|(one, other)| (one - other).abs()).sum();
            let distance = apart / 2.0 / live;
            let explained = (noise + DRIFT).max(self.calm.unwrap_or(0.0));
            if distance > SWITCH * explained {
                self.task += 1;
            } else {
                self.noise = self.calm.map_or(noise, |_| 0.7 * self.noise + 0.3 * noise);
                self.calm = Some(self.calm.map_or(distance, |calm| 0.7 * calm + 0.3 * distance));
            }
        }
        let with = |kept: &Kept| dot(&kept.shares, &shares);
        let mut products = vec![dot(&shares, &shares)];
        products.extend(self.kept.iter().rev().map(with));
        self.kept.push_back(Kept { shares, products, task: self.task });
        while self.kept.len() > KEPT {
            self.kept.pop_front();
        }
    }

    /// Windows for which the loads are expected to stay what they are now: until drift, noise taken off, sums to
    /// a tenth of the tokens, or the next task switch at the pace of those seen. From 1 to 64. Times the
    /// length of a window it is `Payback::lasts_s`.
    #[must_use]
    pub fn lasts(&self) -> f64 {
        let pairs = num::real_size(self.kept.len().saturating_sub(1));
        let switches = self.kept.iter().zip(self.kept.iter().skip(1)).filter(|(one, other)| one.task != other.task);
        let switching = num::real_size(switches.count()) / pairs.max(1.0);
        let calm = self.calm.unwrap_or(0.0);
        let drift = (calm * calm - self.noise * self.noise).max(0.0).sqrt();
        (1.0 / (drift / CHANGED + switching).max(1e-9)).clamp(1.0, LONGEST)
    }

    /// The loads expected next, in tokens of the last window; `None` before the first. A layer that had no
    /// load in the last window is all zero.
    #[must_use]
    pub fn expect(&self) -> Option<Window> {
        let last = self.kept.back()?;
        let weights = self.weights();
        let mut expected = last.shares.clone();
        for (lag, weight) in weights.iter().enumerate() {
            let Some(earlier) = self.kept.iter().rev().nth(lag + 1) else { break };
            for ((sum, now), then) in expected.iter_mut().zip(&last.shares).zip(&earlier.shares) {
                *sum += weight * (now - then);
            }
        }
        let mut from = 0;
        let layer = |(experts, total): (&usize, &f64)| {
            let row = expected.get(from..from + experts).unwrap_or_default();
            from += experts;
            let sum: f64 = row.iter().map(|share| share.max(0.0)).sum();
            row.iter().map(|share| if sum > 0.0 { share.max(0.0) / sum * total } else { 0.0 }).collect()
        };
        Some(self.experts.iter().zip(&self.totals).map(layer).collect())
    }

    /// The loads expected next, in whole tokens.
    #[must_use]
    pub fn tokens(&self) -> Option<Vec<Vec<u64>>> {
        let tokens = |row: Vec<f64>| row.into_iter().map(|load| num::count(num::ceil(load - 0.5))).collect();
        Some(self.expect()?.into_iter().map(tokens).collect())
    }

    /// The multiples b, by lag from 1.
    fn weights(&self) -> Vec<f64> {
        let Some(last) = self.kept.back() else { return Vec::new() };
        let same = self.kept.iter().rev().take_while(|kept| kept.task == last.task).count();
        (1..=LAGS.min(same.saturating_sub(1))).rev().find_map(|lags| self.learn(lags)).unwrap_or_default()
    }

    /// Multiples of `lags` earlier windows, learnt from the windows that have as many before them.
    fn learn(&self, lags: usize) -> Option<Vec<f64>> {
        let mut matrix = vec![vec![0.0; lags]; lags];
        let mut right = vec![0.0; lags];
        let mut any = false;
        for at in lags + 1..self.kept.len() {
            let task = |back: usize| self.kept.get(at - back).map(|kept| kept.task);
            if task(0) != task(lags + 1) {
                continue;
            }
            any = true;
            let fade = FADE.powf(num::real_size(self.kept.len() - 1 - at));
            // ⟨x(at − a) − x(at − b), x(at − c) − x(at − d)⟩
            let product = |a: usize, b: usize, c: usize, d: usize| {
                self.product(at - a, at - c) - self.product(at - a, at - d) - self.product(at - b, at - c)
                    + self.product(at - b, at - d)
            };
            for (one, (row, right)) in matrix.iter_mut().zip(&mut right).enumerate() {
                *right += fade * product(1, 2 + one, 0, 1);
                for (other, entry) in row.iter_mut().enumerate() {
                    *entry += fade * product(1, 2 + one, 1, 2 + other);
                }
            }
        }
        let mean = (0..lags).map(|at| matrix[at][at]).sum::<f64>() / num::real_size(lags);
        if !any || mean <= 0.0 {
            return None;
        }
        for (at, row) in matrix.iter_mut().enumerate() {
            row[at] += RIDGE * mean;
        }
        Some(eliminate(matrix, right))
    }

    fn product(&self, one: usize, other: usize) -> f64 {
        let (late, early) = (one.max(other), one.min(other));
        self.kept.get(late).and_then(|kept| kept.products.get(late - early)).copied().unwrap_or(0.0)
    }
}

fn dot(one: &[f64], other: &[f64]) -> f64 {
    // Four sums at once: the order of additions is fixed, and the processor need not wait for each.
    let (heads, tail) = one.as_chunks::<4>();
    let (others, rest) = other.as_chunks::<4>();
    let mut sums = [0.0; 4];
    for (one, other) in heads.iter().zip(others) {
        for (sum, (one, other)) in sums.iter_mut().zip(one.iter().zip(other)) {
            *sum += one * other;
        }
    }
    sums.iter().sum::<f64>() + tail.iter().zip(rest).map(|(one, other)| one * other).sum::<f64>()
}

/// Solves a small system with a positive diagonal.
fn eliminate(mut matrix: Vec<Vec<f64>>, mut right: Vec<f64>) -> Vec<f64> {
    let size = right.len();
    for pivot in 0..size {
        for row in pivot + 1..size {
            let factor = matrix[row][pivot] / matrix[pivot][pivot];
            let above = matrix[pivot].clone();
            for (entry, above) in matrix[row].iter_mut().zip(above) {
                *entry -= factor * above;
            }
            right[row] -= factor * right[pivot];
        }
    }
    let mut solution = vec![0.0; size];
    for row in (0..size).rev() {
        let known: f64 = (row + 1..size).map(|at| matrix[row][at] * solution[at]).sum();
        solution[row] = (right[row] - known) / matrix[row][row];
    }
    solution
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(windows: &[Vec<f64>]) -> Forecast {
        let mut forecast = Forecast::new(vec![windows[0].len()]);
        for window in windows {
            assert_eq!(forecast.observe(std::slice::from_ref(window)), vec![]);
        }
        forecast
    }

    #[test]
    fn windows_that_are_alike_are_expected_again() {
        let window = vec![600.0, 300.0, 100.0];
        let expected = seen(&vec![window.clone(); 5]).expect().unwrap().remove(0);
        assert!(expected.iter().zip(&window).all(|(one, other)| (one - other).abs() < 1e-6), "{expected:?}");
        assert_eq!(seen(&[window]).tokens().unwrap(), vec![vec![600, 300, 100]]);
    }

    #[test]
    fn a_steady_trend_is_followed() {
        let window = |at: u32| (0..40).map(|e| 5000.0 + f64::from(at) * f64::from(e - 20) * 8.0).collect::<Vec<_>>();
        let expected = seen(&(0..8).map(window).collect::<Vec<_>>()).expect().unwrap().remove(0);
        let (now, next) = (window(7), window(8));
        let miss = |of: &[f64]| of.iter().zip(&next).map(|(one, other)| (one - other).abs()).sum::<f64>();
        assert!(miss(&expected) < 0.3 * miss(&now), "{} of {}", miss(&expected), miss(&now));
    }

    #[test]
    fn noise_is_smoothed() {
        let noise = |at: u32, e: u32| f64::from((at * 7919 + e * 104_729 + at * e * 31) % 101) - 50.0;
        let window = |at: u32| (0..200).map(|e| 1000.0 + noise(at, e)).collect::<Vec<_>>();
        let windows: Vec<_> = (0..10).map(window).collect();
        let miss = |of: &[f64]| of.iter().map(|load| (load - 1000.0).abs()).sum::<f64>();
        let expected = seen(&windows).expect().unwrap().remove(0);
        assert!(miss(&expected) < 0.9 * miss(&windows[9]), "{} of {}", miss(&expected), miss(&windows[9]));
    }

    #[test]
    fn a_task_switch_forgets_the_task_before() {
        let calm = vec![900.0, 50.0, 50.0];
        let mut forecast = seen(&vec![calm; 4]);
        assert!(!forecast.switched());
        forecast.observe(&[vec![50.0, 50.0, 900.0]]);
        assert!(forecast.switched());
        assert_eq!(forecast.tokens().unwrap(), vec![vec![50, 50, 900]]);
    }

    #[test]
    fn what_lasts_is_longer_the_calmer_the_loads() {
        let window = |at: u32, drift: u32| {
            (0..40).map(|e| f64::from(50_000 + at * drift * if e % 2 == 0 { 2 } else { 0 })).collect::<Vec<_>>()
        };
        let lasts = |drift| seen(&(0..8).map(|at| window(at, drift)).collect::<Vec<_>>()).lasts();
        assert!(
            lasts(0) > 60.0 && lasts(4000) < lasts(0) && lasts(40_000) < lasts(4000),
            "{} {}",
            lasts(4000),
            lasts(40_000)
        );
        let mut forecast = seen(&vec![vec![900.0, 50.0, 50.0]; 4]);
        let before = forecast.lasts();
        forecast.observe(&[vec![50.0, 50.0, 900.0]]);
        assert!(forecast.lasts() <= 4.0 && before > 4.0, "one switch in four windows");
    }

    #[test]
    fn what_is_no_load_is_named_and_the_last_good_window_stands_in() {
        let mut forecast = seen(&[vec![600.0, 300.0, 100.0]]);
        let bad = forecast.observe(&[vec![1.0, f64::NAN, -3.0]]);
        assert_eq!(bad.iter().map(|bad| (bad.layer, bad.expert)).collect::<Vec<_>>(), vec![(0, 1), (0, 2)]);
        assert!(bad[1].to_string().contains("layer 0, expert 2: load -3"), "{}", bad[1]);
        assert_eq!(forecast.tokens().unwrap(), vec![vec![600, 300, 100]]);
        assert_eq!(forecast.observe(&[]).len(), 3, "an absent layer counts as not a number");
    }

    #[test]
    fn nothing_seen_is_nothing_expected() {
        assert_eq!(Forecast::new(vec![3]).expect(), None);
        assert_eq!(seen(&[vec![0.0; 3]]).tokens().unwrap(), vec![vec![0, 0, 0]]);
    }
}
