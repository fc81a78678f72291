//! What a platform engineer does with a running deployment beside waiting for faults: a second one that keeps to one
//! vendor, a node that is cordoned, a device that comes back. Prompts go on all the while, and none may fail.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use berth_crds::{AcceleratorNode, ExpertPlacementStatus};
use berth_types::{Admission, DeviceId};
use kube::{Api, Client};
use serde_json::Value;

use super::cluster::Cluster;
use super::nodes::Loss;
use super::objects;
use super::progress::Progress;
use super::prompts::{Answer, Case, Runner};
use super::report::{DrainReport, Report, ReturnReport};
use super::{PATIENCE, endpoint, serve_all};
use crate::{Error, Result};

/// A deployment that does not declare to span vendors is placed within one, whichever it may use, serves, and is deleted
/// again: `name` for what is asked of `devices`.
pub(super) async fn keep_within_one_vendor(
    cluster: &Cluster,
    (name, devices): (&str, &Value),
    checkpoint: &Path,
    cases: &[Case],
    report: &mut Report,
    progress: &Progress,
) -> Result<()> {
    let client = cluster.client();
    cluster.apply_deployment(name, checkpoint, devices).await?;
    let deployment = objects::deployment_is_ready(client, name, PATIENCE).await?;
    let devices = assigned(&objects::placement_of(client, name).await?.status.unwrap_or_default());
    let known = objects::vendors(client).await?;
    let vendors: BTreeSet<_> = devices.iter().filter_map(|device| known.get(device)).collect();
    progress.detail(&format!("{name} is on {}", listed(devices.iter())));
    if vendors.len() != 1 {
        return Err(Error::Runner {
            doing: format!("place {name}"),
            why: format!("it spans {} vendors without having declared it", vendors.len()),
        });
    }
    serve_all(&Runner::at(&endpoint(&deployment)?)?, cases, "single vendor", report, progress).await?;
    cluster.kubectl(&["-n", objects::NAMESPACE, "delete", "modeldeployment", name]).await?;
    Ok(())
}

/// Cordons a node that experts are on, sees them leave, and lets the node be used again.
pub(super) async fn drain_a_node(
    cluster: &Cluster,
    runner: &Runner,
    case: &Case,
    report: &mut Report,
    progress: &Progress,
) -> Result<()> {
    let client = cluster.client();
    let used = assigned(&objects::placement(client).await?.status.unwrap_or_default());
    let lost = |device: &DeviceId| report.fault.iter().any(|fault| fault.device.starts_with(device.node()));
    let node = used.iter().find(|device| !lost(device)).map(|device| device.node().to_owned()).ok_or_else(|| {
        Error::Runner { doing: "choose a node to drain".into(), why: "every node in use has lost a device".into() }
    })?;
    let serving = Serving::start(runner, case);
    let started = Instant::now();
    cluster.kubectl(&["cordon", &node]).await?;
    placed(client, &format!("experts to leave {node}"), |devices| devices.iter().all(|device| device.node() != node))
        .await?;
    let drained_ms = started.elapsed().as_secs_f64() * 1_000.0;
    let answers = serving.end().await?;
    let failed = answers.iter().filter(|answer| !answer.succeeded() || Some(&answer.ids) != case.expected.as_ref());
    let failed_requests = count(failed.count());
    let requests = count(answers.len());
    progress.detail(&format!(
        "{node} is empty after {drained_ms:.0} ms; {requests} requests meanwhile, {failed_requests} failed"
    ));
    report.drain = Some(DrainReport { node: node.clone(), drained_ms, requests, failed_requests });
    cluster.kubectl(&["uncordon", &node]).await?;
    placed(client, &format!("{node} to be used again"), |devices| devices.iter().any(|device| device.node() == node))
        .await?;
    Ok(())
}

/// Brings lost devices back: they are validated, watched, and used again.
pub(super) async fn bring_back(cluster: &Cluster, loss: &Loss, progress: &Progress) -> Result<ReturnReport> {
    let client = cluster.client();
    let devices = loss.devices();
    let started = Instant::now();
    loss.come_back()?;
    let nodes: Api<AcceleratorNode> = Api::all(client.clone());
    objects::wait_for("the devices to be schedulable again", PATIENCE, || async {
        let all = nodes.list(&Default::default()).await.map_err(Error::api("list AcceleratorNodes"))?.items;
        let known = all.into_iter().flat_map(|node| node.status.unwrap_or_default().devices);
        let state = known.filter(|known| devices.contains(&known.device)).collect::<Vec<_>>();
        let back = state.len() == devices.len() && state.iter().all(|one| one.admission == Admission::Schedulable);
        let words =
            state.iter().map(|one| format!("{}: {} {} {}", one.device, one.health, one.admission, one.evidence));
        Ok(if back { Ok(()) } else { Err(words.collect::<Vec<_>>().join("; ")) })
    })
    .await?;
    let healthy_ms = started.elapsed().as_secs_f64() * 1_000.0;
    placed(client, "the devices to be used again", |used| devices.iter().all(|device| used.contains(device))).await?;
    let used_ms = started.elapsed().as_secs_f64() * 1_000.0;
    progress
        .detail(&format!("{}: healthy after {healthy_ms:.0} ms, in use after {used_ms:.0} ms", listed(devices.iter())));
    let devices = devices.iter().map(ToString::to_string).collect();
    Ok(ReturnReport { devices, healthy_ms, used_ms })
}

/// Waits until the demo's placement serves an assignment whose devices are as wanted, and nothing drains any more.
pub(super) async fn placed(client: &Client, what: &str, wanted: impl Fn(&[DeviceId]) -> bool) -> Result<()> {
    objects::wait_for(what, PATIENCE, || async {
        let status = objects::placement(client).await?.status.unwrap_or_default();
        let devices = assigned(&status);
        let revision = status.assignment.as_ref().map_or(0, |assignment| assignment.revision);
        let settled = (status.serving_revision, status.draining_revision, status.experts_lost) == (revision, 0, 0);
        let state = format!(
            "revision {revision} on {}, {} serves; {}",
            listed(devices.iter()),
            status.serving_revision,
            status.why
        );
        Ok(if settled && wanted(&devices) { Ok(()) } else { Err(state) })
    })
    .await
}

pub(super) fn assigned(status: &ExpertPlacementStatus) -> Vec<DeviceId> {
    status.assignment.as_ref().map(|assignment| assignment.devices.clone()).unwrap_or_default()
}

pub(super) fn listed<'a>(devices: impl Iterator<Item = &'a DeviceId>) -> String {
    devices.map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

pub(super) fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// Prompts that go on, one after the other, until they are told to end.
pub(super) struct Serving {
    ended: Arc<AtomicBool>,
    answers: tokio::task::JoinHandle<Result<Vec<Answer>>>,
}

impl Serving {
    pub(super) fn start(runner: &Runner, case: &Case) -> Self {
        let ended = Arc::<AtomicBool>::default();
        let (runner, case, until) = (runner.clone(), case.clone(), Arc::clone(&ended));
        let answers = tokio::spawn(async move {
            let mut answers = Vec::new();
            while answers.is_empty() || !until.load(Ordering::Relaxed) {
                answers.push(runner.generate(&case, case.max_tokens, |_| ()).await?);
            }
            Ok(answers)
        });
        Self { ended, answers }
    }

    pub(super) async fn end(self) -> Result<Vec<Answer>> {
        self.ended.store(true, Ordering::Relaxed);
        self.answers.await.map_err(|error| Error::Runner { doing: "serve".into(), why: error.to_string() })?
    }
}
