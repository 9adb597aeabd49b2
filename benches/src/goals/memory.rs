//! Memory: what stands beside the tables, and what a zap allocates.
//!
//! Bytes beside the tables are resident anonymous memory, as the host counts it, of engines whose guests are mapped
//! completely, less the tables: what a guest of twice the size has more, over the tables that it has more. On pages of 4 KiB,
//! because the last huge page of each area would be counted whole. Allocations are those of the whole process during a zap, counted by an allocator
//! that a program has to install ([`Counting`]); in a program that has not, there is no such figure.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tdpmmu_mmu::TdpMmu;
use tdpmmu_platform::{Real, Role};
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

/// Bytes beside each table: the growth from a guest of half of `pages` pages to one of all of them. To be taken before the
/// process has freed much memory.
pub(super) fn beside_tables(pages: u64) -> Result<Vec<Figure>, BenchError> {
    // Both stay until the end, so that the second cannot live on what the first has freed.
    let (_half, few, beside_few) = mapped(pages / 2)?;
    let (_whole, many, beside_many) = mapped(pages)?;
    let goal = Goal::AtMost(64.0);
    let grown = (beside_many - beside_few) / many.saturating_sub(few).max(1) as f64;
    let resident = Figure::ns("memory beside a table, resident", grown, many - few).unit("bytes");
    let layout = TablePool::overhead_bytes_per_table();
    let layout = Figure::ns("memory beside a table, by layout", layout, 1).unit("bytes");
    Ok(vec![resident.goal(goal), layout.goal(goal)])
}

/// An engine with `pages` pages mapped, its tables in use, and the bytes that came with it beside them.
fn mapped(pages: u64) -> Result<(Arc<TdpMmu<Real>>, u64, f64), BenchError> {
    let before = resident()?;
    let mmu = engine("1G,root", pages, false)?;
    let task = mmu.task("memory", Role::Caller);
    let mut cache = TableCache::default();
    let root = mmu.load_root(&task, &mut cache, mmu.root_role(false)).map_err(BenchError::engine)?;
    map_in_bulk(&mmu, &task, &mut cache, root, pages)?;
    // All of the pool was touched, used or not.
    let (used, touched) = (mmu.pool().stats().taken, mmu.pool().cap());
    let beside = resident()?.saturating_sub(before) as f64 - (touched * TABLE_BYTES as u64) as f64;
    mmu.put_roots(&task, &[root]);
    cache.drain(mmu.pool());
    drop(task);
    Ok((mmu, used, beside))
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
    fn resident_memory_is_what_was_touched() {
        let touched = vec![1u8; 64 << 20];
        let resident = resident().unwrap();
        assert!(resident >= 64 << 20 && touched[resident as usize % 64] == 1, "{resident}");
    }

    #[test]
    fn a_table_costs_more_than_its_entries() {
        let figures = beside_tables(1 << 18).unwrap();
        assert!(figures[1].value >= 32.0, "{figures:?}");
    }

    #[test]
    fn without_the_counting_allocator_there_is_no_figure() {
        assert!(allocations().unwrap().is_empty());
    }
}
