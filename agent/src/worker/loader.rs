//! Bytes to slots: reads the experts that a shelf names and packs them for this device.
//!
//! An expert that another revision already has is shared, never read twice: identity is (checkpoint digest,
//! format, layer, expert). Memory is refused before the first byte is read, and a load that fails or is cancelled
//! leaves nothing behind. Each load runs on threads of its own, so a file system that hangs holds up
//! neither the calls nor the end of the process.

use std::{
    collections::{BTreeMap, HashMap},
    num::NonZeroUsize,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use berth_kernels::{Backend, Checkpoint, Roots};
use berth_proto::convert::Shelf;
use berth_types::{Bytes, DeviceMemory, ExpertId, LayerId, WeightFormat};
use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

use super::{
    load_error::LoadError,
    model::Model,
    shelf::{Held, HeldLayer, Load, Progress, Resident},
};

/// Loads that run at once; more wait their turn.
const LOADS: usize = 2;

/// Which expert, by content.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Identity {
    digest: Arc<str>,
    /// As the device holds it; `None` = as stored.
    format: Option<WeightFormat>,
    layer: LayerId,
    expert: ExpertId,
}

/// Experts in memory that can be shared; holds none of them alive.
#[derive(Debug, Default)]
struct Pool(Mutex<HashMap<Identity, Weak<Resident>>>);

impl Pool {
    fn lock(&self) -> MutexGuard<'_, HashMap<Identity, Weak<Resident>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn get(&self, identity: &Identity) -> Option<Arc<Resident>> {
        self.lock().get(identity).and_then(Weak::upgrade)
    }

    /// Adds a freshly packed expert, or gives the one that another load put there meanwhile.
    fn share(&self, identity: Identity, fresh: Arc<Resident>) -> Arc<Resident> {
        let mut pool = self.lock();
        if let Some(there) = pool.get(&identity).and_then(Weak::upgrade) {
            return there;
        }
        pool.insert(identity, Arc::downgrade(&fresh));
        fresh
    }

    fn forget_freed(&self) {
        self.lock().retain(|_, resident| resident.strong_count() > 0);
    }
}

/// Experts that stay alive from the moment an order is taken until its loads end, so that a revision which
/// replaces another finds what they share.
#[derive(Debug, Default)]
pub(crate) struct Claim {
    _kept: Vec<Arc<Resident>>,
}

/// Loads shelves into this device's memory.
#[derive(Debug)]
pub(crate) struct Loader {
    backend: Arc<dyn Backend>,
    roots: Roots,
    device: Bytes,
    threads: NonZeroUsize,
    turns: Semaphore,
    pool: Pool,
    open: Mutex<HashMap<PathBuf, Weak<Checkpoint>>>,
    /// Bytes promised to loads that run and not yet packed.
    promised: Mutex<Bytes>,
}

impl Loader {
    /// A loader that packs for `backend` on a device of `device` bytes, reading below `roots` only, with
    /// `threads` threads per load.
    #[must_use]
    pub(crate) fn new(backend: Arc<dyn Backend>, roots: Roots, device: Bytes, threads: NonZeroUsize) -> Self {
        Self {
            backend,
            roots,
            device,
            threads,
            turns: Semaphore::new(LOADS),
            pool: Pool::default(),
            open: Mutex::default(),
            promised: Mutex::default(),
        }
    }

    /// Keeps what `shelf` can share alive until the claim is dropped. Empty for an order without a digest.
    #[must_use]
    pub(crate) fn claim(&self, shelf: &Shelf) -> Claim {
        let digest: Arc<str> = shelf.digest.as_str().into();
        let format = shelf.format;
        let identity = |(layer, expert)| Identity { digest: Arc::clone(&digest), format, layer, expert };
        Claim { _kept: wanted(shelf).into_keys().filter_map(|place| self.pool.get(&identity(place))).collect() }
    }

    /// Loads a shelf completely, when its turn comes.
    ///
    /// # Errors
    /// [`LoadError`]; [`LoadError::Cancelled`] at once when `stop` is cancelled, also while a read hangs.
    pub(crate) async fn load(
        self: Arc<Self>,
        load: Load,
        claim: Claim,
        stop: CancellationToken,
    ) -> Result<Held, LoadError> {
        // Cancel-safe: whatever is dropped here is a place in a queue or the wish to hear of an outcome.
        let work = async {
            let Ok(_turn) = self.turns.acquire().await else { return Err(LoadError::Cancelled) };
            let uri = load.shelf.uri.clone();
            let (tell, outcome) = oneshot::channel();
            let (loader, stop) = (Arc::clone(&self), stop.clone());
            let run = move || {
                let held = loader.load_now(&load.shelf, &load.progress, &stop);
                drop(claim);
                // The receiver is gone when the load was cancelled: then the experts go with it.
                drop(tell.send(held));
            };
            let builder = std::thread::Builder::new().name("load".to_owned());
            builder.spawn(run).map_err(|cause| LoadError::Thread { cause })?;
            outcome.await.unwrap_or(Err(LoadError::Broken { uri }))
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => Err(LoadError::Cancelled),
            outcome = work => outcome,
        }
    }

