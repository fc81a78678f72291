//! Ascend devices under npu-exporter's names and labels, so that boards made for it go on showing. Pure: a view in,
//! text out. What no call of ours reads is left out; docs/compatible-metrics.md lists it.

use berth_runtime::telemetry::{count, large};
use berth_types::{Health, Vendor};

use super::{
    Device, Holder, View,
    text::{Labels, Text},
    thousandth,
};

/// One gauge: its name and help, and how its value is had; `None` = not written for this device.
type Gauge = (&'static str, &'static str, fn(&Device) -> Option<f64>);

/// Codes that are written of one device, each under a name of its own.
const CODES: usize = 8;

/// What is written of each device, in order; the codes, name and serial number of the device besides.
pub const GAUGES: &[Gauge] = &[
    ("npu_chip_info_health_status", "1 healthy, 0 not, -1 unknown", |device| {
        Some(device.seen.vendor_health.map_or(-1.0, |health| f64::from(u8::from(health == 0))))
    }),
    ("npu_chip_info_temperature", "Temperature, degrees C", |device| device.temperature().map(f64::from)),
    ("npu_chip_info_power", "Power draw, W", |device| device.measured.power_mw.map(thousandth)),
    ("npu_chip_info_voltage", "Voltage, V", |device| device.measured.voltage_mv.map(thousandth)),
    ("npu_chip_info_aicore_current_freq", "Clock of the AI cores, MHz", |device| {
        device.measured.clock_mhz.map(f64::from)
    }),
    ("npu_chip_info_utilization", "Use of the AI cores, percent", |device| device.measured.busy.core.map(f64::from)),
    ("npu_chip_info_overall_utilization", "Use of the device, percent", |device| {
        device.measured.busy.device.map(f64::from)
    }),
    ("npu_chip_info_vector_utilization", "Use of the vector units, percent", |device| {
        device.measured.busy.vector.map(f64::from)
    }),
    ("npu_chip_info_cube_utilization", "Use of the matrix units, percent", |device| {
        device.measured.busy.cube.map(f64::from)
    }),
    ("npu_chip_info_network_status", "1 while the network port is well, else 0", |device| {
        device.seen.network_up.map(|up| f64::from(u8::from(up)))
    }),
    ("npu_chip_info_hbm_total_memory", "Memory, MB", |device| Some(large(device.measured.memory?.total >> 20))),
    ("npu_chip_info_hbm_used_memory", "Memory in use, MB", |device| Some(large(device.measured.memory?.used >> 20))),
    ("npu_chip_info_hbm_utilization", "Memory in use, percent", |device| {
        let memory = device.measured.memory.filter(|memory| memory.total > 0)?;
        Some(large(memory.used.saturating_mul(100) / memory.total))
    }),
    ("npu_chip_info_hbm_temperature", "Temperature of the memory, degrees C", |device| {
        device.measured.memory_temperature.map(f64::from)
    }),
    ("npu_chip_info_hbm_bandwidth_utilization", "Use of the memory's bandwidth, percent", |device| {
        device.measured.busy.memory.map(f64::from)
    }),
    ("npu_chip_info_hbm_ecc_enable_flag", "1 while memory errors are looked for", |device| {
        device.measured.errors.enabled.map(|enabled| f64::from(u8::from(enabled)))
    }),
    ("npu_chip_info_hbm_ecc_single_bit_error_cnt", "Corrected memory errors", |device| {
        device.measured.errors.corrected.map(large)
    }),
    ("npu_chip_info_hbm_ecc_double_bit_error_cnt", "Uncorrected memory errors", |device| {
        device.measured.errors.uncorrected.map(large)
    }),
    ("npu_chip_info_hbm_ecc_total_single_bit_error_cnt", "Corrected memory errors, life long", |device| {
        device.measured.errors.corrected_ever.map(large)
    }),
    ("npu_chip_info_hbm_ecc_total_double_bit_error_cnt", "Uncorrected memory errors, life long", |device| {
        device.measured.errors.uncorrected_ever.map(large)
    }),
    ("npu_chip_info_hbm_ecc_single_bit_isolated_pages_cnt", "Pages isolated for corrected errors", |device| {
        device.measured.errors.retired_corrected.map(large)
    }),
    ("npu_chip_info_hbm_ecc_double_bit_isolated_pages_cnt", "Pages isolated for uncorrected errors", |device| {
        device.measured.errors.retired_uncorrected.map(large)
    }),
];

/// The text. `holder` is the pod that hosted devices are given to, if it is known.
#[must_use]
pub fn render(view: &View, holder: Option<&Holder>) -> String {
    let ours: Vec<&Device> = view.devices.values().filter(|device| device.info().vendor == Vendor::Ascend).collect();
    let mut text = Text::default();
    if ours.is_empty() {
        return text.finish();
    }
    let devices: Vec<(Labels, &Device)> =
        ours.iter().map(|device| (labels("model_name", device, holder), *device)).collect();
    machine(&mut text, &ours);
    let named: Vec<Labels> = ours.iter().map(|device| labels("name", device, holder)).collect();
    text.family("npu_chip_info_name", "gauge", "1; its label is the name", named.iter().map(|labels| (labels, 1.0)));
    for (name, help, value) in GAUGES {
        let samples = devices.iter().filter_map(|(labels, device)| Some((labels, value(device)?)));
        text.family(name, "gauge", help, samples);
    }
    for index in 0..CODES {
        let name =
            if index == 0 { "npu_chip_info_error_code".into() } else { format!("npu_chip_info_error_code_{index}") };
        let samples = devices.iter().filter_map(|(labels, device)| Some((labels, code(device, index)?)));
        text.family(&name, "gauge", "A code of a fault that holds, 0 for none", samples);
    }
    text.finish()
}

