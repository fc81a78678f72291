//! libnvidia-ml.so.1: symbols looked up at run time, one raw call per function. Layouts and parameter
//! orders are those of nvml.h 13 (x86_64 and aarch64 Linux agree).
//!
//! Every function is optional: an older driver lacks some, and the call then answers NOT_SUPPORTED.
#![expect(unsafe_code, reason = "calls into the vendor's library")]

use std::{
    ffi::{CStr, OsStr, c_char, c_int, c_uint, c_ulonglong, c_void},
    mem, ptr,
};

use libloading::Library;

/// `nvmlReturn_t`.
pub(super) type Code = c_int;
/// `nvmlDevice_t`, `nvmlEventSet_t`.
type Raw = *mut c_void;

pub(super) const SUCCESS: Code = 0;
pub(super) const NOT_SUPPORTED: Code = 3;
pub(super) const TIMEOUT: Code = 10;
pub(super) const GPU_IS_LOST: Code = 15;
pub(super) const RESET_REQUIRED: Code = 16;

/// A device handle. Valid until the library is shut down, from any thread (NVML is thread-safe).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Device(Raw);
/// An event set handle.
#[derive(Clone, Copy, Debug)]
pub(super) struct EventSet(Raw);

// SAFETY: NVML handles name library objects and may be used on any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}
// SAFETY: as above.
unsafe impl Send for EventSet {}
// SAFETY: as above.
unsafe impl Sync for EventSet {}

/// `nvmlPciInfo_t`, 68 bytes.
#[repr(C)]
struct PciInfo {
    legacy: [c_char; 16],
    domain: u32,
    bus: u32,
    device: u32,
    pci_device: u32,
    subsystem: u32,
    bus_id: [c_char; 32],
}

/// `nvmlMemory_t`, 24 bytes.
#[repr(C)]
struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// `nvmlMemory_v2_t`, 40 bytes.
#[repr(C)]
struct MemoryV2 {
    version: u32,
    total: u64,
    reserved: u64,
    free: u64,
    used: u64,
}

/// `nvmlFieldValue_t`, 40 bytes; the value as its widest member.
#[repr(C)]
struct FieldValue {
    id: u32,
    scope: u32,
    timestamp: i64,
    latency: i64,
    kind: c_uint,
    result: Code,
    value: [u8; 8],
}

/// `nvmlGpuFabricInfo_v3_t`, 40 bytes; version 2 is the same without its last field, 36 bytes.
#[repr(C)]
struct Fabric {
    version: u32,
    cluster: [u8; 16],
    status: Code,
    clique: u32,
    state: u32,
    mask: u32,
    summary: u8,
}

/// Size of `nvmlGpuFabricInfo_v2_t`.
const FABRIC_V2: usize = 36;

/// `nvmlEccSramErrorStatus_v1_t`, 104 bytes.
#[repr(C)]
struct SramStatus {
    version: u32,
    counters: [u64; 11],
    exceeded: u32,
}

/// `nvmlEventData_t`, 32 bytes.
#[repr(C)]
struct EventData {
    device: Raw,
    kind: c_ulonglong,
    data: c_ulonglong,
    gpu_instance: c_uint,
    compute_instance: c_uint,
}

const _: () = assert!(
    size_of::<PciInfo>() == 68
        && size_of::<MemoryV2>() == 40
        && size_of::<FieldValue>() == 40
        && size_of::<Fabric>() == 40
        && size_of::<SramStatus>() == 104
        && size_of::<EventData>() == 32
        && size_of::<Utilization>() == 8
);

/// `nvmlUtilization_t`, 8 bytes; percent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Utilization {
    pub(super) gpu: c_uint,
    pub(super) memory: c_uint,
}

/// Memory as it is read, bytes; the reserve is known of newer drivers only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RawMemory {
    pub(super) total: u64,
    pub(super) free: u64,
    pub(super) used: u64,
    pub(super) reserved: Option<u64>,
}

