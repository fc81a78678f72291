//! `berth lab node`: one real agent on doubled vendor libraries, driven by a fault script on discrete
//! time; prints every health transition and checks the script's expectations.

mod drive;
mod ffi;
mod judge;
mod script;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, bail};
use clap::Subcommand;
use serde_json::json;

use crate::verdict::Verdict;
use berth_agent::vendor::{dcmi, nvml};
use berth_types::Vendor;
use drive::Vendored;
use script::Script;

pub(crate) use ffi::Double;

/// The doubles' packages and files; a file is beside this program where cargo puts both.
const DOUBLES: [(Vendor, &str, &str); 2] = [
    (Vendor::Nvidia, "berth-double-nvml", "libberth_double_nvml.so"),
    (Vendor::Ascend, "berth-double-dcmi", "libberth_double_dcmi.so"),
];

/// Try things that need no cluster and no hardware.
#[derive(Debug, clap::Args)]
pub(crate) struct LabArgs {
    #[command(subcommand)]
    lab: Lab,
}

#[derive(Debug, Subcommand)]
enum Lab {
    /// Play a fault script to one agent on doubled vendor libraries.
    Node(NodeArgs),
}

#[derive(Debug, clap::Args)]
struct NodeArgs {
    /// The script, JSON Lines
    #[arg(long)]
    script: PathBuf,
    /// Write reports and outcomes to this file
    #[arg(long)]
    json: Option<PathBuf>,
    #[command(flatten)]
    doubles: Doubles,
}

/// Where the doubles are.
#[derive(Debug, clap::Args)]
pub(crate) struct Doubles {
    /// The double of NVIDIA's management library; default: beside this program
    #[arg(long, env = "BERTH_DOUBLE_NVML")]
    nvml_double: Option<PathBuf>,
    /// The double of Ascend's management library; default: beside this program
    #[arg(long, env = "BERTH_DOUBLE_DCMI")]
    dcmi_double: Option<PathBuf>,
}

impl Doubles {
    fn named(&self, vendor: Vendor) -> Option<&PathBuf> {
        match vendor {
            Vendor::Nvidia => self.nvml_double.as_ref(),
            Vendor::Ascend => self.dcmi_double.as_ref(),
        }
    }

    /// The double of this vendor's library.
    pub(crate) fn find(&self, vendor: Vendor) -> anyhow::Result<PathBuf> {
        let known = DOUBLES.iter().find(|(of, _, _)| *of == vendor);
        match (self.named(vendor), known) {
            (Some(path), _) => Ok(path.clone()),
            (None, Some((_, package, file))) => find_double(package, file),
            (None, None) => bail!("{vendor}: no double"),
        }
    }

    /// Names them to another process of this program.
    pub(crate) fn hand_on(&self, command: &mut std::process::Command) {
        for (flag, vendor) in [("--nvml-double", Vendor::Nvidia), ("--dcmi-double", Vendor::Ascend)] {
            if let Some(path) = self.named(vendor) {
                command.arg(flag).arg(path);
            }
        }
    }
}

/// The name by which an agent opens this vendor's library.
pub(crate) const fn library(vendor: Vendor) -> &'static str {
    match vendor {
        Vendor::Nvidia => nvml::LIBRARY,
        Vendor::Ascend => dcmi::LIBRARY,
    }
}

/// How busy the machine is: processes that ran or waited to, over one, five and fifteen minutes.
pub(crate) fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

/// Plays, prints, judges.
pub(crate) fn run(args: LabArgs) -> anyhow::Result<Verdict> {
    let Lab::Node(NodeArgs { script: path, json, doubles }) = args.lab;
    let text = fs::read_to_string(&path).with_context(|| format!("--script {}", path.display()))?;
    let script = Script::parse(&text).with_context(|| path.display().to_string())?;
    let mut vendors = Vec::new();
    for vendor in [Vendor::Nvidia, Vendor::Ascend] {
        // A vendor that the node has nothing of needs no double.
        if script.expected(vendor).is_some() {
            vendors.push(Vendored { vendor, double: doubles.find(vendor)? });
        }
    }
    let script = Arc::new(script);
    let said = drive::play(Arc::clone(&script), &vendors).with_context(|| path.display().to_string())?;
    let judged = judge::judge(&script, &said);
    let passed = judged.iter().all(|judged| judged.ok);
    let lines: Vec<judge::Line> = said.iter().map(judge::Said::line).collect();
    print(&lines, &judged).context("writing to standard output")?;
    if let Some(path) = json {
        write_json(&path, &json!({"passed": passed, "reports": lines, "expectations": judged}))?;
    }
    Ok(passed.into())
}

/// Whether a script can be played, for tests that only want it read.
#[cfg(test)]
pub(crate) fn can_read(text: &str) -> bool {
    Script::parse(text).is_ok()
}

fn find_double(package: &str, file: &str) -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe().context("finding this program")?;
    let folder = program.parent().unwrap_or(Path::new("."));
    let places = [folder.join(file), folder.join("deps").join(file), folder.join("..").join(file)];
    match places.into_iter().find(|place| place.is_file()) {
        Some(place) => Ok(place),
        None => bail!(
            "{file} is not beside {}: build it with `cargo build -p {package}`, or name it with --{}-double",
            program.display(),
            package.rsplit('-').next().unwrap_or(package)
        ),
    }
}

fn print(lines: &[judge::Line], judged: &[judge::Judged]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    for line in lines {
        writeln!(out, "{line}")?;
    }
    for judged in judged.iter().filter(|judged| !judged.ok) {
        writeln!(out, "line {}: not so: {}", judged.line, judged.why)?;
    }
    let held = judged.iter().filter(|judged| judged.ok).count();
    writeln!(out, "{held} of {} expectations hold", judged.len())
}

fn write_json(path: &Path, document: &serde_json::Value) -> anyhow::Result<()> {
    let mut text = serde_json::to_string_pretty(document)?;
    text.push('\n');
    fs::write(path, text).with_context(|| format!("--json {}", path.display()))
}
