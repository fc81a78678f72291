//! Why a shelf is not loaded: every message names what is wrong and what to do.

use berth_kernels::{CheckpointError, KernelError};
use berth_types::{Bytes, ExpertId, LayerId, model::GeometryError};

/// Why a shelf is not loaded. Every message names what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The checkpoint cannot be read through to make its digest.
    #[error("{reason}: repair the checkpoint at {uri}")]
    Identity {
        /// Where it is.
        uri: String,
        /// What the reader said.
        reason: String,
    },
    /// `config.json` does not describe a model that has experts.
    #[error("{uri}: config.json: {cause}")]
    Geometry {
        /// Where it is.
        uri: String,
        /// What is wrong.
        cause: GeometryError,
    },
    /// A field of `config.json` has a value that no expert can be computed with.
    #[error("{uri}: config.json: {field} is {value}: expected {expected}")]
    Config {
        /// Where it is.
        uri: String,
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What would do.
        expected: &'static str,
    },
    /// Other weights than the order asks for.
    #[error(
        "{uri} has digest {found}, the order wants {wanted}: put the right checkpoint there or correct weights.digest"
    )]
    Digest {
        /// Where it is.
        uri: String,
        /// Digest in the order.
        wanted: String,
        /// Digest of what is there.
        found: String,
    },
    /// A layer without experts.
    #[error("layer {layer} has no experts, layers {first} to {last} have: correct the placement")]
    Layer {
        /// The layer in the order.
        layer: LayerId,
        /// First layer with experts.
        first: u32,
        /// Last layer with experts.
        last: u32,
    },
    /// An expert beyond the model.
    #[error("layer {layer} has experts 0 to {last}, the order names {expert}: correct the placement")]
    Expert {
        /// The layer in the order.
        layer: LayerId,
        /// The expert in the order.
        expert: ExpertId,
        /// The model's last expert.
        last: u32,
    },
    /// The device is too small for what it holds and this.
    #[error(
        "{experts} more experts need {needed} and {free} are free (device {device} × 0.92 − workspace {workspace} − \
         held {held}): free a revision or plan fewer slots for this device"
    )]
    Memory {
        /// Experts that are not here yet.
        experts: usize,
        /// Bytes they take.
        needed: Bytes,
        /// Bytes left.
        free: Bytes,
        /// Bytes of the device.
        device: Bytes,
        /// Bytes of scratch.
        workspace: Bytes,
        /// Bytes held or promised to loads that run.
        held: Bytes,
    },
    /// The backend cannot pack an expert.
    #[error("layer {layer} expert {expert}: {cause}")]
    Pack {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// What the backend said.
        cause: KernelError,
    },
    /// No thread for the load.
    #[error("starting a loading thread: {cause}: raise the process limit of the node")]
    Thread {
        /// The system's words.
        cause: std::io::Error,
    },
    /// The load ended without an outcome.
    #[error("the load of {uri} broke off: look for a panic in this worker's log")]
    Broken {
        /// What was loaded.
        uri: String,
    },
    /// Nobody wants it any more.
    #[error("the load was cancelled")]
    Cancelled,
}
