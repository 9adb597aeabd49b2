//! From a fault below to an exception of `tdpmmu.errors`.
//!
//! The classes are defined in Python: subclassing a native exception type needs Python 3.12 under the stable
//! ABI, and the attributes are the Python face's business. They are looked up once.

use pyo3::exceptions::{PyKeyboardInterrupt, PyOSError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

/// What can go wrong under the boundary, in the terms of `tdpmmu.errors`.
#[derive(Debug)]
#[allow(dead_code)] // variants are bound as the crates below land
pub enum Fault {
    /// A configuration or an argument that breaks a rule; the message names the value and the rule.
    Invalid(String),
    /// Needs more memory than there is, or than a cap allows.
    Memory { message: String, needed_bytes: u64, available_bytes: u64 },
    /// A recording that cannot be read.
    Trace { message: String, path: String, line: u64, offset: u64, column: Option<u64>, text: String },
    /// The operating system said no (missing file, no permission, a directory).
    Os { error: std::io::Error, path: String },
    /// A check failed. `partial` is what was measured until then, JSON text or empty.
    Violation { message: String, partial: String },
    /// The object was closed.
    Closed(String),
    /// Used in a child of the process that made it.
    Forked(String),
    /// Somebody else uses it.
    Busy(String),
    /// A vCPU's dirty ring is full.
    RingFull(String),
    /// Did not finish in the time given.
    Stall(String),
    /// Not in this build or not on this host.
    Unsupported(String),
    /// Stopped because it was asked to.
    Cancelled,
    /// A defect of tdpmmu.
    Internal(String),
}

impl Fault {
    /// The exception for this fault. Needs the interpreter: called on the calling thread only.
    pub fn into_pyerr(self, py: Python<'_>) -> PyErr {
        match self {
            Fault::Invalid(message) => raise(py, "InvalidArgument", &message, |_| Ok(())),
            Fault::Memory { message, needed_bytes, available_bytes } => {
                raise(py, "OutOfTableMemory", &message, |kw| {
                    kw.set_item("needed_bytes", needed_bytes)?;
                    kw.set_item("available_bytes", available_bytes)
                })
            }
            Fault::Trace { message, path, line, offset, column, text } => {
                raise(py, "TraceError", &message, |kw| {
                    kw.set_item("path", path)?;
                    kw.set_item("line", line)?;
                    kw.set_item("offset", offset)?;
                    kw.set_item("column", column)?;
                    kw.set_item("text", text)
                })
            }
            // With errno and a file name OSError picks FileNotFoundError and its sisters by itself.
            Fault::Os { error, path } => match error.raw_os_error() {
                Some(errno) => PyOSError::new_err((errno, os_text(&error), path)),
                None => PyOSError::new_err(format!("{path}: {error}")),
            },
            Fault::Violation { message, partial } => raise(py, "OracleViolation", &message, |kw| {
                kw.set_item("partial", if partial.is_empty() { None } else { Some(partial) })
            }),
            Fault::Closed(message) => raise(py, "Closed", &message, |_| Ok(())),
            Fault::Forked(message) => raise(py, "ForkedError", &message, |_| Ok(())),
            Fault::Busy(message) => raise(py, "Busy", &message, |_| Ok(())),
            Fault::RingFull(message) => raise(py, "DirtyRingFull", &message, |_| Ok(())),
            Fault::Stall(message) => raise(py, "StallError", &message, |_| Ok(())),
            Fault::Unsupported(message) => raise(py, "Unsupported", &message, |_| Ok(())),
            Fault::Cancelled => PyKeyboardInterrupt::new_err(()),
            Fault::Internal(message) => raise(py, "InternalError", &message, |_| Ok(())),
        }
    }
}

/// The operating system's words without Rust's "(os error N)".
fn os_text(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

static ERRORS: PyOnceLock<Py<PyModule>> = PyOnceLock::new();

fn raise(
    py: Python<'_>,
    class: &str,
    message: &str,
    fill: impl FnOnce(&Bound<'_, PyDict>) -> PyResult<()>,
) -> PyErr {
    let build = || -> PyResult<PyErr> {
        let module = ERRORS.get_or_try_init(py, || py.import("tdpmmu.errors").map(Bound::unbind))?;
        let keywords = PyDict::new(py);
        fill(&keywords)?;
        let value = module.bind(py).getattr(class)?.call((message,), Some(&keywords))?;
        Ok(PyErr::from_value(value))
    };
    // If the error's own class cannot be made, that failure is the more useful exception.
    build().unwrap_or_else(|error| error)
}
