//! What can go wrong, with the value and the rule it broke.

use tdpmmu_shadow::GuestFault;
use tdpmmu_table::PoolError;

/// An error of the VM layer. Gfns and host virtual pages are in 4 KiB units and printed in hex.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VmError {
    /// A memslot update broke a rule of KVM_SET_USER_MEMORY_REGION (EINVAL).
    #[error("memslot {id} of address space {as_id}: {rule} (gfns {start:#x}..{end:#x})")]
    BadSlot {
        /// Address space.
        as_id: u8,
        /// Slot id.
        id: u16,
        /// First gfn asked for.
        start: u64,
        /// Exclusive end.
        end: u64,
        /// The rule.
        rule: &'static str,
    },
    /// Two memslots of one address space would overlap (EEXIST).
    #[error(
        "memslot {id} of address space {as_id} at gfns {start:#x}..{end:#x} overlaps memslot {other} at {other_start:#x}..{other_end:#x}"
    )]
    SlotOverlap {
        /// Address space.
        as_id: u8,
        /// Slot id.
        id: u16,
        /// First gfn asked for.
        start: u64,
        /// Exclusive end.
        end: u64,
        /// The slot in the way.
        other: u16,
        /// Its first gfn.
        other_start: u64,
        /// Its exclusive end.
        other_end: u64,
    },
    /// No such memslot.
    #[error("address space {as_id} has no memslot {id}")]
    NoSlot {
        /// Address space.
        as_id: u8,
        /// Slot id.
        id: u16,
    },
    /// A gfn range that no memslot covers, or that is empty.
    #[error("gfns {start:#x}..{end:#x} of address space {as_id}: {rule}")]
    BadRange {
        /// Address space.
        as_id: u8,
        /// First gfn.
        start: u64,
        /// Exclusive end.
        end: u64,
        /// The rule.
        rule: &'static str,
    },
    /// A host virtual page that cannot be used.
    #[error("host virtual page {hva:#x}: {rule}")]
    BadHva {
        /// The page number.
        hva: u64,
        /// The rule.
        rule: &'static str,
    },
    /// An answer of the host that cannot be.
    #[error("the host's answer {answer:x?}: {rule}")]
    BadAnswer {
        /// The answer.
        answer: crate::HostAnswer,
        /// The rule.
        rule: &'static str,
    },
    /// A dirty log was asked for in a way that KVM refuses.
    #[error("dirty log of memslot {id} of address space {as_id}: {value}: {rule}")]
    DirtyLog {
        /// Address space.
        as_id: u8,
        /// Slot id.
        id: u16,
        /// What was asked for.
        value: String,
        /// The rule.
        rule: &'static str,
    },
    /// The slot keeps no dirty log now (ENOENT).
    #[error("memslot {id} of address space {as_id} does not log dirty pages")]
    NotLogging {
        /// Address space.
        as_id: u8,
        /// Slot id.
        id: u16,
    },
    /// The VM collects dirty pages in rings, not in bitmaps, or the other way round (ENXIO).
    #[error("{what}: this VM collects dirty pages in {has}")]
    OtherLog {
        /// What was asked for.
        what: &'static str,
        /// What the VM has.
        has: &'static str,
    },
    /// The kernel of the profile does not have it (EINVAL).
    #[error("{what}: Linux {kernel} does not have it")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
        /// The profile's name.
        kernel: &'static str,
    },
    /// The modelled host has no room left.
    #[error("the modelled host has no room for {pages} more pages ({left} left)")]
    HostFull {
        /// Pages wanted.
        pages: u64,
        /// Pages left.
        left: u64,
    },
    /// The real host refused memory, a thread or address space.
    #[error("the host refused {what}: {reason}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// The host's word.
        reason: String,
    },
    /// Out of page-table pages.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The MMU refused its configuration.
    #[error("mmu: {0}")]
    Mmu(String),
    /// A configuration value broke a rule.
    #[error("{what} = {value}: {rule}")]
    Config {
        /// The field.
        what: &'static str,
        /// Its value.
        value: String,
        /// The rule.
        rule: &'static str,
    },
    /// No such vCPU.
    #[error("vCPU {vcpu}: the VM has {count}")]
    NoVcpu {
        /// Asked for.
        vcpu: usize,
        /// How many there are.
        count: usize,
    },
    /// The vCPU is in use by another thread; one thread at a time.
    #[error("vCPU {vcpu} is in use by another thread")]
    Busy {
        /// The vCPU.
        vcpu: usize,
    },
    /// A guest access that no CPU makes.
    #[error("an access to gfn {gfn:#x} that writes and fetches: each is an access of its own")]
    BadAccess {
        /// The gfn.
        gfn: u64,
    },
    /// The vCPU's dirty ring is soft-full (KVM_EXIT_DIRTY_RING_FULL): harvest and reset it, then run on.
    #[error("vCPU {vcpu}: its dirty ring is full; harvest and reset the rings")]
    RingFull {
        /// The vCPU.
        vcpu: usize,
    },
    /// The guest's own tables do not allow the access: the page fault is the guest's (an L1's, for an access of its L2), which maps the page and tries again.
    #[error("vCPU {vcpu}: {fault}")]
    GuestFault {
        /// The vCPU.
        vcpu: usize,
        /// What its tables said.
        fault: GuestFault,
    },
    /// A vCPU that translates by the guest's own tables was told of none yet.
    #[error("vCPU {vcpu} has no page tables yet: give it a CR3")]
    NoCr3 {
        /// The vCPU.
        vcpu: usize,
    },
    /// What only a vCPU on the TDP MMU has.
    #[error("{what}: only a vCPU on the TDP MMU has it; this one runs on shadow pages")]
    NeedsTdp {
        /// What was asked for.
        what: &'static str,
    },
    /// What only a vCPU on shadow pages, or a VM with a shadow MMU, has.
    #[error("{what}: {rule}")]
    NeedsShadow {
        /// What was asked for.
        what: &'static str,
        /// What it takes.
        rule: &'static str,
    },
    /// Every shadow page that the quota allows is in use, and none can be reclaimed.
    #[error("the quota of {quota} shadow pages is used up, and none can be reclaimed: roots in use stay")]
    Quota {
        /// Pages allowed.
        quota: u32,
    },
    /// The VM was closed.
    #[error("the VM is closed")]
    Closed,
    /// The caller asked for a stop.
    #[error("cancelled")]
    Cancelled,
    /// Closing found something that must not be.
    #[error("after the teardown {what}: {count}")]
    Leak {
        /// What was found.
        what: &'static str,
        /// How many.
        count: u64,
    },
}
