//! What the engine is told: operations, the host's answers, and order. Nothing else can be said in these types.
//!
//! An [`Input`] stands where it takes effect against mmu_lock (`conformance.md`, section 1): a fault that maps at the line that the kernel prints with the
//! lock held, a notification at the zap that follows its announcement, an operation at the first thing that it does under the lock.

/// No operation was open.
pub const NO_OP: u32 = u32::MAX;

/// What the guest did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AccessKind {
    /// A write.
    pub write: bool,
    /// An instruction fetch.
    pub exec: bool,
}

/// How a fault that reached the mapping stage ended, as far as order is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landed {
    /// It wrote, or would have: `writable` is the host's answer.
    Page {
        /// The host maps the page writable.
        writable: bool,
    },
    /// It made an MMIO entry.
    Mmio,
    /// Another vCPU was faster, or nothing was to be done: the guest came again.
    Lost,
}

/// One thing that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Was found to belong elsewhere.
    Nothing,
    /// The operation itself.
    Script,
    /// A vCPU enters the guest: requests are serviced, a root is loaded.
    Enter,
    /// The thread leaves KVM_RUN.
    Leave,
    /// The guest faults.
    Fault {
        /// The vCPU.
        vcpu: u32,
        /// Faulting gfn.
        gfn: u64,
        /// What the guest did.
        access: AccessKind,
        /// Hardware found a present entry.
        present: bool,
    },
    /// A fault reaches the mapping stage.
    Map {
        /// The vCPU; `None`: that of the operation.
        vcpu: Option<u32>,
        /// Faulting gfn.
        gfn: u64,
        /// The host's frame behind it.
        pfn: u64,
        /// Level as printed: min(host, caps).
        level: u8,
        /// What the guest did.
        access: AccessKind,
        /// Asked for by user space, not by the guest.
        prefetch: bool,
        /// How it ended.
        landed: Landed,
    },
    /// Recordings without fault events: a thread in KVM_RUN walked to a gfn.
    Walk {
        /// The gfn.
        gfn: u64,
    },
    /// The host takes `[start, end)` away; host virtual bytes.
    Unmap {
        /// First byte.
        start: u64,
        /// Exclusive end.
        end: u64,
        /// From inside another invalidation, or for a write.
        inner: bool,
    },
    /// The host asks whether `[start, end)` was used, and forgets.
    Age {
        /// First byte.
        start: u64,
        /// Exclusive end.
        end: u64,
    },
    /// A vCPU enters or leaves SMM.
    Smm {
        /// The vCPU.
        vcpu: u32,
        /// Enters.
        entering: bool,
    },
    /// The recovery worker takes a table.
    NxZap,
    /// A worker of the zap queue begins an item.
    Work,
    /// A walk that had given up mmu_lock goes on.
    Restart {
        /// Entries that the walk's operation had changed before it gave up the lock.
        after: u32,
        /// Where it goes on, if that is recorded.
        gfn: Option<u64>,
    },
    /// A walk goes on that kept mmu_lock while others faulted.
    Resume {
        /// Entries that the walk's operation had changed before they did.
        after: u32,
    },
    /// The VM's memory goes away (mmu_notifier release).
    Release,
    /// KVM's statistics were read here.
    Stat,
}

impl What {
    /// Its name in results.
    pub fn name(&self) -> &'static str {
        match self {
            What::Nothing => "nothing",
            What::Script => "operation",
            What::Enter => "enter",
            What::Leave => "leave",
            What::Fault { .. } => "fault",
            What::Map { prefetch: true, .. } => "prefault",
            What::Map { .. } | What::Walk { .. } => "map",
            What::Unmap { .. } => "unmap",
            What::Age { .. } => "age",
            What::Smm { .. } => "smm",
            What::NxZap => "nx_recovery",
            What::Work => "worker",
            What::Restart { .. } => "restart",
            What::Resume { .. } => "resume",
            What::Release => "release",
            What::Stat => "stat",
        }
    }
}

/// One thing that happened, who did it and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Input {
    /// Line of the trace at which it takes effect.
    pub line: u64,
    /// Thread, an index.
    pub thread: u32,
    /// Operation open in that thread, an index into the script; [`NO_OP`] without one.
    pub op: u32,
    /// What.
    pub what: What,
}
