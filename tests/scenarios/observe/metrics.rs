//! The list of all metrics: the page of the documentation is written from the constants in the code, and what a
//! running cluster serves is compared with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::SocketAddr,
    path::Path,
};

use berth_agent::vitals::accelerator;
use berth_runtime::telemetry::{self, Described, Kind};
use berth_tests::prometheus;

use super::{Families, Watched, label_names};

/// The parts, what each is, and what it tells.
const PARTS: [(&str, &str, &[Described]); 5] = [
    ("operator", "Supply and demand are told by the leader alone.", berth_operator::metrics::METRICS),
    ("scheduler", "Placements and devices are told by the leader alone.", berth_scheduler::metrics::METRICS),
    ("agent", "One a node.", berth_agent::metrics::METRICS),
    (
        "worker",
        "One a device. Its port is of the system's choice and no monitor scrapes it: the agent tells the most important \
         again.",
        berth_agent::worker::METRICS,
    ),
    ("runner", "One an instance.", berth_runner::metrics::METRICS),
];

/// Metrics that a quiet cluster with one loss does not show, because nothing of the kind happened.
const RARE: [&str; 6] = [
    "accelerator_node_condition",
    "berth_scheduler_plans_refused_total",
    "berth_scheduler_orders_delayed_total",
    "berth_agent_health_notes_total",
    "berth_agent_orders_refused_total",
    "berth_agent_facts_total",
];

