//! Step 1: everything that a pass over one ModelDeployment looks at, taken from the caches at one moment.

use std::{collections::BTreeMap, sync::Arc};

use berth_crds::{ExpertPlacement, LABEL_DEPLOYMENT, ModelDeployment, ModelProfile};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod};
use kube::ResourceExt;

use crate::{
    capacity::{Grant, Grants},
    watches::{Stores, key_of},
};

/// What the next steps look at.
#[derive(Clone, Debug)]
pub struct Dereferenced {
    /// The deployment.
    pub deployment: Arc<ModelDeployment>,
    /// The profile that it names, if there is one.
    pub profile: Option<Arc<ModelProfile>>,
    /// Its instances, in order of their names.
    pub placements: Vec<Arc<ExpertPlacement>>,
    /// Their runners.
    pub runners: BTreeMap<String, Arc<Deployment>>,
    /// The runners' pods.
    pub pods: Vec<Arc<Pod>>,
    /// What it may have.
    pub grant: Grant,
    /// Product of each device that an AcceleratorNode lists.
    pub products: BTreeMap<String, String>,
}

/// Looks everything up. `None` while the pass over the queues has not seen this generation: it touches the
/// deployment again when it has.
#[must_use]
pub fn dereference(deployment: &Arc<ModelDeployment>, stores: &Stores, grants: &Grants) -> Option<Dereferenced> {
    let key = key_of(deployment.as_ref());
    let grant = grants.get(&key)?;
    if grant.uid != deployment.uid() || grant.generation != deployment.metadata.generation {
        return None;
    }
    let mut placements = stores.placements.state_filter(|object| is_for(object, deployment));
    placements.sort_by_key(|placement| placement.name_any());
    let runners = stores.runners.state_filter(|object| is_for(object, deployment));
    let used: Vec<_> = placements.iter().filter_map(|p| p.status.as_ref()?.assignment.as_ref()).collect();
    let mut products = BTreeMap::new();
    if !used.is_empty() {
        for node in stores.accelerators.state() {
            for device in node.status.iter().flat_map(|status| &status.devices) {
                products.insert(device.device.to_string(), device.product.clone());
            }
        }
    }
    Some(Dereferenced {
        deployment: Arc::clone(deployment),
        profile: stores.profiles.find(|profile| profile.name_any() == deployment.spec.model),
        placements,
        runners: runners.into_iter().map(|runner| (runner.name_any(), runner)).collect(),
        pods: stores.pods.state_filter(|object| is_for(object, deployment)),
        grant: grant.clone(),
        products,
    })
}

fn is_for<K: ResourceExt>(object: &K, deployment: &ModelDeployment) -> bool {
    object.namespace() == deployment.namespace()
        && object.labels().get(LABEL_DEPLOYMENT).is_some_and(|name| *name == deployment.name_any())
}
