//! What the doubles of vendor libraries share: one library instance per process, and the two ways to drive
//! it: a file that grows (a running agent), or calls from the process that opened it (the node lab).
//!
//! It knows no vendor and decides nothing.

pub mod ffi;
pub mod users;
pub mod words;

use std::{
    fs::File,
    io::{BufRead, BufReader},
    sync::{Condvar, Mutex, MutexGuard, Once, PoisonError},
    thread,
    time::{Duration, Instant},
};

use serde::de::DeserializeOwned;

/// A call that hangs looks so often whether it still does.
const HANG_LOOK_MS: u64 = 1000;
/// How often the script file is looked at for new lines.
const LOOK: Duration = Duration::from_millis(10);

/// Blocks for so many milliseconds of the host's time.
pub type Hang = extern "C" fn(u64);
/// Called on the delivering thread just before an event is handed out.
pub type Delivered = extern "C" fn();

/// What one vendor's library answers.
pub trait Library: Default + Send + 'static {
    /// The script's first line, as far as this library is concerned.
    type Header: DeserializeOwned;
    /// A later line.
    type Line: DeserializeOwned;
    /// The library's name, for complaints.
    const NAME: &'static str;

    /// The library that `header` describes.
    fn new(header: &Self::Header) -> Self;
    /// When a line counts, in ms since the library was initialised; absent = at once.
    fn at_ms(line: &Self::Line) -> Option<f64>;
    /// Applies a line; answers how many events it will deliver.
    ///
    /// # Errors
    /// What is wrong with the line.
    fn apply(&mut self, line: &Self::Line) -> Result<u32, String>;
}

/// What the process that opened the double takes over from it.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// A call that hangs waits here.
    pub hang: Hang,
    /// An event leaves.
    pub delivered: Delivered,
}

#[derive(Debug, Default)]
struct Shared<L> {
    state: Option<L>,
    host: Option<Host>,
    stopped: bool,
}

/// The library instance of a process.
#[derive(Debug)]
pub struct Instance<L> {
    shared: Mutex<Shared<L>>,
    changed: Condvar,
    script: Once,
}

impl<L: Library> Default for Instance<L> {
    fn default() -> Self {
        Self::new()
    }
}

impl<L: Library> Instance<L> {
    /// An instance without devices.
    #[must_use]
    pub const fn new() -> Self {
        let shared = Shared { state: None, host: None, stopped: false };
        Self { shared: Mutex::new(shared), changed: Condvar::new(), script: Once::new() }
    }

    /// This instance; the first call reads the script, if one is named.
    pub fn ready(&'static self) -> &'static Self {
        self.script.call_once(|| {
            if let Some(path) = std::env::var_os("BERTH_DOUBLE_SCRIPT")
                && let Ok(file) = File::open(path)
            {
                self.follow(file);
            }
        });
        self
    }

    fn lock(&self) -> MutexGuard<'_, Shared<L>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts over with the devices of `header`.
    pub fn configure(&self, header: &L::Header) {
        self.lock().state = Some(L::new(header));
        self.changed.notify_all();
    }

    /// Hands hangs and deliveries to the host.
    pub fn host(&self, host: Host) {
        self.lock().host = Some(host);
    }

    /// Ends every wait for events, now and later.
    pub fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Whether every wait has ended.
    pub fn stopped(&self) -> bool {
        self.lock().stopped
    }

    /// Applies one line; answers how many events it will deliver.
    ///
    /// # Errors
    /// What is wrong with the line.
    pub fn apply(&self, line: &L::Line) -> Result<u32, String> {
        let delivered = self.lock().state.get_or_insert_default().apply(line)?;
        self.changed.notify_all();
        Ok(delivered)
    }

    /// Reads the state for one call: waits out its hang first, then answers through `read`. A hang that is set to less
    /// than a call has waited ends that call too.
    pub fn call<T>(&self, hang: impl Fn(&L) -> u64, read: impl FnOnce(&mut L) -> T) -> T {
        let mut waited = 0;
        loop {
            let (left, host) = {
                let mut shared = self.lock();
                let ms = hang(shared.state.get_or_insert_default());
                (ms.saturating_sub(waited).min(HANG_LOOK_MS), shared.host)
            };
            if left == 0 {
                return read(self.lock().state.get_or_insert_default());
            }
            match host {
                Some(host) => (host.hang)(left),
                None => thread::sleep(Duration::from_millis(left)),
            }
            waited = waited.saturating_add(left);
        }
    }

    /// The next event that `next` finds, or `None` at the end of the wait. With a host there is no end but
    /// an event or [`Self::stop`], for its time is not ours; without a limit there is none either.
    pub fn wait<T>(&self, limit: Option<Duration>, mut next: impl FnMut(&mut L) -> Option<T>) -> Option<T> {
        let end = limit.and_then(|limit| Instant::now().checked_add(limit));
        let mut shared = self.lock();
        loop {
            if shared.stopped {
                return None;
            }
            if let Some(found) = next(shared.state.get_or_insert_default()) {
                if let Some(host) = shared.host {
                    drop(shared);
                    (host.delivered)();
                }
                return Some(found);
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            shared = match left {
                Some(left) if left.is_zero() => return None,
                Some(left) if shared.host.is_none() => {
                    self.changed.wait_timeout(shared, left).unwrap_or_else(PoisonError::into_inner).0
                }
                _ => self.changed.wait(shared).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Takes the header from `file` and applies its further lines, also those that are appended later.
    fn follow(&'static self, file: File) {
        let started = Instant::now();
        let mut reader = BufReader::new(file);
        let mut text = String::new();
        let _ = reader.read_line(&mut text);
        match serde_json::from_str(&text) {
            Ok(header) => self.configure(&header),
            Err(error) => complain::<L>(&format!("script, line 1: {error}")),
        }
        let following = move || {
            let mut text = String::new();
            loop {
                // A line without its end is still being written: keep it and read on.
                match reader.read_line(&mut text) {
                    Ok(read) if read > 0 && text.ends_with('\n') => {
                        self.take(&text, started);
                        text.clear();
                    }
                    Ok(_) => thread::sleep(LOOK),
                    Err(_) => return,
                }
            }
        };
        // Named, so that whoever measures the agent can leave it out.
        if let Err(error) = thread::Builder::new().name("double script".to_owned()).spawn(following) {
            complain::<L>(&format!("no thread for the script: {error}"));
        }
    }

    fn take(&self, text: &str, started: Instant) {
        if text.trim().is_empty() {
            return;
        }
        let line: L::Line = match serde_json::from_str(text) {
            Ok(line) => line,
            Err(error) => return complain::<L>(&format!("script line {}: {error}", text.trim())),
        };
        if let Some(at) = L::at_ms(&line).filter(|at| *at > 0.0) {
            thread::sleep(Duration::from_secs_f64(at / 1000.0).saturating_sub(started.elapsed()));
        }
        if let Err(error) = self.apply(&line) {
            complain::<L>(&error);
        }
    }
}

#[expect(clippy::print_stderr, reason = "a test tool inside another process has no other way to say what is wrong")]
fn complain<L: Library>(text: &str) {
    eprintln!("{} double: {text}", L::NAME);
}
