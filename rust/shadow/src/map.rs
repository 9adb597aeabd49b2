//! The fault's map step: one leaf, and the shadow pages above it.
//!
//! **Guarantee.** A fault that returns [`ShadowOutcome::Retry`] leaves nothing half done: what it linked is a part of the tree that the guest's tables justify. A leaf is never writable while its gfn holds a table of the guest that a synced page shadows.
//! Everything that the step has unlinked, write-protected or replaced is flushed before it returns.
//!
//! **Mechanism.** mmu_lock held exclusively throughout. Pages above the guest's own leaf shadow the guest's tables one to one (`fetch.rs`); pages below it, and all pages of a root that is direct, are direct: they follow the guest-physical
//! address. A leaf is as large as the guest's own leaf, the slot's lpage_info, the host and the NX mitigation allow. Whether it may be writable is asked last: a gfn that a page of level 1 shadows may be written at the price of
//! that page going unsync; one that an upper page shadows may not (the guest writes them rarely, and a walk would have to sync whole subtrees).
//!
//! The step asks for nothing that could fail: tables come from a cache that was filled outside of the lock. The caller has tested the root for staleness *after* it made room in the quota, in the same hold: making room can zap
//! that very root, and what is made below an invalid root inherits its invalid bit (bug-history 33). Left out of the model: the prefetch of neighbouring guest entries (pte_prefetch), NX huge page recovery of shadow pages.

use std::sync::Arc;

use tdpmmu_platform::{Exclusive, Guard, Platform, Site};
use tdpmmu_spte::geometry::{index, round_down, span};
use tdpmmu_spte::{Access, AdMode, FormatKind, LEVEL_1G, MakeLeaf, Role, Spte};
use tdpmmu_table::{TableCache, TableFlag};

use crate::fetch::role_access;
use crate::zap::DeadPages;
use crate::{BookSet, GuestWalk, ShadowMmu};

/// What a gfn is backed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShadowFrame {
    /// A host page: the frame of the faulting gfn, and whether the host maps it writable.
    Page {
        /// Host frame of the faulting gfn (not aligned to the goal level).
        pfn: u64,
        /// May the guest write it?
        writable: bool,
    },
    /// No memslot: an MMIO entry of this memslot generation.
    Mmio {
        /// The generation to store (its low 19 bits are kept).
        generation: u64,
    },
}

/// One fault, resolved as far as the lock.
#[derive(Clone, Copy, Debug)]
pub struct ShadowFault {
    /// Address space (1: SMM).
    pub as_id: u8,
    /// The page that hardware failed to translate: a virtual page number, or, under a direct root, the gfn.
    pub gva: u64,
    /// The guest-physical page.
    pub gfn: u64,
    /// What backs it.
    pub frame: ShadowFrame,
    /// Level that host, dirty logging and the NX mitigation allow: 1, 2 or 3. The guest's leaf and the slot's lpage_info lower it.
    pub goal_level: u8,
    /// A write access.
    pub write: bool,
    /// An instruction fetch.
    pub exec: bool,
    /// Not asked for by the guest: no Accessed bit, and nothing goes unsync for it.
    pub prefetch: bool,
    /// The slot logs dirty pages.
    pub dirty_tracked: bool,
    /// A fetch under the NX mitigation: huge mappings are out of the question for it.
    pub huge_page_disallowed: bool,
    /// The NX mitigation is on: huge leaves are not executable.
    pub nx_huge_pages: bool,
    /// The guest's own path to `gva`; `None` under a direct root.
    pub guest: Option<GuestWalk>,
}

