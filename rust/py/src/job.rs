//! Long work beside Python.
//!
//! Guarantee: while a job runs, the GIL is free, signals are seen within [`POLL`], and when `run` returns an
//! exception the job has been told to stop and has stopped (or, after a second Ctrl-C, or once the patience of
//! [`Limits`] is over, has been left to finish by itself: it owns what it uses and never touches Python).
//!
//! Mechanism: one thread per job. The calling thread alternates between waiting without the GIL and attending
//! to Python: signal handlers, then the `progress` callable. A Python callback never runs on the job's
//! thread, so a slow or raising callback cannot stall a measurement: only the newest report is passed on.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use crate::error::Fault;

/// How long the calling thread sleeps between two looks at Python.
const POLL: Duration = Duration::from_millis(25);

/// What the job shares with the thread that waits for it. Clones share it too.
#[derive(Clone, Default)]
pub struct Control {
    cancel: Arc<AtomicBool>,
    report: Arc<Mutex<Option<(String, f64)>>>,
}

impl Control {
    /// True once the job should stop: Ctrl-C, a timeout, or a `progress` that raised.
    pub fn cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    /// The flag itself, for work that carries its own reference.
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.cancel)
    }

    /// Tells where the job is. Cheap enough for once per thousand operations; only the newest is kept.
    pub fn report(&self, phase: &str, fraction: f64) {
        let mut slot = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *slot {
            Some((old, at)) if old == phase => *at = fraction,
            other => *other = Some((phase.to_owned(), fraction)),
        }
    }

    fn take_report(&self) -> Option<(String, f64)> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Until when `run` waits.
#[derive(Default, Clone, Copy)]
pub struct Limits {
    /// Seconds; `None` is for ever. The face has checked that it is finite and not negative.
    pub timeout: Option<f64>,
    /// How long to wait for a job that was told to stop, before it is left behind; `None` is until it has
    /// stopped. For work that cannot stop at once, and owns all that it uses.
    pub patience: Option<Duration>,
}

/// Where the job leaves its outcome. Filled exactly once: a panic is caught and is an outcome.
struct Outcome<T> {
    value: Mutex<Option<Result<T, Fault>>>,
    filled: Condvar,
}

impl<T> Outcome<T> {
    fn fill(&self, value: Result<T, Fault>) {
        *self.value.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
        self.filled.notify_all();
    }

    fn wait(&self, at_most: Duration) -> Option<Result<T, Fault>> {
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.filled.wait_timeout_while(value, at_most, |value| value.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.take()
    }
}

/// Runs `work` on a thread of its own and waits for it, attending to Python meanwhile.
pub fn run<T, F>(py: Python<'_>, limits: Limits, progress: Option<Py<PyAny>>, work: F) -> PyResult<T>
where
    T: Send + 'static,
    F: FnOnce(&Control) -> Result<T, Fault> + Send + 'static,
{
    let control = Control::default();
    let outcome = Arc::new(Outcome { value: Mutex::new(None), filled: Condvar::new() });
    let (inside, leave) = (control.clone(), Arc::clone(&outcome));
    let body = move || {
        let value = catch_unwind(AssertUnwindSafe(|| work(&inside)));
        leave.fill(value.unwrap_or_else(|panic| Err(Fault::Internal(panic_text(panic.as_ref())))));
    };
    std::thread::Builder::new()
        .name("tdpmmu-job".into())
        .spawn(body)
        .map_err(|error| Fault::Os { error, path: "starting a thread".into() }.into_pyerr(py))?;

    let deadline =
        limits.timeout.and_then(|s| Instant::now().checked_add(Duration::try_from_secs_f64(s).ok()?));
    loop {
        let wait = deadline.map_or(POLL, |at| at.saturating_duration_since(Instant::now()).min(POLL));
        if let Some(value) = py.detach(|| outcome.wait(wait)) {
            return value.map_err(|fault| fault.into_pyerr(py));
        }
        if let Err(error) = py.check_signals().and_then(|()| pass_on(py, &control, progress.as_ref())) {
            stop(py, &control, &outcome, limits.patience);
            return Err(error);
        }
        if deadline.is_some_and(|at| Instant::now() >= at) {
            let seconds = limits.timeout.unwrap_or_default();
            stop(py, &control, &outcome, limits.patience);
            return Err(Fault::Stall(format!("not finished within timeout={seconds} s")).into_pyerr(py));
        }
    }
}

/// Cancels the job and waits for its end. A second signal ends the waiting.
fn stop<T: Send>(py: Python<'_>, control: &Control, outcome: &Outcome<T>, patience: Option<Duration>) {
    control.cancel.store(true, Ordering::Relaxed);
    let begin = Instant::now();
    while py.detach(|| outcome.wait(POLL)).is_none() {
        if py.check_signals().is_err() || patience.is_some_and(|most| begin.elapsed() >= most) {
            return;
        }
    }
}

fn pass_on(py: Python<'_>, control: &Control, progress: Option<&Py<PyAny>>) -> PyResult<()> {
    if let (Some(callable), Some(report)) = (progress, control.take_report()) {
        callable.call1(py, report)?;
    }
    Ok(())
}

/// The text of a panic; `panic!` gives `&str` or `String`.
fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text =
        panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("a panic in the native part: {}; this is a defect of tdpmmu", text.unwrap_or("no message"))
}
