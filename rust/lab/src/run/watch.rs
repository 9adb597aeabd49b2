//! Progress, told from beside: a report may call Python or write to a terminal, and whoever is measured waits for neither.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, Ordering};

use tdpmmu_platform::Platform;

use super::Shared;

/// Between two reports: seldom enough to be lost among ten thousand drops.
const PERIOD_NS: u64 = 50_000_000;

/// Ends the watcher, also when the work panics.
struct Done<'a, P: Platform>(&'a AtomicU32, PhantomData<fn() -> P>);

impl<P: Platform> Drop for Done<'_, P> {
    fn drop(&mut self) {
        self.0.store(1, Ordering::Release);
        P::futex_wake(self.0, u32::MAX);
    }
}

impl<P: Platform> Shared<'_, P> {
    /// Does `work`, while another thread tells what `fraction` of it is done.
    pub(super) fn watched<R>(
        &self,
        what: &str,
        fraction: impl Fn() -> f64 + Send + Sync,
        work: impl FnOnce() -> R,
    ) -> R {
        // Tasks that share one thread have nobody beside them.
        if !P::BULK {
            return work();
        }
        let done = AtomicU32::new(0);
        std::thread::scope(|scope| {
            let watch = || {
                while done.load(Ordering::Acquire) == 0 {
                    self.control.report(what, fraction());
                    P::futex_wait(&done, 0, Some(PERIOD_NS));
                }
            };
            let _done = Done::<P>(&done, PhantomData);
            // Without a thread to spare there is no progress to see.
            let _ = std::thread::Builder::new().name("progress".into()).spawn_scoped(scope, watch);
            work()
        })
    }
}
