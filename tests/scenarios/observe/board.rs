//! The boards as text, and each of their queries against a Prometheus that watches a running cluster.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use berth_tests::demo::objects;
use serde_json::Value;

use super::{Watched, is_drawn, metrics};

/// Longest time until everything was scraped often enough for rates.
const PATIENCE: Duration = Duration::from_secs(60);

/// One query of a panel.
#[derive(Clone, Debug)]
struct Query {
    panel: String,
    text: String,
}

fn boards() -> Vec<(PathBuf, Value)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/berth/files/dashboards");
    // In the order in which helm renders them.
    let files: BTreeSet<PathBuf> =
        std::fs::read_dir(&folder).expect("boards").flatten().map(|file| file.path()).collect();
    let board = |path: PathBuf| {
        let text = std::fs::read(&path).expect("a board");
        let board = serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        (path, board)
    };
    let boards: Vec<_> = files.into_iter().map(board).collect();
    assert!(!boards.is_empty(), "no boards in {}", folder.display());
    boards
}

fn panels(board: &Value) -> Vec<&Value> {
    let all = board["panels"].as_array().expect("panels").iter();
    all.filter(|panel| panel["type"] != "row").collect()
}

fn queries(board: &Value) -> Vec<Query> {
    let of = |panel: &&Value| {
        let title = panel["title"].as_str().expect("a title").to_owned();
        let targets = panel["targets"].as_array().unwrap_or_else(|| panic!("{title}: no targets")).clone();
        assert!(!targets.is_empty(), "{title}: no targets");
        let text = move |target: &Value| Query {
            panel: title.clone(),
            text: target["expr"].as_str().expect("expr").to_owned(),
        };
        targets.iter().map(text).collect::<Vec<_>>()
    };
    panels(board).iter().flat_map(of).collect()
}

/// A query with the board's variables filled in, as Grafana does it: everything is shown.
fn filled(query: &str) -> String {
    let mut text = query.to_owned();
    for (variable, value) in
        [("$__rate_interval", "30s"), ("$__range", "10m"), ("$vendor", ".*"), ("$pool", ".*"), ("$node", ".*")]
    {
        text = text.replace(variable, value);
    }
    assert!(!text.contains('$'), "a variable that nobody fills in: {text}");
    text
}

/// Names of metrics in a query, as they are scraped.
fn names(query: &str) -> BTreeSet<String> {
    let words = query.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    let ours = |word: &&str| {
        ["berth_", "accelerator_"].iter().any(|prefix| word.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty()))
    };
    words.filter(ours).map(str::to_owned).collect()
}

#[test]
fn boards_use_only_metrics_that_exist_and_a_data_source_that_is_chosen() {
    let known = metrics::series();
    for (path, board) in boards() {
        let path = path.display();
        assert!(board.get("uid").is_none() && board.get("id").is_none(), "{path}: ids are Grafana's to give");
        let variables = board["templating"]["list"].as_array().expect("variables");
        let source = variables.iter().find(|variable| variable["type"] == "datasource").expect("a data source");
        assert_eq!(source["name"], "datasource");
        let ids: BTreeSet<_> =
            board["panels"].as_array().expect("panels").iter().map(|panel| panel["id"].as_u64()).collect();
        assert_eq!(
            ids.len(),
            board["panels"].as_array().map_or(0, Vec::len),
            "{path}: each panel has an id of its own"
        );
        for panel in panels(&board) {
            let title = &panel["title"];
            assert!(
                panel["description"].as_str().is_some_and(|text| text.ends_with('.')),
                "{path}: {title} says what it shows"
            );
            let targets = panel["targets"].as_array().expect("targets").iter();
            for source in targets.map(|target| &target["datasource"]).chain([&panel["datasource"]]) {
                assert_eq!(source["uid"], "${datasource}", "{path}: {title}");
            }
        }
        for Query { panel, text } in queries(&board) {
            let unknown: Vec<_> = names(&text).into_iter().filter(|name| !known.contains(name)).collect();
            // A pattern over all parts names no single metric.
            assert!(unknown.is_empty() || text.contains("__name__"), "{path}: {panel}: {unknown:?} in {text}");
        }
    }
}