/// An event as it came.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawEvent {
    pub(super) device: Device,
    pub(super) kind: u64,
    pub(super) data: u64,
    pub(super) gpu_instance: u32,
    pub(super) compute_instance: u32,
}

/// Row remapping as it is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RawRows {
    pub(super) corrected: u32,
    pub(super) uncorrected: u32,
    pub(super) pending: bool,
    pub(super) failed: bool,
}

/// NVLink fabric as it is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RawFabric {
    pub(super) cluster: [u8; 16],
    pub(super) status: Code,
    pub(super) clique: u32,
    pub(super) state: u32,
    pub(super) mask: u32,
    /// 0 = not known, 1 = healthy, 2 = unhealthy.
    pub(super) summary: u8,
}

macro_rules! api {
    ($($field:ident = $symbol:literal: fn($($kind:ty),*) -> $out:ty;)+) => {
        /// The library with what it exports.
        pub(super) struct Api {
            $($field: Option<unsafe extern "C" fn($($kind),*) -> $out>,)+
            /// Keeps the code mapped for good: a library's own threads outlive its last user.
            _library: mem::ManuallyDrop<Library>,
        }

        impl Api {
            /// Opens the library at `path` (a bare name is searched as the dynamic linker does).
            pub(super) fn open(path: &OsStr) -> Result<Self, libloading::Error> {
                // SAFETY: the vendor's initialisers run here; they have no requirement on the caller.
                let library = unsafe { Library::new(path)? };
                Ok(Self {
                    $(
                        // SAFETY: the type is that of nvml.h for this symbol, and the library outlives it.
                        $field: unsafe { library.get::<unsafe extern "C" fn($($kind),*) -> $out>($symbol) }
                            .ok()
                            .map(|symbol| *symbol),
                    )+
                    _library: mem::ManuallyDrop::new(library),
                })
            }
        }
    };
}

