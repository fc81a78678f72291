//! `berth bench health`: how long a fault takes from its deciding line or event until the scheduler's side has
//! heard of it, by each road alone, while the kernel log storms. Prints the figures beside those that are published.
//!
//! Every round is a process of its own: vendors' libraries keep one state per process.

mod faults;
mod figures;
mod round;
mod storm;

use std::{path::PathBuf, process::Command};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use self::{
    faults::{PER_ROUND, Road},
    figures::Figures,
};
use crate::{
    lab::{self, Doubles},
    output::{progress, say, write_json},
    verdict::Verdict,
};

/// How long published systems take, from fault to a cordoned node.
const PEERS: [&str; 2] = ["about 20 s at best", "60 s to 10 min elsewhere"];

/// Measure how soon a fault is told, in a storm of the kernel log.
#[derive(Debug, Args)]
pub(crate) struct HealthArgs {
    /// Only this road; may be given several times
    #[arg(long, value_enum)]
    road: Vec<Road>,
    /// Faults by each road
    #[arg(long, default_value_t = 224, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    faults: u32,
    /// Lines of the kernel log per second, beside those that decide
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    storm: u32,
    /// What is drawn by chance depends on this alone
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write the figures here as one JSON document
    #[arg(long)]
    json: Option<PathBuf>,
    #[command(flatten)]
    doubles: Doubles,
    /// Play this one round and print what came of it
    #[arg(long, hide = true)]
    round: Option<u32>,
}

/// What came of one round.
#[derive(Debug, Default, Deserialize, Serialize)]
struct Outcome {
    /// From injection to the scheduler's side, milliseconds, in the order of injection.
    latencies_ms: Vec<f64>,
    /// Of it, until the agent's ledger had decided, in no order.
    decided_ms: Vec<f64>,
    /// Faults that were not told, as `device: fault`.
    missed: Vec<String>,
    /// Devices without a fault that were said to be Unhealthy.
    false_alarms: Vec<String>,
    /// Lines of the kernel log that were written.
    lines: u64,
    /// How long the storm lasted.
    seconds: f64,
    /// Processor time of the agent's threads meanwhile, seconds.
    agent_seconds: f64,
    /// Health reports that arrived.
    reports: u64,
}

impl Outcome {
    fn join(mut self, other: Self) -> Self {
        let Self { latencies_ms, decided_ms, missed, false_alarms, lines, seconds, agent_seconds, reports } = other;
        self.latencies_ms.extend(latencies_ms);
        self.decided_ms.extend(decided_ms);
        self.missed.extend(missed);
        self.false_alarms.extend(false_alarms);
        self.lines = self.lines.saturating_add(lines);
        self.seconds += seconds;
        self.agent_seconds += agent_seconds;
        self.reports = self.reports.saturating_add(reports);
        self
    }
}

#[derive(Serialize)]
struct Report {
    devices: u32,
    seed: u64,
    build: &'static str,
    load_average: [String; 2],
    roads: Vec<Figures>,
    peers_fault_to_cordon: [&'static str; 2],
    passed: bool,
}

/// Runs the benchmark; a fault that is not told, or told too late, is a failed check.
pub(crate) fn run(args: &HealthArgs) -> anyhow::Result<Verdict> {
    let HealthArgs { road, faults, storm, seed, json, doubles, round } = args;
    if let (Some(number), [road]) = (round, road.as_slice()) {
        let plan =
            round::Plan { road: *road, seed: seed.wrapping_add(u64::from(*number)), faults: *faults, storm: *storm };
        say(&serde_json::to_string(&round::play(plan, doubles)?)?)?;
        return Ok(Verdict::Pass);
    }
    ensure!(round.is_none(), "--round: name one --road with it");
    let roads = if road.is_empty() { Road::value_variants() } else { road };
    let before = lab::load_average();
    let mut all = Vec::new();
    say(&figures::heading())?;
    for road in roads {
        let figures = Figures::of(*road, &measure(*road, args)?);
        say(&figures.to_string())?;
        all.push(figures);
    }
    let passed = all.iter().all(Figures::passed);
    say(&format!("published, from fault to a cordoned node: {}", PEERS.join(", ")))?;
    let report = Report {
        devices: faults::DEVICES,
        seed: *seed,
        build: if cfg!(debug_assertions) { "debug" } else { "release" },
        load_average: [before, lab::load_average()],
        roads: all,
        peers_fault_to_cordon: PEERS,
        passed,
    };
    say(&format!("load average before and after: {}", report.load_average.join(", ")))?;
    write_json(json.as_deref(), &report)?;
    Ok(passed.into())
}

/// All rounds of one road.
fn measure(road: Road, args: &HealthArgs) -> anyhow::Result<Outcome> {
    let HealthArgs { faults, storm, seed, doubles, road: _, json: _, round: _ } = args;
    let program = std::env::current_exe().context("finding this program, which plays each round")?;
    let name = road.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
    let mut all = Outcome::default();
    let mut left = *faults;
    for number in 1_u32.. {
        if left == 0 {
            break;
        }
        let now = left.min(PER_ROUND);
        left = left.saturating_sub(now);
        progress(&format!("{name}: round {number}, {now} faults"));
        let mut command = Command::new(&program);
        command.args(["bench", "health", "--road", &name, "--round", &number.to_string()]);
        command.args(["--faults", &now.to_string(), "--storm", &storm.to_string(), "--seed", &seed.to_string()]);
        doubles.hand_on(&mut command);
        let output = command.output().with_context(|| format!("round {number} of {name}"))?;
        let told = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "round {number} of {name}: {}: {}", output.status, told.trim());
        let outcome = serde_json::from_slice(&output.stdout).with_context(|| format!("round {number} of {name}"))?;
        all = all.join(outcome);
    }
    Ok(all)
}
