//! Shadow pages by gfn and role.
//!
//! **Guarantee.** [`ShadowMmu::find_page`] finds the one page of this generation that has this role and shadows this gfn, if there is one. A page is hashed from its making until it is prepared for its end; a zapped root that vCPUs hold is hashed until its last put, and passed over, as
//! an obsolete page is.
//!
//! **Mechanism.** 4096 buckets by gfn alone, as in KVM, so that all pages of one gfn are in one chain whatever their roles: write tracking asks for these. Chains are linked both ways through the pages' books.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use tdpmmu_platform::{Exclusive, Guard, Mode, NIL, Platform};
use tdpmmu_spte::Role;
use tdpmmu_table::Lazy;

use crate::ShadowMmu;

/// Bits of a bucket's number (KVM_MMU_HASH_SHIFT).
const BITS: u32 = 12;

/// First page of each chain; 0: none.
pub(crate) struct PageHash {
    buckets: Lazy<AtomicU32>,
}

impl PageHash {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { buckets: Lazy::new(1 << BITS)? })
    }

    #[inline]
    fn bucket(&self, gfn: u64) -> &AtomicU32 {
        // The golden ratio spreads the multiples of 512 that direct pages have.
        let at = gfn.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BITS);
        match self.buckets.get(at as usize) {
            Some(bucket) => bucket,
            None => unreachable!("twelve bits"),
        }
    }
}

impl<P: Platform> ShadowMmu<P> {
    pub(crate) fn hash_add(&self, page: u32) {
        let bucket = self.hash.bucket(self.pool.meta(page).gfn());
        let next = bucket.load(Relaxed);
        self.pool.meta(page).second.store(if next == 0 { NIL } else { next }, Relaxed);
        self.pages.set_hash_prev(page, 0);
        if next != 0 {
            self.pages.set_hash_prev(next, page);
        }
        bucket.store(page, Relaxed);
    }

    pub(crate) fn hash_del(&self, page: u32) {
        let meta = self.pool.meta(page);
        let (next, prev) = (meta.second.load(Relaxed), self.pages.hash_prev(page));
        if next != NIL {
            self.pages.set_hash_prev(next, prev);
        }
        if prev == 0 {
            self.hash.bucket(meta.gfn()).store(if next == NIL { 0 } else { next }, Relaxed);
        } else {
            self.pool.meta(prev).second.store(next, Relaxed);
        }
        meta.second.store(NIL, Relaxed);
    }

    fn chain(&self, first: u32) -> impl Iterator<Item = u32> + '_ {
        std::iter::successors((first != 0).then_some(first), |&page| {
            let next = self.pool.meta(page).second.load(Relaxed);
            (next != NIL).then_some(next)
        })
    }

    /// The page that has this role and shadows `gfn`, if there is one that may be used: neither obsolete nor invalid.
    pub(crate) fn find_page(
        &self,
        _lock: &Guard<'_, P, Exclusive>,
        as_id: u8,
        gfn: u64,
        role: Role,
    ) -> Option<u32> {
        debug_assert_eq!(as_id, role.as_id());
        self.chain(self.hash.bucket(gfn).load(Relaxed)).find(|&page| {
            let meta = self.pool.meta(page);
            meta.gfn() == gfn && meta.role() == role.raw() && !self.is_obsolete_page(page)
        })
    }

    /// The pages of `gfn` that may be used, whatever their roles. The list of them must not change while this is walked: collect what is to be zapped.
    pub(crate) fn pages_of_gfn<'s>(
        &'s self,
        _lock: &'s Guard<'_, P, Exclusive>,
        as_id: u8,
        gfn: u64,
    ) -> impl Iterator<Item = u32> + 's {
        self.chain(self.hash.bucket(gfn).load(Relaxed)).filter(move |&page| {
            let meta = self.pool.meta(page);
            meta.gfn() == gfn && Role(meta.role()).as_id() == as_id && !self.is_obsolete_page(page)
        })
    }

    /// As [`ShadowMmu::pages_of_gfn`], those that shadow a table of the guest.
    pub(crate) fn gpte_pages_of_gfn<'s>(
        &'s self,
        lock: &'s Guard<'_, P, Exclusive>,
        as_id: u8,
        gfn: u64,
    ) -> impl Iterator<Item = u32> + 's {
        self.pages_of_gfn(lock, as_id, gfn).filter(|&page| !self.role(page).direct())
    }

    /// Does a page that is not invalid, obsolete or not, shadow the guest's table in `gfn`? Who maps `gfn` in another MMU maps it read-only then. The lock may be held in either mode: the hash changes under the exclusive one only.
    pub fn is_shadowed<M: Mode>(&self, _lock: &Guard<'_, P, M>, as_id: u8, gfn: u64) -> bool {
        self.tallies.indirect.get() != 0
            && self.chain(self.hash.bucket(gfn).load(Relaxed)).any(|page| {
                let (meta, role) = (self.pool.meta(page), self.role(page));
                meta.gfn() == gfn && role.as_id() == as_id && !role.direct() && !self.is_invalid_page(page)
            })
    }

    /// Every hashed page, in the order of the buckets.
    pub(crate) fn hashed_pages(&self) -> impl Iterator<Item = u32> + '_ {
        let buckets = self.hash.buckets.slice(0, self.hash.buckets.len());
        buckets.iter().flat_map(|bucket| self.chain(bucket.load(Relaxed)))
    }
}
