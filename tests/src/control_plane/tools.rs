//! kubectl and helm against a control plane, as a user would run them: the same binaries, the same kubeconfig.
//! Never reads or writes the caller's own kubeconfig, caches or helm settings.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::ControlPlane;
use crate::tied_process::EXIT_ON_STDIN_EOF;
use crate::{Error, Result};

/// Longer than any `--wait` a test should use.
const DEADLINE: Duration = Duration::from_secs(300);

impl ControlPlane {
    /// Runs kubectl and returns what it printed.
    ///
    /// # Errors
    /// When it does not succeed: the error holds what it wrote to its standard error.
    pub async fn kubectl(&self, args: &[&str]) -> Result<String> {
        run(self.kubectl_command(), args, "").await
    }

    /// Runs kubectl with a text as its standard input, such as `apply -f -`.
    ///
    /// # Errors
    /// As [`Self::kubectl`].
    pub async fn kubectl_with_input(&self, args: &[&str], input: &str) -> Result<String> {
        run(self.kubectl_command(), args, input).await
    }

    /// Runs helm and returns what it printed.
    ///
    /// # Errors
    /// When it does not succeed: the error holds what it wrote to its standard error.
    pub async fn helm(&self, args: &[&str]) -> Result<String> {
        run(self.helm_command(), args, "").await
    }

    /// A kubectl that talks to this control plane, for a caller that wants to stream or signal it.
    #[must_use]
    pub fn kubectl_command(&self) -> Command {
        let mut command = self.tool_command(self.tool.cluster());
        command.arg("kubectl");
        command
    }

    /// A helm that talks to this control plane.
    #[must_use]
    pub fn helm_command(&self) -> Command {
        self.tool_command(self.tool.helm())
    }

    fn tool_command(&self, program: std::path::PathBuf) -> Command {
        let home = self.dir.join("home");
        let mut command = Command::new(program);
        command
            .env_remove(EXIT_ON_STDIN_EOF)
            .env("KUBECONFIG", self.kubeconfig())
            .env("HOME", &home)
            .env("HELM_CACHE_HOME", home.join("helm/cache"))
            .env("HELM_CONFIG_HOME", home.join("helm/config"))
            .env("HELM_DATA_HOME", home.join("helm/data"))
            .kill_on_drop(true);
        command
    }
}

async fn run(mut command: Command, args: &[&str], input: &str) -> Result<String> {
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let line = line_of(&command);
    let start = |source| Error::Start { program: line.clone(), source };
    let mut child = command.spawn().map_err(start)?;
    let stdin = child.stdin.take();
    let feed = async {
        if let Some(mut stdin) = stdin {
            // A program that does not read its input may close it; its exit status says whether that is wrong.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
    };
    let both = async { tokio::join!(feed, child.wait_with_output()).1 };
    let Ok(output) = tokio::time::timeout(DEADLINE, both).await else {
        return Err(Error::Command {
            command: line,
            status: format!("nothing for {DEADLINE:?}"),
            stderr: String::new(),
        });
    };
    let output = output.map_err(start)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into());
    }
    Err(Error::Command {
        status: output.status.to_string(),
        stderr: String::from_utf8_lossy(&output.stderr).trim().into(),
        command: line,
    })
}

/// The command as a person would type it.
fn line_of(command: &Command) -> String {
    let std = command.as_std();
    let name = std.get_program().to_string_lossy();
    let name = name.rsplit('/').next().unwrap_or_default();
    std::iter::once(name.into()).chain(std.get_args().map(|a| a.to_string_lossy())).collect::<Vec<_>>().join(" ")
}
