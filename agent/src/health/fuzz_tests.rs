//! The kernel log's and the libraries' words damaged in every way, from every public fault script as the corpus: nothing
//! panics, a dead device is never schedulable, a storm is bounded and its last state is said.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use berth_mutate::{Dice, damaged, each};
use berth_types::{Admission, Health, Vendor};
use serde_json::Value;

use super::{
    alarms,
    device::Settings,
    fact::{
        Alarm, Assertion, DeviceInfo, Fact, HostLink, NpuReading, Read, Reading, Rows, Source, Subject, SwitchFault,
        What, Xid,
    },
    kmsg::Record,
    ledger::{Ledger, Report},
    ledger_tests::{info, ms},
    nvlink,
    nvrm::Nvrm,
};

/// Reports of one subject within a second: two, and one more that drains behind two notes, and one more that bars.
const STORM: usize = 4;

/// A script's devices of NVIDIA and the lines of its kernel log, with their times.
struct Script {
    name: String,
    devices: Vec<String>,
    lines: Vec<(u64, String)>,
}

/// Every public script, and those of the edges.
fn scripts() -> Vec<Script> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/scenarios");
    let files = ["faults", "edges"].into_iter().flat_map(|part| fs::read_dir(folder.join(part)).unwrap());
    let mut paths: Vec<_> = files.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "jsonl"));
    paths.sort();
    paths.iter().map(|path| script(path)).collect()
}

fn script(path: &Path) -> Script {
    let text = fs::read_to_string(path).unwrap();
    let mut values = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let header = values.next().unwrap();
    let pci = |device: &Value| Some(device.get("pci")?.as_str()?.to_owned());
    let devices = header.get("nvidia").and_then(Value::as_array).into_iter().flatten().filter_map(pci).collect();
    let line = |value: Value| {
        let text = value.get("kmsg")?.as_str()?.to_owned();
        let at = value.get("at_ms").and_then(Value::as_f64).unwrap_or(0.0).max(0.0);
        Some((Duration::try_from_secs_f64(at / 1000.0).ok()?.as_millis().try_into().ok()?, text))
    };
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    Script { name, devices, lines: values.filter_map(line).collect() }
}

fn ledger(devices: &[String]) -> Ledger {
    let mut ledger = Ledger::new(Settings::default());
    for local in devices {
        ledger.take(ms(0), &Fact::device(local.clone(), What::Listed(info(local))));
        let reading = Reading { recovery: Read::Value(0), rows: Read::Value(Rows::default()), ..Reading::default() };
        ledger.take(ms(0), &Fact::device(local.clone(), What::Reading(Box::new(reading))));
    }
    ledger.start(ms(0));
    ledger
}

/// What was said in a run of records, and the ledger after it.
fn play(devices: &[String], records: &[(u64, Vec<u8>)]) -> (Ledger, Vec<Report>, u64) {
    let (mut ledger, mut nvrm, mut said, mut last) = (ledger(devices), Nvrm::default(), Vec::new(), 0);
    for (at, bytes) in records {
        last = *at;
        while let Some(next) = ledger.deadline().filter(|next| *next < ms(*at)) {
            said.extend(ledger.tick(next).reports);
        }
        let Some(record) = Record::parse(bytes) else { continue };
        for fact in nvrm.read(&record.text) {
            said.extend(ledger.take(ms(*at), &fact).reports);
        }
    }
    (ledger, said, last)
}

fn hold(name: &str, devices: &[String], (mut ledger, said, last): (Ledger, Vec<Report>, u64)) {
    let mut seconds: BTreeMap<(Subject, u64), usize> = BTreeMap::new();
    for report in &said {
        let count = seconds.entry((report.of.clone(), report.at.as_secs())).or_default();
        *count += 1;
        assert!(*count <= STORM, "{name}: {:?} spoke {count} times within a second", report.of);
    }
    // What a storm held back is said a little later.
    ledger.tick(ms(last + 2_000));
    assert!(ledger.forgotten().is_empty(), "{name}");
    for local in devices {
        let mut dead = ledger.take(ms(last + 3_000), &Fact::device(local.clone(), lost())).reports;
        dead.extend(ledger.tick(ms(last + 6_000)).reports);
        let state = ledger.standing(&Subject::Device(local.clone())).state;
        assert_eq!(
            (state.health, state.admission),
            (Health::Unhealthy, Admission::Barred),
            "{name}: {local}, {dead:?}"
        );
    }
}

