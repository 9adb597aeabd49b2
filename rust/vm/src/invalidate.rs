//! The host changes what it maps behind guest memory: it takes pages away, or maps them by larger ones.
//!
//! **Guarantee.** When the call returns, no SPTE and no TLB holds what the host mapped in the range before, in either address space, and no fault can bring it
//! back: a fault that had looked the old page up finds the notifier's sequence moved (`notifier.rs`).
//!
//! **Mechanism.** mmap_lock, begin (SPTEs out, TLBs flushed, under mmu_lock exclusive), the host's own change, end. Lock order as in `vm.rs`. The memslots that translate
//! the host range are those of the begin: a publication waits until the end.

use std::ops::Range;

use tdpmmu_platform::{Platform, Task};
use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{LEVEL_1G, LEVEL_2M};

use crate::host::PrimaryMmu;
use crate::{Vm, VmError};

impl<P: Platform> Vm<P> {
    /// The host takes a range of its virtual pages away (munmap, MADV_DONTNEED, reclaim): begin, the host's own unmap, end. `may_block` false: the OOM
    /// reaper, which must not wait. Returns how many host pages were unmapped.
    ///
    /// # Errors
    /// [`VmError::Closed`].
    pub fn unmap_hva(&self, task: &Task<P>, hvas: Range<u64>, may_block: bool) -> Result<u64, VmError> {
        self.invalidate_hva(task, &hvas.clone(), may_block, |primary| primary.unmap(hvas))
    }

    /// An mmu_notifier invalidation of `hvas` around `change`, which changes what the host maps there.
    fn invalidate_hva(
        &self,
        task: &Task<P>,
        hvas: &Range<u64>,
        may_block: bool,
        change: impl FnOnce(&PrimaryMmu) -> u64,
    ) -> Result<u64, VmError> {
        // mmap_lock: what the host maps in the range does not change its size meanwhile.
        let _mmap_lock = self.lock_mmap(task);
        self.open()?;
        let primary = &self.side().primary;
        Ok(self.invalidate_around(task, &primary.announced(hvas), may_block, || change(primary)))
    }

    /// The host puts another frame behind one page from now on, writable or to be copied by the next write (KSM, a page of a fork, migration). In kernels with a change_pte callback that one is called
    /// as well, inside the invalidation, where it finds nothing to change. Returns the frame.
    ///
    /// # Errors
    /// [`VmError::BadHva`] outside every region, or for a writable page of a read-only one; [`VmError::HostFull`]; [`VmError::Closed`].
    pub fn set_host_page(&self, task: &Task<P>, hva: u64, writable: bool) -> Result<u64, VmError> {
        let _mmap_lock = self.lock_mmap(task);
        self.open()?;
        self.replace_page(task, hva, writable)
    }

    /// A write meets a page that the host maps read-only, in a region that may be written: it gets a copy. Nothing if somebody was faster.
    pub(crate) fn break_cow(&self, task: &Task<P>, hva: u64) -> Result<(), VmError> {
        let _mmap_lock = self.lock_mmap(task);
        match self.side().primary.lookup(hva) {
            Some(page) if page.writable => Ok(()),
            _ => self.replace_page(task, hva, true).map(drop),
        }
    }

    fn replace_page(&self, task: &Task<P>, hva: u64, writable: bool) -> Result<u64, VmError> {
        let primary = &self.side().primary;
        primary.may_map(hva, writable)?;
        // A huge mapping is split for it, which is announced whole.
        let announced = primary.announced(&(hva..hva + 1));
        self.invalidate_around(task, &announced, true, || {
            let pfn = primary.replace(hva, writable)?;
            self.change_pte(task, hva, pfn, writable);
            Ok(pfn)
        })
    }

    /// clear_young of one or more host pages: [`Vm::notifier_age`].
    ///
    /// # Errors
    /// As [`Vm::notifier_age`].
    pub fn age_hva(&self, task: &Task<P>, hvas: Range<u64>) -> Result<bool, VmError> {
        self.notifier_age(task, hvas)
    }

