//! The platform's contract, operation by operation: what each is charged, and then does.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use super::{
    Body, Region, Timed, TimedJoin, TimedLock, TimedRcu, WORLD, World, charge_ns, costs,
    costs::{Kind, is_entry, ps},
    current_world, idle_until, quiet,
};
use crate::{
    api::{Bulk, HeldWords, JoinHandle, Platform, Switches},
    site::Site,
};

impl Platform for Timed {
    type RwLock = TimedLock;
    type Rcu = TimedRcu;
    const NAME: &'static str = "timed";
    const BY_COUNT: bool = true;
    const BULK: bool = false;

    #[inline]
    fn load(cell: &AtomicU64, site: Site) -> u64 {
        if let Some(world) = current_world() {
            world.before(cell, Kind::Load, site);
            if is_entry(site)
                && let Some((region, offset)) = world.region(std::ptr::from_ref(cell).addr())
                && let Some(value) = region.words.read(offset)
            {
                return value;
            }
        }
        cell.load(Ordering::SeqCst)
    }

    #[inline]
    fn store(cell: &AtomicU64, value: u64, site: Site) {
        if let Some(world) = current_world() {
            world.before(cell, Kind::Store, site);
            world.changing(cell, site);
        }
        cell.store(value, Ordering::SeqCst);
    }

    #[inline]
    fn swap(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        if let Some(world) = current_world() {
            world.before(cell, Kind::Swap, site);
            world.changing(cell, site);
        }
        cell.swap(value, Ordering::SeqCst)
    }

    #[inline]
    fn cmpxchg(cell: &AtomicU64, old: u64, new: u64, site: Site) -> Result<u64, u64> {
        if let Some(world) = current_world() {
            world.before(cell, Kind::Cmpxchg, site);
            world.changing(cell, site);
        }
        cell.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
    }

    #[inline]
    fn fetch_and(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        if let Some(world) = current_world() {
            world.before(cell, Kind::Rmw, site);
            world.changing(cell, site);
        }
        cell.fetch_and(value, Ordering::SeqCst)
    }

    #[inline]
    fn fetch_or(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        if let Some(world) = current_world() {
            world.before(cell, Kind::Rmw, site);
            world.changing(cell, site);
        }
        cell.fetch_or(value, Ordering::SeqCst)
    }

    #[inline]
    fn fetch_add(cell: &AtomicU64, value: u64, site: Site) -> u64 {
        if let Some(world) = current_world() {
            world.before(cell, Kind::Rmw, site);
            world.changing(cell, site);
        }
        cell.fetch_add(value, Ordering::SeqCst)
    }

    fn fence(_site: Site) {
        charge_ns(costs().fence);
    }

    #[inline]
    fn light_fence(_site: Site) {}

    fn heavy_fence(_site: Site) {
        charge_ns(costs().membarrier);
    }

    #[inline]
    fn point(site: Site) {
        if let Some(world) = current_world() {
            let price = world.price(Kind::Point, site);
            if price != 0 {
                world.spend(price);
            }
        }
    }

    fn relax(_site: Site) {
        if let Some(world) = current_world() {
            let inner = world.inner();
            let me = inner.clock.current() as usize;
            let (word, until) = (inner.tasks[me].last_word, inner.clock.now + ps(inner.costs.relax).max(1));
            world.spin(word, until);
        }
    }

    fn idle_until(until: u64, _site: Site) {
        idle_until(until);
    }

    fn quiet<R>(body: impl FnOnce() -> R) -> R {
        quiet(body)
    }

    fn yield_cpu(_site: Site) {
        if let Some(world) = current_world() {
            let syscall = ps(world.inner().costs.syscall);
            world.spend(syscall);
            world.inner().clock.yielded();
            world.reschedule();
        }
    }

    #[inline]
    fn ticks() -> u64 {
        current_world().map_or(0, |world| world.inner().clock.now)
    }

    #[inline]
    fn ticks_to_ns(ticks: u64) -> u64 {
        ticks / 1000
    }

    #[inline]
    fn ns_to_ticks(ns: u64) -> u64 {
        ns.saturating_mul(1000)
    }

    fn thread_cpu_ns() -> u64 {
        current_world().map_or(0, |world| {
            world.ask(world.inner().costs.cpu_clock);
            world.inner().clock.cpu_time() / 1000
        })
    }

