//! One layer's slots while they are being filled: keeps loads, copies and failure domains up to date.
//! Takes no decision.

use super::layer::Site;
use crate::num;

/// Slots of one layer, by device.
#[derive(Clone, Debug)]
pub(super) struct Board<'a> {
    pub(super) sites: &'a [Site],
    pub(super) loads: &'a [f64],
    pub(super) rows: Vec<Vec<Option<usize>>>,
    /// Devices that hold each expert.
    pub(super) homes: Vec<Vec<usize>>,
    /// Load of each device; an expert's load is shared evenly by its copies.
    pub(super) carried: Vec<f64>,
    free: usize,
}

impl<'a> Board<'a> {
    pub(super) fn new(sites: &'a [Site], loads: &'a [f64]) -> Self {
        Self {
            sites,
            loads,
            rows: sites.iter().map(|site| vec![None; site.slots]).collect(),
            homes: vec![Vec::new(); loads.len()],
            carried: vec![0.0; sites.len()],
            free: sites.iter().map(|site| site.slots).sum(),
        }
    }

    pub(super) fn copies(&self, expert: usize) -> usize {
        self.homes.get(expert).map_or(0, Vec::len)
    }

    pub(super) fn load(&self, expert: usize) -> f64 {
        self.loads.get(expert).copied().unwrap_or(0.0)
    }

    /// Load that one copy of `expert` carries when there are `copies`.
    pub(super) fn share(&self, expert: usize, copies: usize) -> f64 {
        self.load(expert) / num::real_size(copies.max(1))
    }

    pub(super) fn speed(&self, device: usize) -> f64 {
        self.sites.get(device).map_or(1.0, |site| site.speed.max(f64::MIN_POSITIVE))
    }

    pub(super) fn holds(&self, device: usize, expert: usize) -> bool {
        self.homes.get(expert).is_some_and(|homes| homes.contains(&device))
    }

    pub(super) fn free_slot(&self, device: usize) -> Option<usize> {
        self.rows.get(device)?.iter().position(Option::is_none)
    }

    pub(super) fn free(&self) -> usize {
        self.free
    }

    /// Time of the slowest device if it carried `extra` more.
    pub(super) fn time(&self, device: usize, extra: f64) -> f64 {
        (self.carried.get(device).copied().unwrap_or(0.0) + extra) / self.speed(device)
    }

    /// Puts `expert` into an empty slot.
    pub(super) fn put(&mut self, device: usize, slot: usize, expert: usize) {
        let Some(place) = self.rows.get_mut(device).and_then(|row| row.get_mut(slot)) else { return };
        *place = Some(expert);
        self.free -= 1;
        self.reshare(expert, |homes| homes.push(device));
    }

    /// Empties a slot and says what was in it.
    pub(super) fn take(&mut self, device: usize, slot: usize) -> Option<usize> {
        let expert = self.rows.get_mut(device)?.get_mut(slot)?.take()?;
        self.free += 1;
        self.reshare(expert, |homes| homes.retain(|home| *home != device));
        Some(expert)
    }

    fn reshare(&mut self, expert: usize, change: impl FnOnce(&mut Vec<usize>)) {
        let before = self.share(expert, self.copies(expert));
        let Some(homes) = self.homes.get_mut(expert) else { return };
        let old = homes.clone();
        change(homes);
        let new = homes.clone();
        let after = self.share(expert, new.len());
        for device in old {
            if let Some(load) = self.carried.get_mut(device) {
                *load -= before;
            }
        }
        for device in new {
            if let Some(load) = self.carried.get_mut(device) {
                *load += after;
            }
        }
    }

    fn count_distinct(&self, homes: impl Iterator<Item = usize> + Clone, of: impl Fn(&Site) -> usize) -> usize {
        let of = |device: usize| self.sites.get(device).map(&of);
        homes
            .clone()
            .enumerate()
            .filter(|(at, device)| !homes.clone().take(*at).any(|other| of(other) == of(*device)))
            .count()
    }

    /// Failure domains in which `expert` has a copy, when its copy on `without` does not count.
    pub(super) fn domains(&self, expert: usize, without: Option<usize>, with: Option<usize>) -> usize {
        let homes = self.homes.get(expert).map(Vec::as_slice).unwrap_or_default();
        let homes = homes.iter().copied().filter(move |home| Some(*home) != without).chain(with);
        self.count_distinct(homes, |site| site.domain)
    }

    /// Nodes in which `expert` has a copy, likewise.
    pub(super) fn nodes(&self, expert: usize, without: Option<usize>, with: Option<usize>) -> usize {
        let homes = self.homes.get(expert).map(Vec::as_slice).unwrap_or_default();
        let homes = homes.iter().copied().filter(move |home| Some(*home) != without).chain(with);
        self.count_distinct(homes, |site| site.node)
    }

    /// Whether `expert` has a copy in the domain, on the node, on the card of `device`.
    pub(super) fn company(&self, expert: usize, device: usize) -> (bool, bool, bool) {
        let Some(site) = self.sites.get(device) else { return (true, true, true) };
        let homes = self.homes.get(expert).map(Vec::as_slice).unwrap_or_default();
        let any = |of: fn(&Site) -> usize| {
            homes.iter().filter_map(|home| self.sites.get(*home)).any(|home| of(home) == of(site))
        };
        (any(|site| site.domain), any(|site| site.node), any(|site| site.card))
    }

    /// Slowest device's load ÷ speed over that of an ideal split; 1 without load.
    pub(super) fn makespan(&self) -> f64 {
        let total: f64 = self.loads.iter().sum();
        let speed: f64 = (0..self.sites.len()).map(|device| self.speed(device)).sum();
        let slowest = (0..self.sites.len()).map(|device| self.time(device, 0.0)).fold(0.0, f64::max);
        if total > 0.0 && speed > 0.0 { slowest / (total / speed) } else { 1.0 }
    }
}
