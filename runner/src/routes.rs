//! Where the experts are: one revision of a placement, indexed by (layer, expert).
//!
//! Pure. A revision is swapped between two steps, never within a table: what changes is which table a call looks at.
//! Among an expert's usable replicas the choice depends on the token's spread alone, so that replicas share tokens
//! evenly, or by their weights, and a sequence meets the same replicas whatever batch it is in.

use std::collections::{BTreeMap, BTreeSet};

use berth_proto::{WireError, convert, v1};
use berth_types::{DeviceId, Epoch, ExpertId, LayerId, Revision};

use crate::num::{index_of, usize_of};

/// A revision as the scheduler sends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteTable {
    /// Uid of the ExpertPlacement.
    pub placement_uid: String,
    /// Which leader says so.
    pub epoch: Epoch,
    /// The revision.
    pub revision: Revision,
    /// Devices and what they hold.
    pub devices: Vec<RouteDevice>,
}

/// One device of a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteDevice {
    /// The device.
    pub device: DeviceId,
    /// `ip:port` of its worker.
    pub endpoint: String,
    /// Experts by layer and slot.
    pub slots: convert::Slots,
    /// What part of its expert's tokens each slot takes; empty = replicas of an expert share them evenly.
    pub weights: convert::SlotWeights,
}

impl TryFrom<&v1::Routes> for RouteTable {
    type Error = WireError;

    fn try_from(wire: &v1::Routes) -> Result<Self, WireError> {
        if wire.placement_uid.is_empty() {
            return Err(WireError::new("placement_uid", "", "the uid of the ExpertPlacement"));
        }
        if wire.revision == 0 {
            return Err(WireError::new("revision", "0", "a revision from 1"));
        }
        let device = |wire: &v1::RouteDevice| {
            let slots = convert::slots_from_wire(&wire.layers)?;
            Ok(RouteDevice {
                device: convert::device(&wire.device)?,
                endpoint: wire.endpoint.clone(),
                weights: convert::weights_from_wire(&wire.weights, &slots)?,
                slots,
            })
        };
        let devices: Vec<RouteDevice> = wire.devices.iter().map(device).collect::<Result<_, WireError>>()?;
        let distinct: BTreeSet<&DeviceId> = devices.iter().map(|device| &device.device).collect();
        if distinct.len() != devices.len() {
            return Err(WireError::new("devices.device", &devices.len().to_string(), "each device once"));
        }
        Ok(Self {
            placement_uid: wire.placement_uid.clone(),
            epoch: Epoch(wire.epoch),
            revision: Revision(wire.revision),
            devices,
        })
    }
}

/// A revision, indexed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Routes {
    pub(crate) placement_uid: String,
    pub(crate) epoch: Epoch,
    pub(crate) revision: Revision,
    /// In the order of their ids.
    devices: Vec<Place>,
    /// By layer and expert, in the order of devices.
    replicas: BTreeMap<LayerId, Vec<Vec<Replica>>>,
    /// Replicas take their weights; else they share evenly.
    weighted: bool,
}

/// One replica of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Replica {
    /// Index into the devices.
    at: usize,
    /// Its part of the expert's tokens, beside the other replicas.
    weight: u64,
}

/// A device and the way to its worker.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) device: DeviceId,
    pub(crate) endpoint: String,
}

impl Routes {
    pub(crate) fn new(table: RouteTable) -> Self {
        let RouteTable { placement_uid, epoch, revision, mut devices } = table;
        devices.sort_by(|a, b| a.device.cmp(&b.device));
        let mut replicas: BTreeMap<LayerId, Vec<Vec<Replica>>> = BTreeMap::new();
        let weighted = devices.iter().any(|device| !device.weights.is_empty());
        for (index, device) in devices.iter().enumerate() {
            for (layer, slots) in &device.slots {
                let experts = replicas.entry(*layer).or_default();
                let weights = device.weights.get(layer);
                for (slot, expert) in slots.iter().enumerate() {
                    let Some(expert) = expert.map(|expert| usize_of(expert.0)) else { continue };
                    if experts.len() <= expert {
                        experts.resize_with(expert + 1, Vec::new);
                    }
                    let weight = weights.and_then(|weights| weights.get(slot)).copied();
                    let weight = weight.map_or(u64::from(!weighted), u64::from);
                    match experts[expert].last_mut().filter(|last| last.at == index) {
                        // Twice on a device: one place to send to, and no larger part where replicas share evenly.
                        Some(last) if weighted => last.weight += weight,
                        Some(_) => {}
                        None => experts[expert].push(Replica { at: index, weight }),
                    }
                }
            }
        }
        let devices = devices.into_iter().map(|device| Place { device: device.device, endpoint: device.endpoint });
        Self { placement_uid, epoch, revision, devices: devices.collect(), replicas, weighted }
    }

