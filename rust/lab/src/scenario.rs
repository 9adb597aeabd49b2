//! Scenarios: operations as data.
//!
//! **Guarantee.** A scenario says everything that a run depends on: the VM, what each thread does in which order, what the threads wait for, the seed. The same value can be
//! printed, stored, measured on the real platform and, later, explored on a simulated one.
//!
//! **Mechanism.** A thread is a list of [`Op`]s. Threads meet through flags: one raises, others await. What is measured is named by a [`Mark`].

use serde::{Deserialize, Serialize};

use crate::memory::Estimate;

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
    /// Who pays for the teardown: the thread whose operation is measured. `None`: nobody's thread, the end of the VM is.
    pub pays: Option<Who>,
    /// Leaves and tables that the guest comes to: touched before the clock runs, counted at t0.
    pub estimate: Estimate,
    /// Leaves that must be mapped at t0; `None`: as many as the guest has got to by then.
    pub sptes: Option<u64>,
}

/// The VM of a scenario. Names as on the command line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmSpec {
    /// Kernel profile with switches.
    pub profile: String,
    /// Zap design.
    pub design: String,
    /// Passes; `-`: the shadow MMU has none, nor an owner of first references.
    pub passes: String,
    /// Owner of the first reference.
    pub ownership: String,
    /// What a design of the shadow MMU runs with; `None`: a design of the TDP MMU.
    pub shadow: Option<ShadowSpec>,
    /// vCPUs that exist.
    pub vcpus: usize,
    /// Root level.
    pub levels: u8,
    /// Guest memory in bytes, in slots from gfn 0 on.
    pub memory_bytes: u64,
    /// Level of the host's mappings, hence of the leaves.
    pub level: u8,
    /// Largest leaf level that the VM may use, should the host's mappings grow.
    pub max_level: u8,
    /// Address space 1 (SMM) has the same memslots.
    pub smm: bool,
    /// Cap of the table pool in pages.
    pub max_tables: u32,
    /// Workers of designs with a queue.
    pub workers: usize,
    /// Where worker n runs: on CPU `worker_cpus[n % len]`; empty: anywhere.
    pub worker_cpus: Vec<usize>,
    /// The queue: `per-vm` or `system`; `None`: the design's own.
    pub worker_queue: Option<String>,
    /// Where vCPU n runs: on CPU `vcpu_cpus[n % len]`; empty: anywhere.
    pub vcpu_cpus: Vec<usize>,
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
    /// Tasks record what they do when.
    pub record: bool,
    /// The RCU domain logs what waits for a grace period.
    pub log: bool,
}

/// The shadow MMU of a scenario. Names as on the command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShadowSpec {
    /// `direct`, or `guest`: the guest's own page tables are shadowed.
    pub paging: String,
    /// How freed pages are kept from lockless walkers.
    pub reclaim: String,
    /// Most shadow pages; `None`: no limit.
    pub quota: Option<u32>,
}

/// Who does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Who {
    /// A vCPU thread.
    Vcpu(usize),
    /// A thread of the VMM: ioctls.
    Caller,
    /// Another thread of the VMM, or of the host.
    Other(usize),
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
    UserGone,
    Promoted,
    Awake,
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
    /// Of these, the drops that woke a worker.
    DropWoken,
    /// The same where others still hold the root.
    Baseline,
    /// A memslot update with its fast zap.
    Update,
    /// What arrived during the zap, from its call to its return.
    Waiting,
    /// A halted vCPU: from being woken to its first completed access.
    Wake,
    /// A fault that replaces tables by a huge page.
    Replace,
    /// What had to be done before the zap, once (dirty logging).
    Prepare,
    /// A memslot deleted and made again.
    Cycle,
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
    /// Under so many roots, each of a role of its own, of which vCPU 0 caches up to four.
    pub roots: usize,
    /// And once more in address space 1, by this vCPU, which stays in SMM.
    pub smm: Option<usize>,
}

