//! Placement benchmarks: a case's devices and load windows, solved window by window and judged. Reads no
//! file and no clock; the caller brings bytes and measures time.

use serde::{Deserialize, Serialize};

use crate::{
    experts::{LEAST_GAIN, LayerProblem, Site, solve_layer},
    num,
    problem::Problem,
};

/// A file of cases.
#[derive(Clone, Debug, Deserialize)]
pub struct Manifest {
    /// The cases.
    pub cases: Vec<Case>,
}

/// One case. Fields that only describe how its loads were made are ignored.
#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    /// Names the case and its load file.
    pub id: String,
    /// Expert layers.
    pub layers: usize,
    /// Experts of each layer.
    pub experts: usize,
    /// Bytes of one expert.
    pub expert_bytes: u64,
    /// Load windows.
    #[serde(default = "one")]
    pub windows: usize,
    /// The devices.
    pub pools: Vec<Pool>,
    /// What happens between windows.
    #[serde(default)]
    pub events: Vec<Event>,
}

const fn one() -> usize {
    1
}

/// Devices of one kind. Devices are numbered pool by pool, node by node.
#[derive(Clone, Debug, Deserialize)]
pub struct Pool {
    /// Nodes.
    pub nodes: usize,
    /// Devices of each node.
    pub devices_per_node: usize,
    /// Slots of each device in each layer.
    pub slots_per_layer: usize,
    /// Relative speed.
    pub speed: f64,
}

/// A node is lost or comes back empty before a window.
#[derive(Clone, Debug, Deserialize)]
pub struct Event {
    /// The window before which it applies.
    pub window: usize,
    /// Node that is lost, numbered pool by pool.
    #[serde(default)]
    pub remove_node: Option<usize>,
    /// Node that comes back.
    #[serde(default)]
    pub return_node: Option<usize>,
}

/// Which loads a window's plan may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Those of the window itself.
    Oracle,
    /// Those of the windows before it.
    Forecast,
}

/// How a case is solved.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Which loads plans may use.
    pub mode: Mode,
    /// Work units per layer.
    pub effort: u64,
    /// Threads; plans do not depend on it.
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { mode: Mode::Oracle, effort: Problem::EFFORT, threads: 1 }
    }
}

/// Why a case cannot be solved.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum BenchError {
    /// Fewer slots than experts.
    #[error(
        "case {case}, window {window}: {experts} experts a layer and {slots} slots on {devices} living devices: {short} short; \
         raise slots_per_layer or add devices"
    )]
    Slots {
        /// The case.
        case: String,
        /// The window.
        window: usize,
        /// Experts.
        experts: usize,
        /// Slots that count.
        slots: usize,
        /// Living devices.
        devices: usize,
        /// The difference.
        short: usize,
    },
    /// The load file is not windows × layers × experts counts.
    #[error("case {case}: the load file has {found} bytes, {expected} are windows x layers x experts x 4")]
    Loads {
        /// The case.
        case: String,
        /// Bytes found.
        found: usize,
        /// Bytes expected.
        expected: usize,
    },
    /// A field that cannot be right.
    #[error("case {case}: field {field}: {remedy}")]
    Field {
        /// The case.
        case: String,
        /// The field.
        field: &'static str,
        /// What to write instead.
        remedy: &'static str,
    },
}

/// One window's judgement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WindowResult {
    /// The case.
    pub case: String,
    /// The window.
    pub window: usize,
    /// Seconds of solving.
    pub seconds: f64,
    /// Mean ÷ max device load (÷ speed), mean over layers with load; 1 without any.
    pub balancedness: f64,
    /// Slowest device's load ÷ speed over the ideal, likewise.
    pub makespan: f64,
    /// Replicas that devices had to load since the window before.
    pub moved_replicas: u64,
    /// Their bytes.
    pub moved_bytes: u64,
    /// Copies that share a device with another of the same expert.
    pub violations: u64,
}

/// Rows of one layer by device; a lost device's slots are empty.
type Rows = Vec<Vec<Option<usize>>>;

/// A device of a case.
struct Spot {
    node: usize,
    site: Site,
}

