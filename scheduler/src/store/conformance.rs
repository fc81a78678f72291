//! One suite for all stores: what the scheduler relies on. Tests run it on the stores themselves; it judges and
//! leaves nothing behind.

use berth_crds::{
    PlacementMap, PlacementMapSpec,
    placement_map::{MapDevice, MapLayer},
};
use berth_types::{DeviceId, ExpertId, PlacementName, Revision};

use super::{Store, StoreError, object};

/// A store that does not do what the scheduler relies on.
#[derive(Debug, thiserror::Error)]
#[error("{rule}: {found}")]
pub struct Departure {
    /// What should have been.
    pub rule: &'static str,
    /// What was.
    pub found: String,
}

/// A placement that the suite may write maps of. Its object must exist where the store looks for owners.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Its name.
    pub name: PlacementName,
    /// Its uid.
    pub uid: String,
}

impl Subject {
    /// A small map of this placement; different for each `epoch` and revision.
    ///
    /// # Errors
    /// [`Departure`] never, unless the suite is wrong.
    pub fn map(&self, epoch: u64, revision: u64) -> Result<PlacementMap, Departure> {
        self.sized_map(epoch, revision, 2, 4)
    }

    /// A map of `layers` layers with `slots` slots each.
    ///
    /// # Errors
    /// As [`Self::map`].
    pub fn sized_map(&self, epoch: u64, revision: u64, layers: u32, slots: u32) -> Result<PlacementMap, Departure> {
        let device: DeviceId = "n1/0000:01:00.0".parse().map_err(|error| differs("a device has a name", &error))?;
        let devices = vec![MapDevice { device, slots }];
        let expert = |layer: u32, slot: u32| (slot % 7 != 3).then_some(ExpertId((slot * 31 + layer) % 9_000));
        let layer =
            |layer| MapLayer { layer, experts: (0..slots).map(|slot| expert(layer, slot)).collect(), weights: None };
        let layers = (0..layers).map(layer).collect();
        let placement = self.name.name().to_owned();
        Ok(object(&self.name, PlacementMapSpec { placement, revision, epoch, devices, layers }))
    }
}

fn differs(rule: &'static str, found: &dyn std::fmt::Debug) -> Departure {
    Departure { rule, found: format!("{found:?}") }
}

fn works<T>(rule: &'static str, outcome: Result<T, StoreError>) -> Result<T, Departure> {
    outcome.map_err(|error| Departure { rule, found: error.to_string() })
}

/// The specs of the subject's maps, by revision.
async fn specs(store: &dyn Store, subject: &Subject) -> Result<Vec<PlacementMapSpec>, Departure> {
    let own = |(uid, map): &(String, PlacementMap)| {
        *uid == subject.uid && map.metadata.namespace.as_deref() == Some(subject.name.namespace())
    };
    let listed = works("maps can be listed", store.list().await)?;
    let mut specs: Vec<_> = listed.into_iter().filter(own).map(|(_, map)| map.spec).collect();
    specs.sort_by_key(|spec| spec.revision);
    Ok(specs)
}

/// Runs the suite on a placement without maps.
///
/// # Errors
/// The first [`Departure`].
pub async fn conform(store: &dyn Store, subject: &Subject) -> Result<(), Departure> {
    let Subject { name, uid } = subject;
    let before = specs(store, subject).await?;
    if !before.is_empty() {
        return Err(differs("the suite begins without maps", &before.len()));
    }
    let (first, second, tenth) = (subject.map(3, 1)?, subject.map(3, 2)?, subject.map(4, 10)?);
    for map in [&first, &tenth, &second] {
        works("an absent revision is created", store.create(uid, map).await)?;
    }
    let written = vec![first.spec.clone(), second.spec.clone(), tenth.spec.clone()];
    let listed = specs(store, subject).await?;
    if listed != written {
        return Err(differs("what was created is read back", &listed));
    }
    for again in [subject.map(3, 2)?, subject.map(9, 2)?] {
        match store.create(uid, &again).await {
            Err(StoreError::Exists { name: of, revision }) if of == *name && revision == Revision(2) => {}
            outcome => return Err(differs("a revision that exists is refused as such, whoever asks", &outcome)),
        }
    }
    if specs(store, subject).await? != written {
        return Err(differs("a refused write changes nothing", &"another map"));
    }
    works("a revision is deleted", store.delete(name, uid, Revision(2)).await)?;
    works("an absent revision is no error to delete", store.delete(name, uid, Revision(2)).await)?;
    works("an unknown revision is no error to delete", store.delete(name, uid, Revision(77)).await)?;
    let left = specs(store, subject).await?;
    if left != [first.spec, tenth.spec] {
        return Err(differs("only that revision is deleted", &left));
    }
    large(store, subject).await?;
    for revision in [1, 3, 10] {
        works("the rest is deleted", store.delete(name, uid, Revision(revision)).await)?;
    }
    let left = specs(store, subject).await?;
    if left.is_empty() { Ok(()) } else { Err(differs("nothing is left", &left.len())) }
}

/// The largest map that design names: 61 layers of 9,000 slots.
async fn large(store: &dyn Store, subject: &Subject) -> Result<(), Departure> {
    let map = subject.sized_map(4, 3, 61, 9_000)?;
    works("61 layers of 9,000 slots fit", store.create(&subject.uid, &map).await)?;
    match store.create(&subject.uid, &map).await {
        Err(StoreError::Exists { .. }) => {}
        outcome => return Err(differs("a large revision that exists is refused", &outcome)),
    }
    let listed = specs(store, subject).await?;
    if listed.contains(&map.spec) { Ok(()) } else { Err(differs("a large map is read back", &listed.len())) }
}