/// How the working sets of the vCPUs overlap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sharing {
    /// Each vCPU has its own stretch of memory.
    #[default]
    Local,
    /// vCPU i writes its own stretch and reads what vCPU i - 1 writes.
    Pipeline,
    /// All vCPUs read and write the same stretch.
    Global,
}

impl Sharing {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Sharing::Local => "local",
            Sharing::Pipeline => "pipeline",
            Sharing::Global => "global",
        }
    }
}

/// Guest code.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GuestCode {
    /// Pages of the working set.
    pub pages: u64,
    /// Time between two intended starts (open loop).
    pub arrival_ns: u64,
    /// Of 100 accesses this many are writes.
    pub write_percent: u8,
    /// Whose pages it touches.
    pub sharing: Sharing,
    /// Ascending through the working set, as firmware goes through memory; else at random.
    pub ascending: bool,
    /// Maps and caches the working set before anybody measures.
    pub warm: bool,
    /// The host moves the vCPU to the next CPU so often.
    pub migrate_ns: Option<u64>,
    /// The vCPU toggles CR0.WP so often, a few times for each update, which drops its roots and loads one again.
    pub toggle_ns: Option<u64>,
    /// After each pass through its working set the vCPU halts for so long (and accesses come as fast as they go).
    pub rest_ns: Option<u64>,
    /// Ends when raised.
    pub until: Flag,
}

/// How a vCPU loses its roots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Drop {
    /// All are put, and one is loaded again for guest entry: CR0.WP toggled.
    Toggle,
    /// An SMI and its RSM, each of which resets the MMU context; roots loaded for both entries.
    Smi,
    /// All are put, and that is all: the vCPU of a dying VM.
    Unload,
}

/// A memslot update that zaps everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Update {
    /// The extra memslot is deleted.
    Delete,
    /// The extra memslot is moved to other gfns.
    Move,
    /// No memslot changes: an nx_huge_pages toggle.
    NxToggle,
}

/// What comes from another thread while the zap runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Intruder {
    /// Another memslot update, one that zaps nothing: it waits for slots_lock.
    Update,
    /// The host unmaps pages of the guest's memory: each notifier call waits for mmu_lock.
    Notifier,
}

/// One operation of a thread.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Op {
    /// Wants a root of role variant `n` from now on: 0 the common one, 1 with CR0.WP toggled, 2 with EFER.NX, 3 with both.
    SwitchRole(usize),
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
        /// By what.
        by: Drop,
    },
    /// An SMI: address space 1 from now on.
    EnterSmm,
    /// Touches the first page of each of the first so many pieces of this level, each timed: a huge page takes the place of a table.
    Replace {
        /// Pieces.
        pieces: u64,
        /// 2 or 3.
        level: u8,
    },
    /// Runs guest code until a flag is raised.
    Guest(GuestCode),
    /// Touches each page of the working set once.
    Touch {
        /// Pages of the working set.
        pages: u64,
        /// Whose pages.
        sharing: Sharing,
    },
    /// HLT until another thread wakes the vCPU; then makes one access, timed.
    Halt,
    /// A memslot update, with its fast zap, timed.
    Zap(Update),
    /// The extra memslot is deleted and created again so often, each deletion timed.
    Churn {
        /// Cycles.
        cycles: u64,
        /// Between two cycles.
        pause_us: u64,
        /// Each begins when so many leaves are mapped, or after five seconds.
        full: u64,
    },
    /// Waits for t0, then intrudes on the zap until its teardown is over, each call timed.
    Intrude(Intruder),
    /// Wakes a halted vCPU.
    Wake(usize),
    /// Dirty logging begins in all of the guest's memory, timed: huge pages are split.
    StartDirtyLog,
    /// The last file descriptor of the VM is closed: it has no user any more.
    ReleaseUser,
    /// The host maps the first so many pieces by pages of this level from now on (khugepaged).
    Promote {
        /// Pieces.
        pieces: u64,
        /// 2 or 3.
        level: u8,
    },
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
