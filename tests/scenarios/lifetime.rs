//! Nothing that a test starts outlives it, however it ends.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cluster::is_alive;

/// A `berth-cluster` of its own, up, with a pod that has started a daemon.
struct Up {
    child: Child,
    /// Everything it started: the control plane, the container, the container's daemon.
    descendants: Vec<i32>,
}

impl Drop for Up {
    /// A scenario that failed leaves nothing either.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn up(name: &str) -> Up {
    let mut child = Command::new(env!("CARGO_BIN_EXE_berth-cluster"))
        .args(["--name", name, "--nodes", "1", "--image", "shell=/bin/sh"])
        .env("BERTH_EXIT_ON_STDIN_EOF", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    let out = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut lines = out.lines().map(|line| line.expect("a line"));
    let config = lines.find_map(|l| Some(l.strip_prefix("export KUBECONFIG=")?.to_owned())).expect("a kubeconfig");
    let path = lines.find_map(|l| Some(l.strip_prefix("export PATH=")?.split(':').next()?.to_owned())).expect("a path");
    let kubectl = |args: &[&str]| {
        let done = Command::new(format!("{path}/kubectl")).args(args).env("KUBECONFIG", &config).status();
        assert!(done.expect("kubectl").success(), "{args:?}");
    };
    kubectl(&["run", "p", "--image=shell", "--", "-c", "setsid sleep 1000 & exec sleep 1000"]);
    kubectl(&["wait", "pod/p", "--for=condition=Ready", "--timeout=60s"]);
    let pid = i32::try_from(child.id()).expect("a pid");
    let descendants = descendants(pid);
    // etcd, API server, controller manager, scheduler, log server, runner, container, daemon
    assert!(descendants.len() >= 8, "{descendants:?}");
    Up { child, descendants }
}

/// All processes below one.
fn descendants(root: i32) -> Vec<i32> {
    let numbers = std::fs::read_dir("/proc").expect("/proc").flatten();
    let pids: Vec<i32> = numbers.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    let parent = |pid: i32| -> Option<i32> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
    };
    let mut below = vec![root];
    let mut at = 0;
    while at < below.len() {
        let children = pids.iter().filter(|pid| parent(**pid) == Some(below[at]));
        below.extend(children.copied().collect::<Vec<_>>());
        at += 1;
    }
    below.split_off(1)
}

fn wait_until_gone(pids: &[i32]) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let left: Vec<i32> = pids.iter().copied().filter(|pid| is_alive(*pid)).collect();
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "processes left: {left:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn nothing_outlives_a_parent_that_was_killed() {
    let mut up = up("killed-parent");
    up.child.kill().expect("killed");
    up.child.wait().expect("an end");
    wait_until_gone(&up.descendants);
}

#[test]
fn nothing_outlives_whoever_started_the_parent() {
    let mut up = up("orphaned-parent");
    drop(up.child.stdin.take());
    up.child.wait().expect("an end");
    wait_until_gone(&up.descendants);
}

#[test]
fn nothing_outlives_an_interrupted_parent() {
    let mut up = up("interrupted-parent");
    // Held, so that it is the signal that ends it.
    let _stdin = up.child.stdin.take();
    kill(Pid::from_raw(i32::try_from(up.child.id()).expect("a pid")), Signal::SIGINT).expect("interrupted");
    assert!(up.child.wait().expect("an end").success());
    let left: Vec<&i32> = up.descendants.iter().filter(|pid| is_alive(**pid)).collect();
    assert!(left.is_empty(), "an orderly end leaves nothing even for a moment: {left:?}");
}

#[test]
fn nothing_outlives_a_killed_container_runner() {
    let mut up = up("killed-runner");
    let _stdin = up.child.stdin.take();
    let line = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let runner = up.descendants.iter().find(|pid| line(**pid).contains("/container\0run\0")).expect("a runner");
    let inside = descendants(*runner);
    assert!(inside.len() >= 2, "{inside:?}");
    kill(Pid::from_raw(*runner), Signal::SIGKILL).expect("killed");
    wait_until_gone(&inside);
    kill(Pid::from_raw(i32::try_from(up.child.id()).expect("a pid")), Signal::SIGTERM).expect("asked");
    assert!(up.child.wait().expect("an end").success());
}
