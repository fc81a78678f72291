//! What this device holds and what it should hold. Pure: orders and outcomes go in, a snapshot for the
//! calls and views for the supervisor come out.
//!
//! Several revisions are held at once and never change once they are ready; a call works on the snapshot
//! it started with. It must never load or free anything itself: memory goes with the last `Arc`.

use std::{
    collections::{BTreeMap, btree_map::Entry as Place},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use berth_kernels::{Checkpoint, PackedExpert};
use berth_proto::{convert::Shelf, v1};
use berth_types::{Bytes, ExpertId, LayerId, Revision};
use tokio_util::sync::DropGuard;

/// Which shelf. A placement made anew under the same name has another uid, so it is another shelf.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ShelfKey {
    /// Uid of the ExpertPlacement.
    pub(crate) placement_uid: String,
    /// The placement's revision.
    pub(crate) revision: Revision,
}

impl From<&Shelf> for ShelfKey {
    fn from(shelf: &Shelf) -> Self {
        Self { placement_uid: shelf.placement_uid.clone(), revision: shelf.revision }
    }
}

/// One expert in this device's memory. Every slot and every revision that names it shares it.
#[derive(Debug)]
pub(crate) struct Resident {
    /// The weights in the backend's layout.
    pub(crate) packed: PackedExpert,
}

/// The experts of one layer of a shelf.
#[derive(Debug, Default)]
pub(crate) struct HeldLayer {
    /// What a kernel call gets; one entry per expert, in rising order of expert id.
    table: Vec<PackedExpert>,
    /// Expert id of each table entry, rising.
    experts: Vec<ExpertId>,
    /// Keeps the sharing alive; same order as `table`.
    residents: Vec<Arc<Resident>>,
}

impl HeldLayer {
    /// A layer of these experts.
    #[must_use]
    pub(crate) fn new(experts: BTreeMap<ExpertId, Arc<Resident>>) -> Self {
        let mut layer = Self::default();
        for (expert, resident) in experts {
            layer.table.push(resident.packed.clone());
            layer.experts.push(expert);
            layer.residents.push(resident);
        }
        layer
    }

    /// The experts, for a kernel call.
    #[must_use]
    pub(crate) fn table(&self) -> &[PackedExpert] {
        &self.table
    }

    /// Where in [`HeldLayer::table`] an expert is.
    #[must_use]
    pub(crate) fn position(&self, expert: ExpertId) -> Option<usize> {
        self.experts.binary_search(&expert).ok()
    }

    /// Experts held, rising.
    #[must_use]
    pub(crate) fn experts(&self) -> &[ExpertId] {
        &self.experts
    }

    fn bytes(&self) -> Bytes {
        self.residents.iter().map(|resident| Bytes(resident.packed.bytes())).sum()
    }
}

/// A shelf that is completely loaded; never changes.
#[derive(Debug)]
pub(crate) struct Held {
    /// Digest of the checkpoint that was loaded.
    pub(crate) digest: String,
    /// Elements of one row.
    pub(crate) hidden: u32,
    /// Experts of each layer of the model, held here or not.
    pub(crate) model_experts: u32,
    /// Experts by layer.
    pub(crate) layers: BTreeMap<LayerId, HeldLayer>,
    /// Where they came from; stays open while a later revision may take more from it.
    pub(crate) _source: Option<Arc<Checkpoint>>,
}

impl Held {
    /// Bytes on the device, an expert in several slots counted once.
    #[must_use]
    pub(crate) fn bytes(&self) -> Bytes {
        self.layers.values().map(HeldLayer::bytes).sum()
    }
}

/// What calls see: the ready shelves, and whether the device may answer at all.
#[derive(Debug, Default)]
pub(crate) struct Shelves {
    held: BTreeMap<String, BTreeMap<Revision, Arc<Held>>>,
    barred: Option<Arc<str>>,
}

/// Why a shelf is not served here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotHeld {
    /// Nothing of this placement is ready.
    #[error("placement_uid {0:?} is not served by this device: take the routes again")]
    Placement(String),
    /// Other revisions are ready.
    #[error("revision {wanted} is not served by this device, {served} are: take the routes again")]
    Revision {
        /// What the call asked for.
        wanted: Revision,
        /// What there is, as text.
        served: String,
    },
}

