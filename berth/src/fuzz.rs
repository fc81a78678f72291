//! Files that people and other programs write, damaged in every way: each is read or refused, and nothing panics or grows
//! without bound. The seeds are the files that the tests play.

use std::{fs, path::Path};

use berth_agent::Faults;
use berth_mutate::{each, each_text};
use berth_planner::bench::Manifest;

use crate::{generate::reference, lab};

fn data(path: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(path)
}

#[test]
fn a_damaged_fault_script_is_played_or_refused() {
    let mut texts = Vec::new();
    for folder in ["scenarios/faults", "scenarios/edges"] {
        for entry in fs::read_dir(data(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "jsonl") {
                texts.push(fs::read_to_string(path).unwrap());
            }
        }
    }
    let seeds: Vec<&str> = texts.iter().map(String::as_str).collect();
    assert!(seeds.len() >= 66);
    let mut read = 0;
    each_text(&seeds, 4_000, |text| read += usize::from(lab::can_read(text)));
    assert!(read >= 66, "the seeds themselves are read: {read}");
}

#[test]
fn a_damaged_reference_is_read_or_refused() {
    let text = fs::read(data("reference/models/v3-tiny/reference.json")).unwrap();
    each(&[&text], 2_000, |bytes| drop(reference::parse(bytes)));
    assert!(reference::parse(&text).is_ok());
}

#[test]
fn a_damaged_placement_manifest_is_read_or_refused() {
    let text = fs::read(data("placement/manifest.json")).unwrap();
    each(&[&text], 1_000, |bytes| drop(serde_json::from_slice::<Manifest>(bytes)));
    assert!(serde_json::from_slice::<Manifest>(&text).is_ok());
}

#[test]
fn a_damaged_answer_of_an_agent_is_read_or_refused() {
    let seed = br#"{"node":"gpu-07","incidents":[{"device":"3.0","product":"","uuid":"","serial":"","openedUnixMs":1,
        "closedUnixMs":null,"note":false,"reports":1,"reason":"DeviceLost","code":"Xid 79","evidence":"Xid 79",
        "action":"RebootNode","transitions":[{"atUnixMs":1,"health":"Unhealthy","admission":"Barred",
        "action":"RebootNode","evidence":"Xid 79"}]}]}"#;
    each(&[seed], 4_000, |bytes| {
        if let Ok(faults) = serde_json::from_slice::<Faults>(bytes) {
            let _ = crate::faults::all_forms(&faults);
        }
    });
    assert!(serde_json::from_slice::<Faults>(seed).is_ok());
}
