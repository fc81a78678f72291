//! Which devices an instance gets, all or nothing: as few interconnect domains as possible, never more
//! of it in one failure domain than declared, and enough room for every expert. Decides nothing about
//! single experts.

mod infeasible;
mod search;
mod slots;
mod spans;

use std::collections::{BTreeMap, BTreeSet};

use berth_types::{Bytes, DeviceId, Vendor, WeightFormat};

use crate::{
    plan::Layout,
    problem::{Problem, Standing, Survive},
};
pub use infeasible::Infeasible;
use search::Search;

/// Devices of an instance with their slots per layer, in order of their ids.
pub(crate) struct Gang {
    /// Index into the problem's devices, and slots per layer.
    pub(crate) members: Vec<(usize, usize)>,
    /// The failure domain whose loss it can survive.
    pub(crate) survives: Survive,
}

/// Whether an instance fits at all.
///
/// # Errors
/// [`Infeasible`] with what is missing.
pub fn fits(problem: &Problem) -> Result<(), Infeasible> {
    choose(problem, None).map(|_| ())
}

/// The devices for the problem's instance. With a previous layout the answer is a repair: it may survive
/// less and span fewer devices than declared rather than leave the instance as it is.
pub(crate) fn choose(problem: &Problem, previous: Option<&Layout>) -> Result<Gang, Infeasible> {
    choose_able(problem, previous).map_err(|cause| naming_formats(problem, cause))
}

/// Adds the devices that were left out for their format: what helps may be a word in the profile.
fn naming_formats(problem: &Problem, cause: Infeasible) -> Infeasible {
    let instance = &problem.instance;
    let mut unable = problem.devices.iter().filter(|device| {
        device.standing == Standing::Open && instance.allows(device) && !instance.is_computed_on(device)
    });
    let Some(first) = unable.next() else { return cause };
    Infeasible::Format {
        cause: Box::new(cause),
        devices: unable.count() + 1,
        format: instance.format(first.vendor),
        vendor: first.vendor,
        computes: WeightFormat::words(&first.computes),
    }
}

fn choose_able(problem: &Problem, previous: Option<&Layout>) -> Result<Gang, Infeasible> {
    let kept: BTreeSet<&DeviceId> =
        previous.iter().flat_map(|layout| layout.devices.iter().map(|entry| &entry.device)).collect();
    let declared = problem.instance.survive;
    let first = choose_at(problem, &kept, declared, problem.instance.blast_radius_percent);
    if previous.is_none() || first.is_ok() {
        return first;
    }
    for level in declared.downwards() {
        for blast_radius in [problem.instance.blast_radius_percent, None] {
            if let Ok(gang) = choose_at(problem, &kept, level, blast_radius) {
                return Ok(gang);
            }
        }
    }
    first
}

fn choose_at(
    problem: &Problem,
    kept: &BTreeSet<&DeviceId>,
    level: Survive,
    blast_radius: Option<u32>,
) -> Result<Gang, Infeasible> {
    let usable = usable(problem, kept)?;
    let mut error = None;
    for group in groups(problem, kept, &usable) {
        let search = Search { problem, kept, level, blast_radius, group };
        match search.run() {
            Ok(members) => return Ok(Gang { members, survives: level }),
            Err(short) => error = error.or(Some(short)),
        }
    }
    Err(error.unwrap_or(Infeasible::DevicesShort { wanted: 1, usable: 0, missing: 1 }))
}

/// Indices of the devices that may hold replicas of this instance.
fn usable(problem: &Problem, kept: &BTreeSet<&DeviceId>) -> Result<Vec<usize>, Infeasible> {
    let instance = &problem.instance;
    let (mut usable, mut barred, mut refused, mut small) = (Vec::new(), 0, 0, 0);
    let mut needed = Bytes::ZERO;
    for (index, device) in problem.devices.iter().enumerate() {
        let open = match device.standing {
            Standing::Open => true,
            Standing::Frozen => kept.contains(&device.id),
            Standing::Leaving | Standing::Gone => false,
        };
        let slot = instance.expert_bytes(device.vendor).times(u64::from(instance.geometry.expert_layers()));
        needed = if needed == Bytes::ZERO { slot } else { needed.min(slot) };
        match (open, instance.allows(device)) {
            (false, _) => barred += 1,
            // Said apart, with the formats that would do.
            (true, true) if !instance.is_computed_on(device) => {}
            (true, false) => refused += 1,
            (true, true) if instance.capacity(device, problem.devices.len()) == 0 => small += 1,
            (true, true) => usable.push(index),
        }
    }
    if usable.is_empty() {
        return Err(Infeasible::NoDevices { seen: problem.devices.len(), barred, refused, small, needed });
    }
    Ok(usable)
}

/// Sets of devices that one instance may span: one per vendor unless it may cross; the vendor that holds
/// most of it already comes first, then the one with more devices.
fn groups(problem: &Problem, kept: &BTreeSet<&DeviceId>, usable: &[usize]) -> Vec<Vec<usize>> {
    if problem.instance.cross_vendor {
        return vec![usable.to_vec()];
    }
    let mut vendors: BTreeMap<Vendor, (usize, Vec<usize>)> = BTreeMap::new();
    for index in usable {
        if let Some(device) = problem.devices.get(*index) {
            let entry = vendors.entry(device.vendor).or_default();
            entry.0 += usize::from(kept.contains(&device.id));
            entry.1.push(*index);
        }
    }
    let mut groups: Vec<_> = vendors.into_values().collect();
    groups.sort_by_key(|(held, devices)| std::cmp::Reverse((*held, devices.len())));
    groups.into_iter().map(|(_, devices)| devices).collect()
}
