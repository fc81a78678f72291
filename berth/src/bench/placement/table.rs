//! The table of a benchmark: these figures, what they must be, and the peers'. Text only.

use std::collections::BTreeMap;

use berth_planner::bench::{Case, WindowResult};

use super::{EffortArg, peers, watch::ClockArg};

/// What a case must reach.
enum Bar {
    Balance(f64),
    Next(f64),
    Makespan(f64),
}

/// Most replicas that may move in a window, in percent of all slots, and in a repair, in parts of those lost.
const MOVED_PERCENT: f64 = 6.0;
const REPAIR_MOVES: f64 = 1.3;
/// Most milliseconds of a repair after the loss of a node.
const REPAIR_MS: f64 = 10.0;

/// What a case must reach with an effort, and the most milliseconds that a plan may take.
fn bar(case: &str, effort: EffortArg) -> Option<(Bar, Option<f64>)> {
    Some(match (case.get(..3)?, effort) {
        ("p01", EffortArg::Fast) => (Bar::Balance(0.993), Some(4.0)),
        ("p06", EffortArg::Best) => (Bar::Balance(0.958), Some(2000.0)),
        (_, EffortArg::Fast | EffortArg::Best) => return None,
        ("p01", _) => (Bar::Balance(0.9990), Some(20.0)),
        ("p02" | "p04", _) => (Bar::Balance(0.9985), Some(60.0)),
        ("p05", _) => (Bar::Balance(0.9990), Some(60.0)),
        ("p03" | "p07", _) => (Bar::Balance(0.9990), None),
        ("p06", _) => (Bar::Balance(0.955), Some(100.0)),
        ("p08", _) => (Bar::Next(0.920), None),
        ("p10" | "p13", _) => (Bar::Balance(0.995), None),
        ("p14", _) => (Bar::Makespan(1.003), None),
        _ => return None,
    })
}

/// What a table is about.
pub(super) struct Run<'a> {
    pub(super) cases: &'a [Case],
    pub(super) results: &'a [WindowResult],
    pub(super) effort: EffortArg,
    pub(super) clock: ClockArg,
    pub(super) threads: usize,
}

/// A row's columns: name, what is measured, the bar, milliseconds a plan, its bar, our time beside the peer's.
type Row<'a> = [&'a str; 6];

fn line([name, measured, wanted, ms, most, ratio]: Row<'_>) -> String {
    format!("{name:<36} {measured:>22} {wanted:>10} {ms:>10} {most:>8} {ratio:>14}\n")
}

/// Rows of each case: its figures beside the bars; what its windows moved and its repairs; the peers' figures.
pub(super) fn text(run: &Run<'_>) -> String {
    let mut windows: BTreeMap<&str, Vec<&WindowResult>> = BTreeMap::new();
    for result in run.results {
        windows.entry(&result.case).or_default().push(result);
    }
    let mut text = format!("\n{}", line(["input", "measured", "bar", "ms", "bar", "ours ÷ theirs"]));
    for (case, windows) in windows {
        let ms = mean(windows.iter().map(|window| window.seconds)) * 1000.0;
        let (measured, wanted, most) = measured(case, &windows, run, ms);
        text.push_str(&line([case, &measured, &wanted, &format!("{ms:.1}"), &most, ""]));
        if let Some(known) = run.cases.iter().find(|known| known.id == case) {
            text.push_str(&moves(known, &windows, run));
        }
        for peer in peers::peers(case) {
            let theirs = peer.ms.map_or(String::new(), |theirs| format!("{theirs:.1}"));
            let ratio = peer.ms.map_or(String::new(), |theirs| format!("{:.2}", ms / theirs));
            text.push_str(&line([
                &format!("    {}", peer.name),
                &format!("{:.4}", peer.balance),
                "",
                &theirs,
                "",
                &ratio,
            ]));
        }
    }
    text.push_str(&format!(
        "ms: ours is {} of {} thread(s); the peers' is wall-clock, median of 5 on two busy cores.\n",
        run.clock.as_str(),
        run.threads
    ));
    text
}

fn mark(met: bool, wanted: &str) -> String {
    format!("{wanted} {}", if met { "ok" } else { "--" })
}

/// A bar of milliseconds: of the wall alone, for the processor's are of one thread.
fn timed(ms: f64, most: Option<f64>, clock: ClockArg) -> String {
    match most {
        Some(most) if clock == ClockArg::Wall => mark(ms <= most, &format!("{most}")),
        _ => String::new(),
    }
}

/// What is measured of a case, its bar, and that of its time.
fn measured(case: &str, windows: &[&WindowResult], run: &Run<'_>, ms: f64) -> (String, String, String) {
    let balance = mean(windows.iter().map(|window| window.balancedness));
    let makespan = mean(windows.iter().map(|window| window.makespan));
    let next = mean(windows.iter().filter_map(|window| window.next_balancedness));
    let bar = bar(case, run.effort);
    let most = timed(ms, bar.as_ref().and_then(|(_, most)| *most), run.clock);
    let (measured, wanted) = match bar.map(|(bar, _)| bar) {
        Some(Bar::Next(wanted)) => (format!("next {next:.4}"), mark(next >= wanted, &format!("{wanted:.3}"))),
        Some(Bar::Makespan(wanted)) => {
            (format!("makespan {makespan:.4}"), mark(makespan <= wanted, &format!("{wanted:.3}")))
        }
        Some(Bar::Balance(wanted)) => {
            (format!("balance {balance:.4}"), mark(balance >= wanted, &format!("{wanted:.4}")))
        }
        None if windows.len() > 1 => (format!("next {next:.4}"), String::new()),
        None => (format!("balance {balance:.4}"), String::new()),
    };
    (measured, wanted, most)
}

