//! What the double answers: devices and their settings, and events that wait for delivery. Pure.

use std::collections::{BTreeMap, VecDeque};

use berth_double_stage::{Instance, Library};

use crate::script::{DeviceHeader, Event, FabricSet, Header, Line, Remapped, RemappedValue, Set, Value};

/// Driver that the double plays when the script names none; new enough for field 230.
pub const DRIVER: &str = "570.133.20";
/// Every event bit that nvml.h names.
const ALL_EVENTS: u64 = 0xff9f;
/// Event bits before R570.
const OLD_EVENTS: u64 = 0x19f;

/// Success.
pub const OK: i32 = 0;
/// Not supported by this device or driver.
pub const NOT_SUPPORTED: i32 = 3;
/// No such device.
pub const NOT_FOUND: i32 = 6;
/// The device does not answer.
pub const GPU_IS_LOST: i32 = 15;

/// One device.
#[derive(Clone, Debug, Default)]
pub struct Device {
    /// As the script declares it.
    pub header: DeviceHeader,
    /// Every call answers 15.
    pub lost: bool,
    /// Field values by id.
    pub fields: BTreeMap<u32, Value>,
    /// Bytes in use.
    pub memory_used: Value,
    /// Temperature, °C.
    pub temperature: Value,
    /// Power draw, mW.
    pub power_mw: Value,
    /// Energy, mJ.
    pub energy_mj: Value,
    /// Use of the device, percent.
    pub utilization: Value,
    /// Slowdown threshold, °C.
    pub slowdown: Value,
    /// Shutdown threshold, °C.
    pub shutdown: Value,
    /// Volatile uncorrected ECC errors.
    pub ecc_uncorrected: Value,
    /// Volatile corrected ECC errors.
    pub ecc_corrected: Value,
    /// Row remapping.
    pub remapped: RemappedValue,
    /// Too many errors in on-chip memory.
    pub sram_threshold: bool,
    /// Clock event reasons.
    pub clock_reasons: u64,
    /// NVLinks that are down.
    pub links_down: BTreeMap<u32, bool>,
    /// NVLink fabric state.
    pub fabric: FabricSet,
    /// Lanes of the link to the host, and how many there could be.
    pub lanes: [Value; 2],
    /// PCIe generation of the link to the host, and the highest there could be.
    pub generation: [Value; 2],
    /// Events that it supports.
    pub supported: u64,
    /// Events asked for by the agent.
    pub registered: u64,
    hang_ms: BTreeMap<String, u64>,
    returns: BTreeMap<String, i32>,
}

/// The whole library.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Devices that are listed, in index order.
    pub devices: Vec<Device>,
    /// Driver version.
    pub driver: String,
    /// Events that devices support.
    pub events: u64,
    /// What `nvmlInit_v2` returns.
    pub init: i32,
    /// Events not yet delivered: device index and event.
    pub queue: VecDeque<(usize, Event)>,
}

/// The library instance of this process.
pub fn instance() -> &'static Instance<State> {
    static INSTANCE: Instance<State> = Instance::new();
    INSTANCE.ready()
}

impl Library for State {
    type Header = Header;
    type Line = Line;
    const NAME: &'static str = "libnvidia-ml";

    fn at_ms(line: &Line) -> Option<f64> {
        line.at_ms
    }

    fn apply(&mut self, line: &Line) -> Result<u32, String> {
        // A line without a device of ours is somebody else's.
        let Some(pci) = &line.nvml else { return Ok(0) };
        self.change(pci, line.set.as_ref(), line.event)
    }

