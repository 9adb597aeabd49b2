//! Lists of page table entries: one word that is nothing, an entry, or the way to chunks of entries. Reverse maps and parent lists both use them.
//!
//! **Guarantee.** A list holds each entry once. A list of one costs its word only, and so does an empty one. There is always room: a list in chunks has two entries or more and all its chunks but
//! the first are full, so that chunks are at most half as many as entries, and that many are reserved. Nothing is allocated where it could fail.
//!
//! **Mechanism.** As in KVM (pte_list_desc): a direct mapping gives every gfn and every table one entry, which stands in the head itself; chunks of fourteen serve what is shared.
//! An entry is added to the first chunk, and one removed is replaced by the last of the first chunk, so only the first chunk is ever part empty. Unlike KVM a list that shrinks to one entry gives its chunk back.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tdpmmu_table::Lazy;

/// Words of a chunk: its header, how many entries lie behind it, and the entries.
const CHUNK: usize = 16;
/// Entries of a chunk.
pub(crate) const PER_CHUNK: usize = CHUNK - 2;
/// Marks a head that leads to chunks.
const MANY: u64 = 1;

/// An entry of a table, by place. Table 0 does not exist, so no place is the word 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place(u64);

impl Place {
    #[inline(always)]
    pub(crate) const fn new(table: u32, index: u16) -> Self {
        Self((table as u64) << 10 | (index as u64) << 1)
    }

    #[inline(always)]
    pub(crate) const fn table(self) -> u32 {
        (self.0 >> 10) as u32
    }

    #[inline(always)]
    pub(crate) const fn index(self) -> u16 {
        (self.0 >> 1 & 511) as u16
    }

    /// The head of the list that holds this alone.
    #[inline(always)]
    pub(crate) const fn word(self) -> u64 {
        self.0
    }
}

/// The chunks of all lists of one MMU. Changed under mmu_lock exclusive only.
pub(crate) struct PteLists {
    words: Lazy<AtomicU64>,
    /// Chunks ever taken: the next fresh one. Chunk 0 is none.
    fresh: AtomicU64,
    /// First of the chunks given back, linked by their headers.
    free: AtomicU64,
    used: AtomicU64,
}

impl PteLists {
    /// Room for the lists of `entries` entries.
    ///
    /// # Errors
    /// What the host says when it refuses the address space.
    pub(crate) fn new(entries: usize) -> io::Result<Self> {
        let words = Lazy::new((entries / 2 + 2) * CHUNK)?;
        Ok(Self { words, fresh: AtomicU64::new(1), free: AtomicU64::new(0), used: AtomicU64::new(0) })
    }

    /// Chunks in use.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// Bytes of chunks ever in use.
    pub(crate) fn bytes(&self) -> u64 {
        (self.fresh.load(Relaxed) - 1) * (CHUNK * size_of::<u64>()) as u64
    }

    #[inline]
    fn chunk(&self, chunk: u64) -> &[AtomicU64; CHUNK] {
        let first = chunk as usize * CHUNK;
        match self.words.slice(first, first + CHUNK).first_chunk() {
            Some(words) => words,
            None => unreachable!("more chunks than half of the entries"),
        }
    }

    /// (the chunk behind, entries in this one)
    #[inline]
    fn header(&self, chunk: u64) -> (u64, usize) {
        let word = self.chunk(chunk)[0].load(Relaxed);
        (word >> 8, (word & 0xff) as usize)
    }

    fn set_header(&self, chunk: u64, behind: u64, len: usize) {
        self.chunk(chunk)[0].store(behind << 8 | len as u64, Relaxed);
    }

    fn behind(&self, chunk: u64) -> u64 {
        self.chunk(chunk)[1].load(Relaxed)
    }

    fn take(&self, behind: u64, entries_behind: u64) -> u64 {
        let chunk = match self.free.load(Relaxed) {
            0 => {
                let fresh = self.fresh.load(Relaxed);
                self.fresh.store(fresh + 1, Relaxed);
                fresh
            }
            free => {
                self.free.store(self.header(free).0, Relaxed);
                free
            }
        };
        self.used.store(self.used.load(Relaxed) + 1, Relaxed);
        self.set_header(chunk, behind, 0);
        self.chunk(chunk)[1].store(entries_behind, Relaxed);
        chunk
    }

    fn give(&self, chunk: u64) {
        self.set_header(chunk, self.free.load(Relaxed), 0);
        self.free.store(chunk, Relaxed);
        self.used.store(self.used.load(Relaxed) - 1, Relaxed);
    }

    fn push(&self, chunk: u64, place: Place) {
        let (behind, len) = self.header(chunk);
        self.chunk(chunk)[2 + len].store(place.0, Relaxed);
        self.set_header(chunk, behind, len + 1);
    }

    /// Adds `place` to the list of `head`; returns how many it holds now.
    #[inline]
    pub(crate) fn add(&self, head: &AtomicU64, place: Place) -> u64 {
        let word = head.load(Relaxed);
        if word == 0 {
            head.store(place.0, Relaxed);
            return 1;
        }
        self.add_to_many(head, word, place)
    }

    fn add_to_many(&self, head: &AtomicU64, word: u64, place: Place) -> u64 {
        let mut chunk = word >> 1;
        if word & MANY == 0 {
            chunk = self.take(0, 0);
            self.push(chunk, Place(word));
            head.store(chunk << 1 | MANY, Relaxed);
        } else if self.header(chunk).1 == PER_CHUNK {
            chunk = self.take(chunk, self.behind(chunk) + PER_CHUNK as u64);
            head.store(chunk << 1 | MANY, Relaxed);
        }
        self.push(chunk, place);
        self.behind(chunk) + self.header(chunk).1 as u64
    }

