//! What a guest does with its own page tables: loads them, writes to them, flushes translations made from them; and how an L1 runs an L2.
//!
//! **Guarantee.** A store to a page of tables is in memory when [`Vcpu::write_guest`] returns, whether the CPU made it or KVM had to; where a shadow page stands for the table, the shadow MMU has heard of it before the
//! guest runs on. After [`Vcpu::invlpg`], [`Vcpu::flush_guest_tlb`] or a change of CR3 this vCPU uses no translation that the guest's tables had ceased to give before the call (of the page; of any).
//!
//! **Mechanism.** A store goes through the vCPU's own translation, in the guest; the word is written before the vCPU answers a kick. If the page is write-protected the access ends in emulation: the word is written from the
//! host's side, the page logged as dirty, and the shadow MMU told, as `kvm_vcpu_write_guest_page` and the page-track notifier do it. The order is the kernel's: memory first, then the shadow pages.
//!
//! Which guest page a translation reaches is what its frame says, not the guest's tables of this moment, which may have changed since: as in hardware.
//!
//! An L2 is a second context of the vCPU with roots of its own (`root_mmu` and `guest_mmu`): its shadow pages translate L2's guest-physical pages by the nested tables in L1's memory, under a role with guest_mode set.

use tdpmmu_platform::{Platform, Site};
use tdpmmu_shadow::walk_guest;
use tdpmmu_spte::Spte;

use crate::config::Paging;
use crate::walker::GuestAccess;
use crate::{AccessOutcome, Vcpu, Vm, VmError};

