//! # The shadow MMU
//!
//! **Guarantee.** Page tables that hardware walks are made from what somebody else says: from the guest's own page tables (`tdp=0`), from a nested guest's (L2 on L1's tables), or from the memslots alone (direct paging, what KVM ran before it had a
//! TDP MMU). Whatever the guest does to its tables, hardware never uses a translation that the guest has taken back and been told so (a TLB flush, a CR3 load, an INVLPG), no page is mapped writable whose contents are mirrored in a synced shadow page,
//! and no page of the host is mapped that a notifier has asked back. After a fast zap nothing is mapped through a root that was valid before it. The metadata of a memslot (reverse maps, lpage_info) is not freed while a shadow page refers to it.
//!
//! **Mechanism.** Everything is written under mmu_lock exclusive, plain and in the open: no compare-exchange decides anything, the lock does. Shadow pages are hashed by gfn and role and kept on a list, oldest last. Each leaf is in the reverse map of
//! its gfn, each table in the parent list of its child, so that a gfn can be unmapped or write-protected and a page can be taken out of the tree without a walk. A page is *prepared* (emptied, unlinked, unaccounted, marked invalid) and later *committed*: one flush of all
//! TLBs, which also waits for lockless walkers, and the pages are free. Guest tables of level 1 may go out of sync: the guest writes them freely, and the difference is made good at its next TLB flush.
//!
//! | file | idea |
//! | --- | --- |
//! | `page.rs` | what is known about a page beside its header |
//! | `hash.rs`, `lists.rs` | pages by gfn and role; the active list, oldest last |
//! | `ptelist.rs` | lists of entries in one word: reverse maps and parent lists |
//! | `rmap.rs`, `leaves.rs` | leaves and their reverse maps: one at a time; a table at a time |
//! | `parents.rs` | links between pages, and which have unsync pages below |
//! | `account.rs` | what a page costs its memslot: lpage_info, write protection |
//! | `make.rs`, `root.rs`, `bulk.rs` | pages and roots: found or made, counted, put; leaves a table at a time |
//! | `zap.rs` | prepare and commit; what was prepared and not yet committed |
//! | `all.rs`, `generation.rs`, `slot_zap.rs` | the zap designs: S0, S1, S2 |
//! | `quota.rs` | the page quota, and reclaim of the oldest |
//! | `unmap.rs`, `protect.rs` | by reverse maps: unmap; write protection, dirty clearing, aging |
//! | `count.rs`, `audit.rs` | counts without the lock; everything about every page, for judges |
//! | `slot.rs`, `lpage.rs` | what is kept with a memslot |
//! | `design.rs`, `host.rs` | designs by name; what is asked of the rest of KVM |
//! | `guest.rs`, `fetch.rs`, `map.rs` | the guest's page tables and the fault that shadows them |
//! | `sync.rs`, `track.rs` | unsync pages made good; guest writes to its own tables |
//! | `lockless.rs`, `reclaim/` | walks without the lock, and what keeps pages alive under them |
//!
//! # Zapping everything: what each step of 2013 bought
//!
//! Up to 3.10 everything was zapped in one hold (S0, `shadow-walk`): O(pages) with nobody else running, when a memslot goes and when the VM dies. Xiao Guangrong's series took seven versions to get rid of that:
//!
//! * **v1** swapped the whole cache (hash, lists, reverse maps) for a fresh one and freed the old one off line: 46.1 ms -> 21.6 ms for a slot delete and add, 6 vCPUs, 2 GiB. It bought the proof that the hold was the cost, at the price of every pointer to the cache.
//! * **v2** kept the cache and batched the freeing of root pages: fewer kicks and less contention, the same walk.
//! * **v3** is the idea that stayed: a **generation number**. Zapping everything is one increment and a reload of all roots; pages of an older generation are not found any more. O(1) for everybody who waits for the lock.
//! * **v4** (seed 004, `shadow-gen-kept`) settled what becomes of them: obsolete pages stay until reclaim takes them. But the metadata of the dying slot goes, so its reverse maps are zapped, now with *lock-break* instead of outside the lock; lpage_info is cleared in bulk,
//!   since all that it counts belongs to obsolete pages. No page of an invalid generation needs special care: the reload request has every vCPU off them.
//! * **v5 to v7** (merged for 3.11, `shadow-gen`): obsolete pages are zapped right away, oldest first, with lock-break in batches (at least ten pages between two yields, so that the walk gets somewhere however contended the lock is); the hash does not give them out; one flush and one commit at the end for all;
//!   and what is zapped but not yet freed is freed first when memory is short. Each step pays for the one before: zapping at once bounds the memory that v4 keeps, batching bounds the hold, collapsing the flushes pays for the batching.
//!
//! 5.1 tried to zap only the slot's pages (S2, `shadow-slot`), and lost: guests with assigned GPUs were corrupted, the cause was never found, 5.4 went back. `docs/shadow.md` has the designs as state machines, with their obligations and races.
//!
//! Written from the semantics of Linux 3.x to 7.2; ways in which these differ are switches of [`KernelProfile`].

