//! Interleavings that a schedule point of the platform forces: what happens between two steps of one task.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use tdpmmu_mmu::{MmuConfig, NoHost, TdpMmu, design};
use tdpmmu_platform::{JoinHandle, Platform, Preempt, RcuConfig, Real, Role, Site, Switches, TaskConfig};
use tdpmmu_spte::{FormatKind, KernelProfile};
use tdpmmu_table::TableCache;

/// The real platform, with something done at two schedule points.
struct Staged;

thread_local! {
    /// At the calling thread's next root reference, `INTERRUPT` runs first.
    static ARMED: Cell<bool> = const { Cell::new(false) };
}

static INTERRUPT: OnceLock<Box<dyn Fn() + Send + Sync>> = OnceLock::new();
static WORKERS_MAY_RUN: AtomicBool = AtomicBool::new(false);

impl Platform for Staged {
    type RwLock = <Real as Platform>::RwLock;
    type Rcu = <Real as Platform>::Rcu;
    const NAME: &'static str = "staged";

    fn point(site: Site) {
        if site == Site::RootRef && ARMED.take() {
            INTERRUPT.get().expect("set before a thread is armed")();
        }
        while site == Site::QueueRun && !WORKERS_MAY_RUN.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
    }
    fn load(cell: &AtomicU64, site: Site) -> u64 {
        Real::load(cell, site)
    }
    fn store(cell: &AtomicU64, value: u64, site: Site) {
        Real::store(cell, value, site);
    }
    fn swap(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        Real::swap(cell, value, site)
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
    fn relax(site: Site) {
        Real::relax(site);
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

/// 6.12 loads and puts roots under the shared lock, where async-worker's last put re-arms the count of a root that it has invalidated.
#[test]
fn a_load_that_loses_to_the_last_put_never_gets_the_invalid_root() {
    let profile = KernelProfile::named("6.12").expect("a known profile");
    let info = design::info("async-worker").expect("a known design");
    let config = MmuConfig {
        profile,
        format: profile.format(FormatKind::Npt),
        root_level: 4,
        maxphyaddr: 52,
        passes: design::effective_passes(None, info, &profile),
        ownership: info.ownership,
        design: design::build(info.name, &design::DesignOptions::default()).expect("a known design"),
        max_tables: 256,
        hugepages: false,
        batch: 512,
        write_back: true,
        observer: None,
        rcu: RcuConfig::default(),
        task: TaskConfig { preempt: Preempt::Full, ..TaskConfig::default() },
    };
    let mmu = TdpMmu::<Staged>::new(config, Arc::new(NoHost)).expect("a small pool");
    let task = mmu.task("vcpu-0", Role::Vcpu);
    let mut cache = TableCache::default();
    let role = mmu.root_role(false);
    let first = mmu.load_root(&task, &mut cache, role).expect("room");

    // vCPU 0 has compared the role and not taken its reference yet: vCPU 1 drops the last one.
    let other = Arc::clone(&mmu);
    let dropped = INTERRUPT.set(Box::new(move || {
        let mmu = Arc::clone(&other);
        std::thread::spawn(move || mmu.put_roots(&mmu.task("vcpu-1", Role::Vcpu), &[first]))
            .join()
            .expect("vCPU 1 drops the root");
    }));
    assert!(dropped.is_ok());
    ARMED.set(true);
    let second = mmu.load_root(&task, &mut cache, role).expect("room");
    assert!(!ARMED.get(), "the schedule point was reached");
    assert_ne!(second, first);
    assert!(mmu.is_obsolete(first) && !mmu.is_obsolete(second));
    assert_eq!((mmu.refs(first), mmu.refs(second)), (1, 1), "the worker's, and vCPU 0's");

    WORKERS_MAY_RUN.store(true, Ordering::Release);
    mmu.put_roots(&task, &[second]);
    cache.drain(mmu.pool());
    assert_eq!(mmu.uninit(&task), Default::default());
    assert_eq!(mmu.pool().stats().taken, 0);
    assert!(mmu.violations().is_empty(), "{:?}", mmu.violations());
}
