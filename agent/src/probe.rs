//! Validation of devices that may have come back: one probe process per device, one at a time, under a deadline. Its
//! outcome is a fact for the ledger, which alone decides what it means and when a device is due.

use std::{path::PathBuf, process::Stdio, sync::Arc, time::Duration};

use berth_runtime::Clock;
use berth_types::{DeviceId, NodeName};
use tokio::{
    process::Command,
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;

use crate::{
    health::fact::{Fact, Local, What},
    node::Snapshot,
    vendor::{Facts, Seen},
    workers::WorkerConfig,
};

/// A probe that has not ended by then has failed.
const LIMIT: Duration = Duration::from_secs(60);

/// Probes devices.
#[derive(Debug)]
pub struct Prober {
    /// Time.
    pub clock: Clock,
    /// This node.
    pub node: NodeName,
    /// How workers are started: a probe computes on the same.
    pub worker: WorkerConfig,
    /// Where the kernel lists PCI devices.
    pub pci_devices: PathBuf,
    /// What is known of the devices.
    pub snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    /// Devices that are due.
    pub due: mpsc::Receiver<Local>,
    /// Where outcomes are told.
    pub facts: Facts,
}

impl Prober {
    /// Probes what is due until `stop` is cancelled; a probe that runs then is ended.
    pub async fn run(mut self, stop: CancellationToken) {
        loop {
            // Cancel-safe: `recv` loses nothing.
            let local = tokio::select! {
                () = stop.cancelled() => return,
                due = self.due.recv() => match due {
                    Some(local) => local,
                    None => return,
                },
            };
            let Ok(device) = DeviceId::new(&self.node, &local) else { continue };
            // Cancel-safe: a probe that is dropped is killed, and the ledger asks again after a restart.
            let outcome = tokio::select! {
                () = stop.cancelled() => return,
                outcome = self.probe(&device, &local) => outcome,
            };
            match &outcome {
                Ok(()) => tracing::info!(%device, "validated"),
                Err(why) => tracing::warn!(%device, why, "validation failed"),
            }
            let fact = Fact::device(local, What::Validated(outcome.is_ok()));
            self.facts.send(Seen::Fact(fact), None).await;
        }
    }

    async fn probe(&self, device: &DeviceId, local: &str) -> Result<(), String> {
        let snapshot = self.snapshots.borrow().clone();
        let pci = snapshot.and_then(|snapshot| snapshot.devices.get(local)?.info.pci);
        let child = Command::new(&self.worker.program)
            .arg("probe")
            .args(["--device", device.as_str()])
            .args(["--backend", &self.worker.backend.to_string()])
            .arg("--pci-devices")
            .arg(&self.pci_devices)
            .args(pci.map(|pci| format!("--pci={pci}")))
            .args(self.worker.threads.map(|threads| format!("--threads={threads}")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("starting {}: {error}", self.worker.program.display()))?;
        match self.clock.timeout(LIMIT, child.wait_with_output()).await {
            Ok(Ok(output)) if output.status.success() => Ok(()),
            Ok(Ok(output)) => Err(format!("{}: {}", output.status, last_line(&output.stderr))),
            Ok(Err(error)) => Err(error.to_string()),
            Err(elapsed) => Err(elapsed.to_string()),
        }
    }
}

/// What a probe said last, cut short.
fn last_line(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().chars().take(400).collect()
}
