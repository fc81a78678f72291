//! Decides where expert replicas live: pure functions.
