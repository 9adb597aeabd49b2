//! What the shadow MMU keeps with a memslot: reverse maps and huge-page ledgers.
//!
//! **Guarantee asked of everybody.** As long as a shadow page has a leaf into a slot, or shadows a guest page table that lies in it, the slot's books exist: the page's
//! zap will look for them. A deletion therefore ends with nothing that refers to the slot, whatever the zap design (bug-history 37).
//!
//! **Mechanism.** The books are reached as KVM reaches them: by gfn, through the set of slots that is current. What no slot covers any more has no books ([`BookSet::find`] is `None`),
//! which is what a use after free looks like here.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tdpmmu_spte::geometry::span;
use tdpmmu_table::Lazy;

use crate::LpageInfo;

/// The books of one memslot. They outlive its replacement (flags, INVALID), and go with it.
pub struct SlotBooks {
    /// Address space.
    pub as_id: u8,
    /// First gfn.
    pub base: u64,
    /// Pages.
    pub pages: u64,
    /// Reasons against huge pages.
    pub lpage: Arc<LpageInfo>,
    /// Per level 1 to 3 one word a frame: the heads of the reverse maps.
    rmaps: [Lazy<AtomicU64>; 3],
}

impl SlotBooks {
    /// Empty books for `[base, base + pages)`.
    ///
    /// # Errors
    /// What the host says when it refuses the address space.
    pub fn new(as_id: u8, base: u64, pages: u64, lpage: Arc<LpageInfo>) -> io::Result<Self> {
        let heads =
            |level: u8| Lazy::new(((base + pages - 1) / span(level) - base / span(level) + 1) as usize);
        Ok(Self { as_id, base, pages, lpage, rmaps: [heads(1)?, heads(2)?, heads(3)?] })
    }

    /// The gfns covered.
    pub fn gfns(&self) -> Range<u64> {
        self.base..self.base + self.pages
    }

    /// The head of the reverse map of `gfn` at `level` (1 to 3); `None` outside.
    #[inline]
    pub fn rmap(&self, gfn: u64, level: u8) -> Option<&AtomicU64> {
        let at = (gfn / span(level)).checked_sub(self.base / span(level))?;
        self.rmaps[usize::from(level) - 1].get(at as usize)
    }

    /// The heads of the reverse maps of `count` neighbouring frames of `level` (1 to 3) from that of `gfn` on, fewer where the slot ends; `None` outside.
    #[inline]
    pub fn rmap_run(&self, gfn: u64, level: u8, count: u64) -> Option<&[AtomicU64]> {
        let at = (gfn / span(level)).checked_sub(self.base / span(level))? as usize;
        let heads = self.rmaps[usize::from(level) - 1].slice(at, at + count as usize);
        (!heads.is_empty()).then_some(heads)
    }

    /// Bytes that the heads take once all are touched; a slot that is mapped by huge pages touches a five hundredth of them.
    pub fn bytes(&self) -> u64 {
        self.rmaps.iter().map(|heads| (heads.len() * size_of::<u64>()) as u64).sum()
    }
}

/// The books of all slots at one instant, those of INVALID slots too.
#[derive(Clone, Default)]
pub struct BookSet {
    spaces: [Vec<Arc<SlotBooks>>; 2],
}

impl BookSet {
    /// The set of these books, in any order.
    pub fn new(books: impl IntoIterator<Item = Arc<SlotBooks>>) -> Self {
        let mut set = Self::default();
        for one in books {
            if let Some(space) = set.spaces.get_mut(usize::from(one.as_id)) {
                space.push(one);
            }
        }
        set.spaces.iter_mut().for_each(|space| space.sort_by_key(|one| one.base));
        set
    }

    /// The books of the slot that holds `gfn`.
    #[inline]
    pub fn find(&self, as_id: u8, gfn: u64) -> Option<&Arc<SlotBooks>> {
        let space = self.spaces.get(usize::from(as_id))?;
        let after = space.partition_point(|one| one.base <= gfn);
        space.get(after.checked_sub(1)?).filter(|one| gfn - one.base < one.pages)
    }

    /// The books of the first slot that ends behind `gfn`: the one that holds it, or the next.
    #[inline]
    pub fn at_or_after(&self, as_id: u8, gfn: u64) -> Option<&Arc<SlotBooks>> {
        let space = self.spaces.get(usize::from(as_id))?;
        space.get(space.partition_point(|one| one.base + one.pages <= gfn))
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<SlotBooks>> {
        self.spaces.iter().flatten()
    }
}
