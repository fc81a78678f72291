//! What the operator sees of the cluster: one watch per kind, shared by all that read it, and which objects
//! those changes concern. Writes nothing and decides nothing.

use std::{
    collections::BTreeSet,
    fmt::Debug,
    sync::{Mutex, PoisonError},
};

use berth_crds::{AcceleratorNode, CapacityQueue, ExpertPlacement, LABEL_DEPLOYMENT, ModelDeployment, ModelProfile};
use futures::{
    StreamExt,
    future::{BoxFuture, join_all},
};
use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{Node, Pod},
};
use kube::{
    Api, Client, Resource, ResourceExt,
    runtime::{
        WatchStreamExt,
        reflector::{self, Store, store::WriterDropped},
        watcher,
    },
};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;

use crate::allocation::Key;

/// Keys that were touched since they were last taken; any number of touches of one key count once.
#[derive(Debug)]
pub struct Touched<K>(Mutex<BTreeSet<K>>, Notify);

impl<K> Default for Touched<K> {
    fn default() -> Self {
        Self(Mutex::default(), Notify::new())
    }
}

impl<K: Ord> Touched<K> {
    /// Marks `key`.
    pub fn insert(&self, key: K) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
        self.1.notify_one();
    }

    /// Takes the lowest key, waiting for one. Cancel-safe; for one taker.
    pub async fn next(&self) -> K {
        loop {
            let first = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_first();
            match first {
                Some(key) => return key,
                None => self.1.notified().await,
            }
        }
    }
}

/// What changes concern.
#[derive(Debug, Default)]
pub struct Signals {
    /// ModelDeployments to look at.
    pub deployments: Touched<Key>,
    /// Nodes to look at.
    pub nodes: Touched<String>,
    /// Something that the pass over all queues depends on changed.
    pub capacity: Notify,
    /// Something that remediation depends on changed.
    pub remediation: Notify,
}

/// The caches.
#[derive(Clone)]
pub struct Stores {
    /// ModelDeployments.
    pub deployments: Store<ModelDeployment>,
    /// ModelProfiles.
    pub profiles: Store<ModelProfile>,
    /// CapacityQueues.
    pub queues: Store<CapacityQueue>,
    /// ExpertPlacements.
    pub placements: Store<ExpertPlacement>,
    /// AcceleratorNodes.
    pub accelerators: Store<AcceleratorNode>,
    /// Runner Deployments.
    pub runners: Store<Deployment>,
    /// Runner pods.
    pub pods: Store<Pod>,
    /// Nodes.
    pub nodes: Store<Node>,
}

/// The key of a namespaced object.
#[must_use]
pub fn key_of<K: ResourceExt>(object: &K) -> Key {
    Key { namespace: object.namespace().unwrap_or_default(), name: object.name_any() }
}

/// The ModelDeployment that an object was made for.
fn made_for<K: ResourceExt>(object: &K) -> Option<Key> {
    let name = object.labels().get(LABEL_DEPLOYMENT)?.clone();
    Some(Key { namespace: object.namespace()?, name })
}

impl Stores {
    /// The caches, empty until the returned future is polled; it ends never.
    pub fn watch<'a>(client: &Client, signals: &'a Signals) -> (Self, BoxFuture<'a, ()>) {
        let every = watcher::Config::default;
        let ours = || every().labels(LABEL_DEPLOYMENT);
        let mut pumps = Vec::<BoxFuture<'a, ()>>::new();
        let deployments = reflector::store::<ModelDeployment>();
        let known = deployments.0.clone();
        pumps.push(pump(client, every(), deployments.1, |object: &ModelDeployment| {
            signals.deployments.insert(key_of(object));
            signals.capacity.notify_one();
        }));
        let profiles = reflector::store();
        pumps.push(pump(client, every(), profiles.1, move |object: &ModelProfile| {
            let name = object.name_any();
            let named = known.state().into_iter().filter(|deployment| deployment.spec.model == name);
            named.for_each(|deployment| signals.deployments.insert(key_of(deployment.as_ref())));
            signals.capacity.notify_one();
        }));
        let queues = reflector::store();
        pumps.push(pump(client, every(), queues.1, |_: &CapacityQueue| signals.capacity.notify_one()));
        let placements = reflector::store();
        pumps.push(pump(client, every(), placements.1, |object: &ExpertPlacement| {
            made_for(object).into_iter().for_each(|key| signals.deployments.insert(key));
            signals.capacity.notify_one();
            signals.remediation.notify_one();
        }));
        let accelerators = reflector::store();
        pumps.push(pump(client, every(), accelerators.1, |object: &AcceleratorNode| {
            signals.nodes.insert(object.name_any());
            signals.capacity.notify_one();
            signals.remediation.notify_one();
        }));
        let runners = reflector::store();
        pumps.push(pump(client, ours(), runners.1, |object: &Deployment| {
            made_for(object).into_iter().for_each(|key| signals.deployments.insert(key));
        }));
        let pods = reflector::store();
        pumps.push(pump(client, ours(), pods.1, |object: &Pod| {
            made_for(object).into_iter().for_each(|key| signals.deployments.insert(key));
        }));
        let nodes = reflector::store();
        pumps.push(pump(client, every(), nodes.1, |object: &Node| signals.nodes.insert(object.name_any())));
        let stores = Self {
            deployments: deployments.0,
            profiles: profiles.0,
            queues: queues.0,
            placements: placements.0,
            accelerators: accelerators.0,
            runners: runners.0,
            pods: pods.0,
            nodes: nodes.0,
        };
        (stores, Box::pin(async move { drop(join_all(pumps).await) }))
    }

    /// Returns when every cache holds what the cluster held at some moment after the start.
    ///
    /// # Errors
    /// When a watch ended, which only happens at the end of the process.
    pub async fn ready(&self) -> Result<(), WriterDropped> {
        self.deployments.wait_until_ready().await?;
        self.profiles.wait_until_ready().await?;
        self.queues.wait_until_ready().await?;
        self.placements.wait_until_ready().await?;
        self.accelerators.wait_until_ready().await?;
        self.runners.wait_until_ready().await?;
        self.pods.wait_until_ready().await?;
        self.nodes.wait_until_ready().await
    }
}

fn pump<'a, K>(
    client: &Client,
    config: watcher::Config,
    writer: reflector::store::Writer<K>,
    mut touched: impl FnMut(&K) + Send + 'a,
) -> BoxFuture<'a, ()>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
{
    let stream = watcher(Api::<K>::all(client.clone()), config).default_backoff().reflect(writer).touched_objects();
    Box::pin(stream.for_each(move |object| {
        match object {
            Ok(object) => touched(&object),
            Err(error) => tracing::warn!(kind = %K::kind(&()), %error, "watch interrupted"),
        }
        std::future::ready(())
    }))
}
