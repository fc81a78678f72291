//! One node: device health, workers, orders.
