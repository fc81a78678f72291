//! A fault script: JSON Lines in, events and expectations out, each with its line. What this build cannot
//! play is refused here, by line and field.

use std::collections::BTreeSet;

use anyhow::{Context, bail, ensure};
use berth_agent::health::fact::PciAddress;
use berth_types::Vendor;
use serde_json::{Map, Value};

/// A script.
#[derive(Debug)]
pub(super) struct Script {
    /// The first line as it is, for the doubles.
    pub(super) header: Value,
    /// Declared devices, present and absent, as the agent names them.
    pub(super) devices: Vec<Declared>,
    /// What happens, in time order.
    pub(super) events: Vec<Event>,
    /// What must hold.
    pub(super) expectations: Vec<Expectation>,
    /// Some call hangs at some time.
    pub(super) hangs: bool,
}

/// A declared device.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Declared {
    /// Its local id.
    pub(super) local: String,
    /// Who makes it.
    pub(super) vendor: Vendor,
    /// No library lists it.
    pub(super) absent: bool,
}

/// Something that happens.
#[derive(Debug)]
pub(super) struct Event {
    /// Line of the script, from 1.
    pub(super) line: usize,
    /// Microseconds since the agent was ready; negative = before.
    pub(super) at_us: i64,
    /// What.
    pub(super) what: What,
}

/// What happens.
#[derive(Clone, Debug)]
pub(super) enum What {
    /// A kernel record.
    Kmsg { text: String, priority: u32 },
    /// Kernel records are lost.
    KmsgLost,
    /// A line for a vendor's double.
    Double(Vendor, String),
    /// An ordered reset.
    Reset { local: String, outcome: Outcome },
    /// The validation probe's outcome.
    Validated { local: String, ok: bool },
}

/// How an ordered reset goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Started,
    Ok,
    Failed,
}

/// Whom an expectation is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Whom {
    Node,
    All,
    Others,
    Device(String),
}

/// What an expectation wants.
#[derive(Clone, Debug)]
pub(super) enum Wants {
    /// The state at the end, or a note on the way.
    Expect(Map<String, Value>),
    /// No state and no note on the way.
    Never(Map<String, Value>),
    /// So many reports on the way at most.
    Count { transitions: Option<u64>, reports: Option<u64> },
}

/// Something that must hold.
#[derive(Debug)]
pub(super) struct Expectation {
    /// Line of the script, from 1.
    pub(super) line: usize,
    /// From when.
    pub(super) from_us: i64,
    /// Until when.
    pub(super) until_us: i64,
    /// About whom.
    pub(super) whom: Whom,
    /// What.
    pub(super) wants: Wants,
}

/// Times that one line may happen.
const REPEATS: u64 = 1_000_000;
/// Words that an expectation may compare.
const FIELDS: [&str; 6] = ["health", "admission", "action", "scope", "reason", "evidence"];