impl ShadowFault {
    /// A write to `gfn` of address space 0 under a direct root, backed by a writable host page `pfn`, to be mapped at `level` at most.
    pub const fn page(gfn: u64, pfn: u64, level: u8) -> Self {
        Self {
            as_id: 0,
            gva: gfn,
            gfn,
            frame: ShadowFrame::Page { pfn, writable: true },
            goal_level: level,
            write: true,
            exec: false,
            prefetch: false,
            dirty_tracked: false,
            huge_page_disallowed: false,
            nx_huge_pages: false,
            guest: None,
        }
    }
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShadowOutcome {
    /// The leaf is installed.
    Fixed {
        /// Its level.
        level: u8,
        /// Its value.
        spte: Spte,
    },
    /// It was there already.
    Spurious,
    /// The guest changed its tables meanwhile: walk them again, and fault again.
    Retry,
    /// MMIO: emulate the access.
    Emulate,
    /// The gfn holds a table of the guest that must not be written unseen: emulate the write, and tell [`ShadowMmu::page_track_write`].
    WriteProtected,
}

/// What an operation has yet to do before the lock goes: the books that it works with, pages to free, a flush.
#[must_use = "settled before the lock is given up"]
pub(crate) struct Owed {
    pub(crate) books: Arc<BookSet>,
    pub(crate) dead: DeadPages,
    pub(crate) flush: bool,
}

/// Why the leaf's place was not reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stuck {
    /// The guest's tables are not what the walk of them said.
    Changed,
    /// The cache was empty: a caller skipped filling it.
    NoTable,
}

/// An entry that a leaf belongs in.
#[derive(Clone, Copy)]
struct Spot {
    page: u32,
    index: u16,
    level: u8,
}

impl<P: Platform> ShadowMmu<P> {
    /// The begin of an operation under the lock, or of the rest of one after the lock was given up.
    pub(crate) fn owe(&self) -> Owed {
        Owed { books: self.books(), dead: DeadPages::default(), flush: false }
    }

    /// Does now what is owed: one flush for all.
    pub(crate) fn pay(&self, guard: &Guard<'_, P, Exclusive>, owed: &mut Owed) {
        let dead = std::mem::take(&mut owed.dead);
        if dead.is_empty() {
            if owed.flush {
                self.flush(guard.task());
            }
        } else {
            self.commit_zap(guard, dead);
        }
        owed.flush = false;
    }

    /// Maps one page under `root`. The caller holds the lock exclusively, has filled the cache ([`ShadowMmu::top_up`]), has made room in the quota and has then tested that the root is not obsolete.
    pub fn map(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        cache: &mut TableCache,
        root: u32,
        fault: &ShadowFault,
    ) -> ShadowOutcome {
        let mut owed = self.owe();
        let outcome = match self.place(guard, cache, &mut owed, root, fault) {
            Ok(spot) => self.map_leaf(guard, &mut owed, spot, fault),
            Err(Stuck::Changed) => ShadowOutcome::Retry,
            Err(Stuck::NoTable) => {
                self.violation("shadow-cache", "a fault ran out of cached tables under mmu_lock");
                ShadowOutcome::Retry
            }
        };
        self.pay(guard, &mut owed);
        outcome
    }

    /// The largest leaf that the fault may have.
    fn goal(&self, books: &BookSet, fault: &ShadowFault) -> u8 {
        let mut goal = fault.goal_level.min(fault.guest.map_or(LEVEL_1G, |walk| walk.level)).max(1);
        if matches!(fault.frame, ShadowFrame::Mmio { .. }) || fault.huge_page_disallowed {
            return 1;
        }
        let slot = books.find(fault.as_id, fault.gfn);
        while goal > 1 && slot.is_none_or(|slot| slot.lpage.disallowed(slot.base, fault.gfn, goal)) {
            goal -= 1;
        }
        goal
    }

