//! libdcmi.so and liblingqu-dcmi.so: symbols looked up at run time, one raw call per function. Layouts and
//! parameter orders are those of the open driver's dcmi_interface_api.h (x86_64 and aarch64 Linux agree).
//!
//! Every function is optional: an older driver lacks some, and the call then answers NOT_SUPPORT. A callback
//! runs on a thread of the driver: it copies the event and returns.
#![expect(unsafe_code, reason = "calls into the vendor's library")]

use std::{
    ffi::{OsStr, c_char, c_int, c_uint, c_void},
    mem,
};

use libloading::Library;

use super::{
    layout::{
        ChipInfo, DieId, DmsEvent, EccInfo, Elabel, Event, Filter, HbmInfo, HccsCounters, HccsCountersOld, LqEvent,
        LqFilter, PcieErrors, PcieInfo, Spod, Utilizations,
    },
    queue,
};

/// What every call returns.
pub(super) type Code = c_int;

pub(super) const OK: Code = 0;
pub(super) const TIME_OUT: Code = -8006;
pub(super) const NOT_EXIST: Code = -8008;
pub(super) const NOT_SUPPORT: Code = -8255;
/// Room of every list: with less than there is, a call answers -8001 and copies nothing.
pub(super) const ROOM: usize = 128;
const ROOM_INT: c_int = 128;
const ROOM_UINT: c_uint = 128;
/// `DCMI_MAIN_CMD_CHIP_INF`, `DCMI_CHIP_INF_SUB_CMD_SPOD_INFO`.
const SPOD: (c_uint, c_uint) = (12, 1);
/// `DCMI_MAIN_CMD_HCCS` with its counters of 64 bits, and those of 32 that older drivers have.
const HCCS: (c_uint, c_uint, c_uint) = (16, 5, 3);
/// `DCMI_DEVICE_TYPE_HBM` of the ECC call.
const HBM: c_uint = 2;
/// `INBAND_CHANNEL` of the reset call: the one that needs no other machine.
const IN_BAND: c_int = 1;
/// `VDIE`.
const VDIE: c_uint = 1;

/// An event of a device, as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RawEvent {
    pub(super) id: u32,
    /// Logic id of the device; the second generation's device id.
    pub(super) device: u16,
    pub(super) severity: u8,
    pub(super) assertion: u8,
    pub(super) serial: i32,
}

/// An event of a switch, as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RawSwitch {
    pub(super) alarm: u32,
    pub(super) fault: u32,
    pub(super) peer: u16,
    pub(super) chip: u16,
    pub(super) port: u16,
    pub(super) severity: u8,
    pub(super) assertion: u8,
}

type Handler = unsafe extern "C" fn(*mut Event);
type LqHandler = unsafe extern "C" fn(*mut LqEvent);

