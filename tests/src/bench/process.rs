//! What a process costs, by what the kernel counts of it: memory, processor time, and how often its threads went to
//! sleep by themselves, which is how often they were woken.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::{Error, Result};

/// What was counted at one moment.
#[derive(Clone, Debug)]
pub struct Sample {
    at: Instant,
    /// Resident bytes: all, those that no file backs, and the share of each page that is its own.
    resident: u64,
    anonymous: u64,
    proportional: u64,
    threads: BTreeMap<u32, Thread>,
}

#[derive(Clone, Debug, Default)]
struct Thread {
    name: String,
    busy: Duration,
    slept: u64,
}

/// What a process cost between two samples.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// How long it was watched.
    pub seconds: f64,
    /// Resident at the end, MiB.
    pub resident_mib: f64,
    /// Of it, what no file backs.
    pub anonymous_mib: f64,
    /// Each page divided by how many processes map it.
    pub proportional_mib: f64,
    /// Processor time ÷ time.
    pub cores: f64,
    /// Times a thread went to sleep by itself, per second.
    pub wakeups_per_second: f64,
    /// The same, by the first word of the threads' names.
    pub threads: Vec<ThreadCost>,
}

/// Threads of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct ThreadCost {
    /// First word of their names.
    pub name: String,
    /// How many.
    pub count: u32,
    /// Processor time ÷ time.
    pub cores: f64,
    /// Times one went to sleep by itself, per second.
    pub wakeups_per_second: f64,
}

impl Sample {
    /// Counts now.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn of(pid: u32) -> Result<Self> {
        let folder = Path::new("/proc").join(pid.to_string());
        let status = read(&folder.join("status"))?;
        let rollup = read(&folder.join("smaps_rollup"))?;
        let mut threads = BTreeMap::new();
        let tasks = folder.join("task");
        for task in fs::read_dir(&tasks).map_err(Error::file("list", &tasks))?.flatten() {
            // A thread that has just ended is none.
            if let (Some(id), Some(thread)) =
                (task.file_name().to_str().and_then(|id| id.parse().ok()), thread(&task.path()))
            {
                threads.insert(id, thread);
            }
        }
        Ok(Self {
            at: Instant::now(),
            resident: kilobytes(&status, "VmRSS:"),
            anonymous: kilobytes(&status, "RssAnon:"),
            proportional: kilobytes(&rollup, "Pss:"),
            threads,
        })
    }

    /// What the process cost since `before`; threads whose names begin with `apart` are not counted.
    #[must_use]
    pub fn since(&self, before: &Self, apart: &str) -> Cost {
        let seconds = self.at.duration_since(before.at).as_secs_f64().max(f64::EPSILON);
        let mut kinds: BTreeMap<String, (u32, Duration, u64)> = BTreeMap::new();
        for (id, thread) in self.threads.iter().filter(|(_, thread)| !thread.name.starts_with(apart)) {
            let known = before.threads.get(id).cloned().unwrap_or_default();
            let kind = thread.name.split(' ').next().unwrap_or_default().to_owned();
            let (count, busy, slept) = kinds.entry(kind).or_default();
            *count = count.saturating_add(1);
            *busy = busy.saturating_add(thread.busy.saturating_sub(known.busy));
            *slept = slept.saturating_add(thread.slept.saturating_sub(known.slept));
        }
        let cost = |(name, (count, busy, slept)): (String, (u32, Duration, u64))| ThreadCost {
            name,
            count,
            cores: busy.as_secs_f64() / seconds,
            wakeups_per_second: number(slept) / seconds,
        };
        let threads: Vec<ThreadCost> = kinds.into_iter().map(cost).collect();
        Cost {
            seconds,
            resident_mib: mib(self.resident),
            anonymous_mib: mib(self.anonymous),
            proportional_mib: mib(self.proportional),
            cores: threads.iter().map(|thread| thread.cores).sum(),
            wakeups_per_second: threads.iter().map(|thread| thread.wakeups_per_second).sum(),
            threads,
        }
    }
}

fn thread(folder: &Path) -> Option<Thread> {
    let text = |file: &str| fs::read_to_string(folder.join(file)).ok();
    let busy = text("schedstat")?.split(' ').next()?.parse().ok()?;
    let status = text("status")?;
    let slept = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?.trim().parse().ok()?;
    Some(Thread { name: text("comm")?.trim().to_owned(), busy: Duration::from_nanos(busy), slept })
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(Error::file("read", path))
}

/// A line `<name>  <number> kB`; what is not there is nothing.
fn kilobytes(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

fn mib(kilobytes: u64) -> f64 {
    number(kilobytes) / 1024.0
}

/// A count that is far below 2^32.
pub(super) fn number(count: u64) -> f64 {
    u32::try_from(count).map_or(f64::INFINITY, f64::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_sleeps_is_seen_to_be_woken_and_idle() {
        let (done, told) = std::sync::mpsc::channel::<()>();
        let sleeper = std::thread::Builder::new().name("sleeper one".into()).spawn(move || {
            while told.recv_timeout(Duration::from_millis(2)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {}
        });
        let before = Sample::of(std::process::id()).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let cost = Sample::of(std::process::id()).unwrap().since(&before, "never");
        drop(done);
        sleeper.unwrap().join().unwrap();
        let thread = cost.threads.iter().find(|thread| thread.name == "sleeper").unwrap();
        assert!(thread.count == 1 && thread.wakeups_per_second > 10.0, "{thread:?}");
        assert!(cost.resident_mib > 1.0 && cost.proportional_mib <= cost.resident_mib, "{cost:?}");
        assert!(
            Sample::of(std::process::id())
                .unwrap()
                .since(&before, "sleeper")
                .threads
                .iter()
                .all(|t| t.name != "sleeper")
        );
    }
}
