//! What a fault costs: complete accesses to pages that are not mapped, by all vCPUs at once, each on memory of its own.

use std::sync::Barrier;

use tdpmmu_platform::{Platform, Real, Role as TaskRole};
use tdpmmu_spte::geometry::{page_bytes, span};
use tdpmmu_vm::{AccessOutcome, GuestAccess, Vm, VmError};

use crate::run::{build_guest, vm_config};
use crate::scenario::Scenario;
use crate::{Control, LabError};

type P = Real;

/// At most so many faults a vCPU.
const FAULTS: u64 = 1 << 15;

fn fail(error: VmError) -> LabError {
    LabError::Internal(format!("a fault: {error}"))
}

/// The mean over all faults of all vCPUs, on a fresh VM like the scenario's. The guest's tables are there, the host's pages are there, the MMU's tables are not.
pub(super) fn mean_ns(scenario: &Scenario, control: &Control) -> Result<f64, LabError> {
    let spec = &scenario.vm;
    control.check()?;
    control.report("faulting", 0.0);
    let vm = Vm::<P>::new(vm_config(spec, None)?).map_err(fail)?;
    let pages = spec.memory_bytes / page_bytes(1);
    vm.add_memory(&vm.task("setup", TaskRole::Caller), 0, pages, spec.level).map_err(fail)?;
    if spec.shadow.as_ref().is_some_and(|shadow| shadow.paging == "guest") {
        build_guest(&vm, pages, spec.level, spec.levels)?;
    }
    vm.mmu().pool().prefault(scenario.estimate.tables).map_err(|e| LabError::Internal(e.to_string()))?;
    let leaves = pages / span(spec.level);
    let slice = (leaves / spec.vcpus as u64).max(1);
    let count = slice.min(FAULTS);
    let stride = slice / count;
    let start = Barrier::new(spec.vcpus);
    let work = |id: usize| -> Result<(u64, u64), LabError> {
        let vcpu = vm.vcpu(id).map_err(fail).and_then(|mut vcpu| {
            vcpu.root().map_err(fail)?;
            Ok(vcpu)
        });
        start.wait();
        let mut vcpu = vcpu?;
        let first = (id as u64 * slice).min(leaves - slice);
        let mut faulted = 0;
        let begin = P::ticks();
        for n in 0..count {
            let gfn = (first + n * stride) * span(spec.level);
            let outcome = vcpu.access(GuestAccess { gfn, write: true, exec: false }).map_err(fail)?;
            faulted += u64::from(outcome >= AccessOutcome::FastFault);
        }
        Ok((P::ticks() - begin, faulted))
    };
    let (mut ticks, mut faulted) = (0, 0);
    std::thread::scope(|scope| -> Result<(), LabError> {
        let work = &work;
        let threads: Vec<_> = (0..spec.vcpus).map(|id| scope.spawn(move || work(id))).collect();
        for thread in threads {
            let done =
                thread.join().map_err(|_| LabError::Internal("a faulting thread panicked".into()))??;
            (ticks, faulted) = (ticks + done.0, faulted + done.1);
        }
        Ok(())
    })?;
    let report = vm.close().map_err(fail)?;
    if !report.is_clean() {
        let message = format!("the VM did not end clean: {report:?}");
        return Err(LabError::Check { message, partial: String::new() });
    }
    if faulted == 0 {
        return Err(LabError::Internal("nothing faulted on a fresh VM".into()));
    }
    Ok(P::ticks_to_ns(ticks) as f64 / faulted as f64)
}
