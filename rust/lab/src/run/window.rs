//! The window of a measurement: counters at t0, stamps and counters at the end of the teardown.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use tdpmmu_mmu::Counts;
use tdpmmu_platform::{Histogram, MeterSnapshot, Phase, Platform, RcuDomain, Role as TaskRole, Task};
use tdpmmu_shadow::{ShadowCounts, ShadowMmu};
use tdpmmu_vm::{CloseReport, FastZapTimes};

use super::{Shared, internal, lock};
use crate::LabError;
use crate::outcome::{LastState, ThreadReport};
use crate::scenario::Mark;

/// What the threads of a run have brought together.
#[derive(Default)]
pub(super) struct Collected {
    pub(super) at_t0: Counts,
    pub(super) tables_at_t0: u64,
    pub(super) populate_ns: u64,
    pub(super) prefault_ns: u64,
    pub(super) populated: u64,
    pub(super) update: Option<FastZapTimes>,
    pub(super) marks: BTreeMap<Mark, Histogram>,
    pub(super) base: Base,
    pub(super) last_zap_end_ns: Option<u64>,
    pub(super) last_free_ns: Option<u64>,
    pub(super) tables_after: u64,
    pub(super) retained: u64,
    pub(super) refaults: (u64, u64),
    pub(super) freed: u64,
    pub(super) rcu_cpu_ns: u64,
    pub(super) rcu_thread_ns: (u64, u64),
    pub(super) flushes: u64,
    pub(super) kicks: u64,
    pub(super) threads: Vec<ThreadReport>,
    pub(super) workers: Vec<(MeterSnapshot, u64)>,
    pub(super) dropped: Option<u32>,
    pub(super) written_back: u64,
    pub(super) mapped_at_return: u64,
    pub(super) stale_tables: u64,
    pub(super) guest_tables: u64,
    pub(super) shadow_at_t0: ShadowCounts,
    pub(super) shadow_at_end: Option<ShadowCounts>,
    /// What obsolete pages retain: (ticks, pages).
    pub(super) obsolete: Vec<(u64, u64)>,
    /// ... when the last fast zap returned.
    pub(super) returned: Option<(u64, u64)>,
}

/// Counters at t0.
#[derive(Clone, Copy, Default)]
pub(super) struct Base {
    pub(super) rcu_cpu_ns: u64,
    pub(super) rcu_thread_ns: (u64, u64),
    pub(super) flushes: u64,
    pub(super) kicks: u64,
    pub(super) frees: u64,
    pub(super) dirtied: u64,
}

