//! Bulk population of direct pages: a table's worth of leaves in one step, where faults would take one each.
//!
//! **Guarantee.** What it makes is what faults would have made: pages hashed, listed, linked, leaves counted and in their reverse maps. What is mapped already stays.
//!
//! **Mechanism.** Leaves of one table are neighbours, and so are the heads of their reverse maps, which are empty where nothing else maps them.

use std::sync::atomic::Ordering::Relaxed;

use tdpmmu_platform::{Exclusive, Guard, Platform, Site};
use tdpmmu_spte::geometry::{index, span};
use tdpmmu_spte::{ENTRIES, Spte};
use tdpmmu_table::{PoolError, TableCache};

use crate::ptelist::Place;
use crate::{BookSet, ShadowMmu};

/// Leaves for neighbouring frames.
#[derive(Clone, Copy, Debug)]
pub struct DirectRun {
    /// First gfn, aligned to `level`.
    pub gfn: u64,
    /// 1, 2 or 3.
    pub level: u8,
    /// The first leaf; the frames of those behind follow on.
    pub first: Spte,
    /// How many; what would lie in another table is not made.
    pub count: u64,
}

impl<P: Platform> ShadowMmu<P> {
    /// Makes the leaves of `run` under the direct root `root`, and the pages above them from `cache`, which was topped up. Returns (entries of the run that were dealt with, leaves made). Nothing is made while anything
    /// shadows the guest's tables, nor where a table of smaller pages is in the way: what is to become of these is for a fault to say.
    ///
    /// # Errors
    /// [`PoolError::Exhausted`]: the cache is empty.
    pub fn map_direct_run(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        cache: &mut TableCache,
        root: u32,
        run: &DirectRun,
    ) -> Result<(u64, u64), PoolError> {
        if self.tallies.indirect.get() != 0 || !self.role(root).direct() {
            return Ok((0, 0));
        }
        let from = index(run.gfn, run.level);
        let mut count = run.count.min((ENTRIES - from) as u64);
        let mut page = root;
        for level in (run.level + 1..=self.root_level(root)).rev() {
            let Some(child) = self.direct_child(lock, books, cache, page, index(run.gfn, level) as u16)?
            else {
                // A larger leaf maps all of them.
                return Ok((count, 0));
            };
            page = child;
        }
        let as_id = self.role(root).as_id();
        let heads = books.find(as_id, run.gfn).and_then(|slot| slot.rmap_run(run.gfn, run.level, count));
        let (mut made, mut plain) = (0, 0);
        for n in 0..count {
            let at = (from + n as usize) as u16;
            let cell = &self.pool.entries(page)[usize::from(at)];
            let old = Spte(P::load(cell, Site::SpteRead));
            if old.is_table(run.level) {
                // Some of it is mapped by smaller pages: a fault decides what becomes of these.
                count = n;
                break;
            }
            if !self.format().is_empty(old) {
                continue;
            }
            let new = Spte(run.first.raw() + ((n * span(run.level)) << Spte::PFN_SHIFT));
            P::store(cell, new.raw(), Site::SpteInstall);
            self.tell_leaf(lock.task(), page, at, self.format().empty(), new);
            made += 1;
            match heads.and_then(|heads| heads.get(n as usize)) {
                Some(head) if head.load(Relaxed) == 0 => {
                    head.store(Place::new(page, at).word(), Relaxed);
                    plain += 1;
                }
                _ => {
                    let gfn = run.gfn + n * span(run.level);
                    self.rmap_add(lock, books, as_id, gfn, run.level, page, at);
                }
            }
        }
        self.count_leaves(run.level, plain);
        lock.task().count(count, made);
        Ok((count, made))
    }

    /// The page below entry `index` of a direct page, made if there is none; `None` where a leaf is.
    fn direct_child(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        cache: &mut TableCache,
        parent: u32,
        index: u16,
    ) -> Result<Option<u32>, PoolError> {
        let role = self.role(parent);
        let entry = Spte(P::load(&self.pool.entries(parent)[usize::from(index)], Site::SpteRead));
        if entry.is_table(role.level()) {
            return Ok(Some(entry.pfn() as u32));
        }
        if !self.format().is_empty(entry) {
            return Ok(None);
        }
        let (as_id, gfn) = (role.as_id(), self.gfn_of(parent, index));
        let child = self
            .find_page(lock, as_id, gfn, role.child())
            .or_else(|| self.new_page(lock, books, cache, as_id, gfn, role.child()))
            .ok_or_else(|| {
                let in_use = self.pool.stats().taken;
                PoolError::Exhausted { in_use, cap: self.pool.cap(), wanted: 1 }
            })?;
        let spte = self.format().table(u64::from(child), role.ad_disabled(self.profile().role_layout));
        self.link(lock, parent, index, child, spte);
        Ok(Some(child))
    }
}
