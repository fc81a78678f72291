//! `berth bench health` through the binary: by every road every fault is told, and no line of the storm is believed.
//! How soon is a figure, and no matter for a test.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails it like the test itself")]

use std::process::Command;

use serde_json::Value;

fn round(road: &str) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_berth"))
        .args(["bench", "health", "--road", road, "--round", "1", "--faults", "6", "--storm", "500"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn by_every_road_every_fault_is_told_and_nothing_else() {
    for road in ["kernel", "nvml-event", "dcmi-event", "polling"] {
        let outcome = round(road);
        assert_eq!(outcome["missed"], serde_json::json!([]), "{road}");
        assert_eq!(outcome["false_alarms"], serde_json::json!([]), "{road}");
        assert_eq!(outcome["latencies_ms"].as_array().unwrap().len(), 6, "{road}");
    }
}

#[test]
fn a_round_without_its_road_is_refused() {
    let output = Command::new(env!("CARGO_BIN_EXE_berth")).args(["bench", "health", "--round", "1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--road"));
}
