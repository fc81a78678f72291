//! The control symbols of a library double, which the agent never sees.
#![expect(unsafe_code, reason = "calls into the double")]

use std::{
    collections::VecDeque,
    path::Path,
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use anyhow::{Context, ensure};
use berth_agent::vendor::lane;
use berth_runtime::{Clock, clock::InFlight};
use libloading::Library;

static CLOCK: OnceLock<Clock> = OnceLock::new();
/// One guard per event that is on its way out of the double.
static LEAVING: Mutex<VecDeque<InFlight>> = Mutex::new(VecDeque::new());

/// A call of the double hangs: it waits on the lab's time.
extern "C" fn hang(ms: u64) {
    if let Some(clock) = CLOCK.get() {
        lane::hang(clock, Duration::from_millis(ms));
    }
}

/// An event leaves the double on this thread, and its guard with it.
extern "C" fn delivered() {
    let guard = LEAVING.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    if let Some(guard) = guard {
        lane::carry(guard);
    }
}

/// The double that the agent opens by the same path.
pub(crate) struct Double {
    apply: unsafe extern "C" fn(*const u8, usize) -> i64,
    stop: unsafe extern "C" fn(),
    clock: Clock,
    _library: Library,
}

impl Double {
    /// Opens the double at `path`, tells it the script's first line, and takes over its time.
    pub(crate) fn open(path: &Path, header: &str, clock: &Clock) -> anyhow::Result<Self> {
        // SAFETY: the double's initialisers do nothing.
        let library = unsafe { Library::new(path) }.with_context(|| format!("opening {}", path.display()))?;
        type Text = unsafe extern "C" fn(*const u8, usize) -> i64;
        type Host = unsafe extern "C" fn(extern "C" fn(u64), extern "C" fn());
        // SAFETY: the types are those of the double's `ffi.rs`, and the library outlives the pointers.
        let (configure, apply, host, stop) = unsafe {
            (
                *library.get::<Text>(b"berth_double_configure\0").context("this is no double")?,
                *library.get::<Text>(b"berth_double_apply\0").context("this is no double")?,
                *library.get::<Host>(b"berth_double_host\0").context("this is no double")?,
                *library.get::<unsafe extern "C" fn()>(b"berth_double_stop\0").context("this is no double")?,
            )
        };
        let _ = CLOCK.set(clock.clone());
        // SAFETY: both functions live as long as the process; the text is valid for its length.
        let understood = unsafe {
            host(hang, delivered);
            configure(header.as_ptr(), header.len())
        };
        ensure!(understood == 0, "line 1: the double does not understand it");
        Ok(Self { apply, stop, clock: clock.clone(), _library: library })
    }

    /// Applies one line. Time stands still until an event of it is consumed.
    pub(crate) fn apply(&self, line: &str) -> anyhow::Result<()> {
        // Before the double may hand it out.
        LEAVING.lock().unwrap_or_else(PoisonError::into_inner).push_back(self.clock.in_flight());
        // SAFETY: the text is valid for its length.
        let events = unsafe { (self.apply)(line.as_ptr(), line.len()) };
        if events != 1 {
            LEAVING.lock().unwrap_or_else(PoisonError::into_inner).pop_back();
        }
        ensure!(events >= 0, "the double does not understand it");
        Ok(())
    }

    /// Ends every wait for events.
    pub(crate) fn stop(&self) {
        // SAFETY: no arguments.
        unsafe { (self.stop)() };
    }
}
