//! From one revision to the next: loaded by all, switch, drained by all, free. A pure state machine of one
//! placement: facts and the time are arguments, what to do is the answer. It neither plans nor sends.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use berth_types::{Bytes, DeviceId, Revision};

/// A device that reads nothing more for a revision for so long is planned around, if nobody says otherwise. It counts
/// from its last progress, because how long a whole shelf takes depends on its size.
pub const LOAD_LIMIT: Duration = Duration::from_secs(60);
/// A runner's hold on revisions ends so long after its stream.
pub const HOLD: Duration = Duration::from_secs(5);

/// How far the assigned revision is, over the devices that are not gone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Every expert has a ready replica.
    pub covered: bool,
    /// Devices whose shelf is not ready, and how far each is.
    pub late: BTreeMap<DeviceId, Late>,
    /// Devices whose shelf is ready.
    pub ready: BTreeSet<DeviceId>,
}

/// How far a device is whose shelf is not ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Late {
    /// It has read so much for it.
    Loading(Bytes),
    /// It gave up.
    Failed,
}

/// What to do now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing.
    Wait,
    /// Let runners start steps on this revision, and plan around these devices, if any.
    Switch(Revision, Vec<DeviceId>),
    /// Make a revision without these devices.
    Around(Vec<DeviceId>),
}

/// Where a placement stands between two revisions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cutover {
    assigned: Revision,
    assigned_at: Duration,
    serving: Revision,
    /// Revisions that runners were ever sent to and that are not drained.
    served: BTreeSet<Revision>,
    /// How far each late device was with the assigned revision, and since when.
    seen: BTreeMap<DeviceId, (Late, Duration)>,
    /// Devices that were given up for the assigned revision.
    given_up: BTreeSet<DeviceId>,
}

impl Cutover {
    /// Takes over from another leader: `assigned` is stored, runners were sent to `serving` and may still
    /// be on `draining` (0 = none).
    #[must_use]
    pub fn adopt(now: Duration, assigned: Revision, serving: Revision, draining: Revision) -> Self {
        let served = [serving, draining].into_iter().filter(|revision| revision.0 > 0).collect();
        Self { assigned, assigned_at: now, serving, served, ..Self::default() }
    }

    /// Runners may have steps on `revision`, for all that is known.
    pub fn hold(&mut self, revision: Revision) {
        self.served.insert(revision);
    }

    /// A new revision was committed.
    pub fn assign(&mut self, now: Duration, revision: Revision) {
        if revision > self.assigned {
            (self.assigned, self.assigned_at) = (revision, now);
            self.seen.clear();
            self.given_up.clear();
        }
    }

    /// A runner says that it starts steps on `current` and has some on `oldest`.
    pub fn observe(&mut self, oldest: Revision, current: Revision) {
        for revision in [oldest, current].into_iter().filter(|revision| revision.0 > 0) {
            if revision <= self.assigned {
                self.served.insert(revision);
                // Another leader may have switched without having told in time.
                self.serving = self.serving.max(revision);
            }
        }
    }

    /// The revision wanted; 0 = none.
    #[must_use]
    pub const fn assigned(&self) -> Revision {
        self.assigned
    }

    /// The revision that runners start steps on; 0 = none.
    #[must_use]
    pub const fn serving(&self) -> Revision {
        self.serving
    }

    /// Whether the assigned revision is not yet served.
    #[must_use]
    pub fn loading(&self) -> bool {
        self.assigned > self.serving
    }

    /// The oldest revision before the serving one that is not drained; 0 = none.
    #[must_use]
    pub fn draining(&self) -> Revision {
        self.served.first().copied().filter(|revision| *revision < self.serving).unwrap_or_default()
    }

    /// What to do at `now`; a device may take `limit` for its next progress.
    pub fn step(&mut self, now: Duration, limit: Duration, progress: &Progress) -> Next {
        if !self.loading() {
            return Next::Wait;
        }
        if progress.late.is_empty() && progress.covered {
            return self.switch(Vec::new());
        }
        let stuck: Vec<DeviceId> =
            self.stuck(now, limit, progress).into_iter().filter(|device| !self.given_up.contains(device)).collect();
        if stuck.is_empty() {
            return Next::Wait;
        }
        self.given_up.extend(stuck.iter().cloned());
        if progress.covered { self.switch(stuck) } else { Next::Around(stuck) }
    }

