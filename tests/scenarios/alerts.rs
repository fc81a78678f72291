//! The chart's alerts: each fires and is silent as its test says, has a page that tells what to do, and asks only for
//! metrics that exist. Needs promtool and helm, but no cluster.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use berth_tests::prometheus;
use serde_json::Value;

use crate::observe::metrics;

/// Sections that every page has, in order.
const SECTIONS: [&str; 4] = ["## What it means", "## How to see it", "## What to do", "## When to escalate"];
/// What the page may be linked by; the chart puts the real beginning there.
const PLACE: &str = "RUNBOOKS/";
/// Labels of the targets, which a monitor sets.
const OF_TARGETS: [&str; 2] = ["node", "namespace"];

fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn yaml(text: &str) -> Value {
    serde_saphyr::from_str(text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

/// The rules as the chart's file has them, by name of the alert.
fn alerts() -> BTreeMap<String, Value> {
    let groups = yaml(&read(&at("../charts/berth/files/alerts/berth.yaml")));
    let rules = groups["groups"].as_array().expect("groups").iter().flat_map(|group| group["rules"].as_array());
    let named = |rule: &Value| (rule["alert"].as_str().expect("a name").to_owned(), rule.clone());
    let all: Vec<_> = rules.flatten().map(named).collect();
    let by_name: BTreeMap<_, _> = all.iter().cloned().collect();
    assert_eq!(by_name.len(), all.len(), "an alert stands there twice");
    by_name
}

/// Names of files of a folder without their ending.
fn stems(folder: &str) -> BTreeSet<String> {
    let files = std::fs::read_dir(at(folder)).unwrap_or_else(|error| panic!("{folder}: {error}"));
    let stem = |path: PathBuf| path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
    files.flatten().filter_map(|file| stem(file.path())).filter(|stem| stem != "README").collect()
}

#[test]
fn each_alert_has_a_test_and_a_page_and_none_is_left_over() {
    let alerts: BTreeSet<String> = alerts().into_keys().collect();
    assert_eq!(stems("data/alerts"), alerts, "tests/data/alerts has one test for each alert");
    assert_eq!(stems("../docs/runbooks"), alerts, "docs/runbooks has one page for each alert");
    let index = read(&at("../docs/runbooks/README.md"));
    for alert in &alerts {
        assert!(index.contains(&format!("({alert}.md)")), "docs/runbooks/README.md links {alert}");
    }
}

#[test]
fn each_alert_says_how_bad_it_is_and_where_to_read_on() {
    for (name, rule) in alerts() {
        let severity = rule["labels"]["severity"].as_str();
        assert!(matches!(severity, Some("critical" | "warning")), "{name}: {severity:?}");
        let text = |key: &str| rule["annotations"][key].as_str().unwrap_or_else(|| panic!("{name}: no {key}"));
        assert_eq!(text("runbook_url"), format!("{PLACE}{name}.md"));
        assert!(!text("summary").ends_with('.') && text("description").ends_with('.'), "{name}");
        let told = format!("{} {}", text("summary"), text("description"));
        let kept = rule["expr"].as_str().and_then(|expression| expression.split_once(" by (")?.1.split_once(')'));
        for label in kept.map_or("", |(labels, _)| labels).split(", ").filter(|label| !label.is_empty()) {
            assert!(told.contains(&format!("$labels.{label} ")), "{name} does not tell its label {label}: {told}");
        }
    }
}

#[test]
fn each_alert_asks_for_metrics_and_labels_that_exist() {
    let known = metrics::series();
    let labels: BTreeSet<String> = metrics::labels().into_iter().chain(OF_TARGETS.map(str::to_owned)).collect();
    for (name, rule) in alerts() {
        let expression = rule["expr"].as_str().expect("an expression");
        let words = expression.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
        let asked: BTreeSet<_> = words
            .filter(|word| ["berth_", "accelerator_"].iter().any(|prefix| word.starts_with(prefix)))
            .map(str::to_owned)
            .collect();
        assert!(!asked.is_empty(), "{name} asks for nothing of ours");
        let unknown: Vec<_> = asked.difference(&known).collect();
        assert!(unknown.is_empty(), "{name}: {unknown:?} stands not in docs/metrics.md");
        for (kept, _) in
            expression.split(" by (").chain(expression.split(" on (")).skip(1).filter_map(|rest| rest.split_once(')'))
        {
            for label in
                kept.split(", ").filter(|label| label.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_'))
            {
                assert!(labels.contains(label), "{name}: nothing has a label {label:?}");
            }
        }
    }
}

#[test]
fn each_test_has_its_alert_fire_and_be_silent() {
    for name in alerts().keys() {
        let test = yaml(&read(&at(&format!("data/alerts/{name}.yaml"))));
        let cases = test["tests"].as_array().expect("tests").iter().flat_map(|case| case["alert_rule_test"].as_array());
        let (mut fires, mut silent) = (0, 0);
        for case in cases.flatten() {
            assert_eq!(case["alertname"], name.as_str());
            match case["exp_alerts"].as_array().map_or(0, Vec::len) {
                0 => silent += 1,
                _ => fires += 1,
            }
        }
        assert!(fires > 0 && silent > 0, "{name}: {fires} cases in which it fires, {silent} in which it is silent");
    }
}

#[test]
fn promtool_finds_the_rules_well_formed_and_every_test_passes() {
    let promtool = prometheus::promtool().expect("promtool");
    let run = |verb: &[&str], files: &[PathBuf]| {
        let output = Command::new(&promtool).args(verb).args(files).output().expect("promtool runs");
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "promtool {verb:?}: {text}");
        text
    };
    let rules = run(&["check", "rules"], &[at("../charts/berth/files/alerts/berth.yaml")]);
    assert!(rules.contains(&format!("{} rules found", alerts().len())), "{rules}");
    let tests: Vec<PathBuf> = alerts().keys().map(|name| at(&format!("data/alerts/{name}.yaml"))).collect();
    run(&["test", "rules"], &tests);
}

#[test]
fn each_page_tells_what_it_means_how_to_see_it_what_to_do_and_when_to_escalate() {
    for (name, rule) in alerts() {
        let page = read(&at(&format!("../docs/runbooks/{name}.md")));
        assert!(page.starts_with(&format!("# {name}\n")), "{name}");
        let places: Vec<_> = SECTIONS.iter().map(|section| page.find(&format!("\n{section}\n"))).collect();
        assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{name}: {places:?} of {SECTIONS:?}");
        assert!(page.contains("```\nkubectl "), "{name} has commands to copy");
        assert!(page.contains(rule["labels"]["severity"].as_str().expect("severity")), "{name} says how bad it is");
    }
}

#[test]
fn the_chart_renders_the_rules_with_the_pages_place_where_the_cluster_knows_them() {
    let show = ["--show-only", "templates/alerts/prometheusrule.yaml"];
    let knows = ["--api-versions", "monitoring.coreos.com/v1"];
    let set = ["--set", "alerts.runbooks=https://wiki.example/berth/,alerts.labels.release=prometheus"];
    let rendered = crate::chart::template(&[&show[..], &knows, &set].concat()).expect("rendered");
    let [rule] = &crate::chart::documents(&rendered)[..] else { panic!("one object in {rendered}") };
    assert_eq!(
        (&rule["kind"], &rule["metadata"]["labels"]["release"]),
        (&"PrometheusRule".into(), &"prometheus".into())
    );
    let file = read(&at("../charts/berth/files/alerts/berth.yaml")).replace(PLACE, "https://wiki.example/berth/");
    assert_eq!(rule["spec"], yaml(&file));
    assert!(crate::chart::template(&show).is_err(), "a cluster that does not know the kind gets none");
    let off = ["--set", "alerts.enabled=false"];
    assert!(crate::chart::template(&[&show[..], &knows, &off].concat()).is_err());
}
