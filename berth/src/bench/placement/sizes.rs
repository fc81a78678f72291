//! `berth bench placement-sizes`: one large model on more and more devices, as a table and as a curve.

use std::path::PathBuf;

use anyhow::Context;
use berth_planner::bench::{Case, Options, run as solve};
use clap::Args;
use serde::Serialize;

use super::watch::{ClockArg, Stopwatch};
use crate::{
    output::{say, write_json},
    verdict::Verdict,
};

#[derive(Debug, Args)]
pub(in crate::bench) struct SizesArgs {
    /// Threads; plans do not depend on it. The machine's processors if not given.
    #[arg(long)]
    threads: Option<usize>,
    /// Solve each size this many times; seconds are the mean.
    #[arg(long, default_value_t = 3)]
    repeat: u32,
    /// What seconds are: of the wall, or of the processor (of one thread).
    #[arg(long, value_enum, default_value = "wall")]
    clock: ClockArg,
    /// Write the curve here.
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Write the figures here as one JSON document.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Expert layers and experts of the model.
const LAYERS: usize = 61;
const EXPERTS: usize = 384;

/// Devices, slots of each, and speeds of the halves (or thirds) of them.
const SIZES: [(usize, usize, &[f64]); 9] = [
    (64, 7, &[1.0]),
    (128, 4, &[1.0]),
    (320, 2, &[1.0]),
    (320, 3, &[1.0]),
    (640, 2, &[1.0]),
    (1024, 2, &[1.0]),
    (2048, 2, &[1.0]),
    (320, 2, &[1.0, 0.5]),
    (2048, 2, &[1.0, 0.5]),
];

/// A peer's milliseconds at 64 devices of 7 slots and at 320 of 2, and its balance there.
const PEERS: [(&str, [f64; 2], [f64; 2]); 3] = [
    ("evolved", [649.0, 4500.0], [0.9935, 0.9561]),
    ("vLLM", [70.0, 90.0], [0.9892, 0.9498]),
    ("EPLB", [3700.0, 16_000.0], [0.9892, 0.9498]),
];

#[derive(Serialize)]
struct Size {
    devices: usize,
    slots: usize,
    speeds: usize,
    ms: f64,
    balancedness: f64,
    makespan: f64,
}

#[derive(Serialize)]
struct Report {
    sizes: Vec<Size>,
}

/// Solves every size and prints the table.
pub(in crate::bench) fn run(args: &SizesArgs) -> anyhow::Result<Verdict> {
    let SizesArgs { threads, repeat, clock, svg, json } = args;
    let threads = clock.threads(*threads)?;
    let watch = Stopwatch::new(*clock);
    let mut sizes = Vec::new();
    say(&format!("{LAYERS} layers, {EXPERTS} experts; {} of {threads} thread(s)", clock.as_str()))?;
    say(&format!("{:>16} {:>8} {:>10} {:>9} {:>9}", "devices x slots", "speeds", "ms", "balance", "makespan"))?;
    for (devices, slots, speeds) in SIZES {
        let case = case(devices, slots, speeds)?;
        let loads = loads(u64::try_from(devices + slots).unwrap_or(0));
        let options = Options { threads, ..Options::default() };
        let (mut seconds, mut last) = (0.0, None);
        for _ in 0..(*repeat).max(1) {
            let (results, _) = solve(&case, &loads, options, || watch.seconds())?;
            seconds += results.first().map_or(0.0, |result| result.seconds);
            last = results.into_iter().next();
        }
        let Some(result) = last else { continue };
        let ms = seconds / f64::from((*repeat).max(1)) * 1000.0;
        let size = Size {
            devices,
            slots,
            speeds: speeds.len(),
            ms,
            balancedness: result.balancedness,
            makespan: result.makespan,
        };
        say(&format!(
            "{:>16} {:>8} {ms:>10.1} {:>9.4} {:>9.4}",
            format!("{devices} x {slots}"),
            size.speeds,
            size.balancedness,
            size.makespan
        ))?;
        sizes.push(size);
    }
    for (name, ms, balance) in PEERS {
        say(&format!(
            "{name:>16}: {:.0} ms ({}) at 64 x 7, {:.0} ms ({}) at 320 x 2",
            ms[0], balance[0], ms[1], balance[1]
        ))?;
    }
    if let Some(path) = svg {
        std::fs::write(path, curve(&sizes)).with_context(|| format!("writing --svg {}", path.display()))?;
    }
    write_json(json.as_deref(), &Report { sizes })?;
    Ok(Verdict::Pass)
}

fn case(devices: usize, slots: usize, speeds: &[f64]) -> anyhow::Result<Case> {
    let pool = |speed: &f64| {
        serde_json::json!({"nodes": devices / 8 / speeds.len(), "devices_per_node": 8, "slots_per_layer": slots,
            "speed": speed})
    };
    let pools: Vec<_> = speeds.iter().map(pool).collect();
    let case = serde_json::json!({"id": format!("{devices}x{slots}"), "layers": LAYERS, "experts": EXPERTS,
        "expert_bytes": 1, "pools": pools});
    Ok(serde_json::from_value(case)?)
}

/// Token counts of every layer, the logarithm of an expert's popularity being about normal with deviation 0.8.
fn loads(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        f64::from(u32::try_from((z ^ (z >> 31)) >> 32).unwrap_or(0)) / f64::from(u32::MAX)
    };
    let mut bytes = Vec::with_capacity(LAYERS * EXPERTS * 4);
    for _ in 0..LAYERS * EXPERTS {
        let normal: f64 = (0..12).map(|_| uniform()).sum::<f64>() - 6.0;
        let tokens = format!("{:.0}", (0.8 * normal).exp() * 1000.0).parse::<u32>().unwrap_or(0);
        bytes.extend_from_slice(&tokens.to_le_bytes());
    }
    bytes
}

