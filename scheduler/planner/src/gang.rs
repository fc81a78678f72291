//! Which devices an instance gets, all or nothing: as few interconnect domains as possible, never more
//! of it in one failure domain than declared, and enough room for every expert. Decides nothing about
//! single experts.

use std::collections::{BTreeMap, BTreeSet};

use berth_types::{Bytes, DeviceId, Vendor, WeightFormat};

use crate::{
    num,
    plan::Layout,
    problem::{Device, Problem, Standing, Survive},
};

/// Why an instance cannot be placed, and what would help.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Infeasible {
    /// Nothing may be used at all.
    #[error(
        "no device may be used: {seen} are known, {barred} of them barred or draining, {refused} not allowed by vendor \
         or product, {small} too small for one slot in every layer ({needed} needed); add a device or widen spec.devices"
    )]
    NoDevices {
        /// Devices known.
        seen: usize,
        /// Not open to new replicas.
        barred: usize,
        /// Excluded by the spec.
        refused: usize,
        /// Without room.
        small: usize,
        /// Bytes of one slot in each layer.
        needed: Bytes,
    },
    /// The declared number of devices is not there.
    #[error(
        "{wanted} devices are wanted and {usable} are usable: {missing} missing; add devices, have more granted, or lower spec.devices.perInstance"
    )]
    DevicesShort {
        /// Devices wanted.
        wanted: usize,
        /// Devices that could be used.
        usable: usize,
        /// The difference.
        missing: usize,
    },
    /// All devices together have too few slots.
    #[error(
        "{slots} slots a layer are needed and {usable} devices have room for {room}: {short} short ({bytes}), about \
         {devices} more devices like these; add devices, grant more, or ask for less redundancy"
    )]
    BytesShort {
        /// Slots needed in each layer.
        slots: usize,
        /// Usable devices.
        usable: usize,
        /// Slots that count.
        room: usize,
        /// The difference.
        short: usize,
        /// Bytes of the missing slots over all layers.
        bytes: Bytes,
        /// Devices that would help.
        devices: usize,
    },
    /// Too few failure domains, or too much in one of them.
    #[error(
        "surviving the loss of a {level} with {wanted} devices needs them in at least 2 failure domains, at most {most} \
         in each, with room for {slots} slots a layer: {domains} domains with {usable} devices are usable; add devices \
         in another {level} or ask for less"
    )]
    DomainsShort {
        /// The level.
        level: &'static str,
        /// Devices wanted.
        wanted: usize,
        /// Most devices in one domain.
        most: usize,
        /// Slots needed in each layer.
        slots: usize,
        /// Domains that have usable devices.
        domains: usize,
        /// Usable devices.
        usable: usize,
    },
    /// Replicas cannot be arranged as asked although the room is there.
    #[error("layer {layer}: replicas cannot be arranged on {devices} devices: {why}")]
    Arrangement {
        /// The layer.
        layer: u32,
        /// Devices.
        devices: usize,
        /// What is in the way.
        why: String,
    },
    /// Too few devices, and others only lack the format.
    #[error(
        "{cause}; {devices} more do not compute with {format}: set vendorFormats.{vendor} of the ModelProfile to one of \
         {computes}"
    )]
    Format {
        /// What is missing without them.
        cause: Box<Infeasible>,
        /// Devices that are left out.
        devices: usize,
        /// How the first of them would hold experts.
        format: WeightFormat,
        /// Its vendor.
        vendor: Vendor,
        /// What it computes with.
        computes: String,
    },
    /// A device has no room to load one new expert beside what it serves.
    #[error(
        "{device} has no room to load one expert beside what it serves: {short} short; free {short} or drain the device"
    )]
    NoTransition {
        /// The device.
        device: DeviceId,
        /// Bytes missing.
        short: Bytes,
    },
}

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
    let words: Vec<_> = first.computes.iter().map(|format| format.as_str()).collect();
    Infeasible::Format {
        cause: Box::new(cause),
        devices: unable.count() + 1,
        format: instance.format(first.vendor),
        vendor: first.vendor,
        computes: words.join(", "),
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

/// The search within one group of devices.
struct Search<'a> {
    problem: &'a Problem,
    kept: &'a BTreeSet<&'a DeviceId>,
    level: Survive,
    blast_radius: Option<u32>,
    group: Vec<usize>,
}

