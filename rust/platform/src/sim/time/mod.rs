//! Virtual time: a machine with any number of CPUs, on one thread of this one.
//!
//! **Guarantee.** The engine runs unchanged over [`Timed`]; every operation of the platform takes as long as [`Costs`] says, and each task sees what others did at
//! earlier virtual times and nothing later. Same program, same costs, same number of CPUs: the same run, bit for bit. Nothing here reads a real clock, and no address decides
//! anything (words are told apart by their address, never ordered by it).
//!
//! **Mechanism.** Tasks are coroutines; the one with the smallest virtual time goes on (`clock.rs`). Memory is sequentially consistent: an access happens at the virtual time at
//! which it is paid for. Two kinds of words are told apart by site:
//!
//! * *Entries of tables.* There are billions and hardly two tasks meet at one: a flat price by kind of access (`costs.rs`).
//! * *Everything else* (modes, requests, counts, lock words). Each is a cache line that one CPU owns: changing or first reading it elsewhere takes
//!   [`Costs::transfer`], and those who want the same line are served one after the other. So a lock that excludes nobody still slows down hundreds of readers.
//!
//! **Pages held by count.** A pool may keep a table that is uniform as a description ([`crate::api::HeldWords`]): loads are answered from it, any change makes the page real first. The
//! engine may then handle such a table in one event, [`Timed::charge_entries`] of all its entries.
//!
//! **Spinning.** A task that spins in its own loop ([`crate::Platform::relax`]) waits for a change of the word that it loaded last, a turn at a time; [`idle_until`] is the same with a
//! deadline of the caller's: what a vCPU does between two accesses.
//!
//! This is a platform beside [`Sim`](super::Sim), not a strategy of it: the two share the engine and the coroutines, but a search wants every choice recorded and no clock, and this
//! wants no choice and a hundred million cheap events.

mod clock;
mod costs;
mod lock;
mod platform;
mod rcu;

use std::{
    any::Any,
    cell::{Cell, RefCell, UnsafeCell},
    collections::{HashMap, VecDeque},
    hash::{BuildHasherDefault, Hasher},
    panic::{self, AssertUnwindSafe},
    rc::Rc,
    sync::{Arc, atomic::AtomicU64},
};

use corosensei::{Coroutine, CoroutineResult, Yielder, stack::DefaultStack};

use self::{
    clock::{Clock, Timing},
    costs::{Kind, Prices, is_entry, ps},
};
pub use self::{
    costs::{Costs, Ps},
    lock::TimedLock,
    rcu::{TimedRcu, TimedReader},
};
use crate::{
    api::{HeldWords, Join},
    site::Site,
};

/// The platform of virtual time.
#[derive(Clone, Copy, Debug)]
pub struct Timed;

/// A machine to run on.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its CPUs, at least 1. (Ownership of cache lines is told apart for 512.)
    pub cpus: usize,
    /// What its operations cost.
    pub costs: Costs,
}

/// What a run came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ran {
    /// Virtual time when the last task ended, in nanoseconds.
    pub ns: u64,
    /// Operations paid for.
    pub operations: u64,
    /// Changes from one task to another.
    pub switches: u64,
    /// Tasks that there were.
    pub tasks: u32,
}

/// A run that did not end well. What it held is leaked, not dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TimedError {
    /// Everybody waits for somebody.
    Deadlock {
        /// When.
        ns: u64,
        /// The names of those who wait.
        who: String,
    },
    /// The main task panicked.
    Panicked(String),
    /// The host refused a stack.
    Stack(String),
}

impl std::fmt::Display for TimedError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TimedError::Deadlock { ns, who } => {
                write!(f, "deadlock in virtual time at {ns} ns: nobody can go on, {who} wait for ever")
            }
            TimedError::Panicked(text) => write!(f, "the main task of a virtual machine panicked: {text}"),
            TimedError::Stack(reason) => write!(f, "the host refused the stack of a task: {reason}"),
        }
    }
}

impl std::error::Error for TimedError {}

/// Stack of a task, committed as it is used.
const STACK: usize = 1 << 20;
/// The task number of whoever is outside of every world.
const OUTSIDE: u32 = u32::MAX;
/// CPUs whose copies of a line are told apart.
const TOLD_APART: usize = 512;

thread_local! {
    static WORLD: Cell<*const World> = const { Cell::new(std::ptr::null()) };
}

/// The world of the calling thread.
#[inline(always)]
fn current_world() -> Option<&'static World> {
    let world = WORLD.get();
    // SAFETY: `run` sets the pointer to a world that lives until it sets it back; the reference is used within calls that its tasks make meanwhile
    // and stored nowhere.
    (!world.is_null()).then(|| unsafe { &*world })
}

