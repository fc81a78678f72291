//! What can go wrong in the maths, with the shape or limit that was violated.
//!
//! Every message names the field and the remedy; nothing here is ever turned into a panic.

use crate::backend::BackendKind;

/// An error of packing, routing or a forward call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A buffer's length does not follow from the sizes given with it.
    #[error("{what} has {got} elements, expected {expected} ({because}): pass a buffer of that length")]
    Length {
        /// The argument.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length that the other arguments imply.
        expected: usize,
        /// How the expected length follows.
        because: String,
    },
    /// A value is outside what the call allows.
    #[error("{what}: {problem}")]
    Invalid {
        /// The argument or field.
        what: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// An expert index is outside the table given with the batch.
    #[error("experts[{position}] is {index}, but the table has {table} experts: send indices into the table")]
    UnknownExpert {
        /// Position in `Batch::experts`.
        position: usize,
        /// The index found there.
        index: u32,
        /// Size of the table.
        table: usize,
    },
    /// An expert was packed by another backend.
    #[error("table[{index}] was packed by the {packed} backend, this is {here}: pack it again with this backend")]
    ForeignExpert {
        /// Index in the table.
        index: usize,
        /// Backend that packed it.
        packed: BackendKind,
        /// Backend that was called.
        here: BackendKind,
    },
    /// The machine has not the memory.
    #[error("{bytes} bytes for {what} are not available: free slots or use a device with more memory")]
    Memory {
        /// What the memory was for.
        what: &'static str,
        /// Bytes asked for.
        bytes: u64,
    },
    /// A vendor library is missing or broken.
    #[error("{library} cannot be opened ({cause}): install the {vendor} driver, or use --backend cpu")]
    LibraryMissing {
        /// File name of the library.
        library: &'static str,
        /// Who ships it.
        vendor: &'static str,
        /// The loader's words.
        cause: String,
    },
    /// The library is there, but this build has no kernels for it.
    #[error("this build has no {backend} kernels ({found} is installed): use --backend cpu")]
    NotBuilt {
        /// The backend asked for.
        backend: BackendKind,
        /// The library that was found.
        found: &'static str,
    },
    /// A worker thread pool could not be started.
    #[error("starting {threads} compute threads: {cause}: lower --threads or raise the process limit")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// The system's words.
        cause: String,
    },
}

impl KernelError {
    pub(crate) fn invalid(what: &'static str, problem: impl Into<String>) -> Self {
        Self::Invalid { what, problem: problem.into() }
    }
}

/// Checks one buffer's length.
pub(crate) fn check_len(
    what: &'static str,
    got: usize,
    expected: usize,
    because: impl FnOnce() -> String,
) -> Result<(), KernelError> {
    if got == expected {
        return Ok(());
    }
    Err(KernelError::Length { what, got, expected, because: because() })
}

/// A zeroed vector, or an error instead of an abort when memory is short.
pub(crate) fn zeroed<T: Clone + Default>(what: &'static str, len: usize) -> Result<Vec<T>, KernelError> {
    let mut v = Vec::new();
    v.try_reserve_exact(len)
        .map_err(|_| KernelError::Memory { what, bytes: crate::num::u64_of(len.saturating_mul(size_of::<T>())) })?;
    v.resize(len, T::default());
    Ok(v)
}
