//! Watches NVIDIA devices: opens the library, lists devices, waits for events, reads values. Gives facts
//! and nothing else.
//!
//! Each device has its own lane and its own loop, the event set its own thread: no device waits for
//! another, and nothing waits for a library that hangs.

use std::{
    ffi::OsString,
    sync::{Arc, Weak},
    time::Duration,
};

use berth_runtime::Clock;
use berth_types::Vendor;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

use super::{Events, Gpu, Nvml, OpenError, Target, Waited, library_path};
use crate::{
    health::fact::{DeviceInfo, Fact, PciAddress, Source, What, Xid},
    vendor::{
        Bells, Facts, Seen,
        grip::Grip,
        lane::{self, Lane, LaneError},
        measure::Measurer,
        poll::{Poller, READ_LIMIT},
        trouble::Trouble,
    },
    vitals::Board,
};

/// Name of this detector.
pub const NAME: &str = "nvml";
/// Opening and listing has so long; a cold driver may load firmware.
const OPEN_LIMIT: Duration = Duration::from_secs(20);
/// A library that is missing or refuses is tried again after this.
const REOPEN: Duration = Duration::from_secs(30);
/// The event thread looks up so often.
const EVENT_WAIT_MS: u32 = 5000;
/// Who asks for the library waits so long for calls in hand and the event thread: more than [`EVENT_WAIT_MS`].
const LET_GO_LIMIT: Duration = Duration::from_secs(8);
/// Between two looks whether they are done.
const LET_GO_LOOK: Duration = Duration::from_millis(50);

