//! Real control plane, doubles, scenarios.
