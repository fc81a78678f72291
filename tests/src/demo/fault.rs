//! One loss in the middle of a prompt, measured from outside: what the runner says of itself, polled.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use berth_proto::v1::DescribeResponse;
use tokio::sync::oneshot;

use super::nodes::Loss;
use super::prompts::{Answer, Case, Runner};
use super::report::FaultReport;
use crate::{Error, Result};

/// Between two looks at the runner.
const LOOK_EVERY: Duration = Duration::from_millis(2);
/// After this the system has not repaired itself.
const REPAIR_DEADLINE: Duration = Duration::from_secs(30);
/// Token of the running prompt after which the device is lost.
const LOST_AFTER_TOKENS: usize = 8;

/// What a fault did.
#[derive(Debug)]
pub(super) struct Measured {
    /// The figures for the report.
    pub(super) report: FaultReport,
    /// The prompts that ran meanwhile, the one in whose middle the device was lost first.
    pub(super) answers: Vec<Answer>,
}

/// Serves `case` again and again, makes `loss` happen after some tokens of the first, and goes on until the runner has
/// made a step on a revision above the one it started with. `decided_ms` tells when the agent had decided over all that
/// is lost, milliseconds of Unix time.
///
/// # Errors
/// When the runner cannot be reached or nothing is repaired in time.
pub(super) async fn lose_device(
    runner: &Runner,
    case: &Case,
    loss: &Loss,
    decided_ms: impl Fn() -> Result<Option<f64>>,
) -> Result<Measured> {
    let devices: Vec<String> = loss.devices().iter().map(ToString::to_string).collect();
    let device = devices.first().cloned().unwrap_or_default();
    let before = runner.describe().await?;
    let (injected, at) = oneshot::channel();
    let repaired = Arc::new(AtomicBool::new(false));
    let leaving = loss.clone();
    let prompts = tokio::spawn(serve_until(runner.clone(), case.clone(), repaired.clone(), move || {
        let started = unix_ms();
        // Nobody listens only when the measurement has already ended in an error.
        let _ = injected.send(leaving.leave_bus().map(|()| started));
    }));
    let seen = watch_repair(runner, &before, loss, at).await;
    repaired.store(true, Ordering::Relaxed);
    let answers = prompts.await.map_err(|error| Error::Runner { doing: "serve".into(), why: error.to_string() })??;
    let Seen { started, state } = seen?;
    let detected = decided_ms()?.ok_or_else(|| Error::Runner {
        doing: format!("find when the loss of {device} was detected"),
        why: "the agent's log has no line that says so".into(),
    })?;
    let retried = answers.iter().filter(|answer| answer.finished.retried > 0).count();
    let failed = answers.iter().filter(|answer| !answer.succeeded()).count();
    let report = FaultReport {
        device,
        devices,
        detected_ms: detected - started,
        rerouted_ms: millis(state.rerouted_unix_ms) - started,
        repaired_ms: millis(state.revision_since_unix_ms) - started,
        failed_requests: count(failed),
        retried_requests: count(retried),
        refused_calls: state.refused.saturating_sub(before.refused),
    };
    Ok(Measured { report, answers })
}

async fn serve_until(
    runner: Runner,
    case: Case,
    repaired: Arc<AtomicBool>,
    inject: impl FnOnce(),
) -> Result<Vec<Answer>> {
    let mut inject = Some(inject);
    let mut answers = Vec::new();
    loop {
        let answer = runner.generate(&case, case.max_tokens, |tokens| {
            if tokens == LOST_AFTER_TOKENS
                && let Some(inject) = inject.take()
            {
                inject();
            }
        });
        answers.push(answer.await?);
        if repaired.load(Ordering::Relaxed) {
            return Ok(answers);
        }
    }
}

/// What was seen of a repair, in milliseconds of Unix time.
struct Seen {
    started: f64,
    state: DescribeResponse,
}

async fn watch_repair(
    runner: &Runner,
    before: &DescribeResponse,
    loss: &Loss,
    at: oneshot::Receiver<Result<f64>>,
) -> Result<Seen> {
    let never = |what: &str, state: String| Error::Wait { what: what.to_owned(), waited: REPAIR_DEADLINE, state };
    let started = match tokio::time::timeout(REPAIR_DEADLINE, at).await {
        Ok(Ok(outcome)) => outcome?,
        _ => return Err(never("the prompt to reach the token of the loss", String::new())),
    };
    let mut noticed = false;
    loop {
        let state = runner.describe().await?;
        // As on a real node, the driver finds out when a program touches the device.
        if !noticed && state.refused > before.refused {
            loss.driver_notices()?;
            noticed = true;
        }
        // A revision that was made for something else, shortly before, may still name what is lost.
        let without =
            state.devices.iter().all(|device| loss.devices().iter().all(|lost| lost.as_str() != device.device));
        let stepped = state.revision > before.revision && state.revision_since_unix_ms > 0 && without;
        if stepped && state.rerouted_unix_ms > before.rerouted_unix_ms {
            return Ok(Seen { started, state });
        }
        if unix_ms() - started > REPAIR_DEADLINE.as_secs_f64() * 1_000.0 {
            let state = format!("revision {}, refused {}, gone {:?}", state.revision, state.refused, state.gone);
            return Err(never("the runner to serve a repaired placement", state));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn unix_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64() * 1_000.0)
}

#[expect(clippy::as_conversions, reason = "milliseconds of Unix time are far below 2^53")]
fn millis(unix_ms: i64) -> f64 {
    unix_ms as f64
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}
