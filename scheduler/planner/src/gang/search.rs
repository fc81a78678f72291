//! The search for devices within one group that an instance may span.

use std::collections::{BTreeMap, BTreeSet};

use berth_types::{Bytes, DeviceId};

use super::{
    Infeasible, slots,
    spans::{self, Domain},
};
use crate::{
    num,
    problem::{Device, Problem, Survive},
};

/// The search within one group of devices.
pub(super) struct Search<'a> {
    pub(super) problem: &'a Problem,
    pub(super) kept: &'a BTreeSet<&'a DeviceId>,
    pub(super) level: Survive,
    pub(super) blast_radius: Option<u32>,
    pub(super) group: Vec<usize>,
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

    pub(super) fn run(&self) -> Result<Vec<(usize, usize)>, Infeasible> {
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

    /// Exactly `count` devices with their slots, from as few interconnect domains as possible, of one the smallest that
    /// does: what stays free stays whole.
    fn with(&self, count: usize) -> Result<Vec<(usize, usize)>, Infeasible> {
        let mut rooms = vec![0; self.problem.devices.len()];
        for index in &self.group {
            rooms[*index] = self.device(*index).map_or(0, |device| self.problem.instance.capacity(device, count));
        }
        if !self.has_room(count, &self.group, &rooms) {
            return Err(self.shortage(count));
        }
        let mut domains: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for index in &self.group {
            if let Some(device) = self.device(*index) {
                domains.entry(device.interconnect()).or_default().push(*index);
            }
        }
        let held = |domain: &Vec<usize>| domain.iter().filter(|index| self.is_kept(**index)).count();
        let attempt = |pool: &[usize]| {
            let with = |roomy| self.pick(count, pool, &rooms, roomy).and_then(|picked| self.slots(picked));
            if self.has_room(count, pool, &rooms) { with(false).or_else(|| with(true)) } else { None }
        };
        // An instance stays in the domains where it is, even if fewer would do: gathering it moves it all.
        let home: Vec<usize> = domains.values().filter(|domain| held(domain) > 0).flatten().copied().collect();
        if let Some(members) = attempt(&home) {
            return Ok(members);
        }
        let pools: Vec<&Vec<usize>> = domains.values().collect();
        let sizes: Vec<Domain> = pools.iter().map(|pool| Domain { held: held(pool), size: pool.len() }).collect();
        let spanned = spans::best(&sizes, count, |set| {
            let pool: Vec<usize> = set.iter().flat_map(|at| pools[*at].iter().copied()).collect();
            attempt(&pool)
        });
        if let Some(members) = spanned {
            return Ok(members);
        }
        Err(self.shortage(count))
    }

    /// Whether the roomiest `count` devices of `pool` have a slot for every required copy: no others have more.
    fn has_room(&self, count: usize, pool: &[usize], rooms: &[usize]) -> bool {
        let needed = num::index(self.problem.instance.geometry.experts) * self.level.copies();
        let mut rooms: Vec<usize> = pool.iter().map(|index| rooms[*index]).collect();
        rooms.sort_unstable_by_key(|room| std::cmp::Reverse(*room));
        rooms.len() >= count && rooms.iter().take(count).sum::<usize>() >= needed
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
    /// fewest so far, then healthy before degraded, faster before slower. When `roomy`, those with most slots
    /// first: no choice within the blast radius has more.
    fn pick(&self, count: usize, pool: &[usize], rooms: &[usize], roomy: bool) -> Option<Vec<usize>> {
        let most = self.most_in_domain(count);
        let mut order: Vec<(usize, &Device)> =
            pool.iter().filter_map(|index| Some((*index, self.device(*index)?))).collect();
        let rank = |index: usize, device: &Device| (!self.is_kept(index), device.degraded);
        order.sort_by(|(at, one), (other_at, other)| {
            let ranks = rank(*at, one).cmp(&rank(*other_at, other));
            ranks.then(other.speed.total_cmp(&one.speed)).then(one.id.cmp(&other.id))
        });
        // By failure domain, the next to be taken last.
        let mut domains: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for (at, (index, device)) in order.iter().enumerate() {
            let rank = if roomy { (false, false) } else { rank(*index, device) };
            let slots = std::cmp::Reverse(if roomy { rooms[*index] } else { 0 });
            domains.entry(device.failure_domain(self.spread())).or_default().push((rank, slots, at));
        }
        let mut domains: Vec<(usize, Vec<_>)> = domains.into_values().map(|devices| (0, devices)).collect();
        domains.iter_mut().for_each(|(_, devices)| devices.sort_unstable_by(|one, other| other.cmp(one)));
        let mut picked = Vec::with_capacity(count);
        while picked.len() < count {
            let open = domains.iter_mut().filter(|(used, _)| *used < most);
            let next = open.filter_map(|domain| {
                let (rank, slots, at) = *domain.1.last()?;
                Some(((rank, slots, domain.0, at), domain))
            });
            let ((.., at), (used, devices)) = next.min_by_key(|(key, _)| *key)?;
            devices.pop();
            *used += 1;
            picked.push(order[at].0);
        }
        picked.sort_unstable();
        Some(picked)
    }

    /// Slots per layer of each picked device.
    fn slots(&self, picked: Vec<usize>) -> Option<Vec<(usize, usize)>> {
        let devices: Vec<&Device> = picked.iter().filter_map(|index| self.device(*index)).collect();
        let slots = slots::share(&self.problem.instance, self.level, self.wanted_slots(picked.len()), &devices)?;
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
