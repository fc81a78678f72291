//! A DeviceTaintRule for each barred device, where the API server serves them, so that Kubernetes' own scheduler gives no
//! such device away. The names that DRA drivers gave a device are found by its UUID or bus address in the ResourceSlices
//! of its node; a device that no slice names gets none, and that is said once.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use berth_crds::{AcceleratorNode, accelerator_node::DeviceStatus, managers};
use berth_runtime::Clock;
use berth_types::{Admission, DeviceId};
use kube::{
    Api, ResourceExt as _,
    api::{ApiResource, DynamicObject, GroupVersionKind, ListParams},
};
use serde_json::{Value, json};

use super::signs::TAINT;
use crate::writes::{Writes, hash_of};

const GROUP: &str = "resource.k8s.io";
/// Versions of DeviceTaintRule, the best first.
const VERSIONS: [&str; 2] = ["v1", "v1beta2"];
/// Whether the API is served is asked again after this.
const ASK_AGAIN: Duration = Duration::from_secs(600);
/// Rules are compared with what is there after this, though nothing changed.
const COMPARE_AGAIN: Duration = Duration::from_secs(60);
/// Longest wait for one answer.
const READ_LIMIT: Duration = Duration::from_secs(10);
/// Label of the rules that are ours.
const OURS: (&str, &str) = ("app.kubernetes.io/managed-by", managers::OPERATOR);

/// What a DRA driver calls a device.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Named {
    driver: String,
    pool: String,
    device: String,
}

/// Keeps the rules.
#[derive(Debug, Default)]
pub struct DeviceTaints {
    asked: Option<Duration>,
    served: Option<&'static str>,
    compared: Option<Duration>,
    barred: BTreeMap<DeviceId, String>,
    nameless: BTreeSet<DeviceId>,
}

impl DeviceTaints {
    /// One pass; what goes wrong is logged and tried again. Calls nobody while nothing is barred and nothing was.
    pub async fn pass(&mut self, writes: &Writes, clock: &Clock, accelerators: &[Arc<AcceleratorNode>]) {
        let now = clock.now();
        let due = |at: Option<Duration>, every| at.is_none_or(|at| now.saturating_sub(at) >= every);
        if due(self.asked, ASK_AGAIN) {
            self.served = served(writes, clock).await;
            self.asked = Some(now);
        }
        let Some(version) = self.served else { return };
        let devices: Vec<&DeviceStatus> = barred(accelerators).collect();
        let reason = |device: &&DeviceStatus| {
            (device.device.clone(), device.reason.map_or("Barred", |reason| reason.as_str()).to_owned())
        };
        let wanted: BTreeMap<DeviceId, String> = devices.iter().map(reason).collect();
        let idle = wanted.is_empty() && self.barred.is_empty() && self.compared.is_some();
        if idle || (wanted == self.barred && !due(self.compared, COMPARE_AGAIN)) {
            return;
        }
        match self.compare(writes, clock, version, &devices).await {
            Ok(()) => (self.barred, self.compared) = (wanted, Some(now)),
            Err(why) => {
                // No right, most likely: the API came after the chart. Asked again in ASK_AGAIN.
                tracing::warn!(why, "device taints are not as they should be");
                self.served = None;
            }
        }
    }

    async fn compare(
        &mut self,
        writes: &Writes,
        clock: &Clock,
        version: &'static str,
        devices: &[&DeviceStatus],
    ) -> Result<(), String> {
        let rules = resource(version, "DeviceTaintRule", "devicetaintrules");
        let api: Api<DynamicObject> = Api::all_with(writes.client(), &rules);
        let label = format!("{}={}", OURS.0, OURS.1);
        let there = list(clock, &api, &ListParams::default().labels(&label)).await?;
        let mut wanted = BTreeMap::new();
        for device in devices {
            let names = self.names(writes, clock, device).await?;
            let reason = device.reason.map_or("Barred", |reason| reason.as_str());
            wanted.extend(names.into_iter().map(|named| (name_of(&named), body(version, &named, reason))));
        }
        for rule in there.iter().filter(|rule| !wanted.contains_key(&rule.name_any())) {
            writes.delete_dynamic(&api, &rules, rule).await.map_err(|error| error.to_string())?;
        }
        for (name, body) in wanted {
            let same = |rule: &&DynamicObject| rule.name_any() == name && rule.data["spec"] == body["spec"];
            if !there.iter().any(|rule| same(&rule)) {
                writes.apply_dynamic(&api, &rules, &name, &body).await.map_err(|error| error.to_string())?;
            }
        }
        Ok(())
    }

