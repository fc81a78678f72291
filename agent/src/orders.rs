//! What this node must hold, as the scheduler says it, and what may be done to it, as the operator says
//! it. Pure: a deposed scheduler and a late message are refused here.

use std::collections::{BTreeMap, BTreeSet};

use berth_crds::{
    AcceleratorNodeSpec,
    accelerator_node::{CordonedDevice, Order},
};
use berth_proto::{
    WireError,
    convert::{self, Shelf},
    v1,
};
use berth_types::{Admission, Epoch, Revision};

use crate::health::fact::Local;

/// Shelves by device.
pub type Desired = BTreeMap<Local, Vec<v1::Shelf>>;
/// A revision of a placement: uid of the ExpertPlacement, revision.
pub type Held = BTreeSet<(String, Revision)>;

/// Why an order is not obeyed. What was ordered before stays.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Somebody led after the sender did.
    #[error("epoch {got} is below {known}: another scheduler leads")]
    Epoch {
        /// The order's.
        got: Epoch,
        /// The highest seen.
        known: Epoch,
    },
    /// A later order of this stream was obeyed already.
    #[error("sequence {got} is below {known}: a late order")]
    Sequence {
        /// The order's.
        got: u64,
        /// The highest seen.
        known: u64,
    },
    /// A placement never goes back.
    #[error("placement {placement}: revision {got} is below {known} and no longer held")]
    Revision {
        /// The placement.
        placement: String,
        /// The order's.
        got: Revision,
        /// The highest ordered.
        known: Revision,
    },
    /// It belongs to another node.
    #[error("device {device} is not on this node")]
    Stranger {
        /// The device.
        device: String,
    },
    /// It cannot be read.
    #[error(transparent)]
    Wire(#[from] WireError),
}

impl Refused {
    /// Label of the metric.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Epoch { .. } => "epoch",
            Self::Sequence { .. } => "sequence",
            Self::Revision { .. } => "revision",
            Self::Stranger { .. } => "stranger",
            Self::Wire(_) => "wire",
        }
    }
}

/// Lets orders through in their order.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    epoch: Epoch,
    sequence: u64,
    highest: BTreeMap<String, Revision>,
}

impl Gate {
    /// A new stream: its numbers start anew, its epoch does not.
    pub fn connected(&mut self) {
        self.sequence = 0;
    }

    /// Whether a scheduler of `epoch` may order anything.
    ///
    /// # Errors
    /// [`Refused::Epoch`].
    pub fn admit(&mut self, epoch: Epoch) -> Result<(), Refused> {
        if epoch < self.epoch {
            return Err(Refused::Epoch { got: epoch, known: self.epoch });
        }
        if epoch > self.epoch {
            (self.epoch, self.sequence) = (epoch, 0);
            self.highest.clear();
        }
        Ok(())
    }

    /// Checks a whole order; `held` is what this node still has.
    ///
    /// # Errors
    /// [`Refused`]; then nothing of the order counts.
    pub fn accept(&mut self, node: &str, order: &v1::DesiredShelves, held: &Held) -> Result<Desired, Refused> {
        self.admit(Epoch(order.epoch))?;
        if order.sequence < self.sequence {
            return Err(Refused::Sequence { got: order.sequence, known: self.sequence });
        }
        let mut desired = Desired::new();
        let mut highest = self.highest.clone();
        for device in &order.devices {
            let id = convert::device(&device.device)?;
            if id.node() != node {
                return Err(Refused::Stranger { device: id.to_string() });
            }
            for wire in &device.shelves {
                let shelf = Shelf::try_from(wire)?;
                self.check(&shelf, held)?;
                let top = highest.entry(shelf.placement_uid.clone()).or_default();
                *top = (*top).max(shelf.revision);
            }
            desired.entry(id.local().to_owned()).or_default().extend(device.shelves.iter().cloned());
        }
        (self.highest, self.sequence) = (highest, order.sequence);
        Ok(desired)
    }

    fn check(&self, shelf: &Shelf, held: &Held) -> Result<(), Refused> {
        let known = self.highest.get(&shelf.placement_uid).copied().unwrap_or_default();
        let has = || held.contains(&(shelf.placement_uid.clone(), shelf.revision));
        if shelf.revision < known && !has() {
            return Err(Refused::Revision { placement: shelf.placement.to_string(), got: shelf.revision, known });
        }
        Ok(())
    }
}

