//! The independent checker. It shares no code with what it checks: it reads the problem and the plan alone
//! and returns every finding, not the first. Only it makes a `Plan<Checked>`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use berth_types::{Bytes, DeviceId, ExpertId, LayerId};

use crate::{
    num,
    plan::{Certificate, Checked, Layout, Plan, Proposed},
    problem::{Device, Problem, Standing, Survive},
};

/// Something wrong with a plan.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Finding {
    /// The plan has no layout, or a revision that is not the problem's.
    Shape {
        /// What is wrong.
        what: String,
    },
    /// A layer is missing, extra, or has another number of slots than the devices.
    Row {
        /// Wave, from 0.
        wave: usize,
        /// The layer.
        layer: LayerId,
        /// What is wrong.
        what: String,
    },
    /// A device appears twice, is unknown, not allowed, or may not hold this.
    Device {
        /// Wave, from 0.
        wave: usize,
        /// The device.
        device: DeviceId,
        /// What is wrong.
        what: String,
    },
    /// An expert has no replica.
    Missing {
        /// Wave, from 0.
        wave: usize,
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
    },
    /// Two replicas of one expert share a device.
    Doubled {
        /// Wave, from 0.
        wave: usize,
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// The device.
        device: DeviceId,
    },
    /// The loss of one failure domain would leave an expert without a replica.
    Fragile {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// The failure domain.
        domain: String,
    },
    /// All of several copies are lost with one node although another has an empty slot.
    Gathered {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// The node.
        node: String,
    },
    /// The certificate says something else than the layout and the loads.
    Claim {
        /// What it speaks of.
        what: &'static str,
        /// What it says.
        said: String,
        /// What is so.
        found: String,
    },
    /// A device would hold more bytes than it has room for.
    Bytes {
        /// Wave, from 0.
        wave: usize,
        /// The device.
        device: DeviceId,
        /// Bytes at the peak of the move.
        peak: Bytes,
        /// Bytes it has room for.
        room: Bytes,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape { what } => write!(f, "plan: {what}"),
            Self::Row { wave, layer, what } => write!(f, "wave {wave}, layer {layer}: {what}"),
            Self::Device { wave, device, what } => write!(f, "wave {wave}, {device}: {what}"),
            Self::Missing { wave, layer, expert } => {
                write!(f, "wave {wave}, layer {layer}: expert {expert} has no replica")
            }
            Self::Doubled { wave, layer, expert, device } => {
                write!(f, "wave {wave}, layer {layer}: expert {expert} is twice on {device}")
            }
            Self::Fragile { layer, expert, domain } => {
                write!(f, "layer {layer}: expert {expert} lives in {domain} alone")
            }
            Self::Gathered { layer, expert, node } => {
                write!(f, "layer {layer}: all copies of expert {expert} are on {node} although another node has room")
            }
            Self::Claim { what, said, found } => write!(f, "certificate: {what} is {found}, not {said}"),
            Self::Bytes { wave, device, peak, room } => {
                write!(f, "wave {wave}, {device}: {peak} at the peak, room for {room}")
            }
        }
    }
}

/// A plan with everything that is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("the plan has {} finding(s), first: {}", findings.len(), findings.first().map(ToString::to_string).unwrap_or_default())]
pub struct Rejected {
    /// All findings, in order.
    pub findings: Vec<Finding>,
}

/// Checks `plan` against `problem` and `previous`, from which it was made.
///
/// # Errors
/// [`Rejected`] with all findings.
pub fn check(problem: &Problem, previous: Option<&Layout>, plan: Plan<Proposed>) -> Result<Plan<Checked>, Rejected> {
    let findings = findings(problem, previous, &plan);
    if findings.is_empty() { Ok(plan.checked()) } else { Err(Rejected { findings }) }
}