mod account;
mod all;
mod audit;
mod bulk;
mod count;
mod design;
mod fetch;
mod generation;
mod guest;
mod hash;
mod host;
mod leaves;
mod lists;
mod lockless;
mod lpage;
mod make;
mod map;
mod page;
mod parents;
mod protect;
mod ptelist;
mod quota;
pub mod reclaim;
mod rmap;
mod root;
mod slot;
mod slot_zap;
mod sync;
mod track;
mod unmap;
mod zap;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};

use tdpmmu_platform::{Event, Observer, Phase, Platform, Task};
use tdpmmu_spte::{Format, KernelProfile, Role, WriteBack};
use tdpmmu_table::{DeadChain, TablePool};

pub use audit::PageInfo;
pub use bulk::DirectRun;
pub use count::{ShadowCounts, ShadowLeftovers, ShadowMemory, overhead_bytes_per_page};
pub use design::{SHADOW_DESIGNS, ShadowDesign, ShadowDesignInfo};
pub use guest::{GuestFault, GuestPte, GuestWalk, walk_guest};
pub use host::ShadowHost;
pub use lockless::{FastOutcome, ShadowWalk};
pub use lpage::LpageInfo;
pub use map::{ShadowFault, ShadowFrame, ShadowOutcome};
pub use reclaim::{ModeWord, NoMode, ReclaimKind, Reclamation, Section, WalkError, Walker};
pub use slot::{BookSet, SlotBooks};
pub use slot_zap::SlotPages;

/// Everything that a shadow MMU is made from.
pub struct ShadowConfig {
    /// The kernel whose rules hold.
    pub profile: KernelProfile,
    /// The format of its entries. The empty value must be that of every other MMU that takes tables from the same cache.
    pub format: Format,
    /// How everything is zapped.
    pub design: ShadowDesign,
    /// How lockless walkers and the freeing of pages keep out of each other's way.
    pub reclaim: ReclaimKind,
    /// Most shadow pages that may exist, in pages; `u32::MAX`: no quota.
    pub quota: u32,
    /// Hardware translates guest-physical addresses (KVM's tdp_enabled): what is shadowed are the tables of nested guests, and such a page goes with its last parent.
    pub tdp_enabled: bool,
    /// Most shadow pages that can exist at once; at most the pool's cap.
    pub max_tables: u32,
    /// Pages zapped between two yields at least (KVM: 10).
    pub batch: u32,
    /// Write Dirty and Accessed of removed leaves back to the host (where the profile does it at zap).
    pub write_back: bool,
    /// Who listens.
    pub observer: Option<Arc<dyn Observer>>,
}

/// A shadow MMU could not be built.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShadowError {
    /// The host refused address space.
    #[error("the host refused memory for {what}: {reason}")]
    Host {
        /// What it was for.
        what: &'static str,
        /// The host's word.
        reason: String,
    },
}

/// The shadow MMU of one VM. See the crate text.
pub struct ShadowMmu<P: Platform> {
    config: ShadowConfig,
    pool: Arc<TablePool>,
    host: Arc<dyn ShadowHost<P>>,
    pages: page::Pages,
    lists: ptelist::PteLists,
    hash: hash::PageHash,
    active: lists::ActiveList,
    reclaim: Reclamation<P>,
    /// Pages of another generation are obsolete (mmu_valid_gen).
    generation: AtomicU32,
    /// Zapped by a walk that has given the lock up, and not yet freed (zapped_obsolete_pages). Under mmu_lock; the mutex only satisfies the compiler.
    zapped: StdMutex<DeadChain>,
    tallies: count::Tallies,
    writes_back: bool,
    violations: StdMutex<Vec<String>>,
    zap_end: AtomicU64,
}