    /// test_young of one or more host pages: [`Vm::notifier_test_age`].
    ///
    /// # Errors
    /// As [`Vm::notifier_age`].
    pub fn test_age_hva(&self, task: &Task<P>, hvas: Range<u64>) -> Result<bool, VmError> {
        self.notifier_test_age(task, hvas)
    }

    /// Ages what is behind a gfn range of address space 0; true: some of it was young.
    ///
    /// # Errors
    /// [`VmError::BadRange`] when no memslot covers part of it; [`VmError::Closed`].
    pub fn age_gfns(&self, task: &Task<P>, gfns: Range<u64>) -> Result<bool, VmError> {
        let hvas = self.hvas_of(gfns)?;
        hvas.into_iter().try_fold(false, |any, hvas| Ok(self.notifier_age(task, hvas)? | any))
    }

    /// Was a page behind a gfn range of address space 0 accessed since it was last aged? Changes nothing.
    ///
    /// # Errors
    /// As [`Vm::age_gfns`].
    pub fn test_age_gfns(&self, task: &Task<P>, gfns: Range<u64>) -> Result<bool, VmError> {
        let hvas = self.hvas_of(gfns)?;
        hvas.into_iter().try_fold(false, |any, hvas| Ok(self.notifier_test_age(task, hvas)? | any))
    }

    /// The host virtual pages behind a gfn range of address space 0, slot by slot.
    fn hvas_of(&self, gfns: Range<u64>) -> Result<Vec<Range<u64>>, VmError> {
        let set = self.slots();
        let mut hvas = Vec::new();
        let mut at = gfns.start;
        while at < gfns.end {
            let Some(slot) = set.find(0, at) else {
                let rule = "no memslot covers it";
                return Err(VmError::BadRange { as_id: 0, start: at, end: gfns.end, rule });
            };
            let end = slot.gfns().end.min(gfns.end);
            hvas.push(slot.hva_of(at)..slot.hva_of(at) + (end - at));
            at = end;
        }
        Ok(hvas)
    }

    /// The host takes away what is behind a gfn range of address space 0.
    ///
    /// # Errors
    /// [`VmError::BadRange`] when no memslot covers part of it; [`VmError::Closed`].
    pub fn unmap_gfns(&self, task: &Task<P>, gfns: Range<u64>, may_block: bool) -> Result<u64, VmError> {
        let hvas = self.hvas_of(gfns)?;
        hvas.into_iter().try_fold(0, |sum, hvas| Ok(sum + self.unmap_hva(task, hvas, may_block)?))
    }

    /// The host maps what is behind a gfn range of address space 0 by pages of `level` (2 or 3) from now on: khugepaged, MADV_COLLAPSE. The notifier
    /// empties the SPTEs and leaves their tables (5.18 and later), so that the next fault puts a huge leaf over a table and tears the subtree down
    /// itself. Returns the pages that the host maps so now: whole aligned pieces inside the range; what is not is neither changed nor announced.
    ///
    /// # Errors
    /// [`VmError::BadRange`] when no memslot covers part of it, or for another level; [`VmError::Closed`].
    pub fn promote_gfns(&self, task: &Task<P>, gfns: Range<u64>, level: u8) -> Result<u64, VmError> {
        if !(LEVEL_2M..=LEVEL_1G).contains(&level) {
            let rule = "the host maps huge pages of 2M (level 2) or 1G (3)";
            return Err(VmError::BadRange { as_id: 0, start: gfns.start, end: gfns.end, rule });
        }
        let unit = span(level);
        self.hvas_of(gfns)?.into_iter().try_fold(0, |sum, hvas| {
            let pieces = hvas.start.next_multiple_of(unit)..hvas.end / unit * unit;
            if pieces.is_empty() {
                return Ok(sum);
            }
            let promote = |primary: &PrimaryMmu| primary.promote(pieces.clone(), level);
            Ok(sum + self.invalidate_hva(task, &pieces, true, promote)?)
        })
    }
}
