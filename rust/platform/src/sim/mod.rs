//! The simulated platform: every interleaving is chosen, and can be had again.
//!
//! **Guarantee.** [`run`] executes tasks that use [`Sim`] as their [`crate::Platform`], one step at a time on one OS thread. The same configuration makes the same run, step
//! by step ([`Run::hash`]): nothing but the strategy's seed decides, no clock, no address, no order of a hash map. Everything that was chosen against the default
//! is in [`Run::schedule`], a short text that replays. It sees what two CPUs of an x86 machine could make of the same steps: sequential consistency, or TSO.
//!
//! **Mechanism.**
//! * A *point* is a place where the running task may be changed: before each access to a shared word that another task can care for, before and after locks and read
//!   sections, where the engine says so. Between two points a task runs undisturbed, so that an operation and the report of it are one.
//! * Tasks are coroutines ([`coroutine`]); [`scheduler`] chooses at points, on blocking and at ends; [`memory`] decides which access is a point and keeps
//!   the store buffers; [`lock`] and [`rcu`] are the simulation's own, the sleeping mutex and the work queue are the real platform's over a simulated futex.
//! * Strategies ([`Strategy`]): random; PCT with its bound; depth first with a bound on preemptions; replay; a targeted pair of sites. Each has what it was asked in
//!   numbers of tasks and sites only.
//! * The clock counts steps. A check yields when the lock is contended or when the schedule says so.
//! * A violation, a panic, a deadlock or too many steps end the run; its tasks are unwound, and nothing of it is left.
//!
//! **Limits.** What the compiler may make of weaker orderings than the platform's (C11 beyond TSO) is not seen here: for the small protocols loom looks at that (`tests/loom_*.rs`).
//! Hardware page walkers exist as far as the engine models them. Words that the engine touches without the platform (reference counts in `std` atomics, queues
//! under a mutex) are sequentially consistent and no points by themselves; under TSO they do not empty the store buffer, so that a program that relies on such a
//! read-modify-write as its barrier looks worse here than it is. A run proves nothing about schedules that were not run: [`pct_bound`] says what many runs buy.
//!
//! **Rules for code that runs here.** No lock of `std` is held across a call of the platform, no thread of `std` is started and waited for, no thread-local
//! stands for a task.

mod config;
mod coroutine;
mod lifecycle;
mod lock;
mod memory;
mod minimise;
mod platform;
mod rcu;
mod report;
mod schedule;
mod scheduler;
mod strategy;
pub mod time;
mod world;

pub use self::{
    config::{Limits, Memory, SimConfig, Strategy},
    lock::SimRwLock,
    minimise::minimise,
    platform::Sim,
    rcu::{SimRcu, SimReader},
    report::{CellName, End, Kind, Run, SimViolation, SiteCount, SiteCounts, Step},
    schedule::{Choice, Schedule, ScheduleError, Turn},
    strategy::{DfsState, pct_bound, pct_runs},
};
pub use crate::fault::InjectedPanic;
use crate::site::Site;

/// What a freed table is filled with: no present entry in either format, and no value that the engine ever writes. Whoever finds it in memory came too late.
pub const POISON: u64 = 0xDEAD_0000_0000_05E0;

/// Runs `main` as task 0 under `config`, until every task has ended or the run has failed.
///
/// # Panics
/// Inside of a run.
pub fn run(config: SimConfig, main: Box<dyn FnOnce()>) -> Run {
    lifecycle::run(config, main)
}

/// Tells the run that a rule was broken; false outside of a run, and once it is over.
pub fn violation(rule: &'static str, what: String) -> bool {
    world::with(|world| {
        let open = world.abandoned.is_none();
        world.violation(rule, what);
        open
    })
    .unwrap_or(false)
}

/// Runs `f` without scheduling: for what is made or checked and is not to be explored. It may block, and then others run.
pub fn quiet<R>(f: impl FnOnce() -> R) -> R {
    struct Loud;
    impl Drop for Loud {
        fn drop(&mut self) {
            world::with(|world| world.task().quiet -= 1);
        }
    }
    let _loud = world::with(|world| {
        world.drain_all(world.current);
        world.task().quiet += 1;
        Loud
    });
    f()
}

/// Puts words into the log of a recorded run; they are made only then.
pub fn note(text: impl FnOnce() -> String) {
    if world::with(|world| world.record).unwrap_or(false) {
        let text = text();
        world::with(|world| world.note(Site::Spin, Kind::Note, 0, 0, || text));
    }
}

/// Points passed so far; 0 outside of a run.
pub fn now() -> u64 {
    world::with(|world| world.steps).unwrap_or(0)
}

/// The running task: index into [`Run::tasks`].
pub fn current() -> Option<u32> {
    world::with(|world| world.current)
}

/// A name for the words of a region; see [`crate::Platform::name_words`].
pub fn name_region(base: usize, bytes: usize, name: impl Fn(usize) -> String + Send + Sync + 'static) {
    world::with(|world| {
        world.regions.push(world::Region { base, bytes, name: std::sync::Arc::new(name) });
    });
}
