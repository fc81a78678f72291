//! `accelerator_…`: one vocabulary for devices of both vendors. Labels are the devices of one node and words of the
//! health vocabulary, nothing else; what a vendor does not tell has no series.

use std::fmt;

use berth_runtime::telemetry::{self, Described, Kind, count, large};
use berth_types::{Admission, DeviceState, Health};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

use super::{Board, Device, View, thousandth};
use crate::health::ledger::Standing;

/// What every name begins with.
pub const PREFIX: &str = "accelerator";

/// Labels, in the order in which they are written.
type Labels = Vec<(&'static str, String)>;
/// Samples of one device or node: what labels they have besides its own, and their values.
type Samples = Vec<(Labels, f64)>;

/// A metric of devices and how its samples are had.
struct Family {
    described: Described,
    read: fn(&Device) -> Samples,
}

macro_rules! labels {
    ($($more:literal),*) => { &["device", "vendor", "pool" $(, $more)*] };
}

/// Metrics of each device.
const OF_DEVICES: &[Family] = &[
    Family {
        described: Described::info("device", labels!["uuid", "card"], "What the device is"),
        read: |device| {
            let info = device.info();
            vec![(vec![("uuid", info.uuid.clone()), ("card", info.card.clone())], 1.0)]
        },
    },
    Family {
        described: Described::gauge("health", labels!["health"], "1 for the health that the device has, else 0"),
        read: |device| healths(device.shown.standing.state),
    },
    Family {
        described: Described::gauge("admission", labels!["admission"], "1 for the admission that holds, else 0"),
        read: |device| {
            let state = device.shown.standing.state;
            let one = |word: &Admission| (vec![("admission", word.to_string())], truth(*word == state.admission));
            Admission::ALL.iter().map(one).collect()
        },
    },
    Family {
        described: Described::gauge(
            "condition",
            labels!["reason", "action", "scope"],
            "1 while the device is not simply healthy: why, what should be done, and what holds the fault",
        ),
        read: |device| condition(device.shown.standing.state),
    },
    Family {
        described: Described::counter("resets", labels!["outcome"], "Ordered resets that ended: done or failed"),
        read: |device| {
            let of = |outcome: &str, resets| (vec![("outcome", outcome.to_owned())], large(resets));
            vec![of("done", device.resets_done), of("failed", device.resets_failed)]
        },
    },
    Family {
        described: Described::gauge("memory_total_bytes", labels![], "Memory of the device"),
        read: |device| plain(device.measured.memory.map(|memory| large(memory.total))),
    },
    Family {
        described: Described::gauge("memory_used_bytes", labels![], "Memory in use"),
        read: |device| plain(device.measured.memory.map(|memory| large(memory.used))),
    },
    Family {
        described: Described::gauge("temperature_celsius", labels!["sensor"], "Temperature: of the chip or its memory"),
        read: |device| {
            let sensors = [("chip", device.temperature()), ("memory", device.measured.memory_temperature)];
            by("sensor", sensors.map(|(name, value)| (name, value.map(f64::from))))
        },
    },
    Family {
        described: Described::gauge("power_watts", labels![], "Power draw"),
        read: |device| plain(device.measured.power_mw.map(thousandth)),
    },
    Family {
        described: Described::counter("energy_joules", labels![], "Energy since the driver was loaded"),
        read: |device| plain(device.measured.energy_mj.map(thousandth)),
    },
    Family {
        described: Described::gauge(
            "utilization_ratio",
            labels!["unit"],
            "How busy the device was: as a whole, or the path to its memory",
        ),
        read: |device| {
            let busy = device.measured.busy;
            let units = [("device", busy.device.or(busy.core)), ("memory", busy.memory)];
            by("unit", units.map(|(name, percent)| (name, percent.map(|percent| f64::from(percent) / 100.0))))
        },
    },
    Family {
        described: Described::gauge("clock_hertz", labels!["clock"], "Clock: of what computes, or of the memory"),
        read: |device| {
            let clocks = [("compute", device.measured.clock_mhz), ("memory", device.measured.memory_clock_mhz)];
            by("clock", clocks.map(|(name, mhz)| (name, mhz.map(|mhz| f64::from(mhz) * 1e6))))
        },
    },
    Family {
        described: Described::gauge("slowed", labels!["cause"], "1 while heat or power makes the device slower"),
        read: |device| {
            let causes = [("heat", device.seen.slowed_by_heat), ("power", device.seen.slowed_by_power)];
            by("cause", causes.map(|(name, slowed)| (name, slowed.map(truth))))
        },
    },
    Family {
        described: Described::counter(
            "memory_errors",
            labels!["kind"],
            "Memory errors since the driver was loaded: corrected or uncorrected",
        ),
        read: |device| {
            let (seen, errors) = (&device.seen, device.measured.errors);
            let kinds = [
                ("corrected", seen.corrected.or(errors.corrected)),
                ("uncorrected", seen.uncorrected.or(errors.uncorrected)),
            ];
            by("kind", kinds.map(|(name, errors)| (name, errors.map(large))))
        },
    },
    Family {
        described: Described::gauge(
            "memory_retired",
            labels!["kind"],
            "Rows or pages taken out of use, by the kind of their errors",
        ),
        read: |device| {
            let errors = device.measured.errors;
            let kinds = [("corrected", errors.retired_corrected), ("uncorrected", errors.retired_uncorrected)];
            by("kind", kinds.map(|(name, retired)| (name, retired.map(large))))
        },
    },
    Family {
        described: Described::gauge(
            "memory_repairs_pending",
            labels![],
            "Repairs of memory that wait for a reset: pages, or 1 for rows",
        ),
        read: |device| plain(device.seen.repairs_pending.map(large)),
    },
    Family {
        described: Described::gauge(
            "links_down",
            labels![],
            "Scale-up links that were up when first seen and are down",
        ),
        read: |device| plain(device.measured.links_down.map(count)),
    },
    Family {
        described: Described::gauge("network_up", labels![], "1 while the device's own network port is up, else 0"),
        read: |device| plain(device.seen.network_up.map(truth)),
    },
    Family {
        described: Described::counter("bus_replays", labels![], "Retries on the host's bus"),
        read: |device| plain(device.measured.bus_replays.map(large)),
    },
];

const NODE_HEALTH: Described =
    Described::gauge("node_health", &["health"], "1 for the health of the node's own entry, else 0");
const NODE_CONDITION: Described = Described::gauge(
    "node_condition",
    &["reason", "action", "scope"],
    "1 while something is said of the node as a whole: why, what should be done, and what holds the fault",
);

/// All of them.
pub fn described() -> impl Iterator<Item = &'static Described> {
    OF_DEVICES.iter().map(|family| &family.described).chain([&NODE_HEALTH, &NODE_CONDITION])
}