    /// The device with this index.
    pub(crate) fn place(&self, index: usize) -> &Place {
        &self.devices[index]
    }

    /// All devices.
    pub(crate) fn places(&self) -> &[Place] {
        &self.devices
    }

    /// Index of the device whose replica of `expert` a token with `spread` goes to, among those that are `usable`: of all
    /// spreads, each replica gets its part of the weights, and evenly many where no usable one has any.
    pub(crate) fn choose(
        &self,
        layer: LayerId,
        expert: ExpertId,
        spread: u64,
        usable: impl Fn(&Place) -> bool,
    ) -> Option<usize> {
        let replicas = self.replicas.get(&layer)?.get(usize_of(expert.0))?;
        let live = || replicas.iter().filter(|replica| usable(&self.devices[replica.at]));
        let whole: u64 = live().map(|replica| replica.weight).sum();
        if whole == 0 {
            return live().nth(index_of(spread, live().count())).map(|replica| replica.at);
        }
        let mut point = if self.weighted { scatter(spread, whole) } else { spread % whole };
        let taken = |replica: &&Replica| match point.checked_sub(replica.weight) {
            None => true,
            Some(rest) => {
                point = rest;
                false
            }
        };
        live().find(taken).map(|replica| replica.at)
    }

    /// Whether this may replace `old`: never an older epoch or revision of the same placement.
    pub(crate) fn may_replace(&self, old: &Self) -> bool {
        self.placement_uid != old.placement_uid || (self.epoch >= old.epoch && self.revision >= old.revision)
    }
}

