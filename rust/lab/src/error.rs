//! Why an experiment gave no result.

/// What went wrong, by the exit code that it deserves.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// The request makes no sense (exit code 2).
    #[error("{0}")]
    Usage(String),
    /// It does not fit this host; found before anything was allocated (exit code 4).
    #[error("{message}")]
    Memory {
        /// Bytes that the request needs.
        needed_bytes: u64,
        /// Bytes that there are.
        available_bytes: u64,
        /// The sentence for people.
        message: String,
    },
    /// A check failed: the result exists, but must not be believed (exit code 1).
    #[error("{message}")]
    Check {
        /// What was violated.
        message: String,
        /// The result as far as it goes.
        partial: String,
    },
    /// Interrupted by the caller.
    #[error("cancelled")]
    Cancelled,
    /// A defect of ours, or a host that refuses threads (exit code 5).
    #[error("{0}")]
    Internal(String),
}

impl From<serde_json::Error> for LabError {
    fn from(error: serde_json::Error) -> Self {
        LabError::Internal(error.to_string())
    }
}