    /// What DRA drivers call a device.
    async fn names(&mut self, writes: &Writes, clock: &Clock, device: &DeviceStatus) -> Result<Vec<Named>, String> {
        let slices = resource("v1", "ResourceSlice", "resourceslices");
        let api: Api<DynamicObject> = Api::all_with(writes.client(), &slices);
        let node = ListParams::default().fields(&format!("spec.nodeName={}", device.device.node()));
        let found: Vec<Named> =
            list(clock, &api, &node).await?.iter().flat_map(|slice| named(&slice.data, device)).collect();
        if found.is_empty() {
            if self.nameless.insert(device.device.clone()) {
                tracing::info!(device = %device.device, "no ResourceSlice names it: no DeviceTaintRule is made");
            }
        } else {
            self.nameless.remove(&device.device);
        }
        Ok(found)
    }
}

fn barred(accelerators: &[Arc<AcceleratorNode>]) -> impl Iterator<Item = &DeviceStatus> {
    let devices = accelerators.iter().filter_map(|object| object.status.as_ref()).flat_map(|status| &status.devices);
    devices.filter(|device| device.admission == Admission::Barred)
}

fn resource(version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(GROUP, version, kind), plural)
}

/// The best version of DeviceTaintRule that is served.
async fn served(writes: &Writes, clock: &Clock) -> Option<&'static str> {
    for version in VERSIONS {
        let client = writes.client();
        let group = format!("{GROUP}/{version}");
        let answer = clock.timeout(READ_LIMIT, client.list_api_group_resources(&group)).await;
        if let Ok(Ok(list)) = answer
            && list.resources.iter().any(|resource| resource.name == "devicetaintrules")
        {
            tracing::info!(version, "DeviceTaintRules are served: barred devices get one");
            return Some(version);
        }
    }
    None
}

async fn list(clock: &Clock, api: &Api<DynamicObject>, parameters: &ListParams) -> Result<Vec<DynamicObject>, String> {
    match clock.timeout(READ_LIMIT, api.list(parameters)).await {
        Ok(Ok(list)) => Ok(list.items),
        Ok(Err(error)) => Err(error.to_string()),
        Err(elapsed) => Err(elapsed.to_string()),
    }
}

/// Devices of a slice that are `device`: one attribute is its UUID, or its address on the bus.
fn named(slice: &Value, device: &DeviceStatus) -> Vec<Named> {
    let text = |pointer: &str| slice.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (driver, pool) = (text("/spec/driver"), text("/spec/pool/name"));
    let is_it = |attribute: &Value| {
        let value = attribute["string"].as_str().unwrap_or_default();
        !value.is_empty()
            && (value.eq_ignore_ascii_case(&device.uuid) || value.eq_ignore_ascii_case(device.device.local()))
    };
    let devices = slice.pointer("/spec/devices").and_then(Value::as_array).into_iter().flatten();
    let same = devices.filter(|one| one["attributes"].as_object().is_some_and(|all| all.values().any(is_it)));
    let name = |one: &Value| {
        Some(Named { driver: driver.clone(), pool: pool.clone(), device: one["name"].as_str()?.to_owned() })
    };
    same.filter_map(name).collect()
}

fn name_of(Named { driver, pool, device }: &Named) -> String {
    format!("berth-{}", hash_of(&json!([driver, pool, device])))
}

fn body(version: &str, Named { driver, pool, device }: &Named, reason: &str) -> Value {
    json!({
        "apiVersion": format!("{GROUP}/{version}"),
        "kind": "DeviceTaintRule",
        "metadata": {"name": name_of(&Named { driver: driver.clone(), pool: pool.clone(), device: device.clone() }), "labels": {OURS.0: OURS.1}},
        "spec": {
            "deviceSelector": {"driver": driver, "pool": pool, "device": device},
            "taint": {"key": TAINT, "value": reason, "effect": "NoSchedule"},
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(uuid: &str) -> DeviceStatus {
        serde_json::from_value(
            json!({"device": "gpu-07/0000:3b:00.0", "vendor": "nvidia", "product": "H100", "uuid": uuid,
            "memoryBytes": 1, "health": "Unhealthy", "admission": "Barred", "action": "RebootNode"}),
        )
        .unwrap()
    }

    #[test]
    fn a_device_is_found_by_its_uuid_or_bus_address_and_never_by_nothing() {
        let slice = json!({"spec": {"driver": "gpu.nvidia.com", "pool": {"name": "gpu-07"}, "devices": [
            {"name": "gpu-0", "attributes": {"uuid": {"string": "GPU-aa"}, "index": {"int": 0}}},
            {"name": "gpu-1", "attributes": {"uuid": {"string": "GPU-bb"}, "resource.kubernetes.io/pciBusID": {"string": "0000:3B:00.0"}}},
            {"name": "bare"}, {"name": "empty", "attributes": {"uuid": {"string": ""}}}]}});
        let names = |uuid| named(&slice, &device(uuid)).into_iter().map(|one| one.device).collect::<Vec<_>>();
        assert_eq!(names("gpu-aa"), ["gpu-0", "gpu-1"]);
        assert_eq!(names(""), ["gpu-1"]);
        assert!(named(&json!({"spec": {"driver": "d"}}), &device("GPU-aa")).is_empty());
    }
}
