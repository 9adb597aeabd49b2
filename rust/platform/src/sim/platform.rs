//! [`Sim`]: the contract of [`Platform`], kept by a schedule.

use std::{
    any::Any,
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use super::{
    lock::SimRwLock,
    memory,
    rcu::SimRcu,
    report::Kind,
    scheduler,
    world::{self, Region, State},
};
use crate::{
    api::{Join, JoinHandle, Platform, Switches},
    bug::Bug,
    fault::Fault,
    site::Site,
};

/// The simulated platform; see [`crate::sim`].
///
/// Outside of a run (no [`crate::sim::run`] on the calling OS thread) words are plain sequentially consistent atomics, nothing is scheduled, and threads cannot be started.
///
/// Words stored to with [`Platform::store`] must outlive the next barrier of the storing task (read-modify-write, fence, lock, blocking, end): under TSO the store may
/// reach memory that late.
#[derive(Clone, Copy, Debug)]
pub struct Sim;

impl Platform for Sim {
    type RwLock = SimRwLock;
    type Rcu = SimRcu;
    const NAME: &'static str = "sim";
    const SPINS: bool = false;
    const BULK: bool = false;

    #[inline]
    fn load(cell: &AtomicU64, site: Site) -> u64 {
        memory::load(cell, site)
    }

    #[inline]
    fn store(cell: &AtomicU64, value: u64, site: Site) {
        memory::store(cell, value, site);
    }

    fn swap(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        memory::modify(cell, site, Kind::Swap, |_| value)
    }

    fn cmpxchg(cell: &AtomicU64, old: u64, new: u64, site: Site) -> Result<u64, u64> {
        memory::cmpxchg(cell, old, new, site)
    }

    fn fetch_and(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        memory::modify(cell, site, Kind::Rmw, |old| old & value)
    }

    fn fetch_or(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        memory::modify(cell, site, Kind::Rmw, |old| old | value)
    }

    fn fetch_add(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        memory::modify(cell, site, Kind::Rmw, |old| old.wrapping_add(value))
    }

    fn fence(site: Site) {
        memory::fence(site);
    }

    /// Nothing leaves the buffer: only the compiler is held back.
    fn light_fence(site: Site) {
        scheduler::point(site, Kind::Point);
    }

    /// The stores of everybody reach memory, wherever their tasks stand: what an interrupt to all CPUs does.
    fn heavy_fence(site: Site) {
        scheduler::point(site, Kind::Fence);
        world::with(|world| world.drain_everybody());
        memory::fence(site);
    }

    #[inline]
    fn point(site: Site) {
        scheduler::point(site, Kind::Point);
    }

    fn locked(site: Site) {
        scheduler::point(site, Kind::Point);
        world::with(|world| world.drain_all(world.current));
    }

    fn settle(site: Site) {
        scheduler::settle(site);
    }

    fn relax(site: Site) {
        scheduler::relax(site);
    }

    fn yield_cpu(site: Site) {
        scheduler::relax(site);
    }

    fn ticks() -> u64 {
        world::with(|world| world.ticks()).unwrap_or(0)
    }

    fn ticks_to_ns(ticks: u64) -> u64 {
        ticks
    }

    fn ns_to_ticks(ns: u64) -> u64 {
        ns
    }

    fn thread_cpu_ns() -> u64 {
        world::with(|world| world.task().accesses * 4).unwrap_or(0)
    }

    fn switches() -> Switches {
        world::with(|world| {
            let task = world.task();
            Switches { voluntary: task.voluntary, involuntary: task.involuntary }
        })
        .unwrap_or_default()
    }

    fn run_delay_ns() -> Option<u64> {
        None
    }

    fn futex_wait(cell: &AtomicU32, expected: u32, timeout_ns: Option<u64>) {
        if world::current().is_null() {
            // Another OS thread may change the word, nobody of a simulation will.
            return std::thread::yield_now();
        }
        scheduler::settle(Site::Mutex);
        if cell.load(Ordering::SeqCst) == expected {
            let key = std::ptr::from_ref(cell).addr();
            scheduler::block(key, "a wake-up (sleeping lock, queue or flush)", Site::Mutex, timeout_ns);
        }
    }

    fn futex_wake(cell: &AtomicU32, count: u32) -> u32 {
        let key = std::ptr::from_ref(cell).addr();
        world::with(|world| world.wake(key, count)).unwrap_or(0)
    }

    fn background() {}

    #[inline]
    fn bug(bug: Bug) -> bool {
        world::with(|world| world.bug == Some(bug)).unwrap_or(false)
    }

    #[inline]
    fn inject_for(fault: Fault, site: Site) -> u32 {
        scheduler::ask(fault, site)
    }

    fn check_at(cell: &AtomicU64) -> bool {
        memory::check_at(cell)
    }

    fn asked_to_yield() -> bool {
        scheduler::asked_to_yield()
    }

    fn new_task_id() -> Option<u32> {
        world::with(|world| {
            let id = world.task_ids;
            world.task_ids += 1;
            world.task().task_id = Some(id);
            id
        })
    }

    fn task_id() -> Option<u32> {
        world::with(|world| world.task().task_id).flatten()
    }

    fn serving() -> usize {
        world::with(|world| world.task().serving).unwrap_or(0)
    }

    fn set_serving(what: usize) {
        world::with(|world| world.task().serving = what);
    }

    fn world() -> u64 {
        world::with(|world| world.number).unwrap_or(0)
    }

    fn violation(rule: &'static str, what: &str) {
        super::violation(rule, what.to_owned());
    }

    fn abandoned() -> bool {
        world::with(|world| world.abandoned.is_some()).unwrap_or(false)
    }

    fn name_words(base: *const u8, bytes: usize, name: Arc<dyn Fn(usize) -> String + Send + Sync>) {
        world::with(|world| world.regions.push(Region { base: base.addr(), bytes, name }));
    }

    fn forget_words(base: *const u8) {
        world::with(|world| world.regions.retain(|region| region.base != base.addr()));
    }

    fn spawn(name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle> {
        let task = scheduler::spawn(name, body)?;
        Ok(JoinHandle::new(SimThread { task, world: Self::world() }))
    }
}

/// A task of a run; of no use outside of that run.
struct SimThread {
    task: u32,
    world: u64,
}

impl Join for SimThread {
    fn join(self: Box<Self>) -> Result<(), Box<dyn Any + Send>> {
        if Sim::world() != self.world {
            // The run is over, and all its tasks with it.
            return Ok(());
        }
        scheduler::settle(Site::Spin);
        let task = self.task;
        let ended = || world::with(|world| world.tasks[task as usize].state == State::Ended).unwrap_or(true);
        while !ended() {
            scheduler::block(scheduler::end_key(task), "the end of a thread", Site::Spin, None);
        }
        match world::with(|world| world.tasks[task as usize].payload.take()).flatten() {
            Some(payload) => Err(payload),
            None => Ok(()),
        }
    }
}
