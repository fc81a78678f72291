//! What the double answers: devices and their settings, and events that wait for delivery. Pure.

use std::collections::{BTreeMap, VecDeque};

use berth_double_stage::{Instance, Library};
use serde_json::json;

use crate::script::{Assertion, Codes, DeviceHeader, Fault, Header, Line, Set, SwitchFault, Value};

/// Driver that the double plays when the script names none.
pub const DRIVER: &str = "25.2.0";
/// Success.
pub const OK: i32 = 0;
/// A list is too short, or an argument wrong.
pub const INVALID: i32 = -8001;
/// No event came in time.
pub const TIME_OUT: i32 = -8006;
/// No such device.
pub const NOT_EXIST: i32 = -8008;
/// Somebody uses it.
pub const OCCUPIED: i32 = -8020;
/// Not supported by this device, driver or generation.
pub const NOT_SUPPORT: i32 = -8255;

/// One device.
#[derive(Clone, Debug)]
pub struct Device {
    /// As the script declares it.
    pub header: DeviceHeader,
    /// What events call it.
    pub logic: u16,
    /// Health.
    pub health: Value,
    /// Network health.
    pub network: Value,
    /// Codes that hold.
    pub codes: Codes,
    /// Bytes in use.
    pub hbm_used: Value,
    /// Temperature, °C.
    pub temperature: Value,
    /// Power draw, tenths of a watt.
    pub power: Value,
    /// Use of the device, percent.
    pub utilization: Value,
    /// 16 = started.
    pub boot: Value,
    /// Pages that the next reset isolates.
    pub next_isolated: Value,
    /// Errors of the link to the host.
    pub pcie_errors: Value,
    /// CRC errors of the HCCS links.
    pub hccs_crc_errors: Value,
    /// Packets that the HCCS links sent again.
    pub hccs_retries: Value,
    /// State of the super-pod's nodes, by sdid.
    pub superpod_status: BTreeMap<u32, u32>,
    /// Somebody asks for its events.
    pub asked: bool,
    hang_ms: BTreeMap<String, u64>,
    returns: BTreeMap<String, i32>,
}

/// An event on its way.
#[derive(Clone, Debug)]
pub enum Event {
    /// Of the device with this logic id.
    Device(u16, Fault, i32),
    /// Of a switch.
    Switch(SwitchFault),
}

/// The whole library.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Devices that are listed, in the script's order.
    pub devices: Vec<Device>,
    /// Driver version.
    pub driver: String,
    /// Answers only calls of the second generation.
    pub second: bool,
    /// What the init call returns.
    pub init: i32,
    /// Somebody subscribed to the devices' events.
    pub subscribed: bool,
    /// Somebody subscribed to the switches' events.
    pub switches_subscribed: bool,
    /// Events not yet delivered.
    pub queue: VecDeque<Event>,
    /// Faults that switches hold.
    pub switch_faults: Vec<SwitchFault>,
    serial: i32,
}

/// The library instance of this process.
pub fn instance() -> &'static Instance<State> {
    static INSTANCE: Instance<State> = Instance::new();
    INSTANCE.ready()
}

impl Library for State {
    type Header = Header;
    type Line = Line;
    const NAME: &'static str = "libdcmi";

    fn at_ms(line: &Line) -> Option<f64> {
        line.at_ms
    }

    fn apply(&mut self, line: &Line) -> Result<u32, String> {
        if let Some(fault) = &line.switch {
            return Ok(self.switch(fault));
        }
        // A line without a device of ours is somebody else's.
        let Some((card, device)) = line.dcmi else { return Ok(0) };
        let set = line.set.clone().map(serde_json::from_value::<Set>).transpose().map_err(|error| error.to_string())?;
        self.change(card, device, set.as_ref(), line.fault)
    }

    fn new(header: &Header) -> Self {
        let library = header.libraries.dcmi.clone().unwrap_or_default();
        let device = |(at, header): (u16, &DeviceHeader)| Device {
            header: header.clone(),
            logic: header.logic_id.unwrap_or(at),
            health: Value::Number(0),
            network: Value::Number(0),
            codes: Codes::default(),
            hbm_used: Value::Number(0),
            temperature: Value::Number(45),
            power: Value::Number(934),
            utilization: Value::Number(0),
            boot: Value::Number(16),
            next_isolated: Value::Number(0),
            pcie_errors: Value::Number(0),
            hccs_crc_errors: Value::Number(0),
            hccs_retries: Value::Number(0),
            superpod_status: BTreeMap::new(),
            asked: false,
            hang_ms: BTreeMap::new(),
            returns: BTreeMap::new(),
        };
        Self {
            devices: (0..).zip(&header.ascend).filter(|(_, header)| !header.absent).map(device).collect(),
            driver: library.driver.unwrap_or_else(|| DRIVER.to_owned()),
            second: library.api == Some(2),
            init: library.init,
            ..Self::default()
        }
    }
}

