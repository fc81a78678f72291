//! Watches Ascend devices: opens the library, lists devices, listens to events, reads values. Gives facts and
//! nothing else.
//!
//! Each device has its own lane and its own loop, events their own thread: no device waits for another, and
//! nothing waits for a library that hangs.

use std::{ffi::OsString, sync::Arc, time::Duration};

use berth_runtime::Clock;
use berth_types::Vendor;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{Dcmi, LIBRARY, Npu, OpenError, Target, ffi, library_path, listener, missing, switches};
use crate::{
    health::fact::{DeviceInfo, Fact, Local, What},
    vendor::{
        Bells, Facts, Seen,
        lane::{Lane, LaneError},
        measure::Measurer,
        poll::{POLL, Poller, READ_LIMIT},
        trouble::Trouble,
    },
    vitals::Board,
};

/// Name of this detector.
pub const NAME: &str = "dcmi";
/// Opening and listing has so long.
const OPEN_LIMIT: Duration = Duration::from_secs(20);
/// A library that is missing or refuses is tried again after this.
const REOPEN: Duration = Duration::from_secs(30);

/// What the watch is told.
#[derive(Clone, Debug)]
pub struct WatchConfig {
    /// The library; `None` = by its usual name.
    pub library: Option<OsString>,
    /// The switches' library; `None` = by its usual name.
    pub switch_library: Option<OsString>,
    /// Devices that the node should have.
    pub expected: Option<usize>,
}

/// The watch.
#[derive(Debug)]
pub struct Watch {
    config: WatchConfig,
    clock: Clock,
    facts: Facts,
    bells: Bells,
    board: Board,
}

impl Watch {
    /// A watch that tells `facts`, listens to `bells` and keeps vital signs on `board`.
    #[must_use]
    pub fn new(config: WatchConfig, clock: Clock, facts: Facts, bells: Bells, board: Board) -> Self {
        Self { config, clock, facts, bells, board }
    }

    /// Watches until `stop` is cancelled.
    pub async fn run(self, stop: CancellationToken) {
        // Cancel-safe: facts are sent whole, and calls in hand are left to their threads.
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.watch() => {}
        }
    }

    async fn watch(&self) {
        let mut lane = Lane::new(NAME, self.clock.clone());
        let mut listener = None;
        loop {
            let (library, targets) = self.open(&mut lane).await;
            let driver = library.driver().unwrap_or_default();
            tracing::info!(driver, devices = targets.len(), ?library, "Ascend library opened");
            self.introduce(&targets).await;
            let known = listener.get_or_insert_with(|| {
                listener::Listener::new(self.clock.clone(), self.facts.clone(), self.bells.clone())
            });
            self.listen(&mut lane, known, &library, &targets).await;
            let switches = switches::open(&mut lane, self.config.switch_library.clone()).await;
            self.read(library, switches, targets).await;
            tracing::warn!("every call to Ascend's library fails: it is opened again, as after a driver reload");
        }
    }

    /// Reads every device, the driver and the switches until nothing but errors of the library comes from all devices.
    async fn read(&self, library: Arc<Dcmi>, switches: Option<Arc<ffi::Switches>>, targets: Vec<Target>) {
        let (first, mut firsts) = mpsc::channel(1);
        let trouble = Arc::new(Trouble::of(targets.iter().map(|target| target.info.local.clone())));
        let mut loops = JoinSet::new();
        for target in targets {
            let bell = self.bells.of(&target.info.local);
            let (clock, facts, first) = (self.clock.clone(), self.facts.clone(), first.clone());
            let device = Arc::new(Npu { library: Arc::clone(&library), target });
            let (board, trouble) = (self.board.clone(), Arc::clone(&trouble));
            let measurer = Measurer { clock: clock.clone(), board: board.clone(), device: Arc::clone(&device) };
            loops.spawn(measurer.run());
            loops.spawn(Poller { clock, facts, device, bell, board, trouble }.run(first));
        }
        loops.spawn(attend(self.clock.clone(), self.facts.clone(), library, switches, first));
        let settled = async {
            // Each loop lets go of its end after its first reading.
            while firsts.recv().await.is_some() {}
            self.facts.send(Seen::Settled(NAME), None).await;
            std::future::pending::<()>().await;
        };
        // Cancel-safe: a loop that is dropped leaves its call to its thread. It never ends by itself; a panic in one must
        // not go unnoticed.
        tokio::select! {
            () = settled => {}
            () = trouble.lasts() => {}
            Some(ended) = loops.join_next() => {
                if let Err(error) = ended
                    && let Ok(panic) = error.try_into_panic()
                {
                    std::panic::resume_unwind(panic);
                }
            }
        }
    }

    /// Opens the library and lists its devices, as often as it takes; tells once why it cannot.
    async fn open(&self, lane: &mut Lane) -> (Arc<Dcmi>, Vec<Target>) {
        let mut told = false;
        loop {
            let path = library_path(self.config.library.as_deref());
            let opened = lane.call(OPEN_LIMIT, Duration::default, move || {
                let library = Dcmi::open(&path)?;
                let targets = library.list();
                Ok::<_, OpenError>((library, targets))
            });
            let why = match opened.await {
                Ok(Ok((library, Ok(targets)))) => {
                    if told {
                        self.facts.send(Seen::Fact(Fact::node(What::Library(Vendor::Ascend))), None).await;
                    }
                    return (Arc::new(library), targets);
                }
                Ok(Ok((_, Err(code)))) => format!("{LIBRARY}: the list of cards answers {code}"),
                Ok(Err(error)) => error.to_string(),
                Err(missed @ (LaneError::Missed(_) | LaneError::Exhausted | LaneError::Broken)) => {
                    format!("{LIBRARY}: opening: {missed}")
                }
            };
            if !told {
                told = true;
                tracing::warn!(why, "Ascend library cannot be used: this node hosts nothing");
                let none = What::NoLibrary { vendor: Vendor::Ascend, why };
                self.facts.send(Seen::Fact(Fact::node(none)), None).await;
                self.facts.send(Seen::Settled(NAME), None).await;
            }
            self.clock.sleep(REOPEN).await;
        }
    }

    async fn introduce(&self, targets: &[Target]) {
        for target in targets {
            let fact = Fact::device(target.info.local.clone(), What::Listed(target.info.clone()));
            self.facts.send(Seen::Fact(fact), None).await;
        }
        let mut locals: Vec<Local> = targets.iter().map(|target| target.info.local.clone()).collect();
        for (card, device) in self.config.expected.map(|expected| missing(targets, expected)).unwrap_or_default() {
            let (local, info) = unlisted(card, device, targets);
            locals.push(local.clone());
            self.facts.send(Seen::Fact(Fact::device(local.clone(), What::Unspoken(info))), None).await;
            let lost = What::BusLoss("expected by the node, listed by no library".to_owned());
            self.facts.send(Seen::Fact(Fact::device(local, lost)), None).await;
        }
        let inventory = What::Inventory { vendor: Vendor::Ascend, locals };
        self.facts.send(Seen::Fact(Fact::node(inventory)), None).await;
        let Some(expected) = self.config.expected else { return };
        let count = What::Count { listed: targets.len(), expected };
        self.facts.send(Seen::Fact(Fact::node(count)), None).await;
    }

    /// Subscribes to events and sees that their thread runs; a driver without subscription is asked, one thread per
    /// device. Without either, polling alone goes on.
    async fn listen(
        &self,
        lane: &mut Lane,
        listener: &mut listener::Listener,
        library: &Arc<Dcmi>,
        targets: &[Target],
    ) {
        let (asked, events) = (Arc::clone(library), Arc::clone(library));
        let second = library.second;
        // Switches may bring events even where devices do not.
        listener.know(targets);
        match lane.call(OPEN_LIMIT, Duration::default, move || asked.api.subscribe(second)).await {
            Ok(Ok(())) => return,
            Ok(Err(code)) => tracing::info!(code, "DCMI has no subscription: events are asked for"),
            Err(error) => return tracing::warn!(%error, "subscribing to DCMI events: polling only"),
        }
        for target in targets {
            let (probe, at) = (Arc::clone(&events), target.at);
            match lane.call(READ_LIMIT, Duration::default, move || probe.api.event(at, 0)).await {
                Ok(Ok(event)) => listener.tell(event).await,
                Ok(Err(ffi::TIME_OUT)) => {}
                Ok(Err(code)) => return tracing::warn!(code, "DCMI has no events: polling only"),
                Err(error) => return tracing::warn!(%error, "asking for DCMI events: polling only"),
            }
            listener.ask(Arc::clone(&events), target.clone());
        }
    }
}

