//! Why a checkpoint was refused: always which file, which tensor where there is one, and what to do.

use std::path::PathBuf;

/// An error of opening or reading a checkpoint. Nothing half-read is kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file or folder cannot be opened or read.
    #[error("{}: {doing}: {source}: check that the file exists and is readable", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done, naming the tensor where there is one.
        doing: String,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file is shorter than its header says, or shrank.
    #[error("{}: {what} ends at byte {needed}, the file has {found}: download the file again", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// The header or a tensor.
        what: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes there.
        found: u64,
    },
    /// The safetensors header breaks the format.
    #[error("{}: {problem}: write the file again with a safetensors library", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong, naming the tensor where there is one.
        problem: String,
    },
    /// A JSON file of the checkpoint is not what it should be.
    #[error("{}: {problem}: take the file from the model's publisher again", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// No file of the checkpoint has the tensor.
    #[error("{}: tensor {tensor} is missing: {remedy}", path.display())]
    Missing {
        /// The checkpoint's folder or file.
        path: PathBuf,
        /// The name looked for, or the names.
        tensor: String,
        /// What to do.
        remedy: String,
    },
    /// A tensor has another type than what its place asks for.
    #[error("{}: tensor {tensor} has dtype {found}, expected {expected}: convert the checkpoint", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        found: String,
        /// What would do.
        expected: &'static str,
    },
    /// A tensor has another shape than the config implies.
    #[error("{}: tensor {tensor} has shape {found:?}, expected {expected}: config.json and weights are not of one model", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// What would do.
        expected: String,
    },
    /// A path leads outside the roots that are allowed.
    #[error("{} is outside the allowed roots ({}): move the checkpoint or allow its folder", path.display(), show(roots))]
    Outside {
        /// The path with all links followed.
        path: PathBuf,
        /// What is allowed.
        roots: Vec<PathBuf>,
    },
    /// The URI is not one that this build reads.
    #[error("weights uri {uri:?}: {problem}: use file:// with an absolute path")]
    Uri {
        /// The text given.
        uri: String,
        /// What is wrong.
        problem: String,
    },
    /// The machine has not the memory for a tensor.
    #[error("{}: tensor {tensor} needs {bytes} bytes that are not available: free slots or use a device with more memory", path.display())]
    Memory {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its size.
        bytes: u64,
    },
}

fn show(roots: &[PathBuf]) -> String {
    roots.iter().map(|r| r.display().to_string()).collect::<Vec<_>>().join(", ")
}
