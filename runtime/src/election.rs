//! Who leads: the algorithm of client-go's leader election as a pure state machine. Records seen and
//! the time are arguments; what to write is the answer.
//!
//! What must stay true, and why two nodes never both believe that they lead, as long as their monotonic
//! clocks run at about the same rate:
//! * a leader believes until `renew_deadline` after the *start* of its last confirmed write;
//! * a follower takes over no sooner than `lease` after it *saw* the record change, which is no sooner
//!   than that write; `renew_deadline < lease`;
//! * a wall clock, ours or another node's, decides nothing: the times in a record only make each write
//!   differ from the one before;
//! * a record that this process did not write is another's, even under its own name: a term is never
//!   inherited from the process before. A leader that crashed and came back lets the others go first.

use std::time::Duration;

/// The durations of an election; all candidates of one lease should use the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// How long a record binds the others after they saw it change.
    pub lease: Duration,
    /// How long a leader believes after it began its last confirmed write.
    pub renew_deadline: Duration,
    /// Pause between two rounds.
    pub retry: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { lease: seconds(15), renew_deadline: seconds(10), retry: seconds(2) }
    }
}

/// What a Lease says, less what the API server adds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// `holderIdentity`; `None` when released.
    pub holder: Option<String>,
    /// `leaseTransitions`: how many terms there have been. It numbers the term and is its epoch.
    pub transitions: u64,
    /// `leaseDurationSeconds`.
    pub lease: Duration,
    /// `acquireTime`, microseconds since 1970.
    pub acquired_us: u64,
    /// `renewTime`, microseconds since 1970.
    pub renewed_us: u64,
}

/// What to do in this round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Begin a term: write this record, creating the Lease if it was absent.
    Acquire(Record),
    /// Go on with the term: write this record.
    Renew(Record),
    /// Somebody else leads, or may.
    Wait,
}

/// One candidate's view of one lease.
#[derive(Clone, Debug)]
pub struct Election {
    identity: String,
    timing: Timing,
    /// Terms that begin here are numbered above this: the highest number known. It outlives a Lease that
    /// somebody deletes.
    floor: u64,
    seen: Option<Seen>,
    /// Start and content of the last write whose outcome is unknown.
    pending: Option<(Duration, Record)>,
    held: Option<Held>,
}

#[derive(Clone, Debug)]
struct Seen {
    record: Option<Record>,
    /// When, on our clock, the record was first seen as it is.
    since: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    epoch: u64,
    until: Duration,
}

impl Election {
    /// A candidate that has seen nothing yet. `identity` must differ between candidates that live at
    /// the same time; terms begun here are numbered above `floor`.
    #[must_use]
    pub fn new(identity: String, timing: Timing, floor: u64) -> Self {
        Self { identity, timing, floor, seen: None, pending: None, held: None }
    }

    /// The durations in use.
    #[must_use]
    pub fn timing(&self) -> Timing {
        self.timing
    }

    /// Takes note of the lease as it was read at `now`; `None` when it does not exist.
    pub fn observe(&mut self, now: Duration, record: Option<Record>) {
        self.floor = self.floor.max(record.as_ref().map_or(0, |record| record.transitions));
        if let Some((started, pending)) = self.pending.take_if(|(_, pending)| record.as_ref() == Some(&*pending)) {
            // The answer was lost, the write was not.
            self.confirm(started, now, &pending);
            return;
        }
        if self.held.is_some_and(|held| !self.owns(record.as_ref(), held)) {
            self.held = None;
        }
        if self.seen.as_ref().is_none_or(|seen| seen.record != record) {
            self.seen = Some(Seen { record, since: now });
        }
    }

    /// What to write at `now`, when the wall clock says `unix_us`. Call it after [`Self::observe`] in
    /// the same round, and report the outcome with [`Self::attempt`] before and [`Self::confirm`] after.
    #[must_use]
    pub fn decide(&self, now: Duration, unix_us: u64) -> Action {
        let Some(seen) = &self.seen else { return Action::Wait };
        let last = seen.record.as_ref();
        let renewed_us = unix_us.max(last.map_or(0, |record| record.renewed_us.saturating_add(1)));
        let held = self.held.filter(|held| now < held.until);
        if let (Some(held), Some(record)) = (held, last) {
            return Action::Renew(Record {
                transitions: held.epoch,
                lease: self.timing.lease,
                renewed_us,
                ..record.clone()
            });
        }
        if self.expires().is_some_and(|expires| now < expires) {
            return Action::Wait;
        }
        Action::Acquire(Record {
            holder: Some(self.identity.clone()),
            transitions: self.floor.saturating_add(1),
            lease: self.timing.lease,
            acquired_us: unix_us,
            renewed_us,
        })
    }

    /// A write of `record` begins at `started`; its outcome is unknown until [`Self::confirm`], or until
    /// the record is seen.
    pub fn attempt(&mut self, started: Duration, record: &Record) {
        self.pending = Some((started, record.clone()));
    }

    /// The write of `record`, begun at `started`, was accepted; we know it since `now`.
    pub fn confirm(&mut self, started: Duration, now: Duration, record: &Record) {
        self.pending = None;
        self.floor = self.floor.max(record.transitions);
        self.held = (record.holder.as_deref() == Some(&self.identity))
            .then(|| Held { epoch: record.transitions, until: started.saturating_add(self.timing.renew_deadline) });
        self.seen = Some(Seen { record: Some(record.clone()), since: now });
    }

    /// The term held at `now`, as (epoch, until). Forgets a term whose time is over: it is never taken up
    /// again, for others may have written in between.
    pub fn term(&mut self, now: Duration) -> Option<(u64, Duration)> {
        self.held = self.held.filter(|held| now < held.until);
        self.held.map(|held| (held.epoch, held.until))
    }

    /// When the record last seen binds us no longer; `None` when nobody holds the lease.
    #[must_use]
    pub fn expires(&self) -> Option<Duration> {
        let seen = self.seen.as_ref()?;
        let record = seen.record.as_ref()?;
        // The others saw the record change at most one round later than we did.
        let after_others =
            if *record.holder.as_ref()? == self.identity { self.timing.retry * 2 } else { Duration::ZERO };
        Some(seen.since.saturating_add(record.lease.max(self.timing.lease)).saturating_add(after_others))
    }

    /// Who leads as far as we have seen.
    #[must_use]
    pub fn leader(&self) -> Option<&str> {
        self.seen.as_ref()?.record.as_ref()?.holder.as_deref()
    }

    /// Ends our term at once and answers with the record that tells the others, if the lease is ours.
    pub fn release(&mut self, unix_us: u64) -> Option<Record> {
        let held = self.held.take()?;
        let record = self.seen.as_ref()?.record.as_ref()?;
        let renewed_us = unix_us.max(record.renewed_us.saturating_add(1));
        self.owns(Some(record), held).then(|| Record { holder: None, renewed_us, ..record.clone() })
    }

    fn owns(&self, record: Option<&Record>, held: Held) -> bool {
        record
            .is_some_and(|record| record.holder.as_deref() == Some(&self.identity) && record.transitions == held.epoch)
    }
}
