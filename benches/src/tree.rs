//! Our rows for the page-table works: the TDP MMU's tree, over the same pages and in the same order as the crates.
//!
//! What the crates do with plain stores through `&mut` our tree does beside others: the fault path installs by
//! compare-exchange under the shared lock, look-ups hold no lock, dead tables wait for a grace period. Hence several
//! rows a work: each way that the engine has of doing it. No dirty state is written back (the crates have none), no
//! guest runs and no observer listens. A teardown is timed until the last table is back in the pool.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tdpmmu_mmu::{BulkMap, FlushDebt, MapFault, MapOutcome, MmuConfig, NoHost, TdpMmu, Yield, design};
use tdpmmu_platform::{RcuConfig, RcuDomain, Real, Role, Task, TaskConfig};
use tdpmmu_spte::{Access, AdMode, FormatKind, KernelProfile, MakeLeaf, Passes, Spte};
use tdpmmu_table::TableCache;

use crate::harness::{BenchError, Sample, Work};
use crate::paging::STRIDE;

/// Frame of gfn 0; far above any table index, so that a mix-up shows.
const PFN_BASE: u64 = 1 << 34;
/// Pages of one GiB, the most that one bulk call takes.
const GIB: u64 = 1 << 18;
/// Pages of one leaf table: as many faults are taken under one hold of the lock.
const TABLE: u64 = 512;

/// How a tree is filled.
#[derive(Clone, Copy, PartialEq)]
enum By {
    /// The map step of one fault a page.
    Faults,
    /// The map step for a run of faults: a call a leaf table.
    Runs,
    /// Tables filled whole.
    Bulk,
}

/// A life of a tree: how it is filled, and how it ends.
struct Life {
    map: &'static str,
    by: By,
    /// The row of the teardown, or of the range zap that precedes it.
    end: &'static str,
    passes: &'static str,
    exclusive: bool,
    /// Also measure the range zap and the look-ups.
    full: bool,
}

const LIVES: [Life; 5] = [
    Life {
        map: "tdpmmu (fault path, shared)",
        by: By::Faults,
        end: "tdpmmu (range zap, exclusive)",
        passes: "1G,root",
        exclusive: false,
        full: true,
    },
    Life {
        map: "tdpmmu (runs of faults, shared)",
        by: By::Runs,
        end: "tdpmmu (shared, 1G,root)",
        passes: "1G,root",
        exclusive: false,
        full: false,
    },
    Life {
        map: "tdpmmu (bulk)",
        by: By::Bulk,
        end: "tdpmmu (shared, 1G,root)",
        passes: "1G,root",
        exclusive: false,
        full: false,
    },
    Life {
        map: "tdpmmu (bulk)",
        by: By::Bulk,
        end: "tdpmmu (shared, 4K,2M,1G,root)",
        passes: "4K,2M,1G,root",
        exclusive: false,
        full: false,
    },
    Life {
        map: "tdpmmu (bulk)",
        by: By::Bulk,
        end: "tdpmmu (exclusive, 1G,root)",
        passes: "1G,root",
        exclusive: true,
        full: false,
    },
];

/// The rows of the tree over `pages` pages.
///
/// # Errors
/// [`BenchError::WorkNotDone`], [`BenchError::Engine`].
pub fn samples(pages: u64, reps: u32) -> Result<Vec<Sample>, BenchError> {
    let mut out: Vec<Sample> = Vec::new();
    for life in &LIVES {
        sample(life, pages, reps, &mut out)?;
    }
    Ok(out)
}

/// The rows of mapping alone: one fault a page, runs of faults, in bulk.
///
/// # Errors
/// As [`samples`].
pub fn map_samples(pages: u64, reps: u32) -> Result<Vec<Sample>, BenchError> {
    let mut out = Vec::new();
    for life in LIVES.iter().take(3) {
        sample(&Life { full: false, ..*life }, pages, reps, &mut out)?;
    }
    out.retain(|sample| sample.work == Work::Map);
    Ok(out)
}