impl State {
    /// Index of a device.
    #[must_use]
    pub fn find(&self, card: i32, device: i32) -> Option<usize> {
        self.devices.iter().position(|known| (known.header.card, known.header.device) == (card, device))
    }

    /// Changes settings of a device and queues an event. Answers how many events will be delivered (one that
    /// nobody asked for is dropped).
    ///
    /// # Errors
    /// When there is no such device, or a key is no number.
    pub fn change(&mut self, card: i32, device: i32, set: Option<&Set>, fault: Option<Fault>) -> Result<u32, String> {
        let missing = || format!("dcmi [{card},{device}] is no device of the header");
        let index = self.find(card, device).ok_or_else(missing)?;
        let device = self.devices.get_mut(index).ok_or_else(missing)?;
        if let Some(set) = set {
            device.set(set)?;
        }
        let listened = self.subscribed || device.asked;
        let Some(fault) = fault.filter(|_| listened) else { return Ok(0) };
        self.serial = self.serial.wrapping_add(1);
        let serial = fault.serial.unwrap_or(self.serial);
        self.queue.push_back(Event::Device(device.logic, fault, serial));
        Ok(1)
    }

    fn switch(&mut self, fault: &SwitchFault) -> u32 {
        let same = |known: &SwitchFault| {
            (known.id, known.fault, &known.peer, known.chip, known.port)
                == (fault.id, fault.fault, &fault.peer, fault.chip, fault.port)
        };
        self.switch_faults.retain(|known| !same(known));
        if fault.assertion == Assertion::Occur {
            self.switch_faults.push(fault.clone());
        }
        if !self.switches_subscribed {
            return 0;
        }
        self.queue.push_back(Event::Switch(fault.clone()));
        1
    }

    /// What a reset of one device takes with it: its card, and the card that shares its network port; (card, device).
    #[must_use]
    pub fn along(&self, card: i32) -> Vec<(i32, i32)> {
        let brother =
            self.devices.iter().find(|device| device.header.card == card).and_then(|device| device.header.brother);
        let places = self.devices.iter().map(|device| (device.header.card, device.header.device));
        places.filter(|(of, _)| *of == card || Some(*of) == brother).collect()
    }

    /// Resets what goes with `card`: it starts anew and is well. Answers the lines of a script that say the same.
    pub fn reset(&mut self, card: i32) -> Vec<String> {
        let along = self.along(card);
        let along = self.devices.iter_mut().filter(|one| along.contains(&(one.header.card, one.header.device)));
        let well = |device: &mut Device| {
            (device.health, device.network, device.boot) = (Value::Number(0), Value::Number(0), Value::Number(16));
            (device.codes, device.next_isolated) = (Codes::default(), Value::Number(0));
            let returns: BTreeMap<String, i32> =
                std::mem::take(&mut device.returns).into_keys().map(|symbol| (symbol, OK)).collect();
            json!({"dcmi": [device.header.card, device.header.device], "set": {
                "health": 0, "network_health": 0, "boot_status": 16, "error_codes": [], "next_isolated": 0, "return": returns,
            }})
            .to_string()
        };
        along.map(well).collect()
    }

    /// The first event that `wanted` takes.
    pub fn next(&mut self, wanted: impl Fn(&Event) -> bool) -> Option<Event> {
        let at = self.queue.iter().position(wanted)?;
        self.queue.remove(at)
    }

    /// How long a call of `symbol` takes that is about no device of its own, ms.
    #[must_use]
    pub fn hang(&self, symbol: &str) -> u64 {
        self.devices.iter().map(|device| device.hang(symbol)).max().unwrap_or(0)
    }

    /// Whether a call of `symbol` goes through that is about no device of its own.
    ///
    /// # Errors
    /// The code that it answers instead.
    pub fn admit(&self, symbol: &str) -> Result<(), i32> {
        self.generation(symbol)?;
        self.devices.iter().try_for_each(|device| device.admit(symbol))
    }

    /// Whether this library answers the symbol's generation. (`dcmi_init` is answered by both.)
    ///
    /// # Errors
    /// -8255.
    pub fn generation(&self, symbol: &str) -> Result<(), i32> {
        let second = symbol.starts_with("dcmiv2_");
        if second == self.second || symbol == "dcmi_init" { Ok(()) } else { Err(NOT_SUPPORT) }
    }
}

