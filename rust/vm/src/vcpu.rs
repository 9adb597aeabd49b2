//! A virtual CPU: the run loop that uses translations, faults, and answers requests.
//!
//! **Guarantee.** Translations are used only between a guest entry that found no request pending and the exit that follows a kick; a vCPU with a root has flushed that
//! root's tag since it loaded it. Each root in the cache carries one reference, put exactly once.
//!
//! **Mechanism.** [`Vcpu`] is a handle for one thread, borrowed from the [`Vm`]; what survives the handle (TLB, roots, table cache) stays in the VM. A real
//! CPU takes an interrupt wherever it is; this one polls its mode word at every access. **A handle that is in the guest and makes no access does not answer
//! kicks**: call [`Vcpu::leave`] (or drop it) before doing anything else for long.

use std::sync::MutexGuard;

use tdpmmu_platform::{Bug, Event, Fault, NIL, Platform, Site, Task};
use tdpmmu_shadow::Walker;
use tdpmmu_spte::Role;
use tdpmmu_table::TableCache;

use crate::fault::FaultOutcome;
use crate::hwlog::HardwareLog;
use crate::request::{self, VcpuState};
use crate::root_cache::{CachedRoot, RootCache, Switch};
use crate::slots::SlotReader;
use crate::tlb::{Tlb, TlbStats};
use crate::walker::{self, GuestAccess};
use crate::{Vm, VmError};

/// What a vCPU translates by (`struct kvm_mmu`): its roots, and what it wants of them.
#[derive(Debug, Default)]
pub(crate) struct MmuContext {
    pub(crate) roots: RootCache,
    pub(crate) role: Role,
    /// Levels of its roots.
    pub(crate) levels: u8,
    /// Its roots are shadow pages.
    pub(crate) shadow: bool,
    /// They shadow tables of the guest's, whose top one is `frame`.
    pub(crate) guest: bool,
    /// The guest's CR3 in pages (an L1's nested CR3 in a context for L2); 0 where the roots are direct.
    pub(crate) frame: u64,
    /// `frame` was set.
    pub(crate) has_frame: bool,
}

/// What of a vCPU outlives its handles.
pub(crate) struct VcpuCore<P: Platform> {
    pub(crate) mmu: MmuContext,
    /// The context that is not in use, in a VM whose vCPUs may enter an L2: L2's, or L1's while in L2.
    pub(crate) other: Option<Box<MmuContext>>,
    /// An L2 runs.
    pub(crate) in_l2: bool,
    pub(crate) tlb: Tlb,
    pub(crate) cache: TableCache,
    pub(crate) slots: SlotReader<P>,
    pub(crate) loaded_at: u64,
    pub(crate) stats: VcpuStats,
    pub(crate) hardware_log: HardwareLog,
}

/// How an access ended, from the cheapest to the dearest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum AccessOutcome {
    /// The TLB had it.
    TlbHit = 0,
    /// The hardware walker found it.
    Walk = 1,
    /// A fault fixed without mmu_lock.
    FastFault = 2,
    /// A fault through the slow path.
    SlowFault = 3,
    /// As the slow path, and it had to start again at least once.
    Retry = 4,
    /// No memory, or read-only memory: emulated.
    Emulate = 5,
    /// The vCPU was asked to stop; nothing was accessed.
    Stopped = 6,
}

impl AccessOutcome {
    /// Every outcome, in order.
    pub const ALL: [AccessOutcome; 7] = [
        Self::TlbHit,
        Self::Walk,
        Self::FastFault,
        Self::SlowFault,
        Self::Retry,
        Self::Emulate,
        Self::Stopped,
    ];

    /// Its name in results.
    pub const fn name(self) -> &'static str {
        ["tlb_hit", "walk", "fast_fault", "slow_fault", "retry", "emulate", "stopped"][self as usize]
    }
}

/// Counts of a vCPU's life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuStats {
    /// Guest entries.
    pub entries: u64,
    /// Exits because of a kick.
    pub kicked: u64,
    /// Root loads (each with a local flush).
    pub loads: u64,
    /// Faults fixed without the lock.
    pub fast: u64,
    /// Faults that installed a leaf.
    pub fixed: u64,
    /// Faults that found the access allowed.
    pub spurious: u64,
    /// Faults that had to start again.
    pub retries: u64,
    /// Accesses emulated.
    pub emulated: u64,
    /// Page faults that the guest's own tables caused, which are the guest's to handle.
    pub guest_faults: u64,
    /// Stores to the guest's tables that were emulated, because a shadow page stands for the table.
    pub tracked_writes: u64,
    /// The TLB's own counts.
    pub tlb: TlbStats,
}