#[derive(Default)]
struct Fast(u64);

impl Hasher for Fast {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_usize(usize::from(byte));
        }
    }
    fn write_usize(&mut self, n: usize) {
        self.0 = (self.0 ^ n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
}

type Words<V> = HashMap<usize, V, BuildHasherDefault<Fast>>;

/// Where the line of a word is.
#[derive(Default)]
struct Line {
    /// CPUs that have it; after a change only the one that made it.
    holders: [u64; TOLD_APART / 64],
    /// Busy being fetched until then.
    free_at: Ps,
}

type Body = Box<dyn FnOnce() + Send>;

struct Task {
    name: String,
    yielder: *const Yielder<(), ()>,
    joiners: Vec<u32>,
    panic: Option<Box<dyn Any + Send>>,
    last_word: usize,
    serving: usize,
}

struct Region {
    base: usize,
    bytes: usize,
    words: Arc<dyn HeldWords>,
}

struct Inner {
    clock: Clock,
    prices: Prices,
    costs: Costs,
    tasks: Vec<Task>,
    /// Bodies of tasks that have not begun.
    begun: Vec<(u32, Body)>,
    coroutines: Vec<Option<Coroutine<(), (), ()>>>,
    next: Option<u32>,
    /// This task's operations are free: it sets up, or checks.
    quiet: u32,
    futexes: Words<VecDeque<u32>>,
    lines: Words<Line>,
    regions: Vec<Region>,
    operations: u64,
    switches: u64,
}

/// The state of a run. Its tasks use it one at a time, on one thread.
struct World {
    inner: UnsafeCell<Inner>,
}

impl World {
    /// # Safety of the inside
    /// No caller keeps the reference across [`World::reschedule`], the only place where another task goes on, nor across a call that may end there.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    fn inner(&self) -> &mut Inner {
        // SAFETY: the rule above, kept by the functions of this module; one thread.
        unsafe { &mut *self.inner.get() }
    }

    fn task(&self) -> u32 {
        self.inner().clock.current()
    }

    /// The executing task has said what it waits for: whoever is due goes on.
    fn reschedule(&self) {
        let inner = self.inner();
        let me = inner.clock.current();
        let next = inner.clock.next();
        if next == Some(me) {
            return;
        }
        inner.next = next;
        inner.switches += 1;
        let yielder = inner.tasks[me as usize].yielder;
        // SAFETY: a task's yielder lives on its own stack from its first statement to its last, and this is its stack.
        unsafe { (*yielder).suspend(()) };
    }

    /// Time passes for the executing task; others go on if they are due before it.
    #[inline(always)]
    fn spend(&self, cost: Ps) {
        let inner = self.inner();
        if inner.quiet == inner.clock.current() {
            return;
        }
        inner.operations += 1;
        inner.clock.now += cost;
        if inner.clock.now > inner.clock.horizon {
            inner.clock.pause();
            self.reschedule();
        }
    }

    /// The same for a question about the clock, which is asked anywhere: nobody else goes on before the next operation.
    fn ask(&self, ns: f64) {
        let inner = self.inner();
        if inner.quiet != inner.clock.current() {
            inner.clock.now += ps(ns);
        }
    }

    #[inline(always)]
    fn price(&self, kind: Kind, site: Site) -> Ps {
        self.inner().prices.0[kind as usize][site as usize]
    }

    /// Pays for a word that is no entry.
    fn word(&self, word: usize, write: bool, base: Ps) {
        let inner = self.inner();
        if inner.quiet == inner.clock.current() {
            return;
        }
        let cpu = inner.clock.cpu() % TOLD_APART;
        let (has, bit) = (cpu / 64, 1u64 << (cpu % 64));
        let line = inner.lines.entry(word).or_default();
        let alone = line.holders.iter().enumerate().all(|(n, &set)| set == if n == has { bit } else { 0 });
        let untouched = line.holders == [0; TOLD_APART / 64];
        let there = if write { alone || untouched } else { line.holders[has] & bit != 0 || untouched };
        let now = inner.clock.now;
        let mut until = now + base;
        if !there {
            until = now.max(line.free_at) + ps(inner.costs.transfer) + base;
            if write {
                line.free_at = until;
            }
        }
        if write {
            line.holders = [0; TOLD_APART / 64];
        }
        line.holders[has] |= bit;
        self.spend(until - now);
    }

    /// A locked instruction on the word at `word`, by who then changes it.
    fn word_written(&self, word: usize) {
        self.word(word, true, ps(self.inner().costs.locked));
        self.inner().clock.poke(word);
    }

    /// Before an access: pays, and lets others go first.
    #[inline(always)]
    fn before(&self, cell: &AtomicU64, kind: Kind, site: Site) {
        if is_entry(site) {
            self.spend(self.price(kind, site));
            return;
        }
        let word = std::ptr::from_ref(cell).addr();
        let write = kind != Kind::Load;
        let base = ps(if matches!(kind, Kind::Load | Kind::Store) {
            self.inner().costs.word
        } else {
            self.inner().costs.locked
        });
        self.word(word, write, base + self.price(kind, site));
        let inner = self.inner();
        let me = inner.clock.current();
        inner.tasks[me as usize].last_word = word;
    }

    /// A word is about to be changed: its page is real, and who looks at it will know.
    #[inline(always)]
    fn changing(&self, cell: &AtomicU64, site: Site) {
        let word = std::ptr::from_ref(cell).addr();
        if is_entry(site) {
            if let Some((region, offset)) = self.region(word) {
                region.words.expand(offset);
            }
        } else {
            self.inner().clock.poke(word);
        }
    }

    #[inline(always)]
    fn region(&self, word: usize) -> Option<(&Region, usize)> {
        let regions = &self.inner().regions;
        let region = regions.iter().find(|region| word.wrapping_sub(region.base) < region.bytes)?;
        Some((region, word - region.base))
    }

    fn sleep(&self, until: Option<Ps>) -> bool {
        self.inner().clock.sleep(until);
        self.reschedule();
        self.inner().clock.timed_out()
    }

    fn spin(&self, word: usize, until: Ps) {
        self.inner().clock.spin(word, until);
        self.reschedule();
    }

    fn spin_for_lock(&self, word: usize) {
        let inner = self.inner();
        let until = inner.clock.now + ps(inner.costs.lock_spin);
        // Nobody pokes a lock's word for this: who is let in is told by name.
        self.spin(!word, until);
    }

    /// `task` has the lock now: a spinner sees it, a sleeper is woken, at the price of that.
    fn let_in(&self, task: u32) {
        let inner = self.inner();
        if inner.clock.is_asleep(task) {
            let wake = ps(inner.costs.wake);
            self.spend(wake);
            self.inner().clock.wake(task);
        } else {
            inner.clock.nudge(task);
        }
    }
}