/// The code at `index`; the first is 0 when there is none.
fn code(device: &Device, index: usize) -> Option<f64> {
    let codes = device.seen.codes.as_ref()?;
    codes.get(index).copied().map(f64::from).or((index == 0).then_some(0.0))
}

fn machine(text: &mut Text, devices: &[&Device]) {
    let bare = Labels::new();
    let cards: std::collections::BTreeSet<&str> = devices.iter().map(|device| device.info().card.as_str()).collect();
    let of = |wanted: fn(Health) -> bool| {
        count(devices.iter().filter(|device| wanted(device.shown.standing.state.health)).count())
    };
    let known = |health| matches!(health, Health::Healthy | Health::Degraded);
    for (name, help, value) in [
        ("machine_npu_nums", "Devices of the node", count(devices.len())),
        ("machine_card_nums", "Cards of the node", count(cards.len())),
        ("machine_healthy_npu_nums", "Devices that are healthy or degraded", of(known)),
        ("machine_unhealthy_npu_nums", "Devices that are unhealthy", of(|health| health == Health::Unhealthy)),
        ("machine_unknown_npu_nums", "Devices that cannot be seen", of(|health| health == Health::Unknown)),
    ] {
        text.family(name, "gauge", help, [(&bare, value)]);
    }
}

fn labels(model: &'static str, device: &Device, holder: Option<&Holder>) -> Labels {
    let info = device.info();
    let holder = holder.filter(|_| device.hosted);
    let part = |part: fn(&Holder) -> &String| holder.map(part).cloned().unwrap_or_default();
    let bus = info.pci.map(|pci| format!("{:04X}:{:02X}:{:02X}.0", pci.domain, pci.bus, pci.device));
    // A die's number is five words; a serial number in its place is no die.
    let die = if info.uuid.split('-').count() == 5 { info.uuid.to_uppercase() } else { String::new() };
    vec![
        ("id", device.measured.index.map(|index| index.to_string()).unwrap_or_default()),
        (model, device.measured.model.clone().unwrap_or_else(|| info.product.clone())),
        ("vdie_id", die),
        ("pcie_bus_info", bus.unwrap_or_default()),
        ("namespace", part(|holder| &holder.namespace)),
        ("pod_name", part(|holder| &holder.pod)),
        ("container_name", part(|holder| &holder.container)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vitals::tests::{holder, view};

    #[test]
    fn a_device_is_written_under_the_exporters_names_and_labels() {
        let text = render(&view(), Some(&holder()));
        let labels = "id=\"4\",model_name=\"910B3-Ascend-V1\",vdie_id=\"0000000A-00000000-00000000-00000000-0000000B\",\
                      pcie_bus_info=\"0000:C1:00.0\",namespace=\"\",pod_name=\"\",container_name=\"\"";
        for (name, value) in [
            ("npu_chip_info_health_status", "0"),
            ("npu_chip_info_temperature", "52"),
            ("npu_chip_info_power", "93.4"),
            ("npu_chip_info_voltage", "0.85"),
            ("npu_chip_info_utilization", "40"),
            ("npu_chip_info_hbm_total_memory", "65536"),
            ("npu_chip_info_hbm_used_memory", "32768"),
            ("npu_chip_info_hbm_utilization", "50"),
            ("npu_chip_info_network_status", "1"),
            ("npu_chip_info_error_code", "2162169857"),
            ("npu_chip_info_error_code_1", "2162169858"),
            ("npu_chip_info_hbm_ecc_double_bit_error_cnt", "2"),
        ] {
            let line = format!("# TYPE {name} gauge\n{name}{{{labels}}} {value}\n");
            assert!(text.contains(&line), "{line} in {text}");
        }
        let name = labels.replace("model_name", "name");
        assert!(text.contains(&format!("npu_chip_info_name{{{name}}} 1\n")), "{text}");
        for line in ["machine_npu_nums 1\n", "machine_card_nums 1\n", "machine_unhealthy_npu_nums 1\n"] {
            assert!(text.contains(line), "{line} in {text}");
        }
        assert!(!text.contains("H200") && !text.contains("error_code_2"), "{text}");
        let missing: Vec<_> = GAUGES.iter().filter(|(name, ..)| !text.contains(&format!("\n{name}{{"))).collect();
        assert!(missing.is_empty(), "each gauge is read of this device: {missing:?} in {text}");
    }

    #[test]
    fn a_node_without_ascend_says_nothing_and_an_unread_device_says_that_it_is_unknown() {
        let mut view = view();
        for device in view.devices.values_mut() {
            (device.measured, device.seen) = Default::default();
        }
        let text = render(&view, None);
        assert!(text.contains("npu_chip_info_health_status{id=\"\",model_name=\"910B3\""), "{text}");
        assert!(text.contains("} -1\n") && !text.contains("hbm") && !text.contains("error_code"), "{text}");
        view.devices.retain(|_, device| device.info().vendor == Vendor::Nvidia);
        assert_eq!(render(&view, None), "");
    }
}
