//! A fault that takes no device away: it goes on answering, and only a reset makes it well.

use std::fs;
use std::path::Path;
use std::time::Duration;

use berth_types::{DeviceId, Vendor};
use serde_json::json;

use super::{DeviceNode, SimulatedDevice, append};
use crate::{Error, Result};

/// NVIDIA's recovery action (field 230) of a device that is to be drained and reset.
const DRAIN_AND_RESET: u32 = 4;

impl DeviceNode {
    /// A fault of a device that only a reset ends, with what is reset along with it.
    pub(in crate::demo) fn reset_fault_of(&self, device: &DeviceId, code: &str) -> Option<ResetFault> {
        let along = self.loss_of(device)?;
        let at = along.ids.iter().position(|id| id == device)?;
        let faulty = along.lost.get(at)?.clone();
        Some(ResetFault { node: along.node, faulty, device: device.clone(), members: along.ids, code: code.to_owned() })
    }
}

/// A fault of a device that goes on answering: data of it was lost, or a unit of it failed, and only a reset ends that.
#[derive(Clone, Debug)]
pub struct ResetFault {
    node: DeviceNode,
    faulty: SimulatedDevice,
    device: DeviceId,
    members: Vec<DeviceId>,
    code: String,
}

impl ResetFault {
    /// The device that has it.
    #[must_use]
    pub const fn device(&self) -> &DeviceId {
        &self.device
    }

    /// What is reset together, the device with the fault included.
    #[must_use]
    pub fn members(&self) -> &[DeviceId] {
        &self.members
    }

    /// Its vendor.
    #[must_use]
    pub const fn vendor(&self) -> Vendor {
        self.node.vendor
    }

    /// The vendor's code, in its own spelling.
    #[must_use]
    pub fn code(&self) -> String {
        match self.node.vendor {
            Vendor::Nvidia => format!("Xid {}", self.code),
            Vendor::Ascend => self.code.clone(),
        }
    }

    /// It happens: NVIDIA's driver writes the Xid into the kernel log and wants the device drained and reset, Ascend's
    /// tells the code by an event and lists it until the reset.
    ///
    /// # Errors
    /// When the node's files cannot be written.
    pub fn happen(&self) -> Result<()> {
        let (node, id) = (&self.node, &self.faulty.script_id);
        let line = match node.vendor {
            Vendor::Nvidia => {
                let (slot, code) = (self.faulty.pci.trim_end_matches(".0"), &self.code);
                let uptime = uptime()?;
                let (number, time) = (uptime.as_millis(), uptime.as_micros());
                let record = format!(
                    "4,{number},{time},-;NVRM: Xid (PCI:{slot}): {code}, pid='<unknown>', name=<unknown>, {}\n",
                    said(code)
                );
                append(&node.kmsg, &record)?;
                json!({"nvml": id, "set": {"fields": {"230": DRAIN_AND_RESET}}})
            }
            Vendor::Ascend => json!({
                "dcmi": id, "set": {"health": 1, "error_codes": [self.code]},
                "fault": {"id": self.code, "assertion": "occur", "severity": 1},
            }),
        };
        append(&node.script, &format!("{line}\n"))
    }

    /// Lets every reset on its node take so long from now on.
    ///
    /// # Errors
    /// When the node's files cannot be written.
    pub fn resets_take(&self, ms: u64) -> Result<()> {
        match self.node.vendor {
            Vendor::Nvidia => {
                let path = self.node.beside_script("hang");
                fs::write(&path, ms.to_string()).map_err(Error::file("write", &path))
            }
            Vendor::Ascend => {
                let hang = json!({"dcmi": self.faulty.script_id, "set": {"hang_ms": {"dcmi_set_device_reset": ms}}});
                append(&self.node.script, &format!("{hang}\n"))
            }
        }
    }

    /// Resets that the double of the vendor's call was asked for on its node, one line each, with why it refused.
    #[must_use]
    pub fn resets(&self) -> Vec<String> {
        let text = fs::read_to_string(self.node.beside_script("resets")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

/// Since this machine booted, as the kernel log tells time.
fn uptime() -> Result<Duration> {
    let path = Path::new("/proc/uptime");
    let text = fs::read_to_string(path).map_err(Error::file("read", path))?;
    let seconds = text.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0.0);
    Ok(Duration::from_secs_f64(seconds))
}

/// What the driver says beside an Xid.
fn said(xid: &str) -> &'static str {
    match xid {
        "46" => "GPU stopped processing",
        "48" => "DBE (double bit error) ECC Error",
        _ => "a reset is required",
    }
}
