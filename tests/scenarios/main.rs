//! Scenarios on a real control plane with the process kubelet, one module a topic. They share one control
//! plane, each with a namespace of its own; what must be alone starts its own.

#![expect(clippy::unwrap_used, reason = "a helper of a scenario fails it like the scenario itself")]

mod agent;
mod alerts;
mod chart;
mod cluster;
mod crd_rules;
mod demo;
mod fleet;
mod install;
mod kubelet;
mod lifetime;
mod observe;
mod operator;
mod remediation;
mod ring;
mod scheduler;
mod store;
mod surroundings;
mod views;
