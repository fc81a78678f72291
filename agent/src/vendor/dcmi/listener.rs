//! Events of Ascend's libraries, from the driver's threads to the ledger. An event is told as it came; what
//! it means, and whether it is true, is decided elsewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use berth_runtime::Clock;

use super::{
    Dcmi, Target,
    ffi::{self, RawEvent},
    queue::{self, Found, Item},
    switches,
};
use crate::{
    health::fact::{Alarm, Assertion, Fact, Local, What},
    vendor::{Bells, Facts, Seen, lane},
};

/// A thread that asks for events looks up so often.
const EVENT_WAIT_MS: i32 = 5000;
/// After an answer that is no event.
const PAUSE: Duration = Duration::from_secs(1);

/// Tells of events.
#[derive(Clone, Debug)]
pub(super) struct Listener {
    clock: Clock,
    facts: Facts,
    bells: Bells,
    /// Devices by what events call them.
    locals: Arc<Mutex<BTreeMap<u16, Local>>>,
    /// The thread that takes events from the queue runs.
    started: bool,
    /// Devices that a thread asks for events.
    asked: BTreeSet<Local>,
}

impl Listener {
    pub(super) fn new(clock: Clock, facts: Facts, bells: Bells) -> Self {
        Self { clock, facts, bells, locals: Arc::default(), started: false, asked: BTreeSet::new() }
    }

    /// From now on events are of these devices. The first time, the thread that takes them from the queue is started: it
    /// ends with the process, or when nobody listens any more and another event comes.
    pub(super) fn know(&mut self, targets: &[Target]) {
        let locals = targets.iter().filter_map(|target| Some((target.event_id?, target.info.local.clone())));
        *self.lock() = locals.collect();
        if !std::mem::replace(&mut self.started, true) {
            let listening = self.clone();
            let started = thread::Builder::new().name("dcmi events".to_owned()).spawn(move || listening.run());
            if let Err(error) = started {
                tracing::warn!(%error, "no thread for DCMI events: polling only");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u16, Local>> {
        // A map of plain values is whole between statements.
        self.locals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(self) {
        loop {
            let Found { item, guard, lost } = queue::take();
            let guard = guard.unwrap_or_else(|| self.clock.in_flight());
            if lost {
                self.bells.ring_all();
            }
            let listened = match self.fact(item) {
                Some(fact) => self.facts.send_blocking(Seen::Fact(fact), Some(guard)),
                None => !self.facts.closed(),
            };
            if !listened {
                return;
            }
        }
    }

    /// An event in our words. One of a device that we do not know is a reason to read them all.
    fn fact(&self, item: Item) -> Option<Fact> {
        match item {
            Item::Device(event) => {
                let local = self.lock().get(&event.device).cloned();
                let Some(local) = local else {
                    self.bells.ring_all();
                    return None;
                };
                Some(Fact::device(local, What::Alarm(alarm(&event)?)))
            }
            Item::Switch(raw) => {
                let (of, assertion) = (switches::fault(&raw), assertion(raw.assertion)?);
                Some(Fact::node(What::Fabric { of, assertion, severity: raw.severity }))
            }
        }
    }

    /// Tells of one event.
    pub(super) async fn tell(&self, event: RawEvent) {
        if let Some(fact) = self.fact(Item::Device(event)) {
            self.facts.send(Seen::Fact(fact), None).await;
        }
    }

    /// Starts a thread that asks one device for its events, for a driver that takes no subscription; once for each
    /// device.
    pub(super) fn ask(&mut self, library: Arc<Dcmi>, target: Target) {
        if !self.asked.insert(target.info.local.clone()) {
            return;
        }
        let Self { clock, facts, bells, .. } = self.clone();
        let asking = move || {
            loop {
                let asked = library.api.event(target.at, EVENT_WAIT_MS);
                // A double that keeps discrete time hands its guard over; a real library has none.
                let guard = lane::carried().unwrap_or_else(|| clock.in_flight());
                let listened = match asked {
                    Ok(event) => match alarm(&event) {
                        Some(alarm) => {
                            let fact = Fact::device(target.info.local.clone(), What::Alarm(alarm));
                            facts.send_blocking(Seen::Fact(fact), Some(guard))
                        }
                        None => !facts.closed(),
                    },
                    Err(ffi::TIME_OUT) => !facts.closed(),
                    Err(_) => {
                        // A lost device can be what the refusal means.
                        bells.ring(&target.info.local);
                        guard.block_until(clock.now().saturating_add(PAUSE));
                        !facts.closed()
                    }
                };
                if !listened {
                    return;
                }
            }
        };
        if let Err(error) = thread::Builder::new().name("dcmi events".to_owned()).spawn(asking) {
            tracing::warn!(%error, "no thread for DCMI events: polling only");
        }
    }
}

fn alarm(event: &RawEvent) -> Option<Alarm> {
    let RawEvent { id, severity, serial, .. } = *event;
    Some(Alarm { code: id, assertion: assertion(event.assertion)?, severity, serial })
}

/// `None` = a word that the library does not define.
const fn assertion(number: u8) -> Option<Assertion> {
    Some(match number {
        0 => Assertion::Recovered,
        1 => Assertion::Occurred,
        2 => Assertion::Once,
        _ => return None,
    })
}
