//! How many tokens went to each expert: soft state that the scheduler plans with. Counted per window; the last 16
//! windows are kept, so that a scheduler that starts anew gets them again. Counts only, never what the tokens were.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use berth_proto::v1;
use berth_types::{LayerId, Revision};

use crate::{
    num::{millis_of, usize_of},
    served::{self, DeviceLoads},
};

/// Windows that are kept for resending.
pub const WINDOWS_KEPT: usize = 16;

/// Counts tokens per (layer, expert).
#[derive(Debug)]
pub struct LoadCounter {
    experts: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    open: BTreeMap<LayerId, Vec<u64>>,
    revision: Revision,
    closed: VecDeque<v1::LoadWindow>,
    next: u64,
}

impl LoadCounter {
    /// A counter for layers of `experts` experts.
    #[must_use]
    pub fn new(experts: usize) -> Self {
        Self { experts, state: Mutex::new(State { next: 1, ..State::default() }) }
    }

    /// Counts one token for each entry of `chosen`. Ids outside the layer are ignored.
    pub fn count(&self, revision: Revision, layer: LayerId, chosen: &[u32]) {
        let mut state = self.state();
        state.revision = revision;
        let tokens = state.open.entry(layer).or_insert_with(|| vec![0; self.experts]);
        for expert in chosen {
            if let Some(count) = tokens.get_mut(usize_of(*expert)) {
                *count = count.saturating_add(1);
            }
        }
    }

    /// Closes the open window, which was `length` long, and returns it; `devices` tells what devices answered of a revision meanwhile. A window
    /// without tokens is given too: no traffic is news.
    pub fn close(&self, length: Duration, devices: impl FnOnce(Revision) -> DeviceLoads) -> v1::LoadWindow {
        let mut state = self.state();
        let layers = std::mem::take(&mut state.open);
        let window = v1::LoadWindow {
            window: state.next,
            revision: state.revision.0,
            layers: layers.into_iter().map(|(layer, tokens)| v1::LayerLoad { layer: layer.0, tokens }).collect(),
            devices: served::to_wire(devices(state.revision)),
            length_ms: millis_of(length),
        };
        state.next = state.next.saturating_add(1);
        state.closed.push_back(window.clone());
        while state.closed.len() > WINDOWS_KEPT {
            state.closed.pop_front();
        }
        window
    }

    /// The windows that are kept, oldest first.
    pub fn kept(&self) -> Vec<v1::LoadWindow> {
        self.state().closed.iter().cloned().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Counters stay meaningful whatever happened to the thread that held them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: Duration = Duration::from_secs(10);

    #[test]
    fn a_window_holds_what_was_counted_since_the_last() {
        let counter = LoadCounter::new(4);
        counter.count(Revision(3), LayerId(1), &[0, 2, 2, 9]);
        let window = counter.close(LENGTH, |_| DeviceLoads::new());
        assert_eq!((window.window, window.revision), (1, 3));
        assert_eq!(window.layers, [v1::LayerLoad { layer: 1, tokens: vec![1, 0, 2, 0] }]);
        assert!(counter.close(LENGTH, |_| DeviceLoads::new()).layers.is_empty());
    }

    #[test]
    fn only_the_last_windows_are_kept_in_order() {
        let counter = LoadCounter::new(1);
        for _ in 0..20 {
            counter.close(LENGTH, |_| DeviceLoads::new());
        }
        let kept: Vec<u64> = counter.kept().iter().map(|window| window.window).collect();
        assert_eq!(kept, (5..=20).collect::<Vec<_>>());
    }
}
