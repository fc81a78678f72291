//! One device's worker: started, watched, ended. It is started again when it dies, with growing pauses;
//! its death, and that it will not die, are facts for the ledger.

use std::{
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use berth_proto::{
    MESSAGE_LIMIT,
    v1::{WorkerOrder, WorkerPhase, WorkerReport, worker_client::WorkerClient},
};
use berth_runtime::Clock;
use berth_types::{Admission, DeviceId};
use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, ChildStdin, Command},
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use crate::{
    health::fact::{Fact, Local, PciAddress, What},
    metrics::Metrics,
    node::Snapshot,
    orders::Desired,
    vendor::{Facts, Seen},
    workers::{View, WorkerConfig, WorkerView},
};

/// A worker says where it serves within this.
const START_LIMIT: Duration = Duration::from_secs(20);
/// A worker that was asked to end does so within this, then it is killed.
const END_LIMIT: Duration = Duration::from_secs(5);
/// A killed worker is gone within this, or its device is Barred.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// A worker is asked so often whether it is alive, and answers within [`ALIVE_LIMIT`] or is ended: its process may
/// be there and do nothing.
const ALIVE_EVERY: Duration = Duration::from_secs(5);
/// See [`ALIVE_EVERY`]. Long enough for a machine that is busy loading.
const ALIVE_LIMIT: Duration = Duration::from_secs(15);
/// First pause before a worker is started again; it doubles up to [`PAUSE_MOST`].
const PAUSE_FIRST: Duration = Duration::from_millis(200);
/// See [`PAUSE_FIRST`].
const PAUSE_MOST: Duration = Duration::from_secs(10);
/// A worker that lived so long starts the pauses anew.
const SOUND: Duration = Duration::from_secs(60);

/// Tends one worker.
#[derive(Debug)]
pub struct Tender {
    /// Time.
    pub clock: Clock,
    /// The device.
    pub device: DeviceId,
    /// Its local id.
    pub local: Local,
    /// Bytes the worker may take.
    pub memory: u64,
    /// Its address on the bus, where that is known.
    pub pci: Option<PciAddress>,
    /// How it is started.
    pub config: WorkerConfig,
    /// Health of the devices.
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    /// What the scheduler wants.
    pub desired: watch::Receiver<Arc<Desired>>,
    /// Where its death is told.
    pub facts: Facts,
    /// Where what it does is shown.
    pub view: watch::Sender<View>,
    /// Counts.
    pub metrics: Metrics,
}

/// Why a worker could not be used.
#[derive(Debug, thiserror::Error)]
enum TendError {
    #[error("starting {program}: {source}")]
    Spawn { program: String, source: std::io::Error },
    #[error("worker told no endpoint: {0}")]
    Silent(String),
    #[error("connecting to the worker at {endpoint}: {source}")]
    Connect { endpoint: String, source: tonic::transport::Error },
    #[error("worker's stream: {0}")]
    Stream(#[from] tonic::Status),
    #[error("worker {0}")]
    Exited(String),
}

#[derive(Deserialize)]
struct Announcement {
    endpoint: String,
}

/// A worker process. Its standard input is its lifeline: it ends when we let go.
struct Process {
    child: Child,
    lifeline: Option<ChildStdin>,
    endpoint: String,
    instance: u64,
}

impl Tender {
    /// Tends until `ends` is cancelled.
    pub async fn run(mut self, ends: CancellationToken) {
        let mut pause = PAUSE_FIRST;
        while !ends.is_cancelled() {
            let born = self.clock.now();
            let error = match self.live(&ends).await {
                Ok(()) => break,
                Err(error) => error.to_string(),
            };
            self.show(WorkerPhase::Dead, None, Vec::new());
            self.metrics.worker_gone(&self.local);
            self.metrics.worker_deaths.inc();
            tracing::warn!(device = %self.device, error, "worker lost");
            self.facts.send(Seen::Fact(Fact::device(self.local.clone(), What::WorkerDied(error))), None).await;
            if self.clock.now().saturating_sub(born) >= SOUND {
                pause = PAUSE_FIRST;
            }
            // Both arms only wait.
            tokio::select! {
                () = ends.cancelled() => break,
                () = self.clock.sleep(pause) => {}
            }
            pause = pause.saturating_mul(2).min(PAUSE_MOST);
        }
    }

    /// One life of the worker, from start to end. `Ok` = it was ended because we wanted it.
    async fn live(&mut self, ends: &CancellationToken) -> Result<(), TendError> {
        self.show(WorkerPhase::Starting, None, Vec::new());
        let mut process = self.start().await?;
        let lived = self.supervise(&mut process, ends).await;
        process.lifeline = None;
        self.end(process.child).await;
        lived
    }

    async fn start(&self) -> Result<Process, TendError> {
        let mut child = self
            .command()
            .spawn()
            .map_err(|source| TendError::Spawn { program: self.config.program.display().to_string(), source })?;
        let lifeline = child.stdin.take();
        let stdout = child.stdout.take();
        let mut lines = stdout.map(|stdout| BufReader::new(stdout).lines());
        let first = async {
            match &mut lines {
                Some(lines) => lines.next_line().await.ok().flatten(),
                None => None,
            }
        };
        let line = self.clock.timeout(START_LIMIT, first).await;
        let told = match line {
            Ok(Some(line)) => serde_json::from_str::<Announcement>(&line).map_err(|error| format!("{error}: {line}")),
            Ok(None) => Err(match self.clock.timeout(KILL_LIMIT, child.wait()).await {
                Ok(Ok(status)) => describe(status),
                _ => "closed its output".to_owned(),
            }),
            Err(elapsed) => Err(elapsed.to_string()),
        };
        match told {
            Ok(Announcement { endpoint }) => {
                let instance = self.clock.unix_ms();
                Ok(Process { child, lifeline, endpoint, instance })
            }
            Err(why) => {
                self.end(child).await;
                Err(TendError::Silent(why))
            }
        }
    }

