//! One recorded zap, run for real: vCPUs in the guest, the request, what it held up.
//!
//! As many vCPUs run as the host has CPUs beside the caller's: one more would wait for a CPU and not for the design. Each polls for kicks; a
//! probe stamps its exit for the request and its next entry.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tdpmmu_platform::{Platform, RcuDomain, Real, Role as TaskRole};
use tdpmmu_trace::Shape;
use tdpmmu_vm::{Vcpu, VcpuProbe, Vm, VmError};

use super::{RunAs, Setting, rebuild};
use crate::{Control, LabError};

/// What one run came to.
pub(super) struct Measured {
    pub(super) sptes: u64,
    pub(super) tables: u64,
    pub(super) caller_blocked_ns: u64,
    pub(super) vcpus_blocked_ns: Vec<u64>,
    pub(super) background_ns: u64,
    pub(super) retained_tables: u64,
}

fn fail(what: &str) -> impl Fn(VmError) -> LabError + '_ {
    move |error| match error {
        VmError::Cancelled => LabError::Cancelled,
        error => LabError::Internal(format!("what if: {what}: {error}")),
    }
}

/// Time out of the guest, in ticks.
struct Away(Arc<Mutex<u64>>);

impl VcpuProbe for Away {
    fn reentered(&mut self, _bits: u64, seen_at: u64, entered_at: u64) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) += entered_at.saturating_sub(seen_at);
    }

    fn slow_fault(&mut self, _root: u32, _loaded_at: u64, _began: u64, _ended: u64) {}
}

/// Builds the trees, runs the request, takes everything down.
pub(super) fn run(
    shape: &Shape,
    run_as: RunAs,
    setting: &Setting,
    vcpus_recorded: usize,
    control: &Control,
) -> Result<Measured, LabError> {
    let smm = shape.roots.iter().any(|r| r.as_id == 1);
    let running = match run_as {
        RunAs::FastZap => vcpus_recorded.min(setting.cpus.saturating_sub(1).max(1)),
        RunAs::RootDrop | RunAs::VmEnd => 1,
    };
    // The vCPU in SMM holds its roots and sleeps.
    let vm = rebuild::vm(shape, setting, running + usize::from(smm))?;
    let result = with_vm(&vm, shape, run_as, running, smm, control);
    let end = vm.close().map_err(fail("the end of the VM"))?;
    let mut measured = result?;
    if run_as == RunAs::VmEnd {
        measured.caller_blocked_ns = end.total_ns;
    }
    if !end.is_clean() {
        return Err(LabError::Check {
            message: format!("what if: the run left something behind: {end:?}"),
            partial: String::new(),
        });
    }
    Ok(measured)
}

fn with_vm(
    vm: &Vm<Real>,
    shape: &Shape,
    run_as: RunAs,
    running: usize,
    smm: bool,
    control: &Control,
) -> Result<Measured, LabError> {
    let mut first = vm.vcpu(0).map_err(fail("a vCPU"))?;
    let mut manager = if smm { Some(vm.vcpu(running).map_err(fail("a vCPU"))?) } else { None };
    rebuild::populate(vm, shape, &mut first, manager.as_mut())?;
    let task = vm.task("what-if", TaskRole::Caller);
    let counts = vm.mmu().count_all(&task);
    let expected: u64 = shape.roots.iter().map(|r| r.leafs()).sum();
    if counts.sptes() != expected {
        return Err(LabError::Internal(format!(
            "what if: {} leafs were built where {expected} were recorded",
            counts.sptes()
        )));
    }
    drop(vm.mmu().design().take_worker_reports());
    vm.mmu().rcu().barrier();
    let mut measured = Measured {
        sptes: counts.sptes(),
        tables: counts.all_tables(),
        caller_blocked_ns: 0,
        vcpus_blocked_ns: Vec::new(),
        background_ns: 0,
        retained_tables: 0,
    };
    let retained = || u64::try_from(vm.mmu().linked_tables()).unwrap_or(0);
    match run_as {
        RunAs::VmEnd => {}
        RunAs::RootDrop => {
            first.enter().map_err(fail("guest entry"))?;
            let begin = Real::ticks();
            first.unload();
            let end = Real::ticks();
            measured.retained_tables = retained();
            measured.vcpus_blocked_ns = vec![Real::ticks_to_ns(end - begin)];
        }
        RunAs::FastZap => {
            // Its handle goes to the vCPU's own thread; its roots stay in its cache.
            first.leave();
            drop(first);
            let (total, away) = fast_zap(vm, running, &mut measured, &retained, control)?;
            measured.caller_blocked_ns = total;
            measured.vcpus_blocked_ns = away;
        }
    }
    if run_as != RunAs::VmEnd {
        vm.mmu().design().quiesce();
        let reports = vm.mmu().design().take_worker_reports();
        measured.background_ns = reports.iter().map(|r| r.cpu_ns).sum();
    }
    drop(manager);
    Ok(measured)
}