    /// Walks to the entry of the leaf, linking what is missing.
    fn place(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        cache: &mut TableCache,
        owed: &mut Owed,
        root: u32,
        fault: &ShadowFault,
    ) -> Result<Spot, Stuck> {
        let layout = self.profile().role_layout;
        let (mut page, mut level) = (root, self.root_level(root));
        let mut access = self.role(root).access(layout);
        if let Some(walk) = &fault.guest {
            (page, level) = self.fetch(guard, cache, owed, root, fault, walk)?;
            access = role_access(layout, walk.access);
        }
        // After the fetch: the pages that it made may count against huge leaves.
        let mut goal = self.goal(&owed.books, fault).min(level);
        loop {
            self.pages.set_flooding(page, 0);
            let slot = index(fault.gva, level) as u16;
            let entry = Spte(P::load(&self.pool().entries(page)[usize::from(slot)], Site::SpteRead));
            guard.task().count(1, 0);
            if level == goal {
                let kept = level > 1 && entry.is_table(level) && fault.nx_huge_pages;
                if !kept || !self.pool().meta(entry.pfn() as u32).has(TableFlag::NxDisallowed) {
                    return Ok(Spot { page, index: slot, level });
                }
                // A huge leaf here would be split again by the next fetch.
                goal -= 1;
            }
            let gfn = round_down(fault.gfn, level);
            page = match self.child_granting(entry, level, gfn, access) {
                Some(child) => child,
                None => {
                    if !self.format().is_empty(entry) {
                        self.drop_spte(guard, &owed.books, &mut owed.dead, page, slot);
                        owed.flush |= entry.is_present();
                    }
                    let role = self.child_role(page, true, access);
                    let child =
                        self.get_page(guard, cache, owed, fault.as_id, gfn, role).ok_or(Stuck::NoTable)?;
                    if fault.huge_page_disallowed {
                        self.pool().meta(child).set(TableFlag::NxDisallowed);
                    }
                    self.link_child(guard, page, slot, child);
                    child
                }
            };
            level -= 1;
        }
    }

    /// The direct page that `entry` names, if it is for `gfn` and grants just what is wanted of it. It may be for another where the guest has written its entry and we have not heard of it yet.
    fn child_granting(&self, entry: Spte, level: u8, gfn: u64, access: u8) -> Option<u32> {
        let child = entry.is_table(level).then(|| entry.pfn() as u32)?;
        let role = self.role(child);
        let fits = role.direct() && role.access(self.profile().role_layout) == access;
        (fits && self.pool().meta(child).gfn() == gfn).then_some(child)
    }

    /// Links `child` at an entry that is empty.
    pub(crate) fn link_child(&self, guard: &Guard<'_, P, Exclusive>, page: u32, index: u16, child: u32) {
        let ad_disabled = self.role(child).ad_disabled(self.profile().role_layout);
        self.link(guard, page, index, child, self.format().table(u64::from(child), ad_disabled));
    }

