//! What parts may do by the chart's roles, and what they did by the API server's audit log. Compares; judges nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::{Error, Result};

/// One right: a verb on a kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Right {
    /// `operator`, `scheduler`, `agent`, `runner`.
    pub part: String,
    /// As in a role.
    pub verb: String,
    /// `<resource>[/<subresource>][.<group>]`.
    pub kind: String,
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.part, self.verb, self.kind)
    }
}

fn right(part: &str, verb: &str, group: &str, resource: &str) -> Right {
    let kind = if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
    Right { part: part.to_owned(), verb: verb.to_owned(), kind }
}

#[derive(Deserialize)]
struct List {
    items: Vec<Role>,
}

#[derive(Deserialize)]
struct Role {
    metadata: Metadata,
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
struct Metadata {
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rule {
    api_groups: Vec<String>,
    resources: Vec<String>,
    verbs: Vec<String>,
}

/// The rights that installed roles `berth-<part>` grant: a list of Roles and ClusterRoles as the API server gives it.
///
/// # Errors
/// When the list is no JSON, or a role has rules of another form.
pub fn granted(roles: &str) -> Result<BTreeSet<Right>> {
    let List { items } = serde_json::from_str(roles)
        .map_err(|error| Error::Unknown { what: "form of a role", name: error.to_string() })?;
    let mut rights = BTreeSet::new();
    for Role { metadata, rules } in items {
        let part = metadata.name.strip_prefix("berth-").unwrap_or(&metadata.name);
        for Rule { api_groups, resources, verbs } in &rules {
            for (group, resource) in api_groups.iter().flat_map(|group| resources.iter().map(move |one| (group, one))) {
                rights.extend(verbs.iter().map(|verb| right(part, verb, group, resource)));
            }
        }
    }
    Ok(rights)
}

/// The rights that were used, each with how often, by an audit log.
#[derive(Debug, Default)]
pub struct Used {
    /// Allowed.
    pub allowed: BTreeMap<Right, usize>,
    /// Refused with 403.
    pub refused: BTreeMap<Right, usize>,
}

/// Reads calls from an audit log. `identities` are beginnings of user names and the parts they belong to; a part that
/// is empty is named by the rest of the user name.
///
/// # Errors
/// When the log cannot be read.
pub fn used(audit_log: &Path, identities: &[(&str, &str)]) -> Result<Used> {
    let text = std::fs::read_to_string(audit_log).map_err(Error::file("read", audit_log))?;
    let mut used = Used::default();
    for call in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let field = |path: &str| call.pointer(path).and_then(Value::as_str).unwrap_or_default();
        let user = field("/user/username");
        let known = identities.iter().find_map(|(prefix, part)| Some((user.strip_prefix(prefix)?, *part)));
        let Some((rest, part)) = known else { continue };
        let part = if part.is_empty() { rest } else { part };
        let resource = match (field("/objectRef/resource"), field("/objectRef/subresource")) {
            ("", _) => continue,
            (resource, "") => resource.to_owned(),
            (resource, subresource) => format!("{resource}/{subresource}"),
        };
        let code = call.pointer("/responseStatus/code").and_then(Value::as_u64);
        let calls = if code == Some(403) { &mut used.refused } else { &mut used.allowed };
        let mut count =
            |verb| *calls.entry(right(part, verb, field("/objectRef/apiGroup"), &resource)).or_default() += 1;
        count(field("/verb"));
        // An apply that makes the object needs the right to create it too.
        if (field("/verb"), code) == ("patch", Some(201)) {
            count("create");
        }
    }
    Ok(used)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_becomes_one_right_for_each_verb_and_kind() {
        let roles = r#"{"items": [{"kind": "ClusterRole", "metadata": {"name": "berth-agent"}, "rules": [
            {"apiGroups": ["", "berth.dev"], "resources": ["nodes"], "verbs": ["get", "list"]}]}]}"#;
        let rights: Vec<String> = granted(roles).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(
            rights,
            ["agent get nodes", "agent get nodes.berth.dev", "agent list nodes", "agent list nodes.berth.dev"]
        );
    }

    #[test]
    fn calls_are_counted_by_part_and_refused_ones_apart() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("audit.log");
        let call = |user: &str, verb: &str, code: u16| {
            serde_json::json!({
                "verb": verb, "user": {"username": user}, "responseStatus": {"code": code},
                "objectRef": {"resource": "acceleratornodes", "subresource": "status", "apiGroup": "berth.dev"},
            })
        };
        let own = "system:serviceaccount:berth-system:berth-agent";
        let lines =
            [call(own, "patch", 200), call(own, "patch", 201), call(own, "update", 403), call("admin", "patch", 200)];
        std::fs::write(&log, lines.map(|line| line.to_string()).join("\n")).unwrap();
        let used = used(&log, &[("system:serviceaccount:berth-system:berth-", "")]).unwrap();
        let text = |calls: &BTreeMap<Right, usize>| {
            calls.iter().map(|(right, calls)| format!("{right} {calls}")).collect::<Vec<_>>()
        };
        assert_eq!(
            text(&used.allowed),
            ["agent create acceleratornodes/status.berth.dev 1", "agent patch acceleratornodes/status.berth.dev 2"]
        );
        assert_eq!(text(&used.refused), ["agent update acceleratornodes/status.berth.dev 1"]);
    }
}
