//! Reclamation against lockless walkers: when a zapped shadow page may be used again.
//!
//! **Guarantee.** A walker that is inside a [`Section`] reads no page that has been given to somebody else: a page that was unlinked and handed to [`Reclamation::free`] goes back to the
//! pool only when every section that could have seen a link to it has ended. Hardware walkers are the flush's business, which [`Reclamation::free`] makes first, in every kind.
//!
//! **Mechanism.** Five kinds on the same tree, told apart by [`ReclaimKind`] and by nothing else in the crate. Freeing is one function: the pages go, as a [`DeadChain`], to
//! `TablePool::reclaim`, which counts, tells ([`tdpmmu_platform::Event::TableFree`]), poisons and quarantines. The kinds differ in *when*: at once, by the freer; or later, by RCU's thread or by an epoch library.
//!
//! | kind | a walk costs | the freer | memory that waits | who may walk |
//! | --- | --- | --- | --- | --- |
//! | `counter` (up to 3.4) | RCU section, and two locked instructions on one line of the VM | frees at once, or defers to RCU if a reader is inside | unbounded while readers come and go | any task |
//! | `ipi` (3.5, seed 003) | store, full barrier, store: all to the vCPU's own line | waits in the flush for walkers | none | vCPUs |
//! | `membarrier` | store, store | one more interrupt to each CPU, then as `ipi` | none | vCPUs |
//! | `rcu` (as the TDP MMU) | RCU section | defers | a grace period's worth, unbounded under a stalled reader | any task |
//! | `epoch` (crossbeam-epoch) | a pin: store and full barrier, store | defers | two epochs' worth, unbounded under a stalled reader | any task |
//!
//! # The barriers, one by one
//!
//! *Walker* W: (1) says that it reads; (2) opening barrier; (3) reads entries; (4) says that it has stopped, by a store that releases. *Freer* F, who holds mmu_lock exclusively: (5) stores the entry that unlinks
//! the page; (6) its barrier; (7) looks who reads, and waits for them; (8) frees: the page is written from here on.
//!
//! Forbidden is that W reads the old entry in (3), hence the page, while F sees nobody reading in (7): store buffering, in which each side's store waits in its CPU while its load goes ahead. F's unlink is a *plain*
//! store (a parent's entry has no bits that hardware adds), so nothing but (6) orders it before (7).
//!
//! * **(2) against (6).** Both are full barriers; one comes first in their total order. If (6) does, W's reads find the unlink of (5). If (2) does, F's look finds the word of (1). *Without (2)*: W's reads are done
//!   before its word leaves the store buffer; F sees OUTSIDE, frees, and W reads on in the page. *Without (6)*: F sees OUTSIDE before its unlink has left the buffer; W then announces itself, correctly, and finds the old
//!   entry. Either is found by `loom_s1b` in the platform's tests, and by the simulated platform under TSO.
//! * **(4) releases.** What W has read, it has read before anybody sees OUTSIDE. *As a relaxed store* it may become visible while reads of (3) are still to be done, and the page under them is freed. x86 does
//!   not reorder so, compilers and other machines do. The seed has a full barrier here; a release is enough (kernels since 4.6 use one), because nothing after the section needs to be ordered behind (4).
//! * **(7) acquires.** Seeing OUTSIDE, F's writes to the page (8) come after W's reads. Relaxed, they might be seen by W's last reads.
//! * **(7) waits for what it saw.** A walk is told from the vCPU's next by the number in its mode word; F need not wait for walks that began after its barrier: by (2)/(6) these find the unlink. Waiting for
//!   *any* walk to be absent would let a vCPU that walks without pause hold F for ever.
//!
//! In kind `membarrier` (2) is no instruction: F's (6) is a membarrier, which cuts each running thread's program order at one point between call and return. If the cut falls before W's (1), the reads of (3) come after
//! F's unlink and find it. If it falls after (1), the word is visible to (7). A thread that is not running passed a barrier when it was switched out. The compiler must still be kept from moving (3) above (1):
//! `light_fence`. Where the host has no membarrier both become full barriers, and the kind is `ipi`.
//!
//! In kind `counter` (1) and (4) are locked instructions, which are full barriers on both sides; (7) loads the counter once and does not wait: a reader inside means that the chain goes to RCU, and each reader is in an
//! RCU section *before* (1) and until after (4). *Leaving the section first* would let a grace period end under a reader that is still counted. A count of zero means by (2)/(6) that whoever reads now finds the unlink.
//! RCU argues its own barriers (`tdpmmu_platform::rcu`); here the deferral comes after the flush, as hardware walkers hold no section. So does the epoch's: whoever is pinned in an older epoch may hold a link, and the library runs what was
//! deferred only two epochs later; F's unlink is ordered before the deferral by the flush's barrier.
//!
//! Interrupts off, in the kernel, have two uses here: the walk is short, since nothing preempts it, and the IPI itself is the wait. A thread of this program *can* be preempted inside; F then waits in (7) as
//! long as the host's scheduler pleases. `bench walk` shows that as the price of kind `ipi` under a stalled reader: latency of a free, where the others pay in memory.