/// The fast zap beside vCPUs in the guest: its time, and each vCPU's time out of the guest.
fn fast_zap(
    vm: &Vm<Real>,
    running: usize,
    measured: &mut Measured,
    retained: &dyn Fn() -> u64,
    control: &Control,
) -> Result<(u64, Vec<u64>), LabError> {
    let inside = AtomicUsize::new(0);
    let over = AtomicBool::new(false);
    let away: Vec<Arc<Mutex<u64>>> = (0..running).map(|_| Arc::default()).collect();
    let zapped = std::thread::scope(|scope| -> Result<u64, LabError> {
        let mut threads = Vec::new();
        for (id, away) in away.iter().enumerate() {
            let (inside, over) = (&inside, &over);
            let away = Arc::clone(away);
            let thread = std::thread::Builder::new()
                .name(format!("vcpu-{id}"))
                .spawn_scoped(scope, move || vcpu_loop(vm, id, away, inside, over));
            match thread {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    over.store(true, Ordering::Release);
                    return Err(LabError::Internal(format!("the host refused a thread: {error}")));
                }
            }
        }
        while inside.load(Ordering::Acquire) < running && !over.load(Ordering::Acquire) {
            if control.cancelled() {
                over.store(true, Ordering::Release);
                return Err(LabError::Cancelled);
            }
            std::thread::yield_now();
        }
        let task = vm.task("caller", TaskRole::Caller);
        let zapped = vm.fast_zap(&task).map_err(fail("the fast zap"));
        measured.retained_tables = retained();
        // Every vCPU answers before it is told to stop: its put may be what tears down.
        let answered = inside.load(Ordering::Acquire);
        while zapped.is_ok() && inside.load(Ordering::Acquire) < answered.max(2 * running) {
            if control.cancelled() || over.load(Ordering::Acquire) {
                break;
            }
            std::thread::yield_now();
        }
        over.store(true, Ordering::Release);
        for thread in threads {
            thread.join().unwrap_or_else(|_| {
                Err(LabError::Internal("what if: a vCPU's thread panicked".to_owned()))
            })?;
        }
        Ok(zapped?.total_ns)
    })?;
    let ns =
        |ticks: &Arc<Mutex<u64>>| Real::ticks_to_ns(*ticks.lock().unwrap_or_else(PoisonError::into_inner));
    Ok((zapped, away.iter().map(ns).collect()))
}

/// In the guest until it is over; `inside` counts entries: one at the beginning, one after the request.
fn vcpu_loop(
    vm: &Vm<Real>,
    id: usize,
    away: Arc<Mutex<u64>>,
    inside: &AtomicUsize,
    over: &AtomicBool,
) -> Result<(), LabError> {
    let run = || -> Result<(), LabError> {
        let mut vcpu: Vcpu<'_, Real> = vm.vcpu(id).map_err(fail("a vCPU"))?;
        vcpu.enter().map_err(fail("guest entry"))?;
        // What was asked of it while the tree was built is not this request's.
        vcpu.set_probe(Some(Box::new(Away(away))));
        inside.fetch_add(1, Ordering::AcqRel);
        let (kicked, mut answered) = (vcpu.stats().entries, false);
        while !over.load(Ordering::Acquire) {
            if !vcpu.poll().map_err(fail("guest entry"))? {
                break;
            }
            if !answered && vcpu.stats().entries > kicked {
                answered = true;
                inside.fetch_add(1, Ordering::AcqRel);
            }
            std::hint::spin_loop();
        }
        vcpu.leave();
        Ok(())
    };
    let done = run();
    if done.is_err() {
        over.store(true, Ordering::Release);
    }
    done
}
