//! Our own rows: one function per group of works. Names start with `tdpmmu`, so that the peers are set against them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use tdpmmu_platform::{
    MmuLock, NIL, Platform, RawRwLock, RcuConfig, RcuDomain, RcuReader, Real, Reclaim, Role, Task, TaskConfig,
};

use crate::harness::{BenchError, Sample, Work, hammer};
use crate::locks::lock_samples;
use crate::reclaim::{BATCH, CALLS, ITEMS, Items, defer_samples};
use crate::tree;

pub(crate) type Rcu = <Real as Platform>::Rcu;
type Lock = <Real as Platform>::RwLock;

/// Every row of ours. `pages` and `reps` as for the peers.
///
/// # Errors
/// As the single functions.
pub fn samples(pages: u64, reps: u32) -> Result<Vec<Sample>, BenchError> {
    let mut out = tree::samples(pages, reps)?;
    out.extend(rcu_rows(reps)?);
    out.extend(lock_rows(reps)?);
    Ok(out)
}

/// Items are freed a chain at a time: a write to each, as the peers do it, and one count for all.
impl Reclaim for Items {
    fn reclaim(&self, head: u32) -> usize {
        let (mut next, mut count) = (head, 0);
        while let Some(link) = self.links().get(next as usize) {
            next = link.load(Ordering::Relaxed);
            link.store(1, Ordering::Relaxed);
            count += 1;
        }
        self.count(count as u64);
        count
    }
}

/// RCU: the read section of a task and of a bare reader, and deferral by chain and item by item.
///
/// # Errors
/// [`BenchError::WorkNotDone`] if an item was not reclaimed.
pub fn rcu_rows(reps: u32) -> Result<Vec<Sample>, BenchError> {
    let items = Arc::new(Items::new());
    let rcu = Rcu::new(Arc::clone(&items) as Arc<dyn Reclaim>, RcuConfig::default());
    let mut out = section_rows(&rcu, reps);
    let task = task(&rcu);
    for (name, chain) in [("tdpmmu (chains)", BATCH), ("tdpmmu (one by one)", 1)] {
        out.extend(defer_samples(name, reps, &items, |items| {
            let start = Instant::now();
            for first in (0..ITEMS).step_by(BATCH) {
                let section = task.rcu_read();
                for head in (first..first + BATCH as u32).step_by(chain) {
                    defer_chain(&rcu, items.links(), head, chain as u32);
                }
                drop(section);
            }
            let put = start.elapsed();
            rcu.barrier();
            (put, start.elapsed())
        })?);
    }
    drop(task);
    rcu.stop();
    Ok(out)
}

/// Enter and leave, by a task and by a bare reader.
pub(crate) fn section_rows(rcu: &Arc<Rcu>, reps: u32) -> Vec<Sample> {
    let of_task = hammer(reps * 4, CALLS, || {
        let task = task(rcu);
        move || drop(task.rcu_read())
    });
    let of_reader = hammer(reps * 4, CALLS, || {
        let reader = rcu.register("bench");
        move || {
            reader.enter();
            reader.leave();
        }
    });
    let section = |name, ns| Sample { work: Work::ReadSection, name, ns, count: CALLS };
    vec![section("tdpmmu (task)", of_task), section("tdpmmu (reader)", of_reader)]
}

/// Links `head..head + count` and hands the chain over; linking is part of what the caller pays.
fn defer_chain(rcu: &Rcu, links: &[AtomicU32], head: u32, count: u32) {
    let Some((tail, rest)) = links.get(head as usize..(head + count) as usize).and_then(<[_]>::split_last)
    else {
        return;
    };
    for (link, next) in rest.iter().zip(head + 1..) {
        link.store(next, Ordering::Relaxed);
    }
    rcu.defer(head, tail, count);
}

/// The lock: `mmu_lock` as the MMU takes it, with its task's bookkeeping, and the bare lock under it.
///
/// # Errors
/// [`BenchError::Spawn`].
pub fn lock_rows(reps: u32) -> Result<Vec<Sample>, BenchError> {
    let rcu = Rcu::new(Arc::new(Nothing), RcuConfig::default());
    let (mmu_lock, raw) = (MmuLock::<Real>::new(), Lock::new());
    let mut out = Vec::new();
    out.extend(lock_samples(
        "tdpmmu (mmu_lock)",
        reps,
        || {
            let task = task(&rcu);
            let mmu_lock = &mmu_lock;
            move || drop(mmu_lock.read(&task))
        },
        || {
            let task = task(&rcu);
            let mmu_lock = &mmu_lock;
            move || drop(mmu_lock.write(&task))
        },
    )?);
    out.extend(lock_samples(
        "tdpmmu (bare lock)",
        reps,
        || {
            || {
                raw.lock_shared();
                raw.unlock_shared();
            }
        },
        || {
            || {
                raw.lock_exclusive();
                raw.unlock_exclusive();
            }
        },
    )?);
    rcu.stop();
    Ok(out)
}

/// Reclaims where nothing is deferred.
pub(crate) struct Nothing;

impl Reclaim for Nothing {
    fn reclaim(&self, head: u32) -> usize {
        debug_assert_eq!(head, NIL, "nothing is deferred here");
        0
    }
}

/// A task as a run without measurement has it.
fn task(rcu: &Arc<Rcu>) -> Task<Real> {
    Task::new(rcu, "bench", Role::Observer, TaskConfig { measure: false, ..TaskConfig::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_that_is_deferred_is_reclaimed() {
        let rows = rcu_rows(1).unwrap();
        assert_eq!(rows.len(), 6);
        assert!(rows.iter().all(|row| row.ns > 0.0));
    }

    #[test]
    fn the_lock_has_its_rows() {
        // The contended rows need two free CPUs.
        assert!((4..=6).contains(&lock_rows(1).unwrap().len()));
    }
}