api! {
    init = b"nvmlInit_v2\0": fn() -> Code;
    shutdown = b"nvmlShutdown\0": fn() -> Code;
    error_string = b"nvmlErrorString\0": fn(Code) -> *const c_char;
    driver = b"nvmlSystemGetDriverVersion\0": fn(*mut c_char, c_uint) -> Code;
    count = b"nvmlDeviceGetCount_v2\0": fn(*mut c_uint) -> Code;
    by_index = b"nvmlDeviceGetHandleByIndex_v2\0": fn(c_uint, *mut Raw) -> Code;
    uuid = b"nvmlDeviceGetUUID\0": fn(Raw, *mut c_char, c_uint) -> Code;
    name = b"nvmlDeviceGetName\0": fn(Raw, *mut c_char, c_uint) -> Code;
    serial = b"nvmlDeviceGetSerial\0": fn(Raw, *mut c_char, c_uint) -> Code;
    pci = b"nvmlDeviceGetPciInfo_v3\0": fn(Raw, *mut PciInfo) -> Code;
    memory_v2 = b"nvmlDeviceGetMemoryInfo_v2\0": fn(Raw, *mut MemoryV2) -> Code;
    memory = b"nvmlDeviceGetMemoryInfo\0": fn(Raw, *mut Memory) -> Code;
    temperature = b"nvmlDeviceGetTemperature\0": fn(Raw, c_uint, *mut c_uint) -> Code;
    threshold = b"nvmlDeviceGetTemperatureThreshold\0": fn(Raw, c_uint, *mut c_uint) -> Code;
    event_reasons = b"nvmlDeviceGetCurrentClocksEventReasons\0": fn(Raw, *mut c_ulonglong) -> Code;
    throttle_reasons = b"nvmlDeviceGetCurrentClocksThrottleReasons\0": fn(Raw, *mut c_ulonglong) -> Code;
    ecc = b"nvmlDeviceGetTotalEccErrors\0": fn(Raw, c_uint, c_uint, *mut c_ulonglong) -> Code;
    sram = b"nvmlDeviceGetSramEccErrorStatus\0": fn(Raw, *mut SramStatus) -> Code;
    rows = b"nvmlDeviceGetRemappedRows\0": fn(Raw, *mut c_uint, *mut c_uint, *mut c_uint, *mut c_uint) -> Code;
    retired = b"nvmlDeviceGetRetiredPagesPendingStatus\0": fn(Raw, *mut c_uint) -> Code;
    fields = b"nvmlDeviceGetFieldValues\0": fn(Raw, c_int, *mut FieldValue) -> Code;
    link = b"nvmlDeviceGetNvLinkState\0": fn(Raw, c_uint, *mut c_uint) -> Code;
    fabric = b"nvmlDeviceGetGpuFabricInfoV\0": fn(Raw, *mut Fabric) -> Code;
    power = b"nvmlDeviceGetPowerUsage\0": fn(Raw, *mut c_uint) -> Code;
    energy = b"nvmlDeviceGetTotalEnergyConsumption\0": fn(Raw, *mut c_ulonglong) -> Code;
    clock = b"nvmlDeviceGetClockInfo\0": fn(Raw, c_uint, *mut c_uint) -> Code;
    utilization = b"nvmlDeviceGetUtilizationRates\0": fn(Raw, *mut Utilization) -> Code;
    encoder = b"nvmlDeviceGetEncoderUtilization\0": fn(Raw, *mut c_uint, *mut c_uint) -> Code;
    decoder = b"nvmlDeviceGetDecoderUtilization\0": fn(Raw, *mut c_uint, *mut c_uint) -> Code;
    replays = b"nvmlDeviceGetPcieReplayCounter\0": fn(Raw, *mut c_uint) -> Code;
    generation = b"nvmlDeviceGetCurrPcieLinkGeneration\0": fn(Raw, *mut c_uint) -> Code;
    generation_most = b"nvmlDeviceGetMaxPcieLinkGeneration\0": fn(Raw, *mut c_uint) -> Code;
    lanes = b"nvmlDeviceGetCurrPcieLinkWidth\0": fn(Raw, *mut c_uint) -> Code;
    lanes_most = b"nvmlDeviceGetMaxPcieLinkWidth\0": fn(Raw, *mut c_uint) -> Code;
    set_create = b"nvmlEventSetCreate\0": fn(*mut Raw) -> Code;
    set_wait = b"nvmlEventSetWait_v2\0": fn(Raw, *mut EventData, c_uint) -> Code;
    supported_events = b"nvmlDeviceGetSupportedEventTypes\0": fn(Raw, *mut c_ulonglong) -> Code;
    register = b"nvmlDeviceRegisterEvents\0": fn(Raw, c_ulonglong, Raw) -> Code;
}

fn ok<T>(code: Code, value: T) -> Result<T, Code> {
    if code == SUCCESS { Ok(value) } else { Err(code) }
}

/// Calls an optional function that fills one number.
macro_rules! number {
    ($function:expr, $kind:ty, $($argument:expr),*) => {{
        let function = $function.ok_or(NOT_SUPPORTED)?;
        let mut out: $kind = 0;
        // SAFETY: the signature is nvml.h's and `out` is ours for the call.
        let code = unsafe { function($($argument,)* &raw mut out) };
        ok(code, out)
    }};
}

impl Api {
    pub(super) fn init(&self) -> Code {
        // SAFETY: no arguments; may be called again, and from any thread.
        self.init.map_or(NOT_SUPPORTED, |init| unsafe { init() })
    }

    /// Closes every device that this process has open. The code stays mapped: threads of the vendor's may still run it.
    pub(super) fn shutdown(&self) -> Code {
        // SAFETY: no arguments; no handle is used afterwards, for whoever has one keeps this value alive.
        self.shutdown.map_or(NOT_SUPPORTED, |shutdown| unsafe { shutdown() })
    }