/// Generates a struct of optional functions and what opens it.
macro_rules! library {
    ($(#[$doc:meta])* $name:ident { $($field:ident = $symbol:literal: fn($($kind:ty),*);)+ }) => {
        $(#[$doc])*
        pub(super) struct $name {
            $($field: Option<unsafe extern "C" fn($($kind),*) -> Code>,)+
            /// Keeps the code mapped while the functions may run.
            _library: Library,
        }

        impl $name {
            /// Opens the library at `path` (a bare name is searched as the dynamic linker does).
            pub(super) fn open(path: &OsStr) -> Result<Self, libloading::Error> {
                // SAFETY: the vendor's initialisers run here; they have no requirement on the caller.
                let library = unsafe { Library::new(path)? };
                Ok(Self {
                    $(
                        // SAFETY: the type is that of the vendor's header for this symbol, and the library
                        // outlives it.
                        $field: unsafe { library.get::<unsafe extern "C" fn($($kind),*) -> Code>($symbol) }
                            .ok()
                            .map(|symbol| *symbol),
                    )+
                    _library: library,
                })
            }
        }
    };
}

library! {
    /// The management library, both generations.
    Api {
        init = b"dcmi_init\0": fn();
        init_2 = b"dcmiv2_init\0": fn();
        driver = b"dcmi_get_driver_version\0": fn(*mut c_char, c_uint);
        driver_2 = b"dcmiv2_get_driver_version\0": fn(*mut c_char, c_uint);
        driver_health = b"dcmi_get_driver_health\0": fn(*mut c_uint);
        driver_codes = b"dcmi_get_driver_errorcode\0": fn(*mut c_int, *mut c_uint, c_uint);
        cards = b"dcmi_get_card_list\0": fn(*mut c_int, *mut c_int, c_int);
        in_card = b"dcmi_get_device_id_in_card\0": fn(c_int, *mut c_int, *mut c_int, *mut c_int);
        list_2 = b"dcmiv2_get_device_list\0": fn(*mut c_int, *mut c_int, c_int);
        kind = b"dcmi_get_device_type\0": fn(c_int, c_int, *mut c_uint);
        kind_2 = b"dcmiv2_get_device_type\0": fn(c_int, *mut c_uint);
        logic = b"dcmi_get_device_logic_id\0": fn(*mut c_int, c_int, c_int);
        chip = b"dcmi_get_device_chip_info_v2\0": fn(c_int, c_int, *mut ChipInfo);
        chip_2 = b"dcmiv2_get_device_chip_info\0": fn(c_int, *mut ChipInfo);
        pcie = b"dcmi_get_device_pcie_info_v2\0": fn(c_int, c_int, *mut PcieInfo);
        pcie_2 = b"dcmiv2_get_device_pcie_info\0": fn(c_int, *mut PcieInfo);
        die = b"dcmi_get_device_die_v2\0": fn(c_int, c_int, c_uint, *mut DieId);
        elabel = b"dcmi_get_card_elabel_v2\0": fn(c_int, *mut Elabel);
        hbm = b"dcmi_get_device_hbm_info\0": fn(c_int, c_int, *mut HbmInfo);
        hbm_2 = b"dcmiv2_get_device_hbm_info\0": fn(c_int, *mut HbmInfo);
        info = b"dcmi_get_device_info\0": fn(c_int, c_int, c_uint, c_uint, *mut c_void, *mut c_uint);
        info_2 = b"dcmiv2_get_device_info\0": fn(c_int, c_uint, c_uint, *mut c_void, *mut c_uint);
        brother = b"dcmi_get_netdev_brother_device\0": fn(c_int, c_int, *mut c_int);
        health = b"dcmi_get_device_health\0": fn(c_int, c_int, *mut c_uint);
        health_2 = b"dcmiv2_get_device_health\0": fn(c_int, *mut c_uint);
        codes = b"dcmi_get_device_errorcode_v2\0": fn(c_int, c_int, *mut c_int, *mut c_uint, c_uint);
        codes_2 = b"dcmiv2_get_device_error_code_list\0": fn(c_int, *mut c_int, *mut c_uint, c_uint);
        boot = b"dcmi_get_device_boot_status\0": fn(c_int, c_int, *mut c_uint);
        boot_2 = b"dcmiv2_get_device_boot_status\0": fn(c_int, *mut c_uint);
        network = b"dcmi_get_device_network_health\0": fn(c_int, c_int, *mut c_uint);
        network_2 = b"dcmiv2_get_device_network_health\0": fn(c_int, *mut c_uint);
        ecc = b"dcmi_get_device_ecc_info\0": fn(c_int, c_int, c_uint, *mut EccInfo);
        ecc_2 = b"dcmiv2_get_device_ecc_info\0": fn(c_int, c_uint, *mut EccInfo);
        pcie_errors = b"dcmi_get_device_pcie_error_cnt\0": fn(c_int, c_int, *mut PcieErrors);
        physical = b"dcmi_get_device_phyid_from_logicid\0": fn(c_uint, *mut c_uint);
        physical_2 = b"dcmiv2_get_chip_phy_id_by_dev_id\0": fn(c_int, *mut c_uint);
        temperature = b"dcmi_get_device_temperature\0": fn(c_int, c_int, *mut c_int);
        temperature_2 = b"dcmiv2_get_device_temperature\0": fn(c_int, *mut c_int);
        power = b"dcmi_get_device_power_info\0": fn(c_int, c_int, *mut c_int);
        power_2 = b"dcmiv2_get_device_power_info\0": fn(c_int, *mut c_int);
        voltage = b"dcmi_get_device_voltage\0": fn(c_int, c_int, *mut c_uint);
        voltage_2 = b"dcmiv2_get_device_voltage\0": fn(c_int, *mut c_uint);
        frequency = b"dcmi_get_device_frequency\0": fn(c_int, c_int, c_uint, *mut c_uint);
        frequency_2 = b"dcmiv2_get_device_frequency\0": fn(c_int, c_uint, *mut c_uint);
        rate = b"dcmi_get_device_utilization_rate\0": fn(c_int, c_int, c_int, *mut c_uint);
        rate_2 = b"dcmiv2_get_device_utilization_rate\0": fn(c_int, c_int, *mut c_uint);
        rates = b"dcmi_get_device_multi_utilization_rate\0": fn(c_int, c_int, *mut Utilizations);
        rates_2 = b"dcmiv2_get_device_multi_utilization_rate\0": fn(c_int, *mut Utilizations);
        subscribe = b"dcmi_subscribe_fault_event\0": fn(c_int, c_int, Filter, Handler);
        subscribe_2 = b"dcmiv2_subscribe_fault_event\0": fn(c_int, Filter, Handler);
        reset = b"dcmi_set_device_reset\0": fn(c_int, c_int, c_int);
        reset_2 = b"dcmiv2_reset_device\0": fn(c_int, c_int);
        event = b"dcmi_get_fault_event\0": fn(c_int, c_int, c_int, Filter, *mut Event);
        event_2 = b"dcmiv2_get_fault_event\0": fn(c_int, c_int, Filter, *mut Event);
    }
}

library! {
    /// The library of the scale-up fabric's switches.
    Switches {
        init = b"lq_dcmi_init\0": fn();
        faults = b"lq_dcmi_get_fault_info\0": fn(c_uint, *mut c_uint, *mut LqEvent);
        subscribe = b"lq_dcmi_subscribe_fault_event\0": fn(LqFilter, LqHandler);
    }
}

/// Where a device is asked: by card and number on the card, or by the second generation's id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    First { card: c_int, device: c_int },
    Second { device: c_int },
}

fn ok<T>(code: Code, value: T) -> Result<T, Code> {
    if code == OK { Ok(value) } else { Err(code) }
}

/// Makes a call of either generation: the arguments behind the device's place are the same.
macro_rules! ask {
    ($at:expr, $first:expr, $second:expr $(, $argument:expr)*) => {
        match $at {
            At::First { card, device } => {
                let function = $first.ok_or(NOT_SUPPORT)?;
                // SAFETY: the signature is the vendor's, and what the pointers name is ours for the call.
                unsafe { function(card, device $(, $argument)*) }
            }
            At::Second { device } => {
                let function = $second.ok_or(NOT_SUPPORT)?;
                // SAFETY: as above.
                unsafe { function(device $(, $argument)*) }
            }
        }
    };
}

/// A struct of plain integers and bytes, all zero.
macro_rules! zeroed {
    ($kind:ty) => {{
        // SAFETY: plain integers and bytes, for which zero is a value.
        let value: $kind = unsafe { mem::zeroed() };
        value
    }};
}

const EVERYTHING: Filter = Filter { flag: 0, event: 0, severity: 0, node_type: 0, reserve: [0; 34] };
const EVERY_SWITCH: LqFilter = LqFilter { flag: 0, kind: 0, id: 0, severity: 0, chip: 0 };

/// The driver's thread brings an event.
unsafe extern "C" fn on_event(event: *mut Event) {
    if !event.is_null() {
        // SAFETY: not null; the driver vouches for it during this call, and it is copied.
        let fault = unsafe { (*event).fault };
        queue::put(queue::Item::Device(raw(&fault)));
    }
}

/// The switch library's thread brings an event.
unsafe extern "C" fn on_switch(event: *mut LqEvent) {
    if !event.is_null() {
        // SAFETY: as above.
        let fault = unsafe { *event };
        queue::put(queue::Item::Switch(raw_switch(&fault)));
    }
}

fn raw(event: &DmsEvent) -> RawEvent {
    let DmsEvent { id, device, severity, assertion, serial, .. } = *event;
    RawEvent { id, device, severity, assertion, serial }
}

fn raw_switch(event: &LqEvent) -> RawSwitch {
    let LqEvent { alarm, fault, peer_device: peer, chip, port, severity, assertion, .. } = *event;
    RawSwitch { alarm, fault, peer, chip, port, severity, assertion }
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).trim().to_owned()
}

