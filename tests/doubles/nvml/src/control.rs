//! The one library instance, and the two ways to drive it: a file that grows (a running agent), or calls
//! from the process that opened it (the node lab).

use std::{
    fs::File,
    io::{BufRead, BufReader},
    sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crate::{
    script::{Event, Header, Line},
    state::State,
};

/// How often the script file is looked at for new lines.
const LOOK: Duration = Duration::from_millis(10);

/// Blocks for so many milliseconds of the host's time.
pub type Hang = extern "C" fn(u64);
/// Called on the waiting thread just before an event is handed out.
pub type Delivered = extern "C" fn();

/// What the process that opened the double takes over from it.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// A call that hangs waits here.
    pub hang: Hang,
    /// An event leaves.
    pub delivered: Delivered,
}

#[derive(Debug, Default)]
struct Shared {
    state: State,
    host: Option<Host>,
    stopped: bool,
}

/// The library instance of this process.
#[derive(Debug, Default)]
pub struct Instance {
    shared: Mutex<Shared>,
    changed: Condvar,
}

/// The library instance of this process; the first call reads the script, if one is named.
pub fn instance() -> &'static Instance {
    static INSTANCE: OnceLock<Instance> = OnceLock::new();
    static SCRIPT: OnceLock<()> = OnceLock::new();
    let instance = INSTANCE.get_or_init(Instance::default);
    SCRIPT.get_or_init(|| {
        if let Some(path) = std::env::var_os("BERTH_DOUBLE_SCRIPT")
            && let Ok(file) = File::open(path)
        {
            instance.follow(file);
        }
    });
    instance
}

impl Instance {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts over with the devices of `header`.
    pub fn configure(&self, header: &Header) {
        self.lock().state = State::new(header);
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

    /// Applies one line; answers how many events it will deliver.
    ///
    /// # Errors
    /// What is wrong with the line.
    pub fn apply(&self, line: &Line) -> Result<u32, String> {
        let Some(pci) = &line.nvml else { return Ok(0) };
        let delivered = self.lock().state.apply(pci, line.set.as_ref(), line.event)?;
        self.changed.notify_all();
        Ok(delivered)
    }

    /// Reads the state for one call: waits out its hang first, then answers through `read`.
    pub fn call<T>(&self, hang: impl Fn(&State) -> u64, read: impl FnOnce(&mut State) -> T) -> T {
        let (ms, host) = {
            let shared = self.lock();
            (hang(&shared.state), shared.host)
        };
        if ms > 0 {
            match host {
                Some(host) => (host.hang)(ms),
                None => thread::sleep(Duration::from_millis(ms)),
            }
        }
        read(&mut self.lock().state)
    }

    /// The next event, or `None` at the end of the wait. With a host there is no end but an event or
    /// [`Self::stop`], for its time is not ours.
    pub fn wait(&self, limit: Duration) -> Option<(usize, Event)> {
        let end = Instant::now().checked_add(limit);
        let mut shared = self.lock();
        loop {
            if shared.stopped {
                return None;
            }
            if let Some(next) = shared.state.queue.pop_front() {
                if let Some(host) = shared.host {
                    drop(shared);
                    (host.delivered)();
                }
                return Some(next);
            }
            let left = end.map_or(limit, |end| end.saturating_duration_since(Instant::now()));
            shared = if shared.host.is_some() {
                self.changed.wait(shared).unwrap_or_else(PoisonError::into_inner)
            } else if left.is_zero() {
                return None;
            } else {
                self.changed.wait_timeout(shared, left).unwrap_or_else(PoisonError::into_inner).0
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
            Err(error) => complain(&format!("script, line 1: {error}")),
        }
        thread::spawn(move || {
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
        });
    }

    fn take(&self, text: &str, started: Instant) {
        if text.trim().is_empty() {
            return;
        }
        let line: Line = match serde_json::from_str(text) {
            Ok(line) => line,
            Err(error) => return complain(&format!("script line {}: {error}", text.trim())),
        };
        if let Some(at) = line.at_ms.filter(|at| *at > 0.0) {
            thread::sleep(Duration::from_secs_f64(at / 1000.0).saturating_sub(started.elapsed()));
        }
        if let Err(error) = self.apply(&line) {
            complain(&error);
        }
    }
}

#[expect(clippy::print_stderr, reason = "a test tool inside another process has no other way to say what is wrong")]
fn complain(text: &str) {
    eprintln!("libnvidia-ml double: {text}");
}
