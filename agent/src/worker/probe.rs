//! One look at one device by a process of its own: is it on its bus, and does it compute what it should. A process,
//! because a device that is not well may take with it whoever asks.

use std::{num::NonZeroUsize, path::PathBuf};

use berth_kernels::{BackendKind, KernelError, validation};
use berth_types::{Bytes, DeviceId};

use super::{open_backend, presence::Presence};

/// What to probe.
#[derive(Clone, Debug)]
pub struct ProbeConfig {
    /// The device.
    pub device: DeviceId,
    /// What computes.
    pub backend: BackendKind,
    /// About how much of its memory is filled with patterns.
    pub memory: Bytes,
    /// Threads for computing on the CPU backend; `None` = as many as the process may use.
    pub threads: Option<NonZeroUsize>,
    /// Its address on the bus; `None` = what the device is called on its node.
    pub pci: Option<String>,
    /// Where the kernel lists PCI devices: `/sys/bus/pci/devices`.
    pub pci_devices: PathBuf,
}

/// Why a device did not pass.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Nobody answers at its address.
    #[error("{0} is not on its bus: look at its slot, reset it or reboot the node")]
    Lost(DeviceId),
    /// The backend cannot be opened.
    #[error("{device}: {cause}")]
    Backend {
        /// The device.
        device: DeviceId,
        /// What the backend said.
        cause: KernelError,
    },
    /// It computes wrong, or not at all.
    #[error("{device}: {cause}")]
    Invalid {
        /// The device.
        device: DeviceId,
        /// What was found.
        cause: validation::ValidationError,
    },
}

/// Probes a device: on its bus, patterns in memory, answers right to the bit, still on its bus.
///
/// # Errors
/// [`ProbeError`].
pub fn probe(config: &ProbeConfig) -> Result<validation::Validated, ProbeError> {
    let ProbeConfig { device, backend, memory, threads, pci, pci_devices } = config;
    let presence = Presence::watch(pci.as_deref().unwrap_or(device.local()), pci_devices);
    let present = || if presence.lost() { Err(ProbeError::Lost(device.clone())) } else { Ok(()) };
    present()?;
    let backend =
        open_backend(*backend, *threads).map_err(|cause| ProbeError::Backend { device: device.clone(), cause })?;
    let validated = validation::validate(&*backend, memory.get())
        .map_err(|cause| ProbeError::Invalid { device: device.clone(), cause })?;
    present()?;
    Ok(validated)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn config(pci: &std::path::Path) -> ProbeConfig {
        ProbeConfig {
            device: "gpu-01/0000:3b:00.0".parse().unwrap(),
            backend: BackendKind::Cpu,
            memory: Bytes(1 << 20),
            threads: NonZeroUsize::new(1),
            pci: None,
            pci_devices: pci.to_owned(),
        }
    }

    #[test]
    fn a_device_that_answers_and_computes_passes() {
        let root = tempfile::tempdir().unwrap();
        assert!(probe(&config(root.path())).unwrap().bytes >= 1 << 20, "a device that is not on PCI");
    }

    #[test]
    fn a_device_that_is_not_on_its_bus_fails() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("0000:3b:00.0");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("config"), [0xFF; 4]).unwrap();
        let error = probe(&config(root.path())).unwrap_err();
        assert!(matches!(error, ProbeError::Lost(_)), "{error}");
    }

    #[test]
    fn a_backend_that_this_machine_lacks_is_named() {
        let root = tempfile::tempdir().unwrap();
        let config = ProbeConfig { backend: BackendKind::Cuda, ..config(root.path()) };
        assert!(probe(&config).unwrap_err().to_string().contains("gpu-01/0000:3b:00.0: "));
    }
}
