//! Reads the kernel log on a thread of its own: records in, facts out. What was there before is told
//! before [`Seen::Settled`]; what comes later is new. A log that cannot be read is a reported state, and opened again.

use std::{collections::VecDeque, io, thread, time::Duration};

use berth_runtime::{Clock, clock::InFlight};

use super::{
    fact::{Fact, What},
    kmsg::{KernelLog, Read, Record},
    nvrm::Nvrm,
};
use crate::{
    metrics::Metrics,
    vendor::{Facts, Seen},
};

/// Name of this detector.
pub const NAME: &str = "kernel log";

/// A log that cannot be read is opened again after this.
const REOPEN: Duration = Duration::from_secs(30);
/// Records that are remembered in case they are delivered again.
const RECENT: usize = 64;

/// Opens the log from its oldest record.
pub type Open = Box<dyn FnMut() -> io::Result<Box<dyn KernelLog>> + Send>;

/// A log that opens once, and does not break.
#[must_use]
pub fn once(log: impl KernelLog + 'static) -> Open {
    let mut log = Some(log);
    Box::new(move || {
        let log = log.take().ok_or_else(|| io::Error::other("it was read already"))?;
        let log: Box<dyn KernelLog> = Box::new(log);
        Ok(log)
    })
}

/// Starts the thread. It ends when the log does, or when nobody listens. `known` = the last record that an agent before
/// this one took in: what is there up to it is no news.
///
/// # Errors
/// When the system refuses a thread.
pub fn follow(open: Open, known: Option<u64>, facts: Facts, metrics: Metrics, clock: &Clock) -> io::Result<()> {
    // What is there already is read before any time passes.
    let reading = Some(clock.in_flight());
    let (nvrm, recent) = (Nvrm::default(), VecDeque::new());
    let mut follower =
        Follower { open, facts, metrics, clock: clock.clone(), nvrm, known, recent, past: true, blind: false, reading };
    thread::Builder::new().name("kernel log".to_owned()).spawn(move || follower.run()).map(|_| ())
}

struct Follower {
    open: Open,
    facts: Facts,
    metrics: Metrics,
    clock: Clock,
    nvrm: Nvrm,
    /// Number of the last record that was taken in.
    known: Option<u64>,
    /// Number and time of the last ones that said something: a record that is delivered again is no news.
    recent: VecDeque<(u64, u64)>,
    /// What was there when the log was opened is still being read.
    past: bool,
    /// It was said that the log cannot be read.
    blind: bool,
    reading: Option<InFlight>,
}

impl Follower {
    fn run(&mut self) {
        loop {
            let why = match (self.open)() {
                Ok(log) => {
                    if !self.sees() {
                        return;
                    }
                    match self.read(log) {
                        Some(error) => error,
                        None => return,
                    }
                }
                Err(error) => error,
            };
            if !self.cannot(&why) {
                return;
            }
            let guard = self.clock.in_flight();
            guard.block_until(self.clock.now().saturating_add(REOPEN));
            if self.facts.closed() {
                return;
            }
        }
    }

    /// Reads until the log ends (`None`) or cannot be read any more.
    fn read(&mut self, mut log: Box<dyn KernelLog>) -> Option<io::Error> {
        self.past = true;
        loop {
            let listened = match log.read() {
                Ok(Read::Record(bytes, guard)) => self.record(&bytes, guard),
                Ok(Read::Lost(guard)) => {
                    self.metrics.log_lost.inc();
                    self.facts.send_blocking(Seen::LogLost, guard)
                }
                Ok(Read::CaughtUp) => {
                    self.past = false;
                    self.facts.send_blocking(Seen::Settled(NAME), self.reading.take())
                }
                Ok(Read::Ended) => return None,
                Err(error) => return Some(error),
            };
            if !listened {
                return None;
            }
        }
    }

    /// The log is open. After a gap nobody knows what it would have said.
    fn sees(&mut self) -> bool {
        if !std::mem::take(&mut self.blind) {
            return true;
        }
        tracing::info!("the kernel log can be read again");
        self.facts.send_blocking(Seen::Fact(Fact::node(What::LogBlind(None))), None)
            && self.facts.send_blocking(Seen::LogLost, None)
    }

