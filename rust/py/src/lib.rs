//! The Python face of tdpmmu, native half: module `tdpmmu._native`.
//!
//! Guarantees, for every function and class here:
//!
//! * **No algorithm.** Arguments are turned into the values of the crates below, results into Python
//!   objects. What is measured or decided is measured or decided in `tdpmmu-lab`, `tdpmmu-trace`, `tdpmmu-vm`.
//! * **The GIL is not held** while work is done. Long work runs on a thread of its own ([`job`]), which never
//!   touches Python; the calling thread wakes every few tens of milliseconds, looks for signals and passes
//!   progress on. Ctrl-C therefore returns promptly, and an object under it stays usable.
//! * **Nothing unwinds into Python.** A panic below becomes `tdpmmu.InternalError`.
//! * **Classes are frozen**: no method takes `&mut self`, so no call can fail with "already borrowed" when
//!   two threads share an object.
//!
//! The module is private: `python/tdpmmu` is the typed face, and validates. What arrives here with a
//! value out of range is still answered by an exception, never by undefined behaviour.

mod engine;
mod error;
mod gate;
mod guest;
mod job;
mod machine;
mod ops;
mod shadowed;
mod vm;

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;

/// How long a caller who has given up waits for work that cannot stop at once.
const ABANDON: Duration = Duration::from_millis(100);

/// JSON text: what this binary is (`profile`, `version`, `git`, `target`, `debug_assertions`).
#[pyfunction]
fn build_info() -> String {
    engine::build_info()
}

/// JSON text: what this host is (clock, membarrier, CPUs, memory, huge pages).
#[pyfunction]
fn info(py: Python<'_>) -> PyResult<String> {
    job::run(py, job::Limits::default(), None, |_| engine::info())
}

/// JSON text: the names that configurations accept, in the order they are shown.
#[pyfunction]
fn catalogue() -> String {
    engine::catalogue()
}

/// Memory that may be used now without swapping, in bytes.
#[pyfunction]
fn available_bytes() -> u64 {
    tdpmmu_lab::host::available_bytes()
}

/// Checks a kernel profile, `NAME[,switch=value]...`, and returns it with the default switches left out.
#[pyfunction]
fn profile(py: Python<'_>, text: &str) -> PyResult<String> {
    engine::profile(text).map_err(|fault| fault.into_pyerr(py))
}

/// Checks zap passes such as `1G,root` and returns them in their usual spelling.
#[pyfunction]
fn passes(py: Python<'_>, text: &str) -> PyResult<String> {
    engine::passes(text).map_err(|fault| fault.into_pyerr(py))
}

/// Runs one experiment and returns its result as JSON text.
///
/// `progress(phase: str, fraction: float)` is called on the calling thread. `timeout` is in seconds.
#[pyfunction]
#[pyo3(signature = (kind, config, *, progress=None, timeout=None))]
fn bench(
    py: Python<'_>,
    kind: String,
    config: String,
    progress: Option<Py<PyAny>>,
    timeout: Option<f64>,
) -> PyResult<String> {
    let limits = job::Limits { timeout, patience: Some(ABANDON) };
    job::run(py, limits, progress, move |control| engine::bench(&kind, &config, control))
}

/// Replays a recording of real KVM and returns the report as JSON text.
///
/// `path` `-` is standard input. `progress(phase, fraction)` is called on the calling thread, with a fraction of
/// NaN where the size of the input is not known. `timeout` is in seconds. `perfetto` names a file to write.
#[pyfunction]
#[pyo3(signature = (path, *, profile=None, check=false, strict=false, vm_of=None, what_if=None,
                    perfetto=None, progress=None, timeout=None))]
#[allow(clippy::too_many_arguments)]
fn replay(
    py: Python<'_>,
    path: std::path::PathBuf,
    profile: Option<String>,
    check: bool,
    strict: bool,
    vm_of: Option<u32>,
    what_if: Option<String>,
    perfetto: Option<std::path::PathBuf>,
    progress: Option<Py<PyAny>>,
    timeout: Option<f64>,
) -> PyResult<String> {
    // A reader of standard input may be blocked in the read for ever: it holds nothing, so it is left behind.
    let limits = job::Limits { timeout, patience: (path.as_os_str() == "-").then_some(ABANDON) };
    let request = engine::ReplayRequest { path, profile, check, strict, vm_of, what_if, perfetto };
    job::run(py, limits, progress, move |control| engine::replay(&request, control))
}

