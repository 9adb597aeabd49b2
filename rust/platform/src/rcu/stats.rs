//! What an RCU domain is told, and what it tells.

use std::{fmt, sync::Arc};

use super::Flavour;
use crate::{histogram::Histogram, observer::Observer};

/// How a domain works.
#[derive(Clone)]
pub struct RcuConfig {
    /// The barrier; `None` detects the best one of the host.
    pub flavour: Option<Flavour>,
    /// How long the RCU thread gathers more before it begins a grace period, in ns. A membarrier interrupts the
    /// CPUs that run vCPUs: one per batch, not one per table. `barrier` and `stop` do not wait for it.
    pub batch_delay_ns: u64,
    /// A grace period that waits this long for a reader is reported as a stall, in ns.
    pub stall_ns: u64,
    /// Told of stalls.
    pub observer: Option<Arc<dyn Observer>>,
    /// Keep a [`Timeline`](crate::Timeline): marks of the tasks, batches, the backlog over time.
    pub log: bool,
}

impl Default for RcuConfig {
    fn default() -> Self {
        RcuConfig {
            flavour: None,
            batch_delay_ns: 200_000,
            stall_ns: 10_000_000_000,
            observer: None,
            log: false,
        }
    }
}

impl fmt::Debug for RcuConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RcuConfig")
            .field("flavour", &self.flavour)
            .field("batch_delay_ns", &self.batch_delay_ns)
            .field("stall_ns", &self.stall_ns)
            .field("observer", &self.observer.is_some())
            .field("log", &self.log)
            .finish()
    }
}

/// A reader that held a grace period up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stall {
    /// The reader's name.
    pub reader: String,
    /// The reader's id within the domain.
    pub reader_id: u32,
    /// How long the grace period had waited when it was reported, or in the end if it ended since, in ns.
    pub ns: u64,
}

/// The counts of a domain.
#[derive(Clone, Debug)]
pub struct RcuStats {
    /// The barrier in use.
    pub flavour: Flavour,
    /// First callback of a batch queued to first callback run, in ns.
    pub grace_period_ns: Histogram,
    /// Grace periods waited for, by the RCU thread and by `synchronize`.
    pub grace_periods: u64,
    /// Ids deferred so far.
    pub callbacks: u64,
    /// Ids deferred and not reclaimed.
    pub backlog: u64,
    /// The most of them at any time.
    pub backlog_peak: u64,
    /// Stalls, the first [`RcuStats::STALLS_KEPT`] of them.
    pub stalls: Vec<Stall>,
    /// Stalls in all.
    pub stall_count: u64,
    /// CPU time of the RCU thread in ns, as of its last batch.
    pub thread_cpu_ns: u64,
    /// Time that the RCU thread has spent waiting for grace periods, the gathering of their batches included, up to now, in ns.
    pub waiting_ns: u64,
    /// Time that the RCU thread has spent handing batches over to be freed, up to now, in ns.
    pub freeing_ns: u64,
    /// Why the domain works without its thread, if it does.
    pub thread_error: Option<String>,
}

impl RcuStats {
    /// How many stalls are kept with their names.
    pub const STALLS_KEPT: usize = 64;
}