/// Runs `main` as the first task of a machine; returns when every task has ended.
///
/// # Errors
/// [`TimedError`]: then what the tasks held is leaked.
///
/// # Panics
/// Within a world: a machine is not started by a task of another.
pub fn run<R: 'static>(
    machine: &Machine,
    main: impl FnOnce() -> R + Send + 'static,
) -> Result<(R, Ran), TimedError> {
    assert!(WORLD.get().is_null(), "a virtual machine is started from outside of every other");
    let costs = &machine.costs;
    let timing = Timing {
        wake_latency: ps(costs.wake_latency),
        switch: ps(costs.switch),
        slice: ps(costs.slice).max(1),
        transfer: ps(costs.transfer),
    };
    let world = World {
        inner: UnsafeCell::new(Inner {
            clock: Clock::new(machine.cpus, timing),
            prices: Prices::new(costs),
            costs: costs.clone(),
            tasks: Vec::new(),
            begun: Vec::new(),
            coroutines: Vec::new(),
            next: None,
            quiet: OUTSIDE,
            futexes: Words::default(),
            lines: Words::default(),
            regions: Vec::new(),
            operations: 0,
            switches: 0,
        }),
    };
    let result = Rc::new(RefCell::new(None));
    let slot = AssertSend(result.clone());
    WORLD.set(&raw const world);
    let leave = Leave;
    world.start(
        "main",
        Box::new(move || {
            let slot = slot;
            let done = main();
            *slot.0.borrow_mut() = Some(done);
        }),
    );
    let outcome = world.drive();
    drop(leave);
    if outcome.is_err() {
        // Dropping a suspended task would unwind it, and its destructors would wait for others.
        std::mem::forget(world);
    }
    let ran = outcome?;
    let done = result.borrow_mut().take();
    done.map(|done| (done, ran)).ok_or_else(|| TimedError::Panicked("without a result".into()))
}

/// Sent nowhere: a task runs on the thread that made it.
struct AssertSend<T>(T);

// SAFETY: tasks of a world never leave its thread.
unsafe impl<T> Send for AssertSend<T> {}

/// Leaves the world, also when unwinding.
struct Leave;

impl Drop for Leave {
    fn drop(&mut self) {
        WORLD.set(std::ptr::null());
    }
}

