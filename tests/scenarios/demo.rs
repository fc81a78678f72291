//! The main job as `make demo` runs it, and what its report must say.

use std::path::{Path, PathBuf};

use berth_tests::demo::{self, Options, Report, nodes::Fleet};
use berth_types::{Action, Vendor};

/// The simulated nodes.
const FLEET: Fleet = Fleet::BOTH;

fn checkpoint(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

async fn run(name: &str, path: &str) -> Report {
    let folder = tempfile::tempdir().unwrap();
    let options = Options {
        name: name.to_owned(),
        fleet: FLEET,
        checkpoint: checkpoint(path),
        report: folder.path().join("report.json"),
        kubeconfig: None,
        keep: false,
    };
    let report = demo::run(&options).await.unwrap();
    let written: serde_json::Value = serde_json::from_slice(&std::fs::read(&options.report).unwrap()).unwrap();
    for field in ["checkpoint", "prompts", "placement", "fault", "durations_s"] {
        assert!(written.get(field).is_some(), "{field} is missing in {written}");
    }
    report
}

fn assert_repaired(report: &Report) {
    assert!(report.prompts.iter().all(demo::PromptReport::is_right), "{:#?}", report.prompts);
    assert!(report.placement.revision_after > report.placement.revision_before, "{:?}", report.placement);
    assert!(report.placement.moved_bytes > 0, "{:?}", report.placement);
    for fault in &report.fault {
        assert_eq!(fault.failed_requests, 0, "{fault:?}");
        assert!(fault.refused_calls > 0 && fault.retried_requests > 0, "{fault:?}");
        assert!(fault.detected_ms > 0.0 && fault.detected_ms <= 500.0, "{fault:?}");
        assert!(fault.rerouted_ms > 0.0 && fault.rerouted_ms <= 2_000.0, "{fault:?}");
        assert!(fault.repaired_ms > 0.0, "{fault:?}");
    }
    assert_eq!(report.fault.len(), [FLEET.nvidia, FLEET.ascend].into_iter().filter(|nodes| *nodes > 0).count());
    assert_evened_out(report);
    assert_reset_by_order(report);
    let drain = report.drain.as_ref().unwrap();
    assert!(drain.requests > 0 && drain.failed_requests == 0, "{drain:?}");
    assert_eq!(report.returned.len(), report.fault.len());
    for (returned, fault) in report.returned.iter().zip(&report.fault) {
        assert_eq!(returned.devices, fault.devices);
        assert!(returned.used_ms >= returned.healthy_ms, "{returned:?}");
    }
}

/// Every step came, in its order; a card's two devices went together; the vendor's call was asked for once.
fn assert_reset_by_order(report: &Report) {
    let reset: Vec<_> = report.reset.iter().map(|reset| (reset.vendor, reset.devices.len(), reset.action)).collect();
    assert_eq!(reset, [(Vendor::Nvidia, 1, Action::ResetDevice), (Vendor::Ascend, 2, Action::ResetGroup)]);
    for reset in &report.reset {
        let steps = [reset.told_ms, reset.ordered_ms, reset.reset_ms, reset.validated_ms, reset.healthy_ms];
        assert!(steps.is_sorted() && steps[0] > 0.0, "{reset:?}");
        assert!(reset.emptied_ms <= reset.ordered_ms && reset.healthy_ms <= reset.used_ms, "{reset:?}");
        assert!(reset.requests > 0 && reset.failed_requests == 0, "{reset:?}");
        assert!(reset.asked.len() == 1 && reset.device.ends_with(&reset.asked[0]), "{reset:?}");
    }
}

/// The balance is what the runner counted before and after, whatever the plan expected.
fn assert_evened_out(report: &Report) {
    let moved = report.rebalance.as_ref().unwrap();
    assert!(moved.balancedness_after > moved.balancedness_before + 0.1, "{moved:?}");
    // The plan was made for a window that other prompts may have a part in.
    assert!(moved.expected_after.is_some_and(|expected| moved.balancedness_after > expected - 0.2), "{moved:?}");
    assert_eq!((moved.failed_requests, moved.revision_after), (0, moved.revision_before + 1), "{moved:?}");
    assert!(moved.requests > 0 && moved.moved_replicas > 0 && moved.moved_bytes > 0, "{moved:?}");
    assert!(moved.why.starts_with("re-plan r") && moved.why.contains("pays back in"), "{moved:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_lost_between_two_tokens_changes_no_token() {
    let report = run("demo-test", "tests/data/reference/models/v4-tiny").await;
    assert_repaired(&report);
    assert!(report.prompts.iter().all(|prompt| prompt.expected_ids.is_some()));
    let balancedness = report.placement.balancedness.unwrap();
    assert!(balancedness > 0.0 && balancedness <= 1.0, "{balancedness}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_of_other_sizes_is_served_through_the_same_loss() {
    let report = run("demo-sizes", "runner/tests/data/one-group-yarn").await;
    assert_repaired(&report);
}