fn listed<T: Copy>(count: c_int, list: &[T]) -> Vec<T> {
    let count = usize::try_from(count).unwrap_or(0);
    list.iter().take(count).copied().collect()
}

impl Api {
    pub(super) fn init(&self) -> Code {
        // SAFETY: no arguments; may be called again, and from any thread.
        self.init.map_or(NOT_SUPPORT, |init| unsafe { init() })
    }

    pub(super) fn init_2(&self) -> Code {
        // SAFETY: as above.
        self.init_2.map_or(NOT_SUPPORT, |init| unsafe { init() })
    }

    pub(super) fn driver(&self, second: bool) -> Result<String, Code> {
        let function = if second { self.driver_2 } else { self.driver }.ok_or(NOT_SUPPORT)?;
        let mut buffer = [0_u8; 65];
        // SAFETY: the buffer is longer than it is said to be.
        let code = unsafe { function(buffer.as_mut_ptr().cast(), 64) };
        ok(code, text(&buffer))
    }

    /// Health and codes of the driver itself; the first generation only.
    pub(super) fn driver_state(&self) -> Result<(u32, Vec<u32>), Code> {
        let function = self.driver_health.ok_or(NOT_SUPPORT)?;
        let mut health = 0;
        // SAFETY: `health` is ours for the call.
        ok(unsafe { function(&raw mut health) }, ())?;
        let Some(function) = self.driver_codes else { return Ok((health, Vec::new())) };
        let (mut count, mut list) = (0, [0; ROOM]);
        // SAFETY: the list is as long as it is said to be.
        let code = unsafe { function(&raw mut count, list.as_mut_ptr(), ROOM_UINT) };
        Ok((health, ok(code, listed(count, &list)).unwrap_or_default()))
    }

