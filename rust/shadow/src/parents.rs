//! Links between pages, and who has unsync pages below.
//!
//! **Guarantee.** Entry `index` of page A names page B if, and only if, (A, index) is in B's list of parents: so a page is taken out of the tree without a walk. A link's unsync mark is set if, and only if, the child is unsync or has a marked link itself; who loads a root finds
//! every unsync page below it by the marks.
//!
//! **Mechanism.** Links are made and broken here only. KVM sets marks eagerly and clears them when a walk finds them stale; here both are eager, which costs the same where unsync pages are few and leaves nothing stale to be told from the true. A mark climbs while it is the first one
//! of its page, and comes down while it was the last.

use tdpmmu_platform::{Event, Exclusive, Guard, Platform, Site};
use tdpmmu_spte::Spte;

use crate::ShadowMmu;
use crate::ptelist::Place;

impl<P: Platform> ShadowMmu<P> {
    /// Entry `index` of `parent`, which is empty, names `child` from here on; `spte` is what it holds.
    pub(crate) fn link(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        parent: u32,
        index: u16,
        child: u32,
        spte: Spte,
    ) {
        self.lists.add(self.pages.parents(child), Place::new(parent, index));
        if self.pages.has_unsync(child) {
            self.mark_child(parent, index);
        }
        lock.task().count(0, 1);
        P::store(&self.pool.entries(parent)[usize::from(index)], spte.raw(), Site::SptePublish);
        self.tell(lock.task(), || Event::ShadowLink { parent, index, child });
    }

    /// Entry `index` of `parent` names `child` no more. The store is plain, as in KVM: no bit of the entry is anybody else's. So who frees `child` next needs a barrier of its own against lockless walkers.
    pub(crate) fn unlink(&self, lock: &Guard<'_, P, Exclusive>, parent: u32, index: u16, child: u32) {
        if !self.lists.remove(self.pages.parents(child), Place::new(parent, index)) {
            self.violation(
                "shadow-parents",
                &format!("page {child} does not know its parent {parent}[{index}]"),
            );
        }
        self.unmark_child(parent, index);
        lock.task().count(0, 1);
        P::store(
            &self.pool.entries(parent)[usize::from(index)],
            self.format().empty().raw(),
            Site::ShadowZap,
        );
        self.tell(lock.task(), || Event::ShadowUnlink { parent, index, child });
    }

    /// No entry names `child` any more.
    pub(crate) fn unlink_parents(&self, lock: &Guard<'_, P, Exclusive>, child: u32) {
        while let Some(at) = self.lists.first(self.pages.parents(child)) {
            self.unlink(lock, at.table(), at.index(), child);
        }
    }

    /// Does an entry name the page?
    pub(crate) fn has_parents(&self, page: u32) -> bool {
        self.lists.first(self.pages.parents(page)).is_some()
    }

    /// The guest may write the table that `page` shadows, from here on.
    pub(crate) fn mark_unsync(&self, lock: &Guard<'_, P, Exclusive>, page: u32) {
        let had = self.pages.has_unsync(page);
        self.pages.set_unsync(page, true);
        self.tell(lock.task(), || Event::ShadowUnsync { table: page, on: true });
        if !had {
            self.mark_parents(page);
        }
    }

    /// `page` says what the guest's table says, and the guest may not write that, from here on.
    pub(crate) fn clear_unsync(&self, lock: &Guard<'_, P, Exclusive>, page: u32) {
        if !self.pages.is_unsync(page) {
            return;
        }
        self.pages.set_unsync(page, false);
        self.tell(lock.task(), || Event::ShadowUnsync { table: page, on: false });
        if !self.pages.has_unsync(page) {
            self.unmark_parents(page);
        }
    }

    /// Levels bound the recursion: a child is a level below its parent.
    fn mark_parents(&self, page: u32) {
        for at in self.lists.iter(self.pages.parents(page)) {
            self.mark_child(at.table(), at.index());
        }
    }

    fn mark_child(&self, parent: u32, index: u16) {
        let had = self.pages.has_unsync(parent);
        if self.pages.set_unsync_bit(parent, index, true) && !had {
            self.mark_parents(parent);
        }
    }

    fn unmark_parents(&self, page: u32) {
        for at in self.lists.iter(self.pages.parents(page)) {
            self.unmark_child(at.table(), at.index());
        }
    }

    fn unmark_child(&self, parent: u32, index: u16) {
        // A direct page has no bitmap, nor anything unsync below.
        if self.pages.unsync_children(parent) != 0
            && self.pages.set_unsync_bit(parent, index, false)
            && !self.pages.has_unsync(parent)
        {
            self.unmark_parents(parent);
        }
    }

    /// Some unsync page at or below `page`, found by the marks.
    pub(crate) fn first_unsync(&self, page: u32) -> Option<u32> {
        let mut at = page;
        loop {
            if self.pages.is_unsync(at) {
                return Some(at);
            }
            if self.pages.unsync_children(at) == 0 {
                return None;
            }
            let index = self.pages.next_unsync_child(at, 0)?;
            let entry = Spte(P::load(&self.pool.entries(at)[usize::from(index)], Site::ShadowSync));
            at = entry.pfn() as u32;
        }
    }
}