/// Searches interleavings, shows bugs of the museum, tortures, explains, simulates: by `kind`, with a configuration and a result as JSON text.
///
/// `progress(phase, fraction)` is called on the calling thread. `timeout` is in seconds.
#[pyfunction]
#[pyo3(signature = (kind, config, *, progress=None, timeout=None))]
fn prove(
    py: Python<'_>,
    kind: String,
    config: String,
    progress: Option<Py<PyAny>>,
    timeout: Option<f64>,
) -> PyResult<String> {
    let limits = job::Limits { timeout, patience: Some(ABANDON) };
    job::run(py, limits, progress, move |control| engine::prove(&kind, &config, control))
}

/// Runs recordings' operations through the engine, compares with what KVM did, and returns the report as JSON text.
///
/// `progress(phase, fraction)` is called on the calling thread. `timeout` is in seconds.
#[pyfunction]
#[pyo3(signature = (paths, *, profile=None, progress=None, timeout=None))]
fn conform(
    py: Python<'_>,
    paths: Vec<std::path::PathBuf>,
    profile: Option<String>,
    progress: Option<Py<PyAny>>,
    timeout: Option<f64>,
) -> PyResult<String> {
    let limits = job::Limits { timeout, patience: Some(ABANDON) };
    job::run(py, limits, progress, move |control| engine::conform(&paths, profile, control))
}

/// What the engine does for a recording's operations, without a look at what KVM did, as JSON text.
#[pyfunction]
#[pyo3(signature = (path, *, profile=None, progress=None, timeout=None))]
fn predict(
    py: Python<'_>,
    path: std::path::PathBuf,
    profile: Option<String>,
    progress: Option<Py<PyAny>>,
    timeout: Option<f64>,
) -> PyResult<String> {
    let limits = job::Limits { timeout, patience: Some(ABANDON) };
    job::run(py, limits, progress, move |control| engine::predict(&path, profile, control))
}

/// Copies a recording to the folder `out` without the values that the predictor must not need.
#[pyfunction]
fn blank(py: Python<'_>, path: std::path::PathBuf, out: std::path::PathBuf) -> PyResult<()> {
    job::run(py, job::Limits::default(), None, move |_| engine::blank(&path, &out))
}

/// JSON text: every switch in which kernels differ, its source, its value in every profile.
#[pyfunction]
fn policies() -> String {
    engine::policies()
}

/// Panics inside a job, to show what the boundary does with a panic. `message` comes back in the error.
#[pyfunction]
fn _panic(py: Python<'_>, message: String) -> PyResult<()> {
    job::run(py, job::Limits::default(), None, move |_| -> Result<(), error::Fault> { panic!("{message}") })
}

/// Idles in a job for `seconds` or until cancelled: the cheapest long call, for tests of the boundary.
#[pyfunction]
#[pyo3(signature = (seconds, *, progress=None, timeout=None))]
fn _idle(py: Python<'_>, seconds: f64, progress: Option<Py<PyAny>>, timeout: Option<f64>) -> PyResult<u64> {
    let limits = job::Limits { timeout, patience: None };
    job::run(py, limits, progress, move |control| engine::idle(seconds, control))
}

static INTERPRETER: AtomicI64 = AtomicI64::new(-1);

fn one_interpreter(_py: Python<'_>) -> PyResult<()> {
    // SAFETY: attached, as the token shows: there is a current interpreter state, and its id may be read.
    let id = unsafe { pyo3::ffi::PyInterpreterState_GetID(pyo3::ffi::PyInterpreterState_Get()) };
    match INTERPRETER.compare_exchange(-1, id, Ordering::SeqCst, Ordering::SeqCst) {
        Err(first) if first != id => Err(PyImportError::new_err(
            "tdpmmu works in one interpreter of a process; another one has imported it already",
        )),
        _ => Ok(()),
    }
}

/// The native half of tdpmmu. Private: use the `tdpmmu` package.
#[pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::vm::Vm;

    #[pymodule_export]
    use super::{
        _idle, _panic, available_bytes, bench, blank, build_info, catalogue, conform, info, passes, policies,
        predict, profile, prove, replay,
    };

    /// Refuses a second interpreter of the process: PyO3's statics, and ours, belong to the first.
    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::one_interpreter(module.py())
    }
}
