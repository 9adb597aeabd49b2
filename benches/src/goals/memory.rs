//! Memory: what stands beside the tables, and what a zap allocates.
//!
//! Bytes beside the tables are resident anonymous memory, as the host counts it, of an engine whose guest is mapped completely:
//! less the tables, over the tables. On pages of 4 KiB, because the last huge page of each area, half empty, would be
//! counted as if it grew with the guest. Allocations are those of the whole process during a zap, counted by an allocator
//! that a program has to install ([`Counting`]); in a program that has not, there is no such figure.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use tdpmmu_platform::{RcuDomain, Role};
use tdpmmu_table::{TABLE_BYTES, TableCache, TablePool};
use tdpmmu_vm::AdMix;

use super::zap::{close, idle_guest, populate, zap};
use super::{Figure, Goal};
use crate::harness::BenchError;
use crate::tree::{engine, map_in_bulk};

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// The system's allocator, counted.
#[derive(Debug)]
pub struct Counting;

// SAFETY: every call goes to `System` with the arguments it came with; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises about `layout` are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from `System` with this layout, because all of ours do.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Bytes beside each table of a guest of `pages` pages. To be taken before the process has freed much memory.
pub(super) fn beside_tables(pages: u64) -> Result<Vec<Figure>, BenchError> {
    let before = resident()?;
    let mmu = engine("1G,root", pages, false)?;
    let task = mmu.task("memory", Role::Caller);
    let mut cache = TableCache::default();
    let root = mmu.load_root(&task, &mut cache, mmu.root_role(false)).map_err(BenchError::engine)?;
    map_in_bulk(&mmu, &task, &mut cache, root, pages)?;
    // All of the pool was touched, used or not.
    let (used, touched) = (mmu.pool().stats().taken, mmu.pool().cap());
    let after = resident()?;
    let beside = after.saturating_sub(before) as f64 - (touched * TABLE_BYTES as u64) as f64;
    mmu.put_roots(&task, &[root]);
    cache.drain(mmu.pool());
    mmu.rcu().barrier();
    let name = "memory beside a table, resident";
    let resident = Figure::ns(name, beside / used as f64, used).unit("bytes").goal(Goal::AtMost(64.0));
    let book = TablePool::overhead_bytes_per_table();
    let book = Figure::ns("memory beside a table, by layout", book, 1).unit("bytes").goal(Goal::AtMost(64.0));
    Ok(vec![resident, book])
}

fn resident() -> Result<u64, BenchError> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").map_err(BenchError::engine)?;
    let line = text.lines().find_map(|line| line.strip_prefix("Anonymous:"));
    let number = line.and_then(|rest| rest.trim().trim_end_matches(" kB").trim().parse::<u64>().ok());
    number
        .map(|kib| kib << 10)
        .ok_or_else(|| BenchError::engine("/proc/self/smaps_rollup has no line Anonymous"))
}

/// Allocations of a zap, of a small guest and of one that is 64 times as large; none without [`Counting`].
pub(super) fn allocations() -> Result<Vec<Figure>, BenchError> {
    let count = || ALLOCATIONS.load(Ordering::Relaxed);
    let at = count();
    drop(std::hint::black_box(Box::new(at)));
    if count() == at {
        return Ok(Vec::new());
    }
    let mut seen = Vec::new();
    for memory_bytes in [64 << 20, 4u64 << 30] {
        let vm = idle_guest(memory_bytes, "4K,2M,1G,root", true)?;
        for _ in 0..3 {
            populate(&vm, memory_bytes >> 12, AdMix::Dirty)?;
            let at = count();
            zap(&vm, false)?;
            seen.push((memory_bytes, count() - at));
        }
        close(&vm)?;
    }
    let least = |bytes| seen.iter().filter(|(of, _)| *of == bytes).map(|(_, n)| *n).min().unwrap_or(0);
    let (small, large) = (least(64 << 20), least(4 << 30));
    let name = "allocations of a fast zap, 64 MiB guest";
    let mut out = vec![Figure::ns(name, small as f64, 3).unit("")];
    let growth = large.saturating_sub(small) as f64;
    let name = "allocations more in a 4 GiB guest";
    out.push(Figure::ns(name, growth, 3).unit("").goal(Goal::AtMost(0.0)));
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_costs_more_than_its_entries() {
        let resident = resident().unwrap();
        assert!(resident > 1 << 20, "{resident}");
        let figures = beside_tables(1 << 18).unwrap();
        assert!(figures[1].value >= 32.0, "{figures:?}");
    }

    #[test]
    fn without_the_counting_allocator_there_is_no_figure() {
        assert!(allocations().unwrap().is_empty());
    }
}
