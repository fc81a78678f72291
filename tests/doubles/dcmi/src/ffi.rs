//! The exported symbols: C layouts in, C layouts out. Nothing is decided here.
//!
//! Layouts and codes: dcmi_interface_api.h of the open driver, and mind-cluster's where a later field is known
//! from there only. Both generations and the switches' library live in this one file, so that one script drives
//! all three.
#![expect(unsafe_code, reason = "a C ABI is what this crate is for")]

use std::{
    ffi::{c_char, c_int, c_uint, c_ulong, c_void},
    thread,
    time::Duration,
};

use berth_double_stage::{ffi::put_text, users::users};

use crate::{
    script::{Codes, Fault, SwitchFault},
    state::{Device, Event, INVALID, NOT_EXIST, NOT_SUPPORT, OCCUPIED, OK, State, TIME_OUT, instance},
};

/// `struct dcmi_chip_info_v2`.
#[repr(C)]
#[derive(Debug)]
pub struct ChipInfo {
    kind: [u8; 32],
    name: [u8; 32],
    version: [u8; 32],
    cores: u32,
    npu_name: [u8; 32],
}

/// `struct dcmi_pcie_info_all`.
#[repr(C)]
#[derive(Debug)]
pub struct PcieInfo {
    vendor: u32,
    subvendor: u32,
    device_id: u32,
    subdevice: u32,
    domain: i32,
    bus: u32,
    device: u32,
    function: u32,
    reserve: [u8; 32],
}

/// `struct dcmi_hbm_info`; megabytes.
#[repr(C)]
#[derive(Debug)]
pub struct HbmInfo {
    size: u64,
    frequency: u32,
    usage: u64,
    temperature: i32,
    bandwidth: u32,
}

/// `struct dcmi_multi_utilization_info`; percent.
#[repr(C)]
#[derive(Debug)]
pub struct Utilizations {
    aic: u32,
    aiv: u32,
    aicore: u32,
    npu: u32,
    reserve: [u32; 8],
}

/// `struct dcmi_elabel_info`.
#[repr(C)]
#[derive(Debug)]
pub struct Elabel {
    product: [u8; 256],
    model: [u8; 256],
    manufacturer: [u8; 256],
    date: [u8; 256],
    serial: [u8; 256],
}

/// `struct dcmi_spod_info`.
#[repr(C)]
#[derive(Debug)]
pub struct Spod {
    sdid: u32,
    size: u32,
    id: u32,
    server: u32,
    chassis: u32,
    kind: u32,
    reserve: [u32; 6],
}

/// `struct dcmi_ecc_info`.
#[repr(C)]
#[derive(Debug)]
pub struct EccInfo {
    enabled: i32,
    counters: [u32; 6],
    single_next: u32,
    double_next: u32,
}

/// `struct dcmi_event_filter`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Filter {
    flag: u64,
    event: u32,
    severity: u8,
    node_type: u8,
    reserve: [u8; 34],
}

/// `struct dcmi_event` with its only kind of event.
#[repr(C)]
#[derive(Debug)]
pub struct FaultEvent {
    kind: c_uint,
    gap: u32,
    id: u32,
    device: u16,
    node_type: u8,
    node: u8,
    sub_node_type: u8,
    sub_node: u8,
    severity: u8,
    assertion: u8,
    serial: i32,
    notify_serial: i32,
    raised: u64,
    name: [u8; 256],
    additional: [u8; 32],
    reserve: [u8; 32],
}

/// `struct LqDcmiEvent`.
#[repr(C)]
#[derive(Debug)]
pub struct LqEvent {
    alarm: u32,
    fault: u32,
    peer_device: u16,
    peer: u16,
    chip: u16,
    port: u16,
    severity: u8,
    assertion: u8,
    reserve: [u8; 6],
    serial: u32,
    notify_serial: u32,
    raised: c_ulong,
    parameter: [u8; 40],
    information: [u8; 32],
}

/// `struct lq_dcmi_event_filter`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct LqFilter {
    flag: c_uint,
    kind: u32,
    id: u32,
    severity: u8,
    chip: u32,
}