/// Everything that is wrong with `plan`.
#[must_use]
pub fn findings(problem: &Problem, previous: Option<&Layout>, plan: &Plan<Proposed>) -> Vec<Finding> {
    let decision = plan.decision();
    let mut found = Vec::new();
    if decision.waves.is_empty() {
        found.push(Finding::Shape { what: "it has no layout".to_owned() });
    }
    if decision.revision != problem.instance.revision || decision.name != problem.instance.name {
        let what = format!("it is {} revision {}", decision.name, decision.revision);
        found.push(Finding::Shape { what });
    }
    if decision.survives < problem.instance.survive && previous.is_none() {
        let what = format!("it survives the loss of {} only", decision.survives.as_str());
        found.push(Finding::Shape { what });
    }
    let mut before = pairs(problem.held.iter().chain(previous));
    for (wave, layout) in decision.waves.iter().enumerate() {
        rows(problem, layout, wave, &mut found);
        devices(problem, layout, wave, &before, &mut found);
        bytes(problem, layout, wave, &before, decision.waves.last(), &mut found);
        before = pairs(std::iter::once(layout));
    }
    if let Some(last) = decision.waves.last() {
        fragile(problem, last, decision.survives, &mut found);
        gathered(problem, last, decision.survives, &mut found);
        claims(problem, last, &decision.certificate, &mut found);
        choice(problem, last, previous.is_some(), &mut found);
    }
    found
}

type Pairs = BTreeMap<DeviceId, BTreeSet<(LayerId, ExpertId)>>;

fn each_slot(layout: &Layout) -> impl Iterator<Item = (&DeviceId, LayerId, ExpertId)> {
    layout.layers.iter().flat_map(|(layer, row)| {
        let owners =
            layout.devices.iter().flat_map(|entry| std::iter::repeat_n(&entry.device, num::index(entry.slots)));
        owners.zip(row).filter_map(|(device, expert)| Some((device, *layer, (*expert)?)))
    })
}

fn pairs<'a>(layouts: impl Iterator<Item = &'a Layout>) -> Pairs {
    let mut pairs = Pairs::new();
    for layout in layouts {
        for (device, layer, expert) in each_slot(layout) {
            pairs.entry(device.clone()).or_default().insert((layer, expert));
        }
    }
    pairs
}

/// Every layer is there with a slot for each slot of the devices, every expert is in it, none twice on a
/// device.
fn rows(problem: &Problem, layout: &Layout, wave: usize, found: &mut Vec<Finding>) {
    let geometry = &problem.instance.geometry;
    let width: usize = layout.devices.iter().map(|entry| num::index(entry.slots)).sum();
    let expected: BTreeSet<LayerId> = (geometry.dense_layers..geometry.layers).map(LayerId).collect();
    for layer in layout.layers.keys().filter(|layer| !expected.contains(layer)) {
        found.push(Finding::Row { wave, layer: *layer, what: "it has no experts in this model".to_owned() });
    }
    for layer in expected {
        let Some(row) = layout.layers.get(&layer) else {
            found.push(Finding::Row { wave, layer, what: "it is missing".to_owned() });
            continue;
        };
        if row.len() != width {
            let what = format!("{} slots, the devices have {width}", row.len());
            found.push(Finding::Row { wave, layer, what });
        }
        let present: BTreeSet<u32> = row.iter().flatten().map(|expert| expert.0).collect();
        for beyond in present.range(geometry.experts..) {
            let what = format!("expert {beyond} of {}", geometry.experts);
            found.push(Finding::Row { wave, layer, what });
        }
        let missing = (0..geometry.experts).filter(|expert| !present.contains(expert));
        found.extend(missing.map(|expert| Finding::Missing { wave, layer, expert: ExpertId(expert) }));
    }
    let mut seen = BTreeSet::new();
    for (device, layer, expert) in each_slot(layout) {
        if !seen.insert((device, layer, expert)) {
            found.push(Finding::Doubled { wave, layer, expert, device: device.clone() });
        }
    }
}

