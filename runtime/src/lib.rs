//! What every part does, so that no part does it in its own way: time, leadership, orderly ends,
//! logs and metrics, and the endpoints that a kubelet probes.
//!
//! It decides nothing about devices, placements or requests, and knows no custom resource and no wire
//! message of Berth.

pub mod admin;
pub mod clock;
pub mod discovery;
pub mod election;
pub mod lease;
pub mod part;
pub mod shutdown;
pub mod telemetry;

pub use clock::Clock;
pub use lease::{Leadership, Term};
pub use part::{Part, PartConfig, PartError};
pub use shutdown::Tasks;