/// `struct dcmi_hccs_statistic_info_u64`, one entry for each of the chip's 16 link layers.
#[repr(C)]
#[derive(Debug)]
pub struct HccsCounters {
    sent: [u64; 16],
    received: [u64; 16],
    crc: [u64; 16],
    retries: [u64; 16],
    reserve: [u64; 64],
}

/// `struct dcmi_chip_pcie_err_rate`.
#[repr(C)]
#[derive(Debug)]
pub struct PcieErrors {
    status: [u32; 4],
    symbol_unlock: u32,
    received: u32,
    lanes: u32,
    more_status: [u32; 3],
    link_crc: u32,
    data_crc: u32,
}

const _: () = assert!(
    size_of::<HccsCounters>() == 1024
        && size_of::<PcieErrors>() == 48
        && size_of::<ChipInfo>() == 132
        && size_of::<PcieInfo>() == 64
        && size_of::<HbmInfo>() == 32
        && size_of::<Utilizations>() == 48
        && size_of::<Elabel>() == 1280
        && size_of::<Spod>() == 48
        && size_of::<EccInfo>() == 36
        && size_of::<Filter>() == 48
        && size_of::<FaultEvent>() == 360
        && size_of::<LqEvent>() == 112
        && size_of::<LqFilter>() == 20
);

/// Takes an event on a thread of ours.
pub type Handler = unsafe extern "C" fn(*mut FaultEvent);
/// Takes an event of a switch on a thread of ours.
pub type LqHandler = unsafe extern "C" fn(*mut LqEvent);

/// Writes `value` where the caller wants it.
///
/// # Safety
/// `out` is null or valid for a write of `T`.
unsafe fn put<T>(out: *mut T, value: T) -> Result<(), c_int> {
    // SAFETY: as this function.
    unsafe { berth_double_stage::ffi::put(out, value, INVALID) }
}

/// Writes a list and its length; too little room is a refusal that copies nothing.
///
/// # Safety
/// `list` is valid for `room` values, `count` for one.
unsafe fn put_list<T>(list: *mut T, count: *mut c_int, room: usize, values: Vec<T>) -> Result<(), c_int> {
    if values.len() > room || list.is_null() {
        return Err(INVALID);
    }
    let length = c_int::try_from(values.len()).map_err(|_| INVALID)?;
    for (at, value) in values.into_iter().enumerate() {
        // SAFETY: within the room that the caller vouches for.
        unsafe { list.add(at).write(value) };
    }
    // SAFETY: as this function.
    unsafe { put(count, length) }
}

fn bytes<const N: usize>(text: &str) -> [u8; N] {
    let mut out = [0; N];
    for (slot, byte) in out.iter_mut().zip(text.bytes().take(N - 1)) {
        *slot = byte;
    }
    out
}

fn narrow<T: TryFrom<u64>>(value: u64) -> Result<T, c_int> {
    T::try_from(value).map_err(|_| INVALID)
}

/// One call on a device: its generation, its hang, its refusal, else `read`.
fn answer(symbol: &str, card: c_int, device: c_int, read: impl FnOnce(&mut Device) -> Result<(), c_int>) -> c_int {
    let of =
        |state: &State| state.find(card, device).and_then(|at| state.devices.get(at)).map_or(0, |it| it.hang(symbol));
    instance().call(of, |state| {
        let read = |state: &mut State| {
            state.generation(symbol)?;
            let at = state.find(card, device).ok_or(NOT_EXIST)?;
            let device = state.devices.get_mut(at).ok_or(NOT_EXIST)?;
            device.admit(symbol)?;
            read(device)
        };
        read(state).err().unwrap_or(OK)
    })
}

