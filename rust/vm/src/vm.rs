//! A virtual machine: memslots, vCPUs, the MMU, and what acts on all of them.
//!
//! **Guarantee.** Lock order: slots_lock, then mmap_lock, then mmu_lock, then what the MMU takes inside; a vCPU's own lock is its handle and is taken
//! before all of them, by its thread alone. A memslot is gone for faults (INVALID, SRCU) before its SPTEs are zapped, and its SPTEs are gone before the slot is.
//! When [`Vm::unmap_hva`] returns, no SPTE and no TLB holds a frame of the range, and no fault can bring one back.
//!
//! **Mechanism.** [`Vm::fast_zap`] is the whole protocol of 5.18 and later in five lines: exclusive { invalidate the roots; request a reload of every vCPU
//! and wait until none is in the guest }, unlock, let the design finish. What designs differ in is behind `invalidate`, `in_lock` and `finish`. The shadow MMU's part, where there is one, lies in the exclusive hold: the
//! generation is toggled before the request, obsolete pages are zapped after it, with lock-break.
//!
//! As in KVM a VM has both MMUs, and one mmu_lock: the TDP MMU owns it, with the pool and the RCU domain that both use. Under a shadow design the TDP MMU has no roots; with nested guests both have.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex as StdMutex, TryLockError};

use tdpmmu_mmu::{Leftovers, MmuConfig, MmuError, TdpMmu, design};
use tdpmmu_platform::{
    Event, LockClass, Mutex, MutexGuard, NO_TASK, Observer, Phase, Platform, RcuConfig, Recording,
    Role as TaskRole, Site, Task, TaskConfig,
};
use tdpmmu_shadow::{ShadowConfig, ShadowDesign, ShadowLeftovers, ShadowMmu, SlotBooks};
use tdpmmu_spte::{NotifierUnit, Role, RoleFields};
use tdpmmu_table::TableCache;

use crate::VmError;
use crate::config::{HostLevel, Paging, VmConfig};
use crate::design::shadow_design;
use crate::dirty::{DirtyMode, Protocol};
use crate::frames::FrameStats;
use crate::host::PrimaryMmu;
use crate::hwlog::HardwareLog;
use crate::mmap_lock::{MmapLock, MmapRead, MmapWrite};
use crate::request::{self, VcpuState};
use crate::ring::Rings;
use crate::side::HostSide;
use crate::slots::{Memslots, SlotSet, SlotWriter};
use crate::stats::FaultCounts;
use crate::tlb::Tlb;
use crate::told::Told;
use crate::vcpu::{MmuContext, Vcpu, VcpuCore, VcpuStats};

/// What a fault asks at every step, gathered in one cache line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) fast_page_fault: bool,
    pub(crate) ad_bits: bool,
    pub(crate) early_check: bool,
    pub(crate) stale_root_check: bool,
    pub(crate) check_frames: bool,
    pub(crate) max_level: u8,
    pub(crate) hardware_log: bool,
    /// The lockless fault of shadow pages, which the kernel has had since 3.6, long before that of TDP entries.
    pub(crate) fast_shadow_fault: bool,
    /// vCPUs on the TDP MMU share the VM with shadow pages.
    pub(crate) nested: bool,
}

/// Where the time of one fast zap went, in nanoseconds; `t0` in ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FastZapTimes {
    /// Entry of the call, slots_lock held, in ticks.
    pub t0: u64,
    /// Waiting for mmu_lock, exclusive.
    pub lock_wait_ns: u64,
    /// The first exclusive hold, up to the first unlock or lock-break.
    pub exclusive_hold_ns: u64,
    /// All exclusive holds of the calling task, without the breaks between them.
    pub exclusive_total_ns: u64,
    /// The longest exclusive hold.
    pub exclusive_longest_ns: u64,
    /// Exclusive holds: the first, one after each lock-break of a zap under it, and one of a design that waits for who holds the lock.
    pub exclusive_holds: u64,
    /// Until every vCPU was out of the guest (part of the hold).
    pub kick_wait_ns: u64,
    /// vCPUs that were in the guest.
    pub kicked: u32,
    /// After the unlock, until nothing is mapped any more.
    pub zap_ns: u64,
    /// Entry to return.
    pub total_ns: u64,
    /// The calling task's ticks by phase meanwhile, indexed by `Phase as usize`.
    pub phase_ticks: [u64; Phase::ALL.len()],
}

