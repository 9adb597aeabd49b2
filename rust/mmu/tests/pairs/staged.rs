//! The real platform, with one thing done at one schedule point: an interleaving is chosen, not hoped for.
//!
//! A thread calls [`stage`] with a site and an act; the act runs in this thread, once, when it next comes to that site. What another
//! task would do between two steps of this one is done there, so that no test waits, sleeps or races.

use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64};

use tdpmmu_platform::{JoinHandle, Platform, Real, Site, Switches};

type Act = Box<dyn FnOnce()>;

thread_local! {
    static NEXT: RefCell<Option<(Site, Act)>> = const { RefCell::new(None) };
}

/// Runs `act` when the calling thread next comes to `site`.
pub fn stage(site: Site, act: impl FnOnce() + 'static) {
    let before = NEXT.replace(Some((site, Box::new(act))));
    assert!(before.is_none(), "one act at a time");
}

/// Takes back an act that is still to come; false: it has run.
pub fn unstage() -> bool {
    NEXT.take().is_some()
}

fn come_to(site: Site) {
    let act = NEXT.with_borrow_mut(|next| next.take_if(|(at, _)| *at == site));
    if let Some((_, act)) = act {
        act();
    }
}

/// See the module text.
pub struct Staged;

impl Platform for Staged {
    type RwLock = <Real as Platform>::RwLock;
    type Rcu = <Real as Platform>::Rcu;
    const NAME: &'static str = "staged";

    fn point(site: Site) {
        // A reschedule check is a point too; the yield itself is the `relax` between the release of mmu_lock and its taking.
        if site != Site::LockYield {
            come_to(site);
        }
    }
    fn relax(site: Site) {
        come_to(site);
        Real::relax(site);
    }
    fn swap(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        come_to(site);
        Real::swap(cell, value, site)
    }
    fn load(cell: &AtomicU64, site: Site) -> u64 {
        Real::load(cell, site)
    }
    fn store(cell: &AtomicU64, value: u64, site: Site) {
        Real::store(cell, value, site);
    }
    fn cmpxchg(cell: &AtomicU64, old: u64, new: u64, site: Site) -> Result<u64, u64> {
        Real::cmpxchg(cell, old, new, site)
    }
    fn fetch_and(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        Real::fetch_and(cell, value, site)
    }
    fn fetch_or(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        Real::fetch_or(cell, value, site)
    }
    fn fetch_add(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        Real::fetch_add(cell, value, site)
    }
    fn fence(site: Site) {
        Real::fence(site);
    }
    fn yield_cpu(site: Site) {
        Real::yield_cpu(site);
    }
    fn ticks() -> u64 {
        Real::ticks()
    }
    fn ticks_to_ns(ticks: u64) -> u64 {
        Real::ticks_to_ns(ticks)
    }
    fn ns_to_ticks(ns: u64) -> u64 {
        Real::ns_to_ticks(ns)
    }
    fn thread_cpu_ns() -> u64 {
        Real::thread_cpu_ns()
    }
    fn switches() -> Switches {
        Real::switches()
    }
    fn run_delay_ns() -> Option<u64> {
        Real::run_delay_ns()
    }
    fn futex_wait(cell: &AtomicU32, expected: u32, timeout_ns: Option<u64>) {
        Real::futex_wait(cell, expected, timeout_ns);
    }
    fn futex_wake(cell: &AtomicU32, count: u32) -> u32 {
        Real::futex_wake(cell, count)
    }
    fn background() {
        Real::background();
    }
    fn spawn(name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle> {
        Real::spawn(name, body)
    }
}
