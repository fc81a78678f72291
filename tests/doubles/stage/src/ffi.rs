//! Writing through a caller's pointers, and the symbols that drive a double from outside.
#![expect(unsafe_code, reason = "a C ABI is what doubles are for")]

use std::{
    ffi::{c_char, c_int, c_uint},
    ptr,
};

/// Writes `value` where the caller wants it.
///
/// # Errors
/// `refusal`, for a null pointer.
///
/// # Safety
/// `out` is null or valid for a write of `T`.
pub unsafe fn put<T>(out: *mut T, value: T, refusal: c_int) -> Result<(), c_int> {
    if out.is_null() {
        return Err(refusal);
    }
    // SAFETY: not null, and the caller vouches for the rest.
    unsafe { out.write(value) };
    Ok(())
}

/// Writes `text` and its end into a buffer of `length`.
///
/// # Errors
/// `refusal`, when it does not fit.
///
/// # Safety
/// `out` is null or valid for writes of `length` bytes.
pub unsafe fn put_text(out: *mut c_char, length: c_uint, text: &str, refusal: c_int) -> Result<(), c_int> {
    let room = usize::try_from(length).unwrap_or(0);
    if out.is_null() || text.len() >= room {
        return Err(refusal);
    }
    // SAFETY: the text and its end fit, and the two cannot overlap.
    unsafe {
        ptr::copy_nonoverlapping(text.as_ptr(), out.cast(), text.len());
        out.add(text.len()).write(0);
    }
    Ok(())
}

/// Bytes at a pointer.
///
/// # Safety
/// `text` is valid for `length` bytes while the answer is used.
#[must_use]
pub unsafe fn bytes<'a>(text: *const u8, length: usize) -> &'a [u8] {
    // SAFETY: as this function.
    unsafe { std::slice::from_raw_parts(text, length) }
}

/// Exports `berth_double_configure`, `_apply`, `_host` and `_stop` for the instance that `$instance()` gives.
#[macro_export]
macro_rules! controls {
    ($library:ty, $instance:path) => {
        /// Starts over with the header line at `text`; 0 = done, -1 = not understood.
        ///
        /// # Safety
        /// `text` is valid for `length` bytes.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn berth_double_configure(text: *const u8, length: usize) -> i64 {
            // SAFETY: as this function.
            let bytes = unsafe { $crate::ffi::bytes(text, length) };
            match serde_json::from_slice::<<$library as $crate::Library>::Header>(bytes) {
                Ok(header) => {
                    $instance().configure(&header);
                    0
                }
                Err(_) => -1,
            }
        }

        /// Applies one script line; answers how many events it will deliver, -1 = not understood.
        ///
        /// # Safety
        /// `text` is valid for `length` bytes.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn berth_double_apply(text: *const u8, length: usize) -> i64 {
            // SAFETY: as this function.
            let bytes = unsafe { $crate::ffi::bytes(text, length) };
            let line = serde_json::from_slice::<<$library as $crate::Library>::Line>(bytes);
            let applied = line.map_err(|error| error.to_string()).and_then(|line| $instance().apply(&line));
            applied.map_or(-1, i64::from)
        }

        /// Hands hangs and deliveries to the process that opened the double.
        ///
        /// # Safety
        /// Both functions may be called from any thread, for ever.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn berth_double_host(hang: $crate::Hang, delivered: $crate::Delivered) {
            $instance().host($crate::Host { hang, delivered });
        }

        /// Ends every wait for events.
        ///
        /// # Safety
        /// Always safe; the ABI makes it unsafe.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn berth_double_stop() {
            $instance().stop();
        }
    };
}
