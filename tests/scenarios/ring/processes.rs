//! The processes of the ring: which there are and what their metrics say.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use berth_tests::demo::cluster;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::Ring;

/// A worker process.
#[derive(Debug, Clone)]
pub(super) struct Worker {
    pub(super) pid: i32,
    pub(super) device: String,
}

impl Ring {
    /// Every worker of every agent.
    pub(super) fn workers(&self) -> Vec<Worker> {
        let kubelet = self.cluster.kubelet();
        let agents = kubelet
            .running()
            .into_iter()
            .filter(|(space, _, container, _)| (space.as_str(), container.as_str()) == (cluster::NAMESPACE, "agent"));
        let pids = agents.flat_map(|(space, pod, container, _)| {
            kubelet.container_pids(&space, &pod, &container).unwrap_or_default()
        });
        pids.filter_map(|pid| {
            let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
            let words: Vec<&str> = line.split('\0').collect();
            let at = words.iter().position(|word| *word == "--device")?;
            (words.get(1) == Some(&"worker")).then(|| Worker { pid, device: words[at + 1].to_owned() })
        })
        .collect()
    }

    /// Those that hold slots.
    pub(super) async fn loaded_workers(&self) -> Vec<Worker> {
        let mut loaded = Vec::new();
        for worker in self.workers() {
            if worker.ready_bytes().await.is_some_and(|bytes| bytes > 0) {
                loaded.push(worker);
            }
        }
        loaded
    }
}

impl Worker {
    /// Bytes of loaded slots, as it tells Prometheus; none while it cannot be asked.
    pub(super) async fn ready_bytes(&self) -> Option<u64> {
        for address in listening(self.pid) {
            let text = tokio::time::timeout(Duration::from_secs(2), metrics(address)).await;
            let Ok(Some(text)) = text else { continue };
            let line = text.lines().find_map(|line| line.strip_prefix("berth_worker_ready_bytes "));
            if let Some(bytes) = line.and_then(|number| number.trim().parse().ok()) {
                return Some(bytes);
            }
        }
        None
    }
}

/// Bytes that all workers hold.
pub(super) async fn ready_bytes(ring: &Ring) -> Option<u64> {
    let workers = ring.workers();
    let mut sum = 0;
    for worker in &workers {
        sum += worker.ready_bytes().await?;
    }
    (workers.len() == 4).then_some(sum)
}

async fn metrics(address: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect(address).await.ok()?;
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.ok()?;
    Some(String::from_utf8_lossy(&answer).into_owned())
}

/// The addresses at which a process takes connections.
fn listening(pid: i32) -> Vec<SocketAddr> {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let links = files.filter_map(|file| std::fs::read_link(file.path()).ok());
    let inodes: BTreeSet<String> =
        links.filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())).collect();
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    let listens = table.lines().skip(1).filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (local, state, inode) = (*words.get(1)?, *words.get(3)?, *words.get(9)?);
        (state == "0A" && inodes.contains(inode)).then_some(local)
    });
    listens
        .filter_map(|local| {
            let (address, port) = local.split_once(':')?;
            let address = u32::from_str_radix(address, 16).ok()?.to_le_bytes();
            Some(SocketAddr::from((address, u16::from_str_radix(port, 16).ok()?)))
        })
        .collect()
}

/// Sends a signal to a process that must exist.
pub(super) fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("the process");
}
