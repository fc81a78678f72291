//! One run of a container, through the `container` binary: its namespaces, its log, its end. Everything that a
//! run started is gone when the `Attempt` is dropped, and when this process ends in any way.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::process::{Child, ChildStdin, Command};

/// A file or directory of this machine shown at a path of the container.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Mount {
    pub source: PathBuf,
    pub target: PathBuf,
    pub read_only: bool,
}

/// What to run; the fields are those of `Spec` in `tests/cluster/container`.
#[derive(Debug, Serialize)]
pub(super) struct Spec {
    pub command: Vec<String>,
    pub program: PathBuf,
    pub dir: String,
    pub env: Vec<String>,
    pub mounts: Vec<Mount>,
    pub root: PathBuf,
    pub state: PathBuf,
}

/// What `container` says once the program runs, or did not start.
#[derive(Debug, Deserialize)]
struct Report {
    pid: Option<i32>,
    error: Option<String>,
}

/// A container whose program runs.
#[derive(Debug)]
pub(super) struct Attempt {
    child: Child,
    /// The kernel closes it when this process ends: the container's life line.
    _stdin: Option<ChildStdin>,
    pid: i32,
}

/// A namespace with many mounts on a busy machine takes a while, but not for ever.
const START_DEADLINE: Duration = Duration::from_secs(30);

impl Attempt {
    /// Starts the program and waits until it runs. `work` is an empty folder of this run's own.
    ///
    /// # Errors
    /// A sentence that says why the program did not start.
    pub(super) async fn start(runner: &Path, work: &Path, mut spec: Spec, log: &Path) -> Result<Self, String> {
        let text = |e: std::io::Error| format!("{}: {e}", work.display());
        spec.root = work.join("root");
        spec.state = work.join("state.json");
        let spec_path = work.join("spec.json");
        fs::create_dir_all(&spec.root).map_err(text)?;
        fs::write(&spec_path, serde_json::to_vec(&spec).map_err(|e| e.to_string())?).map_err(text)?;
        let out = File::options().create(true).append(true).open(log).map_err(text)?;
        let mut child = Command::new(runner)
            .arg("run")
            .arg(&spec_path)
            .stdin(Stdio::piped())
            .stderr(out.try_clone().map_err(text)?)
            .stdout(out)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|e| format!("{}: {e}", runner.display()))?;
        let stdin = child.stdin.take();
        let pid = started(&mut child, &spec.state).await?;
        Ok(Self { child, _stdin: stdin, pid })
    }

    /// The container's first process, as this machine numbers it.
    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits for the end; the exit status, or 128 + the signal that ended it. Cancel-safe.
    pub(super) async fn wait(&mut self) -> i32 {
        match self.child.wait().await {
            Ok(status) => status.code().unwrap_or(137),
            Err(_) => 137,
        }
    }

    /// Asks it to end, and kills it after `grace`.
    pub(super) async fn end(&mut self, grace: Duration) -> i32 {
        if !grace.is_zero() {
            self.signal(Signal::SIGTERM);
            if let Ok(code) = tokio::time::timeout(grace, self.wait()).await {
                return code;
            }
        }
        self.signal(Signal::SIGKILL);
        self.wait().await
    }

    fn signal(&self, signal: Signal) {
        // It may have ended by itself.
        let _ = kill(Pid::from_raw(self.pid), signal);
    }
}

async fn started(child: &mut Child, state: &Path) -> Result<i32, String> {
    let deadline = Instant::now() + START_DEADLINE;
    loop {
        // Asked first: a runner that has ended has written its report before.
        let ended = child.try_wait().map_err(|e| e.to_string())?;
        if let Ok(text) = fs::read(state) {
            let report: Report = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
            return match report {
                Report { pid: Some(pid), .. } => Ok(pid),
                Report { error, .. } => Err(error.unwrap_or_else(|| "no reason given".into())),
            };
        }
        if let Some(status) = ended {
            return Err(format!("the container runner ended with {status}"));
        }
        if Instant::now() > deadline {
            return Err(format!("not started within {START_DEADLINE:?}"));
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
