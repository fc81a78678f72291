//! Traffic whose experts concentrate, until the scheduler moves replicas for it. The balance before and after is what the
//! runner counted, device by device, never what a plan expected.

use std::collections::BTreeMap;
use std::time::Duration;

use berth_crds::expert_placement::{DecisionOutcome, PlanDecision};
use berth_proto::v1::{DescribeResponse, DeviceLoad};
use kube::Client;

use super::PATIENCE;
use super::changes::Serving;
use super::cluster::Cluster;
use super::objects;
use super::progress::Progress;
use super::prompts::{Case, Runner};
use super::report::{RebalanceReport, Report};
use crate::{Error, Result};

/// Tokens of a prompt, if the model's context is long enough: one token over and over, so that its experts get nearly all.
const REPEATED: usize = 160;
/// The token.
const TOKEN: u32 = 42;
/// Tokens generated for a prompt.
const GENERATED: u32 = 4;
/// Tokens of a prompt by which it is told which devices it uses.
const SAMPLE: u32 = 32;
/// Entries (token, expert) of all devices after which a balance counts as measured.
const ENOUGH: f64 = 8_000.0;
/// Stretches of that many entries that are looked at.
const STRETCHES: usize = 100;
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What devices answered, by layer.
type Counts = BTreeMap<u32, BTreeMap<String, f64>>;

/// Serves the skewed prompts until the placement was evened out for them and the result is measured.
pub(super) async fn even_out(
    runner: &Runner,
    cluster: &Cluster,
    cases: &[Case],
    context: usize,
    report: &mut Report,
    progress: &Progress,
) -> Result<()> {
    let begins = cases.first().and_then(|case| case.prompt_ids.first().copied());
    let repeated = std::iter::repeat_n(TOKEN, REPEATED.min(context / 2));
    let mut case =
        Case { prompt_ids: begins.into_iter().chain(repeated).collect(), expected: None, max_tokens: GENERATED };
    case.expected = Some(runner.generate(&case, case.max_tokens, |_| ()).await?.ids);

    let opened = runner.describe().await?;
    let serving = Serving::start(runner, &case);
    let seen = tokio::time::timeout(PATIENCE, watch(cluster.client(), runner, &opened)).await.unwrap_or_else(|_| {
        Err(Error::Wait {
            what: "a re-plan for the skewed load, and its balance".into(),
            waited: PATIENCE,
            state: "see status.decisions of the ExpertPlacement for what was decided and why".into(),
        })
    });
    let answers = serving.end().await?;
    let Seen { before, after, decision } = seen?;
    let failed = answers.iter().filter(|answer| !answer.succeeded() || Some(&answer.ids) != case.expected.as_ref());
    let rebalance = RebalanceReport {
        revision_before: decision.from_revision,
        revision_after: decision.revision,
        balancedness_before: before,
        balancedness_after: after,
        expected_after: decision.balancedness_after,
        moved_replicas: decision.moved_replicas,
        moved_bytes: decision.moved_bytes.get(),
        pays_back_s: decision.pays_back_seconds,
        why: decision.why,
        requests: u64::try_from(answers.len()).unwrap_or(u64::MAX),
        failed_requests: u64::try_from(failed.count()).unwrap_or(u64::MAX),
    };
    progress.detail(&format!(
        "measured balance {before:.2} -> {after:.2}; {} requests, {} failed\n{}",
        rebalance.requests, rebalance.failed_requests, rebalance.why
    ));
    report.rebalance = Some(rebalance);
    progress.detail(&cluster.ask(&["explain", objects::DEPLOYMENT, "-n", objects::NAMESPACE]).await?);
    Ok(())
}

/// What each device answers of the beginning of `case`.
pub(super) async fn answered(runner: &Runner, case: &Case) -> Result<BTreeMap<String, u64>> {
    let sums = |look: DescribeResponse| -> BTreeMap<String, u64> {
        let sum = |device: &DeviceLoad| device.layers.iter().map(|layer| layer.tokens).sum();
        look.devices.iter().map(|device| (device.device.clone(), sum(device))).collect()
    };
    let before = runner.describe().await?;
    runner.generate(case, case.max_tokens.min(SAMPLE), |_| ()).await?;
    let after = runner.describe().await?;
    // Another revision counts from nothing.
    let base = if after.revision == before.revision { sums(before) } else { BTreeMap::new() };
    let since = |(device, tokens): (String, u64)| {
        let rest = tokens.saturating_sub(base.get(&device).copied().unwrap_or(0));
        (device, rest)
    };
    Ok(sums(after).into_iter().map(since).collect())
}