/// A reset of a device: refused as any call on it, or as occupied while a worker or a probe is on what goes with it. Else
/// all that goes with it is well, now and for the next process that reads the script. A line beside the script says that
/// it was asked for and what came of it.
fn reset(symbol: &str, card: c_int, device: c_int) -> c_int {
    let script = std::env::var_os("BERTH_DOUBLE_SCRIPT");
    let along = instance().call(|_| 0, |state| state.along(card));
    let in_use = || {
        let script = script.as_deref().unwrap_or_default();
        users(script, |local| along.iter().any(|(card, device)| local == format!("{card}.{device}")))
    };
    let mut users = in_use();
    let mut code = answer(symbol, card, device, |_| Ok(()));
    users.extend(in_use());
    let said = match (code, users.is_empty()) {
        (OK, true) => String::new(),
        (OK, false) => {
            code = OCCUPIED;
            format!(" in use by {}", users.join(", "))
        }
        _ => " refused".to_owned(),
    };
    let well = if code == OK { instance().call(|_| 0, |state| state.reset(card)) } else { Vec::new() };
    if let Some(script) = script {
        let path = std::path::PathBuf::from(format!("{}.resets", std::path::Path::new(&script).display()));
        append(&path, &format!("{card}.{device}{said}"));
        well.iter().for_each(|line| append(std::path::Path::new(&script), line));
    }
    code
}

/// A line at the end of a file; one that cannot be written is missed by whoever looks for it.
fn append(path: &std::path::Path, line: &str) {
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    let _ = file.and_then(|mut file| std::io::Write::write_all(&mut file, format!("{line}\n").as_bytes()));
}

/// Resets a device.
#[unsafe(no_mangle)]
pub extern "C" fn dcmi_set_device_reset(card: c_int, device: c_int, _: c_int) -> c_int {
    reset("dcmi_set_device_reset", card, device)
}

/// Resets a device of the second generation.
#[unsafe(no_mangle)]
pub extern "C" fn dcmiv2_reset_device(device: c_int, _: c_int) -> c_int {
    reset("dcmiv2_reset_device", device, 0)
}

/// One call on the library: its generation, its hang, its refusal, else `read`.
fn whole(symbol: &str, read: impl FnOnce(&mut State) -> Result<(), c_int>) -> c_int {
    let read = |state: &mut State| state.admit(symbol).and_then(|()| read(state));
    instance().call(|state| state.hang(symbol), |state| read(state).err().unwrap_or(OK))
}

/// Both generations of a call on a device; the second names it by its card alone.
macro_rules! both {
    ($($first:ident, $second:ident($($name:ident: $kind:ty),*) => $read:expr;)+) => { $(
        /// # Safety
        /// Each pointer is valid for what the vendor's header says.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $first(card: c_int, device: c_int $(, $name: $kind)*) -> c_int {
            let read: unsafe fn(&mut Device $(, $kind)*) -> Result<(), c_int> = $read;
            // SAFETY: as this function.
            answer(stringify!($first), card, device, |device| unsafe { read(device $(, $name)*) })
        }

        /// # Safety
        /// Each pointer is valid for what the vendor's header says.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $second(device: c_int $(, $name: $kind)*) -> c_int {
            let read: unsafe fn(&mut Device $(, $kind)*) -> Result<(), c_int> = $read;
            // SAFETY: as this function.
            answer(stringify!($second), device, 0, |device| unsafe { read(device $(, $name)*) })
        }
    )+ };
}

