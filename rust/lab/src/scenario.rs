//! Scenarios: operations as data.
//!
//! **Guarantee.** A scenario says everything that a run depends on: the VM, what each thread does in which order, what the threads wait for, the seed. The same value can be
//! printed, stored, measured on the real platform and, later, explored on a simulated one.
//!
//! **Mechanism.** A thread is a list of [`Op`]s. Threads meet through flags: one raises, others await. What is measured is named by a [`Mark`].

use serde::{Deserialize, Serialize};

/// A whole experiment, as data.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Scenario {
    /// What a KVM engineer would call it.
    pub name: String,
    /// The VM.
    pub vm: VmSpec,
    /// Before the threads start: how guest memory gets mapped; `None`: not at all.
    pub populate: Option<Populate>,
    /// What runs.
    pub threads: Vec<Thread>,
    /// Seed of every random choice.
    pub seed: u64,
}

/// The VM of a scenario. Names as on the command line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmSpec {
    /// Kernel profile with switches.
    pub profile: String,
    /// Zap design.
    pub design: String,
    /// Passes.
    pub passes: String,
    /// Owner of the first reference.
    pub ownership: String,
    /// vCPUs that exist.
    pub vcpus: usize,
    /// Root level.
    pub levels: u8,
    /// Guest memory in bytes, in slots from gfn 0 on.
    pub memory_bytes: u64,
    /// Largest leaf level.
    pub level: u8,
    /// Cap of the table pool in pages.
    pub max_tables: u32,
    /// Workers of designs with a queue.
    pub workers: usize,
    /// none, voluntary or full.
    pub preempt: String,
    /// CPU time after which a task is asked to yield.
    pub tick_ns: u64,
    /// Write Dirty and Accessed back.
    pub write_back: bool,
    /// Measure step_ns instead of step_units.
    pub step_ns: bool,
    /// Every n-th check yields.
    pub force_yield: Option<u32>,
}

/// Who does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Who {
    /// A vCPU thread.
    Vcpu(usize),
    /// A thread of the VMM: ioctls.
    Caller,
}

/// One thread of a scenario.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Thread {
    /// Who it is.
    pub who: Who,
    /// What it does, in order.
    pub ops: Vec<Op>,
}

/// Something that threads wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Flag {
    WarmedUp,
    HolderReady,
    BaselineDone,
    HolderGone,
    Dropped,
    Refault,
}

/// Flags that exist.
pub const FLAGS: usize = Flag::Refault as usize + 1;

/// What a measured operation is booked under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Mark {
    /// A drop of the last reference.
    Drop,
    /// The same where others still hold the root.
    Baseline,
}

/// How the leaves are put there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum By {
    /// In bulk.
    Bulk,
    /// By racing faults of all vCPUs.
    Faults,
}

/// Dirty and Accessed of the leaves at t0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ad {
    /// Neither.
    Clean,
    /// Accessed.
    Accessed,
    /// Both.
    Dirty,
}

/// All of the guest's memory is mapped under the root of vCPU 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Populate {
    /// How.
    pub by: By,
    /// A/D state of the leaves (faults leave what the access left).
    pub ad: Ad,
}

/// One operation of a thread.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Op {
    /// Wants a root of the other role from now on (CR0.WP toggled).
    SwitchRole,
    /// Loads a root, if none is loaded.
    Load,
    /// Puts every root.
    Unload,
    /// Drops every root and loads one again, `times` times, each timed.
    DropRoot {
        /// Booked under.
        mark: Mark,
        /// How often.
        times: u64,
        /// SPTEs faulted in before each drop.
        sptes: u64,
    },
    /// Runs guest code: random accesses to a working set, one each `arrival_ns` (open loop), until the flag is raised.
    Guest {
        /// Pages of the working set.
        pages: u64,
        /// Time between two intended starts.
        arrival_ns: u64,
        /// Of 100 accesses this many are writes.
        write_percent: u8,
        /// Ends when raised.
        until: Flag,
    },
    /// Touches each page of the working set once.
    Touch {
        /// Pages of the working set.
        pages: u64,
    },
    /// Deletes the extra memslot: a memslot update, with its fast zap, timed.
    DeleteMemslot,
    /// Waits until everything that was to be torn down is, and its tables are back.
    AwaitTeardown,
    /// Sleeps.
    SleepMs(u64),
    /// Raises a flag.
    Raise(Flag),
    /// Waits for a flag to be raised `count` times.
    Await {
        /// Which.
        flag: Flag,
        /// How often it must have been raised.
        count: u32,
    },
}

/// Waits for one raise.
pub fn wait(flag: Flag) -> Op {
    Op::Await { flag, count: 1 }
}