/// Lets a process serve what `board` knows.
pub fn register(metrics: &telemetry::Metrics, board: &Board) {
    metrics.register_beside(PREFIX, |registry| registry.register_collector(Box::new(board.clone())));
}

fn truth(value: bool) -> f64 {
    f64::from(u8::from(value))
}

fn plain(value: Option<f64>) -> Samples {
    value.map(|value| (Labels::new(), value)).into_iter().collect()
}

fn by<const N: usize>(label: &'static str, values: [(&'static str, Option<f64>); N]) -> Samples {
    let sample = |(name, value): (&str, Option<f64>)| Some((vec![(label, name.to_owned())], value?));
    values.into_iter().filter_map(sample).collect()
}

fn healths(state: DeviceState) -> Samples {
    let one = |word: &Health| (vec![("health", word.to_string())], truth(*word == state.health));
    Health::ALL.iter().map(one).collect()
}

fn condition(state: DeviceState) -> Samples {
    let Some(reason) = state.reason else { return Samples::new() };
    let scope = state.scope.map(|scope| scope.lower().to_owned()).unwrap_or_default();
    vec![(vec![("reason", reason.to_string()), ("action", state.action.to_string()), ("scope", scope)], 1.0)]
}

fn of_device(device: &Device) -> Labels {
    let info = device.info();
    vec![("device", info.local.clone()), ("vendor", info.vendor.to_string()), ("pool", info.product.clone())]
}

impl Collector for Board {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let view: View = self.view();
        for family in OF_DEVICES {
            let of = |device: &Device| {
                let own = of_device(device);
                let whole = move |(more, value): (Labels, f64)| (own.iter().cloned().chain(more).collect(), value);
                (family.read)(device).into_iter().map(whole).collect::<Vec<(Labels, f64)>>()
            };
            let samples: Samples = view.devices.values().flat_map(of).collect();
            write(&mut encoder, &family.described, &samples)?;
        }
        let state = view.node.map(|Standing { state, .. }| state);
        write(&mut encoder, &NODE_HEALTH, &state.map(healths).unwrap_or_default())?;
        write(&mut encoder, &NODE_CONDITION, &state.map(condition).unwrap_or_default())
    }
}

