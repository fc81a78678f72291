//! What can go wrong while a model is loaded and while a step runs. Messages name the field, tensor or expert and
//! the remedy; they never carry prompts or activations.

use std::{path::PathBuf, time::Duration};

use berth_kernels::{CheckpointError, KernelError};
use berth_types::{ExpertId, LayerId};

/// A checkpoint that cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A field of `config.json` holds what this build cannot serve.
    #[error("config.json: field {field} is {value}: supported is {supported}")]
    Config {
        /// Path of the field.
        field: String,
        /// What it holds, shortened.
        value: String,
        /// What it may hold.
        supported: &'static str,
    },
    /// A field of `config.json` is not there.
    #[error("config.json: field {field} is missing: take the file that was published with the weights")]
    ConfigMissing {
        /// Path of the field.
        field: String,
    },
    /// Reading tensors.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A tensor cannot be packed.
    #[error("tensor {tensor}: {source}")]
    Pack {
        /// Its name.
        tensor: String,
        /// Why.
        source: KernelError,
    },
    /// A vector has another length than `config.json` implies.
    #[error("tensor {tensor} has {found} values, config.json implies {expected}: take both from one checkpoint")]
    Length {
        /// Its name.
        tensor: String,
        /// Its length.
        found: usize,
        /// What it should be.
        expected: usize,
    },
    /// A table of whole numbers that contradicts `config.json`.
    #[error("tensor {tensor} {problem}: take both from one checkpoint")]
    Table {
        /// Its name.
        tensor: String,
        /// What is wrong.
        problem: String,
    },
    /// `tokenizer.json` cannot be used.
    #[error("{}: {problem}: take the tokenizer.json that was published with the weights", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A prompt cannot become tokens.
    #[error("prompt: {problem}")]
    Prompt {
        /// What is wrong and what would be right; never the prompt itself.
        problem: String,
    },
}

/// Why routed experts gave no answer.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExpertsError {
    /// No placement to compute on.
    #[error("no placement is routed yet: see the ExpertPlacement's conditions")]
    NoRoutes,
    /// Nobody could compute an expert for longer than the deadline.
    #[error(
        "expert {expert} of layer {layer} had no live replica for {waited:?} ({last}): see the ExpertPlacement's conditions"
    )]
    NoReplica {
        /// Layer of the expert.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// How long was waited.
        waited: Duration,
        /// The last refusal.
        last: String,
    },
    /// A worker says that the request itself is wrong.
    #[error("layer {layer}: {device} refused the call as invalid: {detail}")]
    Invalid {
        /// Layer of the call.
        layer: LayerId,
        /// The device.
        device: String,
        /// The worker's words.
        detail: String,
    },
    /// The maths failed.
    #[error("layer {layer}: {detail}")]
    Kernel {
        /// Layer of the call.
        layer: LayerId,
        /// The kernel's words.
        detail: String,
    },
    /// The runner is stopping.
    #[error("the runner is stopping: send the request to another instance")]
    Stopped,
}

/// Why a step was not finished.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StepError {
    /// Non-expert maths.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Routed experts.
    #[error(transparent)]
    Experts(#[from] ExpertsError),
    /// The cache of a sequence is one of another model.
    #[error("the sequence's cache belongs to another model: begin the request again")]
    Foreign,
    /// Nobody waits for the step any more.
    #[error("the request was cancelled")]
    Cancelled,
}
