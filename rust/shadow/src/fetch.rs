//! From the guest's tables to shadow pages: finding them, making them, write-protecting what they shadow.
//!
//! **Guarantee.** A shadow page is linked only at an entry whose guest entry still says what the walk of the guest's tables has read, looked at *after* the guest lost its write access to the table below: so no change of the guest's falls
//! between the reading and the page. The guest can write a table unseen only while each page that shadows it is unsync.
//!
//! **Mechanism.** Page and role decide: the gfn of the guest's table, and what the entries above it allow. A page found that is unsync is compared with the guest's table before it is used (it stays unsync); an unsync page goes when its
//! gfn turns out to be an upper table, which can never be unsync. A new page's gfn loses W and MMU-writable in every leaf, by the reverse maps, and in the VM's other MMU; then comes the flush, then the guest's entry is read again.

use tdpmmu_platform::{Exclusive, Guard, Platform, Site};
use tdpmmu_spte::geometry::index;
use tdpmmu_spte::{Access, LEVEL_4K, Role, RoleLayout, Spte};
use tdpmmu_table::TableCache;

use crate::map::{Owed, Stuck};
use crate::{GuestWalk, ShadowFault, ShadowMmu};

/// Access as a role word has it: where there is a bit for reading, everything that is mapped may be read.
pub(crate) const fn role_access(layout: RoleLayout, access: Access) -> u8 {
    let read = match layout {
        RoleLayout::Access3 => 0,
        RoleLayout::Access4 => 8,
    };
    access.bits() as u8 | read
}

impl<P: Platform> ShadowMmu<P> {
    /// The role of a page below `parent`.
    pub(crate) fn child_role(&self, parent: u32, direct: bool, access: u8) -> Role {
        let layout = self.profile().role_layout;
        let mut fields = layout.unpack(self.role(parent));
        // role.invalid is inherited with the rest (bug-history 33).
        fields.level -= 1;
        fields.direct = direct;
        fields.access = access;
        fields.quadrant = 0;
        fields.passthrough = false;
        layout.pack(&fields)
    }

    /// Walks from `root` along the guest's tables to the shadow page of the table that holds the guest's leaf. Returns that page and its level.
    pub(crate) fn fetch(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        cache: &mut TableCache,
        owed: &mut Owed,
        root: u32,
        fault: &ShadowFault,
        walk: &GuestWalk,
    ) -> Result<(u32, u8), Stuck> {
        let as_id = fault.as_id;
        let (mut page, mut level) = (root, self.root_level(root));
        if level != walk.levels {
            self.violation(
                "shadow-levels",
                &format!("a walk of {} levels under a root of level {level}", walk.levels),
            );
            return Err(Stuck::Changed);
        }
        if !walk.still(self.host(), as_id, level) {
            return Err(Stuck::Changed);
        }
        while level > walk.level {
            // The guest uses what the page maps: it is no plain memory that happens to have been a table.
            self.pages.set_flooding(page, 0);
            let slot = index(fault.gva, level) as u16;
            let entry = Spte(P::load(&self.pool().entries(page)[usize::from(slot)], Site::SpteRead));
            guard.task().count(1, 0);
            let gfn = walk.tables[usize::from(level) - 1];
            let access = role_access(self.profile().role_layout, walk.access_above(level - 1));
            let role = self.child_role(page, false, access);
            let linked = entry
                .is_table(level)
                .then(|| entry.pfn() as u32)
                .filter(|&child| self.role(child) == role && self.pool().meta(child).gfn() == gfn);
            let child = match linked {
                Some(child) => child,
                None => self.get_synced_page(guard, cache, owed, as_id, gfn, role).ok_or(Stuck::NoTable)?,
            };
            if !walk.still(self.host(), as_id, level - 1) {
                return Err(Stuck::Changed);
            }
            if linked.is_none() {
                if !self.format().is_empty(entry) {
                    // What the guest's entry said before: the write to it is on its way to us.
                    self.drop_spte(guard, &owed.books, &mut owed.dead, page, slot);
                    owed.flush |= entry.is_present();
                }
                self.link_child(guard, page, slot, child);
            }
            page = child;
            level -= 1;
        }
        Ok((page, level))
    }

    /// [`ShadowMmu::get_page`], and nothing below it is unsync: the guest need not flush for what becomes present, so a page that is linked anew must say what the guest's tables say.
    fn get_synced_page(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        cache: &mut TableCache,
        owed: &mut Owed,
        as_id: u8,
        gfn: u64,
        role: Role,
    ) -> Option<u32> {
        let page = self.get_page(guard, cache, owed, as_id, gfn, role)?;
        if self.pages.unsync_children(page) != 0 {
            self.sync_below(guard, owed, page);
        }
        Some(page)
    }

    /// The page of `role` for the guest's table in `gfn` (or, direct, for what begins at `gfn`): found, or made. `None`: the cache is empty, because a caller skipped filling it.
    pub(crate) fn get_page(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        cache: &mut TableCache,
        owed: &mut Owed,
        as_id: u8,
        gfn: u64,
        role: Role,
    ) -> Option<u32> {
        let found = self.find_page(guard, as_id, gfn, role);
        if !role.direct() && role.level() > LEVEL_4K {
            // The gfn is about to be an upper table, or is one: no page of it may stay unsync.
            let unsync: Vec<u32> = self
                .gpte_pages_of_gfn(guard, as_id, gfn)
                .filter(|&page| self.pages.is_unsync(page))
                .collect();
            for page in unsync {
                self.prepare_zap(guard, &owed.books, &mut owed.dead, page);
                owed.flush = true;
            }
        }
        if let Some(page) = found {
            if self.pages.is_unsync(page) {
                self.sync_page(guard, owed, page);
            }
            return Some(page);
        }
        let page = self.new_page(guard, &owed.books, cache, as_id, gfn, role)?;
        if !role.direct() {
            owed.flush |= self.write_protect_gfn(guard, &owed.books, as_id, gfn, LEVEL_4K);
            // Before anybody reads the guest's table: nothing is written through an old translation after this.
            self.pay(guard, owed);
        }
        Some(page)
    }

    /// Must a leaf of `gfn` stay without W (mmu_try_to_unsync_pages)? Not if nothing shadows the gfn, nor if every page that does has level 1: these go unsync here, if `can_unsync` and the access is the guest's own.
    pub(crate) fn refuses_write(
        &self,
        guard: &Guard<'_, P, Exclusive>,
        as_id: u8,
        gfn: u64,
        can_unsync: bool,
        prefetch: bool,
    ) -> bool {
        if self.tallies.indirect.get() == 0 {
            // Direct paging: nothing is shadowed, and the chain would be of direct pages.
            return false;
        }
        let stays = |page: u32| {
            self.role(page).level() > LEVEL_4K || !self.pages.is_unsync(page) && (!can_unsync || prefetch)
        };
        if self.gpte_pages_of_gfn(guard, as_id, gfn).any(stays) {
            return true;
        }
        for page in self.gpte_pages_of_gfn(guard, as_id, gfn) {
            if !self.pages.is_unsync(page) {
                // Before W is granted: whoever syncs finds the mark.
                self.mark_unsync(guard, page);
            }
        }
        false
    }
}
