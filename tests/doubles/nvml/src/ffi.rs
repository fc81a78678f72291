//! The exported symbols: C layouts in, C layouts out. Nothing is decided here.
//!
//! Layouts and codes: nvml.h of NVML 13, whose suffixed symbols are the current ABI.
#![expect(unsafe_code, reason = "a C ABI is what this crate is for")]

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void},
    ptr,
    time::Duration,
};

use crate::state::{self, Device, NOT_FOUND, NOT_SUPPORTED, OK, State, instance};

/// A device: its index plus one, dressed as a pointer.
pub type Handle = *mut c_void;

const INVALID_ARGUMENT: c_int = 2;
const INSUFFICIENT_SIZE: c_int = 7;
const TIMEOUT: c_int = 10;
const VERSION_MISMATCH: c_int = 25;
const UNKNOWN: c_int = 999;
const MEMORY_V2: u32 = 0x0200_0028;
const FABRIC_V2: u32 = 0x0200_0024;
const FABRIC_V3: u32 = 0x0300_0028;
const SRAM_V1: u32 = 0x0100_0068;

/// `nvmlPciInfo_t`.
#[repr(C)]
#[derive(Debug)]
pub struct PciInfo {
    legacy: [c_char; 16],
    domain: u32,
    bus: u32,
    device: u32,
    pci_device: u32,
    subsystem: u32,
    bus_id: [c_char; 32],
}

/// `nvmlMemory_v2_t`.
#[repr(C)]
#[derive(Debug)]
pub struct MemoryV2 {
    version: u32,
    total: u64,
    reserved: u64,
    free: u64,
    used: u64,
}

/// `nvmlMemory_t`.
#[repr(C)]
#[derive(Debug)]
pub struct Memory {
    total: u64,
    free: u64,
    used: u64,
}

/// `nvmlUtilization_t`.
#[repr(C)]
#[derive(Debug)]
pub struct Utilization {
    gpu: c_uint,
    memory: c_uint,
}

/// `nvmlEventData_t`.
#[repr(C)]
#[derive(Debug)]
pub struct EventData {
    device: Handle,
    kind: u64,
    data: u64,
    gpu_instance: u32,
    compute_instance: u32,
}

/// `nvmlFieldValue_t`, its value as the widest member.
#[repr(C)]
#[derive(Debug)]
pub struct FieldValue {
    id: u32,
    scope: u32,
    timestamp: i64,
    latency: i64,
    kind: c_uint,
    result: c_int,
    value: u64,
}

/// `nvmlGpuFabricInfo_v3_t`; v2 ends before `summary`.
#[repr(C)]
#[derive(Debug)]
pub struct FabricInfo {
    version: u32,
    cluster: [u8; 16],
    status: c_int,
    clique: u32,
    state: u32,
    mask: u32,
    summary: u8,
}

/// `nvmlEccSramErrorStatus_v1_t`.
#[repr(C)]
#[derive(Debug)]
pub struct SramStatus {
    version: u32,
    counters: [u64; 11],
    exceeded: u32,
}

fn index(handle: Handle) -> Option<usize> {
    handle.addr().checked_sub(1)
}

fn device(state: &State, handle: Handle) -> Option<&Device> {
    state.devices.get(index(handle)?)
}

/// One call on a device: its hang, its refusal, else `read`.
fn answer(symbol: &str, handle: Handle, read: impl FnOnce(&Device) -> Result<(), c_int>) -> c_int {
    let hang = |state: &State| device(state, handle).map_or(0, |device| device.hang(symbol));
    instance().call(hang, |state| {
        let Some(device) = device(state, handle) else { return INVALID_ARGUMENT };
        device.admit(symbol).and_then(|()| read(device)).err().unwrap_or(OK)
    })
}

