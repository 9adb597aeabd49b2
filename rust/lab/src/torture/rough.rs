//! The rough platform: real threads on bad ground.
//!
//! **Guarantee.** What runs on [`Rough`] runs on the words, locks, threads and RCU of [`Real`], one for one, so that what goes wrong on it can go wrong on hardware. Beside that it does what hardware and hosts do now
//! and then, far more often: a thread loses its CPU at any access, a compare-exchange fails for nothing, pages run out. [`Real`] knows nothing of it: nothing is compiled into it.
//!
//! **Mechanism.** A thread that has called [`enter`] carries an [`Armed`] plan and dice of its own; threads that it spawns through the platform (workers) inherit the plan. Code of a thread that has not is as on [`Real`].
//! The dice of a thread come from the seed and the thread's number, so that a thread draws the same again; what the host's scheduler does is its own.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use tdpmmu_platform::{Bug, Fault, JoinHandle, Platform, Real, Site, Switches};

use super::Dice;
use crate::faults::Armed;

/// See the module text.
#[derive(Clone, Copy, Debug)]
pub struct Rough;

/// What a thread is told as it enters rough ground.
#[derive(Clone, Debug)]
pub struct Ground {
    /// The faults.
    pub armed: Arc<Armed>,
    /// Of 1024 accesses, so many cost the thread its CPU.
    pub shake: u32,
    /// The defect that is switched on.
    pub bug: Option<Bug>,
    /// Seed of this thread's dice.
    pub seed: u64,
    /// The vCPU whose thread it is.
    pub vcpu: Option<u16>,
}

struct Rider {
    ground: Ground,
    dice: Dice,
    /// Threads started by this one, for their seeds.
    spawned: u64,
}

thread_local! {
    static RIDER: RefCell<Option<Rider>> = const { RefCell::new(None) };
    /// Where the thread's last access of an SPTE was: a walk that asks whether to yield has just been there.
    static LAST: Cell<Site> = const { Cell::new(Site::LockYield) };
    static SERVES: Cell<usize> = const { Cell::new(0) };
}

/// The calling thread is on rough ground until the guard is dropped.
#[must_use = "the ground is smooth again when the guard is dropped"]
#[derive(Debug)]
pub struct OnRough(());

/// See [`OnRough`].
pub fn enter(ground: Ground) -> OnRough {
    let dice = Dice::new(ground.seed);
    RIDER.set(Some(Rider { ground, dice, spawned: 0 }));
    OnRough(())
}

impl Drop for OnRough {
    fn drop(&mut self) {
        RIDER.set(None);
    }
}

/// On real threads a point is taken for a microsecond, and for ever is 2 ms.
fn nap(points: u32) {
    let us = if points == u32::MAX { 2_000 } else { u64::from(points) };
    std::thread::sleep(Duration::from_micros(us));
}

fn ask(fault: Fault, site: Site) -> u32 {
    RIDER.with_borrow_mut(|rider| {
        let Some(Rider { ground, dice, .. }) = rider else { return 0 };
        ground.armed.ask(fault, site, &mut |n| dice.below(u64::from(n)) as u32)
    })
}

/// An access: the thread may lose its CPU before it.
#[inline]
fn shake(site: Site) {
    LAST.set(site);
    let (lost, paused) = RIDER.with_borrow_mut(|rider| {
        let Some(Rider { ground, dice, .. }) = rider else { return (None, 0) };
        let lost = (ground.shake != 0 && dice.below(1024) < u64::from(ground.shake)).then(|| dice.below(64));
        let paused = if site == Site::WalkLockless {
            ground.armed.ask(Fault::Pause, site, &mut |n| dice.below(u64::from(n)) as u32)
        } else {
            0
        };
        (lost, paused)
    });
    match lost {
        None => {}
        Some(0) => std::thread::sleep(Duration::from_micros(100)),
        Some(_) => std::thread::yield_now(),
    }
    if paused != 0 {
        nap(paused);
    }
}