impl<P: Platform> Vcpu<'_, P> {
    /// MOV to CR3: the guest's tables begin in `gfn` from now on. A root that is cached for it is used again, synced; its translations are flushed. Kept when the handle goes. For L2, see [`Vcpu::enter_l2`].
    ///
    /// # Errors
    /// [`VmError::NeedsShadow`] for a vCPU whose guest's tables nobody but the guest looks at.
    pub fn set_cr3(&mut self, gfn: u64) -> Result<(), VmError> {
        if !self.core.mmu.guest || self.core.in_l2 {
            let rule = "the guest's own tables are used only where they are shadowed (paging guest)";
            return Err(VmError::NeedsShadow { what: "CR3", rule });
        }
        self.leave();
        let same = self.core.mmu.has_frame && self.core.mmu.frame == gfn;
        (self.core.mmu.frame, self.core.mmu.has_frame) = (gfn, true);
        if same {
            self.flush_guest_tlb();
        } else {
            self.switch_roots();
        }
        Ok(())
    }

    /// The guest's CR3 in pages (an L2's nested one), once it was set.
    pub fn cr3(&self) -> Option<u64> {
        self.core.mmu.has_frame.then_some(self.core.mmu.frame)
    }

    /// INVLPG of one page, on this vCPU. Nothing where the guest's tables are not shadowed: its CPU sees to that itself.
    pub fn invlpg(&mut self, gva: u64) {
        if !self.core.mmu.guest {
            return;
        }
        self.leave();
        let roots = self.core.mmu.roots.roots();
        if let Some(shadow) = self.vm.shadow() {
            let _slots = self.core.slots.enter();
            let mut guard = self.vm.mmu().lock.write(&self.task);
            // The current root and those that the guest may come back to (KVM_MMU_ROOT_PREVIOUS).
            for &root in roots.as_slice() {
                shadow.invlpg(&mut guard, root, gva);
            }
        }
        for &root in roots.as_slice() {
            self.core.tlb.invalidate(root, gva);
        }
    }

    /// The guest flushes all its translations on this vCPU (a write of CR3 with its own value). Nothing where its tables are not shadowed.
    pub fn flush_guest_tlb(&mut self) {
        if !self.core.mmu.guest {
            return;
        }
        self.leave();
        let roots = self.core.mmu.roots.roots();
        if !roots.as_slice().is_empty() {
            self.sync_roots(roots.as_slice());
        }
        for &root in roots.as_slice() {
            self.flush_root(root);
        }
    }

    /// The guest page behind `frame`, which this vCPU reaches as `page`: the one that the tables of now name, if it has that frame; else that of the pages with contents that has it.
    fn page_of(&self, page: u64, frame: u64) -> Option<u64> {
        let (vm, context) = (self.vm, &self.core.mmu);
        let side = vm.side();
        let as_id = context.role.as_id();
        let slots = self.core.slots.enter();
        let has = |gfn: u64| {
            let slot = slots.find(as_id, gfn)?;
            side.primary.lookup(slot.hva_of(gfn)).filter(|host| host.pfn == frame).map(|_| gfn)
        };
        let guess = if context.guest {
            walk_guest::<P>(side, as_id, context.frame, context.levels, page, false, false)
                .ok()
                .map(|walk| walk.gfn)
        } else {
            Some(page)
        };
        guess.and_then(has).or_else(|| side.memory.declared().flatten().find_map(has))
    }

    /// The guest stores `value` in word `index` of the page that it calls `gva`: by its CPU, or emulated where the page is write-protected; nothing is stored if it is asked to stop ([`AccessOutcome::Stopped`]). Contents of pages that nobody declared
    /// ([`crate::guest_memory`]) are lost; the access is made all the same.
    ///
    /// # Errors
    /// As [`Vcpu::access`].
    pub fn write_guest(&mut self, gva: u64, index: u16, value: u64) -> Result<AccessOutcome, VmError> {
        let mut outcome = self.access(GuestAccess::write(gva))?;
        while outcome == AccessOutcome::Emulate && !self.emulate_write(gva, index, value) {
            self.before_retry();
            outcome = self.access(GuestAccess::write(gva))?;
        }
        match outcome {
            AccessOutcome::Stopped | AccessOutcome::Emulate => {}
            _ => {
                // Still in the guest: who takes the frame away waits until this vCPU has left.
                let hit = self
                    .current_root()
                    .and_then(|root| self.core.tlb.lookup(root, gva, true, false).map(|hit| hit.pfn(gva)));
                if let Some(gfn) = hit.and_then(|frame| self.page_of(gva, frame)) {
                    self.vm.side().memory.write::<P>(gfn, index, value);
                }
            }
        }
        Ok(outcome)
    }

    /// The guest loads word `index` of the page that it calls `gva`; 0 where that page has no contents.
    ///
    /// # Errors
    /// As [`Vcpu::access`]; [`VmError::Cancelled`] if the vCPU was asked to stop.
    pub fn read_guest(&mut self, gva: u64, index: u16) -> Result<u64, VmError> {
        if self.access(GuestAccess::read(gva))? == AccessOutcome::Stopped {
            return Err(VmError::Cancelled);
        }
        let hit = self
            .current_root()
            .and_then(|root| self.core.tlb.lookup(root, gva, false, false).map(|hit| hit.pfn(gva)));
        let page = hit.and_then(|frame| self.page_of(gva, frame));
        Ok(page.map_or(0, |gfn| self.vm.side().memory.read::<P>(gfn, index)))
    }

    /// KVM makes the store: the guest's page may be written, and stands for a table. Nothing happens where no memory is, or read-only memory: that is a device's.
    /// False: the guest's tables have changed since the access, which is to be made again.
    fn emulate_write(&mut self, page: u64, index: u16, value: u64) -> bool {
        self.leave();
        let (vm, context) = (self.vm, &self.core.mmu);
        let side = vm.side();
        let as_id = context.role.as_id();
        let gfn = if context.guest {
            let walk = walk_guest::<P>(side, as_id, context.frame, context.levels, page, true, false);
            let Ok(walk) = walk else { return false };
            walk.gfn
        } else {
            page
        };
        let slots = self.core.slots.enter();
        if slots.find(as_id, gfn).is_none_or(|slot| slot.flags.readonly) {
            return true;
        }
        side.memory.write::<P>(gfn, index, value);
        tdpmmu_mmu::MmuHost::gfn_dirty(side, &self.task, as_id, gfn);
        P::point(Site::GuestMemory);
        if let Some(shadow) = vm.shadow() {
            let mut guard = vm.mmu().lock.write(&self.task);
            shadow.page_track_write(&mut guard, as_id, gfn, index * 8, 8);
        }
        drop(slots);
        self.core.stats.tracked_writes += 1;
        true
    }

    /// The entry that translates `page` below the current root, a shadow page, with its level: a walk without mmu_lock, under the reclamation in use. Leaves the guest; loads no root. `None` without a root of shadow pages, or
    /// where nothing is mapped.
    pub fn walk_shadow(&mut self, page: u64) -> Option<(Spte, u8)> {
        self.leave();
        if !self.core.mmu.shadow {
            return None;
        }
        let (root, shadow, walker) = (self.current_root()?, self.vm.shadow()?, self.walker.as_ref()?);
        shadow.walk_lockless(&walker.begin(&self.task), root, page).leaf()
    }

    /// The leaf that translates `page` below the current root, of either MMU: no lock.
    pub fn lookup(&mut self, page: u64) -> Option<(Spte, u8)> {
        if self.core.mmu.shadow {
            return self.walk_shadow(page);
        }
        let root = self.current_root()?;
        self.vm.mmu().lookup(&self.task, root, page)
    }

    /// Does this vCPU run an L2?
    pub fn in_l2(&self) -> bool {
        self.core.in_l2
    }

    /// L1 runs an L2: from here on the vCPU's addresses are L2's guest-physical ones, translated by L1's nested tables of `levels` (4 or 5) that begin in L1's page `ncr3`. Roots stay cached on both sides. In an L2 it
    /// is another L2's turn.
    ///
    /// # Errors
    /// [`VmError::NeedsShadow`] in a VM without `nested`; [`VmError::Config`] for another number of levels.
    pub fn enter_l2(&mut self, ncr3: u64, levels: u8) -> Result<(), VmError> {
        if !(4..=5).contains(&levels) {
            let rule = "nested tables have 4 or 5 levels";
            return Err(VmError::Config { what: "levels", value: levels.to_string(), rule });
        }
        if self.core.other.is_none() {
            let rule = "an L2 takes a VM with nested";
            return Err(VmError::NeedsShadow { what: "an L2", rule });
        }
        self.leave();
        let smm = self.in_smm();
        if !self.core.in_l2 {
            self.swap_contexts();
        }
        let role = self.vm.shadow_role(levels, false, true, smm);
        let context = &mut self.core.mmu;
        (context.role, context.levels, context.frame, context.has_frame) = (role, levels, ncr3, true);
        // VMRUN with a flush of the ASID: what L1 has changed in its tables since counts now.
        self.switch_roots();
        self.flush_guest_tlb();
        Ok(())
    }

    /// L2 exits to L1. Nothing happens outside of an L2.
    pub fn leave_l2(&mut self) {
        if self.core.in_l2 {
            self.leave();
            self.swap_contexts();
        }
    }

    fn swap_contexts(&mut self) {
        let core = &mut *self.core;
        if let Some(other) = &mut core.other {
            std::mem::swap(&mut core.mmu, other);
            core.in_l2 = !core.in_l2;
        }
    }
}

impl<P: Platform> Vm<P> {
    /// What the vCPUs run on.
    pub fn paging(&self) -> Paging {
        self.paging
    }

    /// Levels of the guest's own tables, where these are shadowed: those of the VM's roots.
    pub fn guest_levels(&self) -> u8 {
        self.mmu().root_level()
    }

    /// Guest pages with contents.
    pub fn guest_memory(&self) -> &crate::guest_memory::GuestMemory {
        &self.side().memory
    }
}
