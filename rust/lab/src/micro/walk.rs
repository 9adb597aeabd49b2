//! The lockless walk: dependent, where the next gfn follows from the last answer, and independent.

use std::hint::black_box;

use tdpmmu_mmu::TdpMmu;
use tdpmmu_platform::{Platform, Role as TaskRole, Task};
use tdpmmu_spte::geometry::page_bytes;
use tdpmmu_vm::{AdMix, BulkOptions, Progress};

use super::{Bench, P, clean, fail};
use crate::LabError;
use crate::memory::Estimate;

impl Bench<'_> {
    pub(super) fn walk(&mut self, estimate: &Estimate) -> Result<(), LabError> {
        let memory = self.plan.config.memory_bytes;
        let pages = memory / page_bytes(1);
        let vm = self.vm(memory, self.plan.level)?;
        let mut vcpu = vm.vcpu(0).map_err(fail("a vCPU"))?;
        let options = BulkOptions { level: self.plan.level, ad: AdMix::Dirty, threads: 0 };
        let made =
            vm.populate_bulk(&mut vcpu, 0..pages, &options, &Progress::default()).map_err(fail("bulk"))?;
        if made != estimate.sptes {
            return Err(LabError::Internal(format!("{made} SPTEs made, {} expected", estimate.sptes)));
        }
        let root = vcpu.root().map_err(fail("a root"))?;
        let mmu = vm.mmu();
        let task = vm.task("walk", TaskRole::Observer);
        let mut sizes = vec![(8 * 512, Some(15.0)), (512 * 512, Some(30.0)), (pages, None)];
        sizes.retain(|s| s.0 <= pages);
        sizes.dedup_by_key(|s| s.0);
        for (gfns, goal) in sizes {
            for (dependent, kind) in [(true, "dependent"), (false, "independent")] {
                let name = format!("lockless walk, {kind}, over {} leaf tables", gfns / 512);
                self.best(name, None, goal.filter(|_| dependent), || {
                    if dependent {
                        walks::<true>(mmu, &task, root, gfns)
                    } else {
                        walks::<false>(mmu, &task, root, gfns)
                    }
                })?;
            }
        }
        drop(task);
        drop(vcpu);
        clean(&vm)
    }
}

/// Walks to pseudo-random gfns; a dependent walk needs the last one's answer to know where to go.
fn walks<const DEPENDENT: bool>(
    mmu: &TdpMmu<P>,
    task: &Task<P>,
    root: u32,
    gfns: u64,
) -> Result<(u64, u64), LabError> {
    const WALKS: u64 = 1 << 20;
    // The largest power of two of gfns: the top bits of one product choose among them, without a division.
    let shift = 64 - gfns.ilog2();
    let (mut at, mut fold) = (0, 0u64);
    let begin = P::ticks();
    for n in 0..WALKS {
        let Some((leaf, _)) = mmu.lookup(task, root, at) else {
            return Err(LabError::Internal(format!("gfn {at:#x} is not mapped")));
        };
        fold ^= leaf.raw();
        let seed = if DEPENDENT { leaf.pfn() + n } else { n };
        at = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> shift;
    }
    black_box(fold);
    Ok((P::ticks_to_ns(P::ticks() - begin), WALKS))
}
