//! The runner: a scenario on the real platform.
//!
//! **Guarantee.** Every operation really happens, on real threads. Measuring costs the measured threads nothing but clock reads at the ends of an operation. Whatever happens, also
//! cancellation and errors, every thread is joined and the VM closed, and what it left behind is part of the outcome.
//!
//! **Mechanism.** Threads are scoped; each runs its ops in order. Flags are counters under futexes in spirit: spun on with sleeps of 50 us, outside all measured
//! stretches. The first error raises the abort flag, which every wait and every guest loop tests.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use tdpmmu_mmu::Counts;
use tdpmmu_oracle::Judge;
use tdpmmu_platform::{
    Histogram, MeterSnapshot, Observer, Phase, Platform, Preempt, RcuConfig, RcuDomain, Real,
    Role as TaskRole, Site, Task, TaskConfig,
};
use tdpmmu_spte::geometry::{max_gfn, page_bytes, span};
use tdpmmu_spte::{KernelProfile, Ownership, Passes};
use tdpmmu_vm::slots::Region;
use tdpmmu_vm::{
    AdMix, BulkOptions, FastZapTimes, GuestAccess, Progress, SlotFlags, Vcpu, Vm, VmConfig, VmError,
};

use crate::guest::{self, Felt, GuestPlan, Window, WorkingSet};
use crate::outcome::{Outcome, ThreadReport};
use crate::scenario::{Ad, By, FLAGS, Flag, Mark, Op, Populate, Scenario, VmSpec, Who};
use crate::{Control, LabError};

type P = Real;

struct Shared<'a> {
    scenario: &'a Scenario,
    vm: &'a Vm<P>,
    control: &'a Control,
    abort: AtomicBool,
    flags: [AtomicU32; FLAGS],
    window: Arc<Window>,
    guests: usize,
    tables: u64,
    collected: std::sync::Mutex<Collected>,
}

/// What a thread's measured operation cost it.
#[derive(Default)]
struct Paid {
    cpu_ns: u64,
    switched_out: u64,
    meter: Option<MeterSnapshot>,
}

#[derive(Default)]
struct Collected {
    at_t0: Counts,
    tables_at_t0: u64,
    populate_ns: u64,
    prefault_ns: u64,
    populated: u64,
    update: Option<FastZapTimes>,
    marks: BTreeMap<Mark, Histogram>,
    base: Base,
    last_zap_end_ns: Option<u64>,
    last_free_ns: Option<u64>,
    tables_after: u64,
    retained: u64,
    refaults: (u64, u64),
    freed: u64,
    rcu_cpu_ns: u64,
    flushes: u64,
    kicks: u64,
    threads: Vec<ThreadReport>,
    workers: Vec<(MeterSnapshot, u64)>,
    dropped: Option<u32>,
    written_back: u64,
}

/// Counters at t0.
#[derive(Clone, Copy, Default)]
struct Base {
    rcu_cpu_ns: u64,
    flushes: u64,
    kicks: u64,
    frees: u64,
    dirtied: u64,
}

/// The extra slot that a memslot update deletes: far from the guest's memory.
const EXTRA_SLOT: u16 = 500;
const EXTRA_PAGES: u64 = 64;

fn internal(what: &str) -> impl Fn(VmError) -> LabError + '_ {
    move |error| match error {
        VmError::Cancelled => LabError::Cancelled,
        VmError::Config { .. } => LabError::Usage(error.to_string()),
        error => LabError::Internal(format!("{what}: {error}")),
    }
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Settings of tasks in a scenario.
fn task_config(spec: &VmSpec) -> TaskConfig {
    let preempt = match spec.preempt.as_str() {
        "none" => Preempt::None,
        "voluntary" => Preempt::Voluntary,
        _ => Preempt::Full,
    };
    TaskConfig {
        preempt,
        tick_ns: spec.tick_ns,
        measure: true,
        attribute: true,
        step_ns: spec.step_ns,
        force_yield: spec.force_yield,
    }
}

