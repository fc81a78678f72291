//! The public reference cases and the edge cases pass on the CPU backend at their gates, at every instruction set.
#![expect(clippy::unwrap_used, reason = "a test stops where its own set-up fails")]

use std::path::{Path, PathBuf};

use berth_kernels::conformance::{ConformanceError, check_folder};
use berth_kernels::cpu::{CpuBackend, CpuOptions, Level};
use berth_kernels::{Backend, BackendKind, Batch, KernelError, MemoryUse, PackedExpert, StoredExpert};

fn cases(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data").join(folder)
}

fn assert_all_pass(folder: &str, count: usize) {
    for level in Level::supported() {
        let backend = CpuBackend::with(CpuOptions { threads: Some(2), level: Some(level) }).unwrap();
        let reports = check_folder(&backend, &cases(folder)).unwrap();
        assert_eq!(reports.len(), count);
        for report in reports {
            assert!(report.passed, "{level:?}: {report:#?}");
        }
    }
}

#[test]
fn public_cases_pass_on_the_cpu_at_every_level() {
    assert_all_pass("reference", 9);
}

#[test]
fn edge_cases_pass_on_the_cpu_at_every_level() {
    assert_all_pass("reference-edges", 12);
}

/// A CPU backend that does one thing wrong.
#[derive(Debug)]
struct Faulty {
    cpu: CpuBackend,
    fault: fn(&Batch<'_>, &mut [f32]),
}

impl Backend for Faulty {
    fn kind(&self) -> BackendKind {
        BackendKind::Cpu
    }

    fn pack(&self, expert: &StoredExpert) -> Result<PackedExpert, KernelError> {
        self.cpu.pack(expert)
    }

    fn forward(&self, batch: &Batch<'_>, out: &mut [f32]) -> Result<(), KernelError> {
        self.cpu.forward(batch, out)?;
        (self.fault)(batch, out);
        Ok(())
    }

    fn memory(&self) -> MemoryUse {
        self.cpu.memory()
    }
}

fn failures(fault: fn(&Batch<'_>, &mut [f32]), folder: &str) -> Vec<String> {
    let faulty = Faulty { cpu: CpuBackend::new().unwrap(), fault };
    let reports = check_folder(&faulty, &cases(folder)).unwrap();
    reports.into_iter().filter(|r| !r.passed).map(|r| r.case).collect()
}

#[test]
fn the_suite_fails_a_backend_that_is_slightly_wrong() {
    let scaled = failures(|_, out| out.iter_mut().for_each(|v| *v *= 1.00005), "reference");
    assert_eq!(scaled.len(), 9, "{scaled:?}");
}

#[test]
fn the_suite_fails_a_backend_whose_rows_depend_on_the_batch() {
    let fault: fn(&Batch<'_>, &mut [f32]) = |batch, out| {
        if batch.len() > 1 {
            out[0] = f32::from_bits(out[0].to_bits() ^ 1);
        }
    };
    assert_eq!(failures(fault, "reference").len(), 9);
}

#[test]
fn the_suite_fails_a_backend_that_lets_nan_out_or_hides_it() {
    let hides: fn(&Batch<'_>, &mut [f32]) = |_, out| out.iter_mut().filter(|v| v.is_nan()).for_each(|v| *v = 0.0);
    let bad = ["v3_bf16_all_bad", "v3_bf16_bad_rows", "v4_mxfp4_bad_rows"];
    assert_eq!(failures(hides, "reference-edges"), bad);
    let spreads: fn(&Batch<'_>, &mut [f32]) = |_, out| {
        if out.iter().any(|v| v.is_nan()) {
            out.fill(f32::NAN);
        }
    };
    assert_eq!(failures(spreads, "reference-edges"), bad[1..]);
}

#[test]
fn a_folder_without_cases_is_an_error_with_a_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let backend = CpuBackend::new().unwrap();
    let error = check_folder(&backend, dir.path()).unwrap_err();
    assert!(matches!(error, ConformanceError::Empty { .. }));
    assert!(
        error.to_string().ends_with("no *.safetensors case in this folder: give the folder of the reference cases")
    );
    assert!(check_folder(&backend, &dir.path().join("none")).unwrap_err().to_string().contains("listing the cases"));
}
