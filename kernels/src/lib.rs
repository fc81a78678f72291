//! Expert mathematics: stored formats, routing, backends, checkpoints.
//!
//! Everything Berth computes on weights goes through this crate, so that one conformance suite speaks for all of it.
//! It must never know of Kubernetes, of the wire or of an async runtime, and a missing vendor library is an error
//! value here, never a panic.

pub mod backend;
pub mod bench;
pub mod checkpoint;
mod computes;
pub mod conformance;
pub mod cpu;
mod error;
pub mod format;
pub mod linear;
mod num;
pub mod routing;
pub mod validation;
pub mod vendor;

pub use backend::{Backend, BackendKind, Batch, MemoryUse, PackedExpert, StoredExpert, open};
pub use checkpoint::{Checkpoint, CheckpointError, Roots};
pub use computes::computes;

pub use error::KernelError;
pub use format::{ScaleType, StoredFormat, StoredMatrix};
pub use linear::Linear;
pub use routing::{Router, Scoring};