    pub(super) fn cards(&self) -> Result<Vec<c_int>, Code> {
        let function = self.cards.ok_or(NOT_SUPPORT)?;
        let (mut count, mut list) = (0, [0; ROOM]);
        // SAFETY: the list is as long as it is said to be.
        let code = unsafe { function(&raw mut count, list.as_mut_ptr(), ROOM_INT) };
        ok(code, listed(count, &list))
    }

    /// How many devices of a card compute.
    pub(super) fn in_card(&self, card: c_int) -> Result<c_int, Code> {
        let function = self.in_card.ok_or(NOT_SUPPORT)?;
        let (mut most, mut mcu, mut cpu) = (0, -1, -1);
        // SAFETY: three numbers of ours.
        let code = unsafe { function(card, &raw mut most, &raw mut mcu, &raw mut cpu) };
        ok(code, most)
    }

    /// Devices of the second generation.
    pub(super) fn devices_2(&self) -> Result<Vec<c_int>, Code> {
        let function = self.list_2.ok_or(NOT_SUPPORT)?;
        let (mut count, mut list) = (0, [0; ROOM]);
        // SAFETY: the list is as long as it is said to be.
        let code = unsafe { function(list.as_mut_ptr(), &raw mut count, ROOM_INT) };
        ok(code, listed(count, &list))
    }

