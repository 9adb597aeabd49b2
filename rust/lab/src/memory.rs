//! What a guest costs before it is built, and the refusal.

use serde::{Deserialize, Serialize};
use tdpmmu_shadow::overhead_bytes_per_page;
use tdpmmu_spte::geometry::{page_bytes, span, tables_below_root};
use tdpmmu_table::{TABLE_BYTES, TablePool};

use crate::host::available_bytes;
use crate::{LabError, units};

/// A list of leaves that map one frame.
const LIST: u64 = 128;

/// Page-table pages and bytes of one fully mapped guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Estimate {
    /// Leaves.
    pub sptes: u64,
    /// Tables, one root included.
    pub tables: u64,
    /// Bytes of tables.
    pub table_bytes: u64,
    /// Bytes of everything: tables, their headers, the host frames' tags and flags.
    pub bytes: u64,
}

impl Estimate {
    /// For `memory_bytes` mapped with leaves of `level` below a root of `root_level`.
    pub fn new(memory_bytes: u64, level: u8, root_level: u8) -> Self {
        let gfns = memory_bytes / page_bytes(1);
        let tables = tables_below_root(gfns, level, root_level) + 1;
        let table_bytes = tables * TABLE_BYTES as u64;
        // Two bits a frame (dirty, accessed) in the host's model, one in the slot's dirty bitmap; lpage_info is small.
        let frames = gfns / 8 * 3;
        let mut sum = Self { sptes: gfns / span(level), tables, table_bytes, bytes: 0 };
        sum.bytes = table_bytes + sum.headers() + frames;
        sum
    }

    /// For `times` as many roots, over the same frames.
    pub fn times(self, times: u64) -> Self {
        let frames = self.bytes - self.table_bytes - self.headers();
        let tables = self.tables * times;
        let table_bytes = self.table_bytes * times;
        let mut sum = Self { sptes: self.sptes * times, tables, table_bytes, bytes: 0 };
        sum.bytes = table_bytes + sum.headers() + frames;
        sum
    }

    /// The same under the shadow MMU, in a guest of `gfns` pages mapped at `level`: books of its pages, reverse maps; `guest`: the guest's own tables, and a gfn an entry.
    pub fn shadowed(mut self, gfns: u64, level: u8, guest: bool) -> Self {
        let page_books = overhead_bytes_per_page(guest);
        let guests_own = if guest { self.table_bytes } else { 0 };
        let heads = gfns / span(level) * size_of::<u64>() as u64;
        // Where a frame is mapped more than once, its reverse map is a list.
        let lists = if self.sptes > gfns / span(level) { gfns / span(level) * LIST } else { 0 };
        let ledger = gfns / span(2) * size_of::<u32>() as u64;
        self.bytes += self.tables * page_books + guests_own + heads + lists + ledger;
        self
    }

    fn headers(&self) -> u64 {
        (self.tables as f64 * TablePool::overhead_bytes_per_table()) as u64
    }

    /// Refuses what does not fit in `limit` bytes (or the host's available memory), with the figure.
    ///
    /// # Errors
    /// [`LabError::Memory`].
    pub fn check(&self, memory_bytes: u64, page: &str, limit: Option<u64>) -> Result<(), LabError> {
        // Leave the host a little: 256 MiB for everything that is not counted here.
        let free = available_bytes().saturating_sub(256 << 20);
        let available = limit.map_or(free, |l| l.min(free));
        if self.bytes <= available {
            return Ok(());
        }
        Err(LabError::Memory {
            needed_bytes: self.bytes,
            available_bytes: available,
            message: format!(
                "{} of {page} pages needs {} of memory, {} of it page tables ({} available{}); use a larger page, \
                 less memory, or a larger host",
                units::bytes(memory_bytes),
                units::bytes(self.bytes),
                units::bytes(self.table_bytes),
                units::bytes(available),
                if limit.is_some_and(|l| l <= free) { ", by the limit given" } else { "" },
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_sizes_come_out() {
        let tib = 1u64 << 40;
        assert_eq!(Estimate::new(64 * tib, 1, 4).tables, 33_554_432 + 65_536 + 128 + 1);
        assert_eq!(Estimate::new(64 * tib, 1, 4).sptes, 1 << 34);
        assert_eq!(Estimate::new(256 << 30, 1, 4).sptes, 67_108_864);
        assert_eq!(Estimate::new(64 * tib, 2, 4).table_bytes >> 20, 256);
    }

    #[test]
    fn the_shadow_mmu_needs_more_and_says_how_much() {
        let gib = 1u64 << 30;
        let bare = Estimate::new(64 * gib, 1, 4);
        let gfns = (64 * gib) >> 12;
        let direct = bare.shadowed(gfns, 1, false);
        assert_eq!((direct.sptes, direct.tables), (bare.sptes, bare.tables));
        // A word a gfn.
        assert!(
            (128 << 20..160 << 20).contains(&(direct.bytes - bare.bytes)),
            "{}",
            direct.bytes - bare.bytes
        );
        let guest = bare.shadowed(gfns, 1, true);
        let books = overhead_bytes_per_page(true) - overhead_bytes_per_page(false);
        assert_eq!(
            guest.bytes - direct.bytes,
            bare.table_bytes + bare.tables * books,
            "the guest's tables, and a gfn an entry"
        );
        let fits = direct.bytes;
        assert!(direct.check(64 * gib, "4K", Some(fits)).is_ok());
        assert!(guest.check(64 * gib, "4K", Some(fits)).is_err());
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_figure() {
        let error =
            Estimate::new(64 << 40, 1, 4).check(64 << 40, "4K", Some(1 << 30)).expect_err("too large");
        assert!(error.to_string().contains("64 TiB of 4K pages needs"), "{error}");
        assert!(error.to_string().contains("128.3 GiB"), "{error}");
    }
}
