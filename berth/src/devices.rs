//! `berth devices`: what this machine has.

use anyhow::Context;
use berth_types::Bytes;
use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// Memory of this machine.
pub(crate) fn host_memory() -> anyhow::Result<Bytes> {
    let kind = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(kind).context("reading this machine's memory: give --memory")?;
    Ok(Bytes(system.total_memory()))
}