impl Shelves {
    /// The ready shelf.
    ///
    /// # Errors
    /// What is missing: the placement, or the revision.
    pub(crate) fn find(&self, placement_uid: &str, revision: Revision) -> Result<&Arc<Held>, NotHeld> {
        let revisions = self.held.get(placement_uid).ok_or_else(|| NotHeld::Placement(placement_uid.to_owned()))?;
        revisions.get(&revision).ok_or_else(|| NotHeld::Revision {
            wanted: revision,
            served: revisions.keys().map(Revision::to_string).collect::<Vec<_>>().join(", "),
        })
    }

    /// Why every call is to be answered with `device lost`; `None` when calls may be answered.
    #[must_use]
    pub(crate) const fn barred(&self) -> Option<&Arc<str>> {
        self.barred.as_ref()
    }

    /// The same, with one more ready shelf.
    #[must_use]
    pub(crate) fn with(mut self, key: ShelfKey, held: Arc<Held>) -> Self {
        self.held.entry(key.placement_uid).or_default().insert(key.revision, held);
        self
    }

    /// The same, barred for a reason.
    #[cfg(test)]
    pub(crate) fn bar(mut self, reason: &str) -> Self {
        self.barred = Some(reason.into());
        self
    }
}

/// How far a load is; written by the loading threads, read by reports.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Slots whose expert is in memory.
    pub(crate) slots: AtomicU64,
    /// Bytes read for this shelf.
    pub(crate) bytes: AtomicU64,
    /// Bytes of the checkpoint read to know which it is.
    pub(crate) digested: AtomicU64,
}

/// How far a device is with a shelf.
#[derive(Clone, Debug)]
pub(crate) enum Phase {
    /// Being read.
    Loading,
    /// Served.
    Ready(Arc<Held>),
    /// Not served: the sentence says what is wrong and what to do.
    Failed(Arc<str>),
}

/// One desired shelf as reports show it.
#[derive(Clone, Debug)]
pub(crate) struct View {
    placement: String,
    key: ShelfKey,
    slots: u64,
    phase: Phase,
    progress: Arc<Progress>,
}

impl View {
    /// The shelf, if it is ready.
    pub(crate) const fn held(&self) -> Option<&Arc<Held>> {
        match &self.phase {
            Phase::Ready(held) => Some(held),
            Phase::Loading | Phase::Failed(_) => None,
        }
    }

    /// As it travels to the supervisor.
    #[must_use]
    pub(crate) fn to_wire(&self) -> v1::ShelfState {
        let (phase, error) = match &self.phase {
            Phase::Loading => (v1::ShelfPhase::Loading, ""),
            Phase::Ready(_) => (v1::ShelfPhase::Ready, ""),
            Phase::Failed(error) => (v1::ShelfPhase::Failed, &**error),
        };
        let held = self.held();
        let ready = if held.is_some() { self.slots } else { self.progress.slots.load(Ordering::Relaxed) };
        v1::ShelfState {
            placement: self.placement.clone(),
            placement_uid: self.key.placement_uid.clone(),
            revision: self.key.revision.0,
            phase: phase.into(),
            slots_ready: ready,
            slots_total: self.slots,
            bytes: held.map_or(0, |held| held.bytes().get()),
            loaded_bytes: self.progress.bytes.load(Ordering::Relaxed),
            digested_bytes: self.progress.digested.load(Ordering::Relaxed),
            error: error.to_owned(),
            digest: held.map(|held| held.digest.clone()).unwrap_or_default(),
        }
    }
}

/// Numbers each load, so that the outcome of one that is no longer wanted is not taken for another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LoadId(u64);

/// A load to start.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    /// Identifies its outcome.
    pub(crate) id: LoadId,
    /// What to load.
    pub(crate) shelf: Arc<Shelf>,
    /// Where to say how far it is.
    pub(crate) progress: Arc<Progress>,
}

/// What an order asks for.
#[derive(Debug)]
pub(crate) struct Obeyed {
    /// Loads to start.
    pub(crate) loads: Vec<Load>,
    /// Shelves that are let go. Drop them only after the loads have claimed the experts they share.
    pub(crate) freed: Vec<Arc<Held>>,
}

/// A desired shelf and where it stands.
struct Entry {
    placement: String,
    /// `None` when the order itself could not be read.
    shelf: Option<Arc<Shelf>>,
    phase: Phase,
    progress: Arc<Progress>,
    id: LoadId,
    /// Cancels the load when the entry goes.
    guard: Option<DropGuard>,
}