fn of_part(own: &'static [Described]) -> impl Iterator<Item = &'static Described> {
    telemetry::METRICS.iter().chain(own)
}

/// What a part serves, by the name that a scraper sees.
fn listed(part: &str, own: &'static [Described]) -> BTreeMap<String, &'static Described> {
    let own = of_part(own).map(|one| (one.series(part), one));
    // Devices are told in words of their own.
    let devices = accelerator::described().filter(|_| part == "agent");
    own.chain(devices.map(|one| (one.named(accelerator::PREFIX), one))).collect()
}

/// Every name that a query may use.
pub(crate) fn series() -> BTreeSet<String> {
    let all = PARTS.iter().flat_map(|(part, _, own)| listed(part, own));
    all.map(|(name, one)| (name, one.kind))
        .flat_map(|(name, kind)| match kind {
            Kind::Histogram => ["_bucket", "_sum", "_count"].map(|end| format!("{name}{end}")).to_vec(),
            Kind::Counter | Kind::Gauge | Kind::Info => vec![name],
        })
        .collect()
}

/// Every label that a query may use.
pub(crate) fn labels() -> BTreeSet<String> {
    let all = PARTS.iter().flat_map(|(part, _, own)| listed(part, own));
    all.flat_map(|(_, one)| one.labels.iter().map(|label| (*label).to_owned())).collect()
}

const ACCELERATORS: &str = "\
Served by agents, for the devices of their node. What a vendor does not tell has no series. Memory, power, clocks, use, \
links and errors are read every 15 s while somebody scrapes and gone 2 minutes after the last scrape; health, admission, \
conditions and the temperature of NVIDIA's chips are always there. Under vendors' own names: \
[compatible-metrics.md](compatible-metrics.md).";

const HEAD: &str = "\
# Metrics

Every part serves OpenMetrics text at `/metrics` of its admin address (the container port `admin`). The chart renders a
ServiceMonitor for the operator and the scheduler and a PodMonitor for agents and runners where the cluster knows
`monitoring.coreos.com/v1`.

Rules: names are `berth_<part>_<what>`, in base units (`_seconds`, `_bytes`, `_ratio`), counters end with `_total`. No label
names a pod, a request or an expert; queues, deployments, placements and device products are labels, one series each, and
`device` is a label only where one node speaks of its own. A series of something that is gone is gone from the next scrape.
Devices are told once more as `accelerator_<what>`, in the same words for both vendors and by whoever serves them.

This page is written from the constants in each part's `metrics.rs` by `make golden`; a test compares it with them and
with what a running cluster serves.
";

fn page() -> String {
    let mut page = HEAD.to_owned();
    let mut section = |title: &str, about: &str, prefix: &str, metrics: &mut dyn Iterator<Item = &Described>| {
        // Writing to a String cannot fail.
        let _ = writeln!(page, "\n## {title}\n\n{about}\n\n| metric | kind | labels | what |\n|---|---|---|---|");
        for one in metrics {
            let labels = one.labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(" ");
            let _ = writeln!(page, "| `{}` | {} | {labels} | {} |", one.named(prefix), one.kind(), one.help);
        }
    };
    section(
        "Every part",
        "`<part>` is operator, scheduler, agent, worker or runner.",
        "berth_<part>",
        &mut telemetry::METRICS.iter(),
    );
    for (part, about, own) in PARTS {
        let title = format!("{}{}", part[..1].to_uppercase(), &part[1..]);
        section(&title, about, &format!("berth_{part}"), &mut own.iter());
        if part == "agent" {
            section("Accelerators", ACCELERATORS, accelerator::PREFIX, &mut accelerator::described());
        }
    }
    page
}

#[test]
fn the_page_lists_every_metric_as_the_code_has_it() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
    if std::env::var("INSTA_UPDATE").is_ok_and(|update| update == "always") {
        std::fs::write(&path, page()).expect("written");
    }
    let written = std::fs::read_to_string(&path).expect("docs/metrics.md");
    assert!(written == page(), "docs/metrics.md is not what the code has: run `make golden` and read the diff");
}

#[test]
fn names_and_labels_keep_the_rules() {
    for (part, _, own) in PARTS {
        let names: BTreeSet<_> = of_part(own).map(|one| one.name).collect();
        assert_eq!(names.len(), of_part(own).count(), "{part} has a name twice");
        for (name, one) in listed(part, own) {
            assert!(name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'), "{name}");
            assert!(!one.name.ends_with("_total") && !one.help.ends_with('.') && !one.help.is_empty(), "{name}");
            assert!(
                !["_ms", "_mb", "_kb", "_percent"].iter().any(|unit| one.name.ends_with(unit)),
                "{name}: base units"
            );
            assert!(one.kind != Kind::Histogram || one.name.ends_with("_seconds"), "{name}");
            for label in one.labels {
                assert!(
                    !["pod", "request", "request_id", "expert", "le", "instance"].contains(label),
                    "{name}: {label}"
                );
            }
        }
    }
}

/// What a process serves: families by name, with their kind and the names of their labels.
fn families(text: &str) -> Families {
    let mut families = Families::new();
    for line in text.lines() {
        if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            let ending = match kind {
                "counter" => "_total",
                "info" => "_info",
                _ => "",
            };
            families.insert(format!("{name}{ending}"), (kind.to_owned(), BTreeSet::new()));
        } else if !line.starts_with('#') {
            let name = line.split(['{', ' ']).next().unwrap_or_default();
            let of = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
            let key = if families.contains_key(name) { name } else { of };
            if let Some((_, labels)) = families.get_mut(key) {
                labels.extend(label_names(line).into_iter().filter(|label| label != "le"));
            }
        }
    }
    families
}

/// Nothing is served that is not listed, and everything listed is served, but for what did not happen.
pub(super) async fn every_metric_is_as_documented(watched: &Watched) {
    let mut seen: BTreeMap<String, Families> = BTreeMap::new();
    for [component, _, pod, _, address] in watched.pods().await {
        let address: SocketAddr = address.parse().expect("an address");
        let (status, text) = prometheus::get(address, "/metrics").await.unwrap_or_else(|| panic!("{pod} is silent"));
        assert_eq!(status, 200, "{pod}");
        seen.entry(component).or_default().extend(families(&text));
    }
    for (part, _, own) in PARTS.iter().filter(|(part, ..)| *part != "worker") {
        let served = seen.remove(*part).unwrap_or_else(|| panic!("no {part}"));
        let listed = listed(part, own);
        for (name, (kind, labels)) in &served {
            let one = listed.get(name).unwrap_or_else(|| panic!("{name} is served and not listed"));
            let expected: BTreeSet<String> = one.labels.iter().map(|label| (*label).to_owned()).collect();
            assert_eq!((one.kind(), &expected), (kind.as_str(), labels), "{name}");
        }
        let leases = |name: &&String| !name.contains("_lease_") || ["operator", "scheduler"].contains(part);
        let missing: Vec<_> = listed.keys().filter(|name| !served.contains_key(*name)).filter(leases).collect();
        let missing: Vec<_> = missing.into_iter().filter(|name| !RARE.contains(&name.as_str())).collect();
        assert!(missing.is_empty(), "listed and not served: {missing:?}");
    }
}