impl World {
    fn start(&self, name: &str, body: Body) -> u32 {
        let inner = self.inner();
        let id = inner.clock.started();
        inner.tasks.push(Task {
            name: name.to_owned(),
            yielder: std::ptr::null(),
            joiners: Vec::new(),
            panic: None,
            last_word: 0,
            serving: 0,
        });
        inner.coroutines.push(None);
        inner.begun.push((id, body));
        id
    }

    /// Makes the coroutine of a task that goes on for the first time.
    fn begin(&self, id: u32) -> Result<(), TimedError> {
        let inner = self.inner();
        let Some(place) = inner.begun.iter().position(|begun| begun.0 == id) else { return Ok(()) };
        let (_, body) = inner.begun.swap_remove(place);
        let stack = DefaultStack::new(STACK).map_err(|error| TimedError::Stack(error.to_string()))?;
        let coroutine = Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
            let Some(world) = current_world() else { return };
            world.inner().tasks[id as usize].yielder = std::ptr::from_ref(yielder);
            let ended = panic::catch_unwind(AssertUnwindSafe(body));
            if let Some(world) = current_world() {
                world.inner().tasks[id as usize].panic = ended.err();
            }
        });
        inner.coroutines[id as usize] = Some(coroutine);
        Ok(())
    }

    fn drive(&self) -> Result<Ran, TimedError> {
        self.inner().next = self.inner().clock.next();
        while let Some(id) = self.inner().next.take() {
            self.begin(id)?;
            let Some(mut coroutine) = self.inner().coroutines[id as usize].take() else { break };
            match coroutine.resume(()) {
                CoroutineResult::Yield(()) => self.inner().coroutines[id as usize] = Some(coroutine),
                CoroutineResult::Return(()) => {
                    let inner = self.inner();
                    let joiners = std::mem::take(&mut inner.tasks[id as usize].joiners);
                    for joiner in joiners {
                        inner.clock.wake(joiner);
                    }
                    if id == 0
                        && let Some(payload) = inner.tasks[0].panic.take()
                    {
                        return Err(TimedError::Panicked(text(&*payload)));
                    }
                    inner.clock.ended();
                    inner.next = inner.clock.next();
                }
            }
        }
        let inner = self.inner();
        let waiting: Vec<&str> = (0..inner.tasks.len())
            .filter(|&id| !inner.clock.has_ended(id as u32))
            .map(|id| inner.tasks[id].name.as_str())
            .collect();
        let ns = inner.clock.latest() / 1000;
        if !waiting.is_empty() {
            return Err(TimedError::Deadlock { ns, who: waiting.join(", ") });
        }
        let (operations, switches, tasks) = (inner.operations, inner.switches, inner.tasks.len() as u32);
        Ok(Ran { ns, operations, switches, tasks })
    }
}

fn text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().cloned();
    text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "(no text)".into())
}

struct TimedJoin(u32);

impl Join for TimedJoin {
    fn join(self: Box<Self>) -> Result<(), Box<dyn Any + Send>> {
        let Some(world) = current_world() else { return Ok(()) };
        while !world.inner().clock.has_ended(self.0) {
            let me = world.task();
            world.inner().tasks[self.0 as usize].joiners.push(me);
            world.sleep(None);
        }
        world.inner().tasks[self.0 as usize].panic.take().map_or(Ok(()), Err)
    }
}

/// The executing task's operations take no time until `body` is over: it sets up, or checks. Sleeping still does.
pub fn quiet<R>(body: impl FnOnce() -> R) -> R {
    struct Before(u32);
    impl Drop for Before {
        fn drop(&mut self) {
            if let Some(world) = current_world() {
                world.inner().quiet = self.0;
            }
        }
    }
    let _before = current_world().map(|world| {
        let before = world.inner().quiet;
        world.inner().quiet = world.task();
        Before(before)
    });
    body()
}

/// The executing task keeps its CPU and does nothing until the clock says `until` ([`Platform::ticks`]), or until the word changes that it loaded last.
pub fn idle_until(until: u64) {
    if let Some(world) = current_world() {
        let me = world.task() as usize;
        let word = world.inner().tasks[me].last_word;
        world.spin(word, until);
    }
}

/// The executing task computes for so long.
pub fn charge_ns(ns: f64) {
    if let Some(world) = current_world() {
        world.spend(ps(ns));
    }
}

/// The prices in effect.
fn costs() -> &'static Costs {
    match current_world() {
        Some(world) => &world.inner().costs,
        None => {
            static NONE: std::sync::OnceLock<Costs> = std::sync::OnceLock::new();
            NONE.get_or_init(Costs::default)
        }
    }
}

#[cfg(test)]
mod tests;
