//! Events on their way from the driver's threads to the listener's. A callback of the vendor's library has no
//! argument of its own, so this queue belongs to the process; it is bounded, and what does not fit is counted,
//! for every device is read again then.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use berth_runtime::clock::InFlight;

use super::ffi::{RawEvent, RawSwitch};
use crate::vendor::lane;

/// Events that wait at most.
const ROOM: usize = 1024;

/// One event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// Of a device.
    Device(RawEvent),
    /// Of a switch.
    Switch(RawSwitch),
}

/// What a listener finds.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) item: Item,
    /// Keeps discrete time still until the event is consumed.
    pub(super) guard: Option<InFlight>,
    /// Events were lost before this one.
    pub(super) lost: bool,
}

#[derive(Debug, Default)]
struct Waiting {
    items: VecDeque<(Item, Option<InFlight>)>,
    lost: bool,
}

static WAITING: Mutex<Waiting> = Mutex::new(Waiting { items: VecDeque::new(), lost: false });
static ARRIVED: Condvar = Condvar::new();

fn lock() -> MutexGuard<'static, Waiting> {
    // The queue is whole between statements: a panic elsewhere cannot tear it.
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes an event from the driver's thread. Never waits for a listener.
pub(super) fn put(item: Item) {
    // A double that keeps discrete time hands its guard over; a real library has none.
    let guard = lane::carried();
    let mut waiting = lock();
    if waiting.items.len() >= ROOM {
        waiting.lost = true;
        return;
    }
    waiting.items.push_back((item, guard));
    drop(waiting);
    ARRIVED.notify_one();
}

/// Waits for the next event.
pub(super) fn take() -> Found {
    let mut waiting = lock();
    loop {
        if let Some((item, guard)) = waiting.items.pop_front() {
            let lost = std::mem::take(&mut waiting.lost);
            return Found { item, guard, lost };
        }
        waiting = ARRIVED.wait(waiting).unwrap_or_else(PoisonError::into_inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_said_with_the_next_event() {
        let item = |id| Item::Device(RawEvent { id, device: 0, severity: 0, assertion: 1, serial: 1 });
        for id in 0..=u32::try_from(ROOM).unwrap() {
            put(item(id));
        }
        let first = take();
        assert!(first.item == item(0) && first.lost);
        assert!(!take().lost);
    }
}