/// What was left when a VM ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CloseReport {
    /// Zap of everything when the memory goes, in nanoseconds.
    pub zap_all_ns: u64,
    /// From the call to the last table freed, in nanoseconds.
    pub total_ns: u64,
    /// CPU time of the closing thread meanwhile, in nanoseconds.
    pub cpu_ns: u64,
    /// Of it, inside zaps of roots.
    pub walk_cpu_ns: u64,
    /// SPTEs that it wrote.
    pub entry_writes: u64,
    /// SPTEs that it read.
    pub entry_reads: u64,
    /// Entry of the call, in ticks.
    pub begin: u64,
    /// The closing task's ticks by phase meanwhile, indexed by `Phase as usize`.
    pub phase_ticks: [u64; Phase::ALL.len()],
    /// What the closing task recorded, if tasks record.
    pub recording: Option<Box<Recording>>,
    /// Roots, tables and leaves still counted: all zero, or something leaked.
    pub leftovers: Leftovers,
    /// The same of the shadow MMU, where there was one.
    pub shadow: Option<ShadowLeftovers>,
    /// Table pages that did not come back to the pool.
    pub tables_leaked: u64,
    /// Tables freed twice.
    pub double_frees: u64,
    /// Broken invariants that the MMU recorded.
    pub violations: Vec<String>,
    /// The frames' books; `violations` in it must be 0.
    pub frames: FrameStats,
}

impl CloseReport {
    /// Nothing leaked and nothing was violated?
    pub fn is_clean(&self) -> bool {
        self.leftovers == Leftovers::default()
            && self.shadow.as_ref().is_none_or(|left| *left == ShadowLeftovers::default())
            && self.tables_leaked == 0
            && self.double_frees == 0
            && self.violations.is_empty()
            && self.frames.violations == 0
    }
}

/// A virtual machine. See the module text.
pub struct Vm<P: Platform> {
    mmu: Arc<TdpMmu<P>>,
    shadow: Option<Arc<ShadowMmu<P>>>,
    pub(crate) paging: Paging,
    pub(crate) quota: Option<u32>,
    side: Arc<HostSide<P>>,
    pub(crate) slots_lock: Mutex<P, SlotWriter<P>>,
    vcpus: Vec<StdMutex<VcpuCore<P>>>,
    states: Vec<Arc<VcpuState>>,
    rules: Rules,
    observer: Option<Arc<dyn Observer>>,
    task: TaskConfig,
    mmap_lock: MmapLock<P>,
    pub(crate) counts: Vec<FaultCounts>,
    pub(crate) protocol: Protocol,
    pub(crate) host_level: Option<HostLevel>,
    /// KVM_X86_QUIRK_SLOT_ZAP_ALL: on unless user space has disabled it.
    pub(crate) slot_zap_all: AtomicBool,
    /// Somebody holds a file descriptor of this VM.
    open_fd: AtomicBool,
    closing: AtomicBool,
    closed: Mutex<P, Option<CloseReport>>,
}

