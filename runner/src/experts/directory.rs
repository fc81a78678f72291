//! What the runner knows about the workers of its placement: the current revision, who is gone, who is slow, and which
//! revisions steps are still on. In memory and synchronous; whoever changes it tells the waiting calls.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use berth_types::{DeviceId, ExpertId, LayerId, Revision};

use super::{delivery::Entry, link::Link};
use crate::routes::{Place, RouteTable, Routes};

/// A device that did not answer in time is passed over for this long at first; doubles up to the longest.
const FIRST_PASS: Duration = Duration::from_secs(1);
const LONGEST_PASS: Duration = Duration::from_secs(30);

/// Which revisions a runner has steps on. 0 = none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InUse {
    /// The oldest that a step is still on; what is below is drained.
    pub oldest: Revision,
    /// The one that steps start on.
    pub current: Revision,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    routes: Option<Arc<Routes>>,
    links: HashMap<String, Arc<Link>>,
    /// The scheduler says so.
    gone: BTreeSet<DeviceId>,
    /// Their workers said so; until newer routes or the scheduler's next word.
    lost: BTreeSet<DeviceId>,
    slow: HashMap<DeviceId, Slow>,
    steps: BTreeMap<Revision, usize>,
}

#[derive(Debug)]
struct Slow {
    until: Duration,
    times: u32,
}

impl Directory {
    /// Takes routes. False if they are older than the current ones.
    pub(crate) fn set_routes(&mut self, table: RouteTable) -> bool {
        let routes = Routes::new(table);
        if let Some(old) = &self.routes {
            if !routes.may_replace(old) {
                return false;
            }
            if routes.placement_uid != old.placement_uid || routes.revision > old.revision {
                self.lost.clear();
            }
            // A worker that was started anew is another one.
            let moved = |place: &&Place| !old.places().contains(place);
            for place in routes.places().iter().filter(moved) {
                self.lost.remove(&place.device);
                self.slow.remove(&place.device);
            }
        }
        // Calls under way keep their link alive.
        self.links.retain(|endpoint, _| routes.places().iter().any(|place| place.endpoint == *endpoint));
        self.routes = Some(Arc::new(routes));
        true
    }

    /// Takes the scheduler's word on gone devices.
    pub(crate) fn set_gone(&mut self, gone: BTreeSet<DeviceId>) {
        self.gone = gone;
        self.lost.clear();
    }

    /// A worker says that its device is lost.
    pub(crate) fn lose(&mut self, device: &DeviceId) {
        self.lost.insert(device.clone());
    }

    /// A device did not answer in time.
    pub(crate) fn suspect(&mut self, device: &DeviceId, now: Duration) {
        let slow = self.slow.entry(device.clone()).or_insert(Slow { until: now, times: 0 });
        slow.until = now + FIRST_PASS.saturating_mul(1 << slow.times.min(5)).min(LONGEST_PASS);
        slow.times = slow.times.saturating_add(1);
    }

    /// A device answered well.
    pub(crate) fn trust(&mut self, device: &DeviceId) {
        self.slow.remove(device);
    }

    /// Devices that are not called.
    pub(crate) fn not_called(&self) -> Vec<DeviceId> {
        self.gone.union(&self.lost).cloned().collect()
    }

    /// Devices that are called only for experts that nobody else has, because they did not answer in time.
    pub(crate) fn passed_over(&self, now: Duration) -> Vec<DeviceId> {
        let mut devices: Vec<DeviceId> =
            self.slow.iter().filter(|(_, slow)| now < slow.until).map(|(device, _)| device.clone()).collect();
        devices.sort();
        devices
    }

    /// The revision that steps start on.
    pub(crate) fn routes(&self) -> Option<Arc<Routes>> {
        self.routes.clone()
    }

    /// The stream to a worker; `make` makes the first.
    pub(crate) fn link(&mut self, endpoint: &str, make: impl FnOnce() -> Link) -> Arc<Link> {
        Arc::clone(self.links.entry(endpoint.to_owned()).or_insert_with(|| Arc::new(make())))
    }

    /// Divides `entries` among the devices of `routes`, by device index. Devices in `avoid` are not taken; slow ones
    /// only for experts that nobody else has.
    ///
    /// # Errors
    /// The first expert that no usable device has.
    pub(crate) fn split(
        &self,
        routes: &Routes,
        layer: LayerId,
        entries: &[Entry],
        avoid: &BTreeSet<DeviceId>,
        now: Duration,
    ) -> Result<BTreeMap<usize, Vec<Entry>>, ExpertId> {
        let live: BTreeSet<&DeviceId> = routes
            .places()
            .iter()
            .filter(|place| !self.gone.contains(&place.device) && !self.lost.contains(&place.device))
            .filter(|place| !avoid.contains(&place.device))
            .filter(|place| self.links.get(&place.endpoint).is_none_or(|link| link.usable()))
            .map(|place| &place.device)
            .collect();
        let usable = |place: &Place| live.contains(&place.device);
        let swift = |place: &Place| usable(place) && self.slow.get(&place.device).is_none_or(|slow| now >= slow.until);
        let mut groups: BTreeMap<usize, Vec<Entry>> = BTreeMap::new();
        for entry in entries {
            let index = routes
                .choose(layer, entry.expert, entry.spread, swift)
                .or_else(|| routes.choose(layer, entry.expert, entry.spread, usable))
                .ok_or(entry.expert)?;
            groups.entry(index).or_default().push(*entry);
        }
        Ok(groups)
    }

    /// A step starts on `revision`.
    pub(crate) fn start_step(&mut self, revision: Revision) {
        *self.steps.entry(revision).or_insert(0) += 1;
    }

    /// A step on `revision` is over.
    pub(crate) fn end_step(&mut self, revision: Revision) {
        if let Some(count) = self.steps.get_mut(&revision) {
            *count -= 1;
            if *count == 0 {
                self.steps.remove(&revision);
            }
        }
    }

    /// Which revisions steps are on.
    pub(crate) fn in_use(&self) -> InUse {
        let current = self.routes.as_ref().map_or(Revision(0), |routes| routes.revision);
        let oldest = self.steps.keys().next().copied().unwrap_or(current);
        InUse { oldest: if current == Revision(0) { oldest } else { oldest.min(current) }, current }
    }
}
