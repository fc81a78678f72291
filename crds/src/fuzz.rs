//! Objects as a cluster holds them, damaged in every way: each is read or refused, what is read can be written again, and
//! nothing panics. The API server checks most of this too; an older or a foreign one may not.

use berth_mutate::each;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    AcceleratorNode, CapacityQueue, DemandReport, ExpertPlacement, ModelDeployment, ModelProfile, PlacementMap,
};

const NODE: &[u8] = br#"{"apiVersion":"berth.dev/v1alpha1","kind":"AcceleratorNode","metadata":{"name":"gpu-07"},
"spec":{"native":true,"drain":false,"cordonedDevices":[{"device":"gpu-07/0000:3b:00.0","reason":"swap"}],
"orders":[{"id":"1","device":"gpu-07/0000:3b:00.0","action":"ResetDevice","deadline":"2026-01-01T00:00:00Z"}]},
"status":{"bootId":"b","sequence":7,"devices":[{"device":"gpu-07/0000:3b:00.0","vendor":"nvidia","product":"H100",
"memoryBytes":85899345920,"health":"Unhealthy","admission":"Barred","action":"RebootNode","scope":"Device",
"reason":"DeviceLost","evidence":"Xid 79","since":"2026-01-01T00:00:00Z"}]}}"#;
const DEPLOYMENT: &[u8] =
    br#"{"apiVersion":"berth.dev/v1alpha1","kind":"ModelDeployment","metadata":{"name":"v3","namespace":"models"},
"spec":{"profile":"deepseek-v3","replicas":2,"queue":"default","weights":{"uri":"file:///models/v3"}}}"#;
const MAP: &[u8] = br#"{"apiVersion":"berth.dev/v1alpha1","kind":"PlacementMap","metadata":{"name":"v3-0-1","namespace":"models"},
"spec":{"placement":"v3-0","revision":1,"devices":["gpu-07/0000:3b:00.0"],"layers":[{"layer":1,"experts":"AAABAA=="}]}}"#;
const QUEUE: &[u8] = br#"{"apiVersion":"berth.dev/v1alpha1","kind":"CapacityQueue","metadata":{"name":"default"},
"spec":{"quota":[{"pool":"H100","devices":16}],"priority":10,"borrowing":true}}"#;

fn read<T: DeserializeOwned + Serialize>(seeds: &[&[u8]]) {
    each(seeds, 1_500, |bytes| {
        if let Ok(object) = serde_json::from_slice::<T>(bytes) {
            let _ = serde_json::to_vec(&object);
        }
    });
}

#[test]
fn damaged_objects_are_read_or_refused() {
    let seeds = [NODE, DEPLOYMENT, MAP, QUEUE];
    assert!(serde_json::from_slice::<AcceleratorNode>(NODE).is_ok());
    read::<AcceleratorNode>(&seeds);
    read::<ModelDeployment>(&seeds);
    read::<ExpertPlacement>(&seeds);
    read::<PlacementMap>(&seeds);
    read::<CapacityQueue>(&seeds);
    read::<DemandReport>(&seeds);
    read::<ModelProfile>(&seeds);
}