    /// The vendor's words for a code.
    pub(super) fn words(&self, code: Code) -> String {
        let Some(function) = self.error_string else { return String::new() };
        // SAFETY: takes any code; the answer is a static C string or null.
        let text = unsafe { function(code) };
        if text.is_null() {
            return String::new();
        }
        // SAFETY: not null, ends, and lives as long as the library.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    pub(super) fn driver(&self) -> Result<String, Code> {
        let function = self.driver.ok_or(NOT_SUPPORTED)?;
        // SAFETY: the buffer is as long as it is said to be.
        text(|out, length| unsafe { function(out, length) })
    }

    pub(super) fn count(&self) -> Result<u32, Code> {
        number!(self.count, c_uint,)
    }

    pub(super) fn by_index(&self, index: u32) -> Result<Device, Code> {
        let function = self.by_index.ok_or(NOT_SUPPORTED)?;
        let mut out = ptr::null_mut();
        // SAFETY: `out` is ours for the call.
        let code = unsafe { function(index, &raw mut out) };
        ok(code, Device(out))
    }

    pub(super) fn uuid(&self, device: Device) -> Result<String, Code> {
        let function = self.uuid.ok_or(NOT_SUPPORTED)?;
        // SAFETY: the buffer is as long as it is said to be.
        text(|out, length| unsafe { function(device.0, out, length) })
    }

    pub(super) fn name(&self, device: Device) -> Result<String, Code> {
        let function = self.name.ok_or(NOT_SUPPORTED)?;
        // SAFETY: as above.
        text(|out, length| unsafe { function(device.0, out, length) })
    }

    pub(super) fn serial(&self, device: Device) -> Result<String, Code> {
        let function = self.serial.ok_or(NOT_SUPPORTED)?;
        // SAFETY: as above.
        text(|out, length| unsafe { function(device.0, out, length) })
    }

    /// Domain, bus, device.
    pub(super) fn pci(&self, device: Device) -> Result<(u32, u32, u32), Code> {
        let function = self.pci.ok_or(NOT_SUPPORTED)?;
        // SAFETY: plain integers and bytes, for which zero is a value.
        let mut info: PciInfo = unsafe { mem::zeroed() };
        // SAFETY: `info` has nvml.h's layout and is ours for the call.
        let code = unsafe { function(device.0, &raw mut info) };
        ok(code, (info.domain, info.bus, info.device))
    }

    /// Bytes in all.
    pub(super) fn memory(&self, device: Device) -> Result<u64, Code> {
        self.memory_use(device).map(|memory| memory.total)
    }

    /// Bytes in all, free, in use and reserved.
    pub(super) fn memory_use(&self, device: Device) -> Result<RawMemory, Code> {
        if let Some(function) = self.memory_v2 {
            let mut info =
                MemoryV2 { version: version(size_of::<MemoryV2>(), 2), total: 0, reserved: 0, free: 0, used: 0 };
            // SAFETY: as above, and the version is set.
            let code = unsafe { function(device.0, &raw mut info) };
            let MemoryV2 { total, reserved, free, used, .. } = info;
            if code == SUCCESS {
                return Ok(RawMemory { total, free, used, reserved: Some(reserved) });
            }
        }
        let function = self.memory.ok_or(NOT_SUPPORTED)?;
        let mut info = Memory { total: 0, free: 0, used: 0 };
        // SAFETY: as above.
        let code = unsafe { function(device.0, &raw mut info) };
        let Memory { total, free, used } = info;
        ok(code, RawMemory { total, free, used, reserved: None })
    }

    /// Milliwatts.
    pub(super) fn power(&self, device: Device) -> Result<u32, Code> {
        number!(self.power, c_uint, device.0)
    }

    /// Millijoules since the driver was loaded.
    pub(super) fn energy(&self, device: Device) -> Result<u64, Code> {
        number!(self.energy, c_ulonglong, device.0)
    }

    /// MHz; 1 = multiprocessors, 2 = memory.
    pub(super) fn clock(&self, device: Device, kind: u32) -> Result<u32, Code> {
        number!(self.clock, c_uint, device.0, kind)
    }

    pub(super) fn utilization(&self, device: Device) -> Result<Utilization, Code> {
        let function = self.utilization.ok_or(NOT_SUPPORTED)?;
        let mut out = Utilization::default();
        // SAFETY: `out` has nvml.h's layout and is ours for the call.
        ok(unsafe { function(device.0, &raw mut out) }, out)
    }