fn lost() -> What {
    What::Xid(Xid {
        number: 79,
        source: Source::KernelLog,
        pid: None,
        process: String::new(),
        gpu_instance: None,
        message: "GPU has fallen off the bus.".to_owned(),
    })
}

fn record(sequence: usize, text: &str) -> Vec<u8> {
    format!("4,{sequence},1,-;{text}\n").into_bytes()
}

#[test]
fn lines_of_every_script_in_any_order_twice_cut_and_garbled_leave_the_promises_whole() {
    let scripts = scripts();
    assert!(scripts.len() >= 66, "{}", scripts.len());
    let all: Vec<Vec<u8>> = scripts.iter().flat_map(|script| script.lines.iter()).map(|(_, t)| record(1, t)).collect();
    let others: Vec<&[u8]> = all.iter().map(Vec::as_slice).collect();
    let mut dice = Dice::new(17);
    for script in scripts.iter().filter(|script| !script.devices.is_empty()) {
        let whole: Vec<(u64, Vec<u8>)> =
            script.lines.iter().enumerate().map(|(at, (time, text))| (*time, record(at, text))).collect();
        hold(&script.name, &script.devices, play(&script.devices, &whole));
        for _ in 0..12 {
            let mut records = whole.clone();
            for _ in 0..dice.below(6) {
                let Some(pick) = records.get(dice.below(records.len())).cloned() else { continue };
                records.push(pick);
            }
            for at in 0..records.len() {
                if dice.below(3) == 0 {
                    let changed = damaged(&records[at].1, &others, &mut dice);
                    records[at].1 = changed;
                }
                let other = dice.below(records.len());
                let (one, two) = (records[at].1.clone(), records[other].1.clone());
                (records[at].1, records[other].1) = (two, one);
            }
            records.sort_by_key(|(at, _)| *at);
            hold(&script.name, &script.devices, play(&script.devices, &records));
        }
    }
}

#[test]
fn any_damaged_record_is_read_or_dropped() {
    let scripts = scripts();
    let all: Vec<Vec<u8>> =
        scripts.iter().flat_map(|script| script.lines.iter()).enumerate().map(|(at, (_, t))| record(at, t)).collect();
    let seeds: Vec<&[u8]> = all.iter().map(Vec::as_slice).collect();
    let mut nvrm = Nvrm::default();
    each(&seeds, 20_000, |bytes| {
        let Some(record) = Record::parse(bytes) else { return };
        for fact in nvrm.read(&record.text) {
            if let What::Xid(xid) = &fact.what {
                assert!(xid.evidence().chars().count() <= 240, "evidence has a bound");
                for branch in [None, Some(570), Some(580)] {
                    let _ = nvlink::judge(xid, branch);
                }
            }
        }
    });
}

#[test]
fn every_rule_of_the_fabric_is_judged_whatever_the_registers() {
    let seeds = [
        "NETIR_LINK_EVT  Fatal   XC0 i0 Link 08 (0x004505c6 0x00000000 0x00000000 0x00000000 0x00000000 0x00000000)",
        "RLW_SRC_TRACK Nonfatal XC1 i0 Link 10 (0x04082907 0x00000008 0x0 0x0)",
        "NVLink: fatal error detected on link 14(0x0, 0x0, 0x10000, 0x0, 0x0, 0x0, 0x0)",
    ];
    berth_mutate::each_text(&seeds, 20_000, |message| {
        for number in [74, 144, 145, 149, 150] {
            let xid = Xid { number, message: message.to_owned(), ..xid() };
            for branch in [None, Some(0), Some(570), Some(575), Some(u16::MAX)] {
                let _ = nvlink::judge(&xid, branch);
            }
        }
    });
}

fn xid() -> Xid {
    Xid {
        number: 0,
        source: Source::KernelLog,
        pid: None,
        process: String::new(),
        gpu_instance: None,
        message: String::new(),
    }
}

fn npu(local: &str) -> DeviceInfo {
    let card = "card 3".to_owned();
    DeviceInfo { vendor: Vendor::Ascend, reset_group: Some("module 3".to_owned()), card, ..info(local) }
}

/// A value at or near an edge.
fn edge(dice: &mut Dice) -> u32 {
    match dice.below(8) {
        0 => 0,
        1 => u32::MAX,
        2 => u32::MAX - 1,
        3 => 16,
        4 => alarms::CARD_DROP,
        5 => alarms::LINK_DOWN,
        6 => 0x80E0_1801,
        _ => u32::try_from(dice.roll() >> 32).unwrap(),
    }
}

