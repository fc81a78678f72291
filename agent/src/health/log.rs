//! Reads the kernel log on a thread of its own: records in, facts out. What was there before is told
//! before [`Seen::Settled`]; what comes later is new.

use std::{io, thread};

use berth_runtime::{Clock, clock::InFlight};

use super::{
    kmsg::{KernelLog, Read, Record},
    nvrm::Nvrm,
};
use crate::{
    metrics::Metrics,
    vendor::{Facts, Seen},
};

/// Name of this detector.
pub const NAME: &str = "kernel log";

/// Starts the thread. It ends when the log does, or when nobody listens.
///
/// # Errors
/// When the system refuses a thread.
pub fn follow(log: Box<dyn KernelLog>, facts: Facts, metrics: Metrics, clock: &Clock) -> io::Result<()> {
    // What is there already is read before any time passes.
    let reading = Some(clock.in_flight());
    let mut follower = Follower { log, facts, metrics, nvrm: Nvrm::default(), reading };
    thread::Builder::new().name("kernel log".to_owned()).spawn(move || follower.run()).map(|_| ())
}

struct Follower {
    log: Box<dyn KernelLog>,
    facts: Facts,
    metrics: Metrics,
    nvrm: Nvrm,
    reading: Option<InFlight>,
}

impl Follower {
    fn run(&mut self) {
        loop {
            let listened = match self.log.read() {
                Ok(Read::Record(bytes, guard)) => self.record(&bytes, guard),
                Ok(Read::Lost(guard)) => {
                    self.metrics.log_lost.inc();
                    self.facts.send_blocking(Seen::LogLost, guard)
                }
                Ok(Read::CaughtUp) => self.facts.send_blocking(Seen::Settled(NAME), self.reading.take()),
                Ok(Read::Ended) => return,
                Err(error) => {
                    tracing::error!(%error, "the kernel log ends: faults are found by polling only");
                    self.facts.send_blocking(Seen::Settled(NAME), self.reading.take());
                    return;
                }
            };
            if !listened {
                return;
            }
        }
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
        // The guard goes with the last fact of the record: time stands still until all are consumed.
        let mut facts = self.nvrm.read(&record.text);
        let last = facts.pop();
        facts.into_iter().all(|fact| self.facts.send_blocking(Seen::Fact(fact), None))
            && last.is_none_or(|fact| self.facts.send_blocking(Seen::Fact(fact), guard.take()))
    }
}