/// What the operator wants of this node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Wanted {
    /// It hosts experts.
    pub native: bool,
    /// Everything on it is moved away.
    pub drain: bool,
    /// Devices taken out by hand: why, by device.
    pub cordoned: BTreeMap<Local, String>,
    /// Resets, and reboots.
    pub orders: Vec<Order>,
    /// Generation of the spec.
    pub generation: Option<i64>,
}

impl Wanted {
    /// As the object says it.
    #[must_use]
    pub fn from_spec(spec: &AcceleratorNodeSpec, generation: Option<i64>) -> Self {
        let cordon = |cordoned: &CordonedDevice| (cordoned.device.local().to_owned(), cordoned.reason.clone());
        Self {
            native: spec.native,
            drain: spec.drain,
            cordoned: spec.cordoned_devices.iter().map(cordon).collect(),
            orders: spec.orders.clone(),
            generation,
        }
    }

    /// The admission of a device under this will, and why when it is not its health's own.
    #[must_use]
    pub fn admission(&self, local: &str, health: Admission) -> (Admission, Option<String>) {
        let why = match self.cordoned.get(local) {
            Some(reason) => Some(format!("cordoned: {reason}")),
            None if self.drain => Some("node is drained".to_owned()),
            None => None,
        };
        match why {
            Some(why) if health < Admission::Draining => (Admission::Draining, Some(why)),
            _ => (health, None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn order(epoch: u64, sequence: u64, revision: u64) -> v1::DesiredShelves {
        let shelf = v1::Shelf {
            placement: "models/v3-0".to_owned(),
            placement_uid: "6c1f".to_owned(),
            revision,
            weights: Some(v1::Weights { uri: "file:///models/v3".to_owned(), digest: String::new() }),
            format: String::new(),
            layers: Vec::new(),
        };
        let device = v1::DeviceShelves { device: "gpu-07/0000:3b:00.0".to_owned(), shelves: vec![shelf] };
        v1::DesiredShelves { epoch, sequence, devices: vec![device] }
    }

    #[test]
    fn a_deposed_scheduler_orders_nothing() {
        let mut gate = Gate::default();
        gate.accept("gpu-07", &order(3, 1, 5), &Held::new()).unwrap();
        let refused = gate.accept("gpu-07", &order(2, 9, 9), &Held::new()).unwrap_err();
        assert_eq!(refused, Refused::Epoch { got: Epoch(2), known: Epoch(3) });
    }

    #[test]
    fn a_lower_revision_is_obeyed_only_while_it_is_still_held() {
        let mut gate = Gate::default();
        gate.accept("gpu-07", &order(3, 1, 5), &Held::new()).unwrap();
        assert!(matches!(gate.accept("gpu-07", &order(3, 2, 4), &Held::new()), Err(Refused::Revision { .. })));
        let held = [("6c1f".to_owned(), Revision(4))].into();
        assert!(gate.accept("gpu-07", &order(3, 2, 4), &held).is_ok());
        // A new leader starts from what the API server holds, which may be any revision.
        assert!(gate.accept("gpu-07", &order(4, 1, 4), &Held::new()).is_ok());
    }

    #[test]
    fn an_order_for_another_node_is_refused_whole() {
        let mut gate = Gate::default();
        assert!(matches!(gate.accept("gpu-08", &order(1, 1, 1), &Held::new()), Err(Refused::Stranger { .. })));
        assert!(gate.highest.is_empty());
    }

    #[test]
    fn a_cordon_drains_and_never_hides_what_health_says() {
        let wanted = Wanted { cordoned: [("0000:3b:00.0".to_owned(), "swap".to_owned())].into(), ..Wanted::default() };
        let (admission, why) = wanted.admission("0000:3b:00.0", Admission::Schedulable);
        assert_eq!((admission, why.as_deref()), (Admission::Draining, Some("cordoned: swap")));
        assert_eq!(wanted.admission("0000:3b:00.0", Admission::Barred), (Admission::Barred, None));
        assert_eq!(wanted.admission("0000:9d:00.0", Admission::Schedulable), (Admission::Schedulable, None));
    }

    proptest! {
        #[test]
        fn epoch_and_revision_never_fall(orders in proptest::collection::vec((0u64..4, 0u64..6, 1u64..6), 0..40)) {
            let mut gate = Gate::default();
            let (mut epoch, mut revision) = (0, 0);
            for (e, sequence, r) in orders {
                if gate.accept("gpu-07", &order(e, sequence, r), &Held::new()).is_ok() {
                    prop_assert!(e > epoch || (e == epoch && r >= revision));
                    (epoch, revision) = (e, r);
                }
            }
        }
    }
}
