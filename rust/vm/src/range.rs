//! Operations on a few gfns that neither a memslot nor the host has changed: zaps, write protection, prefaulting.
//!
//! **Guarantee.** [`Vm::zap_gfn_range`] leaves no leaf of the range, in either address space, that was made before; [`Vm::write_protect_gfn`] leaves none through which the gfn is written without
//! the slow path having been asked. [`Vcpu::pre_fault`] leaves each page of its range mapped as a read fault would, or says from where on it is not.
//!
//! **Mechanism.** kvm_zap_gfn_range is an invalidation of its own: begin, zap, flush and end in one exclusive hold, so a fault that looked its page up before is made to look again; up to 6.1 every
//! fault in flight is, whatever its gfn. Write protection takes W and MMU-writable together and flushes before the hold ends, even if W was gone already: dirty logging may have taken it
//! and not flushed yet (F7).

use std::ops::Range;

use tdpmmu_mmu::FlushDebt;
use tdpmmu_platform::{Bug, Event, Platform, Task};
use tdpmmu_spte::LEVEL_4K;
use tdpmmu_spte::geometry::{round_down, span};

use crate::both::around;
use crate::walker::GuestAccess;
use crate::{FaultOutcome, Vcpu, Vm, VmError};

impl<P: Platform> Vm<P> {
    /// kvm_zap_gfn_range: what a change of memory types or of the APIC page does.
    ///
    /// # Errors
    /// [`VmError::BadRange`] for an empty range; [`VmError::Closed`].
    pub fn zap_gfn_range(&self, task: &Task<P>, gfns: Range<u64>) -> Result<(), VmError> {
        if gfns.is_empty() {
            let rule = "a range of gfns is not empty";
            return Err(VmError::BadRange { as_id: 0, start: gfns.start, end: gfns.end, rule });
        }
        let _open = self.share_mmap(task);
        self.open()?;
        let (mmu, side) = (self.mmu(), self.side());
        let mut guard = mmu.lock.write(task);
        let announced = if mmu.profile().notifier_range_all { 0..u64::MAX } else { gfns.clone() };
        let (start, end) = (announced.start, announced.end);
        side.invalidation.begin(&guard, &announced);
        task.observe(|| Event::NotifierActive { start, end });
        let mut debt = FlushDebt::none();
        for as_id in 0..2 {
            if self.shadow().is_some_and(|shadow| shadow.unmap(&mut guard, as_id, gfns.clone(), true)) {
                debt.owe(around(&gfns));
            }
        }
        // The TDP half may break the hold: what the other owes is not carried across.
        mmu.pay(task, &mut debt);
        let mut debt = mmu.zap_gfn_range(&mut guard, gfns);
        mmu.pay(task, &mut debt);
        task.observe(|| Event::NotifierEnding { start, end });
        side.invalidation.end(&guard);
        Ok(())
    }

    /// kvm_mmu_slot_gfn_write_protect: the leaf of `gfn` under every root of its address space, of whatever size, is not written without a slow fault from now on. True: some
    /// leaf was writable, or could have been made so.
    ///
    /// # Errors
    /// [`VmError::BadRange`] where no memslot is; [`VmError::Closed`].
    pub fn write_protect_gfn(&self, task: &Task<P>, as_id: u8, gfn: u64) -> Result<bool, VmError> {
        let early = P::bug(Bug::C13).then(|| self.mmu().lock.write(task));
        let slots = self.lock_slots(task);
        self.open()?;
        if slots.set().find(as_id, gfn).is_none() {
            let rule = "no memslot covers it";
            return Err(VmError::BadRange { as_id, start: gfn, end: gfn.saturating_add(1), rule });
        }
        let mut guard = early.unwrap_or_else(|| self.mmu().lock.write(task));
        let changed = self.write_protect_gfn_both(&mut guard, as_id, gfn);
        if changed {
            self.mmu().flush(task, Some(gfn..gfn + 1));
        }
        task.observe(|| Event::WriteProtected { as_id, gfn, level: LEVEL_4K });
        Ok(changed)
    }
}

impl<P: Platform> Vcpu<'_, P> {
    /// KVM_PRE_FAULT_MEMORY over `gfns` of this vCPU's address space: each is mapped as a read would, without Accessed. Returns how many pages are left undone: an error after the
    /// first page ends the call early and is told by this number alone, as the ioctl does.
    ///
    /// # Errors
    /// [`VmError::BadRange`] for an empty range, or where the first page has no memslot (ENOENT; its MMIO entry is there afterwards), or one that is being deleted (EAGAIN, from 6.18 on; before, the
    /// call waits); [`VmError::NeedsTdp`] for a vCPU on shadow pages (EOPNOTSUPP); as [`Vcpu::fault`] for the first page.
    pub fn pre_fault(&mut self, gfns: Range<u64>) -> Result<u64, VmError> {
        self.needs_tdp("KVM_PRE_FAULT_MEMORY")?;
        let as_id = self.role().as_id();
        let bad = |rule| Err(VmError::BadRange { as_id, start: gfns.start, end: gfns.end, rule });
        if gfns.is_empty() {
            return bad("a range of gfns is not empty");
        }
        let mut at = gfns.start;
        while at < gfns.end {
            let done = self.pre_fault_page(at);
            let left = gfns.end - at;
            match done {
                Ok(Some(level)) => at = round_down(at, level).saturating_add(span(level)),
                Ok(None) if at == gfns.start => return bad("no memslot covers it"),
                Err(error) if at == gfns.start => return Err(error),
                Ok(None) | Err(_) => return Ok(left),
            }
        }
        Ok(0)
    }

    /// Is the slot of `gfn` INVALID, in a kernel that does not wait for what becomes of it?
    fn gives_up(&self, gfn: u64) -> bool {
        !self.vm().mmu().profile().prefault_retries_invalid_slot
            && self.core.slots.enter().find(self.role().as_id(), gfn).is_some_and(|slot| slot.invalid)
    }

    /// The level that `gfn` was mapped at; `None` without a memslot.
    fn pre_fault_page(&mut self, gfn: u64) -> Result<Option<u8>, VmError> {
        loop {
            // The ioctl services requests and loads a root before each page.
            if !self.reload()? {
                return Err(VmError::Cancelled);
            }
            let root = self.root()?;
            let mut ended = LEVEL_4K;
            match self.slow_fault(root, GuestAccess::read(gfn), true, &mut ended)? {
                FaultOutcome::Fixed { level, .. } => return Ok(Some(level)),
                FaultOutcome::Spurious | FaultOutcome::Fast(_) => return Ok(Some(ended)),
                FaultOutcome::Emulate => return Ok(None),
                FaultOutcome::Retry if self.gives_up(gfn) => {
                    let (as_id, start, end) = (self.role().as_id(), gfn, gfn.saturating_add(1));
                    let rule = "its memslot is about to go: try again (EAGAIN)";
                    return Err(VmError::BadRange { as_id, start, end, rule });
                }
                FaultOutcome::Retry => self.before_retry(),
            }
        }
    }
}