/// Writes `value` where the caller wants it.
///
/// # Safety
/// `out` is null or valid for a write of `T`.
unsafe fn put<T>(out: *mut T, value: T) -> Result<(), c_int> {
    // SAFETY: as this function.
    unsafe { berth_double_stage::ffi::put(out, value, INVALID_ARGUMENT) }
}

/// Writes `text` and its end into a buffer of `length`.
///
/// # Safety
/// `out` is null or valid for writes of `length` bytes.
unsafe fn put_text(out: *mut c_char, length: c_uint, text: &str) -> Result<(), c_int> {
    // SAFETY: as this function.
    unsafe { berth_double_stage::ffi::put_text(out, length, text, INSUFFICIENT_SIZE) }
}

fn chars<const N: usize>(text: &str) -> [c_char; N] {
    let mut out = [0; N];
    for (slot, byte) in out.iter_mut().zip(text.bytes().take(N - 1)) {
        *slot = c_char::from_ne_bytes([byte]);
    }
    out
}

fn narrow<T: TryFrom<u64>>(value: u64) -> Result<T, c_int> {
    T::try_from(value).map_err(|_| UNKNOWN)
}

/// # Safety
/// Always safe; the ABI makes it unsafe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlInit_v2() -> c_int {
    instance().call(|_| 0, |state| state.init)
}

/// # Safety
/// Always safe; the ABI makes it unsafe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlShutdown() -> c_int {
    OK
}

/// # Safety
/// Always safe; the ABI makes it unsafe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlErrorString(code: c_int) -> *const c_char {
    let text: &CStr = match code {
        0 => c"Success",
        3 => c"Not Supported",
        9 => c"Driver Not Loaded",
        15 => c"GPU is lost",
        16 => c"GPU requires reset",
        18 => c"Driver/library version mismatch",
        _ => c"Unknown Error",
    };
    text.as_ptr()
}

/// # Safety
/// `out` is valid for `length` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(out: *mut c_char, length: c_uint) -> c_int {
    let driver = instance().call(|_| 0, |state| state.driver.clone());
    // SAFETY: as this function.
    unsafe { put_text(out, length, &driver) }.err().unwrap_or(OK)
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(out: *mut c_uint) -> c_int {
    let count = instance().call(|_| 0, |state| u32::try_from(state.devices.len()).unwrap_or(0));
    // SAFETY: as this function.
    unsafe { put(out, count) }.err().unwrap_or(OK)
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(at: c_uint, out: *mut Handle) -> c_int {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    let count = instance().call(|_| 0, |state| state.devices.len());
    if at >= count {
        return NOT_FOUND;
    }
    // SAFETY: as this function.
    unsafe { put(out, ptr::without_provenance_mut(at + 1)) }.err().unwrap_or(OK)
}

/// # Safety
/// `bus_id` is a C string; `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByPciBusId_v2(bus_id: *const c_char, out: *mut Handle) -> c_int {
    if bus_id.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: not null, and the caller vouches for the end of the string.
    let text = unsafe { CStr::from_ptr(bus_id) }.to_string_lossy().into_owned();
    match instance().call(|_| 0, |state| state.find(&text)) {
        // SAFETY: as this function.
        Some(at) => unsafe { put(out, ptr::without_provenance_mut(at + 1)) }.err().unwrap_or(OK),
        None => NOT_FOUND,
    }
}

macro_rules! text_getter {
    ($($symbol:ident => $text:expr;)+) => { $(
        /// # Safety
        /// `out` is valid for `length` bytes.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $symbol(handle: Handle, out: *mut c_char, length: c_uint) -> c_int {
            let text: fn(&Device) -> Option<&String> = $text;
            answer(stringify!($symbol), handle, |device| {
                let text = text(device).ok_or(NOT_SUPPORTED)?;
                // SAFETY: as this function.
                unsafe { put_text(out, length, text) }
            })
        }
    )+ };
}

text_getter! {
    nvmlDeviceGetUUID => |device| device.header.uuid.as_ref();
    nvmlDeviceGetName => |device| device.header.product.as_ref();
    nvmlDeviceGetSerial => |device| device.header.serial.as_ref();
}