fn sample(life: &Life, pages: u64, reps: u32, out: &mut Vec<Sample>) -> Result<(), BenchError> {
    let mmu = engine(life.passes, pages, true)?;
    for _ in 0..reps {
        for (work, name, time) in live(life, &mmu, pages)? {
            let ns = time.as_nanos() as f64 / pages as f64;
            match out.iter_mut().find(|sample| sample.work == work && sample.name == name) {
                Some(sample) => sample.ns = sample.ns.min(ns),
                None => out.push(Sample { work, name, ns, count: pages }),
            }
        }
    }
    Ok(())
}

/// An engine after Linux 6.12 on NPT, with room for `pages` pages and its pool touched.
pub(crate) fn engine(passes: &str, pages: u64, hugepages: bool) -> Result<Arc<TdpMmu<Real>>, BenchError> {
    let profile = KernelProfile::named("6.12").map_err(BenchError::engine)?;
    let leaf_tables = pages.div_ceil(TABLE);
    let max_tables =
        u32::try_from(leaf_tables + leaf_tables.div_ceil(TABLE) + 1024).map_err(BenchError::engine)?;
    let config = MmuConfig {
        format: profile.format(FormatKind::Npt),
        profile,
        root_level: 4,
        maxphyaddr: 52,
        passes: Passes::parse(passes).map_err(BenchError::engine)?,
        ownership: design::info("sync").ok_or_else(|| BenchError::engine("no design called sync"))?.ownership,
        design: design::build("sync", &design::DesignOptions::default()).map_err(BenchError::engine)?,
        max_tables,
        hugepages,
        quarantine: false,
        batch: TABLE as u16,
        write_back: false,
        observer: None,
        rcu: RcuConfig::default(),
        task: TaskConfig::default(),
    };
    let mmu = TdpMmu::new(config, Arc::new(NoHost)).map_err(BenchError::engine)?;
    mmu.pool().prefault(u64::from(max_tables)).map_err(BenchError::engine)?;
    Ok(mmu)
}