    /// The same on the caller's thread.
    ///
    /// # Errors
    /// [`LoadError`].
    pub(crate) fn load_now(
        &self,
        shelf: &Shelf,
        progress: &Progress,
        stop: &CancellationToken,
    ) -> Result<Held, LoadError> {
        let checkpoint = self.open(shelf, progress)?;
        let digest: Arc<str> = identity(&checkpoint, &shelf.uri, progress)?.into();
        let model = Model::read(&checkpoint, &shelf.uri)?;
        model.check(shelf)?;
        let wanted = wanted(shelf);
        let reading = Reading {
            loader: self,
            checkpoint: &checkpoint,
            digest: Arc::clone(&digest),
            model: &model,
            progress,
            stop,
            format: shelf.format,
            promise: self.promise(&digest, shelf.format, &wanted, &model)?,
        };
        let residents = reading.read_all(&wanted)?;
        self.pool.forget_freed();
        let mut layers: BTreeMap<LayerId, BTreeMap<ExpertId, Arc<Resident>>> = BTreeMap::new();
        for ((layer, expert), resident) in residents {
            layers.entry(layer).or_default().insert(expert, resident);
        }
        Ok(Held {
            digest: digest.to_string(),
            hidden: model.geometry.hidden,
            model_experts: model.geometry.experts,
            layers: layers.into_iter().map(|(layer, experts)| (layer, HeldLayer::new(experts))).collect(),
            _source: Some(Arc::clone(&checkpoint)),
        })
    }

    /// Opens what the shelf names, or takes what is open when its digest is the one ordered.
    fn open(&self, shelf: &Shelf, progress: &Progress) -> Result<Arc<Checkpoint>, LoadError> {
        let path = self.roots.resolve(&shelf.uri)?;
        let known = self.open.lock().unwrap_or_else(PoisonError::into_inner).get(&path).and_then(Weak::upgrade);
        if let Some(open) = known
            && open.identity() == Ok(shelf.digest.as_str())
        {
            return Ok(open);
        }
        let checkpoint = Arc::new(Checkpoint::open_within(&path, &self.roots)?);
        let found = identity(&checkpoint, &shelf.uri, progress)?;
        if !shelf.digest.is_empty() && shelf.digest != found {
            let (uri, wanted, found) = (shelf.uri.clone(), shelf.digest.clone(), found.to_owned());
            return Err(LoadError::Digest { uri, wanted, found });
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, checkpoint| checkpoint.strong_count() > 0);
        open.insert(path, Arc::downgrade(&checkpoint));
        Ok(checkpoint)
    }

    /// Sets bytes aside for the experts that are not here yet, by the one memory formula.
    fn promise(
        &self,
        digest: &Arc<str>,
        format: Option<WeightFormat>,
        wanted: &Wanted,
        model: &Model,
    ) -> Result<Promise<'_>, LoadError> {
        let absent = |(layer, expert): (LayerId, ExpertId)| {
            self.pool.get(&Identity { digest: Arc::clone(digest), format, layer, expert }).is_none()
        };
        let experts = wanted.keys().filter(|place| absent(**place)).count();
        let count = u64::try_from(experts).unwrap_or(u64::MAX);
        let expert = model.geometry.expert_bytes(format.unwrap_or(model.geometry.format));
        let needed = expert.times(count);
        let mut promised = self.promised.lock().unwrap_or_else(PoisonError::into_inner);
        let room = self.room(*promised);
        if needed > room.free {
            return Err(room.short(experts, needed));
        }
        *promised = promised.plus(needed);
        drop(promised);
        Ok(Promise { loader: self, left: Mutex::new(needed), expert })
    }

    /// What is free when `promised` bytes are to come.
    fn room(&self, promised: Bytes) -> Room {
        let memory = self.backend.memory();
        let held = Bytes(memory.packed).plus(promised);
        let workspace = Bytes(memory.workspace);
        // The transition room is part of it: it is there to hold the next revision before the last one goes.
        let free = DeviceMemory { device: self.device, workspace, committed: held }.room();
        Room { free, device: self.device, workspace, held }
    }
}

/// Where memory stands, for a decision and its sentence.
struct Room {
    free: Bytes,
    device: Bytes,
    workspace: Bytes,
    held: Bytes,
}