    fn new(header: &Header) -> Self {
        let library = header.libraries.nvml.clone().unwrap_or_default();
        let driver = library.driver.unwrap_or_else(|| DRIVER.to_owned());
        let old = major(&driver) < 570;
        let events = library.events.map_or(if old { OLD_EVENTS } else { ALL_EVENTS }, |mask| mask.0);
        let device = |header: &DeviceHeader| Device {
            header: header.clone(),
            supported: events,
            fields: [
                (82, Value::Number(48)),
                (230, if old { Value::Code { code: NOT_SUPPORTED } } else { Value::Number(0) }),
            ]
            .into(),
            power_mw: Value::Number(120_500),
            energy_mj: Value::Number(7_000_000),
            utilization: Value::Number(0),
            temperature: Value::Number(45),
            slowdown: Value::Number(87),
            shutdown: Value::Number(110),
            lanes: [Value::Number(16); 2],
            generation: [Value::Number(5); 2],
            fabric: FabricSet {
                clique: header.fabric.as_ref().map(|fabric| fabric.clique),
                state: Some(if header.fabric.is_some() { 3 } else { 0 }),
                ..FabricSet::default()
            },
            ..Device::default()
        };
        Self {
            devices: header.nvidia.iter().filter(|header| !header.absent).map(device).collect(),
            events,
            driver,
            init: library.init,
            queue: VecDeque::new(),
        }
    }
}

impl State {
    /// Index of the device at `pci`, however its domain is padded.
    #[must_use]
    pub fn find(&self, pci: &str) -> Option<usize> {
        let wanted = address(pci)?;
        self.devices.iter().position(|device| address(&device.header.pci) == Some(wanted))
    }

    /// Changes settings of the device at `pci` and queues an event. Answers how many events will be
    /// delivered (an event nobody registered for is dropped, as the real library does).
    ///
    /// # Errors
    /// When there is no such device, or a key is no number.
    pub fn change(&mut self, pci: &str, set: Option<&Set>, event: Option<Event>) -> Result<u32, String> {
        let index = self.find(pci).ok_or_else(|| format!("nvml {pci:?} is no device of the header"))?;
        let device = self.devices.get_mut(index).ok_or("no device")?;
        if let Some(set) = set {
            device.set(set)?;
        }
        let Some(event) = event.filter(|event| event.kind.0 & device.registered != 0) else { return Ok(0) };
        self.queue.push_back((index, event));
        Ok(1)
    }
}

impl Device {
    fn set(&mut self, set: &Set) -> Result<(), String> {
        self.lost = set.lost.unwrap_or(self.lost);
        for (id, value) in &set.fields {
            self.fields.insert(number(id)?, *value);
        }
        for (link, up) in &set.nvlinks {
            self.links_down.insert(number(link)?, !up);
        }
        let ([lanes, lanes_most], [generation, generation_most]) = (&mut self.lanes, &mut self.generation);
        let values = [
            (lanes, set.pcie_width),
            (lanes_most, set.pcie_width_max),
            (generation, set.pcie_generation),
            (generation_most, set.pcie_generation_max),
            (&mut self.memory_used, set.memory_used),
            (&mut self.temperature, set.temperature_c),
            (&mut self.power_mw, set.power_mw),
            (&mut self.energy_mj, set.energy_mj),
            (&mut self.utilization, set.utilization),
            (&mut self.slowdown, set.slowdown_c),
            (&mut self.shutdown, set.shutdown_c),
            (&mut self.ecc_uncorrected, set.ecc_uncorrected),
            (&mut self.ecc_corrected, set.ecc_corrected),
        ];
        for (value, new) in values {
            *value = new.unwrap_or(*value);
        }
        self.remapped = set.remapped.unwrap_or(self.remapped);
        self.sram_threshold = set.sram_threshold_exceeded.unwrap_or(self.sram_threshold);
        self.clock_reasons = set.clock_reasons.map_or(self.clock_reasons, |reasons| reasons.0);
        if let Some(fabric) = &set.fabric {
            self.fabric.clique = fabric.clique.or(self.fabric.clique);
            self.fabric.state = fabric.state.or(self.fabric.state);
            self.fabric.health_mask = fabric.health_mask.or(self.fabric.health_mask);
            self.fabric.health_summary = fabric.health_summary.or(self.fabric.health_summary);
            self.fabric.status = fabric.status.or(self.fabric.status);
        }
        self.hang_ms.extend(set.hang_ms.iter().map(|(symbol, ms)| (symbol.clone(), *ms)));
        self.returns.extend(set.returns.iter().map(|(symbol, code)| (symbol.clone(), *code)));
        Ok(())
    }