/// What was seen of a re-plan.
struct Seen {
    before: f64,
    after: f64,
    decision: PlanDecision,
}

async fn watch(client: &Client, runner: &Runner, opened: &DescribeResponse) -> Result<Seen> {
    let mut base = opened.clone();
    let mut last = opened.clone();
    let (before, decision) = loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = runner.describe().await?;
        if now.revision == base.revision {
            last = now;
            continue;
        }
        let measured = balance(&base, &last);
        match (moved_for_balance(client, now.revision).await?, measured) {
            (Some(decision), Some(before)) => break (before, decision),
            // Another revision than the one that is waited for: what follows is measured on it.
            _ => (base, last) = (now.clone(), now),
        }
    };
    Ok(Seen { before, after: settled_balance(runner).await?, decision })
}

/// The balance of the revision in use, over a stretch without retries and slow devices: a worker that a busy machine lets
/// wait is passed over for a while, which says nothing of the placement. Where none is so, the one with the fewest counts.
async fn settled_balance(runner: &Runner) -> Result<f64> {
    let mut base = runner.describe().await?;
    let mut seen: Vec<(u64, f64)> = Vec::new();
    while seen.len() < STRETCHES && seen.iter().all(|(disturbed, _)| *disturbed > 0) {
        tokio::time::sleep(LOOK_EVERY).await;
        let now = runner.describe().await?;
        if now.revision != base.revision {
            return Err(Error::Runner {
                doing: "measure the balance".into(),
                why: format!("revision {} took over while {} was measured", now.revision, base.revision),
            });
        }
        if total(&since(&base, &now)) >= ENOUGH
            && let Some(after) = balance(&base, &now)
        {
            let slow = u64::try_from(base.slow.len() + now.slow.len()).unwrap_or(u64::MAX);
            seen.push((now.retried.saturating_sub(base.retried) + slow, after));
            base = now;
        }
    }
    let fewest = seen.iter().min_by_key(|(disturbed, _)| *disturbed);
    fewest
        .map(|(_, after)| *after)
        .ok_or_else(|| Error::Runner { doing: "measure the balance".into(), why: "nothing was answered".into() })
}

/// The decision that made `revision`, if it was made for balance.
async fn moved_for_balance(client: &Client, revision: u64) -> Result<Option<PlanDecision>> {
    let status = objects::placement(client).await?.status.unwrap_or_default();
    let moved = |decision: &PlanDecision| {
        decision.revision == revision && decision.outcome == DecisionOutcome::Moved && decision.cause == "rebalance"
    };
    Ok(status.decisions.into_iter().find(moved))
}

/// What devices answered between two looks at the same revision.
fn since(base: &DescribeResponse, now: &DescribeResponse) -> Counts {
    let mut counts = Counts::new();
    for (look, sign) in [(now, 1.0), (base, -1.0)] {
        for device in &look.devices {
            for layer in &device.layers {
                let tokens = f64::from(u32::try_from(layer.tokens).unwrap_or(u32::MAX));
                *counts.entry(layer.layer).or_default().entry(device.device.clone()).or_default() += sign * tokens;
            }
        }
    }
    counts
}

fn total(counts: &Counts) -> f64 {
    counts.values().flat_map(|devices| devices.values()).sum()
}

/// Mean over layers of mean ÷ max device load between two looks; every device of the revision counts.
fn balance(base: &DescribeResponse, now: &DescribeResponse) -> Option<f64> {
    let counts = since(base, now);
    let devices = f64::from(u32::try_from(now.devices.len()).ok()?);
    let ratios: Vec<f64> = counts
        .values()
        .filter_map(|loads| {
            let most = loads.values().copied().fold(0.0, f64::max);
            (most > 0.0).then(|| loads.values().sum::<f64>() / devices / most)
        })
        .collect();
    let layers = f64::from(u32::try_from(ratios.len()).ok()?);
    (layers > 0.0).then(|| ratios.iter().sum::<f64>() / layers)
}