impl Device {
    fn set(&mut self, set: &Set) -> Result<(), String> {
        let values = [
            (&mut self.health, set.health),
            (&mut self.network, set.network_health),
            (&mut self.hbm_used, set.hbm_used),
            (&mut self.temperature, set.temperature_c),
            (&mut self.power, set.power),
            (&mut self.utilization, set.utilization),
            (&mut self.boot, set.boot_status),
            (&mut self.next_isolated, set.next_isolated),
            (&mut self.pcie_errors, set.pcie_errors),
            (&mut self.hccs_crc_errors, set.hccs_crc_errors),
            (&mut self.hccs_retries, set.hccs_retries),
        ];
        for (value, new) in values {
            *value = new.unwrap_or(*value);
        }
        if let Some(codes) = &set.error_codes {
            self.codes = codes.clone();
        }
        for (sdid, status) in &set.superpod_status {
            let sdid = sdid.parse().map_err(|_| format!("key {sdid:?} is no number"))?;
            self.superpod_status.insert(sdid, *status);
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
        self.returns.get(symbol).copied().filter(|code| *code != OK).map_or(Ok(()), Err)
    }

    /// Memory, bytes.
    #[must_use]
    pub fn hbm(&self) -> u64 {
        self.header.hbm_bytes.unwrap_or(64 << 30)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        let header = r#"{"ascend":[{"card":3,"device":1,"logic_id":7},{"card":4,"absent":true}]}"#;
        State::new(&serde_json::from_str(header).unwrap())
    }

    fn apply(state: &mut State, line: &str) -> Result<u32, String> {
        state.apply(&serde_json::from_str(line).unwrap())
    }

    #[test]
    fn an_absent_device_is_not_listed() {
        assert_eq!((state().devices.len(), state().find(3, 1), state().find(4, 0)), (1, Some(0), None));
        assert!(apply(&mut state(), r#"{"dcmi":[4,0],"set":{}}"#).is_err());
    }

    #[test]
    fn settings_hold_until_they_are_set_again() {
        let mut state = state();
        let line = r#"{"dcmi":[3,1],"set":{"health":3,"error_codes":["0x80E01801"],"return":{"dcmi_x":-8012}}}"#;
        apply(&mut state, line).unwrap();
        apply(&mut state, r#"{"dcmi":[3,1],"set":{"boot_status":1}}"#).unwrap();
        let device = &state.devices[0];
        assert_eq!((device.health.get(), device.boot.get(), device.admit("dcmi_x")), (Ok(3), Ok(1), Err(-8012)));
        apply(&mut state, r#"{"dcmi":[3,1],"set":{"error_codes":[],"return":{"dcmi_x":0}}}"#).unwrap();
        assert_eq!((&state.devices[0].codes, state.devices[0].admit("dcmi_x")), (&Codes::default(), Ok(())));
    }

    #[test]
    fn an_event_nobody_asked_for_is_dropped_and_serial_numbers_rise() {
        let mut state = state();
        let line = r#"{"dcmi":[3,1],"fault":{"id":"0x80E01801","assertion":"occur","severity":3}}"#;
        assert_eq!(apply(&mut state, line), Ok(0));
        state.subscribed = true;
        assert_eq!((apply(&mut state, line), apply(&mut state, line)), (Ok(1), Ok(1)));
        let serials = state.queue.iter().map(|event| match event {
            Event::Device(logic, _, serial) => (*logic, *serial),
            Event::Switch(_) => (0, 0),
        });
        assert_eq!(serials.collect::<Vec<_>>(), [(7, 1), (7, 2)]);
    }

    #[test]
    fn a_reset_makes_the_whole_card_well() {
        let mut state = state();
        let line = r#"{"dcmi":[3,1],"set":{"health":3,"error_codes":["0x80E01801"],"return":{"dcmi_x":-8012}}}"#;
        apply(&mut state, line).unwrap();
        state.reset(4);
        assert_eq!(state.devices[0].health.get(), Ok(3));
        state.reset(3);
        let device = &state.devices[0];
        assert_eq!((device.health.get(), &device.codes, device.admit("dcmi_x")), (Ok(0), &Codes::default(), Ok(())));
    }

    #[test]
    fn another_process_reads_in_the_script_what_a_reset_did() {
        let line = r#"{"dcmi":[3,1],"set":{"health":3,"error_codes":["0x80E01801"],"return":{"dcmi_x":-8012}}}"#;
        let (mut one, mut two) = (state(), state());
        apply(&mut one, line).unwrap();
        let said = one.reset(3);
        assert_eq!(said.len(), 1);
        for line in std::iter::once(line).chain(said.iter().map(String::as_str)) {
            apply(&mut two, line).unwrap();
        }
        let device = &two.devices[0];
        assert_eq!((device.health.get(), &device.codes, device.admit("dcmi_x")), (Ok(0), &Codes::default(), Ok(())));
    }

    #[test]
    fn a_generation_refuses_the_other() {
        let mut state = state();
        assert_eq!(state.generation("dcmiv2_init"), Err(NOT_SUPPORT));
        state.second = true;
        assert_eq!((state.generation("dcmi_init"), state.generation("dcmi_get_card_list")), (Ok(()), Err(NOT_SUPPORT)));
    }

    #[test]
    fn a_switch_holds_a_fault_until_it_recovers() {
        let mut state = state();
        let line = |assertion: &str| {
            format!(r#"{{"switch":{{"id":"0x08520003","peer":"npu","chip":0,"port":3,"assertion":"{assertion}"}}}}"#)
        };
        apply(&mut state, &line("occur")).unwrap();
        apply(&mut state, &line("occur")).unwrap();
        assert_eq!(state.switch_faults.len(), 1);
        apply(&mut state, &line("recover")).unwrap();
        assert!(state.switch_faults.is_empty());
    }
}
