//! The devices that instances may be placed on, and how many of them an instance needs. Pure: no client,
//! no clock. The scheduler decides which devices; this only keeps the queue from granting what cannot be.

use std::collections::BTreeMap;

use berth_crds::{
    AcceleratorNode, ModelProfileSpec,
    model_deployment::{DeviceChoice, Redundancy, Survive},
};
use berth_types::{Admission, Bytes, DeviceMemory, Health, Vendor, WeightFormat};

/// One device that new replicas may go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FleetDevice {
    /// Who makes it.
    pub vendor: Vendor,
    /// Product as its node reports it.
    pub product: String,
    /// Memory on the device.
    pub memory: Bytes,
    /// Weight formats that its kernels compute with; none = not said, as if all.
    pub computes: Vec<WeightFormat>,
    /// Its node.
    pub node: String,
    /// Its rack; the node's name where none is known.
    pub rack: String,
}

/// Why no number of devices is enough.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// What is, what is needed, what the reader may do.
    pub message: String,
}

/// The devices of `nodes` that new replicas may go to, in order of node and device.
#[must_use]
pub fn schedulable<'a>(nodes: impl IntoIterator<Item = &'a AcceleratorNode>) -> Vec<FleetDevice> {
    let mut devices: Vec<_> = nodes.into_iter().flat_map(of_node).collect();
    devices.sort_by(|a, b| a.0.cmp(&b.0));
    devices.into_iter().map(|(_, device)| device).collect()
}

fn of_node(node: &AcceleratorNode) -> Vec<(String, FleetDevice)> {
    let (Some(name), Some(status)) = (node.metadata.name.as_ref(), node.status.as_ref()) else { return Vec::new() };
    let unreachable = status.conditions.iter().any(|c| c.type_ == "Reachable" && c.status == "False");
    if !node.spec.native || node.spec.drain || unreachable {
        return Vec::new();
    }
    let rack = if node.spec.rack.is_empty() { name } else { &node.spec.rack };
    let free = |device: &&berth_crds::accelerator_node::DeviceStatus| {
        device.admission == Admission::Schedulable
            && device.health != Health::Unhealthy
            && !node.spec.cordoned_devices.iter().any(|cordoned| cordoned.device == device.device)
    };
    let entry = |device: &berth_crds::accelerator_node::DeviceStatus| {
        let entry = FleetDevice {
            vendor: device.vendor,
            product: device.product.clone(),
            memory: device.memory_bytes,
            computes: device.computes.clone(),
            node: name.clone(),
            rack: rack.clone(),
        };
        (device.device.to_string(), entry)
    };
    status.devices.iter().filter(free).map(entry).collect()
}

/// The least number of `fleet`'s devices that hold one instance of `profile`, or `choice.per_instance` when
/// it says so. An instance stays with one vendor unless `choice.cross_vendor`.
///
/// # Errors
/// [`Shortage`], when all of them together are not enough.
pub fn devices_needed(
    profile: &ModelProfileSpec,
    choice: &DeviceChoice,
    redundancy: &Redundancy,
    fleet: &[FleetDevice],
) -> Result<u32, Shortage> {
    let allowed: Vec<&FleetDevice> = fleet
        .iter()
        .filter(|device| choice.vendors.is_empty() || choice.vendors.contains(&device.vendor))
        .filter(|device| choice.products.is_empty() || choice.products.contains(&device.product))
        .collect();
    let (allowed, unable): (Vec<_>, Vec<_>) =
        allowed.into_iter().partition(|device| format(profile, device.vendor).is_in(&device.computes));
    if allowed.is_empty() && unable.is_empty() {
        let message = format!(
            "no allowed device of {} schedulable ones: label nodes berth.dev/mode=native, or allow other vendors or products in spec.devices",
            fleet.len()
        );
        return Err(Shortage { message });
    }
    let pools: Vec<Vec<&FleetDevice>> = if choice.cross_vendor {
        vec![allowed]
    } else {
        let of = |vendor| allowed.iter().copied().filter(|device| device.vendor == vendor).collect::<Vec<_>>();
        [Vendor::Nvidia, Vendor::Ascend].into_iter().map(of).filter(|pool: &Vec<_>| !pool.is_empty()).collect()
    };
    let mut best: Option<Result<u32, Shortage>> = None;
    for pool in pools {
        let need = of_pool(profile, choice, redundancy, &pool);
        best = match (best, need) {
            (Some(Ok(before)), Ok(now)) => Some(Ok(before.min(now))),
            (Some(Ok(before)), Err(_)) => Some(Ok(before)),
            (_, now) => Some(now),
        };
    }
    let short = best.unwrap_or_else(|| Err(Shortage { message: "no allowed device is left".to_owned() }));
    short.map_err(|short| naming_formats(profile, short, &unable))
}

