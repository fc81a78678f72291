//! Which instances to keep, make and retire. Pure. Never retires an instance that serves before another
//! that serves what is wanted now can take its share.

use std::sync::Arc;

use berth_crds::{
    ExpertPlacement, LABEL_INSTANCE, LABEL_PLACEMENT, LABEL_TEMPLATE,
    conditions::{ConditionType, is_true},
};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;

/// Port of the runner's Serve service.
pub const SERVE_PORT: u16 = 7500;
/// New instances beyond the wanted number while old ones are replaced.
const SURGE: usize = 1;

/// One instance as it is.
#[derive(Clone, Debug)]
pub struct Instance {
    /// Its placement.
    pub placement: Arc<ExpertPlacement>,
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Hash of what it serves.
    pub template: String,
    /// Its runner's address, once the runner is ready.
    pub endpoint: Option<String>,
    /// Pods of its runner, those that end included.
    pub pods: usize,
    /// Whether it answers requests.
    pub ready: bool,
}

/// The instances as they are.
#[must_use]
pub fn observe(placements: &[Arc<ExpertPlacement>], pods: &[Arc<Pod>]) -> Vec<Instance> {
    let label = |placement: &ExpertPlacement, label| placement.labels().get(label).cloned().unwrap_or_default();
    let one = |placement: &Arc<ExpertPlacement>| {
        let name = placement.name_any();
        let pods: Vec<_> = pods.iter().filter(|pod| pod.labels().get(LABEL_PLACEMENT) == Some(&name)).collect();
        let endpoint = pods.iter().find_map(|pod| endpoint_of(pod));
        Instance {
            index: label(placement, LABEL_INSTANCE).parse().unwrap_or(u32::MAX),
            template: label(placement, LABEL_TEMPLATE),
            ready: endpoint.is_some() && serves(placement) && placement.metadata.deletion_timestamp.is_none(),
            endpoint,
            pods: pods.len(),
            name,
            placement: Arc::clone(placement),
        }
    };
    placements.iter().map(one).collect()
}

fn serves(placement: &ExpertPlacement) -> bool {
    placement
        .status
        .as_ref()
        .is_some_and(|status| status.serving_revision > 0 || is_true(&status.conditions, ConditionType::Serving))
}

fn endpoint_of(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
    let address = status.pod_ip.as_ref().filter(|_| ready && pod.metadata.deletion_timestamp.is_none())?;
    Some(if address.contains(':') { format!("[{address}]:{SERVE_PORT}") } else { format!("{address}:{SERVE_PORT}") })
}

/// What to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// Names of current instances that stay.
    pub keep: Vec<String>,
    /// Names of instances of an older template that stay for now.
    pub keep_old: Vec<String>,
    /// Indexes of instances to make.
    pub create: Vec<u32>,
    /// Names of instances to end.
    pub retire: Vec<String>,
}

