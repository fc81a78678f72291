//! The one binary: parses arguments and opens a door. Parts are started by `berth <part>`, tools are the
//! other subcommands. Only this file reads the environment, through clap.

use std::{path::Path, process::ExitCode};

use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

mod agent;
mod bench;
mod cluster;
mod devices;
mod explain;
mod faults;
mod fleet;
#[cfg(test)]
mod fuzz;
mod generate;
#[cfg(test)]
mod golden;
mod kernels;
mod lab;
mod operator;
mod output;
mod placement;
mod probe;
mod profile;
mod release;
mod runner;
mod scheduler;
mod status;
mod store;
mod table;
mod telemetry;
mod top;
mod verdict;
mod worker;

use verdict::Verdict;

/// Cluster orchestrator and resource scheduler for AI compute.
#[derive(Parser)]
#[command(name = "berth", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Watch this node's devices, run their workers, report and obey.
    Agent(agent::AgentArgs),
    /// List what this machine has to compute with, and what is missing.
    Devices(devices::Args),
    /// Measure the controllers' own code.
    Bench(bench::BenchArgs),
    /// Generate text with a runner and workers on this machine.
    Generate(generate::Args),
    /// Check or measure the expert kernels of this machine.
    Kernels(kernels::KernelsArgs),
    /// Try things that need no cluster and no hardware.
    Lab(lab::LabArgs),
    /// One native model instance: attention, routing, KV cache.
    Runner(runner::Args),
    /// One device's process, started by an agent.
    #[command(hide = true)]
    Worker(worker::Args),
    /// Check that one device computes what it should.
    Probe(probe::Args),
    /// Keep Kubernetes objects true.
    Operator(operator::OperatorArgs),
    /// Run the scheduler.
    Scheduler(scheduler::SchedulerArgs),
    /// Write ModelProfiles: from presets, or from a checkpoint.
    Profile(profile::ProfileArgs),
    /// What serves in a cluster, what does not, and what wants attention.
    Status(status::StatusArgs),
    /// Who holds how much: devices, nodes or models of a cluster.
    Top(top::TopArgs),
    /// Why a deployment's experts are where they are, how good that is, and what waits.
    Explain(explain::ExplainArgs),
    /// The last incidents of a node, as evidence for hardware service.
    Faults(faults::FaultsArgs),
    /// Vouch for a repaired device, so that it is validated and used again.
    Release(release::ReleaseArgs),
    /// Which device holds what of a placement, and what a revision changed.
    Placement(placement::PlacementArgs),
}

impl Cli {
    /// What was asked for. As `kubectl-berth` the binary is a plugin, and its help speaks as it was called.
    fn read() -> Self {
        let called = std::env::args_os().next().unwrap_or_default();
        let name = Path::new(&called).file_stem().unwrap_or_default();
        let command = if name == "kubectl-berth" { Self::command().bin_name("kubectl berth") } else { Self::command() };
        Self::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
    }
}

fn main() -> ExitCode {
    let Cli { command } = Cli::read();
    let outcome: anyhow::Result<Verdict> = match command {
        Command::Agent(args) => agent::run(args),
        Command::Devices(args) => devices::run(&args),
        Command::Bench(args) => bench::run(args),
        Command::Generate(args) => generate::run(&args),
        Command::Kernels(args) => kernels::run(&args),
        Command::Lab(args) => lab::run(args),
        Command::Runner(args) => runner::run(args),
        Command::Worker(args) => worker::run(args),
        Command::Probe(args) => probe::run(args),
        Command::Operator(args) => operator::run(args),
        Command::Scheduler(args) => scheduler::run(args),
        Command::Profile(args) => profile::run(args),
        Command::Status(args) => status::run(&args),
        Command::Top(args) => top::run(args),
        Command::Explain(args) => explain::run(args),
        Command::Faults(args) => faults::run(args),
        Command::Release(args) => release::run(args),
        Command::Placement(args) => placement::run(args),
    };
    verdict::exit(outcome)
}