    /// Whether it computes (0), and is no controller.
    pub(super) fn computes(&self, at: At) -> Result<bool, Code> {
        let mut kind = 0;
        ok(ask!(at, self.kind, self.kind_2, &raw mut kind), kind == 0)
    }

    pub(super) fn logic(&self, card: c_int, device: c_int) -> Result<c_int, Code> {
        let function = self.logic.ok_or(NOT_SUPPORT)?;
        let mut logic = 0;
        // SAFETY: `logic` is ours for the call.
        ok(unsafe { function(&raw mut logic, card, device) }, logic)
    }

    /// Names of the chip and of the NPU.
    pub(super) fn chip(&self, at: At) -> Result<(String, String), Code> {
        let mut info = zeroed!(ChipInfo);
        let code = ask!(at, self.chip, self.chip_2, &raw mut info);
        ok(code, (text(&info.name), text(&info.npu_name)))
    }

    /// Domain, bus, device.
    pub(super) fn pcie(&self, at: At) -> Result<(i32, u32, u32), Code> {
        let mut info = zeroed!(PcieInfo);
        let code = ask!(at, self.pcie, self.pcie_2, &raw mut info);
        ok(code, (info.domain, info.bus, info.device))
    }

    /// The die's own number; the first generation only.
    pub(super) fn die(&self, card: c_int, device: c_int) -> Result<[u32; 5], Code> {
        let function = self.die.ok_or(NOT_SUPPORT)?;
        let mut die = DieId { words: [0; 5] };
        // SAFETY: `die` has the vendor's layout and is ours for the call.
        ok(unsafe { function(card, device, VDIE, &raw mut die) }, die.words)
    }

    /// Serial number of a card; the first generation only.
    pub(super) fn serial(&self, card: c_int) -> Result<String, Code> {
        let function = self.elabel.ok_or(NOT_SUPPORT)?;
        let mut label = zeroed!(Elabel);
        // SAFETY: as above.
        let code = unsafe { function(card, &raw mut label) };
        ok(code, text(&label.serial))
    }

    /// Name, type and version of the chip as the vendor's exporter joins them.
    pub(super) fn model(&self, at: At) -> Result<String, Code> {
        let mut info = zeroed!(ChipInfo);
        let code = ask!(at, self.chip, self.chip_2, &raw mut info);
        ok(code, format!("{}-{}-{}", text(&info.name), text(&info.kind), text(&info.version)))
    }

    /// Number of the chip on its board.
    pub(super) fn physical(&self, at: At, logic: c_int) -> Result<c_int, Code> {
        let mut physical = 0;
        let code = match at {
            At::First { .. } => {
                let function = self.physical.ok_or(NOT_SUPPORT)?;
                let logic = c_uint::try_from(logic).map_err(|_| NOT_SUPPORT)?;
                // SAFETY: `physical` is ours for the call.
                unsafe { function(logic, &raw mut physical) }
            }
            At::Second { device } => {
                let function = self.physical_2.ok_or(NOT_SUPPORT)?;
                // SAFETY: as above.
                unsafe { function(device, &raw mut physical) }
            }
        };
        ok(code, ())?;
        c_int::try_from(physical).map_err(|_| NOT_SUPPORT)
    }

    /// Megabytes of memory on the device.
    pub(super) fn hbm(&self, at: At) -> Result<u64, Code> {
        self.hbm_use(at).map(|info| info.size)
    }

