//! What a command ends with. Exit codes are part of the interface: 0 success, 1 a check failed (or there
//! are changes, or something is not healthy), 2 bad usage or input, 3 not authorised.

use std::{
    io::Write,
    process::{ExitCode, Termination},
};

/// How a command that did its work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Everything it was asked holds.
    Pass,
    /// It looked, and something does not hold; the command has said what.
    Fail,
}

/// The caller may not do what it asked.
#[derive(Debug, thiserror::Error)]
#[error("{what}: not authorised; {remedy}")]
pub(crate) struct NotAuthorised {
    /// What was asked.
    pub(crate) what: String,
    /// Whom to ask for what.
    pub(crate) remedy: String,
}

impl From<bool> for Verdict {
    fn from(pass: bool) -> Self {
        if pass { Self::Pass } else { Self::Fail }
    }
}

impl Termination for Verdict {
    fn report(self) -> ExitCode {
        match self {
            Self::Pass => ExitCode::SUCCESS,
            Self::Fail => ExitCode::from(1),
        }
    }
}

/// The exit code for `outcome`; an error is written to stderr with its causes.
pub(crate) fn exit(outcome: anyhow::Result<Verdict>) -> ExitCode {
    match outcome {
        Ok(verdict) => verdict.report(),
        Err(error) => {
            // Nothing can be done when stderr itself is gone.
            let _ = writeln!(std::io::stderr(), "berth: {error:#}");
            if error.chain().any(|cause| cause.is::<NotAuthorised>()) { ExitCode::from(3) } else { ExitCode::from(2) }
        }
    }
}
