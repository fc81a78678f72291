//! `berth bench`: doors to benchmarks of the controllers' own code. Reads files, measures time, writes
//! what the library answers.

mod health;
mod placement;

use clap::{Args, Subcommand};

use crate::verdict::Verdict;

/// Measure the controllers' own code.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Place experts for recorded loads, window by window.
    Placement(placement::PlacementArgs),
    /// Place experts of a large model on more and more devices: cost against size.
    PlacementSizes(placement::SizesArgs),
    /// Tell faults of 64 devices in a storm of the kernel log, by each road alone.
    Health(health::HealthArgs),
}

/// Runs the benchmark; bad input is an error.
pub(crate) fn run(args: BenchArgs) -> anyhow::Result<Verdict> {
    match args.command {
        BenchCommand::Placement(args) => placement::run(&args),
        BenchCommand::PlacementSizes(args) => placement::sizes(&args),
        BenchCommand::Health(args) => health::run(&args),
    }
}