/// Solves a case. `loads` are little-endian u32 `[windows][layers][experts]`; `seconds` is a stopwatch.
/// Answers with a judgement per window and the plans, little-endian u16 `[windows][layers][slots]`, 0xFFFF
/// = empty.
///
/// # Errors
/// [`BenchError`], naming the case.
pub fn run(
    case: &Case,
    loads: &[u8],
    options: Options,
    mut seconds: impl FnMut() -> f64,
) -> Result<(Vec<WindowResult>, Vec<u8>), BenchError> {
    let windows = windows(case, loads)?;
    let spots = spots(case)?;
    let mut previous: Option<Vec<Rows>> = None;
    let (mut results, mut plan) = (Vec::new(), Vec::new());
    for (window, judged) in windows.iter().enumerate() {
        let gone = gone(case, window);
        let alive: Vec<bool> = spots.iter().map(|spot| !gone.contains(&spot.node)).collect();
        feasible(case, window, &spots, &alive)?;
        let known = match options.mode {
            Mode::Oracle => judged.clone(),
            Mode::Forecast => forecast(windows.get(..window).unwrap_or_default(), case),
        };
        let began = seconds();
        let rows = solve(case, &spots, &alive, &known, previous.as_ref(), options);
        let took = seconds() - began;
        results.push(judge(case, window, took, &spots, &alive, &rows, judged, previous.as_ref()));
        for layer in &rows {
            for slot in layer.iter().flatten() {
                let entry = slot.and_then(|expert| u16::try_from(expert).ok()).unwrap_or(u16::MAX);
                plan.extend_from_slice(&entry.to_le_bytes());
            }
        }
        previous = Some(rows);
    }
    Ok((results, plan))
}

/// Tokens by window, layer and expert.
fn windows(case: &Case, loads: &[u8]) -> Result<Vec<Vec<Vec<f64>>>, BenchError> {
    let field = |field, remedy| Err(BenchError::Field { case: case.id.clone(), field, remedy });
    if case.layers == 0 || case.experts == 0 || case.windows == 0 {
        return field("layers, experts, windows", "must be above 0");
    }
    if case.experts >= usize::from(u16::MAX) {
        return field("experts", "must be below 65535");
    }
    let size = case.windows.saturating_mul(case.layers).saturating_mul(case.experts);
    let expected = size.saturating_mul(4);
    if loads.len() != expected {
        return Err(BenchError::Loads { case: case.id.clone(), found: loads.len(), expected });
    }
    let (counts, _) = loads.as_chunks::<4>();
    let counts: Vec<f64> = counts.iter().map(|count| f64::from(u32::from_le_bytes(*count))).collect();
    let layers = |window: &[f64]| window.chunks(case.experts).map(<[f64]>::to_vec).collect();
    Ok(counts.chunks(case.layers * case.experts).map(layers).collect())
}

fn spots(case: &Case) -> Result<Vec<Spot>, BenchError> {
    let mut spots: Vec<Spot> = Vec::new();
    let mut node = 0;
    for pool in &case.pools {
        if !(pool.speed.is_finite() && pool.speed > 0.0) {
            let remedy = "must be a number above 0";
            return Err(BenchError::Field { case: case.id.clone(), field: "pools.speed", remedy });
        }
        for _ in 0..pool.nodes {
            for _ in 0..pool.devices_per_node {
                let at = spots.len();
                let site = Site { slots: pool.slots_per_layer, speed: pool.speed, domain: at, node, card: at };
                spots.push(Spot { node, site });
            }
            node += 1;
        }
    }
    Ok(spots)
}

/// Nodes that are lost by the time of a window.
fn gone(case: &Case, window: usize) -> Vec<usize> {
    let mut events: Vec<&Event> = case.events.iter().filter(|event| event.window <= window).collect();
    events.sort_by_key(|event| event.window);
    let mut gone = Vec::new();
    for event in events {
        gone.extend(event.remove_node);
        gone.retain(|node| Some(*node) != event.return_node);
    }
    gone
}

fn feasible(case: &Case, window: usize, spots: &[Spot], alive: &[bool]) -> Result<(), BenchError> {
    let living = || spots.iter().zip(alive).filter(|(_, alive)| **alive);
    let slots = living().map(|(spot, _)| spot.site.slots.min(case.experts)).sum();
    if slots >= case.experts {
        return Ok(());
    }
    let (experts, devices, short) = (case.experts, living().count(), case.experts - slots);
    Err(BenchError::Slots { case: case.id.clone(), window, experts, slots, devices, short })
}

/// Loads expected next: recent windows count more, each half of the one after it.
fn forecast(before: &[Vec<Vec<f64>>], case: &Case) -> Vec<Vec<f64>> {
    let mut expected = vec![vec![0.0; case.experts]; case.layers];
    for window in before {
        for (sum, layer) in expected.iter_mut().zip(window) {
            for (sum, tokens) in sum.iter_mut().zip(layer) {
                *sum = *sum / 2.0 + tokens;
            }
        }
    }
    expected
}

