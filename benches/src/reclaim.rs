//! Reclamation crates: what a read section costs, and what it costs to free an item later.
//!
//! An item is one of `ITEMS` records in a slice, as a table page is one of a pool: nothing is allocated for it and
//! freeing it writes its link and counts it. Items are handed over in read sections of `BATCH`, about what a zap of
//! one 1 GiB subtree retires. Two figures: the caller's time per item (`defer-put`), and the wall time per item until
//! the last one was freed (`defer-reclaimed`), whoever freed it and wherever. Items not counted as freed at the end
//! are an error.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_epoch as epoch;

use crate::harness::{BenchError, Sample, Work, hammer};

/// Items that one repetition retires.
pub const ITEMS: u32 = 128 * 1024;
/// Items that one read section retires.
pub const BATCH: usize = 512;

/// Read sections that one repetition enters.
pub const CALLS: u64 = 100_000;

/// Something a table page is retired into: the record that its freeing writes.
#[derive(Default)]
pub struct Items {
    links: Vec<AtomicU32>,
    freed: AtomicU64,
}

impl Items {
    /// `ITEMS` items, none freed.
    pub fn new() -> Self {
        Self { links: (0..ITEMS).map(|_| AtomicU32::new(0)).collect(), freed: AtomicU64::new(0) }
    }

    /// Frees one item: a write to it, and the count.
    pub fn free(&self, item: u32) {
        if let Some(link) = self.links.get(item as usize) {
            link.store(1, Ordering::Relaxed);
            self.freed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The links, for a reclaimer that chains items.
    pub fn links(&self) -> &[AtomicU32] {
        &self.links
    }

    /// Counts items freed at once.
    pub fn count(&self, items: u64) {
        self.freed.fetch_add(items, Ordering::Relaxed);
    }

    /// Items freed so far.
    pub fn freed(&self) -> u64 {
        self.freed.load(Ordering::Relaxed)
    }

    /// Starts over; nothing is pending.
    pub fn reset(&self) {
        self.freed.store(0, Ordering::Relaxed);
    }
}

/// Takes the two figures of deferral. `put` retires every item and returns the caller's time; `settle` waits.
///
/// # Errors
/// [`BenchError::WorkNotDone`] if an item was not freed.
pub fn defer_samples(
    name: &'static str,
    reps: u32,
    items: &Items,
    mut run: impl FnMut(&Items) -> (Duration, Duration),
) -> Result<[Sample; 2], BenchError> {
    let (mut put, mut reclaimed) = (Duration::MAX, Duration::MAX);
    for _ in 0..reps {
        items.reset();
        let times = run(items);
        let (work, expected) = (Work::DeferReclaimed, u64::from(ITEMS));
        if items.freed() != expected {
            let got = items.freed();
            return Err(BenchError::WorkNotDone { work, name, what: "items freed", got, expected });
        }
        put = put.min(times.0);
        reclaimed = reclaimed.min(times.1);
    }
    let sample = |work, time: Duration| Sample {
        work,
        name,
        ns: time.as_nanos() as f64 / f64::from(ITEMS),
        count: u64::from(ITEMS),
    };
    Ok([sample(Work::DeferPut, put), sample(Work::DeferReclaimed, reclaimed)])
}

/// The rows of the peers.
///
/// # Errors
/// [`BenchError::WorkNotDone`], [`BenchError::Spawn`].
pub fn samples(reps: u32) -> Result<Vec<Sample>, BenchError> {
    let items = Items::new();
    let section = |name, ns| Sample { work: Work::ReadSection, name, ns, count: CALLS };

    let epochs = epoch::Collector::new();
    let pin = hammer(reps * 4, CALLS, || {
        let local = epochs.register();
        move || drop(local.pin())
    });
    let hyaline = seize::Collector::new();
    let enter = hammer(reps * 4, CALLS, || || drop(hyaline.enter()));
    let owned = hammer(reps * 4, CALLS, || || drop(hyaline.enter_owned()));

    let mut out =
        vec![section("crossbeam-epoch", pin), section("seize", enter), section("seize (owned)", owned)];
    out.extend(defer_samples("crossbeam-epoch", reps, &items, crossbeam_defer)?);
    out.extend(defer_samples("seize", reps, &items, seize_defer)?);
    Ok(out)
}

fn crossbeam_defer(items: &Items) -> (Duration, Duration) {
    let start = Instant::now();
    let collector = epoch::Collector::new();
    let local = collector.register();
    let numbers: Vec<u32> = (0..ITEMS).collect();
    for batch in numbers.chunks(BATCH) {
        let guard = local.pin();
        for &item in batch {
            // SAFETY: the collector and its only handle are dropped below, which runs every deferred call before
            // `items` can go away.
            unsafe { guard.defer_unchecked(move || items.free(item)) };
        }
    }
    let put = start.elapsed();
    drop(local);
    drop(collector);
    (put, start.elapsed())
}

/// What seize retires is a pointer: the item and where its freeing is counted.
struct Retired<'a> {
    items: &'a Items,
    item: u32,
}

fn seize_defer(items: &Items) -> (Duration, Duration) {
    use seize::Guard;

    unsafe fn free(retired: *mut Retired<'_>, _: &seize::Collector) {
        // SAFETY: `retired` points into the slice below, which outlives the collector.
        let retired = unsafe { &*retired };
        retired.items.free(retired.item);
    }

    let mut retired: Vec<Retired<'_>> = (0..ITEMS).map(|item| Retired { items, item }).collect();
    let base = retired.as_mut_ptr();
    let start = Instant::now();
    let collector = seize::Collector::new();
    for first in (0..ITEMS as usize).step_by(BATCH) {
        let guard = collector.enter();
        for index in first..first + BATCH {
            // SAFETY: each element is retired once and read by nobody, and lives until the collector is dropped.
            unsafe { guard.defer_retire(base.add(index), free) };
        }
    }
    let put = start.elapsed();
    drop(collector);
    let reclaimed = start.elapsed();
    drop(retired);
    (put, reclaimed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_crates_free_every_item() {
        let rows = samples(1).unwrap();
        assert_eq!(rows.len(), 7);
        assert!(rows.iter().all(|row| row.ns > 0.0));
    }

    #[test]
    fn a_lost_item_is_no_row() {
        let items = Items::new();
        let lossy = |items: &Items| {
            (1..ITEMS).for_each(|item| items.free(item));
            (Duration::ZERO, Duration::ZERO)
        };
        let result = defer_samples("lossy", 1, &items, lossy);
        assert!(matches!(result, Err(BenchError::WorkNotDone { got, .. }) if got == u64::from(ITEMS) - 1));
    }
}
