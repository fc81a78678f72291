//! `berth devices` on a machine of any kind.
#![expect(clippy::unwrap_used, reason = "a test ends with what it did not expect")]

use std::{path::Path, process::Command};

use serde_json::Value;

fn devices(nvml: &str, dcmi: &str, script: &str) -> (String, Value) {
    let dir = tempfile::tempdir().unwrap();
    let (json, lines) = (dir.path().join("devices.json"), dir.path().join("script.jsonl"));
    std::fs::write(&lines, script).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth"));
    command.args(["devices", "--nvml-library", nvml, "--dcmi-library", dcmi, "--json"]).arg(&json);
    let output = command.env("BERTH_DOUBLE_SCRIPT", &lines).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    (String::from_utf8(output.stdout).unwrap(), serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap())
}

#[test]
fn the_processor_is_always_there_and_what_is_missing_is_said() {
    let (said, found) = devices("/no/such/libnvidia-ml.so.1", "/no/such/libdcmi.so", "");
    assert!(said.starts_with("cpu      "), "{said}");
    assert!(found["cpu"]["threads"].as_u64().unwrap() >= 1);
    assert!(found["cpu"]["memory_bytes"].as_u64().unwrap() > 1 << 20);
    assert_eq!(found["cpu"]["instructions"][0], "portable");
    assert_eq!(found["nvidia"]["devices"].as_array().unwrap().len(), 0);
    let management = &found["nvidia"]["libraries"][0];
    assert_eq!(management["name"], "/no/such/libnvidia-ml.so.1");
    assert!(management["missing"].as_str().unwrap().contains("/no/such/libnvidia-ml.so.1"), "{management}");
    for library in ["libcuda.so.1", "libdcmi.so", "libascendcl.so"] {
        assert!(said.contains(library), "{said}");
    }
}

/// The double of Ascend's library, where cargo puts it.
fn double() -> String {
    let folder = Path::new(env!("CARGO_BIN_EXE_berth")).parent().unwrap().to_owned();
    let file = "libberth_double_dcmi.so";
    let found = [folder.join(file), folder.join("deps").join(file)].into_iter().find(|path| path.is_file());
    found.expect("cargo build -p berth-double-dcmi").display().to_string()
}

#[test]
fn both_devices_of_an_ascend_card_are_listed_with_card_pod_and_reset_group() {
    let script = r#"{"ascend":[
        {"card":2,"device":0,"product":"Ascend910_9392","hbm_bytes":68719476736,"superpod":7,"serial":"1023A","pci":"0000:c1:00.0","brother":3},
        {"card":2,"device":1,"product":"Ascend910_9392","hbm_bytes":68719476736,"superpod":7,"serial":"1023A","brother":3}]}"#;
    let (said, found) = devices("/no/such/libnvidia-ml.so.1", &double(), &script.replace('\n', " "));
    let devices = found["ascend"]["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 2, "{said}");
    for (device, local) in devices.iter().zip(["2.0", "2.1"]) {
        assert_eq!(device["local"], local);
        assert_eq!(device["product"], "Ascend910_9392");
        assert_eq!((device["memory_bytes"].as_u64(), device["card"].as_str()), (Some(64 << 30), Some("1023A")));
        assert_eq!(
            (&device["interconnect_domain"], &device["reset_group"]),
            (&"superpod-7".into(), &"module 2".into())
        );
    }
    assert!(found["ascend"]["libraries"][0]["missing"].is_null(), "{said}");
}

#[test]
fn the_second_generation_of_calls_lists_devices_too() {
    let script = r#"{"ascend":[{"card":4,"product":"Ascend950PR","hbm_bytes":128000000000}],"libraries":{"dcmi":{"api":2,"driver":"26.1"}}}"#;
    let (said, found) = devices("/no/such/libnvidia-ml.so.1", &double(), script);
    let device = &found["ascend"]["devices"][0];
    assert_eq!((device["local"].as_str(), found["ascend"]["driver"].as_str()), (Some("4.0"), Some("26.1")), "{said}");
    assert!(device["reset_group"].is_null() && device["interconnect_domain"].is_null(), "{said}");
}