/// Listens to the rare events of a vCPU, on its own thread. Times are ticks of the platform's clock.
pub trait VcpuProbe: Send {
    /// Requests `bits` were seen at `seen_at`; the guest was entered again at `entered_at`.
    fn reentered(&mut self, bits: u64, seen_at: u64, entered_at: u64);
    /// A slow fault from `began` to `ended` has completed under `root`, which this vCPU loaded at `loaded_at`.
    fn slow_fault(&mut self, root: u32, loaded_at: u64, began: u64, ended: u64);
}

/// One thread's hold of a vCPU. See the module text.
pub struct Vcpu<'v, P: Platform> {
    pub(crate) vm: &'v Vm<P>,
    pub(crate) core: MutexGuard<'v, VcpuCore<P>>,
    pub(crate) task: Task<P>,
    pub(crate) state: &'v VcpuState,
    /// For lockless walks of shadow pages, in a VM that has any.
    pub(crate) walker: Option<Walker<'v, P, &'v VcpuState>>,
    id: usize,
    in_guest: bool,
    seen: Option<(u64, u64)>,
    probe: Option<Box<dyn VcpuProbe>>,
}

impl<'v, P: Platform> Vcpu<'v, P> {
    pub(crate) fn new(
        vm: &'v Vm<P>,
        id: usize,
        core: MutexGuard<'v, VcpuCore<P>>,
        task: Task<P>,
        state: &'v VcpuState,
    ) -> Self {
        task.set_vcpu(id);
        let walker = vm.shadow().and_then(|shadow| shadow.reclamation().walker(Some(state)).ok());
        Self { vm, core, task, state, walker, id, in_guest: false, seen: None, probe: None }
    }

    /// The vCPU's number.
    pub fn id(&self) -> usize {
        self.id
    }

    /// "current" of this thread.
    pub fn task(&self) -> &Task<P> {
        &self.task
    }

