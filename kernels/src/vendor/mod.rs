//! Which vendor libraries this machine has.
//!
//! Opens each library only to learn whether the loader finds it; calls nothing in it and keeps nothing of it.

mod ffi;

use crate::backend::BackendKind;
use crate::error::KernelError;

/// A vendor's compute library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VendorLibrary {
    /// The backend that needs it.
    pub backend: BackendKind,
    /// Who ships it.
    pub vendor: &'static str,
    /// The file name that the loader searches.
    pub library: &'static str,
    /// A symbol that every usable version exports.
    pub symbol: &'static str,
}

/// NVIDIA's driver library.
pub const CUDA: VendorLibrary =
    VendorLibrary { backend: BackendKind::Cuda, vendor: "NVIDIA", library: "libcuda.so.1", symbol: "cuInit" };

/// Ascend's runtime library.
pub const ASCEND: VendorLibrary =
    VendorLibrary { backend: BackendKind::Ascend, vendor: "Ascend CANN", library: "libascendcl.so", symbol: "aclInit" };

/// Looks for a vendor library through the system's loader.
///
/// # Errors
/// The loader's own words, naming the library and the remedy.
pub fn probe(library: VendorLibrary) -> Result<(), KernelError> {
    ffi::exports(library.library, library.symbol).map_err(|cause| KernelError::LibraryMissing {
        library: library.library,
        vendor: library.vendor,
        cause,
    })
}

/// Why a vendor backend cannot be opened: its library is missing, or this build has no kernels for it.
pub(crate) fn missing(library: VendorLibrary) -> KernelError {
    match probe(library) {
        Err(error) => error,
        Ok(()) => KernelError::NotBuilt { backend: library.backend, found: library.library },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_names_it() {
        let nowhere = VendorLibrary { library: "libberth-does-not-exist.so.1", ..CUDA };
        let error = probe(nowhere).unwrap_err().to_string();
        assert!(error.starts_with("libberth-does-not-exist.so.1 cannot be opened ("), "{error}");
        assert!(error.ends_with("install the NVIDIA driver, or use --backend cpu"), "{error}");
    }

    #[test]
    fn a_library_without_the_symbol_is_an_error_too() {
        let wrong = VendorLibrary { library: "libc.so.6", ..ASCEND };
        assert!(probe(wrong).unwrap_err().to_string().contains("aclInit"));
        assert!(probe(VendorLibrary { symbol: "malloc", ..wrong }).is_ok());
    }
}
