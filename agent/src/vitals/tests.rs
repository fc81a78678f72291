//! Two devices, one of each vendor, of which everything was read.

use std::time::Duration;

use berth_types::{Action, Admission, DeviceState, Health, NodeName, Reason, Scope, Vendor};

use super::*;
use crate::health::fact::{Source, Xid};

pub(crate) fn node() -> NodeName {
    "gpu-01".parse().unwrap()
}

pub(crate) fn holder() -> Holder {
    Holder { namespace: "berth-system".into(), pod: "berth-agent-x".into(), container: "agent".into() }
}

fn standing(state: DeviceState) -> Standing {
    Standing { state, evidence: String::new(), since: Duration::ZERO }
}

fn info(vendor: Vendor, local: &str, product: &str, uuid: &str, pci: &str) -> DeviceInfo {
    DeviceInfo {
        local: local.into(),
        vendor,
        product: product.into(),
        uuid: uuid.into(),
        memory_bytes: 64 << 30,
        interconnect_domain: None,
        card: "card 0".into(),
        pci: Some(pci.parse().unwrap()),
        reset_group: None,
        driver_branch: None,
    }
}

fn lost() -> DeviceState {
    DeviceState {
        health: Health::Unhealthy,
        admission: Admission::Barred,
        action: Action::ResetDevice,
        scope: Some(Scope::Device),
        reason: Some(Reason::DeviceLost),
    }
}

fn errors() -> Errors {
    Errors {
        enabled: Some(true),
        corrected: Some(1),
        uncorrected: Some(2),
        corrected_ever: Some(3),
        uncorrected_ever: Some(4),
        retired_corrected: Some(5),
        retired_uncorrected: Some(6),
    }
}

fn nvidia() -> (Sight, Measured) {
    let seen = Sight {
        temperature: Some(45),
        corrected: Some(1),
        uncorrected: Some(2),
        repairs_pending: Some(0),
        repair_failed: Some(false),
        slowed_by_heat: Some(true),
        slowed_by_power: Some(false),
        ..Sight::default()
    };
    let memory = Memory { total: 141 << 30, used: 1 << 30, free: Some(140 << 30), reserved: Some(512 << 20) };
    let busy = Busy { device: Some(83), memory: Some(41), encoder: Some(0), decoder: Some(0), ..Busy::default() };
    let measured = Measured {
        index: Some(1),
        driver: Some("570.133.20".into()),
        memory: Some(memory),
        memory_temperature: Some(50),
        power_mw: Some(120_500),
        energy_mj: Some(7_000_001),
        clock_mhz: Some(1980),
        memory_clock_mhz: Some(3201),
        busy,
        errors: errors(),
        bus_replays: Some(9),
        links_down: Some(1),
        ..Measured::default()
    };
    (seen, measured)
}

fn ascend() -> (Sight, Measured) {
    let seen = Sight {
        repairs_pending: Some(1),
        network_up: Some(true),
        vendor_health: Some(3),
        codes: Some(vec![0x80E0_1801, 0x80E0_1802]),
        ..Sight::default()
    };
    let busy =
        Busy { device: Some(44), memory: Some(12), core: Some(40), vector: Some(7), cube: Some(33), ..Busy::default() };
    let measured = Measured {
        index: Some(4),
        model: Some("910B3-Ascend-V1".into()),
        memory: Some(Memory { total: 64 << 30, used: 32 << 30, free: None, reserved: None }),
        temperature: Some(52),
        memory_temperature: Some(48),
        power_mw: Some(93_400),
        voltage_mv: Some(850),
        clock_mhz: Some(1800),
        busy,
        errors: errors(),
        ..Measured::default()
    };
    (seen, measured)
}

/// A board that was told of everything once.
pub(crate) fn board() -> Board {
    let board = Board::default();
    let die = "0000000a-00000000-00000000-00000000-0000000b";
    let gpu = info(Vendor::Nvidia, "0000:3b:00.0", "NVIDIA H200", "GPU-1", "0000:3b:00.0");
    let npu = info(Vendor::Ascend, "0.0", "910B3", die, "0000:c1:00.0");
    let shown = |info: DeviceInfo, state| (info.local.clone(), Shown { info, standing: standing(state), trace: None });
    let devices = [shown(gpu, DeviceState::HEALTHY), shown(npu, lost())].into();
    let blind = DeviceState { health: Health::Unknown, reason: Some(Reason::AgentBlind), ..DeviceState::HEALTHY };
    board.show(&devices, &standing(DeviceState { scope: Some(Scope::Node), ..blind }));
    for (local, (seen, measured)) in [("0000:3b:00.0", nvidia()), ("0.0", ascend())] {
        board.see(local, seen);
        board.measure(local, Some(measured));
    }
    let xid = Xid {
        number: 94,
        source: Source::Event,
        pid: None,
        process: String::new(),
        gpu_instance: None,
        message: String::new(),
    };
    board.take(&Fact::device("0000:3b:00.0", What::Xid(xid)));
    for step in [ResetStep::Started, ResetStep::Failed, ResetStep::Started, ResetStep::Done] {
        board.take(&Fact::device("0.0", What::Reset(step)));
    }
    board.host("0000:3b:00.0", true);
    board
}

pub(crate) fn view() -> View {
    board().view()
}

#[test]
fn whoever_looks_asks_for_measurements_and_what_is_forgotten_is_not_shown() {
    let board = board();
    let scrapes = board.scrapes();
    assert!(!scrapes.has_changed().unwrap());
    assert!(board.view().devices["0000:3b:00.0"].measured.power_mw.is_some());
    assert!(scrapes.has_changed().unwrap());
    board.measure("0000:3b:00.0", None);
    board.host("0000:3b:00.0", false);
    let device = &board.view().devices["0000:3b:00.0"];
    assert_eq!((device.measured.clone(), device.hosted, device.xid), (Measured::default(), false, 94));
}

#[test]
fn resets_are_counted_by_how_they_ended() {
    let device = &view().devices["0.0"];
    assert_eq!((device.resets_done, device.resets_failed), (1, 1));
}

#[test]
fn a_device_that_is_gone_from_the_node_is_gone_from_the_view() {
    let board = board();
    board.show(&BTreeMap::new(), &standing(DeviceState::HEALTHY));
    assert!(board.view().devices.is_empty());
}
