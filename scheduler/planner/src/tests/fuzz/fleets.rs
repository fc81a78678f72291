//! Wild fleets and instances, and what may happen to them between two plans.

use std::collections::{BTreeMap, BTreeSet};

use berth_types::{Bytes, Vendor, WeightFormat};

use super::{super::fixtures, draw::Draw};
use crate::{Device, Effort, Goal, Payback, Problem, Sharing, Standing, Survive, num};

const SPEEDS: [f64; 6] = [1.0, 1.0, 0.7, 0.45, 3.0, 0.05];
const FORMATS: [WeightFormat; 3] = [WeightFormat::Bf16, WeightFormat::Int8PerRow, WeightFormat::Mxfp4];

/// A fleet and an instance. Sizes run from one device to 320; a third have fewer slots than they need.
pub(super) fn any(draw: &mut Draw) -> Problem {
    let large = draw.one_in(12);
    let experts = if large { 384 } else { draw.pick(&[1, 2, 3, 8, 16, 24, 64, 128]) };
    let mut problem = fixtures::problem(num::small(experts), Vec::new());
    let instance = &mut problem.instance;
    instance.geometry.layers = num::small(draw.size(2, if large { 3 } else { 5 }));
    instance.cross_vendor = draw.one_in(2);
    for vendor in [Vendor::Nvidia, Vendor::Ascend] {
        if draw.one_in(3) {
            instance.formats.insert(vendor, draw.pick(&FORMATS));
        }
    }
    instance.survive = draw.pick(&[
        Survive::Nothing,
        Survive::Nothing,
        Survive::Nothing,
        Survive::Device,
        Survive::Node,
        Survive::Rack,
    ]);
    let most = if large { 320 } else { draw.pick(&[1, 2, 4, 9, 16, 33]) };
    problem.devices = devices(draw, &problem, most);
    wishes(draw, &mut problem);
    loads(draw, &mut problem);
    problem
}

/// Pools of up to `most` devices with about as many slots as the instance needs.
fn devices(draw: &mut Draw, problem: &Problem, most: usize) -> Vec<Device> {
    let instance = &problem.instance;
    let experts = num::index(instance.geometry.experts) * instance.survive.copies();
    let roomy = draw.pick(&[0.6, 1.0, 1.0, 1.1, 1.3, 2.0, 4.0]);
    let mut devices: Vec<Device> = Vec::new();
    let mut node = 0;
    while devices.len() < most {
        let (vendor, speed) = (draw.pick(&[Vendor::Nvidia, Vendor::Nvidia, Vendor::Ascend]), draw.pick(&SPEEDS));
        let (each, racks, fabric) = (draw.pick(&[1, 2, 4, 8]), draw.one_in(2), draw.one_in(3));
        let even = num::real_size(experts) * roomy / num::real_size(most);
        let slots = num::count(num::ceil(even * draw.pick(&[0.5, 1.0, 1.0, 1.5])).max(1));
        let layers = u64::from(instance.geometry.expert_layers());
        let expert = instance.expert_bytes(vendor).get();
        let computes = if draw.one_in(12) { vec![draw.pick(&FORMATS)] } else { Vec::new() };
        for _ in 0..draw.size(1, 20) {
            for at in 0..each {
                let (nvidia, ascend) =
                    (format!("n{node:03}/0000:{at:02x}:00.0"), format!("n{node:03}/{}.{}", at / 2, at % 2));
                let mut device = fixtures::device(if vendor == Vendor::Nvidia { &nvidia } else { &ascend });
                device.vendor = vendor;
                device.memory = Bytes((expert * (layers * slots + 1)).div_ceil(90) * 100);
                device.speed = speed;
                device.degraded = draw.one_in(20);
                device.computes.clone_from(&computes);
                device.rack = racks.then(|| format!("rack-{}", node / 3));
                device.domain = fabric.then(|| format!("fabric-{}", node / 4));
                device.card = if vendor == Vendor::Ascend { format!("{}", at / 2) } else { String::new() };
                devices.push(device);
            }
            node += 1;
        }
    }
    devices.truncate(most);
    devices.sort_by(|one, other| one.id.cmp(&other.id));
    devices
}