/// Steps towards `replicas` instances of `template`, with at most `allowed` at a time.
#[must_use]
pub fn roll(replicas: u32, allowed: u32, template: &str, existing: &[Instance]) -> Steps {
    let count = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
    let is_current = |instance: &&Instance| instance.template == template && instance.index < replicas;
    let current: Vec<&Instance> = existing.iter().filter(is_current).collect();
    let ready = current.iter().filter(|instance| instance.ready).count();
    let room = count(allowed).saturating_sub(existing.len());
    let missing = count(replicas).saturating_sub(current.len());
    let mut old: Vec<&Instance> = existing.iter().filter(|instance| instance.template != template).collect();
    old.sort_by_key(|instance| (!instance.ready, instance.index, instance.name.clone()));
    if room == 0 && missing > 0 {
        // Those that serve nothing make room for those that will.
        old.retain(|instance| instance.ready);
    }
    old.truncate(count(replicas).saturating_sub(ready));
    let within_surge = (count(replicas) + SURGE).saturating_sub(current.len() + old.len());
    let create = missing.min(room).min(within_surge);
    let taken: Vec<u32> = current.iter().map(|instance| instance.index).collect();
    let names = |instances: &[&Instance]| instances.iter().map(|instance| instance.name.clone()).collect::<Vec<_>>();
    let (keep, keep_old) = (names(&current), names(&old));
    let stays = |name: &String| keep.contains(name) || keep_old.contains(name);
    let retire = existing.iter().map(|instance| instance.name.clone()).filter(|name| !stays(name)).collect();
    let create = (0..replicas).filter(|index| !taken.contains(index)).take(create).collect();
    Steps { keep, keep_old, create, retire }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model_deployment::fixtures::instance as objects;
    use proptest::prelude::*;

    fn instance(template: &str, index: u32, ready: bool) -> Instance {
        let (placement, pod) = objects(template, index, ready);
        observe(&[placement], &[pod]).remove(0)
    }

    #[test]
    fn an_instance_is_ready_when_its_runner_is_and_a_revision_serves() {
        let ready = instance("t", 0, true);
        assert_eq!((ready.ready, ready.endpoint.as_deref(), ready.index), (true, Some("10.0.0.9:7500"), 0));
        assert!(!instance("t", 0, false).ready);
    }

    #[test]
    fn an_update_makes_one_new_instance_and_keeps_the_old_until_it_serves() {
        let old = [instance("a", 0, true), instance("a", 1, true)];
        let steps = roll(2, 3, "b", &old);
        assert_eq!((steps.create, steps.keep_old.len(), steps.retire.len()), (vec![0], 2, 0));
        let mut next = old.to_vec();
        next.push(instance("b", 0, false));
        assert_eq!(roll(2, 3, "b", &next).retire, Vec::<String>::new());
        next[2] = instance("b", 0, true);
        let steps = roll(2, 3, "b", &next);
        assert_eq!((steps.retire, steps.create), (vec!["v3-a-1".to_owned()], Vec::new()));
    }

    #[test]
    fn scaling_down_ends_the_highest_indexes() {
        let all: Vec<_> = (0..3).map(|index| instance("a", index, true)).collect();
        assert_eq!(roll(1, 3, "a", &all).retire, ["v3-a-1", "v3-a-2"]);
        assert_eq!(roll(0, 3, "a", &all).retire.len(), 3);
    }

    #[test]
    fn without_room_only_old_instances_that_serve_nothing_give_way() {
        let old = [instance("a", 0, true), instance("a", 1, false)];
        let steps = roll(2, 2, "b", &old);
        assert_eq!((steps.retire, steps.create.len()), (vec!["v3-a-1".to_owned()], 0));
    }

    proptest! {
        #[test]
        fn every_update_ends_and_never_serves_less(
            replicas in 0u32..5,
            old in proptest::collection::vec(any::<bool>(), 0..5),
            spare in 1u32..3,
        ) {
            let mut now: Vec<Instance> =
                (0u32..).zip(&old).map(|(index, ready)| instance("a", index, *ready)).collect();
            let allowed = u32::try_from(old.len()).unwrap().max(replicas) + spare;
            let least = old.iter().filter(|ready| **ready).count().min(usize::try_from(replicas).unwrap());
            for _ in 0..30 {
                let steps = roll(replicas, allowed, "b", &now);
                now.retain(|instance| !steps.retire.contains(&instance.name));
                prop_assert!(now.iter().filter(|instance| instance.ready).count() >= least);
                for instance in &mut now {
                    instance.ready |= instance.template == "b";
                }
                now.extend(steps.create.iter().map(|index| instance("b", *index, false)));
                prop_assert!(now.len() <= usize::try_from(allowed).unwrap());
            }
            let mut indexes: Vec<_> = now.iter().map(|instance| (instance.template.clone(), instance.index)).collect();
            indexes.sort();
            prop_assert_eq!(indexes, (0..replicas).map(|index| ("b".to_owned(), index)).collect::<Vec<_>>());
        }
    }
}
