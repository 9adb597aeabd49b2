//! Memory for the peers' page tables: one pre-faulted mapping on huge pages, as the table pool of tdpmmu has it.
//!
//! Physical and virtual address of a frame are the same number, so that a peer's frame-to-pointer step costs nothing.

use std::cell::Cell;

use crate::harness::BenchError;

/// Bytes of a table.
pub const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;

/// A bump allocator of zeroed-at-first 4 KiB frames. One thread at a time.
pub struct Arena {
    raw: *mut libc::c_void,
    raw_bytes: usize,
    base: usize,
    frames: usize,
    next: Cell<usize>,
    freed: Cell<usize>,
}

impl Arena {
    /// Maps and touches room for `frames` frames.
    ///
    /// # Errors
    /// [`BenchError::NoMemory`].
    pub fn new(frames: usize) -> Result<Self, BenchError> {
        let bytes = frames.saturating_mul(PAGE).checked_next_multiple_of(HUGE);
        let raw_bytes = bytes.and_then(|bytes| bytes.checked_add(HUGE)).unwrap_or(usize::MAX);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice overlaps nothing.
        let raw = unsafe { libc::mmap(std::ptr::null_mut(), raw_bytes, protection, flags, -1, 0) };
        if raw == libc::MAP_FAILED {
            let source = std::io::Error::last_os_error();
            return Err(BenchError::NoMemory { bytes: raw_bytes, source });
        }
        let arena = Self {
            raw,
            raw_bytes,
            base: raw.expose_provenance().next_multiple_of(HUGE),
            frames,
            next: Cell::new(0),
            freed: Cell::new(0),
        };
        // SAFETY: the range was just mapped; the advice does not change contents.
        unsafe { libc::madvise(raw, raw_bytes, libc::MADV_HUGEPAGE) };
        for frame in 0..frames {
            let word = std::ptr::with_exposed_provenance_mut::<u64>(arena.base + frame * PAGE);
            // SAFETY: `frames` frames from the aligned base lie in the mapping, and nothing else refers to it yet.
            unsafe { word.write_volatile(0) };
        }
        Ok(arena)
    }

    /// The address of a frame nobody has, or None when all are out.
    pub fn alloc(&self) -> Option<usize> {
        let index = self.next.get();
        (index < self.frames).then(|| {
            self.next.set(index + 1);
            self.base + index * PAGE
        })
    }

    /// Counts a frame as returned. It is handed out again only after [`Arena::reset`].
    pub fn free(&self, _address: usize) {
        self.freed.set(self.freed.get() + 1);
    }

    /// Frames handed out since the last reset.
    pub fn allocated(&self) -> u64 {
        self.next.get() as u64
    }

    /// Frames returned since the last reset.
    pub fn freed(&self) -> u64 {
        self.freed.get() as u64
    }

    /// Takes every frame back. The caller has dropped all tables.
    pub fn reset(&self) {
        self.next.set(0);
        self.freed.set(0);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size; whoever used frames borrowed or shared the arena.
        unsafe { libc::munmap(self.raw, self.raw_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_distinct_aligned_and_bounded() {
        let arena = Arena::new(3).unwrap();
        let frames: Vec<usize> = std::iter::from_fn(|| arena.alloc()).collect();
        assert_eq!(frames.len(), 3);
        assert!(frames.windows(2).all(|pair| pair[1] == pair[0] + PAGE));
        assert_eq!(frames[0] % HUGE, 0);
        arena.free(frames[0]);
        assert_eq!((arena.allocated(), arena.freed()), (3, 1));
        arena.reset();
        assert_eq!(arena.alloc(), Some(frames[0]));
    }

    #[test]
    fn an_impossible_arena_is_an_error() {
        assert!(matches!(Arena::new(usize::MAX / PAGE), Err(BenchError::NoMemory { .. })));
    }
}
