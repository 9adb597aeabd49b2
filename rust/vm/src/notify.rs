//! The callbacks of mmu_notifier by themselves: what KVM does when the host tells of a change that somebody else makes.
//!
//! **Guarantee.** Each is the whole of KVM's part: the memslots behind the host range, address space 0 first and in each by host address; begin and end around an
//! unmap, so that no fault in flight brings back what the host takes away; the flush before mmu_lock is released. The host's own change is the caller's: made before
//! [`Vm::notifier_unmap`] returns it is seen by no guest afterwards.
//!
//! **Mechanism.** As in `invalidate.rs`, which adds the modelled host. mmap_lock is held shared: callbacks of several threads run beside each other, as the host's do. Host virtual addresses are page numbers, any of 52 bits; a range without a memslot costs no lock.

use std::ops::Range;

use tdpmmu_mmu::FlushDebt;
use tdpmmu_platform::{Bug, Event, Platform, Site, Task};

use crate::{Vm, VmError};

/// First host virtual page number that does not exist.
const HVA_END: u64 = 1 << 52;

impl<P: Platform> Vm<P> {
    /// mmu_notifier_invalidate_range_start and _end without a host's change between them.
    ///
    /// # Errors
    /// [`VmError::BadHva`] for a range that is empty or beyond 52 bits; [`VmError::Closed`].
    pub fn notifier_unmap(&self, task: &Task<P>, hvas: Range<u64>) -> Result<(), VmError> {
        check(&hvas)?;
        let _mmap_lock = self.share_mmap(task);
        self.open()?;
        self.invalidate_around(task, &hvas, true, || ());
        Ok(())
    }

    /// Begin, SPTEs out, flush; then `change`; then end. mmap_lock is held.
    pub(crate) fn invalidate_around<R>(
        &self,
        task: &Task<P>,
        announced: &Range<u64>,
        may_block: bool,
        change: impl FnOnce() -> R,
    ) -> R {
        let (mmu, side) = (self.mmu(), self.side());
        let ranges = side.slots.begin_invalidation(announced);
        let cover = ranges.iter().fold(None, |cover: Option<Range<u64>>, (_, r)| {
            Some(cover.map_or(r.clone(), |c| c.start.min(r.start)..c.end.max(r.end)))
        });
        if let Some(cover) = &cover {
            task.observe(|| Event::NotifierBegin { start: cover.start, end: cover.end });
            let mut guard = mmu.lock.write(task);
            side.invalidation.begin(&guard, cover);
            task.observe(|| Event::NotifierActive { start: cover.start, end: cover.end });
            let mut debt = FlushDebt::none();
            for (as_id, gfns) in ranges {
                debt = self.unmap_both(&mut guard, as_id, gfns, may_block, debt);
            }
            if P::bug(Bug::C03) {
                debt.take();
            }
            mmu.pay(task, &mut debt);
        }
        P::point(Site::HostPage);
        let changed = change();
        if let Some(cover) = &cover {
            let guard = mmu.lock.write(task);
            task.observe(|| Event::NotifierEnding { start: cover.start, end: cover.end });
            side.invalidation.end(&guard);
            drop(guard);
            task.observe(|| Event::NotifierEnd { start: cover.start, end: cover.end });
        }
        side.slots.end_invalidation();
        changed
    }

    /// clear_young: takes Accessed from the leaves behind `hvas`; true: some leaf had it. No flush: a TLB may go on without telling.
    ///
    /// # Errors
    /// As [`Vm::notifier_unmap`].
    pub fn notifier_age(&self, task: &Task<P>, hvas: Range<u64>) -> Result<bool, VmError> {
        self.for_slots(task, &hvas, |as_id, gfns| self.age_both(task, as_id, gfns))
    }

    /// clear_flush_young: as [`Vm::notifier_age`], and in kernels up to 6.12 a flush if some leaf was young, so that the next access sets Accessed again.
    ///
    /// # Errors
    /// As [`Vm::notifier_unmap`].
    pub fn notifier_age_flush(&self, task: &Task<P>, hvas: Range<u64>) -> Result<bool, VmError> {
        let young = self.notifier_age(task, hvas)?;
        if young && self.mmu().profile().aging_flush {
            self.mmu().flush(task, None);
        }
        Ok(young)
    }

    /// test_young: has a leaf behind `hva` the Accessed bit? Changes nothing.
    ///
    /// # Errors
    /// As [`Vm::notifier_unmap`].
    pub fn notifier_test_age(&self, task: &Task<P>, hvas: Range<u64>) -> Result<bool, VmError> {
        self.for_slots(task, &hvas, |as_id, gfns| self.test_age_both(task, as_id, gfns))
    }

    /// `body` for each range of gfns behind `hvas`; whether any said true.
    fn for_slots(
        &self,
        task: &Task<P>,
        hvas: &Range<u64>,
        mut body: impl FnMut(u8, Range<u64>) -> bool,
    ) -> Result<bool, VmError> {
        check(hvas)?;
        let _mmap_lock = self.share_mmap(task);
        self.open()?;
        let ranges = self.slots().gfns_of(hvas);
        Ok(ranges.into_iter().fold(false, |any, (as_id, gfns)| body(as_id, gfns) | any))
    }

    /// change_pte (up to 6.9): the host maps `pfn` at `hva` from now on, writable or not. KVM calls it only inside an invalidation that has emptied the leaf already, where it
    /// finds nothing to change; alone, it takes the old leaf out and, for a read-only page, puts the new one in. Returns whether a leaf changed.
    ///
    /// # Errors
    /// [`VmError::Unsupported`] in kernels without it; as [`Vm::notifier_unmap`].
    pub fn notifier_change_pte(
        &self,
        task: &Task<P>,
        hva: u64,
        pfn: u64,
        writable: bool,
    ) -> Result<bool, VmError> {
        let profile = self.mmu().profile();
        if !profile.set_spte_gfn {
            return Err(VmError::Unsupported { what: "change_pte", kernel: profile.name });
        }
        check(&(hva..hva.saturating_add(1)))?;
        let _mmap_lock = self.share_mmap(task);
        self.open()?;
        Ok(self.change_pte(task, hva, pfn, writable))
    }

    pub(crate) fn change_pte(&self, task: &Task<P>, hva: u64, pfn: u64, writable: bool) -> bool {
        let mmu = self.mmu();
        let ranges = self.slots().gfns_of(&(hva..hva + 1));
        if !mmu.profile().set_spte_gfn || ranges.is_empty() {
            return false;
        }
        let mut guard = mmu.lock.write(task);
        let mut changed = false;
        for (as_id, gfns) in ranges {
            // Leaves of shadow pages are dropped, where KVM would put the new frame in: the next access does.
            changed |=
                self.shadow().is_some_and(|shadow| shadow.unmap(&mut guard, as_id, gfns.clone(), false));
            changed |= mmu.set_spte_gfn(&mut guard, as_id, gfns.start, pfn, writable);
        }
        if changed {
            mmu.flush(task, None);
        }
        changed
    }
}

fn check(hvas: &Range<u64>) -> Result<(), VmError> {
    if hvas.is_empty() {
        return Err(VmError::BadHva { hva: hvas.start, rule: "a range of host virtual pages is not empty" });
    }
    if hvas.end > HVA_END {
        return Err(VmError::BadHva { hva: hvas.end - 1, rule: "host virtual page numbers have 52 bits" });
    }
    Ok(())
}
