//! What the shadow MMU did in the window, and how much memory its obsolete pages kept from others, over time.
//!
//! **Guarantee.** The measured threads pay nothing: the counts are read by another thread, without a lock, from counters that the MMU keeps anyway. That thread sleeps between two looks; it takes
//! about a hundredth of one CPU at first and less with each doubling of its period. What a look misses, it misses: peaks are of what was seen, and of the moment when a fast zap returned, which is always looked at.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, Ordering};

use tdpmmu_platform::Platform;
use tdpmmu_shadow::{ShadowCounts, ShadowMmu};
use tdpmmu_spte::geometry::span;

use super::{Shared, lock};
use crate::outcome::ShadowBooks;

/// Between two looks, at first.
const PERIOD_NS: u64 = 200_000;
/// Of so many points every second one is dropped, and the period is doubled.
const POINTS: usize = 1024;

/// Ends the watcher, also when the work panics.
struct Done<'a, P: Platform>(&'a AtomicU32, PhantomData<fn() -> P>);

impl<P: Platform> Drop for Done<'_, P> {
    fn drop(&mut self) {
        self.0.store(1, Ordering::Release);
        P::futex_wake(self.0, u32::MAX);
    }
}

/// Of no use any more, and not yet free.
fn retained(counts: &ShadowCounts) -> u64 {
    counts.obsolete + counts.waiting
}

impl<P: Platform> Shared<'_, P> {
    /// Does `work` while another thread looks at what is retained.
    pub(super) fn sampled<R>(&self, work: impl FnOnce() -> R) -> R {
        let Some(shadow) = self.shadow() else { return work() };
        // Tasks that share one thread have nobody beside them.
        if !P::BULK {
            return work();
        }
        let done = AtomicU32::new(0);
        std::thread::scope(|scope| {
            let _done = Done::<P>(&done, PhantomData);
            // Without a thread to spare there is no series.
            let watch = std::thread::Builder::new().name("retained".into());
            let _ = watch.spawn_scoped(scope, || self.watch(shadow, &done));
            work()
        })
    }

    fn watch(&self, shadow: &ShadowMmu<P>, done: &AtomicU32) {
        let (mut period, mut points) = (PERIOD_NS, Vec::with_capacity(POINTS));
        while done.load(Ordering::Acquire) == 0 {
            P::futex_wait(done, 0, Some(period));
            if self.window.t0.load(Ordering::Acquire) == 0 {
                continue;
            }
            let over = self.window.end.load(Ordering::Acquire) != 0;
            points.push((P::ticks(), retained(&shadow.counts())));
            if over {
                break;
            }
            if points.len() == POINTS {
                let mut second = false;
                points.retain(|_| {
                    second = !second;
                    second
                });
                period *= 2;
            }
        }
        lock(&self.collected).obsolete.append(&mut points);
    }

    /// A fast zap has returned, `at` these ticks.
    pub(super) fn returned(&self, at: u64) {
        let Some(shadow) = self.shadow() else { return };
        let pages = retained(&shadow.counts());
        let mut all = lock(&self.collected);
        all.returned = Some((at, pages));
        all.obsolete.push((at, pages));
    }

    /// What came of it, when all is over.
    pub(super) fn shadow_books(&self) -> Option<ShadowBooks> {
        let shadow = self.shadow()?;
        let (now, memory) = (shadow.counts(), shadow.memory());
        let mut all = lock(&self.collected);
        let mut series = std::mem::take(&mut all.obsolete);
        let (before, end) = (all.shadow_at_t0, all.shadow_at_end.unwrap_or(now));
        let t0 = self.window.t0.load(Ordering::Acquire);
        series.push((t0, retained(&before)));
        series.retain(|point| point.0 >= t0);
        series.sort_unstable();
        Some(ShadowBooks {
            guest_table_pages: all.guest_tables,
            pages_at_t0: before.pages - before.obsolete - before.zapped_held,
            toggles: end.toggles - before.toggles,
            zapped: end.zapped - before.zapped,
            batches: end.batches - before.batches,
            longest_batch: end.longest_batch,
            restarts: end.restarts - before.restarts,
            reclaimed: end.reclaimed - before.reclaimed,
            retained_at_return: all.returned.map_or(0, |returned| returned.1),
            retained_at_end: retained(&end),
            retained: series,
            waiting_peak: end.waiting_peak,
            page_bytes: memory.page_bytes,
            gfn_bytes: memory.gfn_bytes,
            list_bytes: memory.list_bytes,
            // A head of a reverse map for each frame that is mapped, and a count for each huge frame.
            slot_bytes: all.at_t0.sptes() * size_of::<u64>() as u64
                + self.pages().div_ceil(span(2)) * size_of::<u32>() as u64,
        })
    }
}
