//! Filling tables that nobody can see yet, around the caches.
//!
//! A bulk population writes each table once and does not read it again soon. Stores that bypass the caches spare the host
//! the read of every line before it is overwritten: a third of the time of plain stores (`write_nt_ns` beside `write_ns` in the
//! limits of each result).

use tdpmmu_platform::{Platform, Site};

use crate::{Entries, TablePool};

impl TablePool {
    /// Writes entry i of table `index` as `first + i * step`, for all 512.
    ///
    /// # Safety
    /// The table is not published: no other thread reads or writes its entries until [`TablePool::fill_done`] was called
    /// and the table was linked.
    pub unsafe fn fill_unpublished<P: Platform>(&self, index: u32, first: u64, step: u64) {
        if P::BULK {
            // SAFETY: the caller's promise.
            unsafe { stream(self.entries(index), first, step) }
        } else {
            for (i, entry) in self.entries(index).iter().enumerate() {
                P::store(entry, first.wrapping_add(step.wrapping_mul(i as u64)), Site::SpteInstall);
            }
        }
    }

    /// Orders every [`TablePool::fill_unpublished`] of this thread before whatever it stores next: before the tables are linked.
    pub fn fill_done(&self) {
        // SAFETY: SSE is part of x86-64; a fence touches no memory.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            core::arch::x86_64::_mm_sfence();
        }
    }
}

#[cfg(target_arch = "x86_64")]
unsafe fn stream(entries: &Entries, first: u64, step: u64) {
    let base = entries.as_ptr().cast_mut().cast::<i64>();
    for i in 0..entries.len() {
        let value = first.wrapping_add(step.wrapping_mul(i as u64));
        // SAFETY: `base + i` is entry i of a table in the pool's writable mapping, 8-byte aligned; nobody else accesses it (the
        // caller's promise), so the store races with nothing; SSE2 is part of x86-64.
        unsafe { core::arch::x86_64::_mm_stream_si64(base.add(i), value as i64) };
    }
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn stream(entries: &Entries, first: u64, step: u64) {
    for (i, entry) in entries.iter().enumerate() {
        entry.store(first.wrapping_add(step.wrapping_mul(i as u64)), std::sync::atomic::Ordering::Relaxed);
    }
}
