//! `berth devices`: what this machine has to compute with, and what is missing where something is missing.
//! Devices are listed through the agent's own code, and whether this build can compute on them is asked of
//! the kernels. It changes nothing.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    path::PathBuf,
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use anyhow::Context;
use berth_agent::{
    health::fact::DeviceInfo,
    vendor::{dcmi, nvml},
};
use berth_kernels::{
    cpu::Level,
    vendor::{ASCEND, CUDA, VendorLibrary},
};
use berth_types::Bytes;
use serde::Serialize;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

use crate::{
    output::{say, write_json},
    verdict::Verdict,
};

/// A vendor library that does not answer within this is reported as hanging.
const DEADLINE: Duration = Duration::from_secs(20);

/// Lists what this machine has to compute with, and what is missing
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// NVIDIA's management library, when it is not libnvidia-ml.so.1 of the system
    #[arg(long, env = "BERTH_NVML_LIBRARY")]
    nvml_library: Option<OsString>,
    /// Ascend's management library, when it is not libdcmi.so of the system
    #[arg(long, env = "BERTH_DCMI_LIBRARY")]
    dcmi_library: Option<OsString>,
    /// Write what was found here as one JSON document
    #[arg(long)]
    json: Option<PathBuf>,
}

/// The document of `--json`.
#[derive(Debug, Serialize)]
struct Found {
    cpu: Cpu,
    nvidia: Vendor,
    ascend: Vendor,
}

/// The processor; always there.
#[derive(Debug, Serialize)]
struct Cpu {
    product: String,
    threads: usize,
    memory_bytes: u64,
    /// Instruction sets that the cpu backend can use here, the best last.
    instructions: Vec<String>,
}

/// One vendor's side of this machine.
#[derive(Debug, Serialize)]
struct Vendor {
    /// Version of the driver, where it could be asked.
    driver: Option<String>,
    devices: Vec<Device>,
    libraries: Vec<Library>,
}

/// One device as its vendor's library lists it.
#[derive(Debug, Serialize)]
struct Device {
    local: String,
    product: String,
    uuid: String,
    memory_bytes: u64,
    interconnect_domain: Option<String>,
    /// Devices with the same card fail together.
    card: String,
    /// Devices with the same group can only be reset together.
    reset_group: Option<String>,
}

/// A library and what it is for.
#[derive(Debug, Serialize)]
struct Library {
    name: String,
    purpose: &'static str,
    /// Why it cannot be used; none = it is there.
    missing: Option<String>,
}

/// Looks, prints, writes.
pub(crate) fn run(args: &Args) -> anyhow::Result<Verdict> {
    let nvidia = nvml::library_path(args.nvml_library.as_deref());
    let ascend = dcmi::library_path(args.dcmi_library.as_deref());
    let found =
        Found { cpu: cpu()?, nvidia: vendor(&nvidia, list_nvidia, CUDA), ascend: vendor(&ascend, list_ascend, ASCEND) };
    say(found.to_string().trim_end())?;
    write_json(args.json.as_deref(), &found)?;
    Ok(Verdict::Pass)
}

/// Memory of this machine.
pub(crate) fn host_memory() -> anyhow::Result<Bytes> {
    let kind = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(kind).context("reading this machine's memory: give --memory")?;
    Ok(Bytes(system.total_memory()))
}

fn cpu() -> anyhow::Result<Cpu> {
    let kind = RefreshKind::nothing().with_cpu(CpuRefreshKind::nothing());
    let system = System::new_with_specifics(kind).context("reading this machine's processors")?;
    let product = system.cpus().first().map(|cpu| cpu.brand().trim().to_owned()).unwrap_or_default();
    Ok(Cpu {
        product,
        threads: thread::available_parallelism()?.get(),
        memory_bytes: host_memory()?.get(),
        instructions: Level::supported().iter().map(|level| format!("{level:?}").to_lowercase()).collect(),
    })
}

/// What a vendor's library lists.
#[derive(Debug, Default)]
struct Listed {
    driver: Option<String>,
    devices: Vec<Device>,
}

