//! Recordings of real KVM: a streaming reader and a replay that verifies them.
//!
//! * [`TraceReader`] reads the text of ftrace, trace-cmd and perf, plain or gzip, and trace-cmd's trace.dat, in constant memory.
//! * [`replay()`] rebuilds the page tables that a recording tells of, verifies every old value and every table's birth and
//!   death, and lists the zaps.
//!
//! And what goes out:
//!
//! * [`perfetto`] writes timelines for the Perfetto UI.
//! * [`hlog`] writes distributions as HdrHistogram logs.

#![deny(missing_docs)]

mod bytes;
mod dat;
mod error;
mod event;
pub mod hlog;
mod line;
mod parse;
pub mod perfetto;
mod reader;
mod replay;
mod source;

pub use error::{ReplayError, TraceError};
pub use event::{Event, Mark, PageArg, Probe, RootArg};
pub use line::Head;
pub use parse::parse_event;
pub use reader::{BadLine, Item, ReadStats, TraceReader};
pub use replay::{
    Ambiguous, Births, CauseSum, Checked, Deaths, FaultCounts, Handled, LISTED_LOSSES, LISTED_MISMATCHES,
    Loss, Mismatch, Operation, PerVm, Progress, Recorded, RecordedThread, Replay, ReplayOptions, RootShape,
    Run, STORM_GAP_NS, STORM_ZAPS, Shape, StatChecks, Storm, TIMELINE_POINTS, TOP_OPERATIONS, Timeline, Zap,
    perfetto_of, profile_named, replay,
};
pub use source::{Input, MAX_LINE};
