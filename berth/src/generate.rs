//! `berth generate`: a model served without a cluster, by a runner in this process and workers on
//! loopback. A thin door: tokens are the runner's, sums are the workers'.

mod logits;
mod profile;
pub(crate) mod reference;

use std::{collections::BTreeSet, num::NonZeroUsize, path::PathBuf, sync::Arc, time::Duration};

use anyhow::{Context, anyhow, bail};
use berth_kernels::{BackendKind, Checkpoint};
use berth_runner::{
    engine::{Engine, EngineConfig, Event, Finished, Reason, Request, Trace},
    experts::{Experts, ExpertsConfig},
    model::Model,
};
use berth_runtime::{
    Clock,
    telemetry::{self, LogFormat, Process},
};
use berth_types::{Bytes, DeviceId};
use serde::Serialize;
use tokio::{runtime::Handle, sync::watch};

use crate::{
    fleet::{self, Fleet, FleetConfig},
    output::{progress, say, say_part, write_json},
    verdict::Verdict,
};
use profile::Profile;
use reference::{Case, Comparison};

/// Tokens to generate when nothing says how many.
const TOKENS: u32 = 16;

/// Generates text with a runner and workers on this machine
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["prompt", "prompt_ids", "reference"])))]
pub(crate) struct Args {
    /// Folder with config.json, the weights and tokenizer.json
    #[arg(long)]
    checkpoint: PathBuf,
    /// The prompt as text
    #[arg(long)]
    prompt: Option<String>,
    /// The prompt as token ids, separated by commas
    #[arg(long, value_delimiter = ',')]
    prompt_ids: Option<Vec<u32>>,
    /// Run every prompt of the checkpoint's reference.json and compare; exits 1 when something differs
    #[arg(long)]
    reference: bool,
    /// Tokens to generate at most [default: 16, with --reference as many as the reference has]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// Go on past the token that ends a sequence
    #[arg(long)]
    ignore_eos: bool,
    /// Workers, one process and device each
    #[arg(long, default_value = "2")]
    agents: NonZeroUsize,
    /// Copies of each expert, on different workers; with 2, any one worker may die
    #[arg(long, default_value = "1")]
    replicas: NonZeroUsize,
    /// What the workers compute with: cpu, cuda or ascend
    #[arg(long, default_value = "cpu")]
    backend: BackendKind,
    /// Memory of each worker's device [default: this machine's, shared out]
    #[arg(long)]
    memory: Option<Bytes>,
    /// Threads of each worker [default: this machine's, shared out]
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Say where the steps' time went, phase by phase
    #[arg(long)]
    profile: bool,
    /// Write prompts, tokens and counts here as one JSON document
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write every position's logits and chosen experts here, as reference.safetensors has them
    #[arg(long)]
    logits: Option<PathBuf>,
    /// What to log: error, warn, info, debug or a filter per module
    #[arg(long, env = "BERTH_LOG", default_value = "warn")]
    log: String,
}

/// Generates, compares if asked to, and ends its workers.
pub(crate) fn run(args: &Args) -> anyhow::Result<Verdict> {
    let process = Process { part: "generate", names: Vec::new(), config: String::new() };
    telemetry::init(process, &args.log, LogFormat::Text)?;
    let folder = &args.checkpoint;
    let folder = folder.canonicalize().with_context(|| format!("--checkpoint {}", folder.display()))?;
    let checkpoint = Arc::new(Checkpoint::open(&folder)?);
    let model = Model::load(checkpoint, &folder)?;
    let prompts = prompts(args, &folder, &model)?;
    let fleet = fleet_config(args, folder.clone())?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(generate(args, &model, &fleet, prompts))
}

/// A prompt and what is to come of it.
struct Prompt {
    ids: Vec<u32>,
    max_tokens: u32,
    expected: Option<Vec<u32>>,
}

fn prompts(args: &Args, folder: &std::path::Path, model: &Model) -> anyhow::Result<Vec<Prompt>> {
    let max_tokens = args.max_tokens.unwrap_or(TOKENS);
    if let Some(text) = &args.prompt {
        return Ok(vec![Prompt { ids: model.encode(text)?, max_tokens, expected: None }]);
    }
    if let Some(ids) = &args.prompt_ids {
        return Ok(vec![Prompt { ids: ids.clone(), max_tokens, expected: None }]);
    }
    let prompt = |(index, case): (usize, Case)| {
        let Case { text, prompt_ids: ids, mut greedy_ids } = case;
        if let Some(text) = text {
            let ours = model.encode(&text)?;
            if ours != ids {
                bail!("reference.json: cases[{index}].prompt_ids are not what tokenizer.json makes of its text");
            }
        }
        let all = u32::try_from(greedy_ids.len())?;
        let max_tokens = args.max_tokens.unwrap_or(all).min(all);
        greedy_ids.truncate(usize::try_from(max_tokens)?);
        if greedy_ids.is_empty() {
            bail!("reference.json: cases[{index}].greedy_ids is empty: give at least one token");
        }
        Ok(Prompt { ids, max_tokens, expected: Some(greedy_ids) })
    };
    reference::cases(folder)?.into_iter().enumerate().map(prompt).collect()
}

