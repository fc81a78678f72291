//! What the installed roles allow against what the parts did in all that happened to the ring: nothing was refused, and
//! nothing is allowed that no part needs.

use berth_tests::{demo::cluster::NAMESPACE, rights};

use super::{Ring, say};

/// Whose calls are whose.
const IDENTITIES: [(&str, &str); 2] =
    [("system:serviceaccount:berth-system:berth-", ""), ("system:serviceaccount:models:", "runner")];

/// Rights that this ring does not use, and why they are there. One that is used, or is not granted, must not be here.
const UNUSED: &[(&str, &str)] = &[
    ("operator create leases.coordination.k8s.io", "the chart makes the Lease; somebody may delete it"),
    ("scheduler create leases.coordination.k8s.io", "the chart makes the Lease; somebody may delete it"),
];

/// Both directions.
pub(super) async fn parts_may_do_what_they_do_and_nothing_else(ring: &Ring) {
    let roles = ["get", "clusterroles,roles", "-A", "-l", "app.kubernetes.io/part-of=berth", "-o", "json"];
    let granted = rights::granted(&ring.cluster.kubectl(&roles).await.expect("roles")).expect("rules");
    assert!(granted.len() > 30, "the roles in {NAMESPACE} were found: {granted:?}");
    let used = rights::used(&ring.cluster.dir().join("audit.log"), &IDENTITIES).expect("an audit log");
    assert!(used.refused.is_empty(), "what a part asks for, its role must allow: {:?}", used.refused);
    let missing: Vec<String> =
        used.allowed.keys().filter(|right| !granted.contains(right)).map(ToString::to_string).collect();
    assert_eq!(missing, Vec::<String>::new(), "used by another right than the chart's roles");
    let unused: Vec<String> =
        granted.iter().filter(|right| !used.allowed.contains_key(right)).map(ToString::to_string).collect();
    let mut explained: Vec<&str> = UNUSED.iter().map(|(right, _)| *right).collect();
    explained.sort_unstable();
    assert_eq!(unused, explained, "granted and not used: take it from the chart's role, or write down why it is there");
    say(&format!(
        "{} rights granted, {} used, {} explained, none refused",
        granted.len(),
        used.allowed.len(),
        unused.len()
    ));
}
