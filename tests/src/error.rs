//! What can go wrong while setting up a test: each error says what was being done, to what, and what to look
//! at next. Never used for a finding of a test, which is an assertion.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// The error of everything in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file operation went wrong.
    #[error("{doing} {path}: {source}")]
    File {
        /// What was being done, as a verb.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it did not work.
        source: std::io::Error,
    },
    /// A program could not be started.
    #[error("start {program}: {source}")]
    Start {
        /// Its name or path.
        program: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A program ran and did not succeed.
    #[error("`{command}` ended with {status}: {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// Its exit status, or how it was ended.
        status: String,
        /// What it wrote to its standard error.
        stderr: String,
    },
    /// Something did not come about in time.
    #[error("{what} is not ready after {waited:?}; see {log}\n{tail}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
        /// The log to look at.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
    },
    /// The API server refused or could not be reached.
    #[error("{doing}: {source}")]
    Api {
        /// What was being asked.
        doing: String,
        /// The client's error.
        source: Box<kube::Error>,
    },
    /// A kubeconfig could not be used.
    #[error("kubeconfig {path}: {why}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// No free port or address is left on loopback.
    #[error("no free {what} on 127.0.0.0/8 is left")]
    NoAddress {
        /// What was looked for.
        what: &'static str,
    },
    /// A runner did not do what it was asked.
    #[error("{doing}: {why}")]
    Runner {
        /// What was being asked.
        doing: String,
        /// What came back.
        why: String,
    },
    /// The system did not get where it should in time.
    #[error("waited {waited:?} for {what}; last seen: {state}")]
    Wait {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
        /// The state at the end.
        state: String,
    },
    /// Something that was named does not exist here.
    #[error("there is no {what} {name:?} here")]
    Unknown {
        /// The kind of thing.
        what: &'static str,
        /// Its name.
        name: String,
    },
}

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Returns a closure for `map_err` that names the file and what was being done to it.
    pub(crate) fn file(doing: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::File { doing, path, source }
    }

    /// Returns a closure for `map_err` that names what the API server was asked for.
    pub(crate) fn api(doing: impl Into<String>) -> impl FnOnce(kube::Error) -> Self {
        let doing = doing.into();
        move |source| Self::Api { doing, source: Box::new(source) }
    }
}