/// Writes a family; nothing of it when it has no sample.
fn write(encoder: &mut DescriptorEncoder<'_>, described: &Described, samples: &Samples) -> Result<(), fmt::Error> {
    if samples.is_empty() {
        return Ok(());
    }
    let kind = match described.kind {
        Kind::Counter => MetricType::Counter,
        Kind::Info => MetricType::Info,
        Kind::Gauge | Kind::Histogram => MetricType::Gauge,
    };
    let mut family = encoder.encode_descriptor(described.name, described.help, None, kind)?;
    for (labels, value) in samples {
        match described.kind {
            Kind::Counter => ConstCounter::new(*value).encode(family.encode_family(labels)?)?,
            Kind::Info => family.encode_info(labels)?,
            Kind::Gauge | Kind::Histogram => ConstGauge::new(*value).encode(family.encode_family(labels)?)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vitals::tests::board;

    fn text() -> String {
        let metrics = telemetry::Metrics::new("agent");
        register(&metrics, &board());
        metrics.encode()
    }

    #[test]
    fn both_vendors_are_told_in_the_same_words() {
        let text = text();
        let gpu = "device=\"0000:3b:00.0\",vendor=\"nvidia\",pool=\"NVIDIA H200\"";
        let npu = "device=\"0.0\",vendor=\"ascend\",pool=\"910B3\"";
        for line in [
            format!("accelerator_device_info{{{gpu},uuid=\"GPU-1\",card=\"card 0\"}} 1"),
            format!("accelerator_health{{{gpu},health=\"Healthy\"}} 1.0"),
            format!("accelerator_health{{{gpu},health=\"Unhealthy\"}} 0.0"),
            format!("accelerator_health{{{npu},health=\"Unhealthy\"}} 1.0"),
            format!("accelerator_admission{{{npu},admission=\"Barred\"}} 1.0"),
            format!("accelerator_condition{{{npu},reason=\"DeviceLost\",action=\"ResetDevice\",scope=\"device\"}} 1.0"),
            format!("accelerator_resets_total{{{npu},outcome=\"failed\"}} 1.0"),
            format!("accelerator_memory_used_bytes{{{npu}}} 34359738368.0"),
            format!("accelerator_temperature_celsius{{{gpu},sensor=\"chip\"}} 45.0"),
            format!("accelerator_temperature_celsius{{{npu},sensor=\"memory\"}} 48.0"),
            format!("accelerator_power_watts{{{gpu}}} 120.5"),
            format!("accelerator_energy_joules_total{{{gpu}}} 7000.001"),
            format!("accelerator_utilization_ratio{{{gpu},unit=\"device\"}} 0.83"),
            format!("accelerator_clock_hertz{{{npu},clock=\"compute\"}} 1800000000.0"),
            format!("accelerator_memory_errors_total{{{npu},kind=\"uncorrected\"}} 2.0"),
            format!("accelerator_memory_retired{{{gpu},kind=\"corrected\"}} 5.0"),
            format!("accelerator_memory_repairs_pending{{{npu}}} 1.0"),
            format!("accelerator_links_down{{{gpu}}} 1.0"),
            format!("accelerator_network_up{{{npu}}} 1.0"),
            format!("accelerator_slowed{{{gpu},cause=\"heat\"}} 1.0"),
            format!("accelerator_bus_replays_total{{{gpu}}} 9.0"),
            "accelerator_node_health{health=\"Unknown\"} 1.0".to_owned(),
            "accelerator_node_condition{reason=\"AgentBlind\",action=\"None\",scope=\"node\"} 1.0".to_owned(),
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line} in {text}");
        }
    }

    #[test]
    fn what_a_vendor_does_not_tell_and_what_is_well_has_no_series() {
        let text = text();
        let lines = |name: &str, of: &str| text.lines().any(|line| line.starts_with(name) && line.contains(of));
        assert!(!lines("accelerator_energy_joules_total", "ascend") && !lines("accelerator_network_up", "nvidia"));
        assert!(!lines("accelerator_condition", "nvidia"), "a healthy device has no condition");
    }

    #[test]
    fn every_name_that_is_listed_is_served_and_the_text_ends_once() {
        let text = text();
        for one in described() {
            let name = one.named(PREFIX);
            assert!(text.contains(&format!("\n{name}{{")), "{name} in {text}");
        }
        assert_eq!(text.matches("# EOF").count(), 1, "{text}");
        assert!(text.contains("berth_agent_build_info"));
    }

    #[test]
    fn a_device_has_few_series() {
        let text = text();
        let of = |vendor: &str| text.lines().filter(|line| line.contains(&format!("vendor=\"{vendor}\""))).count();
        assert!(of("nvidia") <= 40 && of("ascend") <= 40, "{} and {}", of("nvidia"), of("ascend"));
    }
}