impl<P: Platform> Vm<P> {
    /// Builds a VM without memory.
    ///
    /// # Errors
    /// [`VmError::Config`], [`VmError::Host`], [`VmError::Pool`].
    pub fn new(config: VmConfig) -> Result<Self, VmError> {
        let (passes, ownership) = config.check()?;
        // The design's attach checks as well, for who builds an MMU alone; here, also for designs without workers.
        design::check_worker_cpus::<P>(&config.worker_cpus).map_err(|error| VmError::Config {
            what: "worker_cpus",
            value: error.cpu.to_string(),
            rule: design::WorkerCpuError::RULE,
        })?;
        let design = design::build::<P>(config.tdp_design_name(), &config.design_options())
            .map_err(|e| VmError::Mmu(e.to_string()))?;
        // SRCU waits for faults, which may wait for mmu_lock for as long as a zap holds it: no stall reports.
        let srcu = RcuConfig {
            batch_delay_ns: 0,
            stall_ns: u64::MAX,
            observer: None,
            log: false,
            ..config.rcu.clone()
        };
        let slots = Arc::new(Memslots::new(srcu, config.memslot_generation));
        let hardware_log = config.dirty_mode == DirtyMode::DBits;
        let rings = match config.dirty_ring {
            None => None,
            Some(entries) => Some(Rings::new(entries, config.vcpus, hardware_log)?),
        };
        let primary = PrimaryMmu::new(config.host_pages)?;
        let detail = config.observer.as_ref().is_some_and(|observer| observer.wants_detail());
        if let Some(observer) = &config.observer {
            primary.frames().tell(Arc::clone(observer));
            let event = Event::VmBegin { vcpus: config.vcpus as u32, writes_back: config.write_back };
            observer.event(P::task_id().unwrap_or(NO_TASK), &event);
        }
        // 5.18 drops obsolete roots only; before, a reload dropped all (the profiles between 5.15 and 5.18 differ in both switches). A
        // design that keeps its roots valid has no obsolete ones: it asks as 5.10 did. The shadow MMU tells obsolete pages in all kernels.
        let keeps = design::info(config.tdp_design_name()).is_some_and(|info| info.obligations.keeps_roots);
        let reload = if config.profile.stale_root_check && !keeps {
            request::FREE_OBSOLETE_ROOTS
        } else {
            request::RELOAD
        };
        let side = Arc::new(HostSide::new(primary, Arc::clone(&slots), config.vcpus, rings, reload));
        let counts = (0..config.vcpus).map(|_| FaultCounts::default()).collect();
        let protocol = Protocol::new(config.eager_page_split, config.dirty_mode);
        let format = config.format.with_maxphyaddr(config.maxphyaddr);
        let rules = Rules {
            fast_page_fault: config.profile.fast_page_fault,
            ad_bits: format.ad_bits,
            early_check: config.profile.notifier_unit == NotifierUnit::Gfn,
            stale_root_check: config.profile.stale_root_check,
            check_frames: config.check_frames || detail,
            max_level: config.max_level,
            hardware_log,
            fast_shadow_fault: true,
            nested: config.shadow.nested,
        };
        let mmu = TdpMmu::new(
            MmuConfig {
                profile: config.profile,
                format,
                root_level: config.root_level,
                maxphyaddr: config.maxphyaddr,
                passes,
                ownership,
                design,
                max_tables: config.max_tables,
                hugepages: config.hugepages,
                quarantine: config.quarantine,
                batch: config.batch,
                write_back: config.write_back,
                observer: config.observer.clone(),
                rcu: config.rcu.clone(),
                task: config.task.clone(),
            },
            side.clone(),
        )
        .map_err(|error| match error {
            MmuError::Pool(error) => VmError::Pool(error),
            other => VmError::Mmu(other.to_string()),
        })?;
        mmu.set_nx_huge_pages(config.nx_huge_pages);
        let paging = config.paging();
        let shadow =
            if config.has_shadow() { Some(build_shadow(&config, format, &mmu, &side)?) } else { None };
        if config.shadow.nested {
            side.know_tdp(&mmu);
        }
        let context = |l2: bool| {
            let direct = paging == Paging::Direct && !l2;
            let shadow = paging != Paging::Tdp || l2;
            let role = if shadow {
                role_of_shadow(&mmu, config.root_level, direct, l2, false)
            } else {
                mmu.root_role(false)
            };
            MmuContext {
                role,
                levels: config.root_level,
                shadow,
                guest: shadow && !direct,
                ..MmuContext::default()
            }
        };
        let vcpus = (0..config.vcpus)
            .map(|id| {
                StdMutex::new(VcpuCore {
                    mmu: context(false),
                    other: config.shadow.nested.then(|| Box::new(context(true))),
                    in_l2: false,
                    tlb: Tlb::default(),
                    cache: TableCache::default(),
                    slots: slots.reader(&format!("vcpu-{id}")),
                    loaded_at: 0,
                    stats: VcpuStats::default(),
                    hardware_log: HardwareLog::default(),
                })
            })
            .collect();
        Ok(Self {
            mmu,
            shadow,
            paging,
            quota: config.shadow.quota,
            states: side.vcpus.clone(),
            side,
            slots_lock: Mutex::new(SlotWriter::new(slots)),
            vcpus,
            rules,
            observer: config.observer,
            task: config.task,
            mmap_lock: MmapLock::new(),
            counts,
            protocol,
            host_level: config.host_level,
            slot_zap_all: AtomicBool::new(true),
            open_fd: AtomicBool::new(true),
            closing: AtomicBool::new(false),
            closed: Mutex::new(None),
        })
    }

