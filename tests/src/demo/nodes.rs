//! The demo's simulated nodes, of both vendors: the files that a real node's kernel and vendor library would be. Faults
//! are what a real node shows: a device that answers reads with ones, and then what its driver says.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use berth_types::{DeviceId, Vendor};
use serde_json::{Value, json};

use super::cluster::built;
use crate::process_kubelet::SimulatedNode;
use crate::{Error, Result};

mod reset_fault;

pub use reset_fault::ResetFault;

/// Memory of each simulated NVIDIA device, bytes.
const H100_BYTES: u64 = 85_899_345_920;
/// Memory of each simulated Ascend device, bytes: a card has two.
const ASCEND_BYTES: u64 = 68_719_476_736;
/// Calls that a card off its bus does not answer; no reset in band brings it back.
const CARD_CALLS: [&str; 3] = ["dcmi_get_device_health", "dcmi_get_device_errorcode_v2", "dcmi_set_device_reset"];
/// How the configuration space of a device that left its bus begins.
const ABSENT: &[u8] = &[0xFF; 4];

/// How many nodes of each vendor there are. Each has two devices: two GPUs, or one card of two NPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fleet {
    /// NVIDIA nodes: gpu-01, …
    pub nvidia: usize,
    /// Ascend nodes: npu-01, …
    pub ascend: usize,
}

impl Fleet {
    /// Two of each.
    pub const BOTH: Self = Self { nvidia: 2, ascend: 2 };
    /// Two NVIDIA nodes.
    pub const NVIDIA: Self = Self { nvidia: 2, ascend: 0 };

    /// Nodes of both vendors.
    #[must_use]
    pub const fn len(self) -> usize {
        self.nvidia + self.ascend
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len() == 0
    }

    pub(super) fn nodes(self, folder: &Path) -> Result<Vec<DeviceNode>> {
        let nvidia = (1..=self.nvidia).map(|number| (Vendor::Nvidia, number));
        let ascend = (1..=self.ascend).map(|number| (Vendor::Ascend, number));
        nvidia.chain(ascend).map(|(vendor, number)| DeviceNode::make(folder, vendor, number)).collect()
    }
}

/// One simulated device.
#[derive(Clone, Debug)]
struct SimulatedDevice {
    /// Its id on its node.
    local: String,
    /// Its address on the bus.
    pci: String,
    /// What it is lost together with.
    card: usize,
    /// How the driver's fault script calls it.
    script_id: Value,
}

/// One simulated node and its files.
#[derive(Clone, Debug)]
pub(super) struct DeviceNode {
    name: String,
    vendor: Vendor,
    devices: Vec<SimulatedDevice>,
    kmsg: PathBuf,
    script: PathBuf,
    /// What `/sys/bus/pci/devices` is on a real node.
    pci: PathBuf,
}

impl DeviceNode {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Makes the files of node `number`: an empty kernel log, the devices on the bus, and the script of its library.
    fn make(folder: &Path, vendor: Vendor, number: usize) -> Result<Self> {
        let (name, devices) = match vendor {
            Vendor::Nvidia => (format!("gpu-{number:02}"), gpus().to_vec()),
            Vendor::Ascend => (format!("npu-{number:02}"), npus().to_vec()),
        };
        let file = |ending: &str| folder.join(format!("{name}.{ending}"));
        let (kmsg, script, pci) = (file("kmsg"), file("jsonl"), file("pci"));
        File::create(&kmsg).map_err(Error::file("create", &kmsg))?;
        let header = match vendor {
            Vendor::Nvidia => nvidia_header(&name, number, &devices),
            Vendor::Ascend => ascend_header(&name, number, &devices),
        };
        fs::write(&script, format!("{header}\n")).map_err(Error::file("write", &script))?;
        let node = Self { name, vendor, devices, kmsg, script, pci };
        node.devices.iter().try_for_each(|device| node.plug(device))?;
        Ok(node)
    }

