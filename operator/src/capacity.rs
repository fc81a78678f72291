//! The pass over all queues and deployments: gathers claims from the caches, asks `allocation`, publishes
//! what each deployment may have and writes the queues' statuses. Any number of changes make one pass.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use berth_crds::{
    CapacityQueue, CapacityQueueStatus, ExpertPlacement, LABEL_DEPLOYMENT, LABEL_TEMPLATE, ModelDeployment,
    conditions::{ConditionType, Wanted, merge},
};
use berth_runtime::Clock;
use kube::ResourceExt;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::{
    allocation::{self, Admission, Claim, Key, Queue, Usage, Verdict},
    error::{Category, WriteError},
    fleet::{self, FleetDevice},
    metrics::OperatorMetrics,
    model_deployment::validate::{Roots, validate},
    survey::Survey,
    watches::{Signals, Stores, key_of},
    writes::Writes,
};

/// How long changes are gathered before a pass.
const GATHER: Duration = Duration::from_millis(50);
/// How long after a refused status the next pass comes if nothing changes.
const RETRY: Duration = Duration::from_secs(5);

/// What one deployment may have, and of which of its generations that speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Tells a deployment from a later one of the same name.
    pub uid: Option<String>,
    /// Generation of the spec that was looked at.
    pub generation: Option<i64>,
    /// What it may have.
    pub verdict: Verdict,
}

/// What every deployment may have.
pub type Grants = Arc<BTreeMap<Key, Grant>>;

/// The pass and what it needs.
pub struct CapacityPass<'a> {
    /// Caches.
    pub stores: &'a Stores,
    /// Where changes come in and touched deployments go out.
    pub signals: &'a Signals,
    /// The door.
    pub writes: &'a Writes,
    /// Time.
    pub clock: &'a Clock,
    /// Counters.
    pub metrics: &'a OperatorMetrics,
    /// Folders that weights may lie in.
    pub roots: &'a Roots,
    /// Where grants are published.
    pub grants: watch::Sender<Grants>,
}

