//! One exhibit: what went wrong, where history tells of it, and the program that can show it again.

use tdpmmu_platform::Bug;

use crate::program::Program;

/// What the world saw of a bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// A table, a root or a host page was used after it had been given away.
    UseAfterFree,
    /// A guest went on by a translation that was gone.
    StaleTlb,
    /// Memory or a reference was never given back.
    Leak,
    /// A count went below zero.
    Underflow,
    /// A guest's write was not seen.
    LostDirty,
    /// The guest saw, or the tables held, what nobody had written.
    Corruption,
    /// Somebody never came to an end.
    Hang,
    /// A CPU was kept, or a grace period held up, for too long.
    Lockup,
    /// A list or a pointer broke under the kernel.
    Crash,
    /// Correct, and too late.
    Latency,
    /// Correct, and too slow.
    Performance,
    /// The kernel's own assertion.
    Warning,
}

impl Class {
    /// Its name in lists.
    pub const fn name(self) -> &'static str {
        match self {
            Class::UseAfterFree => "use-after-free",
            Class::StaleTlb => "stale-tlb",
            Class::Leak => "leak",
            Class::Underflow => "underflow",
            Class::LostDirty => "lost-dirty",
            Class::Corruption => "corruption",
            Class::Hang => "hang",
            Class::Lockup => "lockup",
            Class::Crash => "crash",
            Class::Latency => "latency",
            Class::Performance => "performance",
            Class::Warning => "warning",
        }
    }
}

/// What shows a bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Catcher {
    /// The simulated platform, sequentially consistent: a schedule.
    Sim,
    /// The simulated platform with store buffers: a schedule, and stores that come late.
    Tso,
}

impl Catcher {
    /// Its name in results.
    pub const fn name(self) -> &'static str {
        match self {
            Catcher::Sim => "simulation",
            Catcher::Tso => "tso",
        }
    }
}

/// How a search is set up beside its program; the same with the bug on and off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hints {
    /// Schedules tried for each seed.
    pub schedules: u64,
    /// Steps after which a run counts as one that goes nowhere.
    pub max_steps: Option<u64>,
}

impl Hints {
    /// What does for most.
    pub const USUAL: Self = Self { schedules: 2000, max_steps: None };

    /// So many schedules for each seed.
    pub const fn schedules(mut self, schedules: u64) -> Self {
        self.schedules = schedules;
        self
    }

    /// A run of so many steps goes nowhere.
    pub const fn steps(mut self, steps: u64) -> Self {
        self.max_steps = Some(steps);
        self
    }
}

/// One exhibit. All texts are our own words.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The defect in the engine; its id is the exhibit's.
    pub bug: Bug,
    /// What it is, in a few words.
    pub title: &'static str,
    /// What the world saw.
    pub class: Class,
    /// The kernels that had it.
    pub kernels: &'static str,
    /// Where history tells of it: commits, reports.
    pub reference: &'static str,
    /// What was wrong.
    pub cause: &'static str,
    /// How it comes to pass.
    pub interleaving: &'static str,
    /// What catches it.
    pub catcher: Catcher,
    /// Whose schedules are searched.
    pub program: fn() -> Program,
    /// How.
    pub hints: Hints,
}

impl Entry {
    /// Its name on the command line.
    pub const fn id(&self) -> &'static str {
        self.bug.id()
    }
}
