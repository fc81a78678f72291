//! A child process that cannot outlive this one. Its standard input is a pipe that only this process holds the
//! other end of: the kernel closes it when this process ends, be it by kill -9, and the child (made for it, see
//! `tests/cluster`) ends itself. Must never be used for a program that does not watch its standard input.
//!
//! A parent-death signal is not used: it is sent when the *thread* that started the child ends.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Error, Result};

/// Tells `cluster` and `berth-cluster` to end when their standard input closes.
pub const EXIT_ON_STDIN_EOF: &str = "BERTH_EXIT_ON_STDIN_EOF";

/// A running child; killed when dropped.
#[derive(Debug)]
pub struct TiedProcess {
    name: String,
    child: Child,
    log: PathBuf,
}

impl TiedProcess {
    /// Starts `command` in a process group of its own (a Ctrl-C is for its parent), with `<dir>/<name>.log`
    /// for its output and its pid in `<dir>/<name>.pid`.
    ///
    /// # Errors
    /// When the program cannot be started or the files cannot be written.
    pub fn spawn(name: &str, mut command: Command, dir: &Path) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let out = File::options().create(true).append(true).open(&log).map_err(Error::file("open", &log))?;
        let err = out.try_clone().map_err(Error::file("open", &log))?;
        let child = command
            .env(EXIT_ON_STDIN_EOF, "1")
            .stdin(Stdio::piped())
            .stdout(out)
            .stderr(err)
            .process_group(0)
            .spawn()
            .map_err(|source| Error::Start { program: name.into(), source })?;
        let process = Self { name: name.into(), child, log };
        let pid_file = dir.join(format!("{name}.pid"));
        fs::write(&pid_file, process.pid().to_string()).map_err(Error::file("write", &pid_file))?;
        Ok(process)
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The last lines of its log, for an error message.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join("\n")
    }

    /// True once it has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Asks it to end, waits up to `grace`, then kills it.
    pub fn stop(mut self, grace: Duration) {
        if let Ok(pid) = i32::try_from(self.pid()) {
            // It may have ended by itself.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let deadline = Instant::now() + grace;
        while !self.has_ended() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for TiedProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
