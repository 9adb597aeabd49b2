//! Which pages are free: one bit a page, so that runs re-form however pages come back.
//!
//! Taking is serialised by the pool; giving back is one atomic OR per 64 neighbours, from any thread.

use std::sync::atomic::{AtomicU64, Ordering};

/// Pages in one word of the map.
pub const WORD_PAGES: usize = 64;

/// A set of free page indices.
pub struct FreeMap {
    words: Vec<AtomicU64>,
    hint: AtomicU64,
}

impl FreeMap {
    /// All of `[first, len)` free.
    pub fn new(first: usize, len: usize) -> Self {
        let words = (0..len.div_ceil(WORD_PAGES))
            .map(|w| {
                let mut bits = 0u64;
                for b in 0..WORD_PAGES {
                    let page = w * WORD_PAGES + b;
                    if page >= first && page < len {
                        bits |= 1 << b;
                    }
                }
                AtomicU64::new(bits)
            })
            .collect();
        Self { words, hint: AtomicU64::new(0) }
    }

    /// Free pages, counted.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.load(Ordering::Relaxed).count_ones())).sum()
    }

    /// Takes `pages` neighbours (at most 512; whole words while there are any), or `None`. The caller serialises takers.
    pub fn take_run(&self, pages: usize) -> Option<u32> {
        let need = pages.div_ceil(WORD_PAGES);
        let n = self.words.len();
        let start = self.hint.load(Ordering::Relaxed) as usize;
        // Two sweeps: from the hint to the end, then from the beginning (a run does not wrap).
        for (from, to) in [(start.min(n), n), (0, n)] {
            let mut run = 0;
            for w in from..to {
                run = if self.words[w].load(Ordering::Acquire) == u64::MAX { run + 1 } else { 0 };
                if run == need {
                    let first = w + 1 - need;
                    for word in &self.words[first..=w] {
                        word.store(0, Ordering::Relaxed);
                    }
                    self.hint.store((w + 1) as u64, Ordering::Relaxed);
                    let base = (first * WORD_PAGES) as u32;
                    // The tail of the last word that the caller did not ask for goes back at once.
                    for extra in pages..need * WORD_PAGES {
                        self.give((base as usize + extra) as u32);
                    }
                    return Some(base);
                }
            }
        }
        if pages < WORD_PAGES { self.take_within_word(pages) } else { None }
    }

    /// The last resort of a short run: neighbours within a word that is partly taken. So a single page is found as long as one is free.
    fn take_within_word(&self, pages: usize) -> Option<u32> {
        for (w, word) in self.words.iter().enumerate() {
            let bits = word.load(Ordering::Acquire);
            // Bit b survives if the bits b..b + pages are all set.
            let starts = (1..pages).fold(bits, |m, _| m & (m >> 1));
            if starts != 0 {
                let b = starts.trailing_zeros();
                word.fetch_and(!(((1 << pages) - 1) << b), Ordering::Relaxed);
                return Some((w * WORD_PAGES) as u32 + b);
            }
        }
        None
    }

    /// Takes up to `out.capacity() - out.len()` pages, neighbours first. The caller serialises takers.
    pub fn take_some(&self, out: &mut Vec<u32>, mut want: usize) -> usize {
        let n = self.words.len();
        let start = (self.hint.load(Ordering::Relaxed) as usize).min(n.saturating_sub(1));
        let mut got = 0;
        for step in 0..n {
            if want == 0 {
                break;
            }
            let w = (start + step) % n;
            let mut bits = self.words[w].load(Ordering::Acquire);
            if bits == 0 {
                continue;
            }
            let mut taken = 0u64;
            while bits != 0 && want > 0 {
                let b = bits.trailing_zeros();
                taken |= 1 << b;
                bits &= bits - 1;
                out.push((w * WORD_PAGES) as u32 + b);
                want -= 1;
                got += 1;
            }
            self.words[w].fetch_and(!taken, Ordering::Relaxed);
            self.hint.store(w as u64, Ordering::Relaxed);
        }
        got
    }

    /// Gives back the pages of `mask` in the word of `page`; returns the bits that were free already (a double free).
    #[inline]
    pub fn give_word(&self, word: usize, mask: u64) -> u64 {
        // Release pairs with the taker's acquire load: what the freer did to the page happens before its next use.
        self.words[word].fetch_or(mask, Ordering::Release) & mask
    }

    /// Is the page free?
    pub fn has(&self, page: u32) -> bool {
        self.words[page as usize / WORD_PAGES].load(Ordering::Acquire) >> (page as usize % WORD_PAGES) & 1
            != 0
    }

    /// Takes one page; false when it was not free. The caller serialises takers.
    pub fn take(&self, page: u32) -> bool {
        let bit = 1 << (page as usize % WORD_PAGES);
        self.words[page as usize / WORD_PAGES].fetch_and(!bit, Ordering::Acquire) & bit != 0
    }

    /// Gives back one page; false when it was free already.
    pub fn give(&self, page: u32) -> bool {
        let (w, b) = (page as usize / WORD_PAGES, page as usize % WORD_PAGES);
        self.give_word(w, 1 << b) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_re_form_whatever_the_order_of_frees() {
        let map = FreeMap::new(64, 64 * 10);
        let a = map.take_run(512).expect("nine words are free");
        assert_eq!(a, 64);
        assert_eq!(map.take_run(512), None);
        for page in (0..512).map(|i| a + (i * 293) % 512) {
            assert!(map.give(page), "293 is odd, so each page comes once");
        }
        assert_eq!(map.take_run(512), Some(64));
    }

    #[test]
    fn a_double_free_is_seen() {
        let map = FreeMap::new(0, 128);
        let p = map.take_run(64).expect("free");
        assert!(map.give(p));
        assert!(!map.give(p));
    }

    #[test]
    fn unasked_pages_of_a_run_stay_free() {
        let map = FreeMap::new(0, 256);
        let before = map.count();
        map.take_run(100).expect("free");
        assert_eq!(map.count(), before - 100);
    }

    #[test]
    fn short_runs_are_found_between_taken_pages() {
        let map = FreeMap::new(0, 128);
        let mut all = Vec::new();
        assert_eq!(map.take_some(&mut all, 128), 128);
        for page in [3, 4, 5, 70, 126, 127] {
            assert!(map.give(page));
        }
        assert_eq!(map.take_run(4), None);
        assert_eq!(map.take_run(3), Some(3));
        assert_eq!(map.take_run(2), Some(126));
        assert_eq!(map.take_run(1), Some(70));
        assert_eq!(map.take_run(1), None);
        assert_eq!(map.count(), 0);
    }

    #[test]
    fn single_pages_come_out_once_each() {
        let map = FreeMap::new(1, 200);
        let mut out = Vec::new();
        while map.take_some(&mut out, 7) > 0 {}
        out.sort_unstable();
        assert_eq!(out, (1..200).collect::<Vec<u32>>());
    }
}