/// How devices of `vendor` hold experts of `profile`.
fn format(profile: &ModelProfileSpec, vendor: Vendor) -> WeightFormat {
    profile.geometry.format_on(&profile.vendor_formats, vendor)
}

/// Adds the devices that were left out for their format: what helps may be a word in the profile.
fn naming_formats(profile: &ModelProfileSpec, short: Shortage, unable: &[&FleetDevice]) -> Shortage {
    let Some(first) = unable.first() else { return short };
    let message = format!(
        "{}; {} more ({}) do not compute with {}: set vendorFormats.{} of the ModelProfile to one of {}",
        short.message,
        unable.len(),
        first.product,
        format(profile, first.vendor),
        first.vendor,
        WeightFormat::words(&first.computes)
    );
    Shortage { message }
}

fn of_pool(
    profile: &ModelProfileSpec,
    choice: &DeviceChoice,
    redundancy: &Redundancy,
    pool: &[&FleetDevice],
) -> Result<u32, Shortage> {
    let experts = u64::from(profile.geometry.experts);
    let copies: u64 = if redundancy.survive == Survive::None { 1 } else { 2 };
    let needed = experts * copies + u64::from(redundancy.extra_replicas);
    let floor = usize::try_from(copies).unwrap_or(2).max(blast_floor(choice));
    if let Some(count) = choice.per_instance {
        let wanted = usize::try_from(count).unwrap_or(usize::MAX);
        let slots = slots_of(profile, redundancy, pool, wanted);
        return match enough(&slots, experts, needed) && pool.len() >= wanted && wanted >= floor {
            true => Ok(count),
            false => Err(short(pool, needed, &slots, Some(count))),
        };
    }
    let fits = |count: usize| count >= floor && enough(&slots_of(profile, redundancy, pool, count), experts, needed);
    if pool.is_empty() || !fits(pool.len()) {
        return Err(short(pool, needed, &slots_of(profile, redundancy, pool, pool.len()), None));
    }
    // More devices never fit less: each has to keep a smaller share for the runner.
    let (mut most, mut least) = (pool.len(), 1);
    while least < most {
        let middle = least.midpoint(most);
        if fits(middle) { most = middle } else { least = middle + 1 }
    }
    Ok(u32::try_from(most).unwrap_or(u32::MAX))
}

fn blast_floor(choice: &DeviceChoice) -> usize {
    let percent = choice.blast_radius_percent.unwrap_or(100).max(1);
    usize::try_from(100u32.div_ceil(percent)).unwrap_or(1)
}

fn domain<'a>(device: &'a FleetDevice, redundancy: &Redundancy) -> &'a str {
    match redundancy.survive {
        Survive::None | Survive::Device => "",
        Survive::Node => &device.node,
        Survive::Rack => &device.rack,
    }
}

/// Cache for one sequence of the longest context that the profile allows, and never so little that a small
/// model could not serve several at once.
#[must_use]
pub fn kv_budget(profile: &ModelProfileSpec) -> Bytes {
    const LEAST: Bytes = Bytes(64 << 20);
    profile.kv_bytes_per_token.times(profile.context).plus(profile.kv_fixed_bytes_per_sequence).max(LEAST)
}