    /// The TDP MMU.
    #[inline(always)]
    pub fn mmu(&self) -> &TdpMmu<P> {
        &self.mmu
    }

    /// The shadow MMU: of a VM with a shadow design, or with nested guests.
    #[inline(always)]
    pub fn shadow(&self) -> Option<&ShadowMmu<P>> {
        self.shadow.as_deref()
    }

    /// The role of a valid root of shadow pages: `direct`, or shadowing a guest's table of `levels`; of an L2; in SMM.
    pub(crate) fn shadow_role(&self, levels: u8, direct: bool, l2: bool, smm: bool) -> Role {
        role_of_shadow(&self.mmu, levels, direct, l2, smm)
    }

    /// Is a cached root one that no guest entry may use any more?
    pub(crate) fn is_obsolete(&self, shadow: bool, root: u32) -> bool {
        match &self.shadow {
            Some(mmu) if shadow => mmu.is_obsolete(root),
            _ => self.mmu.is_obsolete(root),
        }
    }

    /// A vCPU gives back references on `roots` of one of the two MMUs.
    pub(crate) fn put_roots(&self, task: &Task<P>, shadow: bool, roots: &[u32]) {
        match &self.shadow {
            Some(mmu) if shadow => {
                if !roots.is_empty() {
                    let mut guard = self.mmu.lock.write(task);
                    for &root in roots {
                        mmu.put_root(&mut guard, root);
                    }
                }
            }
            _ => self.mmu.put_roots(task, roots),
        }
    }

    /// Host memory, memslots and notifier state.
    #[inline(always)]
    pub fn side(&self) -> &HostSide<P> {
        &self.side
    }

    #[inline(always)]
    pub(crate) fn rules(&self) -> &Rules {
        &self.rules
    }

    /// User references (kvm->users_count): the file descriptor's, and one of each item that waits or runs in the system's queue.
    pub fn users(&self) -> u32 {
        self.mmu.users()
    }

    /// The last file descriptor is closed: from here on nobody may begin to hold this VM, and a root that the system's workers would have zapped is
    /// zapped by whoever loses it. What has it still may use it: an nx_huge_pages toggle walks the list of VMs without a reference of its own. Returns the references
    /// left; the second call does nothing.
    pub fn release_user(&self) -> u32 {
        P::locked(Site::Users);
        if self.open_fd.swap(false, Ordering::AcqRel) { self.mmu.put_user() } else { self.users() }
    }

    /// vCPUs.
    pub fn vcpu_count(&self) -> usize {
        self.vcpus.len()
    }

    /// A task for the calling thread, with the VM's settings.
    pub fn task(&self, name: &str, role: TaskRole) -> Task<P> {
        self.task_with(name, role, self.task.clone())
    }

    /// A task for the calling thread, with other settings.
    pub fn task_with(&self, name: &str, role: TaskRole, config: TaskConfig) -> Task<P> {
        Task::with_observer(self.mmu.rcu(), name, role, config, self.observer.clone())
    }

    /// Tested under the lock that an operation runs in, which [`Vm::close`] takes as well: what got past it runs to its end first.
    pub(crate) fn open(&self) -> Result<(), VmError> {
        P::point(Site::Users);
        if self.closing.load(Ordering::Acquire) { Err(VmError::Closed) } else { Ok(()) }
    }

