//! The end of a shadow page, in two steps: prepare and commit.
//!
//! **Guarantee.** A prepared page has no present entry, no entry names it, its memslot does not count it any more, nobody finds it by gfn, it is not on the active list, and role.invalid is set: nothing is ever made below it or from it again. A committed page is used by no hardware walker (one flush for all) and goes to reclamation, which
//! keeps it until lockless walkers have left. A page that vCPUs hold as a root is prepared like any other and freed by its last put; those vCPUs are asked to reload, after role.invalid is set, as who looks before would find the root good.
//!
//! **Mechanism.** [`ShadowMmu::prepare_zap`] chains zapped pages in a [`DeadPages`], which must be committed, or kept for a later commit where a walk gives the lock up. How many pages went is reported always, whether the list of pages became unstable by it only when others than this one went (bug-history 35). A zapped root never returns to the list
//! (bug-history 36). Pages below go with their last parent only for a nested guest under TDP: nobody would look for them again, as L1 frees its tables without telling; elsewhere a page without parents may be linked again, and waits for that.

use std::sync::PoisonError;
use std::sync::atomic::Ordering::Relaxed;

use tdpmmu_platform::{Bug, Event, Exclusive, Guard, Phase, Platform, Site};
use tdpmmu_spte::{ENTRIES, Spte};
use tdpmmu_table::{DeadChain, TableFlag, TablePool};

use crate::leaves::Lost;
use crate::{BookSet, ShadowMmu};

/// Pages that are prepared and not yet committed.
#[must_use = "zapped pages must be committed, or kept for a commit"]
#[derive(Default)]
pub(crate) struct DeadPages {
    chain: DeadChain,
}

impl DeadPages {
    fn push(&mut self, pool: &TablePool, page: u32) {
        self.chain.push(pool, page);
    }

    /// No page waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.chain.is_empty()
    }
}

impl Drop for DeadPages {
    fn drop(&mut self) {
        debug_assert!(
            self.chain.is_empty() || std::thread::panicking(),
            "{} zapped shadow pages were dropped without a commit",
            self.chain.len()
        );
    }
}

/// What a preparation took with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Zapped {
    /// Pages that are on their way out: the page itself, unless it is held as a root, and pages below.
    pub pages: u64,
    /// Others than the page itself have left the list: what the caller knew of its neighbours is void.
    pub unstable: bool,
}

impl Zapped {
    fn below(&mut self, child: Zapped) {
        self.pages += child.pages;
        // Also where the child is a root that is held, and counts for nothing: it has left the list all the same.
        self.unstable = true;
    }
}

impl<P: Platform> ShadowMmu<P> {
    /// Neither an older generation nor invalid pages may be used.
    #[inline(always)]
    pub(crate) fn is_obsolete_page(&self, page: u32) -> bool {
        self.pool.meta(page).has(TableFlag::Invalid) || self.is_older(page)
    }

    /// Made before everything was last made obsolete.
    #[inline(always)]
    pub(crate) fn is_older(&self, page: u32) -> bool {
        self.pages.generation(page) != self.generation.load(Relaxed)
    }

    #[inline(always)]
    pub(crate) fn is_invalid_page(&self, page: u32) -> bool {
        self.pool.meta(page).has(TableFlag::Invalid)
    }

    /// First step: `page` is emptied, taken out of the tree and off the list, and marked invalid.
    pub(crate) fn prepare_zap(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        dead: &mut DeadPages,
        page: u32,
    ) -> Zapped {
        P::point(Site::ShadowZap);
        let task = lock.task();
        let meta = self.pool.meta(page);
        let mut zapped = Zapped::default();
        self.zap_unsync_children(lock, books, dead, page, &mut zapped);
        self.unlink_children(lock, books, dead, page, &mut zapped);
        self.unlink_parents(lock, page);
        let was_invalid = self.is_invalid_page(page);
        let was_obsolete = self.is_obsolete_page(page);
        let direct = self.role(page).direct();
        if !was_invalid && !direct {
            self.unaccount_shadowed(books, page);
        }
        self.clear_unsync(lock, page);
        let listed = self.list_del(page);
        let t = &self.tallies;
        if listed && self.is_older(page) {
            t.obsolete.sub(1);
        }
        let held = meta.refs.load(Relaxed) != 0;
        if held {
            // Off the list it stays: a root that came back would be found by every walk of obsolete pages, and never go (bug-history 36).
            if listed {
                t.zapped_held.add(1);
            }
            if P::bug(Bug::B36) {
                self.list_add(page);
            }
        } else {
            if !listed {
                t.zapped_held.sub(1);
            }
            t.pages.sub(1);
            t.indirect.sub(u64::from(!direct));
            t.zapped.add(1);
            // Here rather than with the freeing, as KVM has it: invalid pages are passed over either way, and the hold of the commit stays short.
            self.hash_del(page);
            dead.push(&self.pool, page);
            // The page counts whether or not others went with it (bug-history 35).
            if zapped.unstable || !P::bug(Bug::B35) {
                zapped.pages += 1;
            }
        }
        if !was_invalid {
            if !P::bug(Bug::B44c) {
                P::locked(Site::ShadowZap);
            }
            meta.swap_role(self.role(page).with_invalid(self.profile().role_layout).raw());
            meta.set(TableFlag::Invalid);
        }
        self.tell(task, || Event::ShadowZap { table: page });
        if held && !was_obsolete {
            // After role.invalid: a vCPU that is asked earlier may find the root good and go on with it.
            self.host.request_reload(task, true);
        }
        zapped
    }