    /// Removes `place` from the list of `head`; false if it is not on it.
    #[inline]
    pub(crate) fn remove(&self, head: &AtomicU64, place: Place) -> bool {
        let word = head.load(Relaxed);
        if word == place.0 {
            head.store(0, Relaxed);
            return true;
        }
        word & MANY != 0 && self.remove_from_many(head, word >> 1, place)
    }

    fn remove_from_many(&self, head: &AtomicU64, first: u64, place: Place) -> bool {
        let mut at = first;
        while at != 0 {
            let (behind, len) = self.header(at);
            let entries = &self.chunk(at)[2..2 + len];
            if let Some(found) = entries.iter().position(|entry| entry.load(Relaxed) == place.0) {
                let last = self.pop_from(head, first);
                // What was last in the first chunk takes the place, unless it was itself the one.
                if last != place {
                    self.chunk(at)[2 + found].store(last.0, Relaxed);
                }
                self.fold(head);
                return true;
            }
            at = behind;
        }
        false
    }

    /// Takes the last entry out of the first chunk; the chunk goes when it is empty.
    fn pop_from(&self, head: &AtomicU64, first: u64) -> Place {
        let (behind, len) = self.header(first);
        let last = Place(self.chunk(first)[1 + len].load(Relaxed));
        if len == 1 {
            head.store(if behind == 0 { 0 } else { behind << 1 | MANY }, Relaxed);
            self.give(first);
        } else {
            self.set_header(first, behind, len - 1);
        }
        last
    }

    /// A list of one is its head alone.
    fn fold(&self, head: &AtomicU64) {
        let word = head.load(Relaxed);
        if word & MANY != 0 && self.header(word >> 1) == (0, 1) {
            head.store(self.chunk(word >> 1)[2].load(Relaxed), Relaxed);
            self.give(word >> 1);
        }
    }

    /// Takes some entry out of the list.
    pub(crate) fn pop(&self, head: &AtomicU64) -> Option<Place> {
        let word = head.load(Relaxed);
        if word == 0 {
            return None;
        }
        if word & MANY == 0 {
            head.store(0, Relaxed);
            return Some(Place(word));
        }
        let last = self.pop_from(head, word >> 1);
        self.fold(head);
        Some(last)
    }

    /// Some entry of the list.
    pub(crate) fn first(&self, head: &AtomicU64) -> Option<Place> {
        self.iter(head).next()
    }

    /// The entries of the list, which must not change meanwhile.
    #[inline]
    pub(crate) fn iter(&self, head: &AtomicU64) -> Iter<'_> {
        let word = head.load(Relaxed);
        if word & MANY == 0 {
            Iter { lists: self, alone: word, chunk: 0, at: 0 }
        } else {
            Iter { lists: self, alone: 0, chunk: word >> 1, at: 0 }
        }
    }
}

/// See [`PteLists::iter`].
pub(crate) struct Iter<'a> {
    lists: &'a PteLists,
    alone: u64,
    chunk: u64,
    at: usize,
}

impl Iterator for Iter<'_> {
    type Item = Place;

    #[inline]
    fn next(&mut self) -> Option<Place> {
        if self.alone != 0 {
            return Some(Place(std::mem::take(&mut self.alone)));
        }
        while self.chunk != 0 {
            let (behind, len) = self.lists.header(self.chunk);
            if self.at < len {
                self.at += 1;
                return Some(Place(self.lists.chunk(self.chunk)[1 + self.at].load(Relaxed)));
            }
            (self.chunk, self.at) = (behind, 0);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_list_of_one_costs_no_chunk() {
        let (lists, head) = (PteLists::new(64).expect("small"), AtomicU64::new(0));
        let (a, b) = (Place::new(64, 0), Place::new(64, 511));
        assert_eq!((lists.add(&head, a), lists.used()), (1, 0));
        assert_eq!((lists.add(&head, b), lists.used()), (2, 1));
        assert!(lists.remove(&head, a) && !lists.remove(&head, a));
        assert_eq!((head.load(Relaxed), lists.used()), (b.word(), 0));
        assert_eq!((b.table(), b.index()), (64, 511));
    }

    proptest! {
        #[test]
        fn two_lists_hold_what_two_sets_hold_and_chunks_never_exceed_half(
            ops in prop::collection::vec((0usize..2, 0u16..40, prop::bool::weighted(0.6), prop::bool::weighted(0.05)), 1..400)
        ) {
            let lists = PteLists::new(80).expect("small");
            let heads = [AtomicU64::new(0), AtomicU64::new(0)];
            let mut sets = [std::collections::BTreeSet::new(), std::collections::BTreeSet::new()];
            for (list, index, add, pop) in ops {
                let place = Place::new(64 + list as u32, index);
                if pop {
                    let popped = lists.pop(&heads[list]);
                    prop_assert_eq!(popped.is_some(), !sets[list].is_empty());
                    if let Some(popped) = popped {
                        prop_assert!(sets[list].remove(&popped));
                    }
                } else if add {
                    if sets[list].insert(place) {
                        prop_assert_eq!(lists.add(&heads[list], place), sets[list].len() as u64);
                    }
                } else {
                    prop_assert_eq!(lists.remove(&heads[list], place), sets[list].remove(&place));
                }
                let mut held: Vec<_> = lists.iter(&heads[list]).collect();
                held.sort_unstable();
                prop_assert_eq!(held, sets[list].iter().copied().collect::<Vec<_>>());
                prop_assert!(lists.used() * 2 <= (sets[0].len() + sets[1].len()) as u64);
            }
        }
    }
}