/// A point below `whole` for `spread`. Neighbouring positions of a sequence have neighbouring spreads: multiples of the golden
/// ratio lay any run of them evenly over the whole, which their remainders would not.
fn scatter(spread: u64, whole: u64) -> u64 {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    let scaled = u128::from(spread.wrapping_mul(GOLDEN)) * u128::from(whole);
    u64::try_from(scaled >> 64).unwrap_or(0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn table(revision: u64, devices: &[(&str, &str, &[u32])]) -> RouteTable {
        let device = |(device, endpoint, experts): &(&str, &str, &[u32])| RouteDevice {
            device: device.parse().unwrap(),
            endpoint: (*endpoint).to_owned(),
            slots: [(LayerId(1), experts.iter().map(|expert| Some(ExpertId(*expert))).collect())].into(),
            weights: convert::SlotWeights::new(),
        };
        RouteTable {
            placement_uid: "6c1f".to_owned(),
            epoch: Epoch(1),
            revision: Revision(revision),
            devices: devices.iter().map(device).collect(),
        }
    }

    fn three() -> Routes {
        Routes::new(table(1, &[("c/0", "", &[0, 1]), ("a/0", "", &[0, 0]), ("b/0", "", &[0, 2])]))
    }

    fn chosen(routes: &Routes, expert: u32, spread: u64, gone: &str) -> Option<String> {
        let usable = |place: &Place| place.device.as_str() != gone;
        let index = routes.choose(LayerId(1), ExpertId(expert), spread, usable)?;
        Some(routes.place(index).device.to_string())
    }

    #[test]
    fn replicas_share_tokens_evenly_and_a_gone_one_is_skipped() {
        let routes = three();
        let share = |device: &str, gone: &str| {
            (0..60).filter(|spread| chosen(&routes, 0, *spread, gone).as_deref() == Some(device)).count()
        };
        assert_eq!([share("a/0", ""), share("b/0", ""), share("c/0", "")], [20, 20, 20]);
        assert_eq!([share("a/0", "b/0"), share("b/0", "b/0"), share("c/0", "b/0")], [30, 0, 30]);
    }

    #[test]
    fn replicas_take_their_part_of_the_tokens_and_those_without_any_help_only_where_nobody_else_can() {
        let mut table = table(1, &[("a/0", "", &[0]), ("b/0", "", &[0]), ("c/0", "", &[0, 1])]);
        for (device, weights) in table.devices.iter_mut().zip([vec![40_000], vec![25_535], vec![0, 65_535]]) {
            device.weights = [(LayerId(1), weights)].into();
        }
        let routes = Routes::new(table);
        // Any run of neighbouring spreads, as the positions of one sequence have, is divided by weight.
        for first in [0, 7_000_000_019] {
            let share = |device: &str, gone: &str| {
                (first..first + 200)
                    .filter(|spread| chosen(&routes, 0, *spread, gone).as_deref() == Some(device))
                    .count()
            };
            assert!((120..=124).contains(&share("a/0", "")), "{} of 200", share("a/0", ""));
            assert_eq!(share("a/0", "") + share("b/0", ""), 200, "c/0 has no weight");
            assert_eq!([share("a/0", "b/0"), share("c/0", "b/0")], [200, 0]);
        }
        let only = |place: &Place| place.device.as_str() == "c/0";
        assert_eq!(routes.choose(LayerId(1), ExpertId(0), 7, only), Some(2));
    }

    #[test]
    fn an_expert_without_a_usable_replica_has_no_choice() {
        let routes = three();
        assert_eq!(chosen(&routes, 2, 0, "b/0"), None);
        assert_eq!(chosen(&routes, 3, 0, ""), None);
        assert_eq!(chosen(&routes, 1, 5, "b/0").as_deref(), Some("c/0"));
    }

    #[test]
    fn an_older_revision_or_epoch_never_replaces_a_newer_one() {
        let (one, two) = (Routes::new(table(1, &[])), Routes::new(table(2, &[])));
        assert!(two.may_replace(&one) && one.may_replace(&one) && !one.may_replace(&two));
        let deposed = Routes::new(RouteTable { epoch: Epoch(0), ..table(9, &[]) });
        assert!(!deposed.may_replace(&one));
        let anew = Routes::new(RouteTable { placement_uid: "7d20".to_owned(), ..table(1, &[]) });
        assert!(anew.may_replace(&two));
    }

    #[test]
    fn damaged_routes_are_refused_by_field() {
        let device = v1::RouteDevice { device: "a/0".to_owned(), ..Default::default() };
        let devices = vec![device.clone()];
        let good =
            v1::Routes { epoch: 1, placement_uid: "u".to_owned(), revision: 1, devices, traceparent: String::new() };
        assert!(RouteTable::try_from(&good).is_ok());
        let field = |wire: v1::Routes| RouteTable::try_from(&wire).unwrap_err().field;
        assert_eq!(field(v1::Routes { revision: 0, ..good.clone() }), "revision");
        assert_eq!(field(v1::Routes { placement_uid: String::new(), ..good.clone() }), "placement_uid");
        assert_eq!(field(v1::Routes { devices: vec![device.clone(), device], ..good.clone() }), "devices.device");
        assert_eq!(field(v1::Routes { devices: vec![v1::RouteDevice::default()], ..good }), "device");
    }

    proptest! {
        #[test]
        fn every_choice_holds_the_expert(
            held in proptest::collection::vec(proptest::collection::vec(0_u32..12, 0..6), 1..5),
            expert in 0_u32..14,
            spread: u64,
        ) {
            let names: Vec<String> = (0..held.len()).map(|device| format!("n{device}/0")).collect();
            let devices: Vec<_> = names.iter().zip(&held).map(|(name, held)| (name.as_str(), "", held.as_slice())).collect();
            let routes = Routes::new(table(1, &devices));
            let choice = routes.choose(LayerId(1), ExpertId(expert), spread, |_| true);
            match choice {
                Some(index) => prop_assert!(held[index].contains(&expert)),
                None => prop_assert!(held.iter().all(|held| !held.contains(&expert))),
            }
        }
    }
}
