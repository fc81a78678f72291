//! The walls of the house: which crate may depend on which, over `cargo metadata`. A forbidden edge is
//! named together with the path that makes it.

#![expect(clippy::unwrap_used, reason = "a helper of a test fails it like the test itself")]

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use cargo_metadata::{DependencyKind, MetadataCommand, PackageId};

/// Allowed direct arrows between our crates; whoever is missing here may depend on none of them.
const ARROWS: &[(&str, &[&str])] = &[
    ("berth-types", &[]),
    ("berth-crds", &["berth-types"]),
    ("berth-proto", &["berth-types"]),
    ("berth-kernels", &["berth-types"]),
    ("berth-planner", &["berth-types"]),
    ("berth-runtime", &["berth-types"]),
    ("berth-operator", &["berth-crds", "berth-planner", "berth-runtime", "berth-types"]),
    ("berth-scheduler", &["berth-crds", "berth-planner", "berth-proto", "berth-runtime", "berth-types"]),
    ("berth-agent", &["berth-crds", "berth-kernels", "berth-proto", "berth-runtime", "berth-types"]),
    ("berth-runner", &["berth-kernels", "berth-proto", "berth-runtime", "berth-types"]),
];

/// Crates that see the whole house.
const ROOFS: &[&str] = &["berth", "berth-tests"];

/// Crates that must stay free of Kubernetes, wire and runtime, however far away.
const PURE: &[&str] = &["berth-types", "berth-planner", "berth-kernels"];
const IMPURE: &[&str] = &["kube", "kube-client", "k8s-openapi", "tonic", "tokio"];

struct House {
    names: BTreeMap<PackageId, String>,
    /// Edges that ship: normal and build dependencies.
    edges: BTreeMap<PackageId, Vec<PackageId>>,
}

impl House {
    fn read() -> Self {
        let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
        let metadata = MetadataCommand::new().manifest_path(manifest).exec().unwrap();
        let names = metadata.packages.iter().map(|package| (package.id.clone(), package.name.to_string())).collect();
        let ships = |kind: &DependencyKind| matches!(kind, DependencyKind::Normal | DependencyKind::Build);
        let nodes = metadata.resolve.unwrap().nodes;
        let edges = nodes.into_iter().map(|node| {
            let targets = node.deps.into_iter().filter(|dep| dep.dep_kinds.iter().any(|info| ships(&info.kind)));
            (node.id, targets.map(|dep| dep.pkg).collect())
        });
        Self { names, edges: edges.collect() }
    }

    fn id(&self, name: &str) -> &PackageId {
        self.names.iter().find(|(_, known)| *known == name).map(|(id, _)| id).unwrap()
    }

    fn ours(&self) -> impl Iterator<Item = &String> {
        self.names.values().filter(|name| *name == "berth" || name.starts_with("berth-"))
    }

    /// Shortest path from `from` to the first crate in `targets`.
    fn path(&self, from: &str, targets: &BTreeSet<&str>) -> Option<Vec<String>> {
        let mut queue = VecDeque::from([vec![self.id(from).clone()]]);
        let mut seen = BTreeSet::new();
        while let Some(path) = queue.pop_front() {
            let last = path.last().unwrap();
            if path.len() > 1 && targets.contains(self.names[last].as_str()) {
                return Some(path.iter().map(|id| self.names[id].clone()).collect());
            }
            for next in &self.edges[last] {
                if seen.insert(next.clone()) {
                    queue.push_back([path.as_slice(), std::slice::from_ref(next)].concat());
                }
            }
        }
        None
    }
}

#[test]
fn every_arrow_between_our_crates_is_allowed() {
    let house = House::read();
    for name in house.ours().filter(|name| !ROOFS.contains(&name.as_str()) && !name.starts_with("berth-double-")) {
        let allowed = ARROWS.iter().find(|(from, _)| from == name).map_or(&[][..], |(_, to)| to);
        for target in &house.edges[house.id(name)] {
            let target = house.names[target].as_str();
            let forbidden = target.starts_with("berth") && !allowed.contains(&target);
            assert!(!forbidden, "{name} -> {target} is not an arrow of docs/architecture.md");
        }
    }
}

#[test]
fn pure_crates_never_reach_kubernetes_wire_or_runtime() {
    let house = House::read();
    let impure: BTreeSet<&str> = IMPURE.iter().copied().collect();
    for name in PURE {
        let path = house.path(name, &impure);
        assert!(path.is_none(), "{name} must stay pure, but: {}", path.unwrap().join(" -> "));
    }
}

#[test]
fn the_runner_never_reaches_objects_or_planner() {
    let house = House::read();
    let path = house.path("berth-runner", &["berth-crds", "berth-planner", "berth-scheduler"].into());
    assert!(path.is_none(), "a runner obeys routes: {}", path.unwrap().join(" -> "));
}

#[test]
fn the_test_would_see_a_forbidden_path() {
    let house = House::read();
    let path = house.path("berth-scheduler", &["tonic"].into()).unwrap();
    assert_eq!(path.first().map(String::as_str), Some("berth-scheduler"));
    assert_eq!(path.last().map(String::as_str), Some("tonic"));
}