macro_rules! number_getter {
    ($($symbol:ident($($extra:ident: $kind:ty),*) -> $out:ty => $value:expr;)+) => { $(
        /// # Safety
        /// `out` is valid for a write.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $symbol(handle: Handle, $($extra: $kind,)* out: *mut $out) -> c_int {
            answer(stringify!($symbol), handle, |device| {
                let value: fn(&Device $(, $kind)*) -> Result<u64, c_int> = $value;
                let value = narrow::<$out>(value(device $(, $extra)*)?)?;
                // SAFETY: as this function.
                unsafe { put(out, value) }
            })
        }
    )+ };
}

number_getter! {
    nvmlDeviceGetTemperature(sensor: c_uint) -> c_uint => |device, _| device.temperature.get();
    nvmlDeviceGetTemperatureThreshold(kind: c_uint) -> c_uint => |device, kind| match kind {
        0 => device.shutdown.get(),
        1 => device.slowdown.get(),
        _ => Err(NOT_SUPPORTED),
    };
    nvmlDeviceGetCurrentClocksEventReasons() -> c_ulonglong => |device| Ok(device.clock_reasons);
    nvmlDeviceGetCurrentClocksThrottleReasons() -> c_ulonglong => |device| Ok(device.clock_reasons);
    nvmlDeviceGetTotalEccErrors(kind: c_uint, counter: c_uint) -> c_ulonglong => |device, kind, _| match kind {
        0 => device.ecc_corrected.get(),
        _ => device.ecc_uncorrected.get(),
    };
    nvmlDeviceGetRetiredPagesPendingStatus() -> c_uint => |_| Err(NOT_SUPPORTED);
    nvmlDeviceGetNvLinkState(link: c_uint) -> c_uint => |device, link| match device.links_down.get(&link) {
        Some(down) => Ok(u64::from(!down)),
        None if link < 18 => Ok(1),
        None => Err(NOT_SUPPORTED),
    };
    nvmlDeviceGetPowerUsage() -> c_uint => |device| device.power_mw.get();
    nvmlDeviceGetTotalEnergyConsumption() -> c_ulonglong => |device| device.energy_mj.get();
    nvmlDeviceGetClockInfo(kind: c_uint) -> c_uint => |_, kind| match kind {
        0 | 1 => Ok(1980),
        2 => Ok(3201),
        _ => Err(NOT_SUPPORTED),
    };
    nvmlDeviceGetPcieReplayCounter() -> c_uint => |_| Ok(0);
    nvmlDeviceGetCurrPcieLinkWidth() -> c_uint => |device| device.lanes[0].get();
    nvmlDeviceGetMaxPcieLinkWidth() -> c_uint => |device| device.lanes[1].get();
    nvmlDeviceGetCurrPcieLinkGeneration() -> c_uint => |device| device.generation[0].get();
    nvmlDeviceGetMaxPcieLinkGeneration() -> c_uint => |device| device.generation[1].get();
    nvmlDeviceGetSupportedEventTypes() -> c_ulonglong => |device| Ok(device.supported);
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUtilizationRates(handle: Handle, out: *mut Utilization) -> c_int {
    answer("nvmlDeviceGetUtilizationRates", handle, |device| {
        let gpu = narrow(device.utilization.get()?)?;
        // SAFETY: as this function.
        unsafe { put(out, Utilization { gpu, memory: gpu / 2 }) }
    })
}

macro_rules! sampled_getter {
    ($($symbol:ident)+) => { $(
        /// # Safety
        /// Each pointer is valid for a write.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $symbol(handle: Handle, value: *mut c_uint, period_us: *mut c_uint) -> c_int {
            // SAFETY: as this function.
            answer(stringify!($symbol), handle, |_| unsafe {
                put(value, 0)?;
                put(period_us, 100_000)
            })
        }
    )+ };
}