fn answer<T>(dice: &mut Dice, value: impl FnOnce(&mut Dice) -> T) -> Read<T> {
    match dice.below(6) {
        0 => Read::Absent,
        1 => Read::Missed,
        2 => Read::Failed([-8012, -8005, -8255, 15, 999, i32::MIN, i32::MAX, 0][dice.below(8)]),
        _ => Read::Value(value(dice)),
    }
}

fn vendor_fact(dice: &mut Dice, at: u64) -> What {
    let assertion = [Assertion::Occurred, Assertion::Recovered, Assertion::Once][dice.below(3)];
    let severity = u8::try_from(dice.below(256)).unwrap();
    match dice.below(6) {
        0 => What::Alarm(Alarm { code: edge(dice), assertion, severity, serial: i32::from(severity) - 100 }),
        1 | 2 => What::Npu(Box::new(NpuReading {
            begun: ms(at),
            health: answer(dice, edge),
            codes: answer(dice, |dice| (0..dice.below(128)).map(|_| edge(dice)).collect()),
            boot: answer(dice, edge),
            network: answer(dice, edge),
            next_isolated: answer(dice, edge),
            host_errors: answer(dice, Dice::roll),
            fabric_errors: answer(dice, Dice::roll),
        })),
        3 | 4 => What::Reading(Box::new(Reading {
            begun: ms(at),
            lost: dice.below(9) == 0,
            reset_required: dice.below(9) == 0,
            recovery: answer(dice, edge),
            rows: answer(dice, |dice| Rows { pending: dice.below(2) == 0, failed: dice.below(2) == 0 }),
            ecc_uncorrected: answer(dice, Dice::roll),
            ecc_corrected: answer(dice, Dice::roll),
            temperature: answer(dice, edge),
            slowdown: answer(dice, edge),
            shutdown: answer(dice, edge),
            clock_reasons: answer(dice, Dice::roll),
            host_link: answer(dice, |dice| HostLink {
                lanes: edge(dice),
                lanes_most: edge(dice),
                generation: edge(dice),
                generation_most: edge(dice),
            }),
            links_down: answer(dice, |dice| (0..dice.below(3)).map(|_| edge(dice)).collect()),
            ..Reading::default()
        })),
        _ => What::Event(1 << dice.below(64)),
    }
}

#[test]
fn nonsense_from_both_libraries_is_judged_bounded_and_never_hides_a_loss() {
    let mut dice = Dice::new(23);
    for turn in 0..60 {
        let (gpu, card) = ("0000:3b:00.0".to_owned(), "3.0".to_owned());
        let mut ledger = ledger(std::slice::from_ref(&gpu));
        ledger.take(ms(1), &Fact::device(card.clone(), What::Listed(npu(&card))));
        let (mut at, mut nonsense) = (1, 0_usize);
        for _ in 0..200 {
            at += u64::try_from(dice.below(20_000)).unwrap();
            let local = if dice.below(2) == 0 { &gpu } else { &card };
            nonsense += ledger.take(ms(at), &Fact::device(local.clone(), vendor_fact(&mut dice, at))).reports.len();
            let of = SwitchFault {
                alarm: edge(&mut dice),
                fault: (dice.below(2) == 0).then(|| edge(&mut dice)),
                peer: ["cpu", "npu", "L2", "na"][dice.below(4)],
                chip: u16::MAX,
                port: 0,
            };
            if dice.below(10) == 0 {
                let fault = What::Fabric { of, assertion: Assertion::Occurred, severity: 3 };
                ledger.take(ms(at), &Fact::node(fault));
            }
            ledger.tick(ms(at + 1));
        }
        let size = serde_json::to_string(&ledger).unwrap().len();
        assert!(size < 400_000, "turn {turn}: {size} bytes are remembered");
        ledger.take(ms(at + 700_000), &Fact::device(gpu.clone(), lost()));
        let gone = NpuReading { begun: ms(at + 700_000), health: Read::Value(u32::MAX), ..NpuReading::default() };
        ledger.take(ms(at + 700_000), &Fact::device(card.clone(), What::Npu(Box::new(gone))));
        ledger.tick(ms(at + 702_000));
        for local in [gpu, card] {
            let state = ledger.standing(&Subject::Device(local)).state;
            assert_eq!(state.admission, Admission::Barred, "turn {turn}, after {nonsense} reports: {state:?}");
        }
    }
}
