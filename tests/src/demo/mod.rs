//! The main job, from nothing to tokens through the loss of devices of both vendors: what `make demo` runs and what tests
//! run with other checkpoints. Uses the system only as a user would: helm, kubectl, objects, prompts.

mod changes;
pub mod cluster;
mod fault;
pub mod nodes;
pub mod objects;
mod progress;
pub mod prompts;
mod report;
mod resets;
mod skew;

use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_crds::ModelDeployment;
use berth_types::{DeviceId, Vendor};
use futures::future::try_join_all;
use serde_json::json;

use crate::{Error, Result};
use cluster::Cluster;
use nodes::{Fleet, Loss};
use progress::Progress;
use prompts::{Case, Runner};

pub use report::{
    DrainReport, FaultReport, PlacementReport, PromptReport, RebalanceReport, Report, ResetReport, ReturnReport,
};

/// Longest time for each thing that is waited for.
const PATIENCE: Duration = Duration::from_secs(90);
/// Tokens of the long prompt in whose middle the device is lost, if the model's context is long enough.
const LONG: usize = 400;

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the run, for its folder under `target/cluster`.
    pub name: String,
    /// Simulated nodes.
    pub fleet: Fleet,
    /// Folder of the checkpoint to serve.
    pub checkpoint: PathBuf,
    /// Where the report goes.
    pub report: PathBuf,
    /// A cluster to use instead of starting one.
    pub kubeconfig: Option<PathBuf>,
    /// Leave everything running until Ctrl-C.
    pub keep: bool,
}

/// Runs the demo and writes its report.
///
/// # Errors
/// When a step does not get where it should; the error says what was waited for and what to look at.
pub async fn run(options: &Options) -> Result<Report> {
    let mut progress = Progress::start();
    let checkpoint = options.checkpoint.canonicalize().map_err(Error::file("find", &options.checkpoint))?;
    let cases = prompts::read_cases(&checkpoint)?;
    progress.step("control_plane", "starting etcd, kube-apiserver, controller manager and scheduler");
    let cluster = Cluster::start(options).await?;
    let outcome = serve(&cluster, options.fleet, &checkpoint, &cases, &mut progress).await;
    if let Err(error) = &outcome {
        progress.detail(&format!("failed: {error}"));
        progress.detail(&format!("look at the logs of the pods under {}", cluster.dir().display()));
    }
    if options.keep {
        progress.step("keep", "left running; Ctrl-C ends it");
        progress.detail(&cluster.how_to_look());
        // An error here means that there are no signals to wait for: end at once.
        let _ = tokio::signal::ctrl_c().await;
    }
    progress.step("end", "uninstalling and stopping everything");
    let ended = cluster.end().await;
    let mut report = outcome?;
    ended?;
    report.checkpoint = checkpoint;
    report.durations_s = progress.finish();
    report.write(&options.report)?;
    Ok(report)
}

async fn serve(
    cluster: &Cluster,
    fleet: Fleet,
    checkpoint: &Path,
    cases: &[Case],
    progress: &mut Progress,
) -> Result<Report> {
    let client = cluster.client();
    progress.step("install", "installing the chart: operator, scheduler, agents; resets are ordered, not only advised");
    cluster.install_acting(&[]).await?;
    progress.detail(&cluster.kubectl(&["-n", cluster::NAMESPACE, "get", "pods", "-o", "wide"]).await?);

    progress.step("nodes", "waiting for the agents' reports");
    objects::nodes_are_healthy(client, fleet.len(), PATIENCE).await?;
    progress.detail(&cluster.kubectl(&["get", "acceleratornodes"]).await?);

    progress.step("apply", "applying a ModelProfile and a ModelDeployment that spans all devices of both vendors");
    cluster.apply_profile(checkpoint).await?;
    // Every node has two devices, and the deployment wants all of them.
    let devices = json!({"perInstance": fleet.len() * 2, "crossVendor": true});
    cluster.apply_deployment(objects::DEPLOYMENT, checkpoint, &devices).await?;
    let deployment = objects::deployment_is_ready(client, objects::DEPLOYMENT, PATIENCE).await?;
    progress.detail(&cluster.kubectl(&["-n", objects::NAMESPACE, "get", "berth"]).await?);

    let runner = Runner::at(&endpoint(&deployment)?)?;
    let mut report = Report::default();
    progress.step("prompts_before", "serving prompts");
    serve_all(&runner, cases, "before", &mut report, progress).await?;
    let context = prompts::context(checkpoint)?;
    progress.step("skew", "the same words over and over: a few experts get all the load, until replicas move");
    skew::even_out(&runner, cluster, cases, context, &mut report, progress).await?;
    let long = long_case(&runner, cases, context).await?;

    progress.step("single_vendor", "deployments that do not declare to span vendors");
    let mut single = vec![("single-vendor", json!({"perInstance": 2}))];
    if fleet.ascend > 0 {
        single.push(("ascend-alone", json!({"perInstance": 2, "vendors": ["ascend"]})));
    }
    for (name, devices) in &single {
        changes::keep_within_one_vendor(cluster, (name, devices), checkpoint, cases, &mut report, progress).await?;
    }

    let mut losses = Vec::new();
    for (vendor, number) in [(Vendor::Nvidia, fleet.nvidia), (Vendor::Ascend, fleet.ascend)] {
        if number > 0 {
            losses.push(lose(cluster, vendor, &runner, &long, &mut report, progress).await?);
        }
    }
    progress.step("drain", "kubectl cordon: the experts of a node leave, and come back with uncordon");
    changes::drain_a_node(cluster, &runner, &long, &mut report, progress).await?;
    progress.step("return", "what was lost comes back: validated, watched, used again");
    let shown: &Progress = progress;
    let back = losses.iter().map(|loss| changes::bring_back(cluster, loss, shown));
    report.returned = try_join_all(back).await?;
    progress
        .step("reset", "a GPU, then an NPU, must be reset: emptied, reset by order, validated, watched, used again");
    let vendors: Vec<Vendor> = losses.iter().map(Loss::vendor).collect();
    resets::reset_by_order(cluster, &vendors, &runner, &long, &mut report, progress).await?;

    progress.step("prompts_after", "serving the same prompts on what is left and what came back");
    serve_all(&runner, cases, "after", &mut report, progress).await?;

    progress.step("balance", "waiting for the runner's next load window");
    report.placement.balancedness = Some(objects::measured_balance(client, PATIENCE).await?);
    progress.detail(&cluster.kubectl(&["-n", objects::NAMESPACE, "get", "expertplacements"]).await?);
    Ok(report)
}