type Timed = (Work, &'static str, Duration);

fn live(life: &Life, mmu: &TdpMmu<Real>, pages: u64) -> Result<Vec<Timed>, BenchError> {
    let check = |work, name, what, got: u64, expected: u64| {
        if got == expected {
            return Ok(());
        }
        Err(BenchError::WorkNotDone { work, name, what, got, expected })
    };
    let task = &mmu.task("bench", Role::Caller);
    let cache = &mut TableCache::default();
    let mut out = Vec::new();
    let root = mmu.load_root(task, cache, mmu.root_role(false)).map_err(BenchError::engine)?;

    let start = Instant::now();
    let mapped = match life.by {
        By::Bulk => map_in_bulk(mmu, task, cache, root, pages)?,
        by => map_by_faults(mmu, task, cache, root, pages, by)?,
    };
    out.push((Work::Map, life.map, start.elapsed()));
    check(Work::Map, life.map, "pages mapped", mapped, pages)?;
    check(Work::Map, life.map, "leaves counted", mmu.count(task, root).sptes(), pages)?;

    if life.full {
        let name = "tdpmmu (lockless)";
        let expected = (0..pages).fold(0u64, |sum, gfn| sum.wrapping_add(PFN_BASE + gfn));
        let look = |gfn| mmu.lookup(task, root, gfn).map_or(0, |(spte, _)| spte.pfn());

        let start = Instant::now();
        let sum = (0..pages).fold(0u64, |sum, gfn| sum.wrapping_add(look(gfn)));
        out.push((Work::Translate, name, start.elapsed()));
        check(Work::Translate, name, "sum of frames", sum, expected)?;

        let start = Instant::now();
        let scattered = (0..pages).map(|i| i.wrapping_mul(STRIDE) & (pages - 1));
        let sum = scattered.fold(0u64, |sum, gfn| sum.wrapping_add(look(gfn)));
        out.push((Work::TranslateRandom, name, start.elapsed()));
        check(Work::TranslateRandom, name, "sum of frames", sum, expected)?;

        let start = Instant::now();
        let mut guard = mmu.lock.write(task);
        let mut debt = mmu.zap_leafs(&mut guard, root, 0..pages, Yield::Allowed, FlushDebt::none());
        mmu.pay(task, &mut debt);
        drop(guard);
        out.push((Work::Unmap, life.end, start.elapsed()));
        check(Work::Unmap, life.end, "pages left", mmu.count(task, root).sptes(), 0)?;
    }

    let start = Instant::now();
    let mut guard = mmu.lock.write(task);
    if life.exclusive {
        mmu.zap_all(&mut guard);
    }
    mmu.fast_zap_invalidate(&mut guard);
    mmu.fast_zap_in_lock(&mut guard);
    drop(guard);
    mmu.fast_zap_finish(task);
    mmu.put_roots(task, &[root]);
    mmu.rcu().barrier();
    let teardown = start.elapsed();
    if !life.full {
        out.push((Work::Teardown, life.end, teardown));
    }
    cache.drain(mmu.pool());
    check(Work::Teardown, life.end, "tables left", mmu.pool().stats().taken, 0)?;
    let leaves: i64 = mmu.leaf_pages().iter().sum();
    check(Work::Teardown, life.end, "leaves left", leaves.unsigned_abs(), 0)?;
    match mmu.violations().first() {
        Some(violation) => Err(BenchError::engine(violation)),
        None => Ok(out),
    }
}

/// The map step of faults, one or a run a call; the cache is topped up and the lock taken once per leaf table.
fn map_by_faults(
    mmu: &TdpMmu<Real>,
    task: &Task<Real>,
    cache: &mut TableCache,
    root: u32,
    pages: u64,
    by: By,
) -> Result<u64, BenchError> {
    let fault = |gfn| MapFault::page(gfn, PFN_BASE + gfn, 1);
    let mut mapped = 0;
    for first in (0..pages).step_by(TABLE as usize) {
        mmu.top_up(task, cache).map_err(BenchError::engine)?;
        let mut guard = mmu.lock.read(task);
        let last = pages.min(first + TABLE);
        if by == By::Runs {
            let run = mmu.map_range(&mut guard, cache, root, &fault(first), last - first);
            mapped += run.map_err(|outcome| BenchError::engine(format!("gfn {first:#x}: {outcome:?}")))?;
            continue;
        }
        for gfn in first..last {
            let outcome = mmu.map(&mut guard, cache, root, &fault(gfn));
            mapped += u64::from(matches!(outcome, MapOutcome::Fixed { level: 1, .. }));
        }
    }
    Ok(mapped)
}

pub(crate) fn map_in_bulk(
    mmu: &TdpMmu<Real>,
    task: &Task<Real>,
    cache: &mut TableCache,
    root: u32,
    pages: u64,
) -> Result<u64, BenchError> {
    let made = mmu.format().make_leaf(&MakeLeaf {
        pfn: 0,
        level: 1,
        access: Access::ALL,
        prefetch: false,
        host_writable: true,
        write_protected: false,
        old: Spte(0),
        dirty_tracked: false,
        ad_mode: AdMode::Enabled,
        nx_mitigation: false,
        remake: mmu.profile().remake_dirty,
    });
    let mut mapped = 0;
    for first in (0..pages).step_by(GIB as usize) {
        let gfns = first..pages.min(first + GIB);
        let map = BulkMap { gfns, first_pfn: PFN_BASE + first, level: 1, template: made.spte };
        let mut guard = mmu.lock.read(task);
        mapped += mmu.populate_bulk(&mut guard, cache, root, &map).map_err(BenchError::engine)?;
    }
    Ok(mapped)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_does_every_work() {
        let rows = samples(1 << 12, 2).unwrap();
        let works: std::collections::BTreeSet<Work> = rows.iter().map(|row| row.work).collect();
        assert_eq!(works.len(), 5);
        // Three ways to map, two look-ups, one unmap, three teardowns.
        assert_eq!(rows.len(), 9);
        assert!(rows.iter().all(|row| row.ns > 0.0 && row.name.starts_with("tdpmmu")));
    }
}
