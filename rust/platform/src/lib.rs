//! The ground under the MMU: locks, RCU, tasks, clock, queue, schedule points.
//!
//! The MMU is generic over [`Platform`] and names nothing of `std::sync` or `std::thread` itself. This crate holds
//! the contract ([`api`]), the platform of real threads ([`Real`]), and platforms that keep the contract under a schedule ([`sim`]) or a clock of their own.
//!
//! * [`rwlock`]: a fair reader-writer lock that can tell whether somebody waits; [`mmu_lock`]: modes as types, yields.
//! * [`rcu`]: read sections for two plain stores, deferred freeing of whole chains.
//! * [`task`]: "current": time slice, read sections, steps; [`meter`]: what it measures.
//! * [`pace`]: yields as an input.
//! * [`queue`], [`mutex`]: work and sleeping locks. [`clock`]: TSC. [`observer`]: who listens.
//! * [`bug`], [`fault`]: what a simulated run can be given that is wrong; constants on the real platform.
//! * [`timeline`]: recordings of what tasks did when; off unless asked for.
//!
//! Under `--cfg loom` the protocols are compiled over loom's types (see `primitive`), and `Real` is left out.

#![warn(missing_docs)]

pub mod api;
pub mod bug;
pub mod clock;
pub mod fault;
#[cfg_attr(loom, allow(dead_code))]
mod futex;
pub mod histogram;
pub mod meter;
pub mod mmu_lock;
pub mod mutex;
pub mod observer;
pub mod pace;
mod primitive;
pub mod queue;
pub mod rcu;
#[cfg(not(loom))]
mod real;
pub mod rwlock;
#[cfg_attr(loom, allow(dead_code))]
mod sched;
#[cfg(not(loom))]
pub mod sim;
pub mod site;
mod slice;
pub mod task;
pub mod timeline;

#[cfg(not(loom))]
pub use crate::sim::time::{self, Timed};
pub use crate::{
    api::{
        Bulk, Exclusive, HeldWords, Join, JoinHandle, Mode, NIL, Platform, RawRwLock, RcuDomain, RcuReader,
        Reclaim, Shared, Switches,
    },
    bug::Bug,
    fault::{Fault, Faults, InjectedPanic},
    histogram::{Histogram, Summary},
    meter::{Histograms, HoldSums, Meter, MeterSnapshot, Phase},
    mmu_lock::{Guard, MmuLock},
    mutex::{Mutex, MutexGuard},
    observer::{Event, LockClass, NO_TASK, Observer, Owner},
    pace::{Pace, YieldPoint},
    queue::{Serve, WorkQueue},
    rcu::{Flavour, RcuConfig, RcuStats, Stall},
    rwlock::FairRwLock,
    site::Site,
    task::{PhaseScope, Preempt, RcuGuard, Role, Task, TaskConfig},
    timeline::{Mark, Moment, Recording, Timeline},
};
#[cfg(not(loom))]
pub use crate::{real::Real, sim::Sim};