/// A device that nobody lists, as its neighbours are.
fn unlisted(card: i32, device: i32, targets: &[Target]) -> (String, DeviceInfo) {
    let local = format!("{card}.{device}");
    let sibling = targets.iter().map(|target| &target.info).find(|info| info.local.starts_with(&format!("{card}.")));
    let info = DeviceInfo {
        local: local.clone(),
        vendor: Vendor::Ascend,
        product: String::new(),
        uuid: String::new(),
        memory_bytes: 0,
        interconnect_domain: None,
        card: sibling.map_or_else(|| format!("card {card}"), |info| info.card.clone()),
        pci: None,
        reset_group: sibling.and_then(|info| info.reset_group.clone()),
        driver_branch: None,
    };
    (local, info)
}

/// What concerns the node as a whole: how the driver judges itself, what its switches hold.
async fn attend(
    clock: Clock,
    facts: Facts,
    library: Arc<Dcmi>,
    switches: Option<Arc<ffi::Switches>>,
    first: mpsc::Sender<()>,
) {
    let mut lane = Lane::new("dcmi driver", clock.clone());
    let mut first = Some(first);
    let mut known = None;
    loop {
        let begun = clock.now();
        let asked = Arc::clone(&library);
        let state = lane.call(READ_LIMIT, Duration::default, move || asked.driver_state()).await;
        if let Ok(Some(state)) = state
            && known.as_ref() != Some(&state)
        {
            known = Some(state.clone());
            facts.send(Seen::Fact(Fact::node(What::Driver(state))), None).await;
        }
        if let Some(switches) = switches.clone() {
            let begun = clock.now();
            let listed = lane.call(READ_LIMIT, Duration::default, move || switches.faults()).await;
            if let Ok(Ok(listed)) = listed {
                let faults = listed.iter().map(|raw| (switches::fault(raw), raw.severity)).collect();
                facts.send(Seen::Fact(Fact::node(What::Fabrics { begun, faults })), None).await;
            }
        }
        drop(first.take());
        clock.idle_until(begun.saturating_add(POLL)).await;
    }
}
