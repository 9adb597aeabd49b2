//! Our rows for the page-table works: the TDP MMU's tree, over the same pages and in the same order as the crates.
//!
//! What the crates do with plain stores through `&mut` our tree does beside others: the fault path installs by
//! compare-exchange under the shared lock, look-ups hold no lock, dead tables wait for a grace period. Hence several
//! rows a work: each way that the engine has of doing it. No dirty state is written back (the crates have none), no
//! guest runs and no observer listens. A teardown is timed until the last table is back in the pool.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tdpmmu_mmu::{BulkMap, FlushDebt, Frame, MapFault, MapOutcome, MmuConfig, NoHost, TdpMmu, Yield, design};
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

/// A life of a tree: how it is filled, and how it ends.
struct Life {
    map: &'static str,
    faults: bool,
    /// The row of the teardown, or of the range zap that precedes it.
    end: &'static str,
    passes: &'static str,
    exclusive: bool,
    /// Also measure the range zap and the look-ups.
    full: bool,
}

const LIVES: [Life; 4] = [
    Life {
        map: "tdpmmu (fault path, shared)",
        faults: true,
        end: "tdpmmu (range zap, exclusive)",
        passes: "1G,root",
        exclusive: false,
        full: true,
    },
    Life {
        map: "tdpmmu (bulk)",
        faults: false,
        end: "tdpmmu (shared, 1G,root)",
        passes: "1G,root",
        exclusive: false,
        full: false,
    },
    Life {
        map: "tdpmmu (bulk)",
        faults: false,
        end: "tdpmmu (shared, 4K,2M,1G,root)",
        passes: "4K,2M,1G,root",
        exclusive: false,
        full: false,
    },
    Life {
        map: "tdpmmu (bulk)",
        faults: false,
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
        let mmu = engine(life.passes, pages)?;
        for _ in 0..reps {
            for (work, name, time) in live(life, &mmu, pages)? {
                let ns = time.as_nanos() as f64 / pages as f64;
                match out.iter_mut().find(|sample| sample.work == work && sample.name == name) {
                    Some(sample) => sample.ns = sample.ns.min(ns),
                    None => out.push(Sample { work, name, ns, count: pages }),
                }
            }
        }
    }
    Ok(out)
}

fn failed(what: impl std::fmt::Display) -> BenchError {
    BenchError::Engine { what: what.to_string() }
}

/// An engine after Linux 6.12 on NPT, with its pool touched.
fn engine(passes: &str, pages: u64) -> Result<Arc<TdpMmu<Real>>, BenchError> {
    let profile = KernelProfile::named("6.12").map_err(failed)?;
    let leaf_tables = pages.div_ceil(TABLE);
    let max_tables = u32::try_from(leaf_tables + leaf_tables.div_ceil(TABLE) + 1024).map_err(failed)?;
    let config = MmuConfig {
        format: profile.format(FormatKind::Npt),
        profile,
        root_level: 4,
        maxphyaddr: 52,
        passes: Passes::parse(passes).map_err(failed)?,
        ownership: design::info("sync").ok_or_else(|| failed("no design called sync"))?.ownership,
        design: design::build("sync", 1).map_err(failed)?,
        max_tables,
        hugepages: true,
        batch: TABLE as u16,
        write_back: false,
        observer: None,
        rcu: RcuConfig::default(),
        task: TaskConfig::default(),
    };
    let mmu = TdpMmu::new(config, Arc::new(NoHost)).map_err(failed)?;
    mmu.pool().prefault(u64::from(max_tables)).map_err(failed)?;
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
    let root = mmu.load_root(task, cache, mmu.root_role(false)).map_err(failed)?;

    let start = Instant::now();
    let mapped = if life.faults {
        map_by_faults(mmu, task, cache, root, pages)?
    } else {
        map_in_bulk(mmu, task, cache, root, pages)?
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
        Some(violation) => Err(failed(violation)),
        None => Ok(out),
    }
}

/// The map step of one fault per page; the cache is topped up and the lock taken once per leaf table.
fn map_by_faults(
    mmu: &TdpMmu<Real>,
    task: &Task<Real>,
    cache: &mut TableCache,
    root: u32,
    pages: u64,
) -> Result<u64, BenchError> {
    let mut mapped = 0;
    for first in (0..pages).step_by(TABLE as usize) {
        mmu.top_up(task, cache).map_err(failed)?;
        let mut guard = mmu.lock.read(task);
        for gfn in first..pages.min(first + TABLE) {
            let fault = MapFault {
                gfn,
                as_id: 0,
                frame: Frame::Page { pfn: PFN_BASE + gfn, writable: true },
                goal_level: 1,
                write: true,
                exec: false,
                prefetch: false,
                dirty_tracked: false,
            };
            let outcome = mmu.map(&mut guard, cache, root, &fault);
            mapped += u64::from(matches!(outcome, MapOutcome::Fixed { level: 1, .. }));
        }
    }
    Ok(mapped)
}

fn map_in_bulk(
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
        mapped += mmu.populate_bulk(&mut guard, cache, root, &map).map_err(failed)?;
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
        // Two ways to map, two look-ups, one unmap, three teardowns.
        assert_eq!(rows.len(), 8);
        assert!(rows.iter().all(|row| row.ns > 0.0 && row.name.starts_with("tdpmmu")));
    }
}