/// Width and height of the drawing, and of its margin.
const DRAWING: (f64, f64, f64) = (720.0, 420.0, 60.0);

/// One line of the drawing: its points are slots in all and milliseconds.
struct Line {
    name: String,
    colour: &'static str,
    points: Vec<(usize, f64)>,
}

/// Milliseconds against slots of all devices, both in powers of ten: ours for like devices and for two speeds,
/// the peers' where they were measured.
fn curve(sizes: &[Size]) -> String {
    let (width, height, margin) = DRAWING;
    let x = |slots: usize| {
        let slots = f64::from(u32::try_from(slots).unwrap_or(u32::MAX));
        margin + (slots.log10() - 2.6) / (3.65 - 2.6) * (width - 2.0 * margin)
    };
    let y = |ms: f64| height - margin - (ms.max(1.0).log10() - 1.0) / (4.3 - 1.0) * (height - 2.0 * margin);
    let mut lines: Vec<Line> = Vec::new();
    for (name, colour, speeds) in [("Berth", "#0a6", 1), ("Berth, two speeds", "#06a", 2)] {
        let mut points: Vec<(usize, f64)> = sizes
            .iter()
            .filter(|size| size.speeds == speeds)
            .map(|size| (size.devices * size.slots, size.ms))
            .collect();
        points.sort_by_key(|(slots, _)| *slots);
        lines.push(Line { name: name.to_owned(), colour, points });
    }
    for ((name, ms, _), colour) in PEERS.iter().zip(["#a40", "#888", "#a08"]) {
        lines.push(Line { name: (*name).to_owned(), colour, points: vec![(448, ms[0]), (640, ms[1])] });
    }
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n<text x=\"{margin}\" y=\"24\">Milliseconds of a plan against slots in each of {LAYERS} layers, {EXPERTS} experts</text>\n"
    );
    for ms in [10.0, 100.0, 1000.0, 10_000.0] {
        let (at, right) = (y(ms), width - margin);
        svg.push_str(&format!(
            "<path d=\"M{margin} {at:.1}H{right}\" stroke=\"#ddd\"/><text x=\"12\" y=\"{at:.1}\">{ms}</text>\n"
        ));
    }
    for slots in [448, 640, 1280, 2048, 4096] {
        svg.push_str(&format!(
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{slots}</text>\n",
            x(slots),
            height - 36.0
        ));
    }
    for Line { name, colour, points } in lines {
        let path: Vec<String> = points.iter().map(|(slots, ms)| format!("{:.1} {:.1}", x(*slots), y(*ms))).collect();
        svg.push_str(&format!(
            "<path d=\"M{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\n",
            path.join("L")
        ));
        for (slots, ms) in &points {
            svg.push_str(&format!(
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\" fill=\"{colour}\"/>\n",
                x(*slots),
                y(*ms)
            ));
        }
        if let Some((slots, ms)) = points.last() {
            svg.push_str(&format!(
                "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"{colour}\">{name}</text>\n",
                x(*slots).min(width - 120.0) + 6.0,
                y(*ms) - 6.0
            ));
        }
    }
    svg.push_str("</svg>\n");
    svg
}
