//! The results of `bench zap` and `bench drop`: schema `tdpmmu.bench.zap/1`, fields explained in `docs/results.md`. Field names carry units.

use std::collections::BTreeMap;

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};
use serde_json::Value;
use tdpmmu_platform::{Histogram, Summary};

use crate::attribution::{Attribution, Others};
use crate::fit::Fit;
use crate::host::HostInfo;
use crate::limits::Limits;
use crate::outcome::LastState;
use crate::timeline::Timeline;

/// A distribution: count and percentiles, a percentile only where 10/(1-q) samples stand behind it.
#[derive(Clone, Copy, Debug, Default)]
pub struct H(pub Summary);

impl From<&Histogram> for H {
    fn from(histogram: &Histogram) -> Self {
        Self(histogram.summary())
    }
}

impl Serialize for H {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let Summary { count, min, p50, p90, p99, p999, max } = self.0;
        let mut fields = to.serialize_struct("H", 7)?;
        fields.serialize_field("count", &count)?;
        for (name, value) in
            [("min", min), ("p50", p50), ("p90", p90), ("p99", p99), ("p999", p999), ("max", max)]
        {
            fields.serialize_field(name, &value)?;
        }
        fields.end()
    }
}

/// One result file.
#[derive(Clone, Debug, Serialize)]
pub struct BenchResult {
    /// `tdpmmu.bench.zap/1`.
    pub schema: &'static str,
    /// `zap` or `drop`.
    pub experiment: &'static str,
    /// The machine.
    pub host: HostInfo,
    /// The build.
    pub build: Value,
    /// The request.
    pub config: Value,
    /// Its seed.
    pub seed: u64,
    /// What the host can do at best, from the same run.
    pub limits: Limits,
    /// One per design and repetition.
    pub runs: Vec<Run>,
}

/// `update_ns`: the fast-zap call.
#[derive(Clone, Debug, Default, Serialize)]
pub struct UpdateNs {
    /// Entry to return, slots_lock held.
    pub total: u64,
    /// Waiting for mmu_lock.
    pub lock_wait: u64,
    /// The first exclusive hold.
    pub exclusive_hold: u64,
    /// All exclusive holds.
    pub exclusive_total: u64,
    /// The longest of them.
    pub exclusive_longest: u64,
    /// Waiting for vCPUs to leave guest mode.
    pub kick_wait: u64,
    /// From the unlock to the return.
    pub zap: u64,
}

/// CPU time by who spent it on the teardown.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CpuNs {
    /// The task that called.
    pub caller: u64,
    /// vCPUs, on the teardown (`bench drop`).
    pub vcpu: u64,
    /// Workers.
    pub worker: u64,
    /// The RCU thread.
    pub rcu: u64,
}

/// `teardown`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Teardown {
    /// t0 to the return of the request.
    pub fz_return_ns: u64,
    /// t0 to the end of the last root zap.
    pub last_spte_unreachable_ns: u64,
    /// t0 to the last table back in the pool.
    pub last_table_free_ns: u64,
    /// Who paid.
    pub cpu_ns: CpuNs,
    /// All of `cpu_ns` over the wall time.
    pub cpus_used: f64,
    /// SPTEs written by the teardown.
    pub entry_writes: u64,
    /// SPTEs read by the teardown.
    pub entry_reads: u64,
    /// CPU ns in the SPTE walk, per SPTE that was mapped.
    pub ns_per_spte: f64,
    /// CPU ns in the SPTE walk, per entry written.
    pub ns_per_entry: f64,
}

/// `lock`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct LockStats {
    /// Shared holds.
    pub read_hold_ns: H,
    /// Exclusive holds.
    pub write_hold_ns: H,
    /// Waits for a shared hold.
    pub reader_wait_ns: H,
    /// Waits for an exclusive hold.
    pub writer_wait_ns: H,
    /// Yields at which somebody waited.
    pub handoffs: u64,
    /// Acquisitions that waited.
    pub contended: u64,
}

/// `rcu`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RcuResult {
    /// membarrier or fence.
    pub flavour: String,
    /// Read sections of tearing-down tasks.
    pub section_ns: H,
    /// First callback of a batch queued to first callback run.
    pub grace_period_ns: H,
    /// Most pages that waited for a grace period.
    pub backlog_pages_peak: u64,
    /// (ns since t0, pages that wait): at most 512 points, the peak among them.
    pub backlog_series: Vec<(u64, u64)>,
}

/// `refault`: after the zap, until the working set is mapped again.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Refault {
    /// Faults.
    pub faults: u64,
    /// t0 to the last of them.
    pub wall_ns: u64,
}

/// `populate`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PopulateResult {
    /// Wall time.
    pub wall_ns: u64,
    /// Wall time per SPTE.
    pub ns_per_spte: f64,
    /// Touching the pool's pages first, outside of it.
    pub prefault_ns: u64,
}

/// `drop_loop`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct DropLoop {
    /// SPTEs mapped under each small root.
    pub root_sptes: u64,
    /// Drops.
    pub count: u64,
    /// The drop of the last reference.
    pub block_drop_ns: H,
    /// Of these, the drops that woke a worker; `None`: the design has none.
    pub block_drop_woken_ns: Option<H>,
    /// How many these were.
    pub worker_wakes: Option<u64>,
    /// The same on a root that another vCPU holds.
    pub block_baseline_ns: H,
}

/// `updates`: scenes with many memslot updates.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Updates {
    /// How many.
    pub count: u64,
    /// Each one's fast-zap call, entry to return.
    pub update_ns: H,
}

/// `waiting`: what arrived during the zap.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Waiting {
    /// `update` or `notifier`.
    pub what: &'static str,
    /// Each one's call, entry to return.
    pub wait_ns: H,
}