sampled_getter! {
    nvmlDeviceGetEncoderUtilization
    nvmlDeviceGetDecoderUtilization
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPciInfo_v3(handle: Handle, out: *mut PciInfo) -> c_int {
    answer("nvmlDeviceGetPciInfo_v3", handle, |at| {
        let (domain, bus, device) = state::address(&at.header.pci).ok_or(UNKNOWN)?;
        let info = PciInfo {
            legacy: chars(&format!("{domain:04x}:{bus:02x}:{device:02x}.0")),
            domain,
            bus,
            device,
            pci_device: 0x2330_10de,
            subsystem: 0,
            bus_id: chars(&format!("{domain:08x}:{bus:02x}:{device:02x}.0")),
        };
        // SAFETY: as this function.
        unsafe { put(out, info) }
    })
}

fn memory(device: &Device) -> Result<(u64, u64), c_int> {
    Ok((device.header.memory_bytes.unwrap_or(80 << 30), device.memory_used.get()?))
}

/// # Safety
/// `out` points to a struct whose version is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(handle: Handle, out: *mut MemoryV2) -> c_int {
    answer("nvmlDeviceGetMemoryInfo_v2", handle, |device| {
        // SAFETY: as this function.
        if out.is_null() || unsafe { (*out).version } != MEMORY_V2 {
            return Err(VERSION_MISMATCH);
        }
        let (total, used) = memory(device)?;
        let info = MemoryV2 { version: MEMORY_V2, total, reserved: 0, free: total.saturating_sub(used), used };
        // SAFETY: as this function.
        unsafe { put(out, info) }
    })
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo(handle: Handle, out: *mut Memory) -> c_int {
    answer("nvmlDeviceGetMemoryInfo", handle, |device| {
        let (total, used) = memory(device)?;
        // SAFETY: as this function.
        unsafe { put(out, Memory { total, free: total.saturating_sub(used), used }) }
    })
}

/// # Safety
/// Each pointer is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetRemappedRows(
    handle: Handle,
    corrected: *mut c_uint,
    uncorrected: *mut c_uint,
    pending: *mut c_uint,
    failed: *mut c_uint,
) -> c_int {
    answer("nvmlDeviceGetRemappedRows", handle, |device| {
        if !device.header.mig.is_empty() {
            return Err(NOT_SUPPORTED);
        }
        let rows = device.rows()?;
        // SAFETY: as this function.
        unsafe {
            put(corrected, rows.corrected)?;
            put(uncorrected, rows.uncorrected)?;
            put(pending, u32::from(rows.pending))?;
            put(failed, u32::from(rows.failed))
        }
    })
}

/// # Safety
/// `out` points to a struct whose version is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetSramEccErrorStatus(handle: Handle, out: *mut SramStatus) -> c_int {
    answer("nvmlDeviceGetSramEccErrorStatus", handle, |device| {
        // SAFETY: as this function.
        if out.is_null() || unsafe { (*out).version } != SRAM_V1 {
            return Err(VERSION_MISMATCH);
        }
        let status = SramStatus { version: SRAM_V1, counters: [0; 11], exceeded: u32::from(device.sram_threshold) };
        // SAFETY: as this function.
        unsafe { put(out, status) }
    })
}

/// # Safety
/// `values` points to `count` entries with their ids set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetFieldValues(handle: Handle, count: c_int, values: *mut FieldValue) -> c_int {
    answer("nvmlDeviceGetFieldValues", handle, |device| {
        let count = usize::try_from(count).map_err(|_| INVALID_ARGUMENT)?;
        if values.is_null() {
            return Err(INVALID_ARGUMENT);
        }
        for at in 0..count {
            // SAFETY: as this function.
            let entry = unsafe { &mut *values.add(at) };
            match device.field(entry.id) {
                Ok(value) => (entry.kind, entry.result, entry.value) = (1, OK, value),
                Err(code) => entry.result = code,
            }
        }
        Ok(())
    })
}

