//! Structs of libdcmi.so and liblingqu-dcmi.so, as the open driver's headers lay them out. Nothing but data.

use std::ffi::{c_uint, c_ulong};

/// `struct dcmi_chip_info_v2`.
#[repr(C)]
pub(super) struct ChipInfo {
    pub(super) kind: [u8; 32],
    pub(super) name: [u8; 32],
    pub(super) version: [u8; 32],
    pub(super) cores: u32,
    pub(super) npu_name: [u8; 32],
}

/// `struct dcmi_pcie_info_all`.
#[repr(C)]
pub(super) struct PcieInfo {
    pub(super) vendor: u32,
    pub(super) subvendor: u32,
    pub(super) device_id: u32,
    pub(super) subdevice: u32,
    pub(super) domain: i32,
    pub(super) bus: u32,
    pub(super) device: u32,
    pub(super) function: u32,
    pub(super) reserve: [u8; 32],
}

/// `struct dcmi_hbm_info`; megabytes.
#[repr(C)]
pub(super) struct HbmInfo {
    pub(super) size: u64,
    pub(super) frequency: u32,
    pub(super) usage: u64,
    pub(super) temperature: i32,
    pub(super) bandwidth: u32,
}

/// `struct dcmi_multi_utilization_info`; percent.
#[repr(C)]
pub(super) struct Utilizations {
    pub(super) aic: u32,
    pub(super) aiv: u32,
    pub(super) aicore: u32,
    pub(super) npu: u32,
    pub(super) reserve: [u32; 8],
}

/// `struct dcmi_elabel_info`.
#[repr(C)]
pub(super) struct Elabel {
    pub(super) product: [u8; 256],
    pub(super) model: [u8; 256],
    pub(super) manufacturer: [u8; 256],
    pub(super) date: [u8; 256],
    pub(super) serial: [u8; 256],
}

/// `struct dcmi_die_id`.
#[repr(C)]
pub(super) struct DieId {
    pub(super) words: [u32; 5],
}

/// `struct dcmi_spod_info`.
#[repr(C)]
pub(super) struct Spod {
    pub(super) sdid: u32,
    pub(super) size: u32,
    pub(super) id: u32,
    pub(super) server: u32,
    pub(super) chassis: u32,
    pub(super) kind: u32,
    pub(super) reserve: [u32; 6],
}

/// `struct dcmi_ecc_info` with room for the longer of its two layouts.
#[repr(C)]
pub(super) struct EccInfo {
    pub(super) enabled: i32,
    pub(super) single: u32,
    pub(super) double: u32,
    pub(super) total_single: u32,
    pub(super) total_double: u32,
    pub(super) single_isolated: u32,
    pub(super) double_isolated: u32,
    pub(super) single_next: u32,
    pub(super) double_next: u32,
}

/// `struct dcmi_hccs_statistic_info_u64`: counters of 16 links each.
#[repr(C)]
pub(super) struct HccsCounters {
    pub(super) sent: [u64; 16],
    pub(super) received: [u64; 16],
    pub(super) crc: [u64; 16],
    pub(super) retries: [u64; 16],
    pub(super) reserve: [u64; 64],
}

/// `struct dcmi_hccs_statistic_info`, of older drivers.
#[repr(C)]
pub(super) struct HccsCountersOld {
    pub(super) sent: [u32; 16],
    pub(super) received: [u32; 16],
    pub(super) crc: [u32; 16],
    pub(super) retries: [u32; 16],
    pub(super) reserve: [u32; 64],
}

/// `struct dcmi_chip_pcie_err_rate`: states of registers, and counters of what was damaged.
#[repr(C)]
pub(super) struct PcieErrors {
    pub(super) states: [u32; 4],
    pub(super) symbol_unlock: u32,
    pub(super) received: u32,
    pub(super) lanes: u32,
    pub(super) more_states: [u32; 3],
    pub(super) link_crc: u32,
    pub(super) data_crc: u32,
}

/// `struct dcmi_event_filter`, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Filter {
    pub(super) flag: u64,
    pub(super) event: u32,
    pub(super) severity: u8,
    pub(super) node_type: u8,
    pub(super) reserve: [u8; 34],
}