    /// A vCPU for the calling thread.
    ///
    /// # Errors
    /// [`VmError::NoVcpu`], [`VmError::Busy`] while another handle exists, [`VmError::Closed`].
    pub fn vcpu(&self, id: usize) -> Result<Vcpu<'_, P>, VmError> {
        self.vcpu_with(id, self.task.clone())
    }

    /// A vCPU for the calling thread, its task with other settings.
    ///
    /// # Errors
    /// As [`Vm::vcpu`].
    pub fn vcpu_with(&self, id: usize, config: TaskConfig) -> Result<Vcpu<'_, P>, VmError> {
        self.open()?;
        let cell = self.vcpus.get(id).ok_or(VmError::NoVcpu { vcpu: id, count: self.vcpus.len() })?;
        P::locked(Site::Users);
        let core = match cell.try_lock() {
            Ok(core) => core,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Err(VmError::Busy { vcpu: id }),
        };
        // Again under the lock, which close takes too: it may have come and gone since.
        self.open()?;
        let task = self.task_with(&format!("vcpu-{id}"), TaskRole::Vcpu, config);
        Ok(Vcpu::new(self, id, core, task, &self.states[id]))
    }

    /// Mode and requests of a vCPU, for others to look at.
    pub fn vcpu_state(&self, id: usize) -> Option<&VcpuState> {
        self.states.get(id).map(|state| &**state)
    }

    /// Wakes a halted vCPU.
    pub fn wake(&self, id: usize) {
        if let Some(state) = self.states.get(id) {
            state.wake::<P>();
        }
    }

    /// Asks every vCPU to leave the run loop, and wakes the halted ones. [`Vm::resume`] takes it back.
    pub fn stop_vcpus(&self, task: &Task<P>) {
        self.side.request_all(task, request::STOP);
        for state in &self.states {
            state.wake::<P>();
        }
    }

    /// Lets vCPUs run again.
    pub fn resume(&self) {
        for state in &self.states {
            state.take::<P>(request::STOP);
        }
    }

    /// The memslots now.
    pub fn slots(&self) -> SlotSet {
        self.side.slots.snapshot()
    }

    /// Present leaves under listed roots that are invalid: what a sound fast zap leaves none of when it returns. A full read of their trees.
    pub fn sptes_under_obsolete_roots(&self, task: &Task<P>) -> u64 {
        self.mmu.sptes_under_obsolete_roots(task)
    }

    /// Zaps everything as a memslot update does, without changing a slot: what an nx_huge_pages toggle does.
    ///
    /// # Errors
    /// [`VmError::Closed`].
    pub fn fast_zap(&self, task: &Task<P>) -> Result<FastZapTimes, VmError> {
        let _slots = self.lock_slots(task);
        self.open()?;
        Ok(self.fast_zap_locked(task, None))
    }

    pub(crate) fn lock_slots<'a>(
        &'a self,
        task: &'a Task<P>,
    ) -> Told<'a, P, MutexGuard<'a, P, SlotWriter<P>>> {
        let _waiting = task.phase(Phase::LockWait);
        Told::taken(self.slots_lock.lock(), task, LockClass::Slots, false)
    }

    /// For who changes what the host maps.
    pub(crate) fn lock_mmap<'a>(&'a self, task: &'a Task<P>) -> Told<'a, P, MmapWrite<'a, P>> {
        let _waiting = task.phase(Phase::LockWait);
        Told::taken(self.mmap_lock.write(), task, LockClass::Mmap, false)
    }

    /// For who only needs it to stay, and the VM to stay open.
    pub(crate) fn share_mmap<'a>(&'a self, task: &'a Task<P>) -> Told<'a, P, MmapRead<'a, P>> {
        let _waiting = task.phase(Phase::LockWait);
        Told::taken(self.mmap_lock.read(), task, LockClass::Mmap, true)
    }

    /// kvm_mmu_zap_all_fast; the caller holds slots_lock. `dying`: the books of a memslot that goes afterwards.
    pub(crate) fn fast_zap_locked(&self, task: &Task<P>, dying: Option<&Arc<SlotBooks>>) -> FastZapTimes {
        let ns = |from: u64, to: u64| P::ticks_to_ns(to.saturating_sub(from));
        task.meter().reset_exclusive_holds();
        let t0 = P::ticks();
        let before = task.meter().phase_ticks(t0);
        let mut guard = self.mmu.lock.write(task);
        let taken = P::ticks();
        self.mmu.fast_zap_invalidate(&mut guard);
        // One hold from the toggle to the request: nobody sees one of the two MMUs made obsolete and the other not.
        if let Some(shadow) = &self.shadow {
            shadow.fast_zap_begin(&mut guard);
        }
        // In the same hold: a vCPU that takes the lock after us finds no valid root and its request pending (F6).
        let reload = self.side.reload | request::WAIT | request::NO_WAKEUP;
        let kicks = if self.paging == Paging::Tdp || self.zaps_all() {
            self.side.request_all(task, reload)
        } else {
            request::Kicks::default()
        };
        self.mmu.fast_zap_in_lock(&mut guard);
        if let Some(shadow) = &self.shadow {
            shadow.fast_zap_rest(&mut guard, dying);
        }
        drop(guard);
        let released = P::ticks();
        self.mmu.fast_zap_finish(task);
        let done = P::ticks();
        let after = task.meter().phase_ticks(done);
        // Summed by the lock itself: a design that zaps under the exclusive lock breaks it, and holds it again.
        let holds = task.meter().exclusive_holds();
        let (hold_ns, total_ns) = (P::ticks_to_ns(holds.first_ticks), ns(t0, done));
        FastZapTimes {
            t0,
            // A thread that is preempted between getting the lock and looking at the clock holds it, and does not wait.
            lock_wait_ns: ns(t0, taken).min(total_ns.saturating_sub(hold_ns)),
            exclusive_hold_ns: hold_ns,
            exclusive_total_ns: P::ticks_to_ns(holds.total_ticks),
            exclusive_longest_ns: P::ticks_to_ns(holds.longest_ticks),
            exclusive_holds: holds.count,
            kick_wait_ns: kicks.wait_ns,
            kicked: kicks.kicked,
            zap_ns: ns(released, done),
            total_ns,
            phase_ticks: std::array::from_fn(|phase| after[phase] - before[phase]),
        }
    }

    /// Does the shadow design, if there is one, make every root obsolete?
    pub(crate) fn zaps_all(&self) -> bool {
        self.shadow.as_ref().is_none_or(|shadow| shadow.design().info().zaps_all)
    }

    /// The end of the VM, as when its process dies: no vCPU runs any more, the last user reference is given back, the memory goes (zap_all), vCPUs put their roots, the MMU is torn down, every table must be back.
    /// The second call returns the first one's report.
    ///
    /// # Errors
    /// [`VmError::Busy`] while a thread holds a vCPU handle: the VM is as open as before and its vCPUs run on. Stop them
    /// ([`Vm::stop_vcpus`]), drop the handle, and call again.
    pub fn close(&self) -> Result<CloseReport, VmError> {
        let mut closed = self.closed.lock();
        if let Some(report) = &*closed {
            return Ok(report.clone());
        }
        let task = self.task("close", TaskRole::Caller);
        let begin = P::ticks();
        let cpu = P::thread_cpu_ns();
        let before = task.meter().phase_ticks(begin);
        P::locked(Site::Users);
        self.closing.store(true, Ordering::Release);
        let mut cores = Vec::with_capacity(self.vcpus.len());
        for (vcpu, cell) in self.vcpus.iter().enumerate() {
            P::locked(Site::Users);
            match cell.try_lock() {
                Ok(core) => cores.push(core),
                Err(TryLockError::Poisoned(poisoned)) => cores.push(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => {
                    self.closing.store(false, Ordering::Release);
                    return Err(VmError::Busy { vcpu });
                }
            }
        }
        // No vCPU runs, since a run borrows a handle. A fast zap may wait for work that a test holds back.
        if let Some(queue) = self.mmu.design().queue() {
            queue.release();
        }
        // What is under way ends first: a fast zap waits for no vCPU, since their handles are ours. slots_lock before mmap_lock: who holds the
        // former may wait for an invalidation to end, whose task holds the latter and wants only mmu_lock.
        let _slots_lock = self.lock_slots(&task);
        let _mmap_lock = self.lock_mmap(&task);
        self.release_user();
        let zap_begin = P::ticks();
        {
            let mut guard = self.mmu.lock.write(&task);
            if let Some(shadow) = &self.shadow {
                shadow.zap_all(&mut guard);
            }
            self.mmu.zap_all(&mut guard);
        }
        let zap_all_ns = P::ticks_to_ns(P::ticks() - zap_begin);
        for core in &mut cores {
            let VcpuCore { mmu, other, .. } = &mut **core;
            for context in std::iter::once(mmu).chain(other.as_deref_mut()) {
                let roots = context.roots.take_all();
                self.put_roots(&task, context.shadow, roots.as_slice());
            }
            core.cache.drain(self.mmu.pool());
            core.tlb.flush();
        }
        drop(cores);
        let (shadow, leftovers) = {
            let _waiting = task.phase(Phase::GracePeriod);
            (self.shadow.as_ref().map(|shadow| shadow.uninit(&task)), self.mmu.uninit(&task))
        };
        self.side.slots.stop();
        let pool = self.mmu.pool().stats();
        let end = P::ticks();
        let after = task.meter().phase_ticks(end);
        let total_ns = P::ticks_to_ns(end - begin);
        let cpu_ns = P::thread_cpu_ns().saturating_sub(cpu);
        let meter = task.meter().take();
        let mut violations = self.mmu.violations();
        violations.extend(self.shadow.iter().flat_map(|shadow| shadow.violations()));
        if self.side.lost_entries() != 0 {
            violations.push(format!("{} dirty pages found no room in a ring", self.side.lost_entries()));
        }
        let report = CloseReport {
            zap_all_ns,
            total_ns,
            cpu_ns,
            walk_cpu_ns: meter.walk_cpu_ns,
            entry_writes: meter.entry_writes,
            entry_reads: meter.entry_reads,
            begin,
            phase_ticks: std::array::from_fn(|phase| after[phase] - before[phase]),
            recording: meter.recording,
            leftovers,
            shadow,
            tables_leaked: pool.taken,
            double_frees: pool.double_frees,
            violations,
            frames: self.side.primary.frames().stats(),
        };
        *closed = Some(report.clone());
        Ok(report)
    }
}