/// # Safety
/// `out` points to a struct of the version that its first field names.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetGpuFabricInfoV(handle: Handle, out: *mut FabricInfo) -> c_int {
    answer("nvmlDeviceGetGpuFabricInfoV", handle, |device| {
        // SAFETY: as this function; the version is in every version of the struct.
        let version = if out.is_null() { 0 } else { unsafe { (*out).version } };
        if version != FABRIC_V2 && version != FABRIC_V3 {
            return Err(VERSION_MISMATCH);
        }
        let cluster = device.header.fabric.as_ref().map_or([0; 16], |fabric| uuid(&fabric.cluster));
        // SAFETY: these fields are in both versions; the caller vouches for the memory.
        unsafe {
            put(&raw mut (*out).cluster, cluster)?;
            put(&raw mut (*out).status, device.fabric.status.unwrap_or(OK))?;
            put(&raw mut (*out).clique, device.fabric.clique.unwrap_or(0))?;
            put(&raw mut (*out).state, device.fabric.state.unwrap_or(0))?;
            put(&raw mut (*out).mask, narrow(device.fabric.health_mask.map_or(0, |mask| mask.0))?)?;
        }
        if version == FABRIC_V3 {
            let summary = narrow(u64::from(device.fabric.health_summary.unwrap_or(0)))?;
            // SAFETY: version 3 has this field.
            unsafe { put(&raw mut (*out).summary, summary)? };
        }
        Ok(())
    })
}

fn uuid(text: &str) -> [u8; 16] {
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let mut out = [0; 16];
    for (at, byte) in out.iter_mut().enumerate() {
        *byte = digits.get(at * 2..at * 2 + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok()).unwrap_or(0);
    }
    out
}

/// # Safety
/// Both pointers are valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigMode(handle: Handle, current: *mut c_uint, pending: *mut c_uint) -> c_int {
    answer("nvmlDeviceGetMigMode", handle, |device| {
        let mode = u32::from(!device.header.mig.is_empty());
        // SAFETY: as this function.
        unsafe {
            put(current, mode)?;
            put(pending, mode)
        }
    })
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetCreate(out: *mut Handle) -> c_int {
    // SAFETY: as this function.
    unsafe { put(out, ptr::without_provenance_mut(1)) }.err().unwrap_or(OK)
}

/// # Safety
/// Always safe; the ABI makes it unsafe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetFree(_set: Handle) -> c_int {
    OK
}

/// # Safety
/// Always safe; the ABI makes it unsafe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceRegisterEvents(handle: Handle, events: c_ulonglong, _set: Handle) -> c_int {
    let symbol = "nvmlDeviceRegisterEvents";
    let hang = |state: &State| device(state, handle).map_or(0, |device| device.hang(symbol));
    instance().call(hang, |state| {
        let supported = state.events;
        let Some(device) = index(handle).and_then(|at| state.devices.get_mut(at)) else { return INVALID_ARGUMENT };
        if let Err(code) = device.admit(symbol) {
            return code;
        }
        if events & !supported != 0 {
            return NOT_SUPPORTED;
        }
        device.registered |= events;
        OK
    })
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetWait_v2(_set: Handle, out: *mut EventData, timeout_ms: c_uint) -> c_int {
    let limit = Duration::from_millis(u64::from(timeout_ms));
    let next = |state: &mut State| state.queue.pop_front();
    let Some((at, event)) = instance().wait(Some(limit), next) else { return TIMEOUT };
    let data = EventData {
        device: ptr::without_provenance_mut(at + 1),
        kind: event.kind.0,
        data: event.data,
        gpu_instance: event.gi,
        compute_instance: event.ci,
    };
    // SAFETY: as this function.
    unsafe { put(out, data) }.err().unwrap_or(OK)
}

berth_double_stage::controls!(State, instance);