fn fleet_config(args: &Args, checkpoint: PathBuf) -> anyhow::Result<FleetConfig> {
    let workers = args.agents;
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let share = NonZeroUsize::new(cores / workers).unwrap_or(NonZeroUsize::MIN);
    let memory = match args.memory {
        Some(memory) => memory,
        None => crate::devices::host_memory()?.scaled(1, u64::try_from(workers.get())?),
    };
    Ok(FleetConfig {
        workers,
        replicas: args.replicas,
        backend: args.backend,
        checkpoint,
        memory,
        threads: args.threads.unwrap_or(share),
        log: args.log.clone(),
    })
}

async fn generate(
    args: &Args,
    model: &Arc<Model>,
    config: &FleetConfig,
    prompts: Vec<Prompt>,
) -> anyhow::Result<Verdict> {
    let experts = u32::try_from(model.experts())?;
    let fleet = Fleet::start(config, &model.expert_layers(), experts, progress).await?;
    let client = Experts::new(ExpertsConfig::default(), Handle::current());
    client.set_routes(fleet.routes());
    let engine = Engine::start(Arc::clone(model), Arc::new(client.clone()), EngineConfig::default())?;
    let session = Session { args, model, engine, client, dead: fleet.dead() };
    let mut report = Report::new(args);
    let mut traces = Vec::new();
    for (index, prompt) in prompts.into_iter().enumerate() {
        let (result, trace) = session.one(&fleet, index, prompt).await?;
        report.add(result);
        traces.push(trace);
    }
    let stats = session.engine.stats();
    // Workers are let go before anything is written, so that an error there leaves none behind.
    drop(session);
    fleet.end().await?;
    if let Some(path) = &args.logits {
        logits::write(path, &traces)?;
    }
    report.finish();
    if args.profile {
        let profile = Profile::new(stats.steps, &stats.times);
        profile.lines().iter().try_for_each(|line| say(line))?;
        report.profile = Some(profile);
    }
    say(&report.summary())?;
    write_json(args.json.as_deref(), &report)?;
    Ok(Verdict::from(report.passed))
}

/// What all prompts share.
struct Session<'a> {
    args: &'a Args,
    model: &'a Model,
    engine: Engine,
    client: Experts,
    dead: watch::Receiver<BTreeSet<DeviceId>>,
}

impl Session<'_> {
    async fn one(&self, fleet: &Fleet, index: usize, prompt: Prompt) -> anyhow::Result<(PromptResult, Vec<Trace>)> {
        let Prompt { ids, max_tokens, expected } = prompt;
        say(&format!("prompt {index}: {} tokens", ids.len()))?;
        let clock = Clock::real();
        let events = self.engine.generate(Request {
            prompt_ids: ids.clone(),
            max_tokens,
            // A reference goes on as long as its tokens do.
            ignore_eos: self.args.ignore_eos || expected.is_some(),
            trace: self.args.logits.is_some() || expected.is_some(),
            deadline: None,
        });
        let mut heard = Heard::default();
        self.listen(fleet, events, &mut heard).await?;
        let Heard { generated, trace, finished } = heard;
        let text = self.model.decode(&generated);
        say(&format!("\ntext {text:?}"))?;
        let finished = finished.ok_or_else(|| anyhow!("the engine broke off: look for a panic above"))?;
        if !matches!(finished.reason, Reason::Length | Reason::Stop) {
            bail!("generating: {}", finished.error);
        }
        let comparison = match expected {
            Some(_) => reference::compare(&self.args.checkpoint, index, &trace)?,
            None => None,
        };
        let result = PromptResult::new(ids, generated, text, expected, comparison, &finished, clock.now());
        say(&result.summary())?;
        Ok((result, trace))
    }

    /// Takes events until the end; tells the client who died.
    async fn listen(
        &self,
        fleet: &Fleet,
        mut events: tokio::sync::mpsc::Receiver<Event>,
        heard: &mut Heard,
    ) -> anyhow::Result<()> {
        let mut dead = self.dead.clone();
        loop {
            // Cancel-safe: both arms keep what they have when dropped.
            tokio::select! {
                biased;
                changed = dead.changed() => {
                    changed.context("nobody watches the workers any more")?;
                    let gone = dead.borrow_and_update().clone();
                    progress(&format!("worker {} is gone", fleet::names(&gone)));
                    if let Some((layer, expert)) = fleet.orphan(&gone) {
                        bail!("expert {expert} of layer {layer} was only on {}: use --replicas 2", fleet::names(&gone));
                    }
                    self.client.set_gone(gone);
                }
                event = events.recv() => match event {
                    Some(Event::Prompt { .. }) => {}
                    Some(Event::Trace(trace)) => heard.trace.push(trace),
                    Some(Event::Token { id, .. }) => {
                        say_part(&format!("{id} "))?;
                        heard.generated.push(id);
                    }
                    Some(Event::Finished(finished)) => heard.finished = Some(finished),
                    None => return Ok(()),
                },
            }
        }
    }
}