/// The VM's configuration from its spec.
///
/// # Errors
/// [`LabError::Usage`] for names that do not parse.
pub fn vm_config(spec: &VmSpec, observer: Option<Arc<dyn Observer>>) -> Result<VmConfig, LabError> {
    let bad = |e: String| LabError::Usage(e);
    let profile = KernelProfile::named(&spec.profile).map_err(|e| bad(e.to_string()))?;
    let mut config = VmConfig::new(profile);
    config.root_level = spec.levels;
    config.maxphyaddr = if spec.levels == 5 { 52 } else { 48 };
    config.design = Some(spec.design.clone());
    config.passes = Some(Passes::parse(&spec.passes).map_err(|e| bad(e.to_string()))?);
    config.ownership = Some(match spec.ownership.as_str() {
        "vcpu" => Ownership::Vcpu,
        "mmu" => Ownership::Mmu,
        other => return Err(bad(format!("ownership={other:?}: expected vcpu or mmu"))),
    });
    config.workers = spec.workers;
    config.vcpus = spec.vcpus;
    config.max_tables = spec.max_tables;
    config.max_level = spec.level;
    config.host_pages = (spec.memory_bytes / page_bytes(1) + EXTRA_PAGES).max(1 << 20);
    config.write_back = spec.write_back;
    config.task = task_config(spec);
    config.rcu = RcuConfig::default();
    config.observer = observer;
    Ok(config)
}

/// Runs `scenario`; `tables`: page-table pages that the guest will need, touched before the clock runs; `judge` listens to everything.
///
/// # Errors
/// [`LabError`]; the VM is closed and all threads joined in any case.
pub fn run(
    scenario: &Scenario,
    tables: u64,
    control: &Control,
    judge: Option<Arc<Judge>>,
) -> Result<Outcome, LabError> {
    let observer = judge.clone().map(|judge| judge as Arc<dyn Observer>);
    let vm = Vm::<P>::new(vm_config(&scenario.vm, observer)?).map_err(internal("the VM"))?;
    let guests =
        scenario.threads.iter().filter(|t| t.ops.iter().any(|o| matches!(o, Op::Guest { .. }))).count();
    let shared = Shared {
        scenario,
        vm: &vm,
        control,
        abort: AtomicBool::new(false),
        flags: Default::default(),
        window: Arc::default(),
        guests: guests.max(1),
        tables,
        collected: std::sync::Mutex::default(),
    };
    let result = shared.prepare().and_then(|()| shared.all_threads());
    let mut collected = std::mem::take(&mut *lock(&shared.collected));
    let queue = vm.mmu().design().queue_ns();
    if let Some(judge) = &judge {
        judge.check_quiet(vm.mmu(), &vm.task("judge", TaskRole::Observer));
    }
    let close = vm.close().map_err(internal("closing the VM"))?;
    result?;
    if let Some(judge) = &judge {
        judge.finish(vm.mmu(), &vm.task("judge", TaskRole::Observer));
    }
    let pool = vm.mmu().pool().stats();
    collected.threads.sort_by_key(|t| match t.who {
        Who::Caller => 0,
        Who::Vcpu(id) => id + 1,
    });
    Ok(Outcome {
        t0: shared.window.t0.load(Ordering::Acquire),
        at_t0: collected.at_t0,
        tables_at_t0: collected.tables_at_t0,
        populate_ns: collected.populate_ns,
        prefault_ns: collected.prefault_ns,
        populated: collected.populated,
        update: collected.update,
        marks: collected.marks,
        last_zap_end_ns: collected.last_zap_end_ns,
        last_free_ns: collected.last_free_ns,
        tables_after: collected.tables_after,
        retained: collected.retained,
        threads: collected.threads,
        workers: collected.workers,
        queue,
        rcu: vm.mmu().rcu().stats(),
        rcu_cpu_ns: collected.rcu_cpu_ns,
        flushes: collected.flushes,
        kicks: collected.kicks,
        refaults: collected.refaults,
        pool_peak: pool.peak,
        pool_cap_hits: pool.cap_hits,
        freed: collected.freed,
        written_back: collected.written_back,
        close,
    })
}

