//! What experts will be asked for in the next load window, from those before. Keeps numbers only: whether
//! anything moves for it is decided elsewhere.
//!
//! Windows are noisy (few tokens per expert) and drift (the mixture of tasks walks), and both are common to
//! all layers: windows are mixtures of few tasks, so that they lie near a space of few dimensions, and what
//! leaves it is noise. The forecast is the last window projected on that space, plus multiples of its distances from
//! earlier windows of the same task, Σ b(j) · (x(w) − x(w − j)): the multiples that would have forecast the
//! windows seen so far best (least squares over all experts of all layers, older windows counting less, with a
//! ridge); plus a little of everything seen, because the next window may be another task's. After a task
//! switch, seen as a distance far beyond noise and drift, trends are of the windows after it only. All of it is a
//! sum of kept windows, whose weights follow from their products alone.

mod algebra;
#[cfg(test)]
mod tests;

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
const RIDGE: f64 = 0.2;
/// Windows below which noise cannot be told from what tasks do.
const FEW: usize = 4;
/// A direction counts whose length is this many times that of the shortest, which is noise.
const ABOVE: f64 = 2.0;
/// What the mean of all kept windows counts.
const CAUTION: f64 = 0.05;
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
        let with = |kept: &Kept| algebra::dot(&kept.shares, &shares);
        let mut products = vec![algebra::dot(&shares, &shares)];
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
        let mut expected = vec![0.0; last.shares.len()];
        for (kept, weight) in self.kept.iter().zip(self.weights()) {
            for (sum, share) in expected.iter_mut().zip(&kept.shares) {
                *sum += weight * share;
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

    /// What each kept window counts in the forecast, the oldest first.
    fn weights(&self) -> Vec<f64> {
        let Some(last) = self.kept.back() else { return Vec::new() };
        let smooth = self.smooth();
        let products = self.products(&smooth);
        let same = self.kept.iter().rev().take_while(|kept| kept.task == last.task).count();
        let lags = (1..=LAGS.min(same.saturating_sub(1))).rev();
        let trend = lags.into_iter().find_map(|lags| self.learn(lags, &products)).unwrap_or_default();
        let row = |back: usize| smooth.iter().rev().nth(back).map(Vec::as_slice).unwrap_or_default();
        let mut weights = row(0).to_vec();
        for (lag, multiple) in trend.iter().enumerate() {
            for ((weight, now), then) in weights.iter_mut().zip(row(0)).zip(row(lag + 1)) {
                *weight += multiple * (now - then);
            }
        }
        let all = 1.0 / num::real_size(self.kept.len());
        weights.iter().map(|weight| (1.0 - CAUTION) * weight + CAUTION * all).collect()
    }

    /// By kept window, the multiples of all kept windows whose sum is that window without noise: its projection
    /// on the directions in which windows differ by more than noise. The windows themselves while they are few.
    fn smooth(&self) -> Vec<Vec<f64>> {
        let size = self.kept.len();
        let unit = |at: usize| (0..size).map(|other| if at == other { 1.0 } else { 0.0 }).collect();
        if size < FEW {
            return (0..size).map(unit).collect();
        }
        let gram = (0..size).map(|one| (0..size).map(|other| self.product(one, other)).collect()).collect();
        let pairs = algebra::eigen(gram);
        let most = pairs.first().map_or(0.0, |(value, _)| *value);
        let noise = pairs.last().map_or(0.0, |(value, _)| value.max(most * 1e-12));
        let mut smooth = vec![vec![0.0; size]; size];
        for (at, (value, vector)) in pairs.iter().enumerate() {
            // The values are squares of lengths.
            if at > 0 && *value <= ABOVE * ABOVE * noise {
                break;
            }
            for (row, one) in smooth.iter_mut().zip(vector) {
                for (entry, other) in row.iter_mut().zip(vector) {
                    *entry += one * other;
                }
            }
        }
        smooth
    }

    /// Products of the smooth windows.
    fn products(&self, smooth: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let size = smooth.len();
        let half: Vec<Vec<f64>> = smooth
            .iter()
            .map(|row| {
                (0..size)
                    .map(|at| row.iter().enumerate().map(|(by, weight)| weight * self.product(by, at)).sum())
                    .collect()
            })
            .collect();
        half.iter().map(|row| smooth.iter().map(|other| algebra::dot(row, other)).collect()).collect()
    }

    /// Multiples of `lags` earlier windows, learnt from the windows that have as many before them.
    fn learn(&self, lags: usize, products: &[Vec<f64>]) -> Option<Vec<f64>> {
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
            let of = |one: usize, other: usize| products[at - one][at - other];
            // ⟨x(at − a) − x(at − b), x(at − c) − x(at − d)⟩
            let product = |a: usize, b: usize, c: usize, d: usize| of(a, c) - of(a, d) - of(b, c) + of(b, d);
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
        Some(algebra::eliminate(matrix, right))
    }

    fn product(&self, one: usize, other: usize) -> f64 {
        let (late, early) = (one.max(other), one.min(other));
        self.kept.get(late).and_then(|kept| kept.products.get(late - early)).copied().unwrap_or(0.0)
    }
}
