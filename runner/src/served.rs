//! What each device answered, counted where answers arrive: the load as it was, not as a plan expected it. By revision,
//! so that a window tells of one placement only. Counts only, never what the tokens were.

use std::collections::BTreeMap;

use berth_proto::v1;
use berth_types::{DeviceId, LayerId, Revision};

/// Entries (token, expert) by device and layer.
pub type DeviceLoads = BTreeMap<DeviceId, BTreeMap<LayerId, u64>>;

/// Revisions that are counted: the one in use, and the one that drains.
const REVISIONS: usize = 2;

/// The counters.
#[derive(Debug, Default)]
pub(crate) struct Served {
    /// Since each revision was first used.
    total: BTreeMap<Revision, DeviceLoads>,
    /// Since the window opened.
    window: BTreeMap<Revision, DeviceLoads>,
}

impl Served {
    /// `device` answered `entries` of `layer`, asked by the routes of `revision`.
    pub(crate) fn count(&mut self, revision: Revision, device: &DeviceId, layer: LayerId, entries: u64) {
        for loads in [&mut self.total, &mut self.window] {
            let device = match loads.entry(revision).or_default().entry(device.clone()) {
                std::collections::btree_map::Entry::Vacant(vacant) => vacant.insert(BTreeMap::new()),
                std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
            };
            let sum = device.entry(layer).or_insert(0);
            *sum = sum.saturating_add(entries);
            while loads.len() > REVISIONS {
                loads.pop_first();
            }
        }
    }

    /// What was counted of `revision` since it was first used.
    pub(crate) fn total(&self, revision: Revision) -> DeviceLoads {
        self.total.get(&revision).cloned().unwrap_or_default()
    }

    /// Begins a window; gives what was counted of `revision` in the last.
    pub(crate) fn close(&mut self, revision: Revision) -> DeviceLoads {
        std::mem::take(&mut self.window).remove(&revision).unwrap_or_default()
    }
}

/// As it travels.
pub(crate) fn to_wire(loads: DeviceLoads) -> Vec<v1::DeviceLoad> {
    let layer = |(layer, tokens): (LayerId, u64)| v1::LayerTokens { layer: layer.0, tokens };
    let device = |(device, layers): (DeviceId, BTreeMap<LayerId, u64>)| v1::DeviceLoad {
        device: device.to_string(),
        layers: layers.into_iter().map(layer).collect(),
    };
    loads.into_iter().map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_tells_of_one_revision_and_the_total_goes_on() {
        let device: DeviceId = "n1/0".parse().unwrap();
        let mut served = Served::default();
        served.count(Revision(1), &device, LayerId(1), 7);
        served.count(Revision(2), &device, LayerId(1), 3);
        served.count(Revision(2), &device, LayerId(2), 1);
        let window: BTreeMap<_, _> = [(LayerId(1), 3), (LayerId(2), 1)].into();
        assert_eq!(served.close(Revision(2)), DeviceLoads::from([(device.clone(), window)]));
        assert!(served.close(Revision(2)).is_empty(), "a window begins with nothing");
        served.count(Revision(2), &device, LayerId(1), 1);
        assert_eq!(served.total(Revision(2))[&device][&LayerId(1)], 4);
        served.count(Revision(3), &device, LayerId(1), 1);
        assert!(served.total(Revision(1)).is_empty(), "only the last two revisions are counted");
    }
}
