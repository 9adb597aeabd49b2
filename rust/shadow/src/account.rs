//! What a shadow page costs its memslot: huge pages over the guest's table, and write access to it.
//!
//! **Guarantee.** While a page shadows the guest's table in `gfn`, lpage_info has a reason against every huge page over `gfn`, so that the write protection of the one gfn can hold. When
//! the page is prepared for its end the reason goes, in the same memslot: which must therefore still be there (bug-history 37).
//!
//! **Mechanism.** One count a huge frame. Direct pages shadow nothing and count for nothing. `shadow-gen-kept` clears all counts when it makes everything obsolete, so that an obsolete page counts for nothing either, and
//! a slot may go before the page does.

use tdpmmu_platform::{Exclusive, Guard, Platform};
use tdpmmu_spte::{LEVEL_1G, LEVEL_2M};

use crate::{BookSet, ShadowDesign, ShadowMmu};

impl<P: Platform> ShadowMmu<P> {
    /// A page that shadows the guest's table in `gfn` has been made.
    pub(crate) fn account_shadowed(&self, books: &BookSet, page: u32) {
        self.adjust_lpage(books, page, 1);
    }

    /// The page is prepared for its end.
    pub(crate) fn unaccount_shadowed(&self, books: &BookSet, page: u32) {
        // v4: all counts went when everything became obsolete.
        if self.design() == ShadowDesign::GenKept && self.is_older(page) {
            return;
        }
        self.adjust_lpage(books, page, -1);
    }

    fn adjust_lpage(&self, books: &BookSet, page: u32, delta: i32) {
        let (gfn, as_id) = (self.pool.meta(page).gfn(), self.role(page).as_id());
        match books.find(as_id, gfn) {
            Some(slot) => {
                slot.lpage.adjust(gfn, LEVEL_2M, delta);
                slot.lpage.adjust(gfn, LEVEL_1G, delta);
            }
            None => self.books_gone("a page that shadows the guest's table", as_id, gfn),
        }
    }

    /// A page refers to a memslot that is not there any more: the kernel would write to freed memory here.
    #[cold]
    pub(crate) fn books_gone(&self, who: &str, as_id: u8, gfn: u64) {
        self.violation(
            "slot-books-gone",
            &format!("{who} in gfn {gfn:#x} of address space {as_id} outlives its memslot"),
        );
    }

    /// Clears what all pages count for, in all slots (kvm_clear_all_lpage_info of the 2013 series' fourth version). O(huge frames), nothing beside what the generation saves.
    pub(crate) fn clear_all_lpage(&self, _lock: &Guard<'_, P, Exclusive>, books: &BookSet) {
        for slot in books.iter() {
            slot.lpage.reset();
        }
    }
}
