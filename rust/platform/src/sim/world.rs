//! The world of a run: its tasks, its clock, its books.
//!
//! One world per OS thread at a time, found through a thread-local. It is borrowed for short stretches only, never across a switch and never across a call of
//! code that may call the platform.

use std::{any::Any, cell::Cell, collections::VecDeque, ptr, sync::Arc, sync::atomic::AtomicU64};

use super::{
    config::{Limits, Memory, SimConfig, Strategy},
    coroutine::{Stack, Way},
    report::{CellName, End, Kind, SimViolation, SiteCounts, Step},
    schedule::{Choice, Schedule, Turn},
    strategy::Chooser,
};
use crate::{
    bug::Bug,
    fault::{Fault, Faults},
    site::Site,
};

thread_local! {
    static WORLD: Cell<*mut World> = const { Cell::new(ptr::null_mut()) };
    static BORROWED: Cell<bool> = const { Cell::new(false) };
}

static NEXT_WORLD: AtomicU64 = AtomicU64::new(1);

/// What the payload of a task's panic is.
pub(super) type Payload = Box<dyn Any + Send>;

/// The payload that unwinds the tasks of an abandoned run.
pub(super) struct Abandoned;

/// Whether a task can go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    Ready,
    /// Until another task has made a step.
    Relaxed,
    /// Until the step counter reaches this, or nobody else can go on.
    Paused(u64),
    /// On a key, with words for people.
    Blocked(usize, &'static str),
    Ended,
}

/// A store on its way to memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub cell: *const AtomicU64,
    pub value: u64,
    pub site: Site,
}

/// A task of the run.
pub(super) struct Task {
    pub name: String,
    pub state: State,
    pub stack: Option<Stack>,
    pub way: Option<Way>,
    /// Stores that only this task sees.
    pub buffer: VecDeque<Pending>,
    /// Depth of [`super::quiet`].
    pub quiet: u32,
    pub serving: usize,
    /// Of the engine's task that it made last.
    pub task_id: Option<u32>,
    /// Its own counts: points, stores, checks, questions.
    pub counts: Counts,
    /// Accesses so far.
    pub accesses: u64,
    pub voluntary: u64,
    pub involuntary: u64,
    /// Its panic, for whoever joins.
    pub payload: Option<Payload>,
    /// The unwinding of an abandoned run has begun here.
    pub unwinding: bool,
    /// Calls made while unwinding.
    pub late_calls: u64,
    /// Holds of reader-writer locks, and accesses when the step began.
    pub held: u32,
    pub step_since: u64,
    /// Levels of read sections, and accesses when the outermost began.
    pub sections: u32,
    pub section_since: u64,
    /// Deadline of a wait, in ticks.
    pub deadline: Option<u64>,
}

/// Places in a task's life that schedules can name.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub points: u32,
    pub stores: u32,
    pub checks: u32,
    pub questions: u32,
}

/// Words with names.
pub(super) struct Region {
    pub base: usize,
    pub bytes: usize,
    pub name: Arc<dyn Fn(usize) -> String + Send + Sync>,
}

/// Everything that a run owns.
pub(super) struct World {
    pub number: u64,
    pub tasks: Vec<Task>,
    pub current: u32,
    /// Tasks that can go on, ascending.
    pub ready: Vec<u32>,
    /// Tasks whose buffers hold stores, ascending.
    pub buffered: Vec<u32>,
    /// How many are in these states.
    pub relaxed: u32,
    pub paused: u32,
    pub timed: u32,
    pub alive: u32,
    pub width: u32,
    /// Who waits on which key, in order of arrival.
    pub waiters: VecDeque<(usize, u32)>,
    pub chooser: Chooser,
    pub memory: Memory,
    pub regions: Vec<Region>,
    /// Of each index of a page: hot.
    pub hot: Box<[bool; 512]>,
    pub bug: Option<Bug>,
    pub faults: Option<Arc<dyn Faults>>,
    /// Questions for faults are counted.
    pub faulty: bool,
    pub asked: [u64; Fault::ALL.len()],
    pub yield_percent: u8,
    pub stop_at_violation: bool,
    pub limits: Limits,
    pub max_steps: u64,
    /// For loops that come to no point.
    pub max_accesses: u64,
    /// Points and accesses so far; clock readings.
    pub steps: u64,
    pub accesses: u64,
    pub readings: u64,
    pub choices: u64,
    pub hash: u64,
    pub preemptions: u32,
    pub turns: Vec<Turn>,
    pub sites: SiteCounts,
    pub violations: Vec<SimViolation>,
    pub record: bool,
    pub log: Vec<Step>,
    pub longest_rcu: u64,
    pub longest_step: u64,
    pub task_ids: u32,
    /// The next point ends the run.
    pub stopping: bool,
    /// The run is over before its end, and why.
    pub abandoned: Option<End>,
    pub leaked: u32,
}