    fn map_leaf(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        owed: &mut Owed,
        spot: Spot,
        fault: &ShadowFault,
    ) -> ShadowOutcome {
        let Spot { page, index, level } = spot;
        let layout = self.profile().role_layout;
        let cell = &self.pool().entries(page)[usize::from(index)];
        let mut old = Spte(P::load(cell, Site::SpteRead));
        let gfn = round_down(fault.gfn, level);
        // What the guest grants; in the direct pages below a huge guest leaf the role has it.
        let bits = match (&fault.guest, self.role(page).direct()) {
            (Some(walk), false) => role_access(layout, walk.access),
            _ => self.role(page).access(layout),
        };
        let access = Access::from_bits(u64::from(bits));
        let (pfn, writable) = match fault.frame {
            ShadowFrame::Page { pfn, writable } => (pfn & !(span(level) - 1), writable),
            ShadowFrame::Mmio { generation } => {
                if old.is_present() {
                    self.drop_spte(guard, &owed.books, &mut owed.dead, page, index);
                    owed.flush = true;
                }
                self.set_gfn(page, index, gfn, bits);
                P::store(cell, self.format().mmio(gfn, access, generation).raw(), Site::SpteInstall);
                guard.task().count(0, 1);
                return ShadowOutcome::Emulate;
            }
        };
        let moved = || old.pfn() != pfn || self.gfn_of(page, index) != gfn;
        if old.is_present() && (old.is_table(level) || moved()) {
            // A table under what is a huge leaf now, or another page: of the host, or of the guest, which may have two for one frame.
            self.drop_spte(guard, &owed.books, &mut owed.dead, page, index);
            owed.flush = true;
            old = self.format().empty();
        }
        let was_leaf = old.is_leaf(level);
        if was_leaf && fault.prefetch && self.profile().spurious_if_allowed {
            return ShadowOutcome::Spurious;
        }
        let asks = access.write && writable && !(was_leaf && self.format().is_writable(old));
        let refused = asks && self.refuses_write(guard, fault.as_id, gfn, true, fault.prefetch);
        let made = self.format().make_leaf(&MakeLeaf {
            pfn,
            level,
            access: self.hardware_access(access),
            prefetch: fault.prefetch,
            host_writable: writable,
            write_protected: refused,
            // An MMIO entry says nothing of the page that comes in its place.
            old: if was_leaf { old } else { self.format().empty() },
            dirty_tracked: fault.dirty_tracked,
            ad_mode: self.ad_mode(self.role(page)),
            nx_mitigation: level > 1 && fault.nx_huge_pages,
            remake: self.profile().remake_dirty,
        });
        if made.mark_dirty {
            self.host().gfn_dirty(guard.task(), fault.as_id, gfn);
        }
        let outcome = if made.write_protected && fault.write {
            ShadowOutcome::WriteProtected
        } else if made.spte == old {
            ShadowOutcome::Spurious
        } else {
            ShadowOutcome::Fixed { level, spte: made.spte }
        };
        self.set_gfn(page, index, gfn, bits);
        if was_leaf {
            owed.flush |= self.update_leaf(guard, page, index, old, made.spte);
        } else {
            P::store(cell, made.spte.raw(), Site::SpteInstall);
            guard.task().count(0, 1);
            self.tell_leaf(guard.task(), page, index, self.format().empty(), made.spte);
            self.rmap_add(guard, &owed.books, fault.as_id, gfn, level, page, index);
        }
        outcome
    }

    /// What an entry must have to be well formed: on EPT no entry is without R.
    pub(crate) fn hardware_access(&self, access: Access) -> Access {
        Access { user: access.user || self.format().kind == FormatKind::Ept, ..access }
    }

    /// How Accessed and Dirty of leaves in a page of `role` are kept: an L2's are write-protected for logging, since PML writes down the gfns of its own address space, not L1's.
    pub(crate) fn ad_mode(&self, role: Role) -> AdMode {
        let layout = self.profile().role_layout;
        if self.format().kind == FormatKind::Npt {
            AdMode::Enabled
        } else if role.ad_disabled(layout) {
            AdMode::Disabled
        } else if role.guest_mode(layout) {
            AdMode::WriteProtect
        } else {
            AdMode::Enabled
        }
    }

    /// The leaf at an entry is made again over `old`, of the same page. True: less is allowed than before, or Accessed or Dirty went, and a flush is owed.
    pub(crate) fn update_leaf(
        &self,
        guard: &Guard<'_, P, Exclusive>,
        page: u32,
        index: u16,
        old: Spte,
        new: Spte,
    ) -> bool {
        if new == old {
            return false;
        }
        let (task, format) = (guard.task(), self.format());
        let cell = &self.pool().entries(page)[usize::from(index)];
        let old = if format.is_volatile(old) {
            Spte(P::swap(cell, new.raw(), Site::SpteInstall))
        } else {
            P::store(cell, new.raw(), Site::SpteInstall);
            old
        };
        task.count(0, 1);
        self.tell_leaf(task, page, index, old, new);
        let dirty = format.leaf_needs_dirty(old) && !format.leaf_needs_dirty(new);
        let accessed = format.leaf_needs_accessed(old) && !format.leaf_needs_accessed(new);
        if self.writes_back {
            if dirty {
                self.dirty_now(task, old.pfn());
            }
            if accessed {
                self.host().frames_accessed(old.pfn(), 1);
            }
        }
        // A writable translation may be cached wherever the fast page fault could have given W.
        let could_write = format.is_writable(old) || format.is_mmu_writable(old);
        could_write && !format.is_writable(new)
            || format.is_executable(old) && !format.is_executable(new)
            || dirty
            || accessed
    }
}
