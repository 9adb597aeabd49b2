//! The ground under the MMU: locks, RCU, tasks, clock, queue, schedule points.
//!
//! The MMU is generic over [`Platform`] and names nothing of `std::sync` or `std::thread` itself. This crate holds
//! the contract ([`api`]) and the platform of real threads ([`Real`]); a simulated one implements the same contract.
//!
//! * [`rwlock`]: a fair reader-writer lock that can tell whether somebody waits; [`mmu_lock`]: modes as types, yields.
//! * [`rcu`]: read sections for two plain stores, deferred freeing of whole chains.
//! * [`task`]: "current": time slice, read sections, steps; [`meter`]: what it measures.
//! * [`queue`], [`mutex`]: work and sleeping locks. [`clock`]: TSC. [`observer`]: who listens.
//!
//! Under `--cfg loom` only the protocols are compiled, over loom's types: see `primitive`.

#![warn(missing_docs)]

#[cfg(not(loom))]
pub mod api;
#[cfg(not(loom))]
pub mod clock;
#[cfg(not(loom))]
mod futex;
#[cfg(not(loom))]
pub mod histogram;
#[cfg(not(loom))]
pub mod meter;
#[cfg(not(loom))]
pub mod mmu_lock;
#[cfg(not(loom))]
pub mod mutex;
#[cfg(not(loom))]
pub mod observer;
mod primitive;
#[cfg(not(loom))]
pub mod queue;
pub mod rcu;
#[cfg(not(loom))]
mod real;
pub mod rwlock;
#[cfg(not(loom))]
pub mod site;
#[cfg(not(loom))]
mod slice;
#[cfg(not(loom))]
pub mod task;

#[cfg(not(loom))]
pub use crate::{
    api::{
        Exclusive, Join, JoinHandle, Mode, NIL, Platform, RawRwLock, RcuDomain, RcuReader, Reclaim, Shared,
        Switches,
    },
    histogram::{Histogram, Summary},
    meter::{Histograms, Meter, MeterSnapshot, Phase},
    mmu_lock::{Guard, MmuLock},
    mutex::{Mutex, MutexGuard},
    observer::{Event, NO_TASK, Observer, Owner},
    queue::WorkQueue,
    rcu::{Flavour, RcuConfig, RcuStats, Stall},
    real::Real,
    rwlock::FairRwLock,
    site::Site,
    task::{PhaseScope, Preempt, RcuGuard, Role, Task, TaskConfig},
};