impl World {
    pub fn new(config: SimConfig) -> Self {
        let SimConfig { strategy, memory, max_steps, hot, bug, faults, yield_percent, .. } = config;
        let (memory, faults, faulty) = match &strategy {
            Strategy::Replay(schedule) => (schedule.memory, None, schedule.has_faults()),
            _ => (memory, faults.clone(), faults.is_some()),
        };
        let mut is_hot = Box::new([false; 512]);
        for index in hot {
            is_hot[usize::from(index) % 512] = true;
        }
        World {
            number: NEXT_WORLD.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            tasks: Vec::new(),
            current: 0,
            ready: Vec::new(),
            buffered: Vec::new(),
            relaxed: 0,
            paused: 0,
            timed: 0,
            alive: 0,
            width: 0,
            waiters: VecDeque::new(),
            chooser: Chooser::new(strategy, memory),
            memory,
            regions: Vec::new(),
            hot: is_hot,
            bug,
            faults,
            faulty,
            asked: [0; Fault::ALL.len()],
            yield_percent,
            stop_at_violation: config.stop_at_violation,
            limits: config.limits,
            max_steps,
            max_accesses: max_steps.saturating_mul(1_000).saturating_add(10_000_000),
            steps: 0,
            accesses: 0,
            readings: 0,
            choices: 0,
            hash: 0,
            preemptions: 0,
            turns: Vec::new(),
            sites: SiteCounts::default(),
            violations: Vec::new(),
            record: config.record,
            log: Vec::new(),
            longest_rcu: 0,
            longest_step: 0,
            task_ids: 0,
            stopping: false,
            abandoned: None,
            leaked: 0,
        }
    }

    #[inline(always)]
    pub fn task(&mut self) -> &mut Task {
        &mut self.tasks[self.current as usize]
    }

    #[inline(always)]
    pub fn mix(&mut self, what: u64) {
        self.hash = (self.hash.rotate_left(23) ^ what).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    /// The clock: a function of the steps made, and it moves with each look at it.
    pub fn ticks(&mut self) -> u64 {
        self.readings += 1;
        self.time()
    }

    pub fn time(&self) -> u64 {
        self.accesses * 4 + self.steps * 4 + self.readings
    }

    pub fn turn(&mut self, task: u32, at: u32, choice: Choice) {
        self.turns.push(Turn { task, at, choice });
    }

    pub fn violation(&mut self, rule: &'static str, what: String) {
        if self.abandoned.is_some() {
            return;
        }
        let (task, at) = (Some(self.current), self.steps);
        self.note(Site::Spin, Kind::Note, 0, 0, || format!("violation: {rule}: {what}"));
        self.violations.push(SimViolation { rule, what, task, at });
        self.stopping |= self.stop_at_violation;
    }

    /// The run ends here; its tasks are unwound.
    pub fn abandon(&mut self, end: End) {
        if self.abandoned.is_some() {
            return;
        }
        self.abandoned = Some(end);
        for task in 0..self.tasks.len() as u32 {
            self.drain_all(task);
        }
    }

    /// Puts a step without a word into the log.
    #[inline]
    pub fn note(&mut self, site: Site, kind: Kind, old: u64, new: u64, text: impl FnOnce() -> String) {
        if self.record {
            let (at, task) = (self.steps, self.current);
            self.log.push(Step { at, task, site, kind, cell: None, old, new, text: text() });
        }
    }

    /// The region that holds an address, by number.
    #[inline]
    pub fn region(&self, address: usize) -> Option<(usize, usize)> {
        self.regions
            .iter()
            .position(|region| address.wrapping_sub(region.base) < region.bytes)
            .map(|i| (i, address - self.regions[i].base))
    }

    pub fn cell_name(&self, address: usize) -> Option<CellName> {
        let (i, offset) = self.region(address)?;
        Some(CellName { region: (self.regions[i].name)(offset), index: (address & 0xfff) >> 3 })
    }

    /// The schedule that was run.
    pub fn schedule(&mut self) -> Schedule {
        Schedule { seed: self.chooser.seed(), memory: self.memory, turns: std::mem::take(&mut self.turns) }
    }
}

/// The world of the calling OS thread; null outside of a run.
#[inline(always)]
pub(super) fn current() -> *mut World {
    WORLD.get()
}

/// Borrows the world; `None` without one, and while it is borrowed already (a panic's hook, or a plan of faults that asks the platform). `f` must not switch.
#[inline(always)]
pub(super) fn with<R>(f: impl FnOnce(&mut World) -> R) -> Option<R> {
    struct Returned;
    impl Drop for Returned {
        fn drop(&mut self) {
            BORROWED.set(false);
        }
    }
    let world = WORLD.get();
    if world.is_null() || BORROWED.replace(true) {
        return None;
    }
    let _returned = Returned;
    // SAFETY: `WORLD` holds the box of a run in progress on this very OS thread. Its tasks are coroutines of this thread, so
    // nobody else touches it, and no borrow is alive here: borrows are made by this function alone, one at a time by `BORROWED`.
    Some(f(unsafe { &mut *world }))
}

/// Makes `world` the world of this OS thread until the end of its run.
pub(super) fn enter(world: World) -> *mut World {
    assert!(WORLD.get().is_null(), "a simulated run inside a simulated run");
    let world = Box::into_raw(Box::new(world));
    WORLD.set(world);
    world
}

/// Takes the world away from its OS thread.
pub(super) fn leave(world: *mut World) -> Box<World> {
    WORLD.set(ptr::null_mut());
    // SAFETY: `enter` made the pointer from a box, and only `run` calls this, once.
    unsafe { Box::from_raw(world) }
}