mod free;
mod mode;
mod section;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crossbeam_epoch::Collector;
use tdpmmu_platform::Platform;
use tdpmmu_table::TablePool;

pub use mode::{ModeWord, NoMode};
pub use section::{Section, WalkError, Walker};

/// How lockless walkers and the freeing of pages keep out of each other's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum ReclaimKind {
    /// (a) One counter of readers for the VM; pages go to RCU if somebody is inside. Up to 3.4.
    Counter,
    /// (b) Walkers say so in their vCPU's mode word, with a full barrier; the flush waits for them. Since 3.5.
    #[default]
    Ipi,
    /// (b') The same, with the walker's barrier moved to the freer.
    Membarrier,
    /// (c) RCU, as the TDP MMU has it.
    Rcu,
    /// (d) The epochs of crossbeam-epoch.
    Epoch,
}

impl ReclaimKind {
    /// Every kind.
    pub const ALL: [ReclaimKind; 5] = [Self::Counter, Self::Ipi, Self::Membarrier, Self::Rcu, Self::Epoch];

    /// Its name in options and results.
    pub const fn name(self) -> &'static str {
        ["counter", "ipi", "membarrier", "rcu", "epoch"][self as usize]
    }

    /// One line for tables and help.
    pub const fn summary(self) -> &'static str {
        [
            "one reader counter for the VM, RCU deferral while a reader is inside (up to 3.4)",
            "the walker's mode word and a full barrier; the flush waits for walkers (since 3.5)",
            "as ipi, with the walker's barrier moved to the freer (membarrier)",
            "an RCU section a walk, every page deferred (as the TDP MMU)",
            "epochs of crossbeam-epoch, every page deferred",
        ][self as usize]
    }

    /// The kind of that name.
    ///
    /// # Errors
    /// [`UnknownReclaim`], which lists what there is.
    pub fn parse(name: &str) -> Result<Self, UnknownReclaim> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| UnknownReclaim { name: name.to_owned() })
    }

    /// Only vCPUs may walk: a walk is announced in a mode word.
    pub const fn needs_vcpu(self) -> bool {
        matches!(self, Self::Ipi | Self::Membarrier)
    }

    /// Pages are free when [`Reclamation::free`] returns.
    pub const fn frees_at_once(self) -> bool {
        self.needs_vcpu()
    }
}

impl std::fmt::Display for ReclaimKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// No kind of reclamation has that name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("reclamation {name:?}: must be one of counter, ipi, membarrier, rcu, epoch")]
pub struct UnknownReclaim {
    /// What was given.
    pub name: String,
}

/// Reclamation of one VM's shadow pages. See the module text.
pub struct Reclamation<P: Platform> {
    kind: ReclaimKind,
    pool: Arc<TablePool>,
    rcu: Arc<P::Rcu>,
    /// Kind `counter`: walkers inside.
    readers: Readers,
    epochs: Collector,
}

/// The line that all walkers of kind `counter` write to. Alone on it, so that what it costs is its own.
#[derive(Default)]
#[repr(align(128))]
struct Readers(AtomicU64);

impl<P: Platform> Reclamation<P> {
    /// Reclamation of `kind` for pages of `pool`; `rcu` is the domain whose owner reclaims into that same pool.
    pub fn new(kind: ReclaimKind, pool: Arc<TablePool>, rcu: Arc<P::Rcu>) -> Self {
        Self { kind, pool, rcu, readers: Readers::default(), epochs: Collector::new() }
    }

    /// The kind.
    pub fn kind(&self) -> ReclaimKind {
        self.kind
    }

    /// Pages that were handed over and wait for readers.
    pub fn waiting(&self) -> u64 {
        self.pool.waiting()
    }

    /// The most pages that waited at once.
    pub fn waiting_peak(&self) -> u64 {
        self.pool.waiting_peak()
    }
}
