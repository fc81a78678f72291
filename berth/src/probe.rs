//! `berth probe`: one device, checked once: is it on its bus, does it hold patterns, does it compute what it should to
//! the bit. An agent starts it before a device that had a fault is used again; people may too.

use std::{io::Write, num::NonZeroUsize, path::PathBuf};

use berth_agent::worker::{ProbeConfig, ProbeError, probe};
use berth_kernels::BackendKind;
use berth_types::{Bytes, DeviceId};

use crate::verdict::Verdict;

/// Fills memory of a device with patterns and compares what it computes with them bit for bit.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The device, <node>/<PCI address> or <node>/<card>.<device>
    #[arg(long, env = "BERTH_DEVICE")]
    device: DeviceId,
    /// What computes: cpu, cuda or ascend
    #[arg(long, env = "BERTH_BACKEND", default_value = "cpu")]
    backend: BackendKind,
    /// About how much of its memory is filled with patterns, for example 64MB
    #[arg(long, default_value = "32MB")]
    memory: Bytes,
    /// Threads, with the cpu backend; default: all cores
    #[arg(long, env = "BERTH_THREADS")]
    threads: Option<NonZeroUsize>,
    /// Its address on the bus; default: what the device is called on its node
    #[arg(long)]
    pci: Option<String>,
    /// Where the kernel lists PCI devices
    #[arg(long, env = "BERTH_PCI_DEVICES", default_value = "/sys/bus/pci/devices")]
    pci_devices: PathBuf,
}

/// Probes once.
pub(crate) fn run(args: Args) -> anyhow::Result<Verdict> {
    let Args { device, backend, memory, threads, pci, pci_devices } = args;
    let config = ProbeConfig { device, backend, memory, threads, pci, pci_devices };
    match probe(&config) {
        Ok(validated) => {
            let line = format!(
                "{}: {} patterns, {} bytes, every bit right",
                config.device, validated.experts, validated.bytes
            );
            writeln!(std::io::stdout(), "{line}")?;
            Ok(Verdict::Pass)
        }
        // It could not look: that says nothing about the device.
        Err(error @ ProbeError::Backend { .. }) => Err(error.into()),
        Err(error) => {
            // A closed pipe changes nothing about the device.
            let _ = writeln!(std::io::stderr(), "berth: {error}");
            Ok(Verdict::Fail)
        }
    }
}
