//! Tokens per (placement, layer, expert), for the load that reports carry. Counts only; it never sees an
//! activation.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use berth_proto::v1::{LayerLoad, PlacementLoad};
use berth_types::LayerId;

use super::forward::Counted;

/// What was computed since the last report.
#[derive(Debug, Default)]
pub(crate) struct Tally(Mutex<BTreeMap<(String, LayerId), Vec<u64>>>);

impl Tally {
    /// Adds one answered call.
    pub(crate) fn count(&self, counted: &Counted) {
        let mut tally = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let tokens = tally.entry((counted.placement_uid.clone(), counted.layer)).or_default();
        for expert in &counted.experts {
            let index = usize::try_from(*expert).unwrap_or(usize::MAX);
            if tokens.len() <= index {
                tokens.resize(index.saturating_add(1), 0);
            }
            if let Some(count) = tokens.get_mut(index) {
                *count = count.saturating_add(1);
            }
        }
    }

    /// Gives the counts and starts again from zero.
    pub(crate) fn take(&self) -> Vec<PlacementLoad> {
        let tally = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let mut loads: Vec<PlacementLoad> = Vec::new();
        for ((placement_uid, layer), tokens) in tally {
            let layer = LayerLoad { layer: layer.0, tokens };
            match loads.last_mut() {
                Some(last) if last.placement_uid == placement_uid => last.layers.push(layer),
                _ => loads.push(PlacementLoad { placement_uid, layers: vec![layer] }),
            }
        }
        loads
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_counted_by_placement_layer_and_expert_and_given_once() {
        let tally = Tally::default();
        let counted = |uid: &str, layer, experts: &[u32]| Counted {
            placement_uid: uid.to_owned(),
            layer: LayerId(layer),
            experts: experts.to_vec(),
        };
        tally.count(&counted("a", 1, &[0, 2, 2]));
        tally.count(&counted("a", 1, &[3]));
        tally.count(&counted("a", 2, &[0]));
        tally.count(&counted("b", 1, &[1]));
        let loads = tally.take();
        assert_eq!(loads.len(), 2);
        assert_eq!(loads[0].layers[0].tokens, [1, 0, 2, 1]);
        assert_eq!(loads[0].layers[1].tokens, [1]);
        assert_eq!(loads[1].layers[0].tokens, [0, 1]);
        assert!(tally.take().is_empty());
    }
}