impl Script {
    /// Reads a script.
    ///
    /// # Errors
    /// The first line that cannot be played, with what is wrong with it.
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        let mut lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let (_, first) = lines.next().context("line 1: the script is empty: it begins with the node's devices")?;
        let header: Value = serde_json::from_str(first).context("line 1")?;
        let devices = read_header(&header).context("line 1")?;
        let mut script = Self { header, devices, events: Vec::new(), expectations: Vec::new(), hangs: false };
        for (at, text) in lines {
            let line = at.saturating_add(1);
            script.read_line(line, text).with_context(|| format!("line {line}"))?;
        }
        // Stable: lines of one moment keep their order.
        script.events.sort_by_key(|event| event.at_us);
        Ok(script)
    }

    /// Devices of a vendor that the node should have; `None` = it has nothing of that vendor. The header's
    /// number counts both vendors together: with both there, what is declared of each is expected.
    pub(super) fn expected(&self, vendor: Vendor) -> Option<Option<usize>> {
        let declared = self.devices.iter().filter(|device| device.vendor == vendor).count();
        let total = self.header.get("expected_devices").and_then(Value::as_u64);
        let total = total.map(|total| usize::try_from(total).unwrap_or(usize::MAX));
        match declared {
            0 => None,
            all if all == self.devices.len() => Some(total),
            some => Some(total.map(|_| some)),
        }
    }

    /// Devices that no expectation names.
    pub(super) fn others(&self) -> impl Iterator<Item = &Declared> {
        let named: BTreeSet<&str> = self
            .expectations
            .iter()
            .filter_map(|expectation| match &expectation.whom {
                Whom::Device(local) => Some(local.as_str()),
                Whom::Node | Whom::All | Whom::Others => None,
            })
            .collect();
        self.devices.iter().filter(move |device| !named.contains(device.local.as_str()))
    }

    /// The last moment that matters.
    pub(super) fn end_us(&self) -> i64 {
        let events = self.events.iter().map(|event| event.at_us);
        events.chain(self.expectations.iter().map(|expectation| expectation.until_us)).max().unwrap_or(0)
    }

    fn read_line(&mut self, line: usize, text: &str) -> anyhow::Result<()> {
        let Value::Object(fields) = serde_json::from_str(text)? else { bail!("not an object") };
        if fields.contains_key("expect") || fields.contains_key("never") || fields.contains_key("count") {
            self.expectations.push(self.expectation(line, &fields)?);
            return Ok(());
        }
        let at = micros(&fields, "at_ms")?.context("field at_ms is missing")?;
        let repeat = fields.get("repeat").map_or(Ok(1), |value| value.as_u64().context("field repeat: a number"))?;
        ensure!(repeat <= REPEATS, "field repeat: at most {REPEATS}");
        let every = micros(&fields, "every_ms")?.unwrap_or(0);
        let Some(what) = self.what(text, &fields)? else { return Ok(()) };
        for turn in 0..repeat {
            let turn = i64::try_from(turn).context("field repeat is too large")?;
            let at_us = every.checked_mul(turn).and_then(|later| at.checked_add(later)).context("field repeat")?;
            self.events.push(Event { line, at_us, what: what.clone() });
        }
        Ok(())
    }

    fn what(&mut self, text: &str, fields: &Map<String, Value>) -> anyhow::Result<Option<What>> {
        if fields.contains_key("speed") {
            // Time is discrete: it needs no speed.
            return Ok(None);
        }
        if let Some(value) = fields.get("kmsg") {
            let text = value.as_str().context("field kmsg: a text")?.to_owned();
            let priority = fields.get("prio").map_or(Some(4), Value::as_u64).context("field prio: a number")?;
            return Ok(Some(What::Kmsg { text, priority: u32::try_from(priority).context("field prio")? }));
        }
        if fields.contains_key("kmsg_lost") {
            return Ok(Some(What::KmsgLost));
        }
        if let Some(device) = fields.get("nvml") {
            self.device(device).context("field nvml")?;
            self.hangs |= fields.get("set").is_some_and(|set| set.get("hang_ms").is_some());
            return Ok(Some(What::Double(Vendor::Nvidia, text.to_owned())));
        }
        if let Some(device) = fields.get("dcmi") {
            self.device(device).context("field dcmi")?;
            self.hangs |= fields.get("set").is_some_and(|set| set.get("hang_ms").is_some());
            return Ok(Some(What::Double(Vendor::Ascend, text.to_owned())));
        }
        if fields.contains_key("switch") {
            return Ok(Some(What::Double(Vendor::Ascend, text.to_owned())));
        }
        if let Some(device) = fields.get("reset") {
            let local = self.device(device).context("field reset")?;
            let outcome = match fields.get("outcome").and_then(Value::as_str) {
                Some("started") => Outcome::Started,
                Some("ok") => Outcome::Ok,
                Some("failed") => Outcome::Failed,
                _ => bail!("field outcome: started, ok or failed"),
            };
            return Ok(Some(What::Reset { local, outcome }));
        }
        if let Some(device) = fields.get("validated") {
            let local = self.device(device).context("field validated")?;
            let ok = fields.get("ok").and_then(Value::as_bool).context("field ok: true or false")?;
            return Ok(Some(What::Validated { local, ok }));
        }
        bail!("nothing happens: write kmsg, kmsg_lost, nvml, dcmi, switch, reset, validated or speed")
    }

    fn expectation(&self, line: usize, fields: &Map<String, Value>) -> anyhow::Result<Expectation> {
        let from_us = micros(fields, "from_ms")?.unwrap_or(0);
        let object = |name: &str| fields.get(name).and_then(Value::as_object).cloned();
        let (name, end, mut wanted) = match (object("expect"), object("never"), object("count")) {
            (Some(wanted), None, None) => ("expect", "by_ms", wanted),
            (None, Some(wanted), None) => ("never", "until_ms", wanted),
            (None, None, Some(wanted)) => ("count", "until_ms", wanted),
            _ => bail!("one object of expect, never and count is needed"),
        };
        let until_us = micros(fields, end)?.with_context(|| format!("field {end} is missing"))?;
        let whom = match wanted.remove("device").context("field device is missing")? {
            Value::String(text) if text == "node" => Whom::Node,
            Value::String(text) if text == "all" => Whom::All,
            Value::String(text) if text == "others" => Whom::Others,
            device => Whom::Device(self.device(&device).with_context(|| format!("field {name}.device"))?),
        };
        let number = |field: &str| wanted.get(field).map(|value| value.as_u64().context(field.to_owned())).transpose();
        let wants = match name {
            "count" => {
                Wants::Count { transitions: number("transitions_at_most")?, reports: number("reports_at_most")? }
            }
            _ => {
                let strange = wanted.keys().find(|key| !FIELDS.contains(&key.as_str()));
                ensure!(strange.is_none(), "field {name}.{}: not one of {FIELDS:?}", strange.map_or("", |key| key));
                if name == "expect" { Wants::Expect(wanted) } else { Wants::Never(wanted) }
            }
        };
        Ok(Expectation { line, from_us, until_us, whom, wants })
    }

    fn device(&self, value: &Value) -> anyhow::Result<String> {
        let local = match value {
            Value::String(text) => text.parse::<PciAddress>()?.to_string(),
            Value::Array(place) => match place.iter().map(Value::as_u64).collect::<Option<Vec<u64>>>().as_deref() {
                Some([card, device]) => format!("{card}.{device}"),
                _ => bail!("an Ascend device is [card, device]"),
            },
            _ => bail!("a device is a PCI address or [card, device]"),
        };
        ensure!(self.devices.iter().any(|device| device.local == local), "{local} is no device of line 1");
        Ok(local)
    }
}