fn solve(
    case: &Case,
    spots: &[Spot],
    alive: &[bool],
    loads: &[Vec<f64>],
    previous: Option<&Vec<Rows>>,
    options: Options,
) -> Vec<Rows> {
    let attempt = |moves: Option<usize>| -> Vec<(Rows, f64)> {
        let layers: Vec<usize> = (0..case.layers).collect();
        let size = case.layers.div_ceil(options.threads.clamp(1, case.layers));
        let solve = |layer: &usize| layer_rows(case, spots, alive, loads, previous, *layer, moves, options.effort);
        std::thread::scope(|scope| {
            let parts: Vec<_> = layers
                .chunks(size)
                .map(|part| scope.spawn(move || part.iter().map(solve).collect::<Vec<_>>()))
                .collect();
            let join = |part: std::thread::ScopedJoinHandle<'_, Vec<_>>| {
                part.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            parts.into_iter().flat_map(join).collect()
        })
    };
    let mean = |solved: &[(Rows, f64)]| solved.iter().map(|(_, span)| span).sum::<f64>();
    let best = attempt(None);
    let chosen = match previous {
        // Without a gain that shows, nothing moves but what must.
        Some(_) => {
            let kept = attempt(Some(0));
            if mean(&best) < mean(&kept) * (1.0 - LEAST_GAIN) { best } else { kept }
        }
        None => best,
    };
    chosen.into_iter().map(|(rows, _)| rows).collect()
}

#[expect(clippy::too_many_arguments, reason = "the parts of one case's window, used here and nowhere else")]
fn layer_rows(
    case: &Case,
    spots: &[Spot],
    alive: &[bool],
    loads: &[Vec<f64>],
    previous: Option<&Vec<Rows>>,
    layer: usize,
    moves: Option<usize>,
    effort: u64,
) -> (Rows, f64) {
    let living: Vec<usize> = (0..spots.len()).filter(|at| alive.get(*at) == Some(&true)).collect();
    let sites: Vec<Site> = living.iter().filter_map(|at| spots.get(*at)).map(|spot| spot.site.clone()).collect();
    let renumbered: Vec<Site> =
        sites.into_iter().enumerate().map(|(at, site)| Site { domain: at, card: at, ..site }).collect();
    let loads = loads.get(layer).filter(|tokens| tokens.iter().any(|count| *count > 0.0));
    let old = previous.and_then(|layers| layers.get(layer));
    let problem = LayerProblem {
        experts: case.experts,
        loads: loads.cloned().unwrap_or_else(|| vec![1.0; case.experts]),
        sites: &renumbered,
        copies: 1,
        previous: old.map(|rows| living.iter().filter_map(|at| rows.get(*at)).cloned().collect()),
        moves,
        effort,
    };
    let mut rows: Rows = spots.iter().map(|spot| vec![None; spot.site.slots]).collect();
    // Feasibility was checked before; a layer that does not fit stays empty and is judged so.
    let Ok(solved) = solve_layer(&problem) else { return (rows, f64::INFINITY) };
    for (at, row) in living.into_iter().zip(solved.rows) {
        if let Some(place) = rows.get_mut(at) {
            *place = row;
        }
    }
    (rows, solved.makespan)
}

