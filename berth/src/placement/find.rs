//! Which placement a person means. Pure.

use anyhow::bail;
use berth_crds::ExpertPlacement;
use kube::ResourceExt;

use crate::status::deployment_of;

/// The placement named `name`, or the one instance of the deployment of that name; `<namespace>/<name>` too.
pub(crate) fn find<'a>(
    placements: &'a [ExpertPlacement],
    name: &str,
    namespace: Option<&str>,
) -> anyhow::Result<&'a ExpertPlacement> {
    let (space, plain) = name.split_once('/').map_or((None, name), |(space, plain)| (Some(space), plain));
    let here = |one: &&ExpertPlacement| space.is_none_or(|space| one.namespace().as_deref() == Some(space));
    let called: Vec<_> = placements.iter().filter(here).filter(|one| one.name_any() == plain).collect();
    let instances: Vec<_> = placements.iter().filter(here).filter(|one| deployment_of(one) == plain).collect();
    let of = if called.is_empty() { instances } else { called };
    let full = |one: &&ExpertPlacement| format!("{}/{}", one.namespace().unwrap_or_default(), one.name_any());
    match of.as_slice() {
        [one] => Ok(one),
        [] => {
            let place = namespace.map_or_else(|| "any namespace".to_owned(), |name| format!("namespace {name}"));
            let all: Vec<_> = placements.iter().collect();
            let known: Vec<String> = all.iter().map(full).collect();
            let known = if known.is_empty() { "none at all".to_owned() } else { known.join(", ") };
            bail!("no ExpertPlacement {name:?} in {place} (there are: {known}): choose with -n, or see -A")
        }
        several => {
            let names: Vec<String> = several.iter().map(full).collect();
            bail!("{name:?} may be any of {}: name one", names.join(", "))
        }
    }
}
