//! What there is and what is wanted, counted for whoever watches the cluster: supply by vendor and pool, devices by
//! state, demand by deployment, use by queue. Pure, and nothing is decided by it.

use std::collections::{BTreeMap, BTreeSet};

use berth_crds::{AcceleratorNode, ExpertPlacement, ModelDeployment};
use berth_runtime::telemetry::{Labels, count, large};
use berth_types::{Bytes, DeviceId, Vendor};

use crate::{
    allocation::{Claim, Key, Queue, Usage, Verdict, WaitReason},
    fleet::FleetDevice,
    watches::key_of,
};

/// Gauges by their labels; the fields are the metrics of the same names.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Survey {
    /// Devices by vendor, pool, health and admission.
    pub devices: BTreeMap<Labels, f64>,
    /// Devices that exist, by vendor and pool.
    pub total: BTreeMap<Labels, f64>,
    /// Devices that new replicas may go to.
    pub allocatable: BTreeMap<Labels, f64>,
    /// Devices that a placement is assigned to.
    pub used: BTreeMap<Labels, f64>,
    /// Bytes of all.
    pub total_bytes: BTreeMap<Labels, f64>,
    /// Bytes of the allocatable.
    pub allocatable_bytes: BTreeMap<Labels, f64>,
    /// Instances wanted, by deployment.
    pub demand: BTreeMap<Labels, f64>,
    /// Devices that these need.
    pub demand_devices: BTreeMap<Labels, f64>,
    /// Instances granted.
    pub granted: BTreeMap<Labels, f64>,
    /// Instances that answer.
    pub ready: BTreeMap<Labels, f64>,
    /// Deployments that wait, by reason; every reason is there.
    pub waiting: BTreeMap<Labels, f64>,
    /// By queue.
    pub queue_quota: BTreeMap<Labels, f64>,
    /// By queue.
    pub queue_used: BTreeMap<Labels, f64>,
    /// By queue.
    pub queue_borrowed: BTreeMap<Labels, f64>,
    /// By queue.
    pub queue_waiting: BTreeMap<Labels, f64>,
}

fn add(gauges: &mut BTreeMap<Labels, f64>, labels: Labels, value: f64) {
    *gauges.entry(labels).or_default() += value;
}

fn pool(vendor: Vendor, product: &str) -> Labels {
    vec![("vendor", vendor.to_string()), ("pool", product.to_owned())]
}

fn deployment(key: &Key) -> Labels {
    vec![("namespace", key.namespace.clone()), ("deployment", key.name.clone())]
}