#[test]
fn each_board_is_a_config_map_with_the_label_that_was_asked_for() {
    let values = ["dashboards.label=boards", "dashboards.labelValue=yes", "dashboards.annotations.folder=Berth"];
    let mut args = vec!["--show-only", "templates/dashboards/configmap.yaml"];
    args.extend(values.iter().flat_map(|value| ["--set", value]));
    let rendered = crate::chart::template(&args).expect("rendered");
    let maps: Vec<Value> = crate::chart::documents(&rendered);
    assert_eq!(maps.len(), boards().len());
    for (map, (path, board)) in maps.iter().zip(boards()) {
        let file = path.file_name().and_then(|name| name.to_str()).expect("a name");
        let text = map["data"][file].as_str().unwrap_or_else(|| panic!("{file} in {map}"));
        assert_eq!(serde_json::from_str::<Value>(text).expect("the board"), board);
        assert_eq!(
            (&map["metadata"]["labels"]["boards"], &map["metadata"]["annotations"]["folder"]),
            (&"yes".into(), &"Berth".into())
        );
    }
    assert!(crate::chart::template(&[&args[..2], &["--set", "dashboards.enabled=false"]].concat()).is_err());
}

/// Every query gives at least one number.
pub(super) async fn every_query_is_answered(watched: &Watched) {
    let queries: Vec<Query> = boards().iter().flat_map(|(_, board)| queries(board)).collect();
    let answered = objects::wait_for("an answer to every query", PATIENCE, || async {
        let mut missing = Vec::new();
        for Query { panel, text } in &queries {
            let samples = watched.prometheus.query(&filled(text)).await?;
            if !samples.iter().any(is_drawn) {
                missing.push(format!("{panel}: {text}: {samples:?}"));
            }
        }
        Ok(if missing.is_empty() { Ok(queries.len()) } else { Err(missing.join("\n")) })
    });
    let count = answered.await.unwrap_or_else(|error| panic!("{error}"));
    super::say(&format!("{count} queries of the boards gave numbers"));
    the_numbers_are_those_of_the_cluster(watched).await;
}

/// Some numbers are known from the objects.
async fn the_numbers_are_those_of_the_cluster(watched: &Watched) {
    let nodes: kube::Api<berth_crds::AcceleratorNode> = kube::Api::all(watched.cluster.client().clone());
    let nodes = nodes.list(&kube::api::ListParams::default()).await.expect("nodes").items;
    let devices =
        nodes.iter().filter_map(|node| node.status.as_ref()).map(|status| status.devices.len()).sum::<usize>();
    let devices = f64::from(u32::try_from(devices).expect("few"));
    for (query, expected) in [
        ("sum(berth_operator_capacity_total_devices)", devices),
        ("sum(berth_operator_capacity_allocatable_devices)", devices - 1.0),
        ("sum(berth_operator_devices{admission=\"Barred\"})", 1.0),
        ("sum(berth_operator_queue_quota_devices{queue=\"small\"})", 1.0),
        ("sum(berth_operator_queue_waiting_deployments{queue=\"small\"})", 1.0),
        ("sum(increase(berth_scheduler_plans_total{cause=\"repair\"}[10m]) > bool 0)", 1.0),
        ("count(berth_scheduler_lease_leading == 1)", 1.0),
        ("count(berth_scheduler_config_info)", 2.0),
    ] {
        // Objects are written, and scraped, a moment after what they tell of.
        let known = objects::wait_for(query, PATIENCE, || async {
            let values: Vec<f64> = watched.prometheus.query(query).await?.iter().map(|sample| sample.value).collect();
            Ok(if values == [expected] { Ok(()) } else { Err(format!("{values:?} instead of {expected}")) })
        });
        known.await.unwrap_or_else(|error| panic!("{error}"));
    }
}