    /// The log cannot be read: that is said, and nobody waits for it.
    fn cannot(&mut self, why: &io::Error) -> bool {
        let mut listened = true;
        if !std::mem::replace(&mut self.blind, true) {
            tracing::error!(error = %why, "the kernel log cannot be read: faults are found by events and polling only");
            let evidence = format!("kernel log: {why}");
            listened = self.facts.send_blocking(Seen::Fact(Fact::node(What::LogBlind(Some(evidence)))), None);
        }
        listened && self.facts.send_blocking(Seen::Settled(NAME), self.reading.take())
    }

    fn record(&mut self, bytes: &[u8], mut guard: Option<InFlight>) -> bool {
        let Some(record) = Record::parse(bytes) else {
            self.metrics.log_damaged.inc();
            return true;
        };
        if !record.by_kernel() {
            self.metrics.log_foreign.inc();
            return true;
        }
        // Read in any case: one message of the driver spans three records.
        let facts = self.nvrm.read(&record.text);
        let old = self.past && self.known.is_some_and(|known| record.sequence <= known);
        let this = (record.sequence, record.micros);
        if facts.is_empty() || old || self.recent.contains(&this) {
            return true;
        }
        if self.recent.len() >= RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(this);
        self.known = self.known.max(Some(record.sequence));
        // The guard goes with the last word of the record: time stands still until all are consumed.
        facts.into_iter().all(|fact| self.facts.send_blocking(Seen::Fact(fact), None))
            && self.facts.send_blocking(Seen::Logged(record.sequence), guard.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake(VecDeque<io::Result<Read>>);

    impl KernelLog for Fake {
        fn read(&mut self) -> io::Result<Read> {
            self.0.pop_front().unwrap_or(Ok(Read::Ended))
        }
    }

    fn record(sequence: u64, number: u16) -> io::Result<Read> {
        let text = format!("4,{sequence},1,-;NVRM: Xid (PCI:0000:3b:00): {number}, text\n");
        Ok(Read::Record(text.into_bytes(), None))
    }

    /// What is told, in short, while each opening gives the next of `logs`.
    fn told(known: Option<u64>, logs: Vec<io::Result<Vec<io::Result<Read>>>>) -> Vec<String> {
        let mut logs = VecDeque::from(logs);
        let open: Open = Box::new(move || {
            let reads = logs.pop_front().unwrap_or_else(|| Ok(Vec::new()))?;
            let log: Box<dyn KernelLog> = Box::new(Fake(reads.into()));
            Ok(log)
        });
        let clock = Clock::discrete();
        let (facts, mut line) = Facts::line(64);
        follow(open, known, facts, Metrics::default(), &clock).unwrap();
        let collect = async move {
            let mut told = Vec::new();
            while let Some((seen, _guard)) = line.recv().await {
                told.push(match seen {
                    Seen::Fact(Fact { what: What::Xid(xid), .. }) => format!("xid {}", xid.number),
                    Seen::Fact(Fact { what: What::LogBlind(why), .. }) => {
                        (if why.is_some() { "blind" } else { "sees" }).to_owned()
                    }
                    Seen::Fact(_) => "other".to_owned(),
                    Seen::Settled(_) => "settled".to_owned(),
                    Seen::LogLost => "lost".to_owned(),
                    Seen::Logged(sequence) => format!("at {sequence}"),
                });
            }
            told
        };
        clock.run(collect).unwrap()
    }

    #[test]
    fn a_log_that_breaks_is_opened_again_and_its_old_records_are_no_news() {
        let first = vec![Ok(Read::CaughtUp), record(7, 48), Err(io::Error::other("gone"))];
        let again = vec![record(6, 63), record(7, 48), record(8, 79), Ok(Read::CaughtUp)];
        let told = told(None, vec![Ok(first), Err(io::Error::other("still gone")), Ok(again)]);
        let expected =
            ["settled", "xid 48", "at 7", "blind", "settled", "settled", "sees", "lost", "xid 79", "at 8", "settled"];
        assert_eq!(told, expected);
    }

    #[test]
    fn a_record_that_is_delivered_twice_is_told_once() {
        let log = vec![Ok(Read::CaughtUp), record(7, 119), record(7, 119), record(8, 119), record(7, 119)];
        assert_eq!(told(None, vec![Ok(log)]), ["settled", "xid 119", "at 7", "xid 119", "at 8"]);
    }

    #[test]
    fn records_that_an_agent_before_took_in_are_no_news_and_later_ones_are() {
        let log = vec![record(3, 48), record(4, 79), Ok(Read::CaughtUp), record(2, 31)];
        assert_eq!(told(Some(3), vec![Ok(log)]), ["xid 79", "at 4", "settled", "xid 31", "at 2"]);
    }
}
