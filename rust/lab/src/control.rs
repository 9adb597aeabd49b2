//! How a long run is watched and stopped from outside.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::LabError;

type Report = dyn Fn(&str, f64) + Send + Sync;

/// A cancel flag, and somebody to tell about progress. Cloning shares both.
#[derive(Clone)]
pub struct Control {
    cancel: Arc<AtomicBool>,
    report: Arc<Report>,
}

impl Control {
    /// `cancel` is set by whoever wants the run to end; `report` gets (phase, fraction done).
    pub fn new(cancel: Arc<AtomicBool>, report: impl Fn(&str, f64) + Send + Sync + 'static) -> Self {
        Self { cancel, report: Arc::new(report) }
    }

    /// Nobody watches, nobody cancels.
    pub fn silent() -> Self {
        Self::new(Arc::default(), |_, _| {})
    }

    /// Shall the run end?
    pub fn cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    /// Goes on, or ends the run.
    ///
    /// # Errors
    /// [`LabError::Cancelled`] once the flag is set.
    pub fn check(&self) -> Result<(), LabError> {
        if self.cancelled() { Err(LabError::Cancelled) } else { Ok(()) }
    }

    /// Reports progress; `fraction` from 0 to 1.
    pub fn report(&self, phase: &str, fraction: f64) {
        (self.report)(phase, fraction.clamp(0.0, 1.0));
    }

    /// The flag itself, for loops that test it on their own.
    pub fn flag(&self) -> &Arc<AtomicBool> {
        &self.cancel
    }
}
