//! What a scenario came to: counts, stamps and measurements, before they become a result.

use std::collections::BTreeMap;

use serde::Serialize;
use tdpmmu_mmu::Counts;
use tdpmmu_platform::{Histogram, MeterSnapshot, RcuStats, timeline::Shared};
use tdpmmu_vm::{CloseReport, FastZapTimes};

use crate::attribution::Request;
use crate::guest::Felt;
use crate::scenario::{Mark, Who};

/// What one thread did and what it cost.
#[derive(Clone, Debug)]
pub struct ThreadReport {
    /// Its name.
    pub name: String,
    /// Who it was.
    pub who: Who,
    /// Its measurements: during its request, or from t0 to the end of the teardown.
    pub meter: MeterSnapshot,
    /// The request, if it was its own.
    pub request: Option<Request>,
    /// Where it was not: what `meter` covers of the window, in ticks.
    pub covers: Option<(u64, u64)>,
    /// ... and how long that was by the window's clock.
    pub stamped_ticks: Option<u64>,
    /// CPU time of its request, or in the stretch that `meter` covers.
    pub cpu_ns: u64,
    /// CPU time of its timed operations.
    pub op_cpu_ns: u64,
    /// Times that the host took the CPU away meanwhile.
    pub switched_out: u64,
    /// What its guest felt.
    pub felt: Felt,
    /// CPU that it ended on.
    pub cpu: Option<u32>,
    /// Of the same stretch as `cpu_ns`: runnable, but waiting for a CPU.
    pub run_delay_ns: Option<u64>,
}

/// What a scenario came to.
pub struct Outcome {
    /// Ticks of the platform to nanoseconds.
    pub to_ns: fn(u64) -> u64,
    /// How leaf tables were held, where they may be held by count.
    pub by_count: Option<tdpmmu_table::UniformStats>,
    /// Whose operation was the request; `None`: the end of the VM was.
    pub pays: Option<Who>,
    /// Leaves that had to be mapped at t0.
    pub expected: Option<u64>,
    /// t0 in ticks.
    pub t0: u64,
    /// End of the window, in ticks: the teardown is over.
    pub end: u64,
    /// What the tree held at t0, counted.
    pub at_t0: Counts,
    /// Tables in use at t0 (all roots).
    pub tables_at_t0: u64,
    /// Population.
    pub populate_ns: u64,
    /// Touching the pool before it.
    pub prefault_ns: u64,
    /// Leaves made by the population.
    pub populated: u64,
    /// The memslot update at t0, if there was one.
    pub update: Option<FastZapTimes>,
    /// Timed operations, in ns.
    pub marks: BTreeMap<Mark, Histogram>,
    /// t0 to the end of the last root zap; `None`: none ended after t0.
    pub last_zap_end_ns: Option<u64>,
    /// t0 to the last table back in the pool.
    pub last_free_ns: Option<u64>,
    /// Tables that stay after the teardown, without caches: retained by the MMU's references, and live ones.
    pub tables_after: u64,
    /// ... of them, those of the dropped root.
    pub retained: u64,
    /// Threads.
    pub threads: Vec<ThreadReport>,
    /// Workers: measurements and CPU time since t0.
    pub workers: Vec<(MeterSnapshot, u64)>,
    /// Queue delays.
    pub queue: Option<Histogram>,
    /// RCU since the start.
    pub rcu: RcuStats,
    /// RCU thread's CPU time since t0.
    pub rcu_cpu_ns: u64,
    /// The RCU thread in the window: waiting for grace periods, freeing; in ns.
    pub rcu_thread_ns: (u64, u64),
    /// What the RCU domain and the tasks recorded since t0, if they did.
    pub timeline: Option<Shared>,
    /// Flushes and kicks since t0.
    pub flushes: u64,
    /// Kicks since t0.
    pub kicks: u64,
    /// Refaults: how many, and from t0 to the last.
    pub refaults: (u64, u64),
    /// Most table pages that existed.
    pub pool_peak: u64,
    /// Refusals of the pool.
    pub pool_cap_hits: u64,
    /// Tables freed since t0.
    pub freed: u64,
    /// Frames that a write-back reached, from t0 to the end of the teardown.
    pub written_back: u64,
    /// The end of the VM.
    pub close: CloseReport,
    /// Most present SPTEs under invalidated roots at the return of a fast zap.
    pub mapped_at_return: u64,
    /// Tables under invalidated roots that somebody still holds after the teardown.
    pub stale_tables: u64,
    /// What was mapped when everything was over, before the end of the VM.
    pub last: Option<LastState>,
    /// What only the shadow MMU has.
    pub shadow: Option<ShadowBooks>,
}

/// What the shadow MMU did in the window; see [`crate::result::ShadowResult`].
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct ShadowBooks {
    pub guest_table_pages: u64,
    pub pages_at_t0: u64,
    pub toggles: u64,
    pub zapped: u64,
    pub batches: u64,
    pub longest_batch: u64,
    pub restarts: u64,
    pub reclaimed: u64,
    pub retained_at_return: u64,
    pub retained_at_end: u64,
    /// (ticks, pages).
    pub retained: Vec<(u64, u64)>,
    pub waiting_peak: u64,
    pub page_bytes: u64,
    pub gfn_bytes: u64,
    pub list_bytes: u64,
    pub slot_bytes: u64,
}

/// What valid roots hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LastState {
    /// Leaves.
    pub sptes: u64,
    /// Tables, roots included.
    pub tables: u64,
    /// Roots.
    pub roots: u64,
}
