//! S2: only what maps a memslot, or is accounted in it, is zapped.
//!
//! **Guarantee.** When it returns no leaf maps a gfn of the slot, and no page of this generation shadows a table in it: the slot's books may go. Roots stay valid, unless they are such pages.
//!
//! **Mechanism.** Leaves by reverse maps; pages by the hash, gfn by gfn: a look-up for every gfn of the slot, which is what the design costs on a large slot. Zapping the leaves alone would leave pages whose accounting lies in books that are freed next (bug-history 37).
//! 5.1 and 5.2 took every page of a gfn, direct ones too; the quirk of 6.12 takes only those that shadow the guest's tables.

use std::sync::Arc;

use tdpmmu_platform::{Bug, Exclusive, Guard, Phase, Platform};

use crate::unmap::heads_per_check;
use crate::zap::DeadPages;
use crate::{ShadowMmu, SlotBooks};

/// Which pages of a slot's gfns go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotPages {
    /// All (5.1, 5.2).
    All,
    /// Those that shadow a table of the guest (6.12, with the quirk off).
    Shadowing,
}

impl<P: Platform> ShadowMmu<P> {
    /// Zaps the leaves into a slot and the pages of its gfns; flushed when it returns. Gives the lock up where somebody waits.
    pub fn zap_slot(&self, guard: &mut Guard<'_, P, Exclusive>, slot: &Arc<SlotBooks>, pages: SlotPages) {
        self.on_cpu(guard.task(), || {
            let mut owed = self.unmap_books(guard, slot.as_id, slot.gfns(), true, true);
            if !P::bug(Bug::B37) {
                self.zap_pages_of_slot(guard, slot, pages, &mut owed);
            }
            if owed {
                self.flush(guard.task());
            }
            guard.set_debt(false);
        });
        self.stamp_zap_end();
    }

    fn zap_pages_of_slot(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        slot: &SlotBooks,
        pages: SlotPages,
        owed: &mut bool,
    ) {
        let _work = guard.task().phase(Phase::SpteWork);
        let mut dead = DeadPages::default();
        let mut books = self.books();
        for gfn in slot.gfns() {
            if self.listed() == 0 {
                break;
            }
            let of_gfn: Vec<u32> = self
                .pages_of_gfn(guard, slot.as_id, gfn)
                .filter(|&page| pages == SlotPages::All || !self.role(page).direct())
                .collect();
            for page in of_gfn {
                // One may have gone with another.
                if !self.is_invalid_page(page) {
                    let _ = self.prepare_zap(guard, &books, &mut dead, page);
                }
            }
            if (gfn + 1).is_multiple_of(heads_per_check::<P>()) && guard.should_yield() {
                self.flush_or_commit(guard, &mut dead, owed);
                guard.set_debt(false);
                guard.relock();
                books = self.books();
            }
        }
        self.flush_or_commit(guard, &mut dead, owed);
    }

    /// Pays what is owed: by the commit's flush if there are pages, else by one of its own (kvm_mmu_remote_flush_or_zap).
    pub(crate) fn flush_or_commit(
        &self,
        guard: &Guard<'_, P, Exclusive>,
        dead: &mut DeadPages,
        owed: &mut bool,
    ) {
        if !dead.is_empty() {
            self.commit_zap(guard, std::mem::take(dead));
        } else if *owed {
            self.flush(guard.task());
        }
        *owed = false;
    }
}