impl Room {
    const fn short(self, experts: usize, needed: Bytes) -> LoadError {
        let Self { free, device, workspace, held } = self;
        LoadError::Memory { experts, needed, free, device, workspace, held }
    }
}

/// Bytes set aside for one load; what is left of them is given back when it ends, however it ends.
struct Promise<'a> {
    loader: &'a Loader,
    left: Mutex<Bytes>,
    expert: Bytes,
}

impl Promise<'_> {
    /// One expert was packed: its bytes are now the backend's to count.
    fn keep_one(&self) {
        self.give_back(|left| left.0.min(self.expert.0));
    }

    fn give_back(&self, amount: impl FnOnce(Bytes) -> u64) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let given = Bytes(amount(*left));
        *left = left.minus(given);
        let mut promised = self.loader.promised.lock().unwrap_or_else(PoisonError::into_inner);
        *promised = promised.minus(given);
    }
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        self.give_back(Bytes::get);
    }
}

/// Experts a shelf wants, and in how many slots each.
type Wanted = BTreeMap<(LayerId, ExpertId), u64>;

fn wanted(shelf: &Shelf) -> Wanted {
    let mut wanted = Wanted::new();
    for (layer, slots) in &shelf.slots {
        for expert in slots.iter().flatten() {
            let slots = wanted.entry((*layer, *expert)).or_default();
            *slots = slots.saturating_add(1);
        }
    }
    wanted
}

fn identity<'a>(checkpoint: &'a Checkpoint, uri: &str, progress: &Progress) -> Result<&'a str, LoadError> {
    let read = |bytes| {
        progress.digested.fetch_add(bytes, Ordering::Relaxed);
    };
    let unreadable = |reason: &str| LoadError::Identity { uri: uri.to_owned(), reason: reason.to_owned() };
    checkpoint.identity_telling(&read).map_err(unreadable)
}

/// One load at work.
struct Reading<'a> {
    loader: &'a Loader,
    checkpoint: &'a Checkpoint,
    digest: Arc<str>,
    model: &'a Model,
    progress: &'a Progress,
    stop: &'a CancellationToken,
    format: Option<WeightFormat>,
    promise: Promise<'a>,
}

/// Experts of a shelf, in memory.
type Residents = BTreeMap<(LayerId, ExpertId), Arc<Resident>>;

impl Reading<'_> {
    /// Reads every wanted expert, on several threads; the first error ends all of them.
    fn read_all(&self, wanted: &Wanted) -> Result<Residents, LoadError> {
        let places: Vec<_> = wanted.iter().collect();
        let next = AtomicUsize::new(0);
        let read = || -> Result<Residents, LoadError> {
            let mut mine = Residents::new();
            while let Some(((layer, expert), slots)) = places.get(next.fetch_add(1, Ordering::Relaxed)) {
                if self.stop.is_cancelled() {
                    return Err(LoadError::Cancelled);
                }
                let resident =
                    self.read_one(*layer, *expert).inspect_err(|_| next.store(places.len(), Ordering::Relaxed))?;
                self.progress.slots.fetch_add(**slots, Ordering::Relaxed);
                mine.insert((*layer, *expert), resident);
            }
            Ok(mine)
        };
        let extra = self.loader.threads.get().min(places.len()).saturating_sub(1);
        let parts = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..extra).map(|_| scope.spawn(read)).collect();
            let mut parts = vec![read()];
            let broken = || Err(LoadError::Broken { uri: format!("layer thread of {}", self.digest) });
            parts.extend(threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| broken())));
            parts
        });
        let mut residents = Residents::new();
        for part in parts {
            residents.extend(part?);
        }
        Ok(residents)
    }

    fn read_one(&self, layer: LayerId, expert: ExpertId) -> Result<Arc<Resident>, LoadError> {
        let identity = Identity { digest: Arc::clone(&self.digest), format: self.format, layer, expert };
        if let Some(resident) = self.loader.pool.get(&identity) {
            return Ok(resident);
        }
        let Model { hidden, width, limit, .. } = *self.model;
        let stored = self.checkpoint.expert(layer.0, expert.0, hidden, width, limit)?;
        let pack = |cause| LoadError::Pack { layer, expert, cause };
        let held = match self.format {
            Some(format) => stored.converted(format).map_err(pack)?,
            None => stored,
        };
        let packed = self.loader.backend.pack(&held).map_err(pack)?;
        self.promise.keep_one();
        self.progress.bytes.fetch_add(packed.bytes(), Ordering::Relaxed);
        Ok(self.loader.pool.share(identity, Arc::new(Resident { packed })))
    }
}