both! {
    dcmi_get_device_type, dcmiv2_get_device_type(out: *mut c_uint) => |_, out| unsafe { put(out, 0) };
    dcmi_get_device_health, dcmiv2_get_device_health(out: *mut c_uint) => |device, out| {
        let health = narrow(device.health.get()?)?;
        unsafe { put(out, health) }
    };
    dcmi_get_device_network_health, dcmiv2_get_device_network_health(out: *mut c_uint) => |device, out| {
        let health = narrow(device.network.get()?)?;
        unsafe { put(out, health) }
    };
    dcmi_get_device_boot_status, dcmiv2_get_device_boot_status(out: *mut c_uint) => |device, out| {
        let boot = narrow(device.boot.get()?)?;
        unsafe { put(out, boot) }
    };
    dcmi_get_device_temperature, dcmiv2_get_device_temperature(out: *mut c_int) => |device, out| {
        let temperature = narrow(device.temperature.get()?)?;
        unsafe { put(out, temperature) }
    };
    // Tenths of a watt, hundredths of a volt, MHz.
    dcmi_get_device_power_info, dcmiv2_get_device_power_info(out: *mut c_int) => |device, out| {
        let power = narrow(device.power.get()?)?;
        unsafe { put(out, power) }
    };
    dcmi_get_device_voltage, dcmiv2_get_device_voltage(out: *mut c_uint) => |_, out| unsafe { put(out, 85) };
    dcmi_get_device_frequency, dcmiv2_get_device_frequency(kind: c_uint, out: *mut c_uint) => |_, kind, out| {
        if kind != 7 {
            return Err(NOT_SUPPORT);
        }
        unsafe { put(out, 1800) }
    };
    dcmi_get_device_utilization_rate, dcmiv2_get_device_utilization_rate(
        kind: c_int, out: *mut c_uint
    ) => |device, kind, out| {
        if ![2, 12, 13].contains(&kind) {
            return Err(NOT_SUPPORT);
        }
        let rate = narrow(device.utilization.get()?)?;
        unsafe { put(out, rate) }
    };
    dcmi_get_device_multi_utilization_rate, dcmiv2_get_device_multi_utilization_rate(
        out: *mut Utilizations
    ) => |device, out| {
        let npu = narrow(device.utilization.get()?)?;
        unsafe { put(out, Utilizations { aic: npu, aiv: npu, aicore: npu, npu, reserve: [0; 8] }) }
    };
    dcmi_get_device_errorcode_v2, dcmiv2_get_device_error_code_list(
        count: *mut c_int, list: *mut c_uint, room: c_uint
    ) => |device, count, list, room| {
        let codes = match &device.codes {
            Codes::List(codes) => codes.iter().map(|code| narrow(code.0)).collect::<Result<Vec<u32>, _>>()?,
            Codes::Code { code } => return Err(*code),
        };
        unsafe { put_list(list, count, usize::try_from(room).unwrap_or(0), codes) }
    };
    dcmi_get_device_chip_info_v2, dcmiv2_get_device_chip_info(out: *mut ChipInfo) => |device, out| {
        let product = device.header.product.clone().unwrap_or_default();
        let info = ChipInfo {
            kind: bytes("Ascend"),
            name: bytes(&product),
            version: bytes("V1"),
            cores: 20,
            npu_name: bytes(&product),
        };
        unsafe { put(out, info) }
    };
    dcmi_get_device_pcie_info_v2, dcmiv2_get_device_pcie_info(out: *mut PcieInfo) => |device, out| {
        let text = device.header.pci.clone().ok_or(NOT_SUPPORT)?;
        let mut parts = text.split([':', '.']).map(|part| u32::from_str_radix(part, 16).map_err(|_| NOT_SUPPORT));
        let mut part = || parts.next().unwrap_or(Err(NOT_SUPPORT));
        let (domain, bus, device) = (part()?, part()?, part()?);
        let domain = i32::try_from(domain).map_err(|_| NOT_SUPPORT)?;
        let (vendor, subvendor, device_id, subdevice) = (0x19e5, 0x19e5, 0xd802, 0);
        let info = PcieInfo {
            vendor, subvendor, device_id, subdevice, domain, bus, device, function: 0, reserve: [0; 32],
        };
        unsafe { put(out, info) }
    };
    dcmi_get_device_hbm_info, dcmiv2_get_device_hbm_info(out: *mut HbmInfo) => |device, out| {
        let (size, usage) = (device.hbm() >> 20, device.hbm_used.get()? >> 20);
        let temperature = narrow(device.temperature.get()?)?;
        unsafe { put(out, HbmInfo { size, frequency: 1600, usage, temperature, bandwidth: 0 }) }
    };
    dcmi_get_device_ecc_info, dcmiv2_get_device_ecc_info(kind: c_uint, out: *mut EccInfo) => |device, _, out| {
        let double_next = narrow(device.next_isolated.get()?)?;
        unsafe { put(out, EccInfo { enabled: 1, counters: [0; 6], single_next: 0, double_next }) }
    };
    dcmi_get_device_info, dcmiv2_get_device_info(
        main: c_uint, sub: c_uint, out: *mut c_void, size: *mut c_uint
    ) => |device, main, sub, out, size| {
        let pod = device.header.superpod;
        match (main, sub) {
            (12, 1) => {
                let id = pod.ok_or(NOT_SUPPORT)?;
                let room = if size.is_null() { 0 } else { unsafe { *size } };
                if room < 48 {
                    return Err(INVALID);
                }
                let spod = Spod { sdid: 0, size: 384, id, server: 0, chassis: 0, kind: 0, reserve: [0; 6] };
                unsafe { put(out.cast(), spod) }
            }
            (12, 2) => {
                pod.ok_or(NOT_SUPPORT)?;
                let sdid = if out.is_null() { return Err(INVALID) } else { unsafe { *out.cast::<u32>() } };
                let status = device.superpod_status.get(&sdid).copied().unwrap_or(0);
                unsafe { put(out.cast(), status) }
            }
            (16, 5) => {
                let room = if size.is_null() { 0 } else { unsafe { *size } };
                if room < 1024 {
                    return Err(INVALID);
                }
                let (mut crc, mut retries) = ([0; 16], [0; 16]);
                (crc[1], retries[1]) = (device.hccs_crc_errors.get()?, device.hccs_retries.get()?);
                let info = HccsCounters { sent: [0; 16], received: [0; 16], crc, retries, reserve: [0; 64] };
                unsafe { put(out.cast(), info) }
            }
            _ => Err(NOT_SUPPORT),
        }
    };
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcmi_get_device_pcie_error_cnt(card: c_int, device: c_int, out: *mut PcieErrors) -> c_int {
    answer("dcmi_get_device_pcie_error_cnt", card, device, |device| {
        let link_crc = narrow(device.pcie_errors.get()?)?;
        let (status, more_status) = ([0; 4], [0; 3]);
        let info = PcieErrors { status, symbol_unlock: 0, received: 0, lanes: 0, more_status, link_crc, data_crc: 0 };
        // SAFETY: as this function.
        unsafe { put(out, info) }
    })
}

/// Both generations of a call on the library.
macro_rules! both_whole {
    ($($first:ident, $second:ident($($name:ident: $kind:ty),*) => $read:expr;)+) => { $(
        both_whole!(@one $first($($name: $kind),*) => $read);
        both_whole!(@one $second($($name: $kind),*) => $read);
    )+ };
    (@one $symbol:ident($($name:ident: $kind:ty),*) => $read:expr) => {
        /// # Safety
        /// Each pointer is valid for what the vendor's header says.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $symbol($($name: $kind),*) -> c_int {
            let read: unsafe fn(&mut State $(, $kind)*) -> Result<(), c_int> = $read;
            // SAFETY: as this function.
            whole(stringify!($symbol), |state| unsafe { read(state $(, $name)*) })
        }
    };
}