/// `close_ns`: the end of a populated VM.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CloseNs {
    /// From the call to the last table freed.
    pub total: u64,
    /// Of it, the zap of everything under the exclusive lock.
    pub zap_all: u64,
    /// Of it, the rest: stopping vCPUs, putting roots, workers, grace periods.
    pub rest: u64,
}

/// `shadow`: what only designs of the shadow MMU have.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ShadowResult {
    /// `direct`, or `guest`: the guest's own page tables are shadowed.
    pub paging: String,
    /// How freed pages were kept from lockless walkers.
    pub reclaim: String,
    /// Most shadow pages; null: no limit.
    pub quota: Option<u32>,
    /// Pages of the guest's own page tables.
    pub guest_table_pages: u64,
    /// Shadow pages at t0.
    pub pages_at_t0: u64,
    /// Changes of the generation number in the window.
    pub toggles: u64,
    /// Pages zapped in the window.
    pub zapped: u64,
    /// Stretches of zaps between two lock-breaks.
    pub batches: u64,
    /// Most pages zapped in one of them.
    pub longest_batch: u64,
    /// Times that a walk of the list began again: after a break, or because the list had changed under it.
    pub restarts: u64,
    /// Pages that the quota or want of memory took in the window.
    pub reclaimed: u64,
    /// Most obsolete pages at a time that were listed or waited to be freed.
    pub retained_peak: u64,
    /// ... when the (last) fast zap had returned.
    pub retained_at_return: u64,
    /// ... when the teardown was over.
    pub retained_at_end: u64,
    /// ... over time: (ns since t0, pages), at most 512 points.
    pub retained_series: Vec<(u64, u64)>,
    /// Most pages at a time that waited for lockless walkers.
    pub waiting_peak: u64,
    /// Beside the tables, at its most: headers and books of pages.
    pub page_bytes: u64,
    /// ... a gfn per entry, and marks, of pages that shadow the guest's tables.
    pub gfn_bytes: u64,
    /// ... lists of reverse maps and of parents.
    pub list_bytes: u64,
    /// ... what lies with memslots: heads of reverse maps, and lpage_info.
    pub slot_bytes: u64,
}

/// `published`: what somebody else measured, beside what this result has of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Published {
    /// Whose figure.
    pub source: &'static str,
    /// What was measured.
    pub what: &'static str,
    /// Before: every shadow page walked.
    pub before_ms: f64,
    /// After.
    pub after_ms: f64,
    /// After over before.
    pub ratio: f64,
    /// This result: median cycle of `shadow-walk`.
    pub our_before_ms: Option<f64>,
    /// ... of `shadow-gen`.
    pub our_after_ms: Option<f64>,
    /// ... the one over the other.
    pub our_ratio: Option<f64>,
}

/// A distribution, bucket by bucket: (largest value of the bucket, how many). Empty buckets are left out.
pub type Curve = Vec<(u64, u64)>;

/// One design, one repetition.
#[derive(Clone, Debug, Default, Serialize)]
#[allow(missing_docs)]
pub struct Run {
    pub scene: String,
    pub design: String,
    pub flawed: bool,
    pub workers: usize,
    pub worker_queue: Option<String>,
    pub sharing: &'static str,
    pub passes: String,
    pub ownership: String,
    pub lock_mode: &'static str,
    pub preempt: String,
    pub tick_ns: u64,
    pub kernel_profile: String,
    pub rep: u32,
    pub memory_bytes: u64,
    pub page: String,
    pub vcpus: u32,
    pub overcommit: bool,
    pub sptes: u64,
    pub table_pages: u64,
    pub table_bytes: u64,
    pub ad_mix: String,
    pub writeback: String,
    pub written_back_frames: u64,
    pub populated_by: String,
    pub extrapolated: bool,
    pub populate: PopulateResult,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub update_ns: Option<UpdateNs>,
    pub updates: Option<Updates>,
    pub sptes_mapped_at_return: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting: Option<Waiting>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wake_ns: Option<H>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub migrations: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub toggles: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked_ns: Option<H>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prepare_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub close_ns: Option<CloseNs>,
    #[serde(rename = "final")]
    pub last: Option<LastState>,
    pub curves: BTreeMap<&'static str, Curve>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_drop_ns: Option<H>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_baseline_ns: Option<H>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retained_table_pages: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drop_loop: Option<DropLoop>,
    pub block_update_ns: H,
    pub visible_ns: H,
    pub visible_last_ns: Option<u64>,
    pub access_ns: H,
    pub access_ns_by_outcome: BTreeMap<&'static str, H>,
    pub arrival_ns: u64,
    pub step_units: H,
    pub step_ns: H,
    pub step_ns_dropped: u64,
    pub step_ns_dropped_cpu_max: Option<u64>,
    pub teardown: Option<Teardown>,
    pub lock: LockStats,
    pub rcu: RcuResult,
    pub queue_ns: H,
    pub refault: Refault,
    pub attribution: Vec<Attribution>,
    pub others: Others,
    pub timeline: Option<Timeline>,
    pub fit: Option<Fit>,
    pub shadow: Option<ShadowResult>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cycle_ns: Option<H>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub published: Option<Published>,
    pub yields: u64,
    pub retries: u64,
    pub kicks: u64,
    pub flushes: u64,
    pub table_pages_freed: u64,
    pub table_pages_leaked: u64,
    pub pool_peak_pages: u64,
    pub pool_cap_hits: u64,
    pub overhead_bytes_per_table: f64,
    pub violations: Option<u64>,
    pub violation_list: Vec<String>,
    pub violations_checked_memory_bytes: Option<u64>,
}