#[expect(clippy::too_many_arguments, reason = "the parts of one case's window, used here and nowhere else")]
fn judge(
    case: &Case,
    window: usize,
    seconds: f64,
    spots: &[Spot],
    alive: &[bool],
    plan: &[Rows],
    loads: &[Vec<f64>],
    previous: Option<&Vec<Rows>>,
) -> WindowResult {
    let (mut balancedness, mut makespan, mut judged) = (0.0, 0.0, 0.0);
    let (mut moved, mut violations) = (0, 0);
    for (layer, (rows, tokens)) in plan.iter().zip(loads).enumerate() {
        let mut copies = vec![0_usize; case.experts];
        for expert in rows.iter().flatten().flatten() {
            if let Some(count) = copies.get_mut(*expert) {
                *count += 1;
            }
        }
        let old = previous.and_then(|layers| layers.get(layer));
        for (at, row) in rows.iter().enumerate() {
            let held: Vec<usize> = row.iter().flatten().copied().collect();
            violations += (0..held.len())
                .filter(|slot| held.iter().take(*slot).any(|other| held.get(*slot) == Some(other)))
                .count();
            if let Some(before) = old.and_then(|old| old.get(at)) {
                moved += held.iter().filter(|expert| !before.contains(&Some(**expert))).count();
            }
        }
        let total: f64 = tokens.iter().sum();
        if total <= 0.0 {
            continue;
        }
        let share = |expert: &usize| {
            tokens.get(*expert).copied().unwrap_or(0.0)
                / num::real_size(copies.get(*expert).copied().unwrap_or(1).max(1))
        };
        let living: Vec<(f64, f64)> = rows
            .iter()
            .zip(spots)
            .zip(alive)
            .filter(|(_, alive)| **alive)
            .map(|((row, spot), _)| (row.iter().flatten().map(share).sum::<f64>() / spot.site.speed, spot.site.speed))
            .collect();
        let slowest = living.iter().map(|(time, _)| *time).fold(0.0, f64::max);
        let speed: f64 = living.iter().map(|(_, speed)| speed).sum();
        balancedness += living.iter().map(|(time, _)| time).sum::<f64>() / num::real_size(living.len()) / slowest;
        makespan += slowest / (total / speed);
        judged += 1.0;
    }
    let mean = |sum: f64| if judged > 0.0 { sum / judged } else { 1.0 };
    let moved_replicas = num::count(moved);
    WindowResult {
        case: case.id.clone(),
        window,
        seconds,
        balancedness: mean(balancedness),
        makespan: mean(makespan),
        moved_replicas,
        moved_bytes: moved_replicas.saturating_mul(case.expert_bytes),
        violations: num::count(violations),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(text: &str) -> Case {
        serde_json::from_str(text).unwrap()
    }

    const TWO_NODES: &str = r#"{"id": "t", "layers": 2, "experts": 6, "expert_bytes": 10, "windows": 3,
        "pools": [{"nodes": 2, "devices_per_node": 2, "slots_per_layer": 3, "speed": 1.0}],
        "events": [{"window": 1, "remove_node": 0}, {"window": 2, "return_node": 0}]}"#;

    fn loads(counts: impl Iterator<Item = u32>) -> Vec<u8> {
        counts.flat_map(u32::to_le_bytes).collect()
    }

    #[test]
    fn a_lost_node_is_empty_and_returns_empty() {
        let case = case(TWO_NODES);
        let (results, plan) = run(&case, &loads((0..36).map(|at| at % 7)), Options::default(), || 0.0).unwrap();
        assert_eq!((results.len(), plan.len()), (3, 3 * 2 * 12 * 2));
        assert!(results.iter().all(|result| result.violations == 0 && result.makespan >= 1.0 - 1e-9));
        let window = |at: usize| &plan[at * 48..(at + 1) * 48];
        assert!(window(1)[..12].iter().all(|byte| *byte == 0xFF), "slots of the lost node are empty");
        assert!(results[1].moved_replicas > 0 && results[1].moved_bytes == results[1].moved_replicas * 10);
        assert_ne!(&window(2)[..12], &window(1)[..12], "the node that came back is used");
    }

    #[test]
    fn every_public_case_is_placed_without_a_violation() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/placement");
        let manifest = std::fs::read_to_string(folder.join("manifest.json")).unwrap();
        let manifest: Manifest = serde_json::from_str(&manifest).unwrap();
        assert_eq!(manifest.cases.len(), 15);
        for case in &manifest.cases {
            let loads = std::fs::read(folder.join(format!("data/{}.u32le", case.id))).unwrap();
            let options = Options { effort: 5_000, threads: 2, ..Options::default() };
            let (results, plan) = run(case, &loads, options, || 0.0).unwrap();
            assert_eq!(results.len(), case.windows, "{}", case.id);
            let slots: usize =
                case.pools.iter().map(|pool| pool.nodes * pool.devices_per_node * pool.slots_per_layer).sum();
            for row in plan.chunks(slots * 2) {
                let held: std::collections::BTreeSet<&[u8]> = row.chunks(2).collect();
                let missing = (0..case.experts)
                    .filter(|expert| !held.contains(&u16::try_from(*expert).unwrap().to_le_bytes()[..]))
                    .count();
                assert_eq!(missing, 0, "{}", case.id);
            }
            for result in results {
                assert_eq!(result.violations, 0, "{}", case.id);
                assert!(result.makespan < 1.6, "{}: {}", case.id, result.makespan);
            }
        }
    }

    #[test]
    fn plans_do_not_depend_on_threads() {
        let case = case(TWO_NODES);
        let loads = loads((0..36).map(|at| at * at % 11));
        let of = |threads| run(&case, &loads, Options { threads, ..Options::default() }, || 0.0).unwrap();
        assert_eq!(of(1), of(4));
    }

    #[test]
    fn too_few_slots_say_by_how_many() {
        let mut case = case(TWO_NODES);
        case.pools[0].slots_per_layer = 2;
        let error = run(&case, &loads(0..36), Options::default(), || 0.0).unwrap_err().to_string();
        assert!(error.contains("case t, window 1") && error.contains("2 short"), "{error}");
    }

    #[test]
    fn a_load_file_of_another_size_is_refused() {
        let error = run(&case(TWO_NODES), &[0; 7], Options::default(), || 0.0).unwrap_err().to_string();
        assert!(error.contains("7 bytes") && error.contains("144"), "{error}");
    }

    #[test]
    fn a_forecast_never_sees_its_own_window() {
        let case = case(TWO_NODES);
        let forecast = Options { mode: Mode::Forecast, ..Options::default() };
        let of = |last: u32| {
            let counts = (0..36).map(move |at| if at < 24 { at % 5 + 1 } else { at * last % 13 });
            run(&case, &loads(counts), forecast, || 0.0).unwrap().1
        };
        assert_eq!(of(1), of(7));
    }
}
