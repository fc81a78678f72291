//! Small fleets and a small model.

use std::collections::BTreeMap;

use crate::{Device, Goal, Instance, Problem, Standing, Survive};
use berth_types::{Bytes, Geometry, Revision, Scoring, Vendor, WeightFormat};

pub(super) fn device(id: &str) -> Device {
    Device {
        id: id.parse().unwrap(),
        rack: None,
        domain: None,
        card: String::new(),
        vendor: Vendor::Nvidia,
        product: "H200".to_owned(),
        memory: Bytes(1 << 30),
        workspace: Bytes(0),
        committed: Bytes(0),
        speed: 1.0,
        computes: Vec::new(),
        degraded: false,
        standing: Standing::Open,
    }
}

/// `each` devices on each of `nodes` nodes.
pub(super) fn sites(nodes: usize, each: usize) -> Vec<Device> {
    (0..nodes).flat_map(|node| (1..=each).map(move |at| device(&format!("node-{node}/0000:0{at}:00.0")))).collect()
}

/// An instance with three expert layers on `devices`.
pub(super) fn problem(experts: u32, devices: Vec<Device>) -> Problem {
    let geometry = Geometry {
        layers: 4,
        dense_layers: 1,
        experts,
        shared_experts: 1,
        top_k: 2,
        groups: 1,
        groups_kept: 1,
        scoring: Scoring::Sigmoid,
        hash_layers: 0,
        hidden: 64,
        expert_width: 32,
        format: WeightFormat::Bf16,
    };
    Problem {
        now_ms: 0,
        seed: 0,
        goal: Goal::Repair,
        effort: Problem::EFFORT,
        threads: 1,
        payback: crate::Payback::default(),
        instance: Instance {
            name: "models/v3-0".parse().unwrap(),
            revision: Revision(1),
            geometry,
            formats: BTreeMap::new(),
            reserve: Bytes(0),
            vendors: Vec::new(),
            products: Vec::new(),
            devices: None,
            granted: None,
            cross_vendor: false,
            blast_radius_percent: None,
            survive: Survive::Nothing,
            extra_replicas: 0,
            loads: BTreeMap::new(),
            sharing: crate::Sharing::Even,
        },
        devices,
        held: Vec::new(),
    }
}
