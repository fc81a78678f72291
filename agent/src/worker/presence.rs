//! Whether the device is still on its bus, asked around every call: one read of two bytes of its PCI
//! configuration space, some microseconds. A device that fell off answers every read with ones (PCI Express Base
//! Specification, completion timeouts), or its file is gone. So a caller hears of the loss with its next call,
//! before the driver has said a word.
//!
//! It judges nothing else, and a device without such a file (not on PCI, or a machine without it) is taken as present.

use std::{fs::File, os::unix::fs::FileExt, path::Path};

/// What the vendor id reads as when nobody answers.
const NOBODY: [u8; 2] = [0xFF, 0xFF];

/// The device's configuration space, when it could be read at the start.
#[derive(Debug, Default)]
pub(crate) struct Presence {
    config: Option<File>,
}

impl Presence {
    /// Watches the device at `address` below `root` (`/sys/bus/pci/devices`).
    #[must_use]
    pub(crate) fn of(address: &str, root: &Path) -> Self {
        let watched = Self::watch(address, root);
        // A file that never told a vendor tells nothing later either.
        if watched.lost() { Self::default() } else { watched }
    }

    /// The same, with a file that tells no vendor taken at its word.
    #[must_use]
    pub(crate) fn watch(address: &str, root: &Path) -> Self {
        Self { config: File::open(root.join(address).join("config")).ok() }
    }

    /// Whether the device has left its bus.
    #[must_use]
    pub(crate) fn lost(&self) -> bool {
        let Some(config) = &self.config else { return false };
        let mut vendor = NOBODY;
        config.read_exact_at(&mut vendor, 0).is_err() || vendor == NOBODY
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const ADDRESS: &str = "0000:3b:00.0";

    #[test]
    fn a_device_that_answers_with_ones_is_lost() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join(ADDRESS);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("config"), [0xDE, 0x10, 0x30, 0x23]).unwrap();
        let presence = Presence::of(ADDRESS, root.path());
        assert!(!presence.lost());
        fs::write(folder.join("config"), [0xFF; 4]).unwrap();
        assert!(presence.lost());
    }

    #[test]
    fn a_device_without_a_file_is_present() {
        let root = tempfile::tempdir().unwrap();
        assert!(!Presence::of(ADDRESS, root.path()).lost());
    }
}