    /// Puts a device on the bus.
    fn plug(&self, device: &SimulatedDevice) -> Result<()> {
        let (vendor, class): (&[u8], &[u8]) = match self.vendor {
            Vendor::Nvidia => (b"0x10de\n", b"0x030200\n"),
            Vendor::Ascend => (b"0x19e5\n", b"0x120000\n"),
        };
        let folder = self.pci.join(&device.pci);
        fs::create_dir_all(&folder).map_err(Error::file("make", &folder))?;
        for (file, content) in [("vendor", vendor), ("class", class), ("config", self.present())] {
            let path = folder.join(file);
            fs::write(&path, content).map_err(Error::file("write", &path))?;
        }
        Ok(())
    }

    fn beside_script(&self, ending: &str) -> PathBuf {
        PathBuf::from(format!("{}.{ending}", self.script.display()))
    }

    /// How the configuration space of a device begins: vendor and device.
    const fn present(&self) -> &'static [u8] {
        match self.vendor {
            Vendor::Nvidia => &[0xDE, 0x10, 0x30, 0x23],
            Vendor::Ascend => &[0xE5, 0x19, 0x03, 0xD8],
        }
    }

    /// The node for the process kubelet, with the double of its vendor's library.
    pub(super) fn simulated(&self) -> Result<SimulatedNode> {
        let path = |path: &Path| path.display().to_string();
        let (label, variable, double) = match self.vendor {
            Vendor::Nvidia => (("nvidia.com/gpu.present", "true"), "BERTH_NVML_LIBRARY", "libberth_double_nvml.so"),
            Vendor::Ascend => (("accelerator", "huawei-Ascend910"), "BERTH_DCMI_LIBRARY", "libberth_double_dcmi.so"),
        };
        let double = built(double)?;
        Ok(SimulatedNode {
            labels: BTreeMap::from(
                [("berth.dev/mode", "native"), label].map(|(key, value)| (key.into(), value.into())),
            ),
            env: BTreeMap::from([
                (variable.to_owned(), path(&double)),
                ("BERTH_DOUBLE_SCRIPT".to_owned(), path(&self.script)),
                ("BERTH_KMSG".to_owned(), path(&self.kmsg)),
                ("BERTH_PCI_DEVICES".to_owned(), path(&self.pci)),
                ("BERTH_WORKER_THREADS".to_owned(), "1".to_owned()),
            ]),
            ..SimulatedNode::named(&self.name)
        })
    }

    /// The loss of a device and of all that is on its card.
    pub(super) fn loss_of(&self, device: &DeviceId) -> Option<Loss> {
        let card = self.devices.iter().find(|known| known.local == device.local())?.card;
        let lost: Vec<_> = self.devices.iter().filter(|known| known.card == card).cloned().collect();
        let ids = lost.iter().filter_map(|known| format!("{}/{}", self.name, known.local).parse().ok()).collect();
        Some(Loss { node: self.clone(), lost, ids })
    }
}

fn gpus() -> [SimulatedDevice; 2] {
    let gpu = |(card, pci): (usize, &str)| SimulatedDevice {
        local: pci.to_owned(),
        pci: pci.to_owned(),
        card,
        script_id: json!(pci),
    };
    [(0, "0000:3b:00.0"), (1, "0000:5e:00.0")].map(gpu)
}

fn npus() -> [SimulatedDevice; 2] {
    let npu = |(device, pci): (usize, &str)| SimulatedDevice {
        local: format!("0.{device}"),
        pci: pci.to_owned(),
        card: 0,
        script_id: json!([0, device]),
    };
    [(0, "0000:c1:00.0"), (1, "0000:c2:00.0")].map(npu)
}

fn nvidia_header(name: &str, number: usize, devices: &[SimulatedDevice]) -> Value {
    let devices = devices.iter().map(|device| {
        let uuid = format!("GPU-{number:08x}-0000-4000-8000-{:0>12}", device.pci.replace([':', '.'], ""));
        json!({
            "pci": device.pci, "uuid": uuid, "product": "NVIDIA H100 80GB HBM3", "memory_bytes": H100_BYTES,
            "serial": format!("16537{number:04}{}", device.card),
        })
    });
    json!({
        "node": name, "about": "simulated node", "nvidia": devices.collect::<Vec<_>>(), "expected_devices": 2,
        "libraries": {"nvml": {"driver": "580.95.05", "events": "0x1f9f"}},
    })
}