    /// The device's memory: megabytes, use, temperature.
    pub(super) fn hbm_use(&self, at: At) -> Result<HbmInfo, Code> {
        let mut info = zeroed!(HbmInfo);
        let code = ask!(at, self.hbm, self.hbm_2, &raw mut info);
        ok(code, info)
    }

    /// Degrees C.
    pub(super) fn temperature(&self, at: At) -> Result<c_int, Code> {
        let mut value = 0;
        ok(ask!(at, self.temperature, self.temperature_2, &raw mut value), value)
    }

    /// Tenths of a watt.
    pub(super) fn power(&self, at: At) -> Result<c_int, Code> {
        let mut value = 0;
        ok(ask!(at, self.power, self.power_2, &raw mut value), value)
    }

    /// Hundredths of a volt.
    pub(super) fn voltage(&self, at: At) -> Result<u32, Code> {
        let mut value = 0;
        ok(ask!(at, self.voltage, self.voltage_2, &raw mut value), value)
    }

    /// MHz of what `kind` names.
    pub(super) fn frequency(&self, at: At, kind: c_uint) -> Result<u32, Code> {
        let mut value = 0;
        ok(ask!(at, self.frequency, self.frequency_2, kind, &raw mut value), value)
    }

    /// Percent of what `kind` names.
    pub(super) fn utilization(&self, at: At, kind: c_int) -> Result<u32, Code> {
        let mut value = 0;
        ok(ask!(at, self.rate, self.rate_2, kind, &raw mut value), value)
    }

    /// Percent of every unit at once; newer drivers only.
    pub(super) fn utilizations(&self, at: At) -> Result<Utilizations, Code> {
        let mut values = zeroed!(Utilizations);
        let code = ask!(at, self.rates, self.rates_2, &raw mut values);
        ok(code, values)
    }

    /// Number of its super-pod.
    pub(super) fn super_pod(&self, at: At) -> Result<u32, Code> {
        let mut info = zeroed!(Spod);
        let mut size: c_uint = 48;
        let out: *mut Spod = &raw mut info;
        let code = ask!(at, self.info, self.info_2, SPOD.0, SPOD.1, out.cast(), &raw mut size);
        ok(code, info.id)
    }

    /// The card that shares its network port; the first generation only.
    pub(super) fn brother(&self, card: c_int, device: c_int) -> Result<c_int, Code> {
        let function = self.brother.ok_or(NOT_SUPPORT)?;
        let mut brother = 0;
        // SAFETY: `brother` is ours for the call.
        ok(unsafe { function(card, device, &raw mut brother) }, brother)
    }

    pub(super) fn health(&self, at: At) -> Result<u32, Code> {
        let mut health = 0;
        ok(ask!(at, self.health, self.health_2, &raw mut health), health)
    }

    pub(super) fn codes(&self, at: At) -> Result<Vec<u32>, Code> {
        let (mut count, mut list) = (0, [0; ROOM]);
        let code = ask!(at, self.codes, self.codes_2, &raw mut count, list.as_mut_ptr(), ROOM_UINT);
        ok(code, listed(count, &list))
    }

    pub(super) fn boot(&self, at: At) -> Result<u32, Code> {
        let mut boot = 0;
        ok(ask!(at, self.boot, self.boot_2, &raw mut boot), boot)
    }

    /// Resets a device, with all that can only be reset with it. Blocks for as long as that takes.
    pub(super) fn reset(&self, at: At) -> Result<(), Code> {
        ok(ask!(at, self.reset, self.reset_2, IN_BAND), ())
    }

    pub(super) fn network(&self, at: At) -> Result<u32, Code> {
        let mut network = 0;
        ok(ask!(at, self.network, self.network_2, &raw mut network), network)
    }

    /// Pages that the next reset isolates. A driver with the shorter layout leaves both at zero.
    pub(super) fn next_isolated(&self, at: At) -> Result<u32, Code> {
        self.errors(at).map(|info| info.single_next.saturating_add(info.double_next))
    }

