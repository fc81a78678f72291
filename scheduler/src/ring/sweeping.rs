//! Beside the turn: maps of placements that are gone are deleted, again and again until they are. The API server's
//! garbage collector does the same for objects; other stores have none.

use std::{collections::BTreeSet, time::Duration};

use berth_types::PlacementName;

use super::{RETRY, Ring};
use crate::facts::Fact;

/// Placements (name, uid) whose maps are to be deleted.
#[derive(Debug, Default)]
pub(super) struct Sweep {
    left: BTreeSet<(PlacementName, String)>,
    in_flight: bool,
    not_before: Duration,
}

impl Ring {
    pub(super) fn sweep(&mut self, now: Duration) {
        self.sweep.left.extend(self.index.take_orphans());
        if self.sweep.in_flight || self.sweep.left.is_empty() || now < self.sweep.not_before {
            return;
        }
        self.sweep.in_flight = true;
        let (writer, facts, metrics) = (self.writer.clone(), self.facts.clone(), self.metrics.clone());
        let gone = std::mem::take(&mut self.sweep.left);
        self.jobs.spawn(async move {
            let mut left = BTreeSet::new();
            for (name, uid) in gone {
                if let Err(error) = writer.forget(&name, &uid).await {
                    tracing::warn!(placement = %name, uid, %error, "maps of a gone placement kept");
                    metrics.refused(error.as_str());
                    left.insert((name, uid));
                }
            }
            // The ring may have ended meanwhile; the next leader finds what was left.
            let _ = facts.send(Fact::Swept(left)).await;
        });
    }

    pub(super) fn swept(&mut self, now: Duration, left: BTreeSet<(PlacementName, String)>) {
        self.sweep.in_flight = false;
        if !left.is_empty() {
            self.sweep.not_before = now.saturating_add(RETRY.1);
        }
        self.sweep.left.extend(left);
    }
}