    fn switches() -> Switches {
        current_world().map_or_else(Switches::default, |world| {
            world.ask(world.inner().costs.switch_count);
            let (voluntary, involuntary) = world.inner().clock.switches();
            Switches { voluntary, involuntary }
        })
    }

    fn run_delay_ns() -> Option<u64> {
        current_world().map(|world| {
            world.ask(world.inner().costs.run_delay);
            world.inner().clock.delay() / 1000
        })
    }

    fn futex_wait(cell: &AtomicU32, expected: u32, timeout_ns: Option<u64>) {
        let Some(world) = current_world() else { return };
        charge_ns(costs().syscall);
        if cell.load(Ordering::SeqCst) != expected {
            return;
        }
        let word = std::ptr::from_ref(cell).addr();
        let me = world.task();
        let inner = world.inner();
        inner.futexes.entry(word).or_default().push_back(me);
        let until = timeout_ns.map(|ns| inner.clock.now.saturating_add(ns.saturating_mul(1000)));
        if world.sleep(until) {
            let inner = world.inner();
            if let Some(sleepers) = inner.futexes.get_mut(&word) {
                sleepers.retain(|&task| task != me);
                if sleepers.is_empty() {
                    inner.futexes.remove(&word);
                }
            }
        }
    }

    fn futex_wake(cell: &AtomicU32, count: u32) -> u32 {
        let Some(world) = current_world() else { return 0 };
        charge_ns(costs().syscall);
        let word = std::ptr::from_ref(cell).addr();
        let mut woken = 0;
        // Those who sleep now: who is woken, looks and sleeps again meanwhile is not waited for.
        let sleepers = world.inner().futexes.get(&word).map_or(0, VecDeque::len);
        for _ in 0..sleepers {
            if woken == count {
                break;
            }
            charge_ns(costs().wake);
            let inner = world.inner();
            let Some(task) = inner.futexes.get_mut(&word).and_then(VecDeque::pop_front) else { break };
            // One whose time is up wakes by itself.
            if inner.clock.is_asleep(task) {
                inner.clock.wake(task);
                woken += 1;
            }
        }
        if world.inner().futexes.get(&word).is_some_and(VecDeque::is_empty) {
            world.inner().futexes.remove(&word);
        }
        woken
    }

    fn background() {
        if let Some(world) = current_world() {
            world.inner().clock.background();
        }
    }

    fn new_task_id() -> Option<u32> {
        Self::task_id()
    }

    fn task_id() -> Option<u32> {
        current_world().map(World::task)
    }

    fn serving() -> usize {
        current_world().map_or(0, |world| {
            let me = world.task() as usize;
            world.inner().tasks[me].serving
        })
    }

    fn set_serving(what: usize) {
        if let Some(world) = current_world() {
            let me = world.task() as usize;
            world.inner().tasks[me].serving = what;
        }
    }

    fn world() -> u64 {
        // One world a thread at a time; its address tells it from those of other threads.
        WORLD.get().addr() as u64
    }

    fn by_count(base: *const u8, bytes: usize, words: Arc<dyn HeldWords>) {
        if let Some(world) = current_world() {
            world.inner().regions.push(Region { base: base.addr(), bytes, words });
        }
    }

    fn forget_words(base: *const u8) {
        if let Some(world) = current_world() {
            world.inner().regions.retain(|region| region.base != base.addr());
        }
    }

    fn charge_entries(what: Bulk, entries: u64) {
        if let Some(world) = current_world() {
            let costs = &world.inner().costs;
            let each = match what {
                Bulk::Read => costs.read,
                Bulk::Write => costs.write,
                Bulk::Swap => costs.swap,
                Bulk::Cmpxchg => costs.read + costs.cmpxchg,
            };
            world.spend(ps(each * entries as f64));
        }
    }

    fn spawn(name: &str, body: Body) -> io::Result<JoinHandle> {
        let Some(world) = current_world() else {
            return Err(io::Error::other("virtual time: a task is started by a task of a running machine"));
        };
        charge_ns(costs().spawn);
        Ok(JoinHandle::new(TimedJoin(world.start(name, body))))
    }
}
