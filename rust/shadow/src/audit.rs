//! Everything about every page, for who judges. Reads only, under the lock.

use tdpmmu_platform::{Exclusive, Guard, Platform};
use tdpmmu_spte::Role;

use crate::ShadowMmu;

/// One shadow page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageInfo {
    /// The table.
    pub table: u32,
    /// The guest's table that it shadows, or the first gfn of a direct page.
    pub gfn: u64,
    /// Its role, `invalid` included.
    pub role: Role,
    /// Address space.
    pub as_id: u8,
    /// Generation in which it was made.
    pub generation: u32,
    /// Not to be used: invalid, or of another generation than the current one.
    pub obsolete: bool,
    /// role.invalid.
    pub invalid: bool,
    /// On the active list.
    pub listed: bool,
    /// In the hash: false only for pages that a walk of the list finds and the hash does not.
    pub in_hash: bool,
    /// References of vCPUs as a root.
    pub root_count: u32,
    /// The guest may write the table that it shadows.
    pub unsync: bool,
    /// Entries whose child is unsync, or has such below.
    pub unsync_children: u32,
    /// The entries that name it.
    pub parents: Vec<(u32, u16)>,
    /// Guest writes to its table since it was last used.
    pub flooding: u32,
}

impl<P: Platform> ShadowMmu<P> {
    /// Every page that is in the hash or on the active list, ascending by table: in use, obsolete, or held as a zapped root.
    pub fn pages(&self, _lock: &Guard<'_, P, Exclusive>) -> Vec<PageInfo> {
        let mut hashed: Vec<u32> = self.hashed_pages().collect();
        hashed.sort_unstable();
        let listed = std::iter::successors(self.newest(), |&page| self.older(page));
        let mut tables: Vec<u32> = hashed.iter().copied().chain(listed).collect();
        tables.sort_unstable();
        tables.dedup();
        tables.into_iter().map(|table| self.page_info(table, hashed.binary_search(&table).is_ok())).collect()
    }

    fn page_info(&self, table: u32, in_hash: bool) -> PageInfo {
        let role = self.role(table);
        PageInfo {
            table,
            gfn: self.pool.meta(table).gfn(),
            role,
            as_id: role.as_id(),
            generation: self.pages.generation(table),
            obsolete: self.is_obsolete_page(table),
            invalid: role.invalid(self.profile().role_layout),
            listed: self.is_listed(table),
            in_hash,
            root_count: self.root_count(table),
            unsync: self.pages.is_unsync(table),
            unsync_children: self.pages.unsync_children(table),
            parents: self.parents_of(table),
            flooding: self.pages.flooding(table),
        }
    }

    fn parents_of(&self, table: u32) -> Vec<(u32, u16)> {
        let mut parents: Vec<_> =
            self.lists.iter(self.pages.parents(table)).map(|at| (at.table(), at.index())).collect();
        parents.sort_unstable();
        parents
    }

    /// The pages of the active list, oldest first.
    pub fn active_pages(&self, _lock: &Guard<'_, P, Exclusive>) -> Vec<u32> {
        std::iter::successors(self.oldest(), |&page| self.newer(page)).collect()
    }

    /// The leaves in the reverse map of `gfn` at `level` (1 to 3), ascending; none where no memslot is.
    pub fn rmap_of(
        &self,
        _lock: &Guard<'_, P, Exclusive>,
        as_id: u8,
        gfn: u64,
        level: u8,
    ) -> Vec<(u32, u16)> {
        let books = self.books();
        let Some(head) = books.find(as_id, gfn).and_then(|slot| slot.rmap(gfn, level)) else {
            return Vec::new();
        };
        let mut leaves: Vec<_> = self.lists.iter(head).map(|at| (at.table(), at.index())).collect();
        leaves.sort_unstable();
        leaves
    }

    /// Is the link at entry `index` of `table` marked: its child is unsync, or has such below?
    pub fn unsync_mark(&self, _lock: &Guard<'_, P, Exclusive>, table: u32, index: u16) -> bool {
        self.pages.unsync_children(table) != 0 && self.pages.unsync_bit(table, index)
    }

    /// The gfn that entry `index` of `table` translates, if it is a leaf.
    pub fn gfn_at(&self, _lock: &Guard<'_, P, Exclusive>, table: u32, index: u16) -> u64 {
        self.gfn_of(table, index)
    }
}
