//! Simulates candidates, a network that delays, loses and applies late, wall clocks that are wrong, and
//! processes that pause and die; looks for two that believe they lead at once. Time is simulated, so a
//! run of minutes takes microseconds.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    time::Duration,
};

use berth_runtime::election::{Action, Election, Record, Timing};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};

/// All times are true milliseconds; a candidate sees its own clock only.
type Ms = u64;

const CALL_LIMIT: Ms = 5_000;
const TROUBLE: Ms = 240_000;
const QUIET: Ms = 90_000;

/// How bad the world is.
#[derive(Clone, Debug)]
struct Weather {
    seed: u64,
    candidates: usize,
    /// Chances of a hundred.
    lost: u32,
    slow: u32,
    pause: u32,
    restart: u32,
    release: u32,
}

fn weather() -> impl Strategy<Value = Weather> {
    (any::<u64>(), 1..=4_usize, 0..40_u32, 0..40_u32, 0..12_u32, 0..6_u32, 0..6_u32).prop_map(
        |(seed, candidates, lost, slow, pause, restart, release)| Weather {
            seed,
            candidates,
            lost,
            slow,
            pause,
            restart,
            release,
        },
    )
}

#[derive(Clone, Debug)]
enum Event {
    /// The candidate begins a round.
    Round,
    /// A read reaches the store.
    Read { call: u64 },
    /// The answer of a read arrives.
    Seen { call: u64, found: Option<(u64, Record)> },
    /// A write reaches the store.
    Write { call: u64, started: Ms, version: Option<u64>, record: Record },
    /// The answer of a write arrives.
    Wrote { call: u64, started: Ms, record: Record, accepted: bool },
    /// The client gives up on a call.
    GaveUp { call: u64 },
}

struct Candidate {
    election: Election,
    /// Added to true time on its monotonic clock.
    clock_offset: Ms,
    /// Its wall clock: where it starts, and whether it moves.
    wall: (u64, bool),
    incarnation: u64,
    paused_until: Ms,
    /// The call it waits for.
    waiting: Option<u64>,
    /// Epoch and, in true time, until when it believes.
    belief: Option<(u64, Ms)>,
}

struct World {
    weather: Weather,
    rng: SmallRng,
    now: Ms,
    queue: BinaryHeap<Reverse<(Ms, u64)>>,
    events: BTreeMap<u64, (usize, u64, Event)>,
    next: u64,
    store: Option<(u64, Record)>,
    candidates: Vec<Candidate>,
    /// Who held each epoch.
    terms: BTreeMap<u64, (usize, u64)>,
}

impl World {
    fn new(weather: Weather) -> Self {
        let mut rng = SmallRng::seed_from_u64(weather.seed);
        let candidates = (0..weather.candidates)
            .map(|index| Candidate {
                election: Election::new(format!("pod-{index}"), Timing::default(), 0),
                clock_offset: rng.random_range(0..1_000_000_000),
                wall: (rng.random_range(0..4_000_000_000_000_000), rng.random_bool(0.7)),
                incarnation: 0,
                paused_until: 0,
                waiting: None,
                belief: None,
            })
            .collect();
        let mut world = Self {
            weather,
            rng,
            now: 0,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            next: 0,
            store: None,
            candidates,
            terms: BTreeMap::new(),
        };
        for index in 0..world.candidates.len() {
            let delay = world.rng.random_range(0..3_000);
            world.after(index, delay, Event::Round);
        }
        world
    }

    fn after(&mut self, index: usize, delay: Ms, event: Event) {
        self.next += 1;
        self.queue.push(Reverse((self.now + delay, self.next)));
        self.events.insert(self.next, (index, self.candidates[index].incarnation, event));
    }

    fn troubled(&self) -> bool {
        self.now < TROUBLE
    }

    fn chance(&mut self, of_hundred: u32) -> bool {
        self.troubled() && self.rng.random_range(0..100) < of_hundred
    }

    /// One way over the network. A slow packet may be delivered after its sender gave up.
    fn latency(&mut self) -> Ms {
        if self.chance(self.weather.slow) { self.rng.random_range(1_000..40_000) } else { self.rng.random_range(1..60) }
    }

    fn local(&self, index: usize) -> Duration {
        Duration::from_millis(self.now + self.candidates[index].clock_offset)
    }

    fn unix_us(&self, index: usize) -> u64 {
        let (start, moves) = self.candidates[index].wall;
        start + if moves { self.now * 1000 } else { 0 }
    }

