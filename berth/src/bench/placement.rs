//! `berth bench placement`: recorded loads through the planner, and its cost against size. Judges nothing
//! itself: the library does.

mod peers;
mod sizes;
mod table;
mod watch;

use std::path::{Path, PathBuf};

use anyhow::Context;
use berth_planner::{
    Effort,
    bench::{Case, Manifest, Mode, Options, WindowResult, run as solve},
};
use clap::{Args, ValueEnum};
use serde::Serialize;

pub(super) use self::sizes::{SizesArgs, run as sizes};
use self::watch::{ClockArg, Stopwatch};
use crate::{
    output::{say, write_json},
    verdict::Verdict,
};

#[derive(Debug, Args)]
pub(super) struct PlacementArgs {
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
    /// Most bytes that may move for balance in a window.
    #[arg(long)]
    moved_bytes: Option<u64>,
    /// Solve each case this many times; seconds are the mean.
    #[arg(long, default_value_t = 1)]
    repeat: u32,
    /// What seconds are: of the wall, or of the processor (of one thread, where others share the machine).
    #[arg(long, value_enum, default_value = "wall")]
    clock: ClockArg,
    /// End with a table of these figures, the bars and the peers' figures.
    #[arg(long)]
    table: bool,
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

/// Solves the cases of a manifest; bad input is an error.
pub(super) fn run(args: &PlacementArgs) -> anyhow::Result<Verdict> {
    let PlacementArgs {
        manifest,
        data,
        case,
        plans,
        threads,
        mode,
        effort,
        moved_percent,
        moved_bytes,
        repeat,
        clock,
        table,
        json,
    } = args;
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
    let threads = clock.threads(*threads)?;
    let moved_percent = Some(*moved_percent).filter(|percent| *percent < 100);
    let options = Options { mode, effort: effort.effort(), threads, moved_percent, moved_bytes: *moved_bytes };
    let watch = Stopwatch::new(*clock);
    let mut results = Vec::new();
    for case in &cases {
        let solved = solve_case(case, data, plans.as_deref(), options, &watch, *repeat)?;
        summarise(case, &solved)?;
        results.extend(solved);
    }
    if *table {
        let effort = *effort;
        say(&table::text(&table::Run { cases: &cases, results: &results, effort, clock: *clock, threads }))?;
    }
    write_json(json.as_deref(), &Report { results })?;
    Ok(Verdict::Pass)
}

fn solve_case(
    case: &Case,
    data: &Path,
    plans: Option<&Path>,
    options: Options,
    watch: &Stopwatch,
    repeat: u32,
) -> anyhow::Result<Vec<WindowResult>> {
    let path = data.join(format!("{}.u32le", case.id));
    let loads = std::fs::read(&path).with_context(|| format!("case {}: reading {}", case.id, path.display()))?;
    let (mut results, plan) = solve(case, &loads, options, || watch.seconds())?;
    for _ in 1..repeat.max(1) {
        let (again, _) = solve(case, &loads, options, || watch.seconds())?;
        results.iter_mut().zip(again).for_each(|(sum, one)| sum.seconds += one.seconds);
    }
    results.iter_mut().for_each(|result| result.seconds /= f64::from(repeat.max(1)));
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
