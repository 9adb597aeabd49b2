//! # Faults: what goes wrong on purpose
//!
//! **Guarantee.** What is injected is only what the kernel's own ground may do: no page for a table, a compare-exchange that fails, a lock that is given up, a grace period that takes long, a
//! worker that is late or dies, a flush that is late. So whatever the engine guarantees it guarantees under every plan, and a violation under one is a defect. The same plan and the same seed inject the same faults.
//!
//! **Mechanism.** A [`FaultPlan`] is data; [`FaultPlan::arm`] makes an [`Armed`] of it, which the platform asks wherever a fault could be: the simulated one with the dice of its schedule, so that a
//! fault is a recorded choice that replays and minimises; the rough one (`torture/rough.rs`) with dice of each thread.

mod armed;
mod command;
mod enumerate;
mod plan;

pub use armed::{Armed, FaultCount};
pub use command::command;
pub use enumerate::{AllocationRun, Enumeration, enumerate};
pub use plan::{FaultError, FaultPlan, Injection, KINDS, Length, Nth, Rate, Who, WorkerFault};
