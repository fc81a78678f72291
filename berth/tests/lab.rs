//! `berth lab node` over the fault scripts of `tests/data/scenarios/faults`, through the binary.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails it like the test itself")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/scenarios/faults")
}

/// Plays every script of `folder`; answers how many, and what failed.
fn play_all(folder: &Path) -> (usize, Vec<String>) {
    let mut names: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
        .collect();
    names.sort();
    let failed = names.iter().filter_map(|path| {
        let (code, said, _) = play(path.to_str().unwrap());
        (code != Some(0)).then(|| format!("{}: {code:?}\n{said}", path.display()))
    });
    (names.len(), failed.collect())
}

fn run(script: &Path, json: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_berth"))
        .args(["lab", "node", "--script"])
        .arg(script)
        .arg("--json")
        .arg(json)
        .output()
        .unwrap()
}

fn play(name: &str) -> (Option<i32>, String, Value) {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("out.json");
    let output = run(&scripts().join(name), &json);
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let document = std::fs::read(&json).map(|bytes| serde_json::from_slice(&bytes).unwrap()).unwrap_or_default();
    (output.status.code(), said, document)
}

#[test]
fn every_script_passes() {
    let (played, failed) = play_all(&scripts());
    assert!(played >= 36, "{played}");
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn every_edge_passes() {
    let (played, failed) = play_all(&scripts().join("../edges"));
    assert!(played >= 93, "{played}");
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[test]
fn the_document_has_states_at_zero_then_reports_then_outcomes() {
    let (code, said, document) = play("N06a-off-the-bus.jsonl");
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(document["passed"], true);
    let reports = document["reports"].as_array().unwrap();
    assert_eq!(reports.len(), 10);
    assert!(reports[..9].iter().all(|report| report["at_ms"] == 0 && report["reason"].is_null()));
    let lost = &reports[9];
    assert_eq!((lost["device"].as_str(), lost["scope"].as_str()), (Some("0000:3b:00.0"), Some("device")));
    assert_eq!((lost["at_ms"].as_i64(), lost["note"].as_bool()), (Some(1000), Some(false)));
    assert_eq!(document["expectations"].as_array().unwrap().len(), 7);
}

#[test]
fn the_same_script_is_told_in_the_same_way_every_time() {
    let (_, _, first) = play("N03-contained-dbe-remap-pending.jsonl");
    for _ in 0..5 {
        let (_, _, again) = play("N03-contained-dbe-remap-pending.jsonl");
        assert_eq!(first, again);
    }
}

#[test]
fn what_cannot_be_played_ends_with_2_and_the_line() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("script.jsonl");
    std::fs::write(&script, r#"{"node":"n","ascend":[{"device":0}]}"#).unwrap();
    let output = run(&script, &folder.path().join("out.json"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2));
    assert!(said.contains("line 1: field ascend.card"), "{said}");
    let (code, said, _) = play("absent.jsonl");
    assert_eq!(code, Some(2));
    assert!(said.contains("absent.jsonl"), "{said}");
}

#[test]
fn an_expectation_that_does_not_hold_ends_with_1_and_why() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("script.jsonl");
    let lines = [
        r#"{"node":"n","nvidia":[{"pci":"0000:3b:00.0"}]}"#,
        r#"{"at_ms":5,"kmsg":"NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."}"#,
        r#"{"by_ms":9,"expect":{"device":"0000:3b:00.0","health":"Healthy"}}"#,
    ];
    std::fs::write(&script, lines.join("\n")).unwrap();
    let json = folder.path().join("out.json");
    let output = run(&script, &json);
    assert_eq!(output.status.code(), Some(1));
    let document: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!((document["passed"].as_bool(), document["expectations"][0]["line"].as_u64()), (Some(false), Some(3)));
    assert!(document["expectations"][0]["why"].as_str().unwrap().contains("DeviceLost"), "{document}");
}

#[test]
fn a_symbol_that_an_old_driver_lacks_is_a_value_that_is_absent() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("script.jsonl");
    let lines = [
        r#"{"node":"n","nvidia":[{"pci":"0000:3b:00.0"}],"libraries":{"nvml":{"driver":"470.1","missing":["nvmlDeviceGetFieldValues","nvmlDeviceGetRemappedRows","nvmlEventSetCreate","nvmlDeviceGetTotalEccErrors"]}}}"#,
        r#"{"at_ms":10,"nvml":"0000:3b:00.0","set":{"lost":true}}"#,
        r#"{"until_ms":9,"never":{"device":"0000:3b:00.0","health":["Unknown","Degraded","Unhealthy"]}}"#,
        r#"{"by_ms":6000,"expect":{"device":"0000:3b:00.0","reason":"DeviceLost"}}"#,
    ];
    std::fs::write(&script, lines.join("\n")).unwrap();
    let output = run(&script, &folder.path().join("out.json"));
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
}
