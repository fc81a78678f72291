//! `make demo`: reads the variables, runs the demo, says whether everything held.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use berth_tests::demo::{self, Options, Report, nodes::Fleet};

/// Checkpoint that is shipped with the project.
const SHIPPED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/reference/models/v4-tiny");

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(problem) => return fail(&problem, 2),
    };
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("start: {error}"), 2),
    };
    let outcome = runtime.block_on(async {
        tokio::select! {
            // Cancel-safe: dropping the demo ends every process that it started.
            outcome = demo::run(&options) => outcome.map_err(|error| error.to_string()),
            _ = interrupted(), if !options.keep => Err("interrupted".to_owned()),
        }
    });
    match outcome.and_then(|report| judge(&report)) {
        Ok(summary) => {
            say(&format!("{summary}\nreport: {}", options.report.display()));
            ExitCode::SUCCESS
        }
        Err(problem) => fail(&problem, 1),
    }
}

fn options() -> Result<Options, String> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    if variable("KUBECONFIG").is_some() && variable("BERTH_DEMO_KUBECONFIG").is_none() {
        say("KUBECONFIG is ignored: the demo starts a cluster of its own; BERTH_DEMO_KUBECONFIG names one to use");
    }
    let checkpoint = variable("CHECKPOINT").map_or_else(|| PathBuf::from(SHIPPED), PathBuf::from);
    if !checkpoint.join("config.json").is_file() {
        return Err(format!(
            "CHECKPOINT: {} has no config.json: name a folder with a checkpoint",
            checkpoint.display()
        ));
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
    Ok(Options {
        name: "demo".to_owned(),
        fleet: Fleet::BOTH,
        checkpoint,
        report: variable("REPORT").map_or_else(|| root.join("target/demo/report.json"), PathBuf::from),
        kubeconfig: variable("BERTH_DEMO_KUBECONFIG").map(PathBuf::from),
        keep: variable("KEEP").is_some_and(|value| value != "0"),
    })
}

async fn interrupted() {
    let terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate());
    match terminate {
        Ok(mut terminate) => {
            tokio::select! {
                // Both arms only wait for a signal, so nothing is lost when the other wins.
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
        }
        Err(_) => std::future::pending().await,
    }
}

fn judge(report: &Report) -> Result<String, String> {
    let wrong = report.prompts.iter().filter(|prompt| !prompt.is_right()).count();
    if wrong > 0 {
        return Err(format!("{wrong} of {} prompts differ from what is expected", report.prompts.len()));
    }
    for fault in &report.fault {
        if fault.failed_requests > 0 {
            return Err(format!("{} requests failed while {} was lost", fault.failed_requests, fault.device));
        }
        if fault.refused_calls == 0 || fault.retried_requests == 0 {
            return Err(format!(
                "no call was refused by {} and retried: the loss was not seen by a request",
                fault.device
            ));
        }
    }
    if let Some(moved) = report.rebalance.as_ref()
        && (moved.failed_requests > 0 || moved.balancedness_after <= moved.balancedness_before)
    {
        return Err(format!(
            "replicas moved for balance, and it went from {:.2} to {:.2} while {} requests failed",
            moved.balancedness_before, moved.balancedness_after, moved.failed_requests
        ));
    }
    if let Some(drain) = report.drain.as_ref().filter(|drain| drain.failed_requests > 0) {
        return Err(format!("{} requests failed while {} was drained", drain.failed_requests, drain.node));
    }
    for reset in &report.reset {
        if reset.failed_requests > 0 || reset.asked.len() != 1 {
            return Err(format!(
                "{} requests failed while {} was reset; the vendor's call was asked for {:?}",
                reset.failed_requests, reset.device, reset.asked
            ));
        }
    }
    let total = report.durations_s.get("total").copied().unwrap_or_default();
    let (prompts, faults, resets) = (report.prompts.len(), report.fault.len(), report.reset.len());
    Ok(format!("done in {total:.0} s: {prompts} prompts right, {faults} faults repaired, {resets} resets by order"))
}

fn say(line: &str) {
    // A closed pipe is no reason to fail.
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn fail(problem: &str, code: u8) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "demo: {problem}");
    ExitCode::from(code)
}