    /// Percent.
    pub(super) fn encoder(&self, device: Device) -> Result<u32, Code> {
        with_period(self.encoder, device)
    }

    /// Percent.
    pub(super) fn decoder(&self, device: Device) -> Result<u32, Code> {
        with_period(self.decoder, device)
    }

    pub(super) fn replays(&self, device: Device) -> Result<u32, Code> {
        number!(self.replays, c_uint, device.0)
    }

    /// Lanes of the link to the host, and how many device and machine could have together.
    pub(super) fn lanes(&self, device: Device) -> Result<(u32, u32), Code> {
        Ok((number!(self.lanes, c_uint, device.0)?, number!(self.lanes_most, c_uint, device.0)?))
    }

    /// PCIe generation of the link to the host, and the highest that device and machine could have together.
    pub(super) fn generation(&self, device: Device) -> Result<(u32, u32), Code> {
        Ok((number!(self.generation, c_uint, device.0)?, number!(self.generation_most, c_uint, device.0)?))
    }

    pub(super) fn temperature(&self, device: Device) -> Result<u32, Code> {
        number!(self.temperature, c_uint, device.0, 0)
    }

    /// 0 = shutdown, 1 = slowdown.
    pub(super) fn threshold(&self, device: Device, kind: u32) -> Result<u32, Code> {
        number!(self.threshold, c_uint, device.0, kind)
    }

    pub(super) fn clock_reasons(&self, device: Device) -> Result<u64, Code> {
        // Older drivers export only the old name.
        number!(self.event_reasons.or(self.throttle_reasons), c_ulonglong, device.0)
    }

    /// Volatile errors; kind 0 = corrected, 1 = uncorrected.
    pub(super) fn ecc(&self, device: Device, kind: u32) -> Result<u64, Code> {
        number!(self.ecc, c_ulonglong, device.0, kind, 0)
    }

    pub(super) fn sram_exceeded(&self, device: Device) -> Result<bool, Code> {
        let function = self.sram.ok_or(NOT_SUPPORTED)?;
        let mut status = SramStatus { version: version(size_of::<SramStatus>(), 1), counters: [0; 11], exceeded: 0 };
        // SAFETY: as above, and the version is set.
        let code = unsafe { function(device.0, &raw mut status) };
        ok(code, status.exceeded != 0)
    }

    pub(super) fn rows(&self, device: Device) -> Result<RawRows, Code> {
        let function = self.rows.ok_or(NOT_SUPPORTED)?;
        let (mut corrected, mut uncorrected, mut pending, mut failed) = (0, 0, 0, 0);
        // SAFETY: four numbers of ours.
        let code =
            unsafe { function(device.0, &raw mut corrected, &raw mut uncorrected, &raw mut pending, &raw mut failed) };
        ok(code, RawRows { corrected, uncorrected, pending: pending != 0, failed: failed != 0 })
    }

    pub(super) fn retired_pending(&self, device: Device) -> Result<bool, Code> {
        number!(self.retired, c_uint, device.0).map(|pending| pending != 0)
    }

    /// One field as an unsigned number; its own code when the entry failed.
    pub(super) fn field(&self, device: Device, id: u32) -> Result<u64, Code> {
        let function = self.fields.ok_or(NOT_SUPPORTED)?;
        let mut entry = FieldValue { id, scope: 0, timestamp: 0, latency: 0, kind: 0, result: SUCCESS, value: [0; 8] };
        // SAFETY: one entry of nvml.h's layout, ours for the call.
        let code = unsafe { function(device.0, 1, &raw mut entry) };
        ok(code, ())?;
        ok(entry.result, ())?;
        let [a, b, c, d, ..] = entry.value;
        match entry.kind {
            1 | 5 => Ok(u64::from(u32::from_ne_bytes([a, b, c, d]))),
            2..=4 => Ok(u64::from_ne_bytes(entry.value)),
            6 => Ok(u64::from(u16::from_ne_bytes([a, b]))),
            _ => Err(NOT_SUPPORTED),
        }
    }

