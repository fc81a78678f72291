//! The table of a benchmark: these figures, what they must be, and the peers'. Text only.

use std::collections::BTreeMap;

use berth_planner::bench::WindowResult;

use super::{peers, watch::ClockArg};

/// What a case must reach.
enum Bar {
    Balance(f64),
    Next(f64),
    Makespan(f64),
}

fn bar(case: &str) -> Option<Bar> {
    Some(match case.get(..3)? {
        "p01" | "p03" | "p05" | "p07" => Bar::Balance(0.9990),
        "p02" | "p04" => Bar::Balance(0.9985),
        "p06" => Bar::Balance(0.955),
        "p08" => Bar::Next(0.920),
        "p10" | "p13" => Bar::Balance(0.995),
        "p14" => Bar::Makespan(1.003),
        _ => return None,
    })
}

/// One row per case, then one per peer of it: name, what is measured, the bar, milliseconds a plan, and our time
/// beside the peer's.
pub(super) fn text(results: &[WindowResult], clock: ClockArg, threads: usize) -> String {
    let mut cases: BTreeMap<&str, Vec<&WindowResult>> = BTreeMap::new();
    for result in results {
        cases.entry(&result.case).or_default().push(result);
    }
    let mut text = format!("\n{:<36} {:>22} {:>10} {:>10} {:>15}\n", "input", "measured", "bar", "ms", "ours ÷ theirs");
    for (case, windows) in cases {
        let ms = mean(windows.iter().map(|window| window.seconds)) * 1000.0;
        let (measured, wanted) = measured(case, &windows);
        text.push_str(&format!("{case:<36} {measured:>22} {wanted:>10} {ms:>10.1}\n"));
        for peer in peers::peers(case) {
            let (theirs, ratio) = match peer.ms {
                Some(theirs) => (format!("{theirs:.1}"), format!("{:.2}", ms / theirs)),
                None => (String::new(), String::new()),
            };
            let name = format!("    {}", peer.name);
            text.push_str(&format!("{name:<36} {:>22.4} {:>10} {theirs:>10} {ratio:>15}\n", peer.balance, ""));
        }
    }
    text.push_str(&format!(
        "ms: ours is {} of {threads} thread(s); the peers' is wall-clock, median of 5 on two busy cores.\n",
        clock.as_str()
    ));
    text
}

fn measured(case: &str, windows: &[&WindowResult]) -> (String, String) {
    let balance = mean(windows.iter().map(|window| window.balancedness));
    let makespan = mean(windows.iter().map(|window| window.makespan));
    let next = mean(windows.iter().filter_map(|window| window.next_balancedness));
    let mark = |met: bool, wanted: String| format!("{wanted} {}", if met { "ok" } else { "--" });
    match bar(case) {
        Some(Bar::Next(wanted)) => (format!("next {next:.4}"), mark(next >= wanted, format!("{wanted:.3}"))),
        Some(Bar::Makespan(wanted)) => {
            (format!("makespan {makespan:.4}"), mark(makespan <= wanted, format!("{wanted:.3}")))
        }
        Some(Bar::Balance(wanted)) => {
            (format!("balance {balance:.4}"), mark(balance >= wanted, format!("{wanted:.4}")))
        }
        None if windows.len() > 1 => (format!("next {next:.4}"), String::new()),
        None => (format!("balance {balance:.4}"), String::new()),
    }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    if count > 0.0 { sum / count } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_names_bars_and_peers() {
        let result = |case: &str, balancedness: f64| WindowResult {
            case: case.to_owned(),
            window: 0,
            seconds: 0.0146,
            balancedness,
            makespan: 1.0,
            next_balancedness: None,
            moved_replicas: 0,
            moved_bytes: 0,
            violations: 0,
        };
        let text = text(&[result("p01-v3-288-32", 0.9996), result("own", 0.5)], ClockArg::Processor, 1);
        let line = |name: &str| text.lines().find(|line| line.trim_start().starts_with(name)).unwrap().to_owned();
        assert!(line("p01").contains("balance 0.9996") && line("p01").contains("0.9990 ok"), "{text}");
        assert!(line("FlashLB").ends_with("0.05"), "{text}");
        assert!(line("own").contains("0.5000") && text.contains("processor time of 1 thread"), "{text}");
    }
}