both_whole! {
    dcmi_init, dcmiv2_init() => |state| if state.init == OK { Ok(()) } else { Err(state.init) };
    dcmi_get_driver_version, dcmiv2_get_driver_version(out: *mut c_char, length: c_uint) => |state, out, length| {
        unsafe { put_text(out, length, &state.driver, INVALID) }
    };
    dcmi_get_all_device_count, dcmiv2_get_all_device_count(out: *mut c_int) => |state, out| {
        let count = c_int::try_from(state.devices.len()).map_err(|_| INVALID)?;
        unsafe { put(out, count) }
    };
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcmi_get_driver_health(out: *mut c_uint) -> c_int {
    // SAFETY: as this function.
    whole("dcmi_get_driver_health", |_| unsafe { put(out, 0) })
}

/// # Safety
/// `list` is valid for `room` values, `count` for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcmi_get_driver_errorcode(count: *mut c_int, list: *mut c_uint, room: c_uint) -> c_int {
    let room = usize::try_from(room).unwrap_or(0);
    // SAFETY: as this function.
    whole("dcmi_get_driver_errorcode", |_| unsafe { put_list(list, count, room, Vec::new()) })
}

/// # Safety
/// `list` is valid for `room` values, `count` for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcmi_get_card_list(count: *mut c_int, list: *mut c_int, room: c_int) -> c_int {
    whole("dcmi_get_card_list", |state| {
        let mut cards: Vec<c_int> = state.devices.iter().map(|device| device.header.card).collect();
        cards.sort_unstable();
        cards.dedup();
        // SAFETY: as this function.
        unsafe { put_list(list, count, usize::try_from(room).unwrap_or(0), cards) }
    })
}