    pub(super) fn link_up(&self, device: Device, link: u32) -> Result<bool, Code> {
        number!(self.link, c_uint, device.0, link).map(|up| up != 0)
    }

    pub(super) fn fabric(&self, device: Device) -> Result<RawFabric, Code> {
        let function = self.fabric.ok_or(NOT_SUPPORTED)?;
        let blank = |version| Fabric { version, cluster: [0; 16], status: 0, clique: 0, state: 0, mask: 0, summary: 0 };
        let mut info = blank(version(size_of::<Fabric>(), 3));
        // SAFETY: the layout of the version that is set.
        let mut code = unsafe { function(device.0, &raw mut info) };
        if code != SUCCESS && code != GPU_IS_LOST {
            // Drivers before R580 know the shorter version only.
            info = blank(version(FABRIC_V2, 2));
            // SAFETY: the shorter version writes no further than the longer one has room.
            code = unsafe { function(device.0, &raw mut info) };
        }
        let Fabric { cluster, status, clique, state, mask, summary, .. } = info;
        ok(code, RawFabric { cluster, status, clique, state, mask, summary })
    }

    pub(super) fn create_set(&self) -> Result<EventSet, Code> {
        let function = self.set_create.ok_or(NOT_SUPPORTED)?;
        let mut out = ptr::null_mut();
        // SAFETY: `out` is ours for the call.
        let code = unsafe { function(&raw mut out) };
        ok(code, EventSet(out))
    }

    pub(super) fn supported_events(&self, device: Device) -> Result<u64, Code> {
        number!(self.supported_events, c_ulonglong, device.0)
    }

    pub(super) fn register(&self, device: Device, events: u64, set: EventSet) -> Result<(), Code> {
        let function = self.register.ok_or(NOT_SUPPORTED)?;
        // SAFETY: both handles come from this library.
        let code = unsafe { function(device.0, events, set.0) };
        ok(code, ())
    }

    /// Blocks for at most `timeout_ms`, by the library's word.
    pub(super) fn wait(&self, set: EventSet, timeout_ms: u32) -> Result<RawEvent, Code> {
        let function = self.set_wait.ok_or(NOT_SUPPORTED)?;
        let mut data =
            EventData { device: ptr::null_mut(), kind: 0, data: 0, gpu_instance: u32::MAX, compute_instance: u32::MAX };
        // SAFETY: the set comes from this library and `data` is ours for the call.
        let code = unsafe { function(set.0, &raw mut data, timeout_ms) };
        let EventData { device, kind, data, gpu_instance, compute_instance } = data;
        ok(code, RawEvent { device: Device(device), kind, data, gpu_instance, compute_instance })
    }
}

/// Calls an optional function that fills a number and the period that it was sampled over.
fn with_period(
    function: Option<unsafe extern "C" fn(Raw, *mut c_uint, *mut c_uint) -> Code>,
    device: Device,
) -> Result<u32, Code> {
    let function = function.ok_or(NOT_SUPPORTED)?;
    let (mut value, mut period) = (0, 0);
    // SAFETY: two numbers of ours.
    ok(unsafe { function(device.0, &raw mut value, &raw mut period) }, value)
}

/// The version word of a struct: its size, and the version above it.
fn version(size: usize, version: u32) -> u32 {
    u32::try_from(size).unwrap_or(0) | (version << 24)
}

/// Reads a text of at most 96 bytes, the longest that nvml.h names.
fn text(read: impl FnOnce(*mut c_char, c_uint) -> Code) -> Result<String, Code> {
    let mut buffer = [0_u8; 97];
    let code = read(buffer.as_mut_ptr().cast(), 96);
    let end = buffer.iter().position(|byte| *byte == 0).unwrap_or(buffer.len());
    ok(code, String::from_utf8_lossy(&buffer[..end]).into_owned())
}