impl<P: Platform> ShadowMmu<P> {
    /// Builds a shadow MMU without pages. `rcu` is the domain whose owner reclaims into `pool`.
    ///
    /// # Errors
    /// [`ShadowError::Host`] when the host refuses the address space for its books.
    pub fn new(
        config: ShadowConfig,
        pool: Arc<TablePool>,
        rcu: Arc<P::Rcu>,
        host: Arc<dyn ShadowHost<P>>,
    ) -> Result<Arc<Self>, ShadowError> {
        let refused =
            |what| move |error: std::io::Error| ShadowError::Host { what, reason: error.to_string() };
        let pages = (config.max_tables as usize).min(pool.cap() as usize);
        Ok(Arc::new(Self {
            pages: page::Pages::new(&pool).map_err(refused("the books of shadow pages"))?,
            // A list holds an entry of a page: a leaf, or a link.
            lists: ptelist::PteLists::new(pages * tdpmmu_spte::geometry::ENTRIES)
                .map_err(refused("reverse maps and parent lists"))?,
            hash: hash::PageHash::new().map_err(refused("the hash of shadow pages"))?,
            active: lists::ActiveList::default(),
            reclaim: Reclamation::new(config.reclaim, Arc::clone(&pool), rcu),
            generation: AtomicU32::new(0),
            zapped: StdMutex::default(),
            tallies: count::Tallies::default(),
            writes_back: config.write_back && config.profile.write_back == WriteBack::AtZap,
            violations: StdMutex::default(),
            zap_end: AtomicU64::new(0),
            config,
            pool,
            host,
        }))
    }

    /// What it was made from.
    pub fn config(&self) -> &ShadowConfig {
        &self.config
    }

    /// The zap design.
    pub fn design(&self) -> ShadowDesign {
        self.config.design
    }

    /// The format of its entries.
    #[inline(always)]
    pub fn format(&self) -> &Format {
        &self.config.format
    }

    /// The switches of the kernel that is modelled.
    #[inline(always)]
    pub fn profile(&self) -> &KernelProfile {
        &self.config.profile
    }

    /// The page-table pages.
    #[inline(always)]
    pub fn pool(&self) -> &TablePool {
        &self.pool
    }

    /// The books of the memslots now ([`ShadowHost::books`]).
    pub fn books(&self) -> Arc<BookSet> {
        self.host.books()
    }

    /// What keeps pages alive under lockless walkers.
    pub fn reclamation(&self) -> &Reclamation<P> {
        &self.reclaim
    }

    #[inline(always)]
    pub(crate) fn host(&self) -> &dyn ShadowHost<P> {
        &*self.host
    }

    /// The role of a page.
    #[inline(always)]
    pub(crate) fn role(&self, page: u32) -> Role {
        Role(self.pool.meta(page).role())
    }

    /// Is somebody listening?
    #[inline(always)]
    pub(crate) fn is_observed(&self) -> bool {
        self.config.observer.is_some()
    }

    /// Reports an event of `task`, if somebody listens.
    #[inline(always)]
    pub(crate) fn tell(&self, task: &Task<P>, event: impl FnOnce() -> Event) {
        if let Some(observer) = &self.config.observer {
            observer.event(task.id(), &event());
        }
    }

    /// Remote flush of everything, now: a shadow page may be reached by any address.
    pub(crate) fn flush(&self, task: &Task<P>) {
        let _flushing = task.phase(Phase::Flush);
        task.meter().count_flushes(1);
        self.host.flush_remote(task);
    }

    /// Records that an invariant was found broken. Reported, never ignored.
    #[cold]
    pub(crate) fn violation(&self, rule: &'static str, what: &str) {
        P::violation(rule, what);
        let mut list = self.violations.lock().unwrap_or_else(PoisonError::into_inner);
        // The count matters, a million copies of the text do not.
        if list.len() < 1000 {
            list.push(format!("{rule}: {what}"));
        }
    }

    /// Broken invariants so far.
    pub fn violations(&self) -> Vec<String> {
        self.violations.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// When the last zap of pages ended, in [`Platform::ticks`]; 0 before the first.
    pub fn last_zap_end(&self) -> u64 {
        self.zap_end.load(Relaxed)
    }

    pub(crate) fn stamp_zap_end(&self) {
        self.zap_end.fetch_max(P::ticks(), Relaxed);
    }
}
