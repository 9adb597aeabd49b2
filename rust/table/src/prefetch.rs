//! Hints to the memory system: the next table's lines, one for each line of this table that is handled.
//!
//! Tables lie in run order, but each is one page, and the hardware prefetcher stops at its end. Whoever scans or rewrites a whole table asks for
//! the next one meanwhile. A hint is never wrong, only useless.

use crate::Entries;

/// Entries in one cache line.
pub const LINE: usize = 8;

/// What the line is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// To be read.
    Read,
    /// To be written: comes in exclusively.
    Write,
}

/// Asks for the cache line of `entries[index]`.
#[inline(always)]
pub fn prefetch(entries: &Entries, index: usize, intent: Intent) {
    #[cfg(target_arch = "x86_64")]
    {
        use core::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch};
        let line = (&raw const entries[index]).cast::<i8>();
        // SAFETY: a hint about an address inside a live table; it reads and writes nothing.
        unsafe {
            match intent {
                Intent::Read => _mm_prefetch::<_MM_HINT_T0>(line),
                Intent::Write => _mm_prefetch::<_MM_HINT_ET0>(line),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (entries, index, intent);
}
