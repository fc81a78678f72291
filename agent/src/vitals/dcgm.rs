//! NVIDIA devices under the names, kinds and labels of dcgm-exporter's default counters, so that boards made for it
//! go on showing. Pure: a view in, text out. What no call of ours reads is left out; docs/compatible-metrics.md lists it.

use berth_runtime::telemetry::large;
use berth_types::{NodeName, Vendor};

use super::{
    Device, Holder, View,
    text::{Labels, Text},
    thousandth,
};

/// One counter: its name, kind and help, and how its value is had; `None` = not written for this device.
type Counter = (&'static str, &'static str, &'static str, fn(&Device) -> Option<f64>);

/// What is written, in order.
pub const COUNTERS: &[Counter] = &[
    ("DCGM_FI_DEV_SM_CLOCK", "gauge", "Clock of the multiprocessors, MHz.", |device| {
        device.measured.clock_mhz.map(f64::from)
    }),
    ("DCGM_FI_DEV_MEM_CLOCK", "gauge", "Clock of the memory, MHz.", |device| {
        device.measured.memory_clock_mhz.map(f64::from)
    }),
    ("DCGM_FI_DEV_MEMORY_TEMP", "gauge", "Temperature of the memory, degrees C.", |device| {
        device.measured.memory_temperature.map(f64::from)
    }),
    ("DCGM_FI_DEV_GPU_TEMP", "gauge", "Temperature of the chip, degrees C.", |device| {
        device.temperature().map(f64::from)
    }),
    ("DCGM_FI_DEV_POWER_USAGE", "gauge", "Power draw, W.", |device| device.measured.power_mw.map(thousandth)),
    ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "counter", "Energy since the driver was loaded, mJ.", |device| {
        device.measured.energy_mj.map(large)
    }),
    ("DCGM_FI_DEV_PCIE_REPLAY_COUNTER", "counter", "Retries on the PCIe bus.", |device| {
        device.measured.bus_replays.map(large)
    }),
    ("DCGM_FI_DEV_GPU_UTIL", "gauge", "Time in which a kernel ran, percent.", |device| {
        device.measured.busy.device.map(f64::from)
    }),
    ("DCGM_FI_DEV_MEM_COPY_UTIL", "gauge", "Time in which memory was read or written, percent.", |device| {
        device.measured.busy.memory.map(f64::from)
    }),
    ("DCGM_FI_DEV_ENC_UTIL", "gauge", "Use of the encoders, percent.", |device| {
        device.measured.busy.encoder.map(f64::from)
    }),
    ("DCGM_FI_DEV_DEC_UTIL", "gauge", "Use of the decoders, percent.", |device| {
        device.measured.busy.decoder.map(f64::from)
    }),
    ("DCGM_FI_DEV_XID_ERRORS", "gauge", "The last XID, 0 for none since the agent began.", |device| {
        Some(f64::from(device.xid))
    }),
    ("DCGM_FI_DEV_FB_FREE", "gauge", "Free memory, MiB.", |device| mebibytes(device.measured.memory?.free)),
    ("DCGM_FI_DEV_FB_USED", "gauge", "Memory in use, MiB.", |device| mebibytes(Some(device.measured.memory?.used))),
    ("DCGM_FI_DEV_FB_RESERVED", "gauge", "Reserved memory, MiB.", |device| mebibytes(device.measured.memory?.reserved)),
    ("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS", "counter", "Rows remapped for uncorrected errors.", |device| {
        device.measured.errors.retired_uncorrected.map(large)
    }),
    ("DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS", "counter", "Rows remapped for corrected errors.", |device| {
        device.measured.errors.retired_corrected.map(large)
    }),
    ("DCGM_FI_DEV_ROW_REMAP_FAILURE", "gauge", "1 when a remapping of rows failed.", |device| {
        device.seen.repair_failed.map(|failed| f64::from(u8::from(failed)))
    }),
];

