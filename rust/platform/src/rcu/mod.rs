//! RCU for table pages: readers that cost two plain stores, freeing that waits for them.
//!
//! **Guarantee.** What was unlinked and then deferred is reclaimed only after every read section that could have
//! seen the link has ended. A section never waits, whoever reclaims.
//!
//! **Mechanism.** [`epoch`] knows when sections end: one word per reader, one counter of grace periods, and an
//! asymmetric barrier ([`membarrier`]) that moves the price of the ordering from every section to the rare grace
//! period. [`chain`] collects what is deferred: a stack of ids, spliced a chain at a time. [`domain`] is the thread
//! that takes the whole stack, waits one grace period for all of it, and hands it to the owner's
//! [`Reclaim`](crate::Reclaim).

#[cfg(not(loom))]
mod chain;
#[cfg(loom)]
pub mod chain;
#[cfg(not(loom))]
mod domain;
#[cfg(not(loom))]
mod epoch;
#[cfg(loom)]
pub mod epoch;
pub mod membarrier;
mod stats;

#[cfg(not(loom))]
pub use self::domain::{Domain, Reader};
#[cfg(not(loom))]
pub(crate) use self::epoch::Barrier;
pub use self::{
    epoch::QuickSection,
    membarrier::Flavour,
    stats::{RcuConfig, RcuStats, Stall},
};
