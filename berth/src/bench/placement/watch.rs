//! What a second is: of the wall, or of the processor where others share the machine.

use std::time::Duration;

use berth_runtime::Clock;
use clap::ValueEnum;

/// Time that one thread was on a processor, in nanoseconds, then two other numbers.
const ON_PROCESSOR: &str = "/proc/thread-self/schedstat";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::bench) enum ClockArg {
    Wall,
    Processor,
}

impl ClockArg {
    /// The words in a table.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Wall => "wall-clock",
            Self::Processor => "processor time",
        }
    }

    /// Threads: the machine's processors if not given; one where the processor's time is of one thread.
    pub(super) fn threads(self, wanted: Option<usize>) -> anyhow::Result<usize> {
        match (self, wanted) {
            (Self::Processor, None | Some(1)) => Ok(1),
            (Self::Processor, Some(_)) => anyhow::bail!("--clock processor is of one thread: leave out --threads"),
            (Self::Wall, wanted) => {
                Ok(wanted.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).max(1))
            }
        }
    }
}

/// A running clock.
pub(super) struct Stopwatch {
    kind: ClockArg,
    clock: Clock,
}

impl Stopwatch {
    pub(super) fn new(kind: ClockArg) -> Self {
        Self { kind, clock: Clock::real() }
    }

    /// Seconds since an unknown beginning. The processor's are as of the kernel's last tick: a mean of several
    /// runs is right to some percent.
    pub(super) fn seconds(&self) -> f64 {
        let wall = || Duration::as_secs_f64(&self.clock.now());
        if self.kind == ClockArg::Wall {
            return wall();
        }
        let text = std::fs::read_to_string(ON_PROCESSOR).unwrap_or_default();
        let nanoseconds: Option<u64> = text.split_whitespace().next().and_then(|number| number.parse().ok());
        nanoseconds.map_or_else(wall, |nanoseconds| Duration::from_nanos(nanoseconds).as_secs_f64())
    }
}