impl CapacityPass<'_> {
    /// Passes after changes until `stop` is cancelled; a pass in hand is finished.
    pub async fn keep(&self, stop: &CancellationToken) {
        let mut retry = false;
        loop {
            // Each arm only waits.
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.signals.capacity.notified() => {}
                () = self.clock.sleep(RETRY), if retry => {}
            }
            self.clock.sleep(GATHER).await;
            retry = self.pass().await;
        }
    }

    /// One pass. Returns whether a status could not be written.
    async fn pass(&self) -> bool {
        let counted = self.metrics.begin("CapacityQueue", self.clock);
        let before = self.grants.borrow().clone();
        let queues: Vec<Arc<CapacityQueue>> = self.stores.queues.state();
        let deployments = self.stores.deployments.state();
        let accelerators = self.stores.accelerators.state();
        let fleet = fleet::schedulable(accelerators.iter().map(AsRef::as_ref));
        let mut survey = Survey::default();
        let existing = self.stores.placements.state();
        survey.supply(accelerators.iter().map(AsRef::as_ref), &fleet, existing.iter().map(AsRef::as_ref));
        let placements = by_deployment(existing);
        let claims: Vec<Claim> = deployments
            .iter()
            .map(|deployment| self.claim(deployment, &placements, &fleet, before.get(&key_of(deployment.as_ref()))))
            .collect();
        let known = queues.iter().map(|queue| (queue.name_any(), of(queue))).collect();
        let Admission { verdicts, usage } =
            allocation::admit(&known, &claims, u32::try_from(fleet.len()).unwrap_or(u32::MAX));
        survey.demand(&claims, &verdicts, deployments.iter().map(AsRef::as_ref));
        survey.queues(&known, &usage);
        self.metrics.survey(survey);
        self.publish(&deployments, verdicts, &before);
        let mut failed = false;
        for queue in &queues {
            let usage = usage.get(&queue.name_any()).copied().unwrap_or_default();
            failed |= self.write_status(queue, usage).await.is_err_and(|error| error.category() != Category::Invalid);
        }
        counted.finish(!failed);
        failed
    }

    fn claim(
        &self,
        deployment: &ModelDeployment,
        placements: &BTreeMap<Key, Vec<Arc<ExpertPlacement>>>,
        fleet: &[FleetDevice],
        before: Option<&Grant>,
    ) -> Claim {
        let key = key_of(deployment);
        let spec = &deployment.spec;
        let existing = placements.get(&key).map_or(&[][..], Vec::as_slice);
        let profile = self.stores.profiles.find(|profile| profile.name_any() == spec.model);
        let checked = validate(deployment, profile, self.roots);
        let replicas = u32::try_from(spec.replicas).unwrap_or(0);
        let (wanted, per_instance) = match &checked.outcome {
            Ok(accepted) => {
                let stale =
                    existing.iter().any(|placement| placement.labels().get(LABEL_TEMPLATE) != Some(&accepted.template));
                let profile = &accepted.profile.spec;
                let need = fleet::devices_needed(profile, &spec.devices, &spec.redundancy, fleet);
                (replicas + u32::from(stale && replicas > 0), need)
            }
            Err(_) => (0, Ok(0)),
        };
        let exist = u32::try_from(existing.len()).unwrap_or(u32::MAX);
        let exist_devices = existing.iter().filter_map(|placement| placement.spec.granted_devices).sum::<u32>();
        // What was granted counts until it exists: the cache may not have seen it yet.
        let promised = before
            .filter(|grant| grant.uid == deployment.uid())
            .map_or((0, 0), |grant| (grant.verdict.allowed.min(wanted), grant.verdict.per_instance));
        let ahead = promised.0.saturating_sub(exist);
        let in_queue = u32::from(spec.queue.is_some());
        Claim {
            key,
            created: deployment.creation_timestamp().map_or(0, |time| time.0.as_second()),
            queue: spec.queue.clone(),
            per_instance,
            wanted,
            held: exist.saturating_add(ahead),
            held_devices: exist_devices.saturating_add(ahead * promised.1 * in_queue),
        }
    }

    /// Publishes the grants and touches the deployments whose grant changed.
    fn publish(
        &self,
        deployments: &[Arc<ModelDeployment>],
        mut verdicts: BTreeMap<Key, Verdict>,
        before: &BTreeMap<Key, Grant>,
    ) {
        let mut now = BTreeMap::new();
        for deployment in deployments {
            let key = key_of(deployment.as_ref());
            let Some(verdict) = verdicts.remove(&key) else { continue };
            let grant = Grant { uid: deployment.uid(), generation: deployment.metadata.generation, verdict };
            now.insert(key, grant);
        }
        let changed: Vec<Key> =
            now.iter().filter(|(key, grant)| before.get(key) != Some(grant)).map(|(key, _)| key.clone()).collect();
        self.grants.send_replace(Arc::new(now));
        changed.into_iter().for_each(|key| self.signals.deployments.insert(key));
    }

    async fn write_status(&self, queue: &CapacityQueue, usage: Usage) -> Result<(), WriteError> {
        let current = queue.status.clone().unwrap_or_default();
        let full = usage.used >= queue.spec.quota_devices;
        let ready = Wanted {
            kind: ConditionType::Ready,
            status: Some(true),
            reason: if full { "Full" } else { "Open" },
            message: format!("{} of {} devices used", usage.used, queue.spec.quota_devices),
        };
        let now = crate::timestamp(self.clock);
        let wanted = CapacityQueueStatus {
            observed_generation: queue.metadata.generation,
            used_devices: usage.used,
            borrowed_devices: usage.borrowed,
            waiting: usage.waiting,
            conditions: merge(&current.conditions, &[ready], queue.metadata.generation, now),
        };
        if queue.status.as_ref() == Some(&wanted) {
            return Ok(());
        }
        let written = self.writes.apply_status(&self.writes.everywhere(), queue, &wanted).await;
        written.inspect_err(|error| tracing::warn!(queue = queue.name_any(), %error, "status of a queue not written"))
    }
}

fn of(queue: &CapacityQueue) -> Queue {
    Queue {
        quota: queue.spec.quota_devices,
        borrow_limit: queue.spec.borrow_limit_devices,
        priority: queue.spec.priority,
        namespaces: queue.spec.namespaces.clone(),
    }
}

fn by_deployment(placements: Vec<Arc<ExpertPlacement>>) -> BTreeMap<Key, Vec<Arc<ExpertPlacement>>> {
    let mut sorted: BTreeMap<Key, Vec<Arc<ExpertPlacement>>> = BTreeMap::new();
    for placement in placements {
        let Some(name) = placement.labels().get(LABEL_DEPLOYMENT).cloned() else { continue };
        let key = Key { namespace: placement.namespace().unwrap_or_default(), name };
        sorted.entry(key).or_default().push(placement);
    }
    sorted
}
