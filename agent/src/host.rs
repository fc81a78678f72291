//! What the host says of itself: boot id, memory, processors, and the accelerators that its kernel lists.

use std::{fs, io, path::Path};

use crate::health::fact::PciAddress;

/// NVIDIA's PCI vendor id, and its classes: 0x0300xx = VGA, 0x0302xx = 3D. Bridges and audio functions are no
/// accelerators.
const NVIDIA: (&str, &[&str]) = ("0x10de", &["0x0300", "0x0302"]);
/// Huawei's PCI vendor id; 0x1200xx = processing accelerators.
const ASCEND: (&str, &[&str]) = ("0x19e5", &["0x1200"]);

/// The host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Changes with every boot.
    pub boot_id: String,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Logical processors.
    pub processors: usize,
    /// Version of the kernel.
    pub kernel: String,
}

impl Host {
    /// Asks the system.
    ///
    /// # Errors
    /// When the kernel does not tell its boot id: reports could not be ordered.
    pub fn read() -> io::Result<Self> {
        let path = "/proc/sys/kernel/random/boot_id";
        let boot_id = fs::read_to_string(path)
            .map_err(|error| io::Error::new(error.kind(), format!("reading {path}: {error}")))?;
        let mut system = sysinfo::System::new().map_err(io::Error::other)?;
        system.refresh_memory();
        system.refresh_cpu_list(sysinfo::CpuRefreshKind::nothing());
        Ok(Self {
            boot_id: boot_id.trim().to_owned(),
            memory_bytes: system.total_memory(),
            processors: system.cpus().len(),
            kernel: sysinfo::System::kernel_version().unwrap_or_default(),
        })
    }
}

/// Milliseconds since boot, suspended time included: rises over restarts of this process.
///
/// # Errors
/// When /proc cannot be read.
pub fn uptime_ms() -> io::Result<u64> {
    let path = "/proc/uptime";
    let text = fs::read_to_string(path)?;
    let digits: String = text.split(' ').next().unwrap_or_default().chars().filter(|c| *c != '.').collect();
    // Two digits after the point: hundredths of a second.
    let hundredths: u64 = digits.parse().map_err(|_| io::Error::other(format!("{path} holds {text:?}")))?;
    Ok(hundredths.saturating_mul(10))
}

/// NVIDIA's display and 3D controllers under `root` (`/sys/bus/pci/devices`). A host without PCI has none.
#[must_use]
pub fn nvidia_devices(root: &Path) -> Vec<PciAddress> {
    pci_devices(root, NVIDIA)
}

/// Ascend's processing accelerators under `root`.
#[must_use]
pub fn ascend_devices(root: &Path) -> Vec<PciAddress> {
    pci_devices(root, ASCEND)
}

fn pci_devices(root: &Path, (vendor, classes): (&str, &[&str])) -> Vec<PciAddress> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let line = |path: &Path| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let mut found: Vec<PciAddress> = entries
        .filter_map(Result::ok)
        .filter(|entry| line(&entry.path().join("vendor")) == vendor)
        .filter(|entry| {
            let class = line(&entry.path().join("class"));
            classes.iter().any(|known| class.starts_with(known))
        })
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_tells_its_boot_and_its_size() {
        let host = Host::read().unwrap();
        assert!(host.boot_id.len() >= 32 && host.memory_bytes > 0 && host.processors > 0, "{host:?}");
    }

    #[test]
    fn only_accelerators_of_the_vendor_are_devices() {
        let root = tempfile::tempdir().unwrap();
        for (name, vendor, class) in [
            ("0000:3b:00.0", "0x10de", "0x030200"),
            ("0000:3b:00.1", "0x10de", "0x040300"),
            ("0000:05:00.0", "0x10de", "0x068000"),
            ("0000:00:02.0", "0x8086", "0x030000"),
            ("0000:c1:00.0", "0x19e5", "0x120000"),
            ("0000:06:00.0", "0x19e5", "0x030000"),
        ] {
            let folder = root.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("vendor"), format!("{vendor}\n")).unwrap();
            fs::write(folder.join("class"), format!("{class}\n")).unwrap();
        }
        assert_eq!(nvidia_devices(root.path()), vec!["0000:3b:00.0".parse().unwrap()]);
        assert_eq!(ascend_devices(root.path()), vec!["0000:c1:00.0".parse().unwrap()]);
        assert!(nvidia_devices(Path::new("/nonexistent")).is_empty());
    }
}
