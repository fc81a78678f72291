//! `berth-bench`: measurements that need a control plane, which it starts. Prints figures, and writes them as one JSON
//! document; exits 1 when a bar is missed.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use berth_tests::bench::{agents, process::Cost, supervisor};
use berth_tests::control_plane::target_dir;
use clap::{Parser, Subcommand};

/// Resident bytes that a supervisor may have, MiB.
const RESIDENT_MIB: f64 = 30.0;
/// Share of one core that it may take.
const CORES: f64 = 0.01;
/// Writes per second of all agents when nothing changes.
const STEADY_WRITES: f64 = 0.2;

/// Measures what agents cost.
#[derive(Debug, Parser)]
struct Args {
    /// Write the figures here as one JSON document
    #[arg(long, global = true)]
    json: Option<PathBuf>,
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// One idle supervisor: memory, processor time, wake-ups
    Supervisor {
        /// NVIDIA devices
        #[arg(long, default_value_t = 16)]
        nvidia: u32,
        /// Ascend devices
        #[arg(long, default_value_t = 0)]
        ascend: u32,
        /// The node hosts nothing: no workers
        #[arg(long)]
        no_workers: bool,
        /// Seconds of rest before it is measured
        #[arg(long, default_value_t = 15)]
        settle: u64,
        /// Seconds that it is measured
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// The binary to measure; default: the one of this build
        #[arg(long)]
        berth: Option<PathBuf>,
    },
    /// Many agents against one API server: steady writes, a rack lost and back
    Agents {
        /// How many
        #[arg(long, default_value_t = 1000)]
        agents: u32,
        /// Devices of each
        #[arg(long, default_value_t = 8)]
        devices: u32,
        /// Seconds within which all of them start
        #[arg(long, default_value_t = 30)]
        ramp: u64,
        /// Seconds in which nothing changes
        #[arg(long, default_value_t = 60)]
        seconds: u64,
        /// Programs that fail meanwhile, in the whole fleet, per minute
        #[arg(long, default_value_t = 60)]
        failures: u32,
        /// Nodes of the rack
        #[arg(long, default_value_t = 100)]
        rack: u32,
    },
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            // Nothing can be done when stderr itself is gone.
            let _ = writeln!(std::io::stderr(), "berth-bench: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn say(line: &str) {
    // Nobody reading is no error of the measurement.
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn run(Args { json, bench }: Args) -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Runtime::new().context("start")?;
    let (document, passed) = match bench {
        Bench::Supervisor { nvidia, ascend, no_workers, settle, seconds, berth } => {
            let folder = target_dir().join("debug");
            let options = supervisor::Options {
                nvidia,
                ascend,
                workers: !no_workers,
                settle: Duration::from_secs(settle),
                window: Duration::from_secs(seconds),
                berth: berth.unwrap_or_else(|| folder.join("berth")),
                doubles: folder,
            };
            let report = runtime.block_on(supervisor::run(&options))?;
            say(&format!("{nvidia} NVIDIA and {ascend} Ascend devices, {} workers", report.workers));
            print(&report.supervisor);
            let passed = report.supervisor.resident_mib <= RESIDENT_MIB && report.supervisor.cores <= CORES;
            (serde_json::to_value(&report)?, passed)
        }
        Bench::Agents { agents, devices, ramp, seconds, failures, rack } => {
            let options = agents::Options {
                agents,
                devices,
                ramp: Duration::from_secs(ramp),
                window: Duration::from_secs(seconds),
                failures_per_minute: failures,
                rack: rack.min(agents),
            };
            let report = runtime.block_on(agents::run("bench-agents", options, print_phase))?;
            say(&format!(
                "an object has {} bytes; the API server had {:.0} MiB before the first agent",
                report.object_bytes, report.apiserver_before_mib
            ));
            let steady = report.phases.iter().filter(|phase| phase.name == "steady");
            let throttled: u64 = report.phases.iter().map(|phase| phase.throttled).sum();
            let passed = throttled == 0 && steady.into_iter().all(|phase| phase.writes_per_second < STEADY_WRITES);
            (serde_json::to_value(&report)?, passed)
        }
    };
    if let Some(path) = json {
        let text = serde_json::to_string_pretty(&document)? + "\n";
        std::fs::write(&path, text).with_context(|| format!("writing --json {}", path.display()))?;
    }
    Ok(passed)
}

fn print(cost: &Cost) {
    let Cost { seconds, resident_mib, anonymous_mib, proportional_mib, cores, wakeups_per_second, threads } = cost;
    say(&format!("resident {resident_mib:.1} MiB (anonymous {anonymous_mib:.1}, proportional {proportional_mib:.1})"));
    say(&format!("{:.2} % of one core, {wakeups_per_second:.1} wake-ups/s over {seconds:.0} s", cores * 100.0));
    for thread in threads {
        let (share, woken) = (thread.cores * 100.0, thread.wakeups_per_second);
        say(&format!("  {:<16} {:>3} threads  {share:>6.3} %  {woken:>6.2} wake-ups/s", thread.name, thread.count));
    }
}

fn print_phase(phase: &agents::Phase) {
    say(&format!(
        "{:<10} {:>6.1} s, settled after {:>5.1} s: {} writes ({:.2}/s), {} times 429; API server {:.2} cores, {:.0} MiB; etcd {:.2} cores, {:.0} MiB",
        phase.name,
        phase.seconds,
        phase.settled_s,
        phase.writes,
        phase.writes_per_second,
        phase.throttled,
        phase.apiserver.cores,
        phase.apiserver.resident_mib,
        phase.etcd.cores,
        phase.etcd.resident_mib,
    ));
    for (what, count) in &phase.calls {
        say(&format!("  {count:>6} {what}"));
    }
}