/// One vendor's side: what the library at `path` lists, and whether `computing` can be opened.
fn vendor(path: &OsStr, list: fn(&OsStr) -> Result<Listed, String>, computing: VendorLibrary) -> Vendor {
    let (name, path) = (path.to_string_lossy().into_owned(), path.to_owned());
    let (listed, missing) = match within_deadline(move || list(&path)) {
        Ok(listed) => (listed, None),
        Err(why) => (Listed::default(), Some(why)),
    };
    let management = Library { name, purpose: "lists devices and their health", missing };
    Vendor { driver: listed.driver, devices: listed.devices, libraries: vec![management, compute(computing)] }
}

fn list_nvidia(path: &OsStr) -> Result<Listed, String> {
    let library = nvml::Nvml::open(path).map_err(|error| error.to_string())?;
    let targets =
        library.list().map_err(|code| format!("it does not tell its devices (NVML code {code}): see nvidia-smi"))?;
    let devices = targets.into_iter().map(|target| target.info.into()).collect();
    Ok(Listed { driver: library.driver(), devices })
}

fn list_ascend(path: &OsStr) -> Result<Listed, String> {
    let library = dcmi::Dcmi::open(path).map_err(|error| error.to_string())?;
    let targets =
        library.list().map_err(|code| format!("it does not tell its devices (DCMI code {code}): see npu-smi info"))?;
    let devices = targets.into_iter().map(|target| target.info.into()).collect();
    Ok(Listed { driver: library.driver(), devices })
}

impl From<DeviceInfo> for Device {
    fn from(info: DeviceInfo) -> Self {
        let DeviceInfo { local, product, uuid, memory_bytes, interconnect_domain, card, reset_group, .. } = info;
        Self { local, product, uuid, memory_bytes, interconnect_domain, card, reset_group }
    }
}

/// Whether the backend of a compute library can be opened: the library may be there and this build without
/// kernels for it.
fn compute(library: VendorLibrary) -> Library {
    let open = move || berth_kernels::open(library.backend).map(drop).map_err(|error| error.to_string());
    Library { name: library.library.to_owned(), purpose: "computes", missing: within_deadline(open).err() }
}

/// Runs a vendor's code on a thread of its own: a driver that hangs is an answer too.
fn within_deadline<T: Send + 'static>(call: impl FnOnce() -> Result<T, String> + Send + 'static) -> Result<T, String> {
    let (tell, told) = channel();
    let spawned = thread::Builder::new().name("vendor".to_owned()).spawn(move || {
        // Nobody listens any more when it took too long.
        let _ = tell.send(call());
    });
    if let Err(error) = spawned {
        return Err(format!("starting a thread: {error}"));
    }
    match told.recv_timeout(DEADLINE) {
        Ok(outcome) => outcome,
        Err(RecvTimeoutError::Timeout) => Err(format!(
            "it did not answer within {} s: look for a driver that hangs in the kernel log",
            DEADLINE.as_secs()
        )),
        Err(RecvTimeoutError::Disconnected) => Err("it broke off".to_owned()),
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cpu, nvidia, ascend } = self;
        let (memory, sets) = (Bytes(cpu.memory_bytes), cpu.instructions.join(", "));
        writeln!(f, "cpu      {}, {} threads, {memory}, instructions {sets}", cpu.product, cpu.threads)?;
        nvidia.show(f, "nvidia")?;
        ascend.show(f, "ascend")
    }
}

impl Vendor {
    fn show(&self, f: &mut fmt::Formatter<'_>, name: &str) -> fmt::Result {
        let Self { driver, devices, libraries } = self;
        let driver = driver.as_ref().map(|driver| format!(", driver {driver}")).unwrap_or_default();
        writeln!(f, "{name:<8} {} devices{driver}", devices.len())?;
        for device in devices {
            let Device { local, product, uuid, memory_bytes, interconnect_domain, card, reset_group } = device;
            let mut more = String::new();
            for (word, text) in
                [("", Some(uuid)), ("domain ", interconnect_domain.as_ref()), ("reset group ", reset_group.as_ref())]
            {
                if let Some(text) = text.filter(|text| !text.is_empty()) {
                    more.push_str(&format!(", {word}{text}"));
                }
            }
            writeln!(f, "         {local}  {product}, {}, on {card}{more}", Bytes(*memory_bytes))?;
        }
        for Library { name, purpose, missing } in libraries {
            match missing {
                None => writeln!(f, "         {name} ({purpose}): there")?,
                Some(why) => writeln!(f, "         {name} ({purpose}): {why}")?,
            }
        }
        Ok(())
    }
}
