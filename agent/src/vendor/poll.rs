//! Reads one device, every few seconds and whenever its bell rings, on a lane of its own: a call that hangs
//! is abandoned at its deadline, and only its own value is missed.

use std::{sync::Arc, time::Duration};

use berth_runtime::Clock;
use tokio::sync::{Notify, mpsc};

use super::{
    Facts, Seen,
    lane::{Lane, LaneError},
    slate::Slate,
    trouble::Trouble,
};
use crate::{
    health::fact::{Fact, What},
    vitals::{Board, Sight},
};

/// One read has so long.
pub const READ_LIMIT: Duration = Duration::from_secs(1);
/// Between two readings of a device.
pub const POLL: Duration = Duration::from_millis(4500);
/// Between two readings that were asked for.
const GAP: Duration = Duration::from_millis(50);
/// A value whose read hung is left out for so long.
const LEAVE_OUT: Duration = Duration::from_secs(60);

/// A device that can be read.
pub trait Readable: Send + Sync + 'static {
    /// All that is read of it.
    type Values: Clone + Send + 'static;

    /// The local part of its id.
    fn local(&self) -> &str;
    /// Values of which none is read yet, for a reading that begins at `now`.
    fn blank(&self, now: Duration) -> Self::Values;
    /// Reads every value onto `slate`, deciding ones first. May block for as long as the driver likes.
    fn read(&self, slate: &Slate<Self::Values>, clock: &Clock);
    /// What was read before a call hung, its value marked as missed; and the call's name when its value
    /// decides nothing, so that it may be left out for a while.
    fn give_up(&self, slate: &Slate<Self::Values>) -> (Self::Values, Option<&'static str>);
    /// Nothing could be asked: the first deciding value stands for all.
    fn unread(&self, values: Self::Values) -> Self::Values;
    /// What values tell besides the health that they are judged by.
    fn seen(&self, values: &Self::Values) -> Sight;
    /// Whether the library or driver failed, and not the device: every value that decides is an error of theirs.
    fn fails(&self, values: &Self::Values) -> bool;
    /// The fact that values are.
    fn fact(&self, values: Self::Values) -> What;
}

/// Reads one device.
#[derive(Debug)]
pub struct Poller<D> {
    /// Time.
    pub clock: Clock,
    /// Where facts go.
    pub facts: Facts,
    /// The device.
    pub device: Arc<D>,
    /// Rung for a reading at once.
    pub bell: Arc<Notify>,
    /// Where what is seen besides health is kept.
    pub board: Board,
    /// Told of each reading whether it failed.
    pub trouble: Arc<Trouble>,
}

impl<D: Readable> Poller<D> {
    /// Reads for ever; lets go of `first` after the first reading.
    pub async fn run(self, first: mpsc::Sender<()>) {
        let mut lane = Lane::new(self.device.local().to_owned(), self.clock.clone());
        let mut left_out: Vec<(&'static str, Duration)> = Vec::new();
        let mut first = Some(first);
        loop {
            let begun = self.clock.now();
            left_out.retain(|(_, until)| *until > begun);
            let skip = left_out.iter().map(|(name, _)| *name).collect();
            let (values, hung) = self.read(&mut lane, skip).await;
            self.trouble.told(self.device.local(), self.device.fails(&values), self.clock.now());
            left_out.extend(hung.map(|name| (name, self.clock.now().saturating_add(LEAVE_OUT))));
            self.board.see(self.device.local(), self.device.seen(&values));
            let fact = Fact::device(self.device.local(), self.device.fact(values));
            self.facts.send(Seen::Fact(fact), None).await;
            drop(first.take());
            // Both arms only wait. Only who was asked for a reading waits out the gap: an idle device has one timer.
            tokio::select! {
                () = self.bell.notified() => self.clock.sleep_until(begun.saturating_add(GAP)).await,
                () = self.clock.idle_until(begun.saturating_add(POLL)) => {}
            }
        }
    }

    async fn read(&self, lane: &mut Lane, skip: Vec<&'static str>) -> (D::Values, Option<&'static str>) {
        let now = self.clock.now();
        let slate = Slate::new(self.device.blank(now), now, skip);
        let (device, clock) = (Arc::clone(&self.device), self.clock.clone());
        let (writing, reading) = (slate.clone(), slate.clone());
        let read = lane.call(READ_LIMIT, move || reading.since(), move || device.read(&writing, &clock));
        match read.await {
            Ok(()) => (slate.values(), None),
            Err(LaneError::Missed(_)) => self.device.give_up(&slate),
            Err(LaneError::Exhausted | LaneError::Broken) => (self.device.unread(slate.values()), None),
        }
    }
}
