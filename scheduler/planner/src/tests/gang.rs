//! Which devices, against every choice there is on tiny fleets.

use std::collections::{BTreeMap, BTreeSet};

use berth_types::{Bytes, DeviceId};
use proptest::prelude::*;

use super::fixtures::{device, problem};
use crate::{Device, Effort, Problem, Survive, solve};

/// Up to seven devices on three nodes and three interconnect domains, unlike in memory and speed.
fn any_tiny() -> impl Strategy<Value = Problem> {
    let one = (0_usize..3, 1_u64..5, any::<bool>(), 0_usize..3);
    let fleet = prop::collection::vec(one, 1..8);
    (fleet, 2_u32..12, 1_u32..6, prop::option::of(30_u32..101)).prop_map(|(fleet, experts, wanted, blast)| {
        let device = |(at, (node, slots, fast, domain)): (usize, (usize, u64, bool, usize))| {
            let mut device = device(&format!("node-{node}/0000:{at:02x}:00.0"));
            device.memory = Bytes(slots);
            device.speed = if fast { 1.0 } else { 0.45 };
            device.domain = Some(format!("fabric-{domain}"));
            device
        };
        let mut devices: Vec<Device> = fleet.into_iter().enumerate().map(device).collect();
        devices.sort_by(|one, other| one.id.cmp(&other.id));
        let mut problem = problem(experts, devices);
        let bytes = problem.instance.expert_bytes(problem.devices[0].vendor).get() * 3;
        problem
            .devices
            .iter_mut()
            .for_each(|device| device.memory = Bytes(bytes * (device.memory.get() + 1) * 100 / 91));
        problem.instance.devices = Some(wanted);
        problem.instance.blast_radius_percent = blast;
        problem.effort = Effort::FAST;
        problem
    })
}

/// Whether an instance may span exactly these devices.
fn suits(problem: &Problem, chosen: &[&Device]) -> bool {
    let mut nodes: BTreeMap<&str, usize> = BTreeMap::new();
    chosen.iter().for_each(|device| *nodes.entry(device.failure_domain(Survive::Node)).or_default() += 1);
    let percent = usize::try_from(problem.instance.blast_radius_percent.unwrap_or(100)).unwrap();
    let slots: usize = chosen.iter().map(|device| problem.instance.capacity(device, chosen.len())).sum();
    nodes.values().all(|count| count * 100 <= chosen.len() * percent)
        && chosen.iter().all(|device| problem.instance.capacity(device, chosen.len()) > 0)
        && slots >= usize::try_from(problem.instance.geometry.experts).unwrap()
}

/// What an instance on these devices breaks into: interconnect domains, and how many devices those have. All that is left
/// in them is scattered; every other domain stays whole for whoever needs one.
fn broken(problem: &Problem, chosen: &[&Device]) -> (usize, usize) {
    let domains: BTreeSet<_> = chosen.iter().map(|device| &device.domain).collect();
    let usable = |device: &&Device| problem.instance.capacity(device, problem.devices.len()) > 0;
    let devices = problem.devices.iter().filter(usable).filter(|device| domains.contains(&device.domain)).count();
    (domains.len(), devices)
}

/// Every choice of as many devices as wanted that suits.
fn choices(problem: &Problem) -> Vec<Vec<&Device>> {
    let wanted = problem.instance.devices.unwrap();
    let sets = (0_u32..1 << problem.devices.len()).filter(|set| set.count_ones() == wanted);
    let of = |set: u32| {
        problem.devices.iter().enumerate().filter(|(at, _)| set & (1 << at) != 0).map(|(_, device)| device).collect()
    };
    sets.map(of).filter(|chosen: &Vec<&Device>| suits(problem, chosen)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn devices_are_found_exactly_when_some_choice_suits(problem in any_tiny()) {
        let all = choices(&problem);
        match solve(&problem, None) {
            Err(error) => prop_assert!(all.is_empty(), "{} suit: {}", all.len(), error),
            Ok(plan) => {
                let used: Vec<&DeviceId> = plan.first().unwrap().devices.iter().map(|entry| &entry.device).collect();
                let chosen: Vec<&Device> = problem.devices.iter().filter(|device| used.contains(&&device.id)).collect();
                prop_assert!(all.contains(&chosen), "{:?} is no choice that suits", used);
                let least = all.iter().map(|choice| broken(&problem, choice)).min().unwrap();
                let broken = broken(&problem, &chosen);
                prop_assert!(broken <= least, "{:?} breaks {:?} (domains, devices in them), {:?} would do", used, broken, least);
            }
        }
    }
}
