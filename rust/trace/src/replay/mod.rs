//! Replay of a recording: [`replay`].

mod engine;
mod infer;
mod judge;
mod marks;
mod record;
mod report;
mod run;
mod shape;
mod summary;
mod threads;
mod tree;
mod zaps;

pub use record::{Recorded, RecordedThread, perfetto_of};
pub use report::{
    Births, Checked, Deaths, LISTED_LOSSES, LISTED_MISMATCHES, Loss, Mismatch, Replay, StatChecks, Zap,
};
pub use shape::{RootShape, Run, Shape};
pub use summary::{
    Ambiguous, CauseSum, FaultCounts, Handled, Operation, PerVm, STORM_GAP_NS, STORM_ZAPS, Storm,
    TIMELINE_POINTS, TOP_OPERATIONS, Timeline,
};

use crate::error::ReplayError;
use crate::reader::TraceReader;
use crate::source::Input;
use tdpmmu_spte::KernelProfile;

/// Called now and then with the bytes of text read so far; `false` cancels.
pub type Progress<'a> = &'a dyn Fn(u64) -> bool;

/// How to replay.
#[derive(Clone, Copy, Default)]
pub struct ReplayOptions<'a> {
    /// The kernel; else the folder's name, else inferred from the recording.
    pub profile: Option<KernelProfile>,
    /// Verify: implies `strict`.
    pub check: bool,
    /// The first malformed line is an error instead of a count.
    pub strict: bool,
    /// Only the VM of this process (thread-group id, or thread id where the recording has no groups).
    pub vm_of: Option<u32>,
    /// Keep what each thread did, for [`perfetto_of`]: memory grows with the recording.
    pub record: bool,
    /// Keep the trees as they were before the zaps that a design decides about ([`Replay::shapes`]).
    pub shapes: bool,
    /// Called about every 4 MiB of text.
    pub progress: Option<Progress<'a>>,
}

impl std::fmt::Debug for ReplayOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReplayOptions")
            .field("profile", &self.profile.map(|p| p.name))
            .field("check", &self.check)
            .field("strict", &self.strict)
            .field("vm_of", &self.vm_of)
            .finish_non_exhaustive()
    }
}

/// A profile by its name, `NAME[,switch=value]...`.
///
/// # Errors
/// [`ReplayError::UnknownProfile`] with the known names.
pub fn profile_named(name: &str) -> Result<KernelProfile, ReplayError> {
    KernelProfile::named(name).map_err(|e| ReplayError::UnknownProfile {
        name: name.to_owned(),
        known: format!("{} ({e})", infer::known()),
    })
}

/// Rebuilds the page tables that the recording tells of and verifies every step. A mismatch is a result, not an error.
///
/// # Errors
/// The recording cannot be read ([`ReplayError::Trace`]), its kernel cannot be told ([`ReplayError::CannotInfer`]), no
/// thread of `vm_of` is in it ([`ReplayError::NoSuchVm`]), or the callback cancelled ([`ReplayError::Cancelled`]).
pub fn replay(input: Input, options: &ReplayOptions<'_>) -> Result<Replay, ReplayError> {
    let (profile, source, input) = infer::choose(options.profile, input)?;
    let reader = TraceReader::open(input, options.strict || options.check)?;
    run::Run::new(profile, source, options).drive(reader)
}
