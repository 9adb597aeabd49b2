//! Why a recording could not be run through the engine.

use std::path::PathBuf;

use tdpmmu_trace::TraceError;

/// A conformance run that has no result. A mismatch is a result, not an error.
#[derive(Debug, thiserror::Error)]
pub enum ConformError {
    /// The request makes no sense (exit code 2).
    #[error("{0}")]
    Usage(String),
    /// The recording's text cannot be read (exit code 3).
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// A recording without a script cannot be predicted: nothing says what was done to the VM (exit code 3).
    #[error(
        "{path}: {missing} is missing; a recording without its script of operations cannot be predicted (`replay --check` verifies it)"
    )]
    NoScript {
        /// The recording's folder.
        path: PathBuf,
        /// The file that is not there.
        missing: &'static str,
    },
    /// A file beside the trace breaks its format (exit code 3).
    #[error("{path}:{line}: {rule}, got {got}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Line number, from 1; 0 where the whole file is meant.
        line: u64,
        /// The rule that was broken.
        rule: &'static str,
        /// What was found.
        got: String,
    },
    /// A file could not be read or written (exit code 3).
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The caller cancelled (exit code 130).
    #[error("cancelled")]
    Cancelled,
    /// The engine did not come to an end, or refused to start (exit code 5).
    #[error("{name}: {what}")]
    Engine {
        /// The case.
        name: String,
        /// What happened.
        what: String,
    },
}

impl ConformError {
    /// The exit code that the command line gives.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Trace(_) | Self::NoScript { .. } | Self::Malformed { .. } | Self::Io { .. } => 3,
            Self::Engine { .. } => 5,
            Self::Cancelled => 130,
        }
    }
}
