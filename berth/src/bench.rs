//! `berth bench`: doors to benchmarks of the controllers' own code. Reads files, measures time, writes
//! what the library answers.

mod health;
mod peers;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use berth_planner::{
    Effort,
    bench::{Case, Manifest, Mode, Options, WindowResult, run as solve},
};
use berth_runtime::Clock;
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;

use crate::{
    output::{say, write_json},
    verdict::Verdict,
};

/// Measure the controllers' own code.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Place experts for recorded loads, window by window.
    Placement(PlacementArgs),
    /// Tell faults of 64 devices in a storm of the kernel log, by each road alone.
    Health(health::HealthArgs),
}

#[derive(Debug, Args)]
struct PlacementArgs {
    /// File of cases.
    #[arg(long)]
    manifest: PathBuf,
    /// Folder of the cases' loads, ID.u32le each.
    #[arg(long)]
    data: PathBuf,
    /// Only this case.
    #[arg(long)]
    case: Option<String>,
    /// Write each case's plans here, as ID.plan.u16le.
    #[arg(long)]
    plans: Option<PathBuf>,
    /// Threads; plans do not depend on it. The machine's processors if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Which loads a window's plan may use: its own (oracle) or those before it (forecast).
    #[arg(long, value_enum, default_value = "oracle")]
    mode: ModeArg,
    /// Work per layer, the same on every machine.
    #[arg(long, value_enum, default_value = "default")]
    effort: EffortArg,
    /// Most replicas that may move for balance in a window, in percent of all slots; 100 = as many as pay.
    #[arg(long, default_value_t = 6)]
    moved_percent: u32,
    /// Write the results here as one JSON document.
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ModeArg {
    Oracle,
    Forecast,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum EffortArg {
    Fast,
    Default,
    Best,
}

impl EffortArg {
    const fn effort(self) -> Effort {
        match self {
            Self::Fast => Effort::FAST,
            Self::Default => Effort::DEFAULT,
            Self::Best => Effort::BEST,
        }
    }
}

#[derive(Serialize)]
struct Report {
    results: Vec<WindowResult>,
}

/// Runs the benchmark; bad input is an error.
pub(crate) fn run(args: BenchArgs) -> anyhow::Result<Verdict> {
    match args.command {
        BenchCommand::Placement(args) => placement(&args),
        BenchCommand::Health(args) => health::run(&args),
    }
}

fn placement(args: &PlacementArgs) -> anyhow::Result<Verdict> {
    let PlacementArgs { manifest, data, case, plans, threads, mode, effort, moved_percent, json } = args;
    let text =
        std::fs::read_to_string(manifest).with_context(|| format!("reading --manifest {}", manifest.display()))?;
    let cases: Manifest =
        serde_json::from_str(&text).with_context(|| format!("reading --manifest {}", manifest.display()))?;
    let cases: Vec<Case> =
        cases.cases.into_iter().filter(|known| case.as_ref().is_none_or(|wanted| known.id == *wanted)).collect();
    if let (Some(wanted), true) = (case, cases.is_empty()) {
        anyhow::bail!("--case {wanted}: {} has no such case", manifest.display());
    }
    if let Some(folder) = plans {
        std::fs::create_dir_all(folder).with_context(|| format!("making --plans {}", folder.display()))?;
    }
    let mode = match mode {
        ModeArg::Oracle => Mode::Oracle,
        ModeArg::Forecast => Mode::Forecast,
    };
    let processors = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.unwrap_or_else(processors).max(1);
    let moved_percent = Some(*moved_percent).filter(|percent| *percent < 100);
    let options = Options { mode, effort: effort.effort(), threads, moved_percent, ..Options::default() };
    let mut results = Vec::new();
    for case in &cases {
        let solved = solve_case(case, data, plans.as_deref(), options)?;
        summarise(case, &solved)?;
        results.extend(solved);
    }
    write_json(json.as_deref(), &Report { results })?;
    Ok(Verdict::Pass)
}

fn solve_case(case: &Case, data: &Path, plans: Option<&Path>, options: Options) -> anyhow::Result<Vec<WindowResult>> {
    let path = data.join(format!("{}.u32le", case.id));
    let loads = std::fs::read(&path).with_context(|| format!("case {}: reading {}", case.id, path.display()))?;
    let clock = Clock::real();
    let stopwatch = || Duration::as_secs_f64(&clock.now());
    let (results, plan) = solve(case, &loads, options, stopwatch)?;
    if let Some(folder) = plans {
        let path = folder.join(format!("{}.plan.u16le", case.id));
        std::fs::write(&path, plan).with_context(|| format!("case {}: writing {}", case.id, path.display()))?;
    }
    Ok(results)
}

fn summarise(case: &Case, results: &[WindowResult]) -> anyhow::Result<()> {
    let windows = f64::from(u32::try_from(results.len())?.max(1));
    let mean = |of: fn(&WindowResult) -> f64| results.iter().map(of).sum::<f64>() / windows;
    let ms = mean(|result| result.seconds) * 1000.0;
    let mut line = format!(
        "{:<36} balancedness {:.4}  {ms:>8.1} ms  makespan {:.4}",
        case.id,
        mean(|result| result.balancedness),
        mean(|result| result.makespan)
    );
    let next: Vec<f64> = results.iter().filter_map(|result| result.next_balancedness).collect();
    if !next.is_empty() {
        let moved: u64 = results.iter().map(|result| result.moved_replicas).sum();
        let each = f64::from(u32::try_from(next.len())?);
        let (next, moved) = (next.iter().sum::<f64>() / each, f64::from(u32::try_from(moved)?) / each);
        line.push_str(&format!("  {} windows, next {next:.4}, {moved:.0} replicas moved a window", results.len()));
    }
    say(&line)?;
    peers::lines(&case.id, ms).iter().try_for_each(|line| say(line))?;
    Ok(())
}
