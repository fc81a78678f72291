//! Vendor libraries: opened at run time, called on their own threads under deadlines.
//!
//! Each vendor gives the same two things: the devices it lists, and facts about them. Nothing here
//! decides what a fact means, and a library that is missing or hangs is a value, never a panic or a wait.

pub mod dcmi;
pub mod grip;
pub mod lane;
pub mod measure;
pub mod nvml;
pub mod poll;
pub mod slate;
pub mod trouble;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use berth_runtime::clock::InFlight;
use tokio::sync::{Notify, mpsc};

use crate::health::fact::{Fact, Local};

/// What a detector sends to the ledger's keeper.
#[derive(Debug)]
pub enum Seen {
    /// A fact.
    Fact(Fact),
    /// The detector has told everything that was so when it began.
    Settled(&'static str),
    /// Records of the kernel log were lost: what they said must be read from the devices.
    LogLost,
    /// Facts of the kernel log's record of this number were told.
    Logged(u64),
}

/// A detector's end of the line. Discrete time stands still while a guard travels.
#[derive(Clone, Debug)]
pub struct Facts(mpsc::Sender<(Seen, Option<InFlight>)>);

impl Facts {
    /// A line that holds so many facts; a detector waits when it is full, and none is dropped.
    #[must_use]
    pub fn line(room: usize) -> (Self, mpsc::Receiver<(Seen, Option<InFlight>)>) {
        let (tell, told) = mpsc::channel(room);
        (Self(tell), told)
    }

    /// Sends; does nothing when nobody listens any more.
    pub async fn send(&self, seen: Seen, guard: Option<InFlight>) {
        let _ = self.0.send((seen, guard)).await;
    }

    /// Whether nobody listens any more.
    #[must_use]
    pub fn closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Sends from a detector's own thread; `false` = nobody listens any more.
    pub fn send_blocking(&self, seen: Seen, guard: Option<InFlight>) -> bool {
        self.0.blocking_send((seen, guard)).is_ok()
    }
}

/// Bells by device: rung, a device's deciding values are read at once. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Bells(Arc<Mutex<BTreeMap<Local, Arc<Notify>>>>);

impl Bells {
    /// The bell of a device.
    #[must_use]
    pub fn of(&self, local: &str) -> Arc<Notify> {
        let mut bells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(bells.entry(local.to_owned()).or_default())
    }

    /// Asks for a reading of one device.
    pub fn ring(&self, local: &str) {
        self.of(local).notify_one();
    }

    /// Asks for a reading of every device.
    pub fn ring_all(&self) {
        let bells = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bells.values().for_each(|bell| bell.notify_one());
    }
}