/// What windows without an event moved, and each repair after a loss.
fn moves(case: &Case, windows: &[&WindowResult], run: &Run<'_>) -> String {
    let mut text = String::new();
    let slots: usize = case.pools.iter().map(|pool| pool.nodes * pool.devices_per_node * pool.slots_per_layer).sum();
    let calm =
        |window: &&&WindowResult| window.window > 0 && case.events.iter().all(|event| event.window != window.window);
    let moved = mean(windows.iter().filter(calm).map(|window| real(window.moved_replicas))) * 100.0;
    if windows.len() > 1 {
        let share = moved / real(count(slots * case.layers).max(1));
        let wanted = mark(share <= MOVED_PERCENT, &format!("{MOVED_PERCENT} %"));
        text.push_str(&line(["    moved a window, of all slots", &format!("{share:.1} %"), &wanted, "", "", ""]));
    }
    for window in windows {
        let lost = lost(case, window.window);
        if lost > 0 {
            let (part, ms) = (real(window.moved_replicas) / real(lost), window.seconds * 1000.0);
            let (wanted, most) =
                (mark(part <= REPAIR_MOVES, &format!("{REPAIR_MOVES}")), timed(ms, Some(REPAIR_MS), run.clock));
            let name = format!("    repair of window {}, moved ÷ lost", window.window);
            text.push_str(&line([&name, &format!("{part:.2}"), &wanted, &format!("{ms:.1}"), &most, ""]));
        }
    }
    text
}

/// Slots of the nodes that are lost before a window, in all layers.
fn lost(case: &Case, window: usize) -> u64 {
    let removed = case.events.iter().filter(|event| event.window == window).filter_map(|event| event.remove_node);
    let slots = |node: usize| {
        let mut first = 0;
        let pool = case.pools.iter().find(|pool| {
            first += pool.nodes;
            node < first
        });
        pool.map_or(0, |pool| pool.devices_per_node * pool.slots_per_layer * case.layers)
    };
    count(removed.map(slots).sum())
}

fn count(value: usize) -> u64 {
    u64::try_from(value).unwrap_or(u64::MAX)
}

fn real(value: u64) -> f64 {
    f64::from(u32::try_from(value).unwrap_or(u32::MAX))
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    if count > 0.0 { sum / count } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(case: &str, window: usize, balancedness: f64, moved_replicas: u64) -> WindowResult {
        WindowResult {
            case: case.to_owned(),
            window,
            seconds: 0.0146,
            balancedness,
            makespan: 1.0,
            next_balancedness: None,
            moved_replicas,
            moved_bytes: 0,
            violations: 0,
        }
    }

    fn line(text: &str, name: &str) -> String {
        text.lines().find(|line| line.trim_start().starts_with(name)).unwrap().to_owned()
    }

    fn run<'a>(cases: &'a [Case], results: &'a [WindowResult], clock: ClockArg) -> Run<'a> {
        Run { cases, results, effort: EffortArg::Default, clock, threads: 1 }
    }

    #[test]
    fn a_table_names_bars_and_peers() {
        let results = [result("p01-v3-288-32", 0, 0.9996, 0), result("own", 0, 0.5, 0)];
        let wall = text(&run(&[], &results, ClockArg::Wall));
        let row = line(&wall, "p01");
        assert!(row.contains("balance 0.9996") && row.contains("0.9990 ok") && row.contains("20 ok"), "{wall}");
        assert!(line(&wall, "FlashLB").ends_with("0.05"), "{wall}");
        assert!(line(&wall, "own").contains("0.5000"), "{wall}");
        let processor = text(&run(&[], &results, ClockArg::Processor));
        assert!(processor.contains("processor time of 1 thread") && !processor.contains("20 ok"), "{processor}");
        let fast = text(&Run { effort: EffortArg::Fast, ..run(&[], &results, ClockArg::Wall) });
        assert!(line(&fast, "p01").contains("0.9930 ok") && line(&fast, "p01").contains("4 --"), "{fast}");
    }

    #[test]
    fn a_table_tells_what_windows_and_repairs_moved() {
        let case = serde_json::json!({"id": "own", "layers": 10, "experts": 4, "expert_bytes": 1, "windows": 3,
            "pools": [{"nodes": 2, "devices_per_node": 2, "slots_per_layer": 5, "speed": 1.0}],
            "events": [{"window": 2, "remove_node": 1}]});
        let cases = [serde_json::from_value(case).unwrap()];
        let results = [result("own", 0, 1.0, 0), result("own", 1, 1.0, 14), result("own", 2, 1.0, 120)];
        let text = text(&run(&cases, &results, ClockArg::Wall));
        // 14 of 200 slots; 120 of the 100 replicas of the lost node.
        assert!(
            line(&text, "moved a window").contains("7.0 %") && line(&text, "moved a window").contains("6 % --"),
            "{text}"
        );
        let repair = line(&text, "repair of window 2");
        assert!(repair.contains("1.20") && repair.contains("1.3 ok") && repair.contains("10 --"), "{text}");
    }
}