/// What the engine said about one prompt.
#[derive(Default)]
struct Heard {
    generated: Vec<u32>,
    trace: Vec<Trace>,
    finished: Option<Finished>,
}

/// One prompt of the report.
#[derive(Debug, Serialize)]
struct PromptResult {
    prompt_ids: Vec<u32>,
    generated_ids: Vec<u32>,
    text: String,
    expected_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reference: Option<Comparison>,
    seconds: f64,
    tokens_per_s: f64,
    calls: u64,
    refused: u64,
    retried: u64,
    passed: bool,
}

impl PromptResult {
    fn new(
        prompt_ids: Vec<u32>,
        generated_ids: Vec<u32>,
        text: String,
        expected_ids: Option<Vec<u32>>,
        reference: Option<Comparison>,
        finished: &Finished,
        took: Duration,
    ) -> Self {
        let seconds = took.as_secs_f64();
        let same = expected_ids.as_ref().is_none_or(|expected| *expected == generated_ids);
        let passed = same && reference.as_ref().is_none_or(Comparison::passed);
        let tokens_per_s = per_second(generated_ids.len(), seconds);
        let counts = finished.counts;
        Self {
            prompt_ids,
            generated_ids,
            text,
            expected_ids,
            reference,
            seconds,
            tokens_per_s,
            calls: counts.calls,
            refused: counts.refused,
            retried: counts.retried,
            passed,
        }
    }

    fn summary(&self) -> String {
        let Self { generated_ids, tokens_per_s, calls, refused, retried, .. } = self;
        let tokens = generated_ids.len();
        let mut line =
            format!("{tokens} tokens, {tokens_per_s:.1} tokens/s, {calls} calls, {refused} refused, {retried} retried");
        if let Some(expected) = &self.expected_ids {
            let same = expected.iter().zip(generated_ids).take_while(|(a, b)| a == b).count();
            line += &format!("; reference: {same} of {} tokens equal", expected.len());
        }
        if let Some(Comparison { positions, logits_worst, experts_wrong }) = &self.reference {
            line += &format!(
                ", experts differ at {experts_wrong} places of {positions} positions, logits within {logits_worst:.1e} \
                 deviations"
            );
        }
        line
    }
}

/// The document of `--json`.
#[derive(Debug, Serialize)]
struct Report {
    checkpoint: PathBuf,
    agents: NonZeroUsize,
    replicas: NonZeroUsize,
    prompts: Vec<PromptResult>,
    tokens_per_s: f64,
    calls: u64,
    refused: u64,
    retried: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<Profile>,
    passed: bool,
}

impl Report {
    fn new(args: &Args) -> Self {
        Self {
            checkpoint: args.checkpoint.clone(),
            agents: args.agents,
            replicas: args.replicas,
            prompts: Vec::new(),
            tokens_per_s: 0.0,
            calls: 0,
            refused: 0,
            retried: 0,
            profile: None,
            passed: true,
        }
    }

    fn add(&mut self, result: PromptResult) {
        self.calls = self.calls.saturating_add(result.calls);
        self.refused = self.refused.saturating_add(result.refused);
        self.retried = self.retried.saturating_add(result.retried);
        self.passed &= result.passed;
        self.prompts.push(result);
    }

    fn finish(&mut self) {
        let tokens = self.prompts.iter().map(|prompt| prompt.generated_ids.len()).sum();
        self.tokens_per_s = per_second(tokens, self.prompts.iter().map(|prompt| prompt.seconds).sum());
    }

    fn summary(&self) -> String {
        let compared = self.prompts.iter().filter(|prompt| prompt.expected_ids.is_some()).count();
        let passed = self.prompts.iter().filter(|prompt| prompt.expected_ids.is_some() && prompt.passed).count();
        let verdict =
            if compared > 0 { format!("; {passed} of {compared} prompts equal the reference") } else { String::new() };
        format!("{:.1} tokens/s over {} prompts{verdict}", self.tokens_per_s, self.prompts.len())
    }
}

fn per_second(tokens: usize, seconds: f64) -> f64 {
    let tokens = u32::try_from(tokens).map_or(f64::NAN, f64::from);
    if seconds > 0.0 { tokens / seconds } else { 0.0 }
}