/// Slots per layer and failure domain of the `count` devices that an instance would take: the largest of
/// each domain first, then the second largest. As the planner does, each keeps its share of the bytes that
/// are not routed experts, and holds each expert of a layer once.
fn slots_of<'a>(
    profile: &ModelProfileSpec,
    redundancy: &Redundancy,
    pool: &[&'a FleetDevice],
    count: usize,
) -> Vec<(u64, &'a str)> {
    let reserve = profile.non_expert_bytes.plus(kv_budget(profile));
    let share = Bytes(reserve.get().div_ceil(u64::try_from(count.max(1)).unwrap_or(u64::MAX)));
    let room = |device: &FleetDevice| {
        let expert = profile.geometry.expert_bytes(format(profile, device.vendor));
        let memory = DeviceMemory { device: device.memory, workspace: share, committed: Bytes::ZERO };
        memory.slots_per_layer(&profile.geometry, expert).unwrap_or(0).min(u64::from(profile.geometry.experts))
    };
    let mut slots: Vec<(u64, &str)> = pool.iter().map(|device| (room(device), domain(device, redundancy))).collect();
    slots.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(b.1)));
    let mut taken: BTreeMap<&str, usize> = BTreeMap::new();
    let mut ranked: Vec<(usize, (u64, &str))> = Vec::with_capacity(slots.len());
    for slot in slots {
        let rank = taken.entry(slot.1).or_default();
        ranked.push((*rank, slot));
        *rank += 1;
    }
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().take(count).map(|(_, slot)| slot).collect()
}

fn enough(slots: &[(u64, &str)], experts: u64, needed: u64) -> bool {
    let mut domains: BTreeMap<&str, u64> = BTreeMap::new();
    for (slots, domain) in slots {
        *domains.entry(domain).or_default() += slots;
    }
    let bounded = domains.len() > 1 || domains.keys().any(|domain| !domain.is_empty());
    let useful: u64 = domains.values().map(|slots| if bounded { (*slots).min(experts) } else { *slots }).sum();
    let total: u64 = domains.values().sum();
    // Beyond the copies that must be apart, extra replicas may lie anywhere.
    let apart = if bounded { needed.min(experts * 2) } else { needed };
    useful >= apart && total >= needed
}