impl Entry {
    fn fresh(wire: &v1::Shelf, id: LoadId) -> Self {
        let (shelf, phase) = match Shelf::try_from(wire) {
            Ok(shelf) => (Some(Arc::new(shelf)), Phase::Loading),
            Err(error) => (None, Phase::Failed(format!("the order for this shelf: {error}").into())),
        };
        Self { placement: wire.placement.clone(), shelf, phase, progress: Arc::default(), id, guard: None }
    }

    /// The load that this entry needs; none when its order cannot be read.
    fn load(&self) -> Option<Load> {
        let shelf = Arc::clone(self.shelf.as_ref()?);
        Some(Load { id: self.id, shelf, progress: Arc::clone(&self.progress) })
    }

    fn held(self) -> Option<Arc<Held>> {
        match self.phase {
            Phase::Ready(held) => Some(held),
            Phase::Loading | Phase::Failed(_) => None,
        }
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("placement", &self.placement).field("phase", &self.phase).finish_non_exhaustive()
    }
}

/// Desired shelves against held ones.
#[derive(Debug, Default)]
pub(crate) struct Board {
    entries: BTreeMap<ShelfKey, Entry>,
    barred: Option<Arc<str>>,
    loads: u64,
}

impl Board {
    /// Takes a complete order: what it does not name is let go.
    ///
    /// A shelf that is already here with the same slots and weights is left as it is. One whose contents
    /// changed under the same revision is loaded anew.
    pub(crate) fn desire(&mut self, order: &v1::WorkerOrder) -> Obeyed {
        self.barred = order.barred.then(|| order.barred_reason.as_str().into());
        let mut before = std::mem::take(&mut self.entries);
        let mut obeyed = Obeyed { loads: Vec::new(), freed: Vec::new() };
        for wire in &order.shelves {
            let key = ShelfKey { placement_uid: wire.placement_uid.clone(), revision: Revision(wire.revision) };
            let old = before.remove(&key);
            let Place::Vacant(place) = self.entries.entry(key) else { continue };
            self.loads = self.loads.saturating_add(1);
            let fresh = Entry::fresh(wire, LoadId(self.loads));
            match old {
                Some(old) if old.shelf.is_some() && old.shelf == fresh.shelf => {
                    place.insert(old);
                }
                old => {
                    obeyed.freed.extend(old.and_then(Entry::held));
                    obeyed.loads.extend(fresh.load());
                    place.insert(fresh);
                }
            }
        }
        obeyed.freed.extend(before.into_values().filter_map(Entry::held));
        obeyed
    }

    /// Ties a load that was started to its entry: when the entry goes, `guard` cancels the load.
    pub(crate) fn started(&mut self, id: LoadId, guard: DropGuard) {
        if let Some(entry) = self.entry(id) {
            entry.guard = Some(guard);
        }
    }

    /// Takes the outcome of a load. Says whether anything still wanted it.
    pub(crate) fn settle(&mut self, id: LoadId, outcome: Result<Held, String>) -> bool {
        let Some(entry) = self.entry(id) else { return false };
        entry.phase = match outcome {
            Ok(held) => Phase::Ready(Arc::new(held)),
            Err(error) => Phase::Failed(error.into()),
        };
        true
    }

    /// What calls may use from now on.
    #[must_use]
    pub(crate) fn snapshot(&self) -> Shelves {
        let mut shelves = Shelves { held: BTreeMap::new(), barred: self.barred.clone() };
        for (key, entry) in &self.entries {
            if let Phase::Ready(held) = &entry.phase {
                shelves = shelves.with(key.clone(), Arc::clone(held));
            }
        }
        shelves
    }

    /// Every desired shelf and where it stands.
    #[must_use]
    pub(crate) fn views(&self) -> Vec<View> {
        let view = |(key, entry): (&ShelfKey, &Entry)| View {
            placement: entry.placement.clone(),
            key: key.clone(),
            slots: entry.shelf.as_ref().map_or(0, |shelf| slots(shelf)),
            phase: entry.phase.clone(),
            progress: Arc::clone(&entry.progress),
        };
        self.entries.iter().map(view).collect()
    }

    fn entry(&mut self, id: LoadId) -> Option<&mut Entry> {
        self.entries.values_mut().find(|entry| entry.id == id)
    }
}

/// Slots of a shelf that hold an expert.
#[must_use]
pub(crate) fn slots(shelf: &Shelf) -> u64 {
    shelf.slots.values().flatten().map(|slot| u64::from(slot.is_some())).sum()
}
