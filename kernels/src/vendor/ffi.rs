//! dlopen and dlsym of a vendor library, nothing else.
#![expect(unsafe_code, reason = "loading a shared library runs its initialisers")]

/// Whether the loader finds `library` and it exports `symbol`; otherwise the loader's words.
pub(super) fn exports(library: &str, symbol: &str) -> Result<(), String> {
    // SAFETY: the vendor's driver libraries may be loaded into any process; their initialisers only set up
    // their own state. The handle is closed when `found` goes out of scope and no symbol of it outlives that.
    let found = unsafe { libloading::Library::new(library) }.map_err(|e| words(&e))?;
    // SAFETY: the symbol's address is only looked up, never called or dereferenced, so its type does not matter.
    unsafe { found.get::<*const ()>(symbol.as_bytes()) }.map(|_| ()).map_err(|e| format!("{symbol}: {}", words(&e)))
}

/// An error and what caused it, in one line.
fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