fn short(pool: &[&FleetDevice], needed: u64, slots: &[(u64, &str)], asked: Option<u32>) -> Shortage {
    let have: u64 = slots.iter().map(|(slots, _)| slots).sum();
    let of = asked.map_or_else(String::new, |count| format!(" {count} of"));
    let message = format!(
        "an instance needs {needed} slots per layer and{of} the {} allowed devices have {have}: add devices, lower spec.redundancy, or change spec.devices",
        pool.len()
    );
    Shortage { message }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use berth_types::{Geometry, Scoring};
    use proptest::prelude::*;

    pub(crate) fn profile() -> ModelProfileSpec {
        let geometry = Geometry {
            layers: 4,
            dense_layers: 1,
            experts: 16,
            shared_experts: 1,
            top_k: 4,
            groups: 4,
            groups_kept: 2,
            scoring: Scoring::Sigmoid,
            hash_layers: 0,
            hidden: 64,
            expert_width: 32,
            format: WeightFormat::Bf16,
        };
        ModelProfileSpec {
            geometry,
            vendor_formats: BTreeMap::new(),
            non_expert_bytes: Bytes(1_000_000),
            kv_bytes_per_token: Bytes(384),
            kv_fixed_bytes_per_sequence: Bytes::ZERO,
            context: 512,
            throughput: Vec::new(),
            expert_loads: Vec::new(),
            sources: Vec::new(),
        }
    }

    /// A device with room for `slots` slots per layer of [`profile`].
    pub(crate) fn device(node: &str, slots: u64) -> FleetDevice {
        let expert = profile().geometry.expert_bytes(WeightFormat::Bf16).get();
        // Room for the whole reserve, so that the number of devices does not matter to these tests.
        let reserve = profile().non_expert_bytes.plus(kv_budget(&profile())).get();
        let memory = Bytes((expert * 3 * slots + reserve) * 100 / 90 + 64);
        FleetDevice {
            vendor: Vendor::Nvidia,
            product: "h200".to_owned(),
            memory,
            computes: Vec::new(),
            node: node.to_owned(),
            rack: node.to_owned(),
        }
    }

    fn survive(survive: Survive) -> Redundancy {
        Redundancy { survive, extra_replicas: 0 }
    }

    #[test]
    fn redundancy_raises_the_number_of_devices() {
        let fleet = [device("a", 16), device("a", 16), device("b", 16), device("b", 16)];
        let need = |redundancy| devices_needed(&profile(), &DeviceChoice::default(), &redundancy, &fleet);
        assert_eq!(need(survive(Survive::None)), Ok(1));
        assert_eq!(need(survive(Survive::Device)), Ok(2));
        assert_eq!(need(Redundancy { survive: Survive::Device, extra_replicas: 1 }), Ok(3));
    }

    #[test]
    fn copies_that_survive_a_node_lie_on_two_nodes() {
        let alone = [device("a", 16), device("a", 16)];
        let choice = DeviceChoice::default();
        assert!(devices_needed(&profile(), &choice, &survive(Survive::Node), &alone).is_err());
        let two = [device("a", 16), device("a", 16), device("b", 16)];
        assert_eq!(devices_needed(&profile(), &choice, &survive(Survive::Node), &two), Ok(2));
    }

    #[test]
    fn what_does_not_fit_says_how_many_slots_are_short() {
        let short = devices_needed(&profile(), &DeviceChoice::default(), &survive(Survive::None), &[device("a", 8)]);
        let message = short.unwrap_err().message;
        assert!(message.contains("needs 16 slots per layer") && message.contains("have 8"), "{message}");
    }

    #[test]
    fn what_the_runner_needs_is_kept_free_on_the_devices() {
        let mut heavy = profile();
        let fleet: Vec<_> = (0..4).map(|_| device("a", 16)).collect();
        let need = |profile: &ModelProfileSpec| {
            devices_needed(profile, &DeviceChoice::default(), &survive(Survive::None), &fleet)
        };
        assert_eq!(need(&heavy), Ok(1));
        // With the least cache nearly two devices' memory: half of it fits no device, a third does.
        heavy.non_expert_bytes = fleet[0].memory;
        assert_eq!(need(&heavy), Ok(3));
        heavy.non_expert_bytes = fleet[0].memory.times(5);
        assert!(need(&heavy).is_err());
    }

    #[test]
    fn a_chip_that_lacks_the_format_does_not_count_and_says_what_would_do() {
        let mut fleet = vec![device("a", 16)];
        fleet[0].computes = vec![WeightFormat::Int8PerRow];
        let need = |profile: &ModelProfileSpec, fleet: &[FleetDevice]| {
            devices_needed(profile, &DeviceChoice::default(), &survive(Survive::None), fleet)
        };
        let message = need(&profile(), &fleet).unwrap_err().message;
        assert!(message.contains("1 more (h200) do not compute with bf16"), "{message}");
        assert!(message.contains("vendorFormats.nvidia of the ModelProfile to one of int8_per_channel"), "{message}");
        let mut converted = profile();
        converted.vendor_formats.insert(Vendor::Nvidia, WeightFormat::Int8PerRow);
        assert_eq!(need(&converted, &fleet), Ok(1));
        fleet.push(device("b", 16));
        assert_eq!(need(&profile(), &fleet), Ok(1));
    }

    #[test]
    fn devices_that_are_not_allowed_do_not_count() {
        let choice = DeviceChoice { vendors: vec![Vendor::Ascend], ..DeviceChoice::default() };
        let none = devices_needed(&profile(), &choice, &survive(Survive::None), &[device("a", 16)]);
        assert!(none.unwrap_err().message.contains("no allowed device of 1"));
    }

    proptest! {
        #[test]
        fn more_devices_never_raise_the_need(slots in proptest::collection::vec(0u64..20, 1..8), more in 0u64..20) {
            let mut fleet: Vec<_> = slots.iter().map(|slots| device("a", *slots)).collect();
            let choice = DeviceChoice::default();
            let before = devices_needed(&profile(), &choice, &survive(Survive::None), &fleet);
            fleet.push(device("b", more));
            let after = devices_needed(&profile(), &choice, &survive(Survive::None), &fleet);
            if let Ok(before) = before {
                prop_assert!(after.is_ok_and(|after| after <= before));
            }
        }
    }
}
