//! `berth devices` on a machine of any kind.
#![expect(clippy::unwrap_used, reason = "a test ends with what it did not expect")]

use std::process::Command;

use serde_json::Value;

fn devices(nvml: &str) -> (String, Value) {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("devices.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth"));
    let output = command.args(["devices", "--nvml-library", nvml, "--json"]).arg(&json).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    (String::from_utf8(output.stdout).unwrap(), serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap())
}

#[test]
fn the_processor_is_always_there_and_what_is_missing_is_said() {
    let (said, found) = devices("/no/such/libnvidia-ml.so.1");
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
