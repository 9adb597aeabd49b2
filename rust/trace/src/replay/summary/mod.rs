//! What a recording comes to: curves, causes, storms, faults, the longest operations, the VMs.
//!
//! **Guarantee.** Everything here is gathered while the recording streams past, in memory that does not grow with it: curves
//! have a fixed number of points, lists a longest length, and what a list leaves out is counted. Nothing here takes part in
//! the verdict: with or without it the replay checks the same.
//!
//! | file | idea |
//! | --- | --- |
//! | `curve.rs` | mapped pages and table memory over time |
//! | `causes.rs` | why zaps happened; sums by cause; storms |
//! | `faults.rs` | faults by kind |
//! | `operations.rs` | the longest operations |
//! | `per_vm.rs` | which VM a root, a thread, a zap belongs to |

mod causes;
mod curve;
mod faults;
mod operations;
mod per_vm;

pub use causes::{CauseSum, STORM_GAP_NS, STORM_ZAPS, Storm};
pub(crate) use causes::{Causes, Known, refine};
pub(crate) use curve::Curve;
pub use curve::{TIMELINE_POINTS, Timeline};
pub(crate) use faults::FaultBook;
pub use faults::{FaultCounts, Handled};
pub(crate) use operations::Operations;
pub use operations::{Operation, TOP_OPERATIONS};
pub(crate) use per_vm::VmBook;
pub use per_vm::{Ambiguous, PerVm};