    /// How long a call of `symbol` takes, ms.
    #[must_use]
    pub fn hang(&self, symbol: &str) -> u64 {
        self.hang_ms.get(symbol).copied().unwrap_or(0)
    }

    /// Whether a call of `symbol` goes through.
    ///
    /// # Errors
    /// The code that it answers instead.
    pub fn admit(&self, symbol: &str) -> Result<(), i32> {
        match self.returns.get(symbol) {
            Some(code) if *code != OK => Err(*code),
            _ if self.lost => Err(GPU_IS_LOST),
            _ => Ok(()),
        }
    }

    /// Row remapping.
    ///
    /// # Errors
    /// The code to return instead.
    pub fn rows(&self) -> Result<Remapped, i32> {
        match self.remapped {
            RemappedValue::Rows(rows) => Ok(rows),
            RemappedValue::Code { code } => Err(code),
        }
    }

    /// A field's value.
    ///
    /// # Errors
    /// The code of its entry.
    pub fn field(&self, id: u32) -> Result<u64, i32> {
        self.fields.get(&id).copied().unwrap_or(Value::Code { code: NOT_SUPPORTED }).get()
    }
}

/// Domain, bus and device of a PCI address, whatever its padding.
#[must_use]
pub fn address(text: &str) -> Option<(u32, u32, u32)> {
    let mut parts = text.trim().split([':', '.']);
    let mut hex = || parts.next().and_then(|part| u32::from_str_radix(part, 16).ok());
    Some((hex()?, hex()?, hex()?))
}

fn major(driver: &str) -> u32 {
    driver.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(u32::MAX)
}

fn number(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| format!("key {text:?} is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State::new(
            &serde_json::from_str(r#"{"nvidia":[{"pci":"0000:3b:00.0"},{"pci":"0000:9d:00.0","absent":true}]}"#)
                .unwrap(),
        )
    }

    fn apply(state: &mut State, line: &str) -> Result<u32, String> {
        let line: Line = serde_json::from_str(line).unwrap();
        state.apply(&line)
    }

    #[test]
    fn an_absent_device_is_not_listed() {
        assert_eq!(state().devices.len(), 1);
        assert_eq!(state().find("00000000:3B:00.0"), Some(0));
        assert_eq!(state().find("0000:9d:00.0"), None);
    }

    #[test]
    fn settings_hold_until_they_are_set_again() {
        let mut state = state();
        apply(
            &mut state,
            r#"{"nvml":"0000:3b:00.0","set":{"fields":{"230":4},"return":{"nvmlX":9},"hang_ms":{"nvmlY":5}}}"#,
        )
        .unwrap();
        let device = &state.devices[0];
        assert_eq!((device.field(230), device.admit("nvmlX"), device.hang("nvmlY")), (Ok(4), Err(9), 5));
        apply(&mut state, r#"{"nvml":"0000:3b:00.0","set":{"lost":true,"return":{"nvmlX":0},"hang_ms":{"nvmlY":0}}}"#)
            .unwrap();
        let device = &state.devices[0];
        assert_eq!((device.field(230), device.admit("nvmlX"), device.hang("nvmlY")), (Ok(4), Err(GPU_IS_LOST), 0));
    }

    #[test]
    fn an_event_nobody_registered_for_is_dropped() {
        let mut state = state();
        let line = r#"{"nvml":"0000:3b:00.0","event":{"type":"0x8","data":79}}"#;
        assert_eq!(apply(&mut state, line), Ok(0));
        state.devices[0].registered = 0x8;
        assert_eq!(apply(&mut state, line), Ok(1));
        assert_eq!(state.queue.len(), 1);
    }

    #[test]
    fn an_old_driver_has_no_recovery_field() {
        let header = r#"{"nvidia":[{"pci":"0000:3b:00.0"}],"libraries":{"nvml":{"driver":"550.54.15"}}}"#;
        let state = State::new(&serde_json::from_str(header).unwrap());
        assert_eq!((state.devices[0].field(230), state.events), (Err(NOT_SUPPORTED), 0x19f));
    }
}
