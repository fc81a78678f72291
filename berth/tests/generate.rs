//! `berth generate` as a user runs it: real worker processes, the reference's tokens, and workers that die.
#![expect(clippy::unwrap_used, reason = "a test ends with what it did not expect")]

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use serde_json::Value;

/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(120);

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/reference/models/v3-tiny")
}

fn generate(checkpoint: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth"));
    command.arg("generate").arg("--checkpoint").arg(checkpoint).args(["--threads", "1"]);
    command
}

fn run(command: &mut Command) -> Output {
    command.output().unwrap()
}

fn words(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The prompt of the reference, long enough a continuation that a worker can die in the middle.
fn long_run(agents: &str, replicas: &str, json: &Path) -> Command {
    let mut command = generate(&model());
    command.args(["--prompt", "try again later", "--max-tokens", "400", "--ignore-eos"]);
    command.args(["--agents", agents, "--replicas", replicas, "--json"]).arg(json);
    command
}

fn generated(json: &Path) -> Vec<Value> {
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    report["prompts"][0]["generated_ids"].as_array().unwrap().clone()
}

/// A run whose output is read while it lasts.
struct Running {
    child: Child,
    /// Ids of tokens as they are printed.
    tokens: Receiver<String>,
    /// Lines of standard error.
    lines: Receiver<String>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Nothing to do when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (tell, tokens) = channel();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            let mut head = String::new();
            output.read_line(&mut head).unwrap();
            while let Some(token) = next_word(&mut output) {
                if tell.send(token).is_err() {
                    return;
                }
            }
        });
        let (tell, lines) = channel();
        let errors = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in errors.lines() {
                if line.map_or(true, |line| tell.send(line).is_err()) {
                    return;
                }
            }
        });
        Self { child, tokens, lines }
    }

    /// Process ids of the workers, in the order of their devices.
    fn workers(&self, count: usize) -> Vec<String> {
        let mut workers = Vec::new();
        while workers.len() < count {
            let line = self.lines.recv_timeout(LONG).unwrap();
            if let Some((_, rest)) = line.split_once(" pid ") {
                workers.push(rest.split(' ').next().unwrap().to_owned());
            }
        }
        workers
    }

    fn wait_for_tokens(&self, count: usize) {
        (0..count).for_each(|_| drop(self.tokens.recv_timeout(LONG).unwrap()));
    }

    /// Waits for the end; gives the exit code and what was said since.
    fn end(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        while let Ok(line) = self.lines.recv_timeout(LONG) {
            said += &line;
            said.push('\n');
        }
        (self.child.wait().unwrap().code(), said)
    }
}

fn next_word(output: &mut impl Read) -> Option<String> {
    let (mut word, mut byte) = (String::new(), [0]);
    while output.read(&mut byte).ok()? == 1 {
        match byte {
            [b' '] => return Some(word),
            [other] => word.push(char::from(other)),
        }
    }
    None
}

fn kill_9(pid: &str) {
    assert!(Command::new("kill").args(["-9", pid]).status().unwrap().success());
}

/// Whether a process runs; one that ended and was not waited for does not.
fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

#[test]
fn the_reference_comes_out_of_one_two_and_five_workers() {
    for agents in ["1", "2", "5"] {
        let output = run(generate(&model()).args(["--reference", "--agents", agents]));
        assert_eq!(output.status.code(), Some(0), "{agents} agents: {}", words(&output));
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains("2 of 2 prompts equal the reference"), "{said}");
    }
}

#[test]
fn another_reference_is_a_failed_check() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(model().join(file), dir.path().join(file)).unwrap();
    }
    let mut reference: Value = serde_json::from_slice(&std::fs::read(model().join("reference.json")).unwrap()).unwrap();
    reference["cases"][1]["greedy_ids"][3] = 50.into();
    std::fs::write(dir.path().join("reference.json"), reference.to_string()).unwrap();
    let json = dir.path().join("report.json");
    let output = run(generate(dir.path()).arg("--reference").arg("--json").arg(&json));
    assert_eq!(output.status.code(), Some(1), "{}", words(&output));
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let passed = |index: usize| report["prompts"][index]["passed"].as_bool().unwrap();
    assert_eq!((passed(0), passed(1), report["passed"].as_bool()), (true, false, Some(false)));
}

#[test]
fn a_worker_killed_in_the_middle_changes_no_token_when_replicas_are_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let (calm, disturbed) = (dir.path().join("calm.json"), dir.path().join("disturbed.json"));
    assert_eq!(run(&mut long_run("1", "1", &calm)).status.code(), Some(0));
    let running = Running::start(&mut long_run("3", "2", &disturbed));
    let workers = running.workers(3);
    running.wait_for_tokens(10);
    kill_9(&workers[1]);
    let (code, said) = running.end();
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("worker local/1.0 is gone"), "the worker died too late: {said}");
    assert_eq!(generated(&disturbed), generated(&calm));
    assert!(workers.iter().all(|pid| !runs(pid)));
}

#[test]
fn an_expert_that_only_a_dead_worker_had_ends_the_run_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let running = Running::start(&mut long_run("2", "1", &dir.path().join("report.json")));
    let workers = running.workers(2);
    running.wait_for_tokens(10);
    kill_9(&workers[0]);
    let (code, said) = running.end();
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("was only on local/0.0: use --replicas 2"), "{said}");
}

#[test]
fn workers_end_when_their_supervisor_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let running = Running::start(&mut long_run("2", "1", &dir.path().join("report.json")));
    let workers = running.workers(2);
    running.wait_for_tokens(1);
    kill_9(&running.child.id().to_string());
    let begun = Instant::now();
    while workers.iter().any(|pid| runs(pid)) {
        assert!(begun.elapsed() < LONG, "workers {workers:?} outlive their supervisor");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_cannot_be_done_is_refused_with_the_remedy() {
    let refused = |arguments: &[&str]| {
        let output = run(generate(&model()).args(arguments));
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        words(&output)
    };
    assert!(refused(&[]).contains("--prompt"));
    let said = refused(&["--prompt", "x", "--agents", "2", "--replicas", "3"]);
    assert!(said.contains("--replicas 3 is more than --agents 2"), "{said}");
    let said = refused(&["--prompt-ids", "0,4000"]);
    assert!(said.contains("token id"), "{said}");
    let said = refused(&["--prompt", "x", "--memory", "20kB"]);
    assert!(said.contains("more experts need") && said.contains("plan fewer slots"), "{said}");
    let output = run(generate(Path::new("/no/such/folder")).args(["--prompt", "x"]));
    assert_eq!(output.status.code(), Some(2));
    assert!(words(&output).contains("--checkpoint /no/such/folder"), "{}", words(&output));
}
