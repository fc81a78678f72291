//! The environment, command and downward API of a container. Looks things up through a `Lookup`, so that what
//! it decides can be tested without a cluster; never adds anything of this process's own environment.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, EnvFromSource, EnvVarSource, Pod};

use super::payload::Lookup;
use super::status::Addresses;

/// Variables in the order they are given; a later one wins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Environment(Vec<(String, String)>);

impl Environment {
    pub(super) fn set(&mut self, name: &str, value: impl Into<String>) {
        self.0.retain(|(n, _)| n != name);
        self.0.push((name.into(), value.into()));
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// As `NAME=value`.
    pub(super) fn lines(&self) -> Vec<String> {
        self.0.iter().map(|(n, v)| format!("{n}={v}")).collect()
    }

    /// Replaces `$(NAME)` by the variable's value; `$$` stands for `$`; an unknown name stays as it is.
    pub(super) fn expand(&self, text: &str) -> String {
        let (mut out, mut rest) = (String::with_capacity(text.len()), text);
        while let Some(at) = rest.find('$') {
            out.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix('$') {
                out.push('$');
                rest = after;
            } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|r| r.split_once(')')) {
                match self.get(name) {
                    Some(value) => out.push_str(value),
                    None => out.push_str(&format!("$({name})")),
                }
                rest = after;
            } else {
                out.push('$');
            }
        }
        out + rest
    }
}

/// Adds what a container's `envFrom` and `env` say to `base`.
///
/// # Errors
/// A sentence as a kubelet puts it into `CreateContainerConfigError`.
pub(super) async fn complete(
    base: Environment,
    container: &Container,
    pod: &Pod,
    addresses: &Addresses,
    lookup: &Lookup,
) -> Result<Environment, String> {
    let mut out = base;
    for source in container.env_from.iter().flatten() {
        for (name, value) in from_source(source, lookup).await? {
            out.set(&name, value);
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match &variable.value_from {
            None => Some(out.expand(variable.value.as_deref().unwrap_or_default())),
            Some(source) => value_from(source, pod, addresses, lookup).await?,
        };
        if let Some(value) = value {
            out.set(&variable.name, value);
        }
    }
    Ok(out)
}

async fn from_source(source: &EnvFromSource, lookup: &Lookup) -> Result<Vec<(String, String)>, String> {
    let prefix = source.prefix.as_deref().unwrap_or_default();
    let data = if let Some(reference) = &source.config_map_ref {
        lookup.config_map(&reference.name, reference.optional == Some(true)).await?
    } else if let Some(reference) = &source.secret_ref {
        lookup.secret(&reference.name, reference.optional == Some(true)).await?
    } else {
        BTreeMap::new()
    };
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(data.into_iter().map(|(name, value)| (format!("{prefix}{name}"), text(value))).collect())
}

async fn value_from(
    source: &EnvVarSource,
    pod: &Pod,
    addresses: &Addresses,
    lookup: &Lookup,
) -> Result<Option<String>, String> {
    if let Some(field) = &source.field_ref {
        return downward(pod, addresses, &field.field_path).map(Some);
    }
    let (kind, name, key, optional, data) = if let Some(r) = &source.config_map_key_ref {
        let optional = r.optional == Some(true);
        ("ConfigMap", &r.name, &r.key, optional, lookup.config_map(&r.name, optional).await?)
    } else if let Some(r) = &source.secret_key_ref {
        let optional = r.optional == Some(true);
        ("Secret", &r.name, &r.key, optional, lookup.secret(&r.name, optional).await?)
    } else {
        return Err("this source of a variable's value is not supported by the process kubelet".into());
    };
    match data.get(key) {
        Some(value) => Ok(Some(String::from_utf8_lossy(value).into_owned())),
        None if optional => Ok(None),
        None => Err(format!("couldn't find key {key} in {kind} {name}")),
    }
}

/// A field of the pod, by the path the downward API gives it.
pub(super) fn downward(pod: &Pod, addresses: &Addresses, path: &str) -> Result<String, String> {
    let (meta, spec) = (&pod.metadata, pod.spec.as_ref());
    let one = |map: &Option<BTreeMap<String, String>>, key: &str| {
        Ok(map.as_ref().and_then(|m| m.get(key)).cloned().unwrap_or_default())
    };
    let subscript = |name: &str| path.strip_prefix(name)?.strip_prefix("['")?.strip_suffix("']");
    if let Some(key) = subscript("metadata.labels") {
        return one(&meta.labels, key);
    }
    if let Some(key) = subscript("metadata.annotations") {
        return one(&meta.annotations, key);
    }
    let text = |value: Option<&String>| Ok(value.cloned().unwrap_or_default());
    match path {
        "metadata.name" => text(meta.name.as_ref()),
        "metadata.namespace" => text(meta.namespace.as_ref()),
        "metadata.uid" => text(meta.uid.as_ref()),
        "metadata.labels" => Ok(lines(&meta.labels)),
        "metadata.annotations" => Ok(lines(&meta.annotations)),
        "spec.nodeName" => text(spec.and_then(|s| s.node_name.as_ref())),
        "spec.serviceAccountName" => text(spec.and_then(|s| s.service_account_name.as_ref())),
        "status.podIP" | "status.podIPs" => Ok(addresses.pod.clone()),
        "status.hostIP" | "status.hostIPs" => Ok(addresses.host.clone()),
        _ => Err(format!("field path {path:?} is not supported by the process kubelet")),
    }
}

/// All labels or annotations, one a line.
fn lines(map: &Option<BTreeMap<String, String>>) -> String {
    let line = |(key, value): (&String, &String)| format!("{key}={value:?}");
    map.iter().flatten().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_expand_and_what_is_unknown_stays() {
        let mut env = Environment::default();
        env.set("A", "1");
        env.set("B", "two words");
        assert_eq!(env.expand("$(A)-$(B) $$(A) $(C) $A $"), "1-two words $(A) $(C) $A $");
        assert_eq!(env.expand("$(A"), "$(A");
        assert_eq!(env.expand(""), "");
    }

    #[test]
    fn a_later_variable_wins() {
        let mut env = Environment::default();
        env.set("A", "1");
        env.set("A", "2");
        assert_eq!(env.lines(), ["A=2"]);
    }

    #[test]
    fn downward_fields_of_a_pod_are_found_by_path() {
        let mut pod = Pod::default();
        pod.metadata.name = Some("p".into());
        pod.metadata.labels = Some(BTreeMap::from([("a/b".into(), "c".into()), ("d".into(), "e".into())]));
        let addresses = Addresses { pod: "127.1.0.1".into(), host: "127.1.0.2".into() };
        let get = |path| downward(&pod, &addresses, path);
        assert_eq!(get("metadata.name"), Ok("p".into()));
        assert_eq!(get("metadata.labels['a/b']"), Ok("c".into()));
        assert_eq!(get("metadata.labels['x']"), Ok(String::new()));
        assert_eq!(get("metadata.labels"), Ok("a/b=\"c\"\nd=\"e\"".into()));
        assert_eq!(get("status.podIP"), Ok("127.1.0.1".into()));
        assert_eq!(get("status.hostIP"), Ok("127.1.0.2".into()));
        assert!(get("spec.containers").is_err());
    }
}
