//! From what is observed to what is said of a device: facts in, transitions and notes out.
//!
//! Detectors give facts, the ledger alone decides. Words and rules: the health vocabulary.

pub mod alarms;
pub mod catalog;
pub mod condition;
pub mod device;
pub mod fact;
pub mod incidents;
pub mod kmsg;
pub mod ledger;
pub mod log;
pub mod memory;
pub mod neighbours;
mod node_facts;
pub mod nvlink;
mod nvlink5;
pub mod nvrm;
mod pairs;
pub mod switch;
pub mod tail;

#[cfg(test)]
mod fuzz_tests;
#[cfg(test)]
mod ledger_tests;
#[cfg(test)]
mod memory_tests;
#[cfg(test)]
mod npu_tests;