/// A value that was found in memory. Freed tables are filled with poison: who meets it came too late.
#[inline]
fn found(value: u64, site: Site) -> u64 {
    if value == tdpmmu_platform::sim::POISON {
        RIDER.with_borrow(|rider| {
            if let Some(rider) = rider {
                rider.ground.armed.found(
                    "touched-after-free",
                    &format!("a freed table was read or written at {}", site.name()),
                );
            }
        });
    }
    value
}

impl Platform for Rough {
    type RwLock = <Real as Platform>::RwLock;
    type Rcu = <Real as Platform>::Rcu;
    const NAME: &'static str = "rough";

    fn load(cell: &AtomicU64, site: Site) -> u64 {
        shake(site);
        found(Real::load(cell, site), site)
    }

    fn store(cell: &AtomicU64, value: u64, site: Site) {
        shake(site);
        Real::store(cell, value, site);
    }

    fn swap(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        shake(site);
        found(Real::swap(cell, value, site), site)
    }

    fn cmpxchg(cell: &AtomicU64, old: u64, new: u64, site: Site) -> Result<u64, u64> {
        shake(site);
        if ask(Fault::Cmpxchg, site) != 0 {
            return Err(Real::load(cell, site));
        }
        Real::cmpxchg(cell, old, new, site).map_err(|other| found(other, site))
    }

    fn fetch_and(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        shake(site);
        found(Real::fetch_and(cell, value, site), site)
    }

    fn fetch_or(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        shake(site);
        found(Real::fetch_or(cell, value, site), site)
    }

    fn fetch_add(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        shake(site);
        found(Real::fetch_add(cell, value, site), site)
    }

    fn fence(site: Site) {
        shake(site);
        Real::fence(site);
    }

    fn point(site: Site) {
        // The check itself is no access of a walk.
        let last = LAST.get();
        shake(site);
        if site == Site::LockYield {
            LAST.set(last);
        }
    }

    fn relax(_site: Site) {
        // Two CPUs for many threads: who waits gives its CPU away.
        std::thread::yield_now();
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

    fn cpus() -> Vec<usize> {
        Real::cpus()
    }

    fn process_cpus() -> Vec<usize> {
        Real::process_cpus()
    }

    fn unpin() -> io::Result<()> {
        Real::unpin()
    }

    fn pin(cpu: usize) -> io::Result<()> {
        Real::pin(cpu)
    }

    fn bug(bug: Bug) -> bool {
        RIDER.with_borrow(|rider| rider.as_ref().is_some_and(|rider| rider.ground.bug == Some(bug)))
    }

    fn inject_for(fault: Fault, site: Site) -> u32 {
        if fault == Fault::VcpuPause && !is_paused_vcpu() {
            return 0;
        }
        ask(fault, site)
    }

    fn asked_to_yield() -> bool {
        ask(Fault::Yield, LAST.get()) != 0
    }

    fn serving() -> usize {
        SERVES.get()
    }

    fn set_serving(what: usize) {
        SERVES.set(what);
    }

    fn spawn(name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle> {
        let ground = RIDER.with_borrow_mut(|rider| {
            let rider = rider.as_mut()?;
            rider.spawned += 1;
            let seed = rider.ground.seed.rotate_left(17) ^ rider.spawned;
            Some(Ground { seed, vcpu: None, ..rider.ground.clone() })
        });
        let Some(ground) = ground else { return Real::spawn(name, body) };
        Real::spawn(
            name,
            Box::new(move || {
                let _on = enter(ground);
                body();
            }),
        )
    }
}

/// Is the calling thread that of the vCPU which the plan pauses?
fn is_paused_vcpu() -> bool {
    use crate::faults::{Injection, Who};
    RIDER.with_borrow(|rider| {
        rider.as_ref().is_some_and(|rider| {
            let of = |fault: &Injection| match fault {
                Injection::Pause(Who::Guest(n)) => Some(*n) == rider.ground.vcpu,
                _ => false,
            };
            rider.ground.armed.plan().faults().iter().any(of)
        })
    })
}

/// An injected panic says so: who finds another one in a worker has found a defect.
pub fn is_injected(payload: &(dyn Any + Send)) -> bool {
    payload.is::<tdpmmu_platform::InjectedPanic>()
}