    /// Devices that are not waited for any longer. One that gave up counts only where another has loaded: weights
    /// that nobody can load are no device's fault, and the status says what is wrong with them.
    fn stuck(&mut self, now: Duration, limit: Duration, progress: &Progress) -> Vec<DeviceId> {
        self.seen.retain(|device, _| progress.late.contains_key(device));
        let mut stuck = Vec::new();
        for (device, late) in &progress.late {
            let seen = self.seen.entry(device.clone()).or_insert((*late, self.assigned_at));
            if seen.0 != *late {
                *seen = (*late, now);
            }
            let given_up = match late {
                Late::Failed => !progress.ready.is_empty(),
                Late::Loading(_) => now.saturating_sub(seen.1) >= limit,
            };
            if given_up {
                stuck.push(device.clone());
            }
        }
        stuck
    }

    fn switch(&mut self, around: Vec<DeviceId>) -> Next {
        self.serving = self.assigned;
        self.served.insert(self.assigned);
        Next::Switch(self.assigned, around)
    }

    /// Lets go of revisions that nobody holds: `oldest` are the oldest revisions that runners still have
    /// steps on. Says whether a revision became free.
    pub fn drain(&mut self, oldest: impl Iterator<Item = Revision>) -> bool {
        let keep = oldest.filter(|revision| revision.0 > 0).min().unwrap_or(self.serving).min(self.serving);
        let before = self.served.len();
        self.served.retain(|revision| *revision >= keep);
        self.served.len() < before
    }