    fn run(&mut self) {
        while let Some(Reverse((at, id))) = self.queue.pop() {
            if at > TROUBLE + QUIET {
                break;
            }
            self.now = at;
            let Some((index, incarnation, event)) = self.events.remove(&id) else { continue };
            // What is under way reaches the store whoever sent it; the rest needs a live, running process.
            let at_store = matches!(event, Event::Read { .. } | Event::Write { .. });
            let candidate = &self.candidates[index];
            if !at_store && candidate.incarnation != incarnation {
                continue;
            }
            if !at_store && candidate.paused_until > self.now {
                let resumes = candidate.paused_until - self.now;
                self.after(index, resumes, event);
                continue;
            }
            self.handle(index, incarnation, event);
            self.believe(index);
        }
        self.now = TROUBLE + QUIET;
    }

    fn handle(&mut self, index: usize, incarnation: u64, event: Event) {
        match event {
            Event::Round => self.begin_round(index),
            Event::Read { call } => {
                let found = self.store.clone();
                self.answer(index, incarnation, Event::Seen { call, found });
            }
            Event::Seen { call, found } if self.candidates[index].waiting == Some(call) => self.decide(index, found),
            Event::Write { call, started, version, record } => {
                let accepted = self.store.as_ref().map(|(version, _)| *version) == version;
                if accepted {
                    self.store = Some((version.unwrap_or(0) + 1, record.clone()));
                }
                self.answer(index, incarnation, Event::Wrote { call, started, record, accepted });
            }
            Event::Wrote { call, started, record, accepted } if self.candidates[index].waiting == Some(call) => {
                if accepted {
                    let (started, now) = (self.local_at(index, started), self.local(index));
                    self.candidates[index].election.confirm(started, now, &record);
                }
                self.next_round(index);
            }
            Event::GaveUp { call } if self.candidates[index].waiting == Some(call) => self.next_round(index),
            Event::Seen { .. } | Event::Wrote { .. } | Event::GaveUp { .. } => {}
        }
    }

    fn local_at(&self, index: usize, at: Ms) -> Duration {
        Duration::from_millis(at + self.candidates[index].clock_offset)
    }

    fn answer(&mut self, index: usize, incarnation: u64, event: Event) {
        if self.candidates[index].incarnation == incarnation && !self.chance(self.weather.lost) {
            let delay = self.latency();
            self.after(index, delay, event);
        }
    }

    fn call(&mut self, index: usize, event: impl FnOnce(u64) -> Event) {
        let call = self.next + 1_000_000_000;
        self.next += 1;
        self.candidates[index].waiting = Some(call);
        self.after(index, CALL_LIMIT, Event::GaveUp { call });
        if !self.chance(self.weather.lost) {
            let delay = self.latency();
            self.after(index, delay, event(call));
        }
    }

    fn begin_round(&mut self, index: usize) {
        if self.chance(self.weather.restart) {
            let candidate = &mut self.candidates[index];
            candidate.incarnation += 1;
            candidate.belief = None;
            candidate.election = Election::new(format!("pod-{index}"), Timing::default(), 0);
            let delay = self.rng.random_range(100..10_000);
            return self.after(index, delay, Event::Round);
        }
        if self.chance(self.weather.pause) {
            self.candidates[index].paused_until = self.now + self.rng.random_range(1_000..60_000);
        }
        if self.chance(self.weather.release) {
            let unix_us = self.unix_us(index);
            let version = self.store.as_ref().map(|(version, _)| *version);
            if let Some(record) = self.candidates[index].election.release(unix_us) {
                let started = self.now;
                return self.call(index, |call| Event::Write { call, started, version, record });
            }
        }
        self.call(index, |call| Event::Read { call });
    }

    fn decide(&mut self, index: usize, found: Option<(u64, Record)>) {
        let (now, unix_us) = (self.local(index), self.unix_us(index));
        let (version, record) = found.map_or((None, None), |(version, record)| (Some(version), Some(record)));
        let election = &mut self.candidates[index].election;
        election.observe(now, record);
        match election.decide(now, unix_us) {
            Action::Wait => self.next_round(index),
            Action::Acquire(record) | Action::Renew(record) => {
                election.attempt(now, &record);
                let started = self.now;
                // A process may stall between reading its clock and sending: the latency covers it.
                self.call(index, |call| Event::Write { call, started, version, record });
            }
        }
    }