impl<P: Platform> Shared<'_, P> {
    /// Counts everything and notes the counters: just before t0.
    pub(super) fn open_window(&self, task: &Task<P>, root: Option<u32>) {
        let mmu = self.vm.mmu();
        // What workers did so far belongs to nobody's window.
        drop(mmu.design().take_worker_reports());
        let counts = P::quiet(|| self.count(task, root));
        // Nor does what was recorded so far, and what waits for a grace period from before.
        mmu.rcu().barrier();
        drop(mmu.rcu().timeline().map(|timeline| timeline.take()));
        let rcu = mmu.rcu().stats();
        let mut all = lock(&self.collected);
        all.shadow_at_t0 = self.shadow().map(ShadowMmu::counts).unwrap_or_default();
        all.at_t0 = counts;
        all.dropped = root;
        all.tables_at_t0 = counts.all_tables();
        all.base = Base {
            rcu_cpu_ns: rcu.thread_cpu_ns,
            rcu_thread_ns: (rcu.waiting_ns, rcu.freeing_ns),
            flushes: self.flushes(),
            kicks: self.vm.side().kicks(),
            frees: mmu.pool().stats().frees,
            dirtied: self.vm.side().primary.frames().stats().dirtied,
        };
    }

    /// Waits for workers and grace periods, and stamps the end of the window.
    pub(super) fn await_teardown(&self, task: &Task<P>) {
        let mmu = self.vm.mmu();
        {
            let _waiting = task.phase(Phase::QueueDelay);
            mmu.design().quiesce();
        }
        {
            let _waiting = task.phase(Phase::GracePeriod);
            mmu.rcu().barrier();
            if let Some(shadow) = self.shadow() {
                shadow.reclamation().drain(task);
            }
        }
        self.window.end.store(P::ticks(), Ordering::Release);
        self.seal_rcu();
        let reports = mmu.design().take_worker_reports();
        let mut all = lock(&self.collected);
        all.workers = reports.into_iter().map(|r| (r.meter, r.cpu_ns)).collect();
        drop(all);
        self.seal();
        P::quiet(|| self.look_at_the_rest(task));
        self.control.report("torn down", 1.0);
    }

    /// What is left when everything is torn down.
    fn look_at_the_rest(&self, task: &Task<P>) {
        let dropped = lock(&self.collected).dropped;
        let rest = self.rest(task, dropped);
        let mut all = lock(&self.collected);
        (all.tables_after, all.stale_tables, all.retained) = (rest.tables, rest.stale, rest.retained);
    }

    /// The RCU thread's times from t0 to now, the end of the window.
    fn seal_rcu(&self) {
        let rcu = self.vm.mmu().rcu().stats();
        let mut all = lock(&self.collected);
        all.rcu_cpu_ns = rcu.thread_cpu_ns.saturating_sub(all.base.rcu_cpu_ns);
        let (waiting, freeing) = all.base.rcu_thread_ns;
        all.rcu_thread_ns = (rcu.waiting_ns.saturating_sub(waiting), rcu.freeing_ns.saturating_sub(freeing));
    }

    /// Stamps and counters from t0 to now, when everything is torn down.
    fn seal(&self) {
        let mmu = self.vm.mmu();
        let t0 = self.window.t0.load(Ordering::Acquire);
        let mut all = lock(&self.collected);
        let freed = mmu.pool().stats().frees - all.base.frees;
        // The shadow MMU zaps inside of the call, or at the end of the VM.
        let zap_end = match (self.shadow(), all.returned) {
            (None, _) => mmu.last_zap_end(),
            (Some(_), Some((at, _))) => at,
            (Some(_), None) => 0,
        };
        all.shadow_at_end = self.shadow().map(ShadowMmu::counts);
        all.last_zap_end_ns = (zap_end >= t0).then(|| P::ticks_to_ns(zap_end - t0));
        all.last_free_ns = (freed > 0).then(|| P::ticks_to_ns(mmu.last_table_free().saturating_sub(t0)));
        all.freed = freed;
        all.written_back = self.vm.side().primary.frames().stats().dirtied - all.base.dirtied;
        all.flushes = self.flushes() - all.base.flushes;
        all.kicks = self.vm.side().kicks() - all.base.kicks;
    }

    /// Ends the VM; `complete`: everything else went well, so what it holds is of interest, or its end is what is measured.
    pub(super) fn close(&self, complete: bool) -> Result<End, LabError> {
        let task = self.vm.task("close", TaskRole::Caller);
        let mmu = self.vm.mmu();
        let mut last = None;
        let measured = complete && self.scenario.pays.is_none();
        if measured {
            self.open_window(&task, None);
            self.window.t0.store(P::ticks(), Ordering::Release);
        } else if complete {
            mmu.design().quiesce();
            mmu.rcu().barrier();
            last = Some(P::quiet(|| self.last_state(&task)));
        }
        let report = self.vm.close().map_err(internal("closing the VM"))?;
        if measured {
            self.window.t0.store(report.begin, Ordering::Release);
            self.window.end.store(P::ticks(), Ordering::Release);
            if self.shadow().is_some() {
                let zapped = report.begin + P::ns_to_ticks(report.zap_all_ns);
                lock(&self.collected).returned = Some((zapped, 0));
            }
            self.seal_rcu();
            self.seal();
        }
        Ok(End { report, last })
    }
}

/// How a VM ended.
pub(super) struct End {
    pub(super) report: CloseReport,
    /// What was mapped before.
    pub(super) last: Option<LastState>,
}
