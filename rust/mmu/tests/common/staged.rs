//! The real platform, with one thing done at one schedule point: an interleaving is chosen, not hoped for.
//!
//! A thread calls [`stage`] with a site and an act; the act runs in this thread, once, when it next comes to that site. What another
//! task would do between two steps of this one is done there, so that no test waits, sleeps or races. An act may stage others. [`stage_worker`] does
//! the same to whichever worker comes to the site.
#![allow(dead_code)]

use std::cell::{Cell, RefCell};
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Mutex, PoisonError};

use tdpmmu_platform::{JoinHandle, Platform, Real, Site, Switches};

/// The site of a thread that is about to sleep.
pub const SLEEP: Site = Site::Spin;

struct Act<F: ?Sized> {
    site: Site,
    /// Times that the site is still passed before it acts.
    pass: u32,
    act: Box<F>,
}

thread_local! {
    static OWN: RefCell<Vec<Act<dyn FnOnce()>>> = const { RefCell::new(Vec::new()) };
    static IS_WORKER: Cell<bool> = const { Cell::new(false) };
}

static WORKERS: Mutex<Vec<Act<dyn FnOnce() + Send>>> = Mutex::new(Vec::new());

/// Runs `act` when the calling thread has passed `site` `pass` times and comes to it again.
pub fn stage(pass: u32, site: Site, act: impl FnOnce() + 'static) {
    OWN.with_borrow_mut(|acts| {
        assert!(acts.iter().all(|other| other.site != site), "one act at a time at {site:?}");
        acts.push(Act { site, pass, act: Box::new(act) });
    });
}

/// Takes back the act of the calling thread at `site`; false: it has run.
pub fn unstage(site: Site) -> bool {
    OWN.with_borrow_mut(|acts| acts.extract_if(.., |act| act.site == site).count() != 0)
}

/// Runs `act` in a worker, when workers have passed `site` `pass` times and one comes to it again.
pub fn stage_worker(pass: u32, site: Site, act: impl FnOnce() + Send + 'static) {
    let mut acts = WORKERS.lock().unwrap_or_else(PoisonError::into_inner);
    assert!(acts.is_empty(), "one act at a time");
    acts.push(Act { site, pass, act: Box::new(act) });
}

/// Takes back the act of the workers; false: it has run.
pub fn unstage_worker() -> bool {
    std::mem::take(&mut *WORKERS.lock().unwrap_or_else(PoisonError::into_inner)).pop().is_some()
}

/// The act that is due at `site`.
fn due<F: ?Sized>(acts: &mut Vec<Act<F>>, site: Site) -> Option<Box<F>> {
    let at = acts.iter().position(|act| act.site == site)?;
    if acts[at].pass > 0 {
        acts[at].pass -= 1;
        return None;
    }
    Some(acts.remove(at).act)
}

fn come_to(site: Site) {
    if let Some(act) = OWN.with_borrow_mut(|acts| due(acts, site)) {
        act();
    }
    if IS_WORKER.get() {
        let act = due(&mut WORKERS.lock().unwrap_or_else(PoisonError::into_inner), site);
        if let Some(act) = act {
            act();
        }
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
        come_to(site);
        Real::store(cell, value, site);
    }
    fn cmpxchg(cell: &AtomicU64, old: u64, new: u64, site: Site) -> Result<u64, u64> {
        come_to(site);
        Real::cmpxchg(cell, old, new, site)
    }
    fn fetch_and(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        come_to(site);
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
        come_to(SLEEP);
        Real::futex_wait(cell, expected, timeout_ns);
    }
    fn futex_wake(cell: &AtomicU32, count: u32) -> u32 {
        Real::futex_wake(cell, count)
    }
    fn background() {
        IS_WORKER.set(true);
        Real::background();
    }
    fn serving() -> usize {
        Real::serving()
    }
    fn set_serving(what: usize) {
        Real::set_serving(what);
    }
    fn spawn(name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle> {
        Real::spawn(name, body)
    }
}