    /// Errors of the device's memory.
    pub(super) fn errors(&self, at: At) -> Result<EccInfo, Code> {
        let mut info = zeroed!(EccInfo);
        let code = ask!(at, self.ecc, self.ecc_2, HBM, &raw mut info);
        ok(code, info)
    }

    /// Damaged packets on the link to the host since the chip started; the first generation only.
    pub(super) fn host_errors(&self, at: At) -> Result<u64, Code> {
        let At::First { card, device } = at else { return Err(NOT_SUPPORT) };
        let function = self.pcie_errors.ok_or(NOT_SUPPORT)?;
        let mut info = zeroed!(PcieErrors);
        // SAFETY: `info` has the vendor's layout and is ours for the call.
        ok(unsafe { function(card, device, &raw mut info) }, ())?;
        let counters = [info.symbol_unlock, info.received, info.lanes, info.link_crc, info.data_crc];
        Ok(counters.into_iter().map(u64::from).sum())
    }

    /// Damaged and repeated packets on the scale-up links since the chip started.
    pub(super) fn fabric_errors(&self, at: At) -> Result<u64, Code> {
        let mut info = zeroed!(HccsCounters);
        let mut size: c_uint = 1024;
        let out: *mut HccsCounters = &raw mut info;
        let code = ask!(at, self.info, self.info_2, HCCS.0, HCCS.1, out.cast(), &raw mut size);
        if code == OK {
            return Ok(info.crc.into_iter().chain(info.retries).fold(0, u64::saturating_add));
        }
        let mut info = zeroed!(HccsCountersOld);
        let mut size: c_uint = 512;
        let out: *mut HccsCountersOld = &raw mut info;
        let code = ask!(at, self.info, self.info_2, HCCS.0, HCCS.2, out.cast(), &raw mut size);
        ok(code, info.crc.into_iter().chain(info.retries).map(u64::from).sum())
    }

    /// Subscribes to the events of all devices; they arrive in [`queue`].
    pub(super) fn subscribe(&self, second: bool) -> Result<(), Code> {
        let every = if second { At::Second { device: -1 } } else { At::First { card: -1, device: -1 } };
        ok(ask!(every, self.subscribe, self.subscribe_2, EVERYTHING, on_event), ())
    }

    /// Blocks for at most `timeout_ms`, by the library's word.
    pub(super) fn event(&self, at: At, timeout_ms: c_int) -> Result<RawEvent, Code> {
        let mut event = zeroed!(Event);
        let code = ask!(at, self.event, self.event_2, timeout_ms, EVERYTHING, &raw mut event);
        ok(code, raw(&event.fault))
    }
}

impl Switches {
    pub(super) fn init(&self) -> Code {
        // SAFETY: no arguments; may be called again, and from any thread.
        self.init.map_or(NOT_SUPPORT, |init| unsafe { init() })
    }

    /// Faults that the switches hold now.
    pub(super) fn faults(&self) -> Result<Vec<RawSwitch>, Code> {
        let function = self.faults.ok_or(NOT_SUPPORT)?;
        let (mut count, mut list) = (0, [zeroed!(LqEvent); ROOM]);
        // SAFETY: the list is as long as it is said to be.
        let code = unsafe { function(ROOM_UINT, &raw mut count, list.as_mut_ptr()) };
        let count = usize::try_from(count).unwrap_or(0);
        ok(code, list.iter().take(count).map(raw_switch).collect())
    }

    /// Subscribes to every event; they arrive in [`queue`].
    pub(super) fn subscribe(&self) -> Result<(), Code> {
        let function = self.subscribe.ok_or(NOT_SUPPORT)?;
        // SAFETY: the filter is passed by value, and the handler may run on any thread for ever.
        ok(unsafe { function(EVERY_SWITCH, on_switch) }, ())
    }
}