/// `struct dcmi_dms_fault_event`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct DmsEvent {
    pub(super) id: u32,
    pub(super) device: u16,
    pub(super) node_type: u8,
    pub(super) node: u8,
    pub(super) sub_node_type: u8,
    pub(super) sub_node: u8,
    pub(super) severity: u8,
    pub(super) assertion: u8,
    pub(super) serial: i32,
    pub(super) notify_serial: i32,
    pub(super) raised: u64,
    pub(super) name: [u8; 256],
    pub(super) additional: [u8; 32],
    pub(super) reserve: [u8; 32],
}

/// `struct dcmi_event`; its only kind is 0.
#[repr(C)]
pub(super) struct Event {
    pub(super) kind: c_uint,
    pub(super) fault: DmsEvent,
}

/// `struct LqDcmiEvent`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct LqEvent {
    pub(super) alarm: u32,
    pub(super) fault: u32,
    pub(super) peer_device: u16,
    pub(super) peer: u16,
    pub(super) chip: u16,
    pub(super) port: u16,
    pub(super) severity: u8,
    pub(super) assertion: u8,
    pub(super) reserve: [u8; 6],
    pub(super) serial: u32,
    pub(super) notify_serial: u32,
    pub(super) raised: c_ulong,
    pub(super) parameter: [u8; 40],
    pub(super) information: [u8; 32],
}

/// `struct lq_dcmi_event_filter`, passed by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct LqFilter {
    pub(super) flag: c_uint,
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) severity: u8,
    pub(super) chip: u32,
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn structs_have_the_sizes_of_the_vendors_header() {
        let sizes = [
            (size_of::<ChipInfo>(), 132),
            (size_of::<PcieInfo>(), 64),
            (size_of::<HbmInfo>(), 32),
            (size_of::<Utilizations>(), 48),
            (size_of::<Elabel>(), 1280),
            (size_of::<DieId>(), 20),
            (size_of::<Spod>(), 48),
            (size_of::<EccInfo>(), 36),
            (size_of::<HccsCounters>(), 1024),
            (size_of::<HccsCountersOld>(), 512),
            (size_of::<PcieErrors>(), 48),
            (size_of::<Filter>(), 48),
            (size_of::<DmsEvent>(), 352),
            (size_of::<Event>(), 360),
            (size_of::<LqEvent>(), 112),
            (size_of::<LqFilter>(), 20),
        ];
        assert!(sizes.iter().all(|(is, must)| is == must), "{sizes:?}");
        assert_eq!((align_of::<Filter>(), align_of::<Event>(), align_of::<LqFilter>()), (8, 8, 4));
    }

    #[test]
    fn fields_lie_where_the_vendors_header_has_them() {
        let offsets = [
            (offset_of!(ChipInfo, npu_name), 100),
            (offset_of!(PcieInfo, domain), 16),
            (offset_of!(PcieInfo, device), 24),
            (offset_of!(HbmInfo, usage), 16),
            (offset_of!(HbmInfo, bandwidth), 28),
            (offset_of!(Elabel, serial), 1024),
            (offset_of!(Spod, id), 8),
            (offset_of!(EccInfo, single_next), 28),
            (offset_of!(EccInfo, double_next), 32),
            (offset_of!(HccsCounters, crc), 256),
            (offset_of!(HccsCounters, retries), 384),
            (offset_of!(HccsCountersOld, crc), 128),
            (offset_of!(PcieErrors, symbol_unlock), 16),
            (offset_of!(PcieErrors, link_crc), 40),
            (offset_of!(Filter, severity), 12),
            (offset_of!(Event, fault), 8),
            (offset_of!(DmsEvent, device), 4),
            (offset_of!(DmsEvent, severity), 10),
            (offset_of!(DmsEvent, assertion), 11),
            (offset_of!(DmsEvent, serial), 12),
            (offset_of!(DmsEvent, raised), 24),
            (offset_of!(DmsEvent, additional), 288),
            (offset_of!(LqEvent, chip), 12),
            (offset_of!(LqEvent, severity), 16),
            (offset_of!(LqEvent, assertion), 17),
            (offset_of!(LqEvent, raised), 32),
            (offset_of!(LqEvent, information), 80),
            (offset_of!(LqFilter, chip), 16),
        ];
        assert!(offsets.iter().all(|(is, must)| is == must), "{offsets:?}");
    }
}
