//! The real platform: OS threads, `std` atomics, futex, TSC.
//!
//! Everything is `#[inline(always)]` and ignores the site. [`Platform::point`] has an empty body: a schedule point
//! compiles to no instruction at all (`tests/points.rs` compares the machine code of a function with and without).

use std::{
    any::Any,
    cell::Cell,
    io,
    sync::{
        OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering, fence},
    },
};

use crate::{
    api::{Join, JoinHandle, Platform, Switches},
    clock, futex,
    rcu::{Barrier, Domain, membarrier::Asymmetric},
    rwlock::FairRwLock,
    sched,
    site::Site,
};

/// The platform of threads and hardware.
#[derive(Clone, Copy, Debug)]
pub struct Real;

impl Platform for Real {
    type RwLock = FairRwLock;
    type Rcu = Domain;
    const NAME: &'static str = "real";

    #[inline(always)]
    fn load(cell: &AtomicU64, _site: Site) -> u64 {
        cell.load(Ordering::Acquire)
    }

    #[inline(always)]
    fn store(cell: &AtomicU64, value: u64, _site: Site) {
        cell.store(value, Ordering::Release);
    }

    #[inline(always)]
    fn swap(cell: &AtomicU64, value: u64, _site: Site) -> u64 {
        cell.swap(value, Ordering::SeqCst)
    }

    #[inline(always)]
    fn cmpxchg(cell: &AtomicU64, old: u64, new: u64, _site: Site) -> Result<u64, u64> {
        cell.compare_exchange(old, new, Ordering::SeqCst, Ordering::Acquire)
    }

    #[inline(always)]
    fn fetch_and(cell: &AtomicU64, value: u64, _site: Site) -> u64 {
        cell.fetch_and(value, Ordering::SeqCst)
    }

    #[inline(always)]
    fn fetch_or(cell: &AtomicU64, value: u64, _site: Site) -> u64 {
        cell.fetch_or(value, Ordering::SeqCst)
    }

    #[inline(always)]
    fn fetch_add(cell: &AtomicU64, value: u64, _site: Site) -> u64 {
        cell.fetch_add(value, Ordering::SeqCst)
    }

    #[inline(always)]
    fn fence(_site: Site) {
        fence(Ordering::SeqCst);
    }

    #[inline(always)]
    fn light_fence(_site: Site) {
        ASYMMETRIC.get_or_init(|| Asymmetric::new(None)).light();
    }

    fn heavy_fence(_site: Site) {
        ASYMMETRIC.get_or_init(|| Asymmetric::new(None)).heavy();
    }

    #[inline(always)]
    fn point(_site: Site) {}

    #[inline(always)]
    fn relax(_site: Site) {
        std::hint::spin_loop();
    }

    #[inline]
    fn yield_cpu(_site: Site) {
        std::thread::yield_now();
    }

    #[inline(always)]
    fn ticks() -> u64 {
        clock::ticks()
    }

    #[inline]
    fn ticks_to_ns(ticks: u64) -> u64 {
        clock::ticks_to_ns(ticks)
    }

    #[inline]
    fn ns_to_ticks(ns: u64) -> u64 {
        clock::ns_to_ticks(ns)
    }

    fn thread_cpu_ns() -> u64 {
        clock::thread_cpu_ns()
    }

    fn switches() -> Switches {
        clock::switches()
    }

    fn run_delay_ns() -> Option<u64> {
        clock::run_delay_ns()
    }

    fn futex_wait(cell: &AtomicU32, expected: u32, timeout_ns: Option<u64>) {
        futex::wait(cell, expected, timeout_ns);
    }

    fn futex_wake(cell: &AtomicU32, count: u32) -> u32 {
        futex::wake(cell, count)
    }

    fn background() {
        sched::background();
    }

    fn cpus() -> Vec<usize> {
        sched::cpus()
    }

    fn process_cpus() -> Vec<usize> {
        sched::process_cpus()
    }

    fn unpin() -> io::Result<()> {
        sched::unpin()
    }

    fn pin(cpu: usize) -> io::Result<()> {
        sched::pin(cpu)
    }

    #[inline]
    fn serving() -> usize {
        SERVES.get()
    }

    #[inline]
    fn set_serving(what: usize) {
        SERVES.set(what);
    }

    fn spawn(name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle> {
        // std panics on a NUL in a thread's name; an error is what the caller can handle.
        if name.contains('\0') {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("thread name {name:?} contains NUL"),
            ));
        }
        let handle = std::thread::Builder::new().name(name.to_owned()).spawn(body)?;
        Ok(JoinHandle::new(OsThread(handle)))
    }
}

/// The barrier of [`Platform::light_fence`] and [`Platform::heavy_fence`]: one for the process, so that all sides of a handshake agree on it.
static ASYMMETRIC: OnceLock<Asymmetric> = OnceLock::new();

thread_local! {
    static SERVES: Cell<usize> = const { Cell::new(0) };
}

struct OsThread(std::thread::JoinHandle<()>);

impl Join for OsThread {
    fn join(self: Box<Self>) -> Result<(), Box<dyn Any + Send>> {
        self.0.join()
    }
}