/// The role of a root of shadow pages.
fn role_of_shadow<P: Platform>(mmu: &TdpMmu<P>, levels: u8, direct: bool, l2: bool, smm: bool) -> Role {
    let layout = mmu.profile().role_layout;
    let direct_role = mmu.root_role(smm);
    layout.pack(&RoleFields { level: levels, direct, guest_mode: l2, ..layout.unpack(direct_role) })
}

fn build_shadow<P: Platform>(
    config: &VmConfig,
    format: tdpmmu_spte::Format,
    mmu: &Arc<TdpMmu<P>>,
    side: &Arc<HostSide<P>>,
) -> Result<Arc<ShadowMmu<P>>, VmError> {
    let host = side.clone();
    ShadowMmu::new(
        ShadowConfig {
            profile: config.profile,
            format,
            // Beside the TDP MMU, what every kernel with one has.
            design: shadow_design(config.design_name()).unwrap_or(ShadowDesign::Gen),
            reclaim: config.shadow.reclaim,
            quota: config.shadow.quota.unwrap_or(u32::MAX),
            tdp_enabled: config.paging() == Paging::Tdp,
            max_tables: config.max_tables,
            batch: 10,
            write_back: config.write_back,
            observer: config.observer.clone(),
        },
        mmu.shared_pool().clone(),
        mmu.rcu().clone(),
        host,
    )
    .map_err(|error| VmError::Mmu(error.to_string()))
}

impl<P: Platform> Drop for Vm<P> {
    fn drop(&mut self) {
        // No handle can be alive: they borrow the VM. Workers and RCU must not outlive it. Where the whole run is given up, nobody is waited for.
        if !P::abandoned() {
            let _ = self.close();
        }
    }
}
