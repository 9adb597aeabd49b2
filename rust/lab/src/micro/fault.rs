//! One page fault through the complete path, while only leaves come and go.

use tdpmmu_platform::{Role as TaskRole, Task};
use tdpmmu_spte::geometry::page_bytes;
use tdpmmu_vm::Vm;

use super::{Bench, P, clean, fail, faults};
use crate::LabError;

impl Bench<'_> {
    pub(super) fn fault(&mut self) -> Result<(), LabError> {
        let memory = self.plan.config.memory_bytes.max(16 << 20);
        let vm = self.vm(memory, 1)?;
        let pages = memory / page_bytes(1);
        let hot = pages.min(8 * 512);
        for (name, gfns, write, goal) in [
            ("write fault, 8 leaf tables hot", hot, true, Some(50.0)),
            ("read fault, 8 leaf tables hot", hot, false, Some(50.0)),
            ("write fault, random over all memory", pages, true, None),
        ] {
            // Tables once, then only leaves come and go.
            let order: Vec<u64> = if gfns == hot {
                (0..hot).collect()
            } else {
                shuffled(pages, pages.min(1 << 18), self.plan.config.seed)
            };
            {
                let mut vcpu = vm.vcpu(0).map_err(fail("a vCPU"))?;
                faults(&mut vcpu, order.iter().copied(), true)?;
            }
            let task = vm.task("unmap", TaskRole::Caller);
            self.best(name, None, goal, || {
                zap_leaves(&vm, &task, 0..gfns);
                let mut vcpu = vm.vcpu(0).map_err(fail("a vCPU"))?;
                faults(&mut vcpu, order.iter().copied(), write)
            })?;
        }
        clean(&vm)
    }
}

fn shuffled(pages: u64, count: u64, seed: u64) -> Vec<u64> {
    let mut random = crate::guest::Random::new(seed);
    let mut seen = std::collections::HashSet::new();
    let mut order = Vec::with_capacity(count as usize);
    while (order.len() as u64) < count {
        let gfn = random.draw() % pages;
        if seen.insert(gfn) {
            order.push(gfn);
        }
    }
    order
}

fn zap_leaves(vm: &Vm<P>, task: &Task<P>, gfns: std::ops::Range<u64>) {
    let mut guard = vm.mmu().lock.write(task);
    if let Some(shadow) = vm.shadow() {
        // Nobody is in the guest, and a fault forgets its own translation: the flush that is owed finds nothing.
        shadow.unmap(&mut guard, 0, gfns, true);
        return;
    }
    let mut debt = vm.mmu().unmap(&mut guard, 0, gfns, true);
    vm.mmu().pay(task, &mut debt);
}