fn ascend_header(name: &str, number: usize, devices: &[SimulatedDevice]) -> Value {
    let devices = devices.iter().enumerate().map(|(at, device)| {
        json!({
            "card": device.card, "device": at, "logic_id": at, "pci": device.pci, "product": "Ascend910_9392",
            "hbm_bytes": ASCEND_BYTES, "superpod": number,
        })
    });
    json!({
        "node": name, "about": "simulated node", "ascend": devices.collect::<Vec<_>>(), "expected_devices": 2,
        "libraries": {"dcmi": {"driver": "25.2.0", "api": 1}},
    })
}

/// Devices that leave the bus together, in the two steps that a real node shows, and their return.
#[derive(Clone, Debug)]
pub struct Loss {
    node: DeviceNode,
    lost: Vec<SimulatedDevice>,
    ids: Vec<DeviceId>,
}

impl Loss {
    /// The devices.
    #[must_use]
    pub fn devices(&self) -> &[DeviceId] {
        &self.ids
    }

    /// Their vendor.
    #[must_use]
    pub const fn vendor(&self) -> Vendor {
        self.node.vendor
    }

    /// What happens, in a person's words.
    #[must_use]
    pub const fn what(&self) -> &'static str {
        match self.node.vendor {
            Vendor::Nvidia => "Xid 79: the GPU falls off the bus",
            Vendor::Ascend => "0x40F84E00: the card and its two NPUs fall off the bus",
        }
    }

    /// From now on the devices answer reads with ones.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn leave_bus(&self) -> Result<()> {
        self.answer(ABSENT)
    }

    fn answer(&self, bytes: &[u8]) -> Result<()> {
        self.lost.iter().try_for_each(|device| {
            let config = self.node.pci.join(&device.pci).join("config");
            fs::write(&config, bytes).map_err(Error::file("write", &config))
        })
    }

    /// The driver has found out, and says so as each vendor's does: NVIDIA's in the kernel log, Ascend's by a fault
    /// event; neither library reaches the devices any more.
    ///
    /// # Errors
    /// When the node's files cannot be written.
    pub fn driver_notices(&self) -> Result<()> {
        let node = &self.node;
        self.lost.iter().try_for_each(|device| {
            // The library first: a line says what has happened.
            let said = match node.vendor {
                Vendor::Nvidia => json!({"nvml": device.script_id, "set": {"lost": true}}),
                Vendor::Ascend => json!({
                    "dcmi": device.script_id,
                    "set": {"return": CARD_CALLS.map(|call| (call, -8012)).into_iter().collect::<BTreeMap<_, _>>()},
                    "fault": {"id": "0x40F84E00", "assertion": "occur", "severity": 3},
                }),
            };
            append(&node.script, &format!("{said}\n"))?;
            if node.vendor == Vendor::Nvidia {
                let slot = device.pci.trim_end_matches(".0");
                let record = format!(
                    "4,1000,1000000,-;NVRM: Xid (PCI:{slot}): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n"
                );
                append(&node.kmsg, &record)?;
            }
            Ok(())
        })
    }

    /// The devices are on the bus again and their library reaches them, as after a reset.
    ///
    /// # Errors
    /// When the node's files cannot be written.
    pub fn come_back(&self) -> Result<()> {
        self.answer(self.node.present())?;
        self.lost.iter().try_for_each(|device| {
            let line = match self.node.vendor {
                Vendor::Nvidia => json!({"nvml": device.script_id, "set": {"lost": false}}),
                Vendor::Ascend => json!({
                    "dcmi": device.script_id,
                    "set": {"return": CARD_CALLS.map(|call| (call, 0)).into_iter().collect::<BTreeMap<_, _>>()},
                    "fault": {"id": "0x40F84E00", "assertion": "recover", "severity": 3},
                }),
            };
            append(&self.node.script, &format!("{line}\n"))
        })
    }
}

fn append(path: &Path, text: &str) -> Result<()> {
    let mut file = OpenOptions::new().append(true).open(path).map_err(Error::file("open", path))?;
    file.write_all(text.as_bytes()).map_err(Error::file("write", path))
}