/// The text. `holder` is the pod that hosted devices are given to, if it is known.
#[must_use]
pub fn render(view: &View, node: &NodeName, holder: Option<&Holder>) -> String {
    let ours = view.devices.values().filter(|device| device.info().vendor == Vendor::Nvidia);
    let devices: Vec<(Labels, &Device)> = ours.map(|device| (labels(device, node, holder), device)).collect();
    let mut text = Text::default();
    for (name, kind, help, value) in COUNTERS {
        let samples = devices.iter().filter_map(|(labels, device)| Some((labels, value(device)?)));
        text.family(name, kind, help, samples);
    }
    text.finish()
}

fn labels(device: &Device, node: &NodeName, holder: Option<&Holder>) -> Labels {
    let info = device.info();
    let index = device.measured.index.map(|index| index.to_string()).unwrap_or_default();
    let named = if index.is_empty() { String::new() } else { format!("nvidia{index}") };
    let bus = info.pci.map(|pci| format!("{:08X}:{:02X}:{:02X}.0", pci.domain, pci.bus, pci.device));
    let mut labels = vec![
        ("gpu", index),
        ("UUID", info.uuid.clone()),
        ("pci_bus_id", bus.unwrap_or_default()),
        ("device", named),
        ("modelName", info.product.clone()),
        // The exporter wrote the first until May 2026, and writes the second since.
        ("Hostname", node.to_string()),
        ("hostname", node.to_string()),
    ];
    labels.extend(device.measured.driver.clone().map(|driver| ("DCGM_FI_DRIVER_VERSION", driver)));
    if let Some(holder) = holder.filter(|_| device.hosted) {
        let Holder { namespace, pod, container } = holder.clone();
        labels.extend([("container", container), ("namespace", namespace), ("pod", pod)]);
    }
    labels
}

fn mebibytes(bytes: Option<u64>) -> Option<f64> {
    bytes.map(|bytes| large(bytes >> 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vitals::tests::{holder, node, view};

    #[test]
    fn a_device_is_written_under_the_exporters_names_and_labels() {
        let text = render(&view(), &node(), Some(&holder()));
        let labels = "gpu=\"1\",UUID=\"GPU-1\",pci_bus_id=\"00000000:3B:00.0\",device=\"nvidia1\",modelName=\"NVIDIA H200\",\
                      Hostname=\"gpu-01\",hostname=\"gpu-01\",DCGM_FI_DRIVER_VERSION=\"570.133.20\",container=\"agent\",\
                      namespace=\"berth-system\",pod=\"berth-agent-x\"";
        for (name, kind, value) in [
            ("DCGM_FI_DEV_SM_CLOCK", "gauge", "1980"),
            ("DCGM_FI_DEV_GPU_TEMP", "gauge", "45"),
            ("DCGM_FI_DEV_POWER_USAGE", "gauge", "120.5"),
            ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "counter", "7000001"),
            ("DCGM_FI_DEV_GPU_UTIL", "gauge", "83"),
            ("DCGM_FI_DEV_FB_USED", "gauge", "1024"),
            ("DCGM_FI_DEV_XID_ERRORS", "gauge", "94"),
            ("DCGM_FI_DEV_ROW_REMAP_FAILURE", "gauge", "0"),
        ] {
            let family = format!("# TYPE {name} {kind}\n{name}{{{labels}}} {value}\n");
            assert!(text.contains(&family), "{family} in {text}");
        }
        assert!(!text.contains("910"), "Ascend's devices are npu-exporter's: {text}");
        let help = text.lines().filter(|line| line.starts_with("# HELP")).count();
        assert_eq!(help, COUNTERS.len(), "each counter is read of this device: {text}");
    }

    #[test]
    fn what_was_not_read_is_not_written() {
        let mut view = view();
        for device in view.devices.values_mut() {
            (device.measured, device.hosted) = (crate::vitals::Measured::default(), false);
        }
        let text = render(&view, &node(), Some(&holder()));
        assert!(!text.contains("FB_USED") && !text.contains("POWER") && !text.contains("namespace="), "{text}");
        assert!(text.contains("DCGM_FI_DEV_GPU_TEMP{gpu=\"\",UUID=\"GPU-1\""), "{text}");
    }
}
