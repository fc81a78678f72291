//! One node: device health, workers, orders.

pub mod worker;