fn read_header(header: &Value) -> anyhow::Result<Vec<Declared>> {
    let list = |name: &str| header.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
    let mut devices: Vec<Declared> = Vec::new();
    let mut declare = |local: String, vendor: Vendor, device: &Value| {
        let absent = device.get("absent").and_then(Value::as_bool).unwrap_or(false);
        ensure!(!devices.iter().any(|known| known.local == local), "field {vendor}: {local} comes twice");
        devices.push(Declared { local, vendor, absent });
        Ok(())
    };
    for device in list("nvidia") {
        let pci = device.get("pci").and_then(Value::as_str).context("field nvidia.pci is missing")?;
        let local = pci.parse::<PciAddress>().context("field nvidia.pci")?.to_string();
        declare(local, Vendor::Nvidia, &device)?;
    }
    for device in list("ascend") {
        let number = |name: &str| device.get(name).map(|value| value.as_u64().context(format!("field ascend.{name}")));
        let card = number("card").context("field ascend.card is missing")??;
        let place = number("device").transpose()?.unwrap_or(0);
        declare(format!("{card}.{place}"), Vendor::Ascend, &device)?;
    }
    ensure!(!devices.is_empty(), "fields nvidia and ascend: no devices");
    Ok(devices)
}

/// A time in milliseconds, fractions too, as microseconds.
fn micros(fields: &Map<String, Value>, name: &str) -> anyhow::Result<Option<i64>> {
    let Some(value) = fields.get(name) else { return Ok(None) };
    let number = value.as_number().with_context(|| format!("field {name}: a number of milliseconds"))?;
    if let Some(whole) = number.as_i64() {
        return whole.checked_mul(1000).map(Some).with_context(|| format!("field {name} is too large"));
    }
    // Through text: a fraction of a millisecond is a few digits, and floats need no rounding rule here.
    let text = number.to_string();
    let (whole, fraction) = text.split_once('.').with_context(|| format!("field {name}: {text}"))?;
    let digits: String = fraction.chars().chain("000".chars()).take(3).collect();
    let (whole_us, part) = (whole.parse::<i64>()?.checked_mul(1000), digits.parse::<i64>()?);
    let part = if whole.starts_with('-') { -part } else { part };
    whole_us.and_then(|whole| whole.checked_add(part)).map(Some).with_context(|| format!("field {name} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = r#"{"node":"n","nvidia":[{"pci":"0000:3b:00.0"},{"pci":"0000:9d:00.0","absent":true}]}"#;

    fn error(line: &str) -> String {
        format!("{:#}", Script::parse(&format!("{HEAD}\n{line}")).unwrap_err())
    }

    #[test]
    fn repeats_and_fractions_become_single_events() {
        let line = r#"{"at_ms":-1.5,"kmsg":"x","repeat":3,"every_ms":0.25}"#;
        let script = Script::parse(&format!("{HEAD}\n\n{line}\n{{\"at_ms\":2,\"speed\":9}}\n")).unwrap();
        let times: Vec<i64> = script.events.iter().map(|event| event.at_us).collect();
        assert_eq!(times, [-1500, -1250, -1000]);
    }

    #[test]
    fn others_are_the_devices_that_nobody_names() {
        let line = r#"{"by_ms":9,"expect":{"device":"00000000:3B:00.0","health":"Healthy"}}"#;
        let script = Script::parse(&format!("{HEAD}\n{line}")).unwrap();
        let others: Vec<&str> = script.others().map(|device| device.local.as_str()).collect();
        assert_eq!((others, script.end_us()), (vec!["0000:9d:00.0"], 9000));
    }

    #[test]
    fn what_cannot_be_played_is_named_by_line_and_field() {
        let error_of_dcmi = error(r#"{"at_ms":1,"dcmi":[0,0],"set":{}}"#);
        assert!(error_of_dcmi.starts_with("line 2: field dcmi"), "{error_of_dcmi}");
        assert!(error(r#"{"at_ms":1}"#).contains("nothing happens"));
        assert!(error(r#"{"kmsg":"x"}"#).contains("at_ms is missing"));
        assert!(error(r#"{"at_ms":1,"nvml":"0000:77:00.0"}"#).contains("no device of line 1"));
        assert!(error(r#"{"by_ms":1,"expect":{"device":"all","colour":"red"}}"#).contains("expect.colour"));
        let headless = format!("{:#}", Script::parse(r#"{"ascend":[{"device":0}]}"#).unwrap_err());
        assert!(headless.contains("line 1: field ascend.card"), "{headless}");
    }

    #[test]
    fn devices_of_both_vendors_are_named_as_the_agent_names_them() {
        let head = r#"{"nvidia":[{"pci":"0000:3b:00.0"}],"ascend":[{"card":3,"device":1}],"expected_devices":2}"#;
        let line = r#"{"at_ms":1,"reset":[3,1],"outcome":"ok"}"#;
        let script = Script::parse(&format!("{head}\n{line}")).unwrap();
        assert!(matches!(&script.events[0].what, What::Reset { local, .. } if local == "3.1"));
        assert_eq!((script.expected(Vendor::Nvidia), script.expected(Vendor::Ascend)), (Some(Some(1)), Some(Some(1))));
    }
}