    fn next_round(&mut self, index: usize) {
        self.candidates[index].waiting = None;
        let pause = self.rng.random_range(2_000..2_400);
        self.after(index, pause, Event::Round);
    }

    /// Notes what the candidate believes now, and that nobody else does.
    fn believe(&mut self, index: usize) {
        let (now, local) = (self.now, self.local(index));
        let candidate = &mut self.candidates[index];
        let offset = candidate.clock_offset;
        candidate.belief = candidate
            .election
            .term(local)
            .map(|(epoch, until)| (epoch, u64::try_from(until.as_millis()).map_or(Ms::MAX, |until| until - offset)));
        let Some((epoch, until)) = candidate.belief else { return };
        assert!(until > now);
        let holder = (index, candidate.incarnation);
        assert_eq!(*self.terms.entry(epoch).or_insert(holder), holder, "epoch {epoch} was begun twice");
        let newest = self.terms.last_key_value().map(|(epoch, _)| *epoch);
        assert_eq!(newest, Some(epoch), "an older epoch leads after a newer one began");
        let others = self.candidates.iter().enumerate().filter(|(other, _)| *other != index);
        for (other, candidate) in others {
            let both = candidate.belief.filter(|(_, until)| *until > now);
            assert_eq!(both, None, "at {now} ms both {index} and {other} believe that they lead");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn never_do_two_believe_and_somebody_leads_when_the_storm_is_over(weather in weather()) {
        let mut world = World::new(weather);
        world.run();
        let now = world.now;
        let leads = world.candidates.iter().any(|candidate| candidate.belief.is_some_and(|(_, until)| until > now));
        prop_assert!(leads, "nobody leads {QUIET} ms after the last fault");
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn foreign(renewed_us: u64) -> Record {
    Record { holder: Some("other".into()), transitions: 4, lease: seconds(15), acquired_us: 1, renewed_us }
}

#[test]
fn expiry_is_judged_by_a_change_seen_here_whatever_the_record_says() {
    let mut election = Election::new("me".into(), Timing::default(), 0);
    // Renewed in the year 1970 or in the far future: the same.
    for (renewed_us, start) in [(1, 100), (u64::MAX / 2, 200)] {
        election.observe(seconds(start), Some(foreign(renewed_us)));
        assert_eq!(election.decide(seconds(start + 14), 0), Action::Wait);
        election.observe(seconds(start + 14), Some(foreign(renewed_us)));
        assert!(matches!(election.decide(seconds(start + 15), 0), Action::Acquire(record) if record.transitions == 5));
    }
}

#[test]
fn a_longer_lease_of_the_holder_is_respected() {
    let mut election = Election::new("me".into(), Timing::default(), 0);
    election.observe(seconds(0), Some(Record { lease: seconds(60), ..foreign(1) }));
    assert_eq!(election.decide(seconds(59), 0), Action::Wait);
    assert!(matches!(election.decide(seconds(60), 0), Action::Acquire(_)));
}

#[test]
fn a_record_of_the_process_before_is_another_ones() {
    let mut election = Election::new("me".into(), Timing::default(), 0);
    election.observe(seconds(0), Some(Record { holder: Some("me".into()), ..foreign(1) }));
    assert_eq!((election.decide(seconds(1), 0), election.term(seconds(1))), (Action::Wait, None));
    // The other candidates go first, one retry of theirs after the record expired.
    assert_eq!(election.decide(seconds(18), 0), Action::Wait);
    assert!(matches!(election.decide(seconds(19), 0), Action::Acquire(record) if record.transitions == 5));
}

#[test]
fn a_deleted_lease_begins_above_the_floor() {
    let mut election = Election::new("me".into(), Timing::default(), 41);
    election.observe(seconds(0), None);
    assert!(matches!(election.decide(seconds(0), 0), Action::Acquire(record) if record.transitions == 42));
}

#[test]
fn a_lost_answer_is_made_good_by_seeing_the_record() {
    let mut election = Election::new("me".into(), Timing::default(), 0);
    election.observe(seconds(0), None);
    let Action::Acquire(record) = election.decide(seconds(0), 7) else { panic!("nobody else is there") };
    election.attempt(seconds(1), &record);
    assert_eq!(election.term(seconds(5)), None);
    election.observe(seconds(6), Some(record));
    assert_eq!(election.term(seconds(6)), Some((1, seconds(11))));
    assert_eq!(election.term(seconds(11)), None);
}
