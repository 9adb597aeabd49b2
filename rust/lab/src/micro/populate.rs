//! Populating: in bulk, by the map step alone, and by complete faults.

use tdpmmu_mmu::{MapFault, MapOutcome};
use tdpmmu_platform::{Platform, Role as TaskRole};
use tdpmmu_spte::geometry::{page_bytes, span};
use tdpmmu_table::TableCache;
use tdpmmu_vm::{AdMix, BulkOptions, Progress, Vm};

use super::{Bench, P, clean, empty, fail, faults};
use crate::LabError;
use crate::memory::Estimate;

impl Bench<'_> {
    pub(super) fn populate(&mut self, estimate: &Estimate) -> Result<(), LabError> {
        let memory = self.plan.config.memory_bytes;
        let level = self.plan.level;
        let pages = memory / page_bytes(1);
        let vm = self.vm(memory, level)?;
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let write = self.limits.one.write_ns;
        let all = self.limits.for_threads(cpus).map_or(write, |l| l.write_ns);
        for (threads, limit) in [(1, write), (cpus, all)] {
            let name = format!("bulk, {threads} thread{}", if threads == 1 { "" } else { "s" });
            let cancel = self.control.flag().clone();
            self.best(name, Some(("write_ns", limit)), Some(1.2), || {
                let mut vcpu = vm.vcpu(0).map_err(fail("a vCPU"))?;
                vcpu.root().map_err(fail("a root"))?;
                let options = BulkOptions { level, ad: AdMix::Dirty, threads };
                let progress = Progress::default();
                progress.cancel.store(
                    cancel.load(std::sync::atomic::Ordering::Relaxed),
                    std::sync::atomic::Ordering::Relaxed,
                );
                let begin = P::ticks();
                let made =
                    vm.populate_bulk(&mut vcpu, 0..pages, &options, &progress).map_err(fail("bulk"))?;
                let took = P::ticks_to_ns(P::ticks() - begin);
                drop(vcpu);
                empty(&vm)?;
                if made != estimate.sptes {
                    return Err(LabError::Internal(format!(
                        "{made} SPTEs made, {} expected",
                        estimate.sptes
                    )));
                }
                Ok((took, made))
            })?;
        }
        let some = pages.min(1 << 20) / span(level) * span(level);
        // The map step alone: lock and cache once per 2 MiB, one compare-exchange an SPTE. The shadow MMU's is no step of its own.
        if self.plan.shadow.is_empty() {
            let cmpxchg = self.limits.one.cmpxchg_ns;
            let of = Some(("cmpxchg_ns", cmpxchg));
            self.best("map step, a leaf table's run a call", of, Some(1.4), || {
                map_steps(&vm, some, level, true)
            })?;
            self.best("map step, one SPTE a call", of, None, || map_steps(&vm, some, level, false))?;
        }
        let mut first = true;
        self.best("complete faults, first touch of every table", None, None, || {
            if !std::mem::take(&mut first) {
                empty(&vm)?;
            }
            let mut vcpu = vm.vcpu(0).map_err(fail("a vCPU"))?;
            faults(&mut vcpu, (0..some).step_by(span(level) as usize), true)
        })?;
        clean(&vm)
    }
}

fn map_steps(vm: &Vm<P>, pages: u64, level: u8, ranges: bool) -> Result<(u64, u64), LabError> {
    let mmu = vm.mmu();
    let task = vm.task("map", TaskRole::Vcpu);
    let mut cache = TableCache::default();
    let pool = |e: tdpmmu_table::PoolError| LabError::Internal(e.to_string());
    let root = mmu.load_root(&task, &mut cache, mmu.root_role(false)).map_err(pool)?;
    let mut count = 0;
    let begin = P::ticks();
    for first in (0..pages).step_by(512 * span(level) as usize) {
        mmu.top_up(&task, &mut cache).map_err(pool)?;
        let mut guard = mmu.lock.read(&task);
        let end = (first + 512 * span(level)).min(pages);
        let fault = |gfn| MapFault::page(gfn, gfn, level);
        if ranges {
            count += mmu
                .map_range(&mut guard, &mut cache, root, &fault(first), (end - first) / span(level))
                .map_err(|outcome| LabError::Internal(format!("gfn {first:#x}: {outcome:?}")))?;
            continue;
        }
        for gfn in (first..end).step_by(span(level) as usize) {
            if !matches!(mmu.map(&mut guard, &mut cache, root, &fault(gfn)), MapOutcome::Fixed { .. }) {
                return Err(LabError::Internal(format!("gfn {gfn:#x} was not mapped")));
            }
            count += 1;
        }
    }
    if count != pages / span(level) {
        return Err(LabError::Internal(format!("{count} SPTEs mapped of {}", pages / span(level))));
    }
    let took = P::ticks_to_ns(P::ticks() - begin);
    cache.drain(mmu.pool());
    mmu.put_roots(&task, &[root]);
    drop(task);
    empty(vm)?;
    Ok((took, count))
}
