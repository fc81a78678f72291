//! `berth worker`: one device's process. Started by a supervisor (the agent, `berth generate`), not by
//! people: it ends when its standard input does.

use std::{net::SocketAddr, num::NonZeroUsize, path::PathBuf, time::Duration};

use anyhow::Context;
use berth_agent::worker::{self, Config};
use berth_kernels::{BackendKind, Roots};
use berth_runtime::shutdown;
use berth_types::{Bytes, DeviceId};

use crate::{telemetry, verdict::Verdict};

/// Holds the experts of one device and answers calls on them.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The device, <node>/<PCI address> or <node>/<card>.<device>
    #[arg(long, env = "BERTH_DEVICE")]
    device: DeviceId,
    /// What computes: cpu, cuda or ascend
    #[arg(long, env = "BERTH_BACKEND", default_value = "cpu")]
    backend: BackendKind,
    /// Where to serve; port 0 takes a free one
    #[arg(long, env = "BERTH_LISTEN", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Where to serve metrics and probes; port 0 takes a free one
    #[arg(long, env = "BERTH_ADMIN_LISTEN", default_value = "127.0.0.1:0")]
    admin: SocketAddr,
    /// Memory of the device, for example 80GB; 92 % of it less the workspace may hold weights
    #[arg(long, env = "BERTH_MEMORY")]
    memory: Bytes,
    /// Folders that weights may be read from, separated by colons
    #[arg(long, env = "BERTH_WEIGHTS_ROOTS", value_delimiter = ':', required = true)]
    weights_roots: Vec<PathBuf>,
    /// Threads for loading and, with the cpu backend, for computing; default: all cores
    #[arg(long, env = "BERTH_THREADS")]
    threads: Option<NonZeroUsize>,
    /// Longest time a call may take, in milliseconds
    #[arg(long, env = "BERTH_CALL_LIMIT_MS", default_value_t = 30_000)]
    call_limit_ms: u64,
    /// Its address on the bus; default: what the device is called on its node
    #[arg(long)]
    pci: Option<String>,
    /// Where the kernel lists PCI devices
    #[arg(long, env = "BERTH_PCI_DEVICES", default_value = "/sys/bus/pci/devices")]
    pci_devices: PathBuf,
    /// What to log: error, warn, info, debug or a filter per module
    #[arg(long, env = "BERTH_LOG", default_value = "info")]
    log: String,
}

/// Runs until the supervisor is gone or a signal comes.
pub(crate) fn run(args: Args) -> anyhow::Result<Verdict> {
    let Args { device, backend, listen, admin, memory, weights_roots, threads, call_limit_ms, pci, pci_devices, log } =
        args;
    let names = vec![("node", device.node().to_owned()), ("device", device.to_string())];
    telemetry::begin("worker", names, &log)?;
    let roots = Roots::new(&weights_roots).context("--weights-roots")?;
    let call_limit = Duration::from_millis(call_limit_ms);
    let config = Config { device, backend, listen, admin, memory, roots, threads, call_limit, pci, pci_devices };
    // Two threads: one reads the network while the other answers the supervisor.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let stop = shutdown::on_signals()?;
        worker::run(config, stop).await.map_err(anyhow::Error::from)
    })?;
    Ok(Verdict::Pass)
}