    /// Every unsync page below `page` goes: nobody could find it by this way any more.
    fn zap_unsync_children(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        dead: &mut DeadPages,
        page: u32,
        zapped: &mut Zapped,
    ) {
        while self.pages.unsync_children(page) != 0 {
            match self.first_unsync(page) {
                Some(child) if child != page => zapped.below(self.prepare_zap(lock, books, dead, child)),
                _ => {
                    self.violation("shadow-unsync", &format!("the marks of page {page} lead nowhere"));
                    return;
                }
            }
        }
    }

    /// Empties every entry of `page`.
    fn unlink_children(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        dead: &mut DeadPages,
        page: u32,
        zapped: &mut Zapped,
    ) {
        let level = self.pool.meta(page).level();
        if level == 1 {
            self.drop_leaf_table(lock, books, page);
            return;
        }
        let mut lost = Lost::default();
        for index in 0..ENTRIES as u16 {
            let cell = &self.pool.entries(page)[usize::from(index)];
            let old = Spte(P::load(cell, Site::ShadowZap));
            if old.is_leaf(level) {
                self.drop_leaf(lock, books, &mut lost, page, index, old);
            } else if old.is_table(level) {
                self.drop_table(lock, books, dead, page, index, old.pfn() as u32, zapped);
            } else if !self.format().is_empty(old) {
                // MMIO: nobody keeps books of it.
                P::store(cell, self.format().empty().raw(), Site::ShadowZap);
            }
        }
        lost.settle(self, lock.task());
        lock.task().count(ENTRIES as u64, 0);
    }

    /// Entry `index` of `page` names `child` no more; a nested guest's page goes with its last parent.
    pub(crate) fn drop_table(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        dead: &mut DeadPages,
        page: u32,
        index: u16,
        child: u32,
        zapped: &mut Zapped,
    ) {
        self.unlink(lock, page, index, child);
        let nested = self.config.tdp_enabled && self.role(child).guest_mode(self.profile().role_layout);
        if nested && !self.has_parents(child) {
            // Also if vCPUs hold it as a root, the one that faults among them (bug-history 33).
            zapped.below(self.prepare_zap(lock, books, dead, child));
        }
    }

    /// Second step: one flush for all, and the pages go to reclamation.
    pub(crate) fn commit_zap(&self, guard: &Guard<'_, P, Exclusive>, mut dead: DeadPages) {
        if dead.is_empty() {
            return;
        }
        let task = guard.task();
        let _freeing = task.phase(Phase::Free);
        self.reclaim.free(task, std::mem::take(&mut dead.chain), || self.flush(task));
        self.note_waiting();
    }

    pub(crate) fn note_waiting(&self) {
        let t = &self.tallies;
        t.waiting_peak.raise(t.zapped_kept.get() + self.reclaim.waiting());
    }

    /// Keeps zapped pages for a later commit, for whoever needs memory first: the lock is about to be given up.
    pub(crate) fn keep_zapped(&self, _lock: &Guard<'_, P, Exclusive>, mut dead: DeadPages) {
        let mut kept = self.zapped.lock().unwrap_or_else(PoisonError::into_inner);
        debug_assert!(kept.is_empty(), "taken at the begin of the hold");
        self.tallies.zapped_kept.set(u64::from(dead.chain.len()));
        *kept = std::mem::take(&mut dead.chain);
        drop(kept);
        self.note_waiting();
    }

    /// Takes what was kept: for a commit, or to add to it in this hold.
    pub(crate) fn take_zapped(&self, _lock: &Guard<'_, P, Exclusive>) -> DeadPages {
        self.tallies.zapped_kept.set(0);
        let chain = std::mem::take(&mut *self.zapped.lock().unwrap_or_else(PoisonError::into_inner));
        DeadPages { chain }
    }
}
