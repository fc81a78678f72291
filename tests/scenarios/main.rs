//! Scenarios on a real control plane with the process kubelet, one module a topic. They share one control
//! plane, each with a namespace of its own; what must be alone starts its own.

mod cluster;
mod crd_rules;
mod kubelet;
mod lifetime;
mod operator;
mod surroundings;
