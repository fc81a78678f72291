//! Findings about what a plan says of itself: its certificate, and how replicas share tokens.

use std::collections::BTreeMap;

use berth_types::{DeviceId, ExpertId};

use super::Finding;
use crate::{
    num,
    plan::{Decision, Layout},
    problem::{Problem, Sharing},
};

/// The certificate's makespan follows from the layout and the loads, and is not below its bound.
pub(super) fn claims(problem: &Problem, layout: &Layout, decision: &Decision, found: &mut Vec<Finding>) {
    let speed =
        |id: &DeviceId| problem.devices.iter().find(|device| device.id == *id).map_or(1.0, |device| device.speed);
    let speeds: Vec<f64> = layout.devices.iter().map(|entry| speed(&entry.device)).collect();
    let (mut sum, mut layers) = (0.0, 0.0);
    let certificate = &decision.certificate;
    let weighted = decision.weights.last();
    for (layer, row) in &layout.layers {
        layers += 1.0;
        let tokens = problem.instance.loads.get(layer).map(Vec::as_slice).unwrap_or_default();
        let load = |expert: &ExpertId| num::real(tokens.get(num::index(expert.0)).copied().unwrap_or(0));
        let total: f64 = (0..problem.instance.geometry.experts).map(|expert| load(&ExpertId(expert))).sum();
        if total <= 0.0 {
            sum += 1.0;
            continue;
        }
        let mut copies: BTreeMap<ExpertId, u64> = BTreeMap::new();
        row.iter().flatten().for_each(|expert| *copies.entry(*expert).or_default() += 1);
        let share = |slot: usize| {
            let Some(Some(expert)) = row.get(slot) else { return 0.0 };
            match weighted {
                None => load(expert) / num::real(copies.get(expert).copied().unwrap_or(1)),
                Some(weights) => {
                    let weight = weights.get(layer).and_then(|row| row.get(slot)).copied().unwrap_or(0);
                    load(expert) * f64::from(weight) / 65_535.0
                }
            }
        };
        let times = layout.ranges().zip(&speeds).map(|((_, range), speed)| range.map(share).sum::<f64>() / speed);
        sum += times.fold(0.0, f64::max) / (total / speeds.iter().sum::<f64>());
    }
    let (said, is) = (certificate.makespan, if layers > 0.0 { sum / layers } else { 1.0 });
    if (said - is).abs() > 1e-6 * is {
        found.push(Finding::Claim { what: "the makespan", said: said.to_string(), found: is.to_string() });
    }
    if certificate.bound > is * (1.0 + 1e-9) {
        let found_at = format!("above the makespan {is}");
        found.push(Finding::Claim { what: "the bound", said: certificate.bound.to_string(), found: found_at });
    }
}

/// Every wave has weights when the plan says so, and only then: a row for each layer, a weight for each slot,
/// 0 in empty ones, and the weights of an expert sum to 65,535.
pub(super) fn weights(problem: &Problem, decision: &Decision, found: &mut Vec<Finding>) {
    if decision.sharing == Sharing::Weighted && problem.instance.sharing == Sharing::Even {
        found.push(Finding::Shape { what: "it weighs replicas, which the runner cannot".to_owned() });
    }
    let expected = if decision.sharing == Sharing::Weighted { decision.waves.len() } else { 0 };
    if decision.weights.len() != expected {
        let what = format!("weights for {} layouts, {expected} need some", decision.weights.len());
        found.push(Finding::Shape { what });
    }
    for (wave, (layout, weights)) in decision.waves.iter().zip(&decision.weights).enumerate() {
        if !weights.keys().eq(layout.layers.keys()) {
            let what = "its weights are of other layers".to_owned();
            found.push(Finding::Weights { wave, layer: None, what });
        }
        for (layer, row) in &layout.layers {
            let Some(weights) = weights.get(layer) else { continue };
            let mut wrong = |what| found.push(Finding::Weights { wave, layer: Some(*layer), what });
            if weights.len() != row.len() {
                wrong(format!("{} weights for {} slots", weights.len(), row.len()));
            }
            if row.iter().zip(weights).any(|(held, weight)| held.is_none() && *weight > 0) {
                wrong("an empty slot has a weight".to_owned());
            }
            let mut sums: BTreeMap<ExpertId, u64> = BTreeMap::new();
            for (expert, weight) in row.iter().zip(weights) {
                if let Some(expert) = expert {
                    *sums.entry(*expert).or_default() += u64::from(*weight);
                }
            }
            for (expert, sum) in sums.into_iter().filter(|(_, sum)| *sum != 65_535) {
                wrong(format!("the weights of expert {expert} sum to {sum}, not to 65535"));
            }
        }
    }
}