/// What the watch is told.
#[derive(Clone, Debug)]
pub struct WatchConfig {
    /// The library; `None` = by its usual name.
    pub library: Option<OsString>,
    /// NVIDIA devices that the kernel lists.
    pub kernel_lists: Vec<PciAddress>,
    /// Devices that the node should have.
    pub expected: Option<usize>,
    /// By which the library can be asked for.
    pub grip: Grip,
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
            () = self.keep() => {}
        }
    }

    /// Watches, but for the times when somebody asks for the library, and opens it again when it is of no use any more.
    async fn keep(&self) {
        let grip = &self.config.grip;
        loop {
            let mut opened = Weak::new();
            let ended = CancellationToken::new();
            grip.hold(true);
            // Cancel-safe: as above.
            let asked = tokio::select! {
                () = self.watch(&mut opened, &ended) => false,
                () = grip.asked() => true,
            };
            ended.cancel();
            let until = self.clock.now().saturating_add(LET_GO_LIMIT);
            while opened.strong_count() > 0 && self.clock.now() < until {
                self.clock.sleep(LET_GO_LOOK).await;
            }
            tracing::info!(released = opened.strong_count() == 0, "NVIDIA library let go");
            if asked {
                grip.hold(false);
                grip.restored().await;
            }
        }
    }

    /// Watches until every call to the library has failed for a minute: then it is to be opened again.
    async fn watch(&self, opened: &mut Weak<Nvml>, ended: &CancellationToken) {
        let mut lane = Lane::new("nvml", self.clock.clone());
        let (library, targets) = self.open(&mut lane).await;
        *opened = Arc::downgrade(&library);
        let driver = library.driver().unwrap_or_default();
        tracing::info!(driver, devices = targets.len(), "NVIDIA library opened");
        self.introduce(&targets).await;
        self.listen(&mut lane, &library, &targets, ended).await;
        let (first, mut firsts) = mpsc::channel(1);
        let trouble = Arc::new(Trouble::of(targets.iter().map(|target| target.info.local.clone())));
        let mut loops = JoinSet::new();
        for target in targets {
            let bell = self.bells.of(&target.info.local);
            let (clock, facts, first) = (self.clock.clone(), self.facts.clone(), first.clone());
            let device = Arc::new(Gpu { library: Arc::clone(&library), target });
            let (board, trouble) = (self.board.clone(), Arc::clone(&trouble));
            let measurer = Measurer { clock: clock.clone(), board: board.clone(), device: Arc::clone(&device) };
            loops.spawn(measurer.run());
            loops.spawn(Poller { clock, facts, device, bell, board, trouble }.run(first));
        }
        drop((first, library));
        let settled = async {
            // Each poller lets go of its end after its first reading.
            while firsts.recv().await.is_some() {}
            self.facts.send(Seen::Settled(NAME), None).await;
            std::future::pending::<()>().await;
        };
        // None ends by itself; a panic in one must not go unnoticed.
        tokio::select! {
            () = settled => {}
            () = trouble.lasts() => {
                tracing::warn!("every call to NVIDIA's library fails: it is opened again, as after a driver reload");
            }
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
    async fn open(&self, lane: &mut Lane) -> (Arc<Nvml>, Vec<Target>) {
        let mut told = false;
        loop {
            let path = library_path(self.config.library.as_deref());
            let opened = lane.call(OPEN_LIMIT, Duration::default, move || {
                let library = Nvml::open(&path)?;
                let targets = library.list();
                Ok::<_, OpenError>((library, targets))
            });
            let why = match opened.await {
                Ok(Ok((library, Ok(targets)))) => {
                    if told {
                        self.facts.send(Seen::Fact(Fact::node(What::Library(Vendor::Nvidia))), None).await;
                    }
                    return (Arc::new(library), targets);
                }
                Ok(Ok((_, Err(code)))) => format!("libnvidia-ml: nvmlDeviceGetCount_v2 answers {code}"),
                Ok(Err(error)) => error.to_string(),
                Err(missed @ (LaneError::Missed(_) | LaneError::Exhausted | LaneError::Broken)) => {
                    format!("libnvidia-ml: opening: {missed}")
                }
            };
            if !told {
                told = true;
                tracing::warn!(why, "NVIDIA library cannot be used: this node hosts nothing");
                for address in &self.config.kernel_lists {
                    let info = unspoken(*address);
                    self.facts.send(Seen::Fact(Fact::device(address.to_string(), What::Unspoken(info))), None).await;
                }
                let none = What::NoLibrary { vendor: Vendor::Nvidia, why };
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
        let listed = |address: &PciAddress| targets.iter().any(|target| target.info.local == address.to_string());
        for address in self.config.kernel_lists.iter().filter(|address| !listed(address)) {
            let local = address.to_string();
            let info = unspoken(*address);
            self.facts.send(Seen::Fact(Fact::device(local.clone(), What::Unspoken(info))), None).await;
            let lost = What::BusLoss("listed by the kernel, not by NVML".to_owned());
            self.facts.send(Seen::Fact(Fact::device(local, lost)), None).await;
        }
        let kernel = self.config.kernel_lists.iter().map(ToString::to_string);
        let locals = targets.iter().map(|target| target.info.local.clone()).chain(kernel).collect();
        let inventory = What::Inventory { vendor: Vendor::Nvidia, locals };
        self.facts.send(Seen::Fact(Fact::node(inventory)), None).await;
        if let Some(expected) = self.config.expected {
            let count = What::Count { listed: targets.len(), expected };
            self.facts.send(Seen::Fact(Fact::node(count)), None).await;
        }
    }

    /// Starts the event thread. Without events, polling alone goes on.
    async fn listen(&self, lane: &mut Lane, library: &Arc<Nvml>, targets: &[Target], ended: &CancellationToken) {
        let (library, all) = (Arc::clone(library), targets.to_vec());
        let events = match lane.call(OPEN_LIMIT, Duration::default, move || library.events(&all)).await {
            Ok(Ok(events)) => events,
            Ok(Err(code)) => return tracing::warn!(code, "NVML has no events: polling only"),
            Err(error) => return tracing::warn!(%error, "registering for NVML events: polling only"),
        };
        let locals = targets.iter().map(|target| target.info.local.clone()).collect();
        let (clock, facts, bells) = (self.clock.clone(), self.facts.clone(), self.bells.clone());
        let listener = Listener { clock, facts, bells, locals, ended: ended.clone() };
        // The thread ends with the process: it may be inside the library for seconds.
        let started = std::thread::Builder::new().name("nvml events".to_owned()).spawn(move || listener.run(&events));
        if let Err(error) = started {
            tracing::warn!(%error, "no thread for NVML events: polling only");
        }
    }
}

fn unspoken(address: PciAddress) -> DeviceInfo {
    let local = address.to_string();
    DeviceInfo {
        card: local.clone(),
        local,
        vendor: Vendor::Nvidia,
        product: String::new(),
        uuid: String::new(),
        memory_bytes: 0,
        interconnect_domain: None,
        pci: Some(address),
        reset_group: None,
        driver_branch: None,
    }
}

struct Listener {
    clock: Clock,
    facts: Facts,
    bells: Bells,
    locals: Vec<String>,
    /// The library is asked for.
    ended: CancellationToken,
}

impl Listener {
    fn run(self, events: &Events) {
        let mut refused = None;
        loop {
            let waited = events.wait(EVENT_WAIT_MS);
            // A double that keeps discrete time hands its guard over; a real library has none.
            let guard = lane::carried().unwrap_or_else(|| self.clock.in_flight());
            let fact = match waited {
                Waited::Event(event) => self.locals.get(event.target).map(|local| fact_of(local, &event)),
                Waited::Nothing => None,
                Waited::Refused(code) => {
                    if refused.replace(code) != Some(code) {
                        tracing::warn!(code, "waiting for NVML events");
                    }
                    // A lost device can be what the refusal means.
                    self.bells.ring_all();
                    guard.block_until(self.clock.now().saturating_add(READ_LIMIT));
                    None
                }
            };
            let listened = match fact {
                Some(fact) => self.facts.send_blocking(Seen::Fact(fact), Some(guard)),
                None => !self.facts.closed(),
            };
            if !listened || self.ended.is_cancelled() {
                return;
            }
        }
    }
}

fn fact_of(local: &str, event: &super::Event) -> Fact {
    let number = u16::try_from(event.data).ok().filter(|_| event.kind == 0x8);
    let what = match number {
        Some(154) => What::Recovery(None),
        Some(number) => What::Xid(Xid {
            number,
            source: Source::Event,
            pid: None,
            process: String::new(),
            gpu_instance: event.gpu_instance,
            message: String::new(),
        }),
        None => What::Event(event.kind),
    };
    Fact::device(local, what)
}