/// What the instance asks for, beyond its experts.
fn wishes(draw: &mut Draw, problem: &mut Problem) {
    let all = problem.devices.len();
    let instance = &mut problem.instance;
    let some =
        |draw: &mut Draw, of: usize, from: usize, to: usize| draw.one_in(of).then(|| num::small(draw.size(from, to)));
    instance.devices = some(draw, 3, 1, all + 1);
    instance.granted = some(draw, 6, 0, all);
    instance.blast_radius_percent = some(draw, 5, 0, 100);
    instance.extra_replicas = draw.pick(&[0, 0, 1, 7, 64, u32::MAX]);
    instance.sharing = draw.pick(&[Sharing::Even, Sharing::Even, Sharing::Weighted]);
    problem.seed = num::count(draw.size(0, 9));
    problem.threads = draw.size(0, 3);
    problem.effort =
        draw.pick(&[Effort::FAST, Effort::FAST, Effort { units: 0, close: 0.0 }, Effort { units: 1, close: 0.5 }]);
}

/// New loads: a task switch, dead layers, no record of some, rows of another length, nothing at all.
pub(super) fn loads(draw: &mut Draw, problem: &mut Problem) {
    let experts = num::index(problem.instance.geometry.experts);
    let mut loads = BTreeMap::new();
    if !draw.one_in(8) {
        for layer in problem.instance.geometry.expert_layer_ids() {
            let mut tokens = draw.tokens(experts);
            match draw.size(0, 19) {
                0 => continue,
                1 => tokens.truncate(experts / 2),
                2 => tokens.extend([9, 9, 9]),
                3 => tokens.fill(0),
                _ => {}
            }
            loads.insert(layer, tokens);
        }
    }
    problem.instance.loads = loads;
}

/// What happens before the next plan. Says whether anything but loads and budgets changed.
pub(super) fn change(draw: &mut Draw, problem: &mut Problem) -> bool {
    if draw.one_in(2) {
        loads(draw, problem);
    }
    problem.goal = match draw.size(0, 3) {
        0 => Goal::Repair,
        1 => Goal::Rebalance { moves: None, bytes: None },
        2 => Goal::Rebalance { moves: Some(num::small(draw.pick(&[0, 1, 5, 40]))), bytes: None },
        _ => Goal::Rebalance { moves: None, bytes: Some(Bytes(draw.pick(&[0, 1, 50_000, 1_000_000]))) },
    };
    problem.payback.lasts_s = draw.pick(&[600.0, 600.0, 1e9, 0.0, -1.0, f64::NAN]);
    problem.payback.bytes_per_s = draw.pick(&[Payback::default().bytes_per_s, 0.0, f64::INFINITY]);
    let fleet = draw.one_in(2);
    if fleet {
        move_fleet(draw, problem);
    }
    let asks = draw.one_in(8);
    if asks {
        wishes(draw, problem);
    }
    fleet || asks
}

/// A node or a device is lost, drained, silent for a moment, or back; becomes slower or fuller; is gone from the list.
fn move_fleet(draw: &mut Draw, problem: &mut Problem) {
    let nodes: Vec<String> =
        problem.devices.iter().map(|device| device.id.node().to_owned()).collect::<BTreeSet<_>>().into_iter().collect();
    if nodes.is_empty() {
        return;
    }
    for _ in 0..draw.size(1, 3) {
        let node = nodes[draw.size(0, nodes.len() - 1)].clone();
        let standing = draw.pick(&[
            Standing::Gone,
            Standing::Gone,
            Standing::Leaving,
            Standing::Frozen,
            Standing::Open,
            Standing::Open,
        ]);
        let whole = draw.one_in(2);
        let speed = draw.pick(&SPEEDS);
        let kind = draw.size(0, 9);
        let fuller = draw.size(0, 40);
        let mut devices: Vec<&mut Device> =
            problem.devices.iter_mut().filter(|device| device.id.node() == node).collect();
        if !whole {
            let only = draw.size(0, devices.len().max(1) - 1);
            devices = devices.into_iter().skip(only).take(1).collect();
        }
        for device in devices {
            match kind {
                0 => device.speed = speed,
                1 => device.committed = device.memory.scaled(num::count(fuller), 100),
                2 => device.degraded = !device.degraded,
                _ => device.standing = standing,
            }
        }
        if kind == 3 && draw.one_in(3) {
            problem.devices.retain(|device| device.id.node() != node);
        }
    }
}