/// Address of the first instance's runner.
fn endpoint(deployment: &ModelDeployment) -> Result<String> {
    let instances = deployment.status.clone().unwrap_or_default().instances;
    instances.into_iter().map(|instance| instance.endpoint).find(|endpoint| !endpoint.is_empty()).ok_or_else(|| {
        Error::Runner { doing: "find the runner".into(), why: "status.instances has no endpoint".into() }
    })
}

async fn serve_all(
    runner: &Runner,
    cases: &[Case],
    phase: &'static str,
    report: &mut Report,
    progress: &Progress,
) -> Result<()> {
    for case in cases {
        let answer = runner.generate(case, case.max_tokens, |_| ()).await?;
        let prompt = PromptReport {
            phase,
            prompt_ids: case.prompt_ids.clone(),
            generated_ids: answer.ids,
            expected_ids: case.expected.clone(),
        };
        progress.detail(&format!("{:?} {}", prompt.generated_ids, verdict(&prompt)));
        report.prompts.push(prompt);
    }
    Ok(())
}

fn verdict(prompt: &PromptReport) -> &'static str {
    match (&prompt.expected_ids, prompt.is_right()) {
        (None, _) => "(no reference)",
        (Some(_), true) => "= reference",
        (Some(_), false) => "differs from the reference",
    }
}

/// The first prompt, generated far: what it gives on the undisturbed placement is what it must give later.
async fn long_case(runner: &Runner, cases: &[Case], context: usize) -> Result<Case> {
    let case = cases.first().ok_or_else(|| Error::Runner {
        doing: "choose a prompt".into(),
        why: "reference.json has no cases: give it one, or remove it".into(),
    })?;
    let tokens = LONG.min(context.saturating_sub(case.prompt_ids.len()));
    let max_tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
    let answer = runner.generate(case, max_tokens, |_| ()).await?;
    Ok(Case { prompt_ids: case.prompt_ids.clone(), expected: Some(answer.ids), max_tokens })
}

/// Loses the device of `vendor` that answers most of the prompt, and all that is on its card, in the middle of it.
async fn lose(
    cluster: &Cluster,
    vendor: Vendor,
    runner: &Runner,
    long: &Case,
    report: &mut Report,
    progress: &mut Progress,
) -> Result<Loss> {
    let client = cluster.client();
    let before = objects::placement(client).await?.status.unwrap_or_default();
    let devices = before.assignment.map(|assignment| assignment.devices).unwrap_or_default();
    let known = objects::vendors(client).await?;
    let answered = skew::answered(runner, long).await?;
    let tokens = |device: &DeviceId| answered.get(device.as_str()).copied().unwrap_or(0);
    let of_vendor = devices.into_iter().filter(|device| known.get(device) == Some(&vendor));
    // Of those that answer as much the first.
    let device = of_vendor.rev().max_by_key(tokens);
    let device = device.ok_or_else(|| Error::Runner {
        doing: "choose a device to lose".into(),
        why: format!("the placement uses no device of {vendor}"),
    })?;
    let loss = cluster.loss_of(&device)?;
    progress.step(&format!("fault_{vendor}"), &format!("{}, {device}, between two tokens", loss.what()));
    let measured = fault::lose_device(runner, long, &loss, || cluster.decided_ms(&loss)).await?;
    let after = objects::repaired(client, before.serving_revision, PATIENCE).await?.status.unwrap_or_default();
    for answer in measured.answers {
        report.prompts.push(PromptReport {
            phase: "during",
            prompt_ids: long.prompt_ids.clone(),
            generated_ids: answer.ids,
            expected_ids: long.expected.clone(),
        });
    }
    let fault = &measured.report;
    progress.detail(&format!(
        "detected {:.0} ms, rerouted {:.0} ms, repaired {:.0} ms; calls refused {}, requests retried {}, failed {}",
        fault.detected_ms,
        fault.rerouted_ms,
        fault.repaired_ms,
        fault.refused_calls,
        fault.retried_requests,
        fault.failed_requests
    ));
    progress.detail(&cluster.kubectl(&["get", "acceleratornodes,expertplacements", "-A"]).await?);
    if report.fault.is_empty() {
        report.placement.revision_before = before.serving_revision;
    }
    report.fault.push(measured.report);
    let placement = &mut report.placement;
    placement.revision_after = after.serving_revision;
    placement.moved_bytes = placement.moved_bytes.saturating_add(after.moved_bytes.get());
    Ok(loss)
}
