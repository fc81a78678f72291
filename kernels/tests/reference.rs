//! The public reference cases pass on the CPU backend at their gates, at every instruction set of this machine.

use std::path::{Path, PathBuf};

use berth_kernels::conformance::check_folder;
use berth_kernels::cpu::{CpuBackend, CpuOptions, Level};

fn cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/reference")
}

#[test]
fn public_cases_pass_on_the_cpu_at_every_level() {
    for level in Level::supported() {
        let backend = CpuBackend::with(CpuOptions { threads: Some(2), level: Some(level) }).unwrap();
        let reports = check_folder(&backend, &cases()).unwrap();
        assert_eq!(reports.len(), 9);
        for report in reports {
            assert!(report.passed, "{level:?}: {report:#?}");
        }
    }
}
