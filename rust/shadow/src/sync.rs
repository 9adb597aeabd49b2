//! Unsync pages, and how they are made to say what the guest's tables say.
//!
//! **Guarantee.** While a page is unsync the guest writes its table without our being told, and hardware may go on using what the table said before: as on a real CPU, until the guest flushes. After
//! [`ShadowMmu::sync_roots`] each page below these roots says what the guest's table said at some moment of the call, and the guest cannot write that table unseen: the first write after it faults. What is *removed* by
//! a sync is flushed before the call returns.
//!
//! **Mechanism.** Only pages of level 1 go unsync, so a sync compares 512 entries each and zaps no page. The marks in the pages above lead to them (`parents.rs`). In batches: write access is taken from the guest's tables by the reverse
//! maps, one flush, then the comparison. In this order: what the guest writes through a stale translation after the comparison would never be seen. A long sync gives the lock up between batches; what it has done stays done.
//!
//! Only entries that are present in the shadow page are looked at: an entry of the guest that became present needs no flush by the guest and gets its leaf by a fault.

use tdpmmu_platform::{Exclusive, Guard, Phase, Platform, Site};
use tdpmmu_spte::geometry::{ENTRIES, index};
use tdpmmu_spte::{Access, LEVEL_4K, MakeLeaf, Spte};

use crate::ShadowMmu;
use crate::fetch::role_access;
use crate::guest::{GuestPte, both};
use crate::map::Owed;

/// Pages between two flushes and reschedule checks of a sync (KVM_PAGE_ARRAY_NR).
const BATCH: usize = 16;

impl<P: Platform> ShadowMmu<P> {
    /// The guest loads CR3, or flushes its TLB: what it has changed in its tables below `roots` counts from here on. May give the lock up; obsolete roots, and 0, are passed over.
    pub fn sync_roots(&self, guard: &mut Guard<'_, P, Exclusive>, roots: &[u32]) {
        let task = guard.task();
        let _work = task.phase(Phase::SpteWork);
        for &root in roots {
            let mut owed = self.owe();
            while root != 0 && !self.is_obsolete(root) && self.sync_batch(guard, &mut owed, root) {
                if guard.should_yield() {
                    self.pay(guard, &mut owed);
                    guard.relock();
                    owed = self.owe();
                }
            }
            self.pay(guard, &mut owed);
        }
    }

    /// Everything at or below `page`, in this hold.
    pub(crate) fn sync_below(&self, guard: &mut Guard<'_, P, Exclusive>, owed: &mut Owed, page: u32) {
        while self.sync_batch(guard, owed, page) {}
    }

    /// Some unsync pages at or below `page`; false: there was none.
    fn sync_batch(&self, guard: &mut Guard<'_, P, Exclusive>, owed: &mut Owed, page: u32) -> bool {
        let mut batch = [0; BATCH];
        let mut len = 0;
        while len < BATCH
            && let Some(unsync) = self.first_unsync(page)
        {
            let (as_id, gfn) = (self.role(unsync).as_id(), self.pool().meta(unsync).gfn());
            owed.flush |= self.write_protect_gfn(guard, &owed.books, as_id, gfn, LEVEL_4K);
            self.clear_unsync(guard, unsync);
            batch[len] = unsync;
            len += 1;
        }
        if owed.flush {
            self.pay(guard, owed);
        }
        for &unsync in &batch[..len] {
            self.sync_page(guard, owed, unsync);
        }
        len != 0
    }

    /// Compares a page of level 1 with the guest's table: what the guest has changed is dropped, or made again with the permissions that it has now. Whether the page is unsync does not change.
    pub(crate) fn sync_page(&self, guard: &Guard<'_, P, Exclusive>, owed: &mut Owed, page: u32) {
        for at in 0..ENTRIES as u16 {
            let entry = Spte(P::load(&self.pool().entries(page)[usize::from(at)], Site::ShadowSync));
            if !self.format().is_empty(entry) {
                self.sync_entry(guard, owed, page, at, entry);
            }
        }
        guard.task().count(ENTRIES as u64, 0);
    }

    fn sync_entry(&self, guard: &Guard<'_, P, Exclusive>, owed: &mut Owed, page: u32, at: u16, old: Spte) {
        let (role, layout, table_gfn) =
            (self.role(page), self.profile().role_layout, self.pool().meta(page).gfn());
        let pte = GuestPte(self.host().read_guest(role.as_id(), table_gfn, at));
        let (gfn, had) = (self.gfn_of(page, at), self.access_of(page, at));
        if !pte.is_present() || pte.gfn() != gfn || !old.is_leaf(1) && had != self.granted(page, pte) {
            // Gone, or another page. A cached "no memory here" is not worth making again.
            owed.flush |= old.is_present();
            self.drop_spte(guard, &owed.books, &mut owed.dead, page, at);
            return;
        }
        let granted = self.granted(page, pte);
        if granted == had {
            return;
        }
        let access = Access::from_bits(u64::from(granted));
        let host_writable = old.raw() & self.format().host_writable != 0;
        let asks = access.write && host_writable && !self.format().is_writable(old);
        let refused = asks && self.refuses_write(guard, role.as_id(), gfn, false, true);
        let made = self.format().make_leaf(&MakeLeaf {
            pfn: old.pfn(),
            level: 1,
            access: self.hardware_access(access),
            // Nobody has accessed the page by the new entry.
            prefetch: true,
            host_writable,
            write_protected: refused,
            old,
            // Whether the slot is logged, the log itself knows best.
            dirty_tracked: true,
            ad_mode: self.ad_mode(role),
            nx_mitigation: false,
            remake: self.profile().remake_dirty,
        });
        debug_assert_eq!(role_access(layout, access), granted);
        self.set_gfn(page, at, gfn, granted);
        if made.mark_dirty {
            self.host().gfn_dirty(guard.task(), role.as_id(), gfn);
        }
        owed.flush |= self.update_leaf(guard, page, at, old, made.spte);
    }

    /// What the guest's leaf grants in a page of this role.
    fn granted(&self, page: u32, pte: GuestPte) -> u8 {
        let layout = self.profile().role_layout;
        let above = Access::from_bits(u64::from(self.role(page).access(layout)));
        role_access(layout, both(above, pte.access()))
    }

    /// The guest invalidates one translation (INVLPG): what it has changed in its entry for the page `gva` below `root` counts from here on. The caller drops what the vCPU itself has cached.
    pub fn invlpg(&self, guard: &mut Guard<'_, P, Exclusive>, root: u32, gva: u64) {
        if root == 0 || self.is_obsolete(root) {
            return;
        }
        let mut owed = self.owe();
        let (mut page, mut level) = (root, self.root_level(root));
        // Where nothing is unsync below, nothing differs from the guest's tables.
        while self.pages.has_unsync(page) {
            let at = index(gva, level) as u16;
            let entry = Spte(P::load(&self.pool().entries(page)[usize::from(at)], Site::ShadowSync));
            guard.task().count(1, 0);
            if self.pages.is_unsync(page) {
                if !self.format().is_empty(entry) {
                    self.sync_entry(guard, &mut owed, page, at, entry);
                }
                break;
            }
            if !entry.is_table(level) {
                break;
            }
            page = entry.pfn() as u32;
            level -= 1;
        }
        self.pay(guard, &mut owed);
    }
}