/// Every device is known, named once, and gets nothing new that it may not take.
fn devices(problem: &Problem, layout: &Layout, wave: usize, before: &Pairs, found: &mut Vec<Finding>) {
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
        match device.standing {
            Standing::Open => {}
            Standing::Gone => wrong("its replicas count as gone"),
            Standing::Frozen | Standing::Leaving if wanted.is_subset(held) => {}
            Standing::Frozen | Standing::Leaving => wrong("it may take nothing new"),
        }
    }
}

/// What a device holds before and after a wave fits on it together; in the end its transition room is free.
fn bytes(
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

/// No expert of the final layout lives in one failure domain alone.
fn fragile(problem: &Problem, layout: &Layout, level: Survive, found: &mut Vec<Finding>) {
    if level == Survive::Nothing {
        return;
    }
    let domain = |device: &Device| match level {
        Survive::Rack => device.rack.clone().unwrap_or_else(|| device.id.node().to_owned()),
        Survive::Node => device.id.node().to_owned(),
        Survive::Device | Survive::Nothing => device.id.to_string(),
    };
    let domains: BTreeMap<&DeviceId, String> =
        problem.devices.iter().map(|device| (&device.id, domain(device))).collect();
    let mut homes: BTreeMap<(LayerId, ExpertId), BTreeSet<&str>> = BTreeMap::new();
    for (device, layer, expert) in each_slot(layout) {
        if let Some(domain) = domains.get(device) {
            homes.entry((layer, expert)).or_default().insert(domain);
        }
    }
    for ((layer, expert), homes) in homes {
        if homes.len() < 2 {
            let domain = homes.first().copied().unwrap_or_default().to_owned();
            found.push(Finding::Fragile { layer, expert, domain });
        }
    }
}

/// Several copies of an expert are not on one node (in one rack, where the loss of a rack is survived) while
/// another has an empty slot.
fn gathered(problem: &Problem, layout: &Layout, level: Survive, found: &mut Vec<Finding>) {
    let level = if level == Survive::Rack { Survive::Rack } else { Survive::Node };
    let known: BTreeMap<&DeviceId, &str> =
        problem.devices.iter().map(|device| (&device.id, device.failure_domain(level))).collect();
    let domain = |id: &DeviceId| known.get(id).copied().unwrap_or_default();
    for (layer, row) in &layout.layers {
        let owners =
            layout.devices.iter().flat_map(|entry| std::iter::repeat_n(&entry.device, num::index(entry.slots)));
        let mut copies: BTreeMap<ExpertId, Vec<&str>> = BTreeMap::new();
        let mut empty = BTreeSet::new();
        for (device, held) in owners.zip(row) {
            match held {
                Some(expert) => copies.entry(*expert).or_default().push(domain(device)),
                None => _ = empty.insert(domain(device)),
            }
        }
        for (expert, nodes) in copies.into_iter().filter(|(_, nodes)| nodes.len() > 1) {
            let node = nodes.first().copied().unwrap_or_default();
            if nodes.iter().all(|other| *other == node) && empty.iter().any(|other| *other != node) {
                found.push(Finding::Gathered { layer: *layer, expert, node: node.to_owned() });
            }
        }
    }
}

/// The certificate's makespan follows from the layout and the loads, and is not below its bound.
fn claims(problem: &Problem, layout: &Layout, certificate: &Certificate, found: &mut Vec<Finding>) {
    let speed =
        |id: &DeviceId| problem.devices.iter().find(|device| device.id == *id).map_or(1.0, |device| device.speed);
    let speeds: Vec<f64> = layout.devices.iter().map(|entry| speed(&entry.device)).collect();
    let (mut sum, mut layers) = (0.0, 0.0);
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
        let share = |expert: &ExpertId| load(expert) / num::real(copies.get(expert).copied().unwrap_or(1));
        let times = layout.ranges().zip(&speeds).map(|((_, range), speed)| {
            row.get(range).unwrap_or_default().iter().flatten().map(share).sum::<f64>() / speed
        });
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

/// The final layout's devices are allowed, as many as granted, and not too many in one failure domain.
fn choice(problem: &Problem, layout: &Layout, repair: bool, found: &mut Vec<Finding>) {
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