impl Survey {
    /// Counts what exists: every device in `nodes`, those of `fleet` as allocatable, those that `placements`
    /// are assigned to as used. A pool has a number in each, be it 0.
    pub fn supply<'a>(
        &mut self,
        nodes: impl IntoIterator<Item = &'a AcceleratorNode>,
        fleet: &[FleetDevice],
        placements: impl IntoIterator<Item = &'a ExpertPlacement>,
    ) {
        let assignments = placements.into_iter().filter_map(|placement| placement.status.as_ref()?.assignment.as_ref());
        let assigned: BTreeSet<&DeviceId> = assignments.flat_map(|assignment| &assignment.devices).collect();
        for device in nodes.into_iter().filter_map(|node| node.status.as_ref()).flat_map(|status| &status.devices) {
            let labels = pool(device.vendor, &device.product);
            let Bytes(bytes) = device.memory_bytes;
            add(&mut self.total, labels.clone(), 1.0);
            add(&mut self.total_bytes, labels.clone(), large(bytes));
            add(&mut self.allocatable, labels.clone(), 0.0);
            add(&mut self.allocatable_bytes, labels.clone(), 0.0);
            add(&mut self.used, labels.clone(), count(usize::from(assigned.contains(&device.device))));
            let state = [("health", device.health.to_string()), ("admission", device.admission.to_string())];
            add(&mut self.devices, labels.into_iter().chain(state).collect(), 1.0);
        }
        for FleetDevice { vendor, product, memory: Bytes(bytes), .. } in fleet {
            add(&mut self.allocatable, pool(*vendor, product), 1.0);
            add(&mut self.allocatable_bytes, pool(*vendor, product), large(*bytes));
        }
    }

    /// Counts what `claims` want and what `verdicts` give them.
    pub fn demand<'a>(
        &mut self,
        claims: &[Claim],
        verdicts: &BTreeMap<Key, Verdict>,
        deployments: impl IntoIterator<Item = &'a ModelDeployment>,
    ) {
        for reason in WaitReason::ALL {
            self.waiting.insert(vec![("reason", reason.as_str().to_owned())], 0.0);
        }
        for claim in claims {
            let labels = deployment(&claim.key);
            self.demand.insert(labels.clone(), f64::from(claim.wanted));
            if let Ok(each) = claim.per_instance {
                self.demand_devices.insert(labels.clone(), f64::from(claim.wanted) * f64::from(each));
            }
            let Some(verdict) = verdicts.get(&claim.key) else { continue };
            self.granted.insert(labels, f64::from(verdict.allowed));
            if let Some(waiting) = &verdict.waiting {
                add(&mut self.waiting, vec![("reason", waiting.reason.as_str().to_owned())], 1.0);
            }
        }
        for one in deployments {
            let ready = one.status.as_ref().map_or(0, |status| status.ready_replicas);
            self.ready.insert(deployment(&key_of(one)), f64::from(ready));
        }
    }

    /// Counts what is used of `queues`.
    pub fn queues(&mut self, queues: &BTreeMap<String, Queue>, usage: &BTreeMap<String, Usage>) {
        for (name, queue) in queues {
            let labels = || vec![("queue", name.clone())];
            let Usage { used, borrowed, waiting } = usage.get(name).copied().unwrap_or_default();
            self.queue_quota.insert(labels(), f64::from(queue.quota));
            self.queue_used.insert(labels(), f64::from(used));
            self.queue_borrowed.insert(labels(), f64::from(borrowed));
            self.queue_waiting.insert(labels(), f64::from(waiting));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocation::Waiting;

    fn node() -> AcceleratorNode {
        let device = |local: &str, health: &str, admission: &str| {
            serde_json::json!({"device": format!("gpu-1/{local}"), "vendor": "nvidia", "product": "H100",
                "uuid": "", "memoryBytes": 80, "card": local, "health": health, "admission": admission, "action": "None"})
        };
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "gpu-1"}, "spec": {"native": true},
            "status": {"bootId": "b", "sequence": 1, "devices": [
                device("0000:01:00.0", "Healthy", "Schedulable"), device("0000:02:00.0", "Unhealthy", "Barred")]},
        }))
        .unwrap()
    }

    fn one(labels: Labels, value: f64) -> BTreeMap<Labels, f64> {
        [(labels, value)].into()
    }

    #[test]
    fn supply_is_counted_by_vendor_and_pool() {
        let (node, mut survey) = (node(), Survey::default());
        survey.supply([&node], &crate::fleet::schedulable([&node]), []);
        let h100 = pool(Vendor::Nvidia, "H100");
        assert_eq!(survey.total, one(h100.clone(), 2.0));
        assert_eq!(survey.allocatable, one(h100.clone(), 1.0));
        assert_eq!((survey.used, survey.total_bytes), (one(h100.clone(), 0.0), one(h100, 160.0)));
        assert_eq!(survey.devices.values().sum::<f64>(), 2.0);
        assert_eq!(survey.devices.len(), 2);
    }

    #[test]
    fn a_deployment_that_waits_is_counted_under_its_reason() {
        let key = Key { namespace: "models".to_owned(), name: "a".to_owned() };
        let claim = Claim {
            key: key.clone(),
            created: 0,
            queue: None,
            per_instance: Ok(4),
            wanted: 3,
            held: 1,
            held_devices: 4,
        };
        let waiting = Waiting { reason: WaitReason::QuotaExceeded, message: String::new() };
        let verdict = Verdict { allowed: 1, per_instance: 4, devices: 4, priority: 0, waiting: Some(waiting) };
        let mut survey = Survey::default();
        survey.demand(&[claim], &[(key.clone(), verdict)].into(), []);
        assert_eq!(survey.demand, one(deployment(&key), 3.0));
        assert_eq!(survey.demand_devices, one(deployment(&key), 12.0));
        assert_eq!(survey.granted, one(deployment(&key), 1.0));
        let full = vec![("reason", "QuotaExceeded".to_owned())];
        assert_eq!((survey.waiting.get(&full), survey.waiting.len()), (Some(&1.0), WaitReason::ALL.len()));
    }
}