    fn command(&self) -> Command {
        let roots: Vec<String> = self.config.roots.iter().map(|root| root.display().to_string()).collect();
        let address = std::net::SocketAddr::new(self.config.address, 0).to_string();
        let mut command = Command::new(&self.config.program);
        command
            .arg("worker")
            .args(["--device", self.device.as_str()])
            .args(["--backend", &self.config.backend.to_string()])
            .args(["--listen", &address, "--admin", &address])
            .args(["--memory", &self.memory.to_string()])
            .args(["--weights-roots", &roots.join(":")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        if let Some(pci) = self.pci {
            command.args(["--pci", &pci.to_string()]);
        }
        if let Some(threads) = self.config.threads {
            command.args(["--threads", &threads.to_string()]);
        }
        command
    }

    /// Gives orders and takes reports until the worker ends or must.
    async fn supervise(&mut self, process: &mut Process, ends: &CancellationToken) -> Result<(), TendError> {
        let endpoint = process.endpoint.clone();
        let connect = |source| TendError::Connect { endpoint: endpoint.clone(), source };
        let channel = Endpoint::from_shared(format!("http://{endpoint}"))
            .map_err(connect)?
            .connect_timeout(KILL_LIMIT)
            .http2_keep_alive_interval(ALIVE_EVERY)
            .keep_alive_timeout(ALIVE_LIMIT)
            .tcp_nodelay(true)
            .connect()
            .await
            .map_err(connect)?;
        let mut client = WorkerClient::new(channel)
            .max_decoding_message_size(MESSAGE_LIMIT)
            .max_encoding_message_size(MESSAGE_LIMIT);
        let (down, outgoing) = mpsc::channel(4);
        let mut order = self.order();
        let _ = down.try_send(order.clone());
        let mut reports = client.supervise(ReceiverStream::new(outgoing)).await?.into_inner();
        self.show(WorkerPhase::Serving, Some(process), Vec::new());
        loop {
            // Cancel-safe: `changed` and `cancelled` only look; `message` keeps a partial one in the
            // stream; `wait` may be asked again.
            tokio::select! {
                biased;
                () = ends.cancelled() => return Ok(()),
                changed = self.snapshots.changed() => if changed.is_err() { return Ok(()) },
                changed = self.desired.changed() => if changed.is_err() { return Ok(()) },
                report = reports.message() => match report? {
                    Some(report) => {
                        self.metrics.worker(&self.local, &report);
                        let WorkerReport { shelves, .. } = report;
                        self.show(WorkerPhase::Serving, Some(process), shelves);
                        continue;
                    }
                    None => return Err(self.exited(process).await),
                },
                status = process.child.wait() => {
                    return Err(TendError::Exited(status.map_or_else(|error| error.to_string(), describe)));
                }
            }
            let next = self.order();
            if next != order {
                order = next.clone();
                if down.send(next).await.is_err() {
                    return Err(self.exited(process).await);
                }
            }
        }
    }

    /// The stream ended: most likely because the process did.
    async fn exited(&self, process: &mut Process) -> TendError {
        match self.clock.timeout(KILL_LIMIT, process.child.wait()).await {
            Ok(Ok(status)) => TendError::Exited(describe(status)),
            _ => TendError::Exited("ended its stream".to_owned()),
        }
    }

    /// What the worker must hold, and whether its device is barred.
    fn order(&mut self) -> WorkerOrder {
        let shelves = self.desired.borrow_and_update().get(&self.local).cloned().unwrap_or_default();
        let snapshot = self.snapshots.borrow_and_update().clone();
        let standing = snapshot.as_ref().and_then(|snapshot| snapshot.devices.get(&self.local));
        let barred = standing.filter(|shown| shown.standing.state.admission == Admission::Barred);
        let reason = barred.and_then(|shown| shown.standing.state.reason);
        WorkerOrder {
            shelves,
            barred: barred.is_some(),
            barred_reason: reason.map(|reason| reason.as_str().to_owned()).unwrap_or_default(),
        }
    }

    fn show(&self, phase: WorkerPhase, process: Option<&Process>, shelves: Vec<berth_proto::v1::ShelfState>) {
        let view = WorkerView {
            phase,
            endpoint: process.map(|process| process.endpoint.clone()).unwrap_or_default(),
            memory_bytes: self.memory,
            shelves,
            instance: process.map_or(0, |process| process.instance),
        };
        self.view.send_if_modified(|all| {
            let before = all.clone();
            all.set(&self.device, view);
            *all != before
        });
    }

    /// Waits for the process to end, kills it when it does not, and says so when even that fails: a new
    /// worker never shares the device with an old one.
    async fn end(&self, mut child: Child) {
        if self.clock.timeout(END_LIMIT, child.wait()).await.is_ok() {
            return;
        }
        let _ = child.start_kill();
        if self.clock.timeout(KILL_LIMIT, child.wait()).await.is_ok() {
            return;
        }
        let how = format!("worker process {} does not end", child.id().unwrap_or(0));
        tracing::error!(device = %self.device, how, "the device is barred");
        let stuck = What::WorkerStuck(Some(how));
        self.facts.send(Seen::Fact(Fact::device(self.local.clone(), stuck)), None).await;
        let _ = child.wait().await;
        self.facts.send(Seen::Fact(Fact::device(self.local.clone(), What::WorkerStuck(None))), None).await;
    }
}

fn describe(status: ExitStatus) -> String {
    format!("ended: {status}")
}