/// # Safety
/// `list` is valid for `room` values, `count` for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcmiv2_get_device_list(list: *mut c_int, count: *mut c_int, room: c_int) -> c_int {
    whole("dcmiv2_get_device_list", |state| {
        let devices = state.devices.iter().map(|device| device.header.card).collect();
        // SAFETY: as this function.
        unsafe { put_list(list, count, usize::try_from(room).unwrap_or(0), devices) }
    })
}

/// # Safety
/// Each pointer is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcmi_get_device_id_in_card(
    card: c_int,
    most: *mut c_int,
    mcu: *mut c_int,
    cpu: *mut c_int,
) -> c_int {
    whole("dcmi_get_device_id_in_card", |state| {
        let of = state.devices.iter().filter(|device| device.header.card == card);
        let last = of.map(|device| device.header.device).max().ok_or(NOT_EXIST)?;
        // SAFETY: as this function.
        unsafe {
            put(most, last.saturating_add(1))?;
            put(mcu, -1)?;
            put(cpu, -1)
        }
    })
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcmi_get_device_logic_id(out: *mut c_int, card: c_int, device: c_int) -> c_int {
    answer("dcmi_get_device_logic_id", card, device, |device| {
        // SAFETY: as this function.
        unsafe { put(out, c_int::from(device.logic)) }
    })
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcmi_get_device_phyid_from_logicid(logic: c_uint, out: *mut c_uint) -> c_int {
    // SAFETY: as this function.
    whole("dcmi_get_device_phyid_from_logicid", |_| unsafe { put(out, logic) })
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcmiv2_get_chip_phy_id_by_dev_id(device: c_int, out: *mut c_uint) -> c_int {
    whole("dcmiv2_get_chip_phy_id_by_dev_id", |_| {
        let device = c_uint::try_from(device).map_err(|_| INVALID)?;
        // SAFETY: as this function.
        unsafe { put(out, device) }
    })
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcmi_get_card_elabel_v2(card: c_int, out: *mut Elabel) -> c_int {
    answer("dcmi_get_card_elabel_v2", card, 0, |device| {
        let serial = device.header.serial.clone().ok_or(NOT_SUPPORT)?;
        let (product, model, date) = (bytes(""), bytes(""), bytes(""));
        let label = Elabel { product, model, manufacturer: bytes("Huawei"), date, serial: bytes(&serial) };
        // SAFETY: as this function.
        unsafe { put(out, label) }
    })
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcmi_get_netdev_brother_device(card: c_int, device: c_int, out: *mut c_int) -> c_int {
    answer("dcmi_get_netdev_brother_device", card, device, |device| {
        let brother = device.header.brother.ok_or(NOT_SUPPORT)?;
        // SAFETY: as this function.
        unsafe { put(out, brother) }
    })
}

fn fault_event(logic: u16, fault: &Fault, serial: i32) -> FaultEvent {
    FaultEvent {
        kind: 0,
        gap: 0,
        id: u32::try_from(fault.id.0).unwrap_or(u32::MAX),
        device: logic,
        node_type: 0,
        node: 0,
        sub_node_type: 0,
        sub_node: 0,
        severity: fault.severity,
        assertion: fault.assertion.number(),
        serial,
        notify_serial: serial,
        raised: 0,
        name: [0; 256],
        additional: [0; 32],
        reserve: [0; 32],
    }
}

/// Starts the thread that hands events to `handler`.
fn deliver(handler: Handler) {
    // The thread ends when every wait does.
    thread::spawn(move || {
        let next = |state: &mut State| state.next(|event| matches!(event, Event::Device(..)));
        while let Some(event) = instance().wait(None, next) {
            if let Event::Device(logic, fault, serial) = event {
                let mut event = fault_event(logic, &fault, serial);
                // SAFETY: the subscriber vouches for its handler; the event is ours during the call.
                unsafe { handler(&raw mut event) };
            }
        }
    });
}

fn subscribe(symbol: &str, handler: Handler) -> c_int {
    let code = whole(symbol, |state| {
        state.subscribed = true;
        Ok(())
    });
    if code == OK {
        deliver(handler);
    }
    code
}

/// # Safety
/// `handler` may be called from any thread, for ever.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcmi_subscribe_fault_event(_: c_int, _: c_int, _: Filter, handler: Handler) -> c_int {
    subscribe("dcmi_subscribe_fault_event", handler)
}

/// # Safety
/// `handler` may be called from any thread, for ever.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcmiv2_subscribe_fault_event(_: c_int, _: Filter, handler: Handler) -> c_int {
    subscribe("dcmiv2_subscribe_fault_event", handler)
}

fn event_of(symbol: &str, card: c_int, device: c_int, timeout_ms: c_int) -> Result<FaultEvent, c_int> {
    let mut logic = 0;
    let code = answer(symbol, card, device, |device| {
        (device.asked, logic) = (true, device.logic);
        Ok(())
    });
    if code != OK {
        return Err(code);
    }
    let next = |state: &mut State| state.next(|event| matches!(event, Event::Device(of, ..) if *of == logic));
    let found = match u64::try_from(timeout_ms) {
        Ok(0) => instance().call(|_| 0, next),
        Ok(limit) => instance().wait(Some(Duration::from_millis(limit)), next),
        Err(_) => instance().wait(None, next),
    };
    match found {
        Some(Event::Device(logic, fault, serial)) => Ok(fault_event(logic, &fault, serial)),
        _ => Err(TIME_OUT),
    }
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcmi_get_fault_event(
    card: c_int,
    device: c_int,
    timeout_ms: c_int,
    _: Filter,
    out: *mut FaultEvent,
) -> c_int {
    let found = event_of("dcmi_get_fault_event", card, device, timeout_ms);
    // SAFETY: as this function.
    found.and_then(|event| unsafe { put(out, event) }).err().unwrap_or(OK)
}

/// # Safety
/// `out` is valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcmiv2_get_fault_event(
    device: c_int,
    timeout_ms: c_int,
    _: Filter,
    out: *mut FaultEvent,
) -> c_int {
    let found = event_of("dcmiv2_get_fault_event", device, 0, timeout_ms);
    // SAFETY: as this function.
    found.and_then(|event| unsafe { put(out, event) }).err().unwrap_or(OK)
}

fn switch_event(fault: &SwitchFault) -> LqEvent {
    let peer_device = match fault.peer.as_deref() {
        Some("cpu") => 0,
        Some("npu") => 1,
        Some("L2") => 2,
        _ => u16::MAX,
    };
    LqEvent {
        alarm: u32::try_from(fault.id.0).unwrap_or(u32::MAX),
        fault: fault.fault.unwrap_or(u32::MAX),
        peer_device,
        peer: 0,
        chip: fault.chip,
        port: fault.port.unwrap_or(if peer_device == u16::MAX { u16::MAX } else { 0 }),
        severity: fault.severity,
        assertion: fault.assertion.number(),
        reserve: [0; 6],
        serial: 0,
        notify_serial: 0,
        raised: 0,
        parameter: [0; 40],
        information: [0; 32],
    }
}

/// # Safety
/// Always safe; the ABI makes it unsafe.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lq_dcmi_init() -> c_int {
    OK
}

/// # Safety
/// `list` is valid for `room` values, `count` for one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lq_dcmi_get_fault_info(room: c_uint, count: *mut c_uint, list: *mut LqEvent) -> c_int {
    instance().call(
        |_| 0,
        |state| {
            let faults = state.switch_faults.iter().map(switch_event).collect();
            // SAFETY: as this function; a count is not negative.
            unsafe { put_list(list, count.cast(), usize::try_from(room).unwrap_or(0), faults) }.err().unwrap_or(OK)
        },
    )
}

/// # Safety
/// `handler` may be called from any thread, for ever.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lq_dcmi_subscribe_fault_event(_: LqFilter, handler: LqHandler) -> c_int {
    instance().call(|_| 0, |state| state.switches_subscribed = true);
    thread::spawn(move || {
        let next = |state: &mut State| state.next(|event| matches!(event, Event::Switch(_)));
        while let Some(event) = instance().wait(None, next) {
            if let Event::Switch(fault) = event {
                let mut event = switch_event(&fault);
                // SAFETY: as for the devices' events.
                unsafe { handler(&raw mut event) };
            }
        }
    });
    OK
}

berth_double_stage::controls!(State, instance);
