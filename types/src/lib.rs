//! The words of Berth: ids, units, health, memory and model geometry.
//!
//! Everything that two parts must mean in the same way lives here, once. The crate holds values and
//! arithmetic only: no I/O, no clock, no Kubernetes, no wire.

pub mod health;
pub mod ids;
pub mod memory;
pub mod model;
pub mod units;

pub use health::{Action, Admission, DeviceState, Health, Reason, Scope};
pub use ids::{DeviceId, Epoch, ExpertId, LayerId, NodeName, PlacementName, Revision, Vendor};
pub use memory::{DeviceMemory, MemoryShort};
pub use model::{Geometry, Scoring, WeightFormat};
pub use units::{Bytes, TokensPerSecond};