impl Shared<'_> {
    fn stopped(&self) -> bool {
        self.abort.load(Ordering::Relaxed) || self.control.cancelled()
    }

    fn raise(&self, flag: Flag) {
        self.flags[flag as usize].fetch_add(1, Ordering::Release);
    }

    fn raised(&self, flag: Flag) -> u32 {
        self.flags[flag as usize].load(Ordering::Acquire)
    }

    fn wait_for(&self, flag: Flag, count: u32, mut idle: impl FnMut()) -> Result<(), LabError> {
        while self.raised(flag) < count {
            if self.stopped() {
                return Err(LabError::Cancelled);
            }
            idle();
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }

    /// Memory and memslots, and the pool's pages touched.
    fn prepare(&self) -> Result<(), LabError> {
        let spec = &self.scenario.vm;
        let task = self.vm.task("setup", TaskRole::Caller);
        let pages = spec.memory_bytes / page_bytes(1);
        self.vm.add_memory(&task, 0, pages, spec.level).map_err(internal("memslots"))?;
        let extra = max_gfn(4, 48) / 2;
        let base = if pages <= extra { extra } else { max_gfn(spec.levels, 52) - EXTRA_PAGES };
        let hva =
            self.vm.side().primary.region(EXTRA_PAGES, base, 1, true).map_err(internal("host memory"))?;
        let region =
            Region { id: EXTRA_SLOT, as_id: 0, base, pages: EXTRA_PAGES, hva, flags: SlotFlags::default() };
        self.vm.set_memslot(&task, &region).map_err(internal("the extra memslot"))?;
        self.control.report("touching page-table memory", 0.0);
        let begin = P::ticks();
        // In steps, so that an interrupt is heeded while gigabytes are touched.
        for step in 1..=16 {
            self.control.check()?;
            self.vm
                .mmu()
                .pool()
                .prefault(self.tables * step / 16)
                .map_err(|e| LabError::Internal(e.to_string()))?;
        }
        lock(&self.collected).prefault_ns = P::ticks_to_ns(P::ticks() - begin);
        self.scenario.populate.as_ref().map_or(Ok(()), |how| self.populate(how))
    }

    fn all_threads(&self) -> Result<(), LabError> {
        let results: Vec<Result<(), LabError>> = std::thread::scope(|scope| {
            let handles: Vec<_> = self
                .scenario
                .threads
                .iter()
                .map(|thread| {
                    let name = match thread.who {
                        Who::Vcpu(id) => format!("vcpu-{id}"),
                        Who::Caller => "vmm".to_owned(),
                    };
                    let handle =
                        std::thread::Builder::new().name(name.clone()).spawn_scoped(scope, move || {
                            let done = match thread.who {
                                Who::Vcpu(id) => self.vcpu_thread(&name, id, &thread.ops),
                                Who::Caller => self.caller_thread(&name, &thread.ops),
                            };
                            if done.is_err() {
                                self.abort.store(true, Ordering::Relaxed);
                            }
                            done
                        });
                    if handle.is_err() {
                        self.abort.store(true, Ordering::Relaxed);
                    }
                    handle
                })
                .collect();
            handles
                .into_iter()
                .map(|handle| match handle {
                    Ok(handle) => {
                        handle.join().unwrap_or_else(|_| Err(LabError::Internal("a thread panicked".into())))
                    }
                    Err(error) => Err(LabError::Internal(format!("the host refused a thread: {error}"))),
                })
                .collect()
        });
        // An error explains more than the cancellations that it caused elsewhere.
        let mut cancelled = None;
        for result in results {
            match result {
                Ok(()) => {}
                Err(LabError::Cancelled) => cancelled = Some(LabError::Cancelled),
                Err(error) => return Err(error),
            }
        }
        cancelled.map_or(Ok(()), Err)
    }

    fn vcpu_thread(&self, name: &str, id: usize, ops: &[Op]) -> Result<(), LabError> {
        let mut vcpu = self.vm.vcpu_with(id, task_config(&self.scenario.vm)).map_err(internal("a vCPU"))?;
        let mut felt = Felt::default();
        let mut paid = Paid::default();
        for op in ops {
            self.vcpu_op(&mut vcpu, id, op, &mut felt, &mut paid)?;
        }
        vcpu.leave();
        self.report(name, Who::Vcpu(id), vcpu.task(), &mut paid, felt);
        Ok(())
    }

    fn report(&self, name: &str, who: Who, task: &Task<P>, paid: &mut Paid, felt: Felt) {
        let report = ThreadReport {
            name: name.to_owned(),
            who,
            // What came after the measured operation is not part of it.
            meter: paid.meter.take().unwrap_or_else(|| task.meter().take()),
            op_cpu_ns: paid.cpu_ns,
            switched_out: paid.switched_out,
            felt,
            cpu: current_cpu(),
            run_delay_ns: P::run_delay_ns(),
        };
        lock(&self.collected).threads.push(report);
    }

    fn working_set(&self, id: usize, pages: u64) -> WorkingSet {
        let spec = &self.scenario.vm;
        let gfns = spec.memory_bytes / page_bytes(1);
        WorkingSet::new(id, self.guests, pages, span(spec.level), gfns)
    }

    fn vcpu_op(
        &self,
        vcpu: &mut Vcpu<'_, P>,
        id: usize,
        op: &Op,
        felt: &mut Felt,
        paid: &mut Paid,
    ) -> Result<(), LabError> {
        match *op {
            Op::SwitchRole => {
                let layout = self.vm.mmu().profile().role_layout;
                let mut fields = layout.unpack(vcpu.role());
                fields.cr0_wp = !fields.cr0_wp;
                vcpu.switch_role(layout.pack(&fields));
            }
            Op::Load => {
                vcpu.root().map_err(internal("a root"))?;
            }
            Op::Unload => vcpu.unload(),
            Op::DropRoot { mark, times, sptes } => self.drop_root(vcpu, mark, times, sptes, paid)?,
            Op::Guest { pages, arrival_ns, write_percent, until } => {
                let plan = GuestPlan {
                    set: self.working_set(id, pages),
                    arrival_ns,
                    write_percent,
                    seed: self.scenario.seed ^ (id as u64) << 32,
                };
                // Everything mapped and most of it cached, before anybody measures.
                guest::touch(vcpu, &plan.set)?;
                self.raise(Flag::WarmedUp);
                let _ = vcpu.task().meter().take();
                let got = guest::run(vcpu, &plan, &self.window, || self.raised(until) > 0 || self.stopped())?;
                if self.stopped() {
                    return Err(LabError::Cancelled);
                }
                *felt = got;
            }
            Op::Touch { pages } => {
                let touched = guest::touch(vcpu, &self.working_set(id, pages))?;
                felt.visible_at = felt.visible_at.or(touched.first_at);
                let last = touched.last_at.unwrap_or(felt.last_fault_at);
                let mut all = lock(&self.collected);
                all.refaults.0 += touched.faults + felt.faults_after;
                all.refaults.1 = all.refaults.1.max(self.since_t0(last));
            }
            Op::SleepMs(ms) => std::thread::sleep(Duration::from_millis(ms)),
            Op::Raise(flag) => self.raise(flag),
            Op::Await { flag, count } => self.wait_for(flag, count, || {})?,
            Op::DeleteMemslot | Op::AwaitTeardown => {
                return Err(LabError::Usage("memslot updates are made by the caller's thread".into()));
            }
        }
        Ok(())
    }

    fn since_t0(&self, at: u64) -> u64 {
        P::ticks_to_ns(at.saturating_sub(self.window.t0.load(Ordering::Acquire)))
    }

    fn populate(&self, how: &Populate) -> Result<(), LabError> {
        let spec = &self.scenario.vm;
        let pages = spec.memory_bytes / page_bytes(1);
        let progress = Progress::default();
        let begin = P::ticks();
        let done = AtomicBool::new(false);
        let made = std::thread::scope(|scope| {
            // Progress and cancellation are watched from beside, not from inside the measured loop.
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    if self.stopped() {
                        progress.cancel.store(true, Ordering::Relaxed);
                    }
                    let fraction = progress.done.load(Ordering::Relaxed) as f64 / pages as f64;
                    self.control.report("populating", fraction);
                    std::thread::sleep(Duration::from_millis(10));
                }
            });
            let made = match how.by {
                By::Bulk => self.vm.vcpu(0).and_then(|mut vcpu| {
                    let ad = match how.ad {
                        Ad::Clean => AdMix::Untouched,
                        Ad::Accessed => AdMix::Clean,
                        Ad::Dirty => AdMix::Dirty,
                    };
                    let options = BulkOptions { level: spec.level, ad, threads: 0 };
                    self.vm.populate_bulk(&mut vcpu, 0..pages, &options, &progress)
                }),
                By::Faults => {
                    let write = how.ad == Ad::Dirty;
                    self.vm
                        .populate_by_faults(0..self.guests, 0..pages, write, &progress)
                        .map(|(made, _)| made)
                }
            };
            done.store(true, Ordering::Relaxed);
            made
        })
        .map_err(internal("populating"))?;
        let mut all = lock(&self.collected);
        all.populate_ns = P::ticks_to_ns(P::ticks() - begin);
        all.populated = made;
        Ok(())
    }

    fn drop_root(
        &self,
        vcpu: &mut Vcpu<'_, P>,
        mark: Mark,
        times: u64,
        sptes: u64,
        paid: &mut Paid,
    ) -> Result<(), LabError> {
        let fail = internal("dropping a root");
        let mut histogram = Histogram::new();
        let big = mark == Mark::Drop && times == 1;
        for n in 0..times {
            if n % 256 == 0 {
                if self.stopped() {
                    return Err(LabError::Cancelled);
                }
                self.control.report("dropping roots", n as f64 / times as f64);
            }
            for gfn in 0..sptes {
                let access =
                    GuestAccess { gfn: gfn * span(self.scenario.vm.level), write: true, exec: false };
                vcpu.access(access).map_err(&fail)?;
            }
            if !vcpu.enter().map_err(&fail)? {
                return Err(LabError::Cancelled);
            }
            if big {
                vcpu.leave();
                self.open_window(vcpu.task(), vcpu.current_root());
                let _ = vcpu.task().meter().take();
                vcpu.enter().map_err(&fail)?;
                self.window.t0.store(P::ticks(), Ordering::Release);
            }
            let cpu = if big { P::thread_cpu_ns() } else { 0 };
            let begin = P::ticks();
            vcpu.drop_root().map_err(&fail)?;
            let end = P::ticks();
            if big {
                paid.cpu_ns += P::thread_cpu_ns() - cpu;
                paid.meter = Some(vcpu.task().meter().take());
            }
            histogram.record(P::ticks_to_ns(end - begin));
            if mark == Mark::Drop && !big {
                self.pace();
            }
        }
        lock(&self.collected).marks.entry(mark).or_default().merge(&histogram);
        Ok(())
    }

    /// Between two drops of a loop: lets a worker finish, so that each drop is measured and not the backlog of those before.
    fn pace(&self) {
        if self.vm.mmu().ownership() == Ownership::Vcpu {
            let until = P::ticks() + P::ns_to_ticks(10_000_000);
            while self.vm.mmu().leaf_pages() != [0; 3] && P::ticks() < until {
                P::relax(Site::QueueFlush);
            }
        }
    }

    /// Counts everything and notes the counters: just before t0.
    fn open_window(&self, task: &Task<P>, root: Option<u32>) {
        let mmu = self.vm.mmu();
        // What workers did so far belongs to nobody's window.
        drop(mmu.design().take_worker_reports());
        let counts = match root {
            Some(root) => mmu.count(task, root),
            None => mmu.count_all(task),
        };
        let mut all = lock(&self.collected);
        all.at_t0 = counts;
        all.dropped = root;
        all.tables_at_t0 = counts.all_tables();
        all.base = Base {
            rcu_cpu_ns: mmu.rcu().stats().thread_cpu_ns,
            flushes: mmu.flushes(),
            kicks: self.vm.side().kicks(),
            frees: mmu.pool().stats().frees,
            dirtied: self.vm.side().primary.frames().stats().dirtied,
        };
    }

    fn caller_thread(&self, name: &str, ops: &[Op]) -> Result<(), LabError> {
        let task = self.vm.task_with(name, TaskRole::Caller, task_config(&self.scenario.vm));
        let mut paid = Paid::default();
        for op in ops {
            match *op {
                Op::DeleteMemslot => {
                    self.open_window(&task, None);
                    self.control.report("zapping", 0.0);
                    let _ = task.meter().take();
                    let (cpu, switches) = (P::thread_cpu_ns(), P::switches());
                    self.window.t0.store(P::ticks(), Ordering::Release);
                    let times = self
                        .vm
                        .delete_memslot(&task, 0, EXTRA_SLOT)
                        .map_err(internal("the memslot update"))?;
                    paid.cpu_ns += P::thread_cpu_ns() - cpu;
                    paid.switched_out += P::switches().involuntary - switches.involuntary;
                    // t0 is the entry of the fast-zap call; before it the ioctl swapped the slot arrays.
                    self.window.t0.store(times.t0, Ordering::Release);
                    lock(&self.collected).update = Some(times);
                }
                Op::AwaitTeardown => {
                    if lock(&self.collected).update.is_none() {
                        // Only waiting so far: not part of the teardown.
                        let _ = task.meter().take();
                    }
                    self.await_teardown(&task);
                    paid.meter = Some(task.meter().take());
                }
                Op::SleepMs(ms) => std::thread::sleep(Duration::from_millis(ms)),
                Op::Raise(flag) => self.raise(flag),
                Op::Await { flag, count } => self.wait_for(flag, count, || {})?,
                _ => return Err(LabError::Usage(format!("{op:?} is for a vCPU's thread"))),
            }
        }
        self.report(name, Who::Caller, &task, &mut paid, Felt::default());
        Ok(())
    }

    /// Waits for workers and grace periods, and stamps the end of the window.
    fn await_teardown(&self, task: &Task<P>) {
        let mmu = self.vm.mmu();
        {
            let _waiting = task.phase(Phase::QueueDelay);
            mmu.design().quiesce();
        }
        {
            let _waiting = task.phase(Phase::GracePeriod);
            mmu.rcu().barrier();
        }
        let now = P::ticks();
        let t0 = self.window.t0.load(Ordering::Acquire);
        self.window.end.store(now, Ordering::Release);
        let reports = mmu.design().take_worker_reports();
        let mut all = lock(&self.collected);
        all.workers = reports.into_iter().map(|r| (r.meter, r.cpu_ns)).collect();
        let freed = mmu.pool().stats().frees - all.base.frees;
        let zap_end = mmu.last_zap_end();
        all.last_zap_end_ns = (zap_end >= t0).then(|| P::ticks_to_ns(zap_end - t0));
        all.last_free_ns = (freed > 0).then(|| P::ticks_to_ns(mmu.last_table_free().saturating_sub(t0)));
        all.freed = freed;
        all.written_back = self.vm.side().primary.frames().stats().dirtied - all.base.dirtied;
        let _rcu = task.rcu_read();
        all.tables_after = mmu.linked_tables().max(0) as u64 + mmu.listed_roots().count() as u64;
        all.rcu_cpu_ns = mmu.rcu().stats().thread_cpu_ns.saturating_sub(all.base.rcu_cpu_ns);
        all.flushes = mmu.flushes() - all.base.flushes;
        all.kicks = self.vm.side().kicks() - all.base.kicks;
        // Still listed and valid: the MMU's reference keeps it (a freed page can be a root again, but not at once).
        let kept =
            all.dropped.filter(|root| mmu.listed_roots().any(|r| r == *root) && !mmu.is_obsolete(*root));
        let owned = mmu.ownership() == Ownership::Mmu;
        all.retained = kept.filter(|_| owned).map_or(0, |root| mmu.count(task, root).all_tables());
        self.control.report("torn down", 1.0);
    }
}

fn current_cpu() -> Option<u32> {
    // SAFETY: no arguments, no memory touched.
    let cpu = unsafe { libc::sched_getcpu() };
    u32::try_from(cpu).ok()
}
