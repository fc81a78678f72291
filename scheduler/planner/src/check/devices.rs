//! Findings about devices: what they may take, what fits on them, which an instance may have.

use std::collections::{BTreeMap, BTreeSet};

use berth_types::Bytes;

use super::{Finding, Pairs, pairs};
use crate::{
    num,
    plan::Layout,
    problem::{Device, Problem, Standing, Survive},
};

/// Every device is known, named once, and gets nothing new that it may not take.
pub(super) fn devices(problem: &Problem, layout: &Layout, wave: usize, before: &Pairs, found: &mut Vec<Finding>) {
    let now = pairs(std::iter::once(layout));
    let none = BTreeSet::new();
    let mut seen = BTreeSet::new();
    for entry in &layout.devices {
        let mut wrong = |what: &str| {
            found.push(Finding::Device { wave, device: entry.device.clone(), what: what.to_owned() });
        };
        if !seen.insert(&entry.device) {
            wrong("it is named twice");
        }
        let Some(device) = problem.devices.iter().find(|device| device.id == entry.device) else {
            wrong("it is not known");
            continue;
        };
        let held = before.get(&entry.device).unwrap_or(&none);
        let wanted = now.get(&entry.device).unwrap_or(&none);
        let format = problem.instance.formats.get(&device.vendor).unwrap_or(&problem.instance.geometry.format);
        if !device.computes.is_empty() && !device.computes.contains(format) && !wanted.is_subset(held) {
            wrong("it does not compute with the experts' format");
        }
        match device.standing {
            Standing::Open => {}
            Standing::Gone => wrong("its replicas count as gone"),
            Standing::Frozen | Standing::Leaving if wanted.is_subset(held) => {}
            Standing::Frozen | Standing::Leaving => wrong("it may take nothing new"),
        }
    }
}

/// What a device holds before and after a wave fits on it together; in the end its transition room is free.
pub(super) fn bytes(
    problem: &Problem,
    layout: &Layout,
    wave: usize,
    before: &Pairs,
    last: Option<&Layout>,
    found: &mut Vec<Finding>,
) {
    let span = num::count(last.map_or(1, |last| last.devices.len()).max(1));
    let share = Bytes(problem.instance.reserve.get().div_ceil(span));
    let none = BTreeSet::new();
    for (id, wanted) in pairs(std::iter::once(layout)) {
        let Some(device) = problem.devices.iter().find(|device| device.id == id) else { continue };
        let held = before.get(&id).unwrap_or(&none);
        let expert = problem.instance.expert_bytes(device.vendor);
        let peak = expert.times(num::count(held.union(&wanted).count()));
        let room = device.memory.scaled(92, 100).minus(device.workspace).minus(share).minus(device.committed);
        // What is already there cannot be refused; what is added must fit.
        if peak > room && !wanted.is_subset(held) {
            found.push(Finding::Bytes { wave, device: id, peak, room });
        }
    }
}

/// The final layout's devices are allowed, as many as granted, and not too many in one failure domain.
pub(super) fn choice(problem: &Problem, layout: &Layout, repair: bool, found: &mut Vec<Finding>) {
    let instance = &problem.instance;
    let wave = 0;
    let used: Vec<&Device> = layout
        .devices
        .iter()
        .filter_map(|entry| problem.devices.iter().find(|device| device.id == entry.device))
        .collect();
    for device in &used {
        let mut wrong = |what: String| found.push(Finding::Device { wave, device: device.id.clone(), what });
        if !instance.vendors.is_empty() && !instance.vendors.contains(&device.vendor) {
            wrong(format!("vendor {} is not allowed", device.vendor));
        }
        if !instance.products.is_empty() && !instance.products.contains(&device.product) {
            wrong(format!("product {:?} is not allowed", device.product));
        }
        if device.standing == Standing::Leaving {
            wrong("it is being drained".to_owned());
        }
        if !instance.cross_vendor && used.first().is_some_and(|first| first.vendor != device.vendor) {
            wrong("the instance may not span vendors".to_owned());
        }
    }
    if let Some(granted) = instance.granted.filter(|granted| num::index(*granted) < used.len()) {
        found.push(Finding::Shape { what: format!("{} devices are used, {granted} granted", used.len()) });
    }
    let level = if instance.survive == Survive::Rack { Survive::Rack } else { Survive::Node };
    if let (Some(percent), false) = (instance.blast_radius_percent, repair) {
        let mut domains: BTreeMap<&str, usize> = BTreeMap::new();
        for device in &used {
            *domains.entry(device.failure_domain(level)).or_default() += 1;
        }
        for (domain, count) in domains {
            if count * 100 > used.len() * num::index(percent) {
                let what = format!("{count} of {} devices are in {domain}, {percent} % allowed", used.len());
                found.push(Finding::Shape { what });
            }
        }
    }
}
