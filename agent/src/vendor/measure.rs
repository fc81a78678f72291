//! Measures one device while somebody scrapes: on a lane of its own, so that a call that hangs costs a number on a
//! board and never a reading that health is judged by. Nobody scrapes = no call, and nothing old is shown.

use std::{sync::Arc, time::Duration};

use berth_runtime::Clock;

use super::{
    lane::{Lane, LaneError},
    poll::READ_LIMIT,
    slate::Slate,
};
use crate::vitals::{Board, Measured};

/// Between two measurements of a device.
pub const EVERY: Duration = Duration::from_secs(15);
/// After the last scrape measuring goes on for so long.
const WANTED: Duration = Duration::from_secs(120);
/// A value whose call hung is left out for so long.
const LEAVE_OUT: Duration = Duration::from_secs(600);

/// A device that can be measured.
pub trait Measurable: Send + Sync + 'static {
    /// The local part of its id.
    fn local(&self) -> &str;
    /// Measures every value onto `slate`, but for those in its skip list. May block for as long as the driver likes.
    fn measure(&self, slate: &Slate<Measured>, clock: &Clock);
}

/// Makes one step after the other on `slate`; a value that cannot be had stays absent. `stop` = a code that says that
/// nothing more is to be asked.
pub(super) fn steps<C: Copy + PartialEq>(
    slate: &Slate<Measured>,
    clock: &Clock,
    stop: C,
    steps: impl IntoIterator<Item = (&'static str, impl FnOnce(&mut Measured) -> Result<(), C>)>,
) {
    for (name, read) in steps {
        if !slate.begin(name, clock.now()) {
            continue;
        }
        let mut values = slate.values();
        let gone = read(&mut values) == Err(stop);
        slate.write(if gone { Measured::default() } else { values });
        if gone {
            return;
        }
    }
}

/// Measures one device.
#[derive(Debug)]
pub struct Measurer<D> {
    /// Time.
    pub clock: Clock,
    /// Where measurements go, and who tells that they are wanted.
    pub board: Board,
    /// The device.
    pub device: Arc<D>,
}

impl<D: Measurable> Measurer<D> {
    /// Measures for ever, whenever it is asked to.
    pub async fn run(self) {
        let mut lane = Lane::new(format!("{} vitals", self.device.local()), self.clock.clone());
        let mut left_out: Vec<(&'static str, Duration)> = Vec::new();
        let mut scrapes = self.board.scrapes();
        // The board outlives this task, which holds it.
        while scrapes.changed().await.is_ok() {
            let mut asked = self.clock.now();
            while self.clock.now().saturating_sub(asked) < WANTED {
                let begun = self.clock.now();
                left_out.retain(|(_, until)| *until > begun);
                let skip = left_out.iter().map(|(name, _)| *name).collect();
                let (measured, hung) = self.measure(&mut lane, skip).await;
                left_out.extend(hung.map(|name| (name, self.clock.now().saturating_add(LEAVE_OUT))));
                self.board.measure(self.device.local(), Some(measured));
                self.clock.idle_until(begun.saturating_add(EVERY)).await;
                if scrapes.has_changed().unwrap_or(false) {
                    scrapes.mark_unchanged();
                    asked = self.clock.now();
                }
            }
            self.board.measure(self.device.local(), None);
        }
    }

    async fn measure(&self, lane: &mut Lane, skip: Vec<&'static str>) -> (Measured, Option<&'static str>) {
        let slate = Slate::new(Measured::default(), self.clock.now(), skip);
        let (device, clock) = (Arc::clone(&self.device), self.clock.clone());
        let (writing, reading) = (slate.clone(), slate.clone());
        let read = lane.call(READ_LIMIT, move || reading.since(), move || device.measure(&writing, &clock));
        let hung = matches!(read.await, Err(LaneError::Missed(_))).then(|| slate.current());
        (slate.values(), hung)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::vendor::lane;

    /// Counts how often it is measured; its second value hangs the first time.
    #[derive(Default)]
    struct Fake(AtomicU32);

    impl Measurable for Fake {
        fn local(&self) -> &str {
            "fake"
        }

        fn measure(&self, slate: &Slate<Measured>, clock: &Clock) {
            let times = self.0.fetch_add(1, Ordering::SeqCst);
            let power: fn(&mut Measured) -> Result<(), i32> = |out| {
                out.power_mw = Some(1);
                Ok(())
            };
            steps(slate, clock, 15, [("power", power)]);
            if slate.begin("energy", clock.now()) && times == 0 {
                lane::hang(clock, Duration::from_secs(60));
            }
        }
    }

    fn shown(board: &Board, measured: impl Fn(&Measured) -> bool) -> bool {
        board.measured("fake").is_some_and(|values| measured(&values))
    }

    #[test]
    fn a_device_is_measured_while_somebody_scrapes_and_forgotten_after() {
        let clock = Clock::discrete();
        let device = Arc::new(Fake::default());
        let (board, fake) = (Board::default(), Arc::clone(&device));
        let measurer = Measurer { clock: clock.clone(), board: board.clone(), device };
        let time = clock.clone();
        clock
            .run(async move {
                let task = tokio::spawn(measurer.run());
                time.sleep(Duration::from_secs(300)).await;
                assert_eq!(fake.0.load(Ordering::SeqCst), 0, "nobody asked");
                let _ = board.view();
                time.sleep(Duration::from_secs(10)).await;
                assert!(shown(&board, |values| values.power_mw == Some(1)), "what came before the hang is shown");
                time.sleep(Duration::from_secs(90)).await;
                let times = fake.0.load(Ordering::SeqCst);
                assert!((5..=8).contains(&times), "{times} in 100 s");
                time.sleep(Duration::from_secs(60)).await;
                assert!(!shown(&board, |_| true), "nobody asks any more");
                let times = fake.0.load(Ordering::SeqCst);
                time.sleep(Duration::from_secs(600)).await;
                assert_eq!(fake.0.load(Ordering::SeqCst), times);
                task.abort();
            })
            .unwrap();
    }

    #[test]
    fn a_device_that_is_gone_is_asked_nothing_more_and_shows_nothing() {
        let clock = Clock::discrete();
        let slate = Slate::new(Measured::default(), Duration::ZERO, Vec::new());
        let step = |power: Option<u64>, code: Result<(), i32>| {
            move |out: &mut Measured| {
                out.power_mw = power;
                code
            }
        };
        steps(&slate, &clock, 15, [("a", step(Some(1), Ok(()))), ("b", step(Some(2), Err(3)))]);
        assert_eq!(slate.values().power_mw, Some(2));
        steps(&slate, &clock, 15, [("a", step(Some(3), Err(15))), ("b", step(Some(4), Ok(())))]);
        assert_eq!(slate.values(), Measured::default());
    }
}