    /// The VM.
    pub fn vm(&self) -> &'v Vm<P> {
        self.vm
    }

    /// Installs a listener; returns the one before.
    pub fn set_probe(&mut self, probe: Option<Box<dyn VcpuProbe>>) -> Option<Box<dyn VcpuProbe>> {
        std::mem::replace(&mut self.probe, probe)
    }

    /// Counts so far, over all handles.
    pub fn stats(&self) -> VcpuStats {
        VcpuStats { tlb: self.core.tlb.stats(), ..self.core.stats }
    }

    /// The role word this vCPU wants of its roots.
    pub fn role(&self) -> Role {
        self.core.mmu.role
    }

    /// The current root, if one is loaded.
    pub fn current_root(&self) -> Option<u32> {
        self.core.mmu.roots.current().map(|r| r.root)
    }

    /// The current root, loaded if there is none.
    ///
    /// # Errors
    /// [`VmError::Pool`] without a page for it.
    #[inline]
    pub fn root(&mut self) -> Result<u32, VmError> {
        match self.core.mmu.roots.current() {
            Some(root) => Ok(root.root),
            None => self.load_root(),
        }
    }

    /// kvm_mmu_load: takes a reference on a root of the wanted role and flushes that root's tag.
    #[cold]
    fn load_root(&mut self) -> Result<u32, VmError> {
        P::point(Site::VcpuRoot);
        let root = if self.core.mmu.shadow {
            self.load_shadow_root()?
        } else {
            let core = &mut *self.core;
            self.vm.mmu().load_root(&self.task, &mut core.cache, core.mmu.role)?
        };
        let core = &mut *self.core;
        core.mmu.roots.install(CachedRoot { root, role: core.mmu.role, frame: core.mmu.frame });
        // The page may have been a root before, and its translations may still be cached under its number (F6).
        P::point(Site::TlbFlush);
        if !P::bug(Bug::C09) {
            self.flush_root(root);
        }
        let core = &mut *self.core;
        core.loaded_at = P::ticks();
        core.stats.loads += 1;
        Ok(root)
    }

    /// The local flush of what is tagged with `root`.
    pub(crate) fn flush_root(&mut self, root: u32) {
        self.core.tlb.flush_root(root);
        self.task.detail(|| Event::TlbFlushRoot { vcpu: self.id as u32, root });
    }

    /// kvm_mmu_unload: puts every cached root, the current one too.
    pub fn unload(&mut self) {
        self.leave();
        self.drop_roots(|_, _| true);
    }

    /// Puts each cached root that `which` names, of either context; it is told whether the root is a shadow page.
    pub(crate) fn drop_roots(&mut self, which: impl Fn(bool, u32) -> bool) {
        let core = &mut *self.core;
        for context in std::iter::once(&mut core.mmu).chain(core.other.as_deref_mut()) {
            let shadow = context.shadow;
            let roots = context.roots.take_if(|root| which(shadow, root));
            self.vm.put_roots(&self.task, shadow, roots.as_slice());
        }
    }

    /// Drops every root and loads one again: what a guest that toggles CR0.WP, or SMM, costs. Ready for guest entry on return. Returns
    /// the new root.
    ///
    /// # Errors
    /// [`VmError::Pool`] without a page for the root.
    pub fn drop_root(&mut self) -> Result<u32, VmError> {
        self.unload();
        self.load_root()
    }

    /// Wants roots of another role from now on (kvm_mmu_new_pgd): a cached one is used again, else the next entry loads one. Whether the roots are shadow pages, and of what, is the
    /// vCPU's paging and not a role's to change.
    pub fn switch_role(&mut self, role: Role) {
        self.leave();
        self.core.mmu.role = role;
        self.switch_roots();
    }

    /// The wanted role, or the guest's table to be shadowed, has changed. A cached root that fits is used again: it may be out of step with the guest's tables, and is synced.
    pub(crate) fn switch_roots(&mut self) {
        let core = &mut *self.core;
        match core.mmu.roots.switch(core.mmu.role, core.mmu.frame) {
            Switch::Same => {}
            Switch::Hit => {
                if let Some(root) = self.current_root() {
                    self.sync_roots(&[root]);
                    self.flush_root(root);
                }
            }
            Switch::Miss(evicted) => {
                if let Some(root) = evicted {
                    let shadow = self.core.mmu.shadow;
                    self.vm.put_roots(&self.task, shadow, &[root]);
                }
            }
        }
    }

    /// Is this vCPU in system management mode: address space 1?
    pub fn in_smm(&self) -> bool {
        self.core.mmu.role.as_id() == 1
    }

    /// An SMI arrives: the vCPU drops every root it has cached and wants one of address space 1 from its next entry on. Nothing happens in SMM.
    pub fn enter_smm(&mut self) {
        self.set_smm(true);
    }

    /// RSM: back to address space 0, at the same price.
    pub fn exit_smm(&mut self) {
        self.set_smm(false);
    }

    /// Each change of SMM resets the MMU context, in all kernels from 5.10 to 7.2: every cached root is put, the previous ones too, so that none is found
    /// again by its role word in this vCPU's cache. What that costs is the owner's: where the last put zaps, or queues a zap, the tables are built again after
    /// each SMI (the hit-rate problem that 6.4 solved by the MMU's own reference).
    fn set_smm(&mut self, smm: bool) {
        if self.in_smm() == smm {
            return;
        }
        // An SMI leaves the L2 first.
        self.leave_l2();
        self.unload();
        let layout = self.vm.mmu().profile().role_layout;
        let mut fields = layout.unpack(self.core.mmu.role);
        fields.smm = u8::from(smm);
        self.core.mmu.role = layout.pack(&fields);
    }

    /// Is this vCPU in the guest?
    pub fn in_guest(&self) -> bool {
        self.in_guest
    }

    /// Enters the guest: services requests, loads a root, sets the mode, tests the requests again. False: asked to stop.
    ///
    /// # Errors
    /// As [`Vcpu::reload`].
    pub fn enter(&mut self) -> Result<bool, VmError> {
        if self.in_guest {
            return Ok(true);
        }
        loop {
            if !self.reload()? {
                return Ok(false);
            }
            if self.state.enter_guest::<P>() {
                break;
            }
        }
        self.in_guest = true;
        self.core.stats.entries += 1;
        let (vcpu, root) = (self.id as u32, self.current_root());
        self.task.detail(|| Event::GuestEnter { vcpu, root: root.unwrap_or(NIL) });
        if let Some((bits, seen_at)) = self.seen.take()
            && let Some(probe) = &mut self.probe
        {
            probe.reentered(bits, seen_at, P::ticks());
        }
        Ok(true)
    }

    /// The first half of an entry: services requests and loads a root, without entering the guest. False: asked to stop.
    ///
    /// # Errors
    /// [`VmError::Pool`] without a page for the root; [`VmError::RingFull`] while the vCPU's dirty ring is soft-full.
    pub fn reload(&mut self) -> Result<bool, VmError> {
        self.leave();
        if self.state.is_requested::<P>(request::STOP) {
            return Ok(false);
        }
        // Before anything is serviced, as the kernel looks: a root that is obsolete stays in the cache of a vCPU that must not run.
        if self.vm.side().rings.as_ref().is_some_and(|rings| rings.soft_full(self.id)) {
            return Err(VmError::RingFull { vcpu: self.id });
        }
        if self.state.pending::<P>() && !self.service() {
            return Ok(false);
        }
        self.root()?;
        Ok(true)
    }

    /// Leaves the guest.
    #[inline]
    pub fn leave(&mut self) {
        if self.in_guest {
            if !self.core.hardware_log.is_empty() {
                self.flush_hardware_log();
            }
            self.in_guest = false;
            self.task.detail(|| Event::GuestExit { vcpu: self.id as u32 });
            self.state.exit_guest::<P>();
        }
    }

    /// Services what is requested. False: stop.
    #[cold]
    fn service(&mut self) -> bool {
        if self.state.is_requested::<P>(request::STOP) {
            return false;
        }
        let bits = self.state.take::<P>(
            request::RELOAD | request::FREE_OBSOLETE_ROOTS | request::TLB_FLUSH | request::OUTSIDE_GUEST,
        );
        if self.probe.is_some() {
            let (before, at) = self.seen.unwrap_or_else(|| (0, P::ticks()));
            self.seen = Some((before | bits, at));
        }
        if bits & request::RELOAD != 0 {
            self.drop_roots(|_, _| true);
        } else if bits & request::FREE_OBSOLETE_ROOTS != 0 {
            let vm = self.vm;
            self.drop_roots(|shadow, root| vm.is_obsolete(shadow, root));
        }
        if bits & request::TLB_FLUSH != 0 && !P::bug(Bug::C02) {
            P::point(Site::TlbFlush);
            self.core.tlb.flush();
            self.task.detail(|| Event::TlbFlush { vcpu: self.id as u32 });
        }
        true
    }

    /// Answers a kick, if there is one, and enters the guest again: what an idle guest does with its time slice. False: asked to stop.
    ///
    /// # Errors
    /// As [`Vcpu::enter`].
    pub fn poll(&mut self) -> Result<bool, VmError> {
        if self.in_guest && self.state.kicked::<P>() {
            self.acknowledge();
        }
        self.enter()
    }

    #[cold]
    fn acknowledge(&mut self) {
        if self.probe.is_some() && self.seen.is_none() {
            self.seen = Some((0, P::ticks()));
        }
        self.core.stats.kicked += 1;
        self.leave();
    }

    /// HLT: leaves the guest and sleeps until [`Vm::wake`], a stop, or the timeout. Requests do not wake it.
    pub fn halt(&mut self, timeout_ns: Option<u64>) -> bool {
        self.leave();
        self.state.halt::<P>(timeout_ns)
    }

    /// The guest makes an access, in guest mode, and it completes: translated, or emulated. `access.gfn` is what its CPU translates: a guest-physical page, or a virtual one where its own tables are
    /// shadowed ([`crate::Paging::Guest`], or an L2's guest-physical page).
    ///
    /// # Errors
    /// [`VmError::BadAccess`] for one that writes and fetches; [`VmError::GuestFault`] where the guest's own tables do not allow it: the guest maps the page and tries again; as [`Vcpu::fault`].
    #[inline]
    pub fn access(&mut self, access: GuestAccess) -> Result<AccessOutcome, VmError> {
        if self.in_guest
            && !self.state.kicked::<P>()
            && let Some(root) = self.core.mmu.roots.current()
            && let Some(hit) = self.core.tlb.lookup(root.root, access.gfn, access.write, access.exec)
        {
            // A vCPU that loses its CPU in the guest still uses what it has translated.
            P::point(Site::TlbAccess);
            request::pause::<P>(Fault::VcpuPause, Site::TlbAccess);
            if self.vm.rules().check_frames {
                self.accessed(root.root, access.gfn, access.write, hit.pfn(access.gfn));
            }
            return Ok(AccessOutcome::TlbHit);
        }
        self.access_slow(access)
    }

    /// The access has gone through to `pfn`: is it the owner's?
    #[cold]
    #[inline(never)]
    fn accessed(&self, root: u32, gfn: u64, write: bool, pfn: u64) {
        let (vcpu, as_id) = (self.id as u32, self.core.mmu.role.as_id());
        self.task.detail(|| Event::GuestAccess { vcpu, as_id, root, gfn, pfn, write });
        self.vm.side().primary.frames().check_access(pfn);
    }

    fn access_slow(&mut self, access: GuestAccess) -> Result<AccessOutcome, VmError> {
        if access.write && access.exec {
            // What the fast page fault would fix for the write the walk would refuse to the fetch, for ever.
            return Err(VmError::BadAccess { gfn: access.gfn });
        }
        let mut outcome = AccessOutcome::Walk;
        loop {
            if !self.poll()? {
                return Ok(AccessOutcome::Stopped);
            }
            let root = self.root()?;
            let mmu = self.vm.mmu();
            let core = &mut *self.core;
            let walked = walker::walk::<P>(
                &self.task,
                mmu.pool(),
                mmu.format(),
                &mut core.tlb,
                root,
                core.mmu.levels,
                access,
            );
            let fault = match walked {
                Ok((_, dirtied)) => {
                    let GuestAccess { gfn, write, exec } = access;
                    if self.vm.rules().check_frames
                        && let Some(hit) = self.core.tlb.lookup(root, gfn, write, exec)
                    {
                        // Not always the entry just walked: one of its table may still be cached, where a huge leaf came over that and the flush is on its way.
                        self.accessed(root, gfn, access.write, hit.pfn(gfn));
                    }
                    if dirtied && self.vm.rules().hardware_log && self.vm.side().slots.any_logs() {
                        self.log_dirtied(access.gfn);
                    }
                    return Ok(outcome);
                }
                Err(fault) => fault,
            };
            self.leave();
            self.core.tlb.invalidate(root, access.gfn);
            let began = if self.probe.is_some() { P::ticks() } else { 0 };
            let stats = |core: &mut VcpuCore<P>, done: FaultOutcome| match done {
                FaultOutcome::Fast(_) => core.stats.fast += 1,
                FaultOutcome::Fixed { .. } => core.stats.fixed += 1,
                FaultOutcome::Spurious => core.stats.spurious += 1,
                FaultOutcome::Retry => core.stats.retries += 1,
                FaultOutcome::Emulate => core.stats.emulated += 1,
            };
            let done = self.page_fault(access, fault)?;
            stats(&mut self.core, done);
            match done {
                FaultOutcome::Fast(_) => outcome = outcome.max(AccessOutcome::FastFault),
                FaultOutcome::Fixed { .. } | FaultOutcome::Spurious => {
                    outcome = outcome.max(AccessOutcome::SlowFault);
                    let loaded_at = self.core.loaded_at;
                    if let Some(probe) = &mut self.probe {
                        probe.slow_fault(root, loaded_at, began, P::ticks());
                    }
                }
                FaultOutcome::Retry => {
                    outcome = outcome.max(AccessOutcome::Retry);
                    let (as_id, gfn) = (self.core.mmu.role.as_id(), access.gfn);
                    self.task.observe(|| Event::FaultRetry { as_id, gfn });
                    self.before_retry();
                }
                FaultOutcome::Emulate => return Ok(AccessOutcome::Emulate),
            }
        }
    }

    /// Hardware has set Dirty: its log knows. A full one is an exit of its own; the access has been made.
    #[cold]
    fn log_dirtied(&mut self, gfn: u64) {
        // Off while an L2 runs: the log would be of its own addresses, not L1's (5.10 on).
        if self.vm.mmu().profile().role_layout.unpack(self.core.mmu.role).guest_mode {
            return;
        }
        if self.core.hardware_log.push(gfn) {
            self.leave();
        }
    }

    /// Hardware walks ahead of the program and fills its caches: allowed at any time in the guest, changes no state but Accessed. True: a translation was cached.
    pub fn speculate(&mut self, gfn: u64) -> bool {
        if !self.in_guest || self.state.kicked::<P>() {
            return false;
        }
        let Some(root) = self.current_root() else { return false };
        let mmu = self.vm.mmu();
        let VcpuCore { tlb, mmu: context, .. } = &mut *self.core;
        walker::walk::<P>(
            &self.task,
            mmu.pool(),
            mmu.format(),
            tlb,
            root,
            context.levels,
            GuestAccess::read(gfn),
        )
        .is_ok()
    }
}

impl<P: Platform> Drop for Vcpu<'_, P> {
    fn drop(&mut self) {
        self.leave();
    }
}