impl Search<'_> {
    fn device(&self, index: usize) -> Option<&Device> {
        self.problem.devices.get(index)
    }

    fn is_kept(&self, index: usize) -> bool {
        self.device(index).is_some_and(|device| self.kept.contains(&device.id))
    }

    /// Slots per layer that the instance wants in all when it spans `devices` devices.
    fn wanted_slots(&self, devices: usize) -> usize {
        let experts = num::index(self.problem.instance.geometry.experts);
        let wanted = experts * self.level.copies() + num::index(self.problem.instance.extra_replicas);
        wanted.min(experts.saturating_mul(devices))
    }

    fn run(&self) -> Result<Vec<(usize, usize)>, Infeasible> {
        let instance = &self.problem.instance;
        let most = instance.granted.map_or(self.group.len(), |granted| num::index(granted).min(self.group.len()));
        let held = self.group.iter().filter(|index| self.is_kept(**index)).count();
        let repair = !self.kept.is_empty();
        let counts: Vec<usize> = match instance.devices.map(num::index) {
            Some(wanted) if repair => (1..=most.min(wanted)).rev().collect(),
            Some(wanted) if wanted <= most => vec![wanted],
            Some(wanted) => {
                let usable = most;
                return Err(Infeasible::DevicesShort { wanted, usable, missing: wanted - usable });
            }
            None => (held.clamp(1, most.max(1))..=most).chain((1..held.min(most)).rev()).collect(),
        };
        let mut error = None;
        for count in counts {
            match self.with(count) {
                Ok(members) => return Ok(members),
                Err(short) => {
                    // What is missing with most devices says most.
                    if error.as_ref().is_none_or(|(tried, _)| *tried < count) {
                        error = Some((count, short));
                    }
                }
            }
        }
        Err(error.map_or(Infeasible::DevicesShort { wanted: 1, usable: 0, missing: 1 }, |(_, short)| short))
    }

    /// Exactly `count` devices with their slots, from as few interconnect domains as possible.
    fn with(&self, count: usize) -> Result<Vec<(usize, usize)>, Infeasible> {
        let mut domains: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for index in &self.group {
            if let Some(device) = self.device(*index) {
                domains.entry(device.interconnect()).or_default().push(*index);
            }
        }
        let held = |domain: &Vec<usize>| domain.iter().filter(|index| self.is_kept(**index)).count();
        let attempt = |pool: &[usize]| self.pick(count, pool).and_then(|picked| self.slots(picked));
        // An instance stays in the domains where it is, even if fewer would do: gathering it moves it all.
        let home: Vec<usize> = domains.values().filter(|domain| held(domain) > 0).flatten().copied().collect();
        if let Some(members) = attempt(&home) {
            return Ok(members);
        }
        let mut single: Vec<_> = domains.values().filter(|domain| domain.len() >= count).collect();
        single.sort_by_key(|domain| (std::cmp::Reverse(held(domain)), domain.len()));
        if let Some(members) = single.into_iter().find_map(|domain| attempt(domain)) {
            return Ok(members);
        }
        let mut ordered: Vec<_> = domains.values().collect();
        ordered.sort_by_key(|domain| std::cmp::Reverse((held(domain), domain.len())));
        let mut pool = Vec::new();
        for domain in ordered {
            pool.extend(domain.iter().copied());
            if pool.len() >= count
                && let Some(members) = attempt(&pool)
            {
                return Ok(members);
            }
        }
        Err(self.shortage(count))
    }

    /// Failure domains for the blast radius and for spreading.
    fn spread(&self) -> Survive {
        self.level.max(Survive::Node)
    }

    /// Most devices of `count` in one failure domain.
    fn most_in_domain(&self, count: usize) -> usize {
        match self.blast_radius {
            Some(percent) => count.saturating_mul(num::index(percent)) / 100,
            None => count,
        }
    }

    /// `count` devices of `pool`: those that hold the instance first, else the failure domain with the
    /// fewest so far, then healthy before degraded, faster before slower.
    fn pick(&self, count: usize, pool: &[usize]) -> Option<Vec<usize>> {
        let most = self.most_in_domain(count);
        let mut taken: BTreeMap<&str, usize> = BTreeMap::new();
        let mut left: Vec<(usize, &Device)> =
            pool.iter().filter_map(|index| Some((*index, self.device(*index)?))).collect();
        left.sort_by(|(_, one), (_, other)| {
            let rank = |device: &Device| (!self.kept.contains(&device.id), device.degraded);
            rank(one).cmp(&rank(other)).then(other.speed.total_cmp(&one.speed)).then(one.id.cmp(&other.id))
        });
        let mut picked = Vec::with_capacity(count);
        while picked.len() < count {
            let best = left
                .iter()
                .enumerate()
                .filter_map(|(at, (_, device))| {
                    let used = taken.get(device.failure_domain(self.spread())).copied().unwrap_or(0);
                    (used < most).then_some(((!self.kept.contains(&device.id), device.degraded, used, at), at))
                })
                .min()?
                .1;
            let (index, device) = left.remove(best);
            *taken.entry(device.failure_domain(self.spread())).or_default() += 1;
            picked.push(index);
        }
        picked.sort_unstable();
        Some(picked)
    }

    /// Slots per layer of each picked device: in proportion to speed, within its memory, and such that
    /// two copies of each expert find different failure domains where that is needed.
    fn slots(&self, picked: Vec<usize>) -> Option<Vec<(usize, usize)>> {
        let experts = num::index(self.problem.instance.geometry.experts);
        let devices: Vec<&Device> = picked.iter().filter_map(|index| self.device(*index)).collect();
        let room: Vec<usize> =
            devices.iter().map(|device| self.problem.instance.capacity(device, picked.len())).collect();
        let needed = experts * self.level.copies();
        let by_domain = |slots: &[usize]| {
            let mut sums: BTreeMap<&str, usize> = BTreeMap::new();
            for (device, slots) in devices.iter().zip(slots) {
                *sums.entry(device.failure_domain(self.level)).or_default() += slots;
            }
            sums
        };
        let counted = |slots: &[usize]| by_domain(slots).values().map(|sum| (*sum).min(experts)).sum::<usize>();
        let single = self.level == Survive::Nothing;
        let enough = |slots: &[usize]| if single { slots.iter().sum::<usize>() } else { counted(slots) } >= needed;
        if !enough(&room) {
            return None;
        }
        let wanted = self.wanted_slots(picked.len()).min(room.iter().sum());
        let mut slots = apportion(wanted, &devices, &room);
        while !enough(&slots) {
            // A domain with more slots than experts gives one to a domain with fewer: its fullest device to
            // the emptiest there.
            let sums = by_domain(&slots);
            let sum = |at: &usize| sums.get(devices.get(*at)?.failure_domain(self.level)).copied();
            let full = |at: &usize| (sum(at), slots.get(*at).copied(), std::cmp::Reverse(*at));
            let from =
                (0..slots.len()).filter(|at| sum(at) > Some(experts) && slots.get(*at) > Some(&0)).max_by_key(full)?;
            let to = (0..slots.len())
                .filter(|at| sum(at) < Some(experts) && slots.get(*at) < room.get(*at))
                .min_by_key(|at| (sum(at), slots.get(*at).copied(), *at))?;
            *slots.get_mut(from)? -= 1;
            *slots.get_mut(to)? += 1;
        }
        Some(picked.into_iter().zip(slots).collect())
    }

    fn shortage(&self, count: usize) -> Infeasible {
        let instance = &self.problem.instance;
        let devices: Vec<&Device> = self.group.iter().filter_map(|index| self.device(*index)).collect();
        let slots = num::index(instance.geometry.experts) * self.level.copies();
        let mut rooms: Vec<usize> = devices.iter().map(|device| instance.capacity(device, count)).collect();
        rooms.sort_unstable_by_key(|room| std::cmp::Reverse(*room));
        let room: usize = rooms.iter().take(count).sum();
        if room < slots {
            let each = devices.first().map_or(Bytes::ZERO, |device| instance.expert_bytes(device.vendor));
            let short = slots - room;
            return Infeasible::BytesShort {
                slots,
                usable: count,
                room,
                short,
                bytes: each.times(u64::from(instance.geometry.expert_layers())).times(num::count(short)),
                devices: short.div_ceil(rooms.first().copied().unwrap_or(1).max(1)),
            };
        }
        let domains: BTreeSet<_> = devices.iter().map(|device| device.failure_domain(self.spread())).collect();
        Infeasible::DomainsShort {
            level: self.spread().as_str(),
            wanted: count,
            most: self.most_in_domain(count),
            slots,
            domains: domains.len(),
            usable: devices.len(),
        }
    }
}

/// `wanted` slots over devices in proportion to their speed, none above its room: each slot goes where
/// slots ÷ speed is least. The sum is `wanted` if the room allows it.
fn apportion(wanted: usize, devices: &[&Device], room: &[usize]) -> Vec<usize> {
    let mut slots = vec![0_usize; devices.len()];
    for _ in 0..wanted {
        let next = (0..slots.len())
            .filter(|at| slots.get(*at) < room.get(*at))
            .map(|at| {
                let filled = num::real_size(slots.get(at).copied().unwrap_or(0) + 1);
                (filled / devices.get(at).map_or(1.0, |device| device.speed.max(f64::MIN_POSITIVE)), at)
            })
            .min_by(|one, other| one.0.total_cmp(&other.0).then(one.1.cmp(&other.1)));
        match next.and_then(|(_, at)| slots.get_mut(at)) {
            Some(slot) => *slot += 1,
            None => break,
        }
    }
    slots
}
