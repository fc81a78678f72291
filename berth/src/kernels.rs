//! `berth kernels check` and `berth kernels bench`: doors to the conformance suite and to the benchmark.
//!
//! Reads arguments, calls the library, prints. It decides nothing: gates and figures are the library's.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use berth_kernels::bench::{Bench, Measurement, Shape};
use berth_kernels::conformance::{CaseReport, check_folder};
use berth_kernels::cpu::{CpuBackend, CpuOptions, Peaks};
use berth_kernels::{Backend, BackendKind, ScaleType, StoredFormat};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::{
    output::{say, write_json},
    verdict::Verdict,
};

/// Check or measure the expert kernels of this machine.
#[derive(Debug, Args)]
pub(crate) struct KernelsArgs {
    #[command(subcommand)]
    command: KernelsCommand,
}

#[derive(Debug, Subcommand)]
enum KernelsCommand {
    /// Compare a backend with reference cases; exits 1 if one fails.
    Check {
        /// Folder of *.safetensors cases.
        #[arg(long)]
        cases: PathBuf,
        /// cpu, cuda or ascend.
        #[arg(long, default_value = "cpu")]
        backend: BackendKind,
        /// Write the report here as one JSON document.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Time a model's experts beside the machine's measured limits.
    Bench {
        /// cpu, cuda or ascend.
        #[arg(long, default_value = "cpu")]
        backend: BackendKind,
        /// Model whose expert shape is used, such as v4-flash or deepseek-v3.
        #[arg(long)]
        model: String,
        /// Batch sizes.
        #[arg(long, value_delimiter = ',', default_value = "1,4,16")]
        tokens: Vec<usize>,
        /// Compute threads (default: as many as the process may use).
        #[arg(long)]
        threads: Option<usize>,
        /// Write the figures here as one JSON document.
        #[arg(long)]
        json: Option<PathBuf>,
    },
}

/// Runs the subcommand; a case that fails is a verdict, bad input an error.
pub(crate) fn run(args: &KernelsArgs) -> anyhow::Result<Verdict> {
    match &args.command {
        KernelsCommand::Check { cases, backend, json } => check(cases, *backend, json.as_deref()),
        KernelsCommand::Bench { backend, model, tokens, threads, json } => {
            bench(*backend, model, tokens, *threads, json.as_deref())
        }
    }
}

#[derive(Serialize)]
struct CheckReport {
    backend: String,
    passed: bool,
    cases: Vec<CaseReport>,
}

fn check(cases: &Path, kind: BackendKind, json: Option<&Path>) -> anyhow::Result<Verdict> {
    let backend = berth_kernels::open(kind)?;
    let cases = check_folder(&*backend, cases)?;
    for case in &cases {
        print_case(case)?;
    }
    let failed = cases.iter().filter(|c| !c.passed).count();
    say(&format!("{} of {} cases passed on {kind}", cases.len() - failed, cases.len()))?;
    write_json(json, &CheckReport { backend: kind.to_string(), passed: failed == 0, cases })?;
    Ok(Verdict::from(failed == 0))
}

fn print_case(case: &CaseReport) -> io::Result<()> {
    let verdict = if case.passed { "pass" } else { "FAIL" };
    let routing = if case.routing.exact { "exact" } else { "WRONG" };
    let bad = match case.bad_rows_contained {
        None => "none",
        Some(true) => "contained",
        Some(false) => "SPREAD",
    };
    let alone = if case.batch_invariant { "same" } else { "DIFFERENT" };
    say(&format!(
        "{verdict}  {:<20} {:>3} tokens  routing {routing} (weights {:.1e})  bad rows {bad}  row alone {alone}",
        case.case, case.tokens, case.routing.weight_error
    ))?;
    for output in &case.outputs {
        let gate = match output.gate {
            None => "not gated: this backend keeps activations in float32".to_owned(),
            Some(g) if output.passed => format!("gate {:.0e} / {:.0e}", g.nrmse, g.max),
            Some(g) => format!("gate {:.0e} / {:.0e} EXCEEDED", g.nrmse, g.max),
        };
        say(&format!("      {:<22} nrmse {:.2e}  max {:.2e}  {gate}", output.tensor, output.nrmse, output.max))?;
    }
    Ok(())
}

#[derive(Serialize)]
struct BenchReport {
    backend: String,
    model: String,
    hidden: usize,
    width: usize,
    experts: usize,
    top_k: usize,
    format: String,
    instructions: String,
    peaks: Peaks,
    results: Vec<BenchRow>,
}

#[derive(Serialize)]
struct BenchRow {
    #[serde(flatten)]
    measured: Measurement,
    /// Share of the measured peak.
    flops_ratio: f64,
    /// Share of the measured read stream.
    bandwidth_ratio: f64,
}

fn bench(
    kind: BackendKind,
    model: &str,
    tokens: &[usize],
    threads: Option<usize>,
    json: Option<&Path>,
) -> anyhow::Result<Verdict> {
    let shape = shape_of(model)?;
    if kind != BackendKind::Cpu {
        berth_kernels::open(kind)?;
    }
    let backend = CpuBackend::with(CpuOptions { threads, level: None })?;
    let peaks = backend.measure_peaks()?;
    say(&format!(
        "{model} on cpu ({:?}, {} threads): hidden {}, width {}, {} experts, top {}, {:?}",
        backend.level(),
        peaks.threads,
        shape.hidden,
        shape.width,
        shape.experts,
        shape.top_k,
        shape.format
    ))?;
    say(&format!("measured peaks: {:.1} GFLOP/s, {:.1} GB/s read", peaks.flops_per_s / 1e9, peaks.bytes_per_s / 1e9))?;
    let mut timed = Bench::new(&backend, shape)?;
    say("tokens  experts       ms  tokens/s  GFLOP/s (of peak)   GB/s (of read)")?;
    let mut results = Vec::with_capacity(tokens.len());
    for &count in tokens {
        let measured = timed.measure(count, Duration::from_secs(1))?;
        let row = BenchRow {
            flops_ratio: measured.flops_per_s / peaks.flops_per_s,
            bandwidth_ratio: measured.bytes_per_s / peaks.bytes_per_s,
            measured,
        };
        print_row(&row)?;
        results.push(row);
    }
    let report = BenchReport {
        backend: backend.kind().to_string(),
        model: model.to_owned(),
        hidden: shape.hidden,
        width: shape.width,
        experts: shape.experts,
        top_k: shape.top_k,
        format: format!("{:?}", shape.format),
        instructions: format!("{:?}", backend.level()),
        peaks,
        results,
    };
    write_json(json, &report)?;
    Ok(Verdict::Pass)
}

fn print_row(row: &BenchRow) -> io::Result<()> {
    let m = &row.measured;
    say(&format!(
        "{:>6} {:>8.1} {:>8.2} {:>9.1} {:>8.1} ({:>5.1} %) {:>7.2} ({:>5.1} %)",
        m.tokens,
        m.experts_used,
        m.seconds * 1e3,
        m.tokens_per_s,
        m.flops_per_s / 1e9,
        row.flops_ratio * 1e2,
        m.bytes_per_s / 1e9,
        row.bandwidth_ratio * 1e2
    ))
}

const FP8_F32: StoredFormat = StoredFormat::Fp8E4m3 { block: [128, 128], scale: ScaleType::F32 };
const MXFP4: StoredFormat = StoredFormat::Mxfp4;
const BF16: StoredFormat = StoredFormat::Bf16;
const INT4: StoredFormat = StoredFormat::Int4Group32;

/// Name, hidden, width, routed experts, top-k, format, swiglu limit.
type Published = (&'static str, usize, usize, usize, usize, StoredFormat, Option<f32>);

/// Published expert shapes; the last three of V4-Flash are its shape in other formats, for comparison.
const SHAPES: [Published; 14] = [
    ("deepseek-v3", 7168, 2048, 256, 8, FP8_F32, None),
    ("deepseek-r1", 7168, 2048, 256, 8, FP8_F32, None),
    ("deepseek-v3.2", 7168, 2048, 256, 8, FP8_F32, None),
    ("deepseek-v4-flash", 4096, 2048, 256, 6, MXFP4, Some(10.0)),
    ("deepseek-v4-flash-base", 4096, 2048, 256, 6, FP8_F32, Some(10.0)),
    ("deepseek-v4-flash-bf16", 4096, 2048, 256, 6, BF16, Some(10.0)),
    ("deepseek-v4-flash-int8", 4096, 2048, 256, 6, StoredFormat::Int8PerRow, Some(10.0)),
    ("deepseek-v4-flash-int4", 4096, 2048, 256, 6, INT4, Some(10.0)),
    ("deepseek-v4-pro", 7168, 3072, 384, 6, MXFP4, Some(10.0)),
    ("deepseek-v4.1-flash", 5120, 2304, 384, 6, MXFP4, Some(10.0)),
    ("kimi-k2", 7168, 2048, 384, 8, FP8_F32, None),
    ("kimi-k2.6", 7168, 2048, 384, 8, INT4, None),
    ("glm-4.6", 5120, 1536, 160, 8, BF16, None),
    ("qwen3-235b", 4096, 1536, 128, 8, BF16, None),
];

fn shape_of(model: &str) -> anyhow::Result<Shape> {
    let named = |name: &str| name == model || name.strip_prefix("deepseek-") == Some(model);
    let found = SHAPES.iter().find(|s| named(s.0)).with_context(|| {
        let names: Vec<&str> = SHAPES.iter().map(|s| s.0).collect();
        format!("--model {model} is unknown: use one of {}", names.join(", "))
    })?;
    let &(_, hidden, width, experts, top_k, format, limit) = found;
    Ok(Shape { hidden, width, experts, top_k, format, limit })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_model_is_refused_with_the_names_that_exist() {
        let error = shape_of("gpt-2").unwrap_err().to_string();
        assert!(error.starts_with("--model gpt-2 is unknown: use one of deepseek-v3, "), "{error}");
        assert_eq!(shape_of("deepseek-v4-pro").unwrap().width, 3072);
        assert_eq!(shape_of("v4-flash").unwrap().hidden, 4096);
    }
}