    /// Revisions that devices must hold.
    #[must_use]
    pub fn retained(&self) -> BTreeSet<Revision> {
        let mut retained = self.served.clone();
        retained.extend([self.serving, self.assigned].into_iter().filter(|revision| revision.0 > 0));
        retained
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn device(name: &str) -> DeviceId {
        format!("node-1/{name}").parse().unwrap()
    }

    fn ready() -> Progress {
        Progress { covered: true, ready: [device("c"), device("d")].into(), ..Progress::default() }
    }

    fn late(covered: bool) -> Progress {
        loading(covered, &["c"], &[("a", Late::Loading(Bytes(0)))])
    }

    fn loading(covered: bool, ready: &[&str], late: &[(&str, Late)]) -> Progress {
        let late = late.iter().map(|(name, late)| (device(name), *late)).collect();
        Progress { covered, ready: ready.iter().map(|name| device(name)).collect(), late }
    }

    #[test]
    fn runners_are_sent_to_a_revision_only_when_all_have_loaded_it() {
        let mut cutover = Cutover::default();
        cutover.assign(at(0), Revision(1));
        assert_eq!(cutover.step(at(1), LOAD_LIMIT, &late(true)), Next::Wait);
        assert_eq!(cutover.step(at(2), LOAD_LIMIT, &ready()), Next::Switch(Revision(1), vec![]));
        assert_eq!(cutover.step(at(3), LOAD_LIMIT, &ready()), Next::Wait);
    }

    #[test]
    fn a_revision_is_freed_when_the_last_runner_has_drained_it() {
        let mut cutover = Cutover::adopt(at(0), Revision(1), Revision(1), Revision(0));
        cutover.assign(at(1), Revision(2));
        assert_eq!(cutover.retained(), [Revision(1), Revision(2)].into());
        cutover.step(at(2), LOAD_LIMIT, &ready());
        assert!(!cutover.drain([Revision(1), Revision(2)].into_iter()));
        assert_eq!((cutover.draining(), cutover.retained().len()), (Revision(1), 2));
        assert!(cutover.drain([Revision(2), Revision(2)].into_iter()));
        assert_eq!((cutover.draining(), cutover.retained()), (Revision(0), [Revision(2)].into()));
    }

    #[test]
    fn a_worker_that_hangs_is_planned_around_at_the_deadline_once() {
        let mut cutover = Cutover::adopt(at(0), Revision(1), Revision(1), Revision(0));
        cutover.assign(at(10), Revision(2));
        assert_eq!(cutover.step(at(69), LOAD_LIMIT, &late(false)), Next::Wait);
        assert_eq!(cutover.step(at(70), LOAD_LIMIT, &late(false)), Next::Around(vec![device("a")]));
        assert_eq!(cutover.step(at(71), LOAD_LIMIT, &late(false)), Next::Wait);
        assert_eq!(cutover.serving(), Revision(1));
        cutover.assign(at(72), Revision(3));
        assert_eq!(cutover.step(at(73), LOAD_LIMIT, &ready()), Next::Switch(Revision(3), vec![]));
    }

    #[test]
    fn past_the_deadline_a_covered_revision_is_served_without_the_late() {
        let mut cutover = Cutover::default();
        cutover.assign(at(0), Revision(1));
        assert_eq!(cutover.step(at(60), LOAD_LIMIT, &late(true)), Next::Switch(Revision(1), vec![device("a")]));
    }

    #[test]
    fn a_load_that_failed_is_not_waited_for() {
        let mut cutover = Cutover::default();
        cutover.assign(at(0), Revision(1));
        let failed = loading(false, &["c"], &[("a", Late::Failed)]);
        assert_eq!(cutover.step(at(1), LOAD_LIMIT, &failed), Next::Around(vec![device("a")]));
        let nowhere = Progress { ready: BTreeSet::new(), ..failed };
        cutover.assign(at(2), Revision(2));
        assert_eq!(
            cutover.step(at(90), LOAD_LIMIT, &nowhere),
            Next::Wait,
            "weights that nobody can load are no device's fault"
        );
    }

    #[test]
    fn a_device_that_goes_on_loading_has_all_the_time_it_needs() {
        let mut cutover = Cutover::default();
        cutover.assign(at(0), Revision(1));
        for minute in 1..100 {
            let slow = loading(false, &[], &[("a", Late::Loading(Bytes(minute)))]);
            assert_eq!(cutover.step(at(50 * minute), LOAD_LIMIT, &slow), Next::Wait);
        }
        let halted = loading(false, &[], &[("a", Late::Loading(Bytes(99)))]);
        assert_eq!(cutover.step(at(50 * 99 + 59), LOAD_LIMIT, &halted), Next::Wait);
        assert_eq!(cutover.step(at(50 * 99 + 60), LOAD_LIMIT, &halted), Next::Around(vec![device("a")]));
    }

    #[test]
    fn a_revision_whose_devices_all_hang_is_planned_around_all_of_them() {
        let mut cutover = Cutover::default();
        cutover.assign(at(0), Revision(1));
        let hung = loading(false, &[], &[("a", Late::Loading(Bytes(0))), ("b", Late::Loading(Bytes(3)))]);
        assert_eq!(cutover.step(at(10), LOAD_LIMIT, &hung), Next::Wait);
        assert_eq!(cutover.step(at(60), LOAD_LIMIT, &hung), Next::Around(vec![device("a"), device("b")]));
        assert_eq!(cutover.step(at(61), LOAD_LIMIT, &hung), Next::Wait);
        assert_eq!(cutover.step(at(62), LOAD_LIMIT, &ready()), Next::Switch(Revision(1), vec![]), "they came back");
    }

    #[test]
    fn a_device_that_hangs_later_is_planned_around_too() {
        let mut cutover = Cutover::default();
        cutover.assign(at(0), Revision(1));
        let both = |b| loading(false, &["c"], &[("a", Late::Loading(Bytes(0))), ("b", Late::Loading(Bytes(b)))]);
        assert_eq!(cutover.step(at(30), LOAD_LIMIT, &both(4)), Next::Wait);
        assert_eq!(cutover.step(at(31), LOAD_LIMIT, &both(5)), Next::Wait);
        assert_eq!(cutover.step(at(60), LOAD_LIMIT, &both(5)), Next::Around(vec![device("a")]));
        assert_eq!(cutover.step(at(91), LOAD_LIMIT, &both(5)), Next::Around(vec![device("b")]));
    }

    #[test]
    fn a_new_leader_goes_on_from_what_runners_use() {
        let mut cutover = Cutover::adopt(at(0), Revision(3), Revision(2), Revision(0));
        cutover.observe(Revision(2), Revision(3));
        assert_eq!((cutover.serving(), cutover.draining()), (Revision(3), Revision(2)));
        cutover.observe(Revision(9), Revision(9));
        assert_eq!(cutover.serving(), Revision(3), "a revision that was never assigned is not believed");
    }

    #[test]
    fn a_revision_that_was_never_served_is_dropped_for_a_later_one() {
        let mut cutover = Cutover::adopt(at(0), Revision(1), Revision(1), Revision(0));
        cutover.assign(at(1), Revision(2));
        cutover.assign(at(2), Revision(3));
        assert_eq!(cutover.retained(), [Revision(1), Revision(3)].into());
    }
}
