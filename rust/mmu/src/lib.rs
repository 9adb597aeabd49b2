//! # The TDP MMU
//!
//! **Guarantee.** Many tasks may map, look up, fix and zap one guest's second-stage page tables at once. Faults and zaps of dead roots share mmu_lock and
//! settle by compare-exchange; range zaps own it. No table is recycled while a walker could be in it, no leaf is lost or booked twice, and after a fast zap nothing
//! is mapped that was mapped under a root valid before it, in every sound [design](design).
//!
//! **Mechanism.** A tree of tables of atomic SPTEs; the PFN of a non-leaf entry is the index of its table in the pool. Walks snapshot, decide, compare-exchange.
//! Every change passes one choke point that does the bookkeeping. Unlinked tables go to RCU. Roots are counted, invalidated, and zapped in passes.
//!
//! | file | idea |
//! | --- | --- |
//! | `iter.rs` | preorder iterator, restartable |
//! | `walk.rs` | iterator + RCU + lock + what is owed; entries and how they change |
//! | `change.rs` | the choke point and its batch form; teardown of a removed table |
//! | `ledger.rs`, `debt.rs` | bookkeeping and TLB flushes that are pending, as values |
//! | `root.rs` | root list, references, load and put |
//! | `map.rs` | a fault's map step |
//! | `lockless.rs` | look-up and fast page fault |
//! | `nx.rs` | the NX huge-page mitigation: candidates, recovery |
//! | `age.rs`, `change_pte.rs` | what notifiers ask of single leaves: was it accessed, did its page move |
//! | `zap.rs` | passes, range zaps, the steps of a fast zap |
//! | `design/` | who zaps a dead root, and when |
//! | `populate.rs` | bulk population |
//! | `wrprot.rs`, `dirty.rs`, `harvest.rs` | dirty logging: write protection, clearing of Dirty or W; by masks |
//! | `split.rs`, `collapse.rs` | huge leaves: split ahead of logging, back after it |
//! | `count.rs` | full counts |
//! | `host.rs` | what the MMU asks of the rest of KVM |
//!
//! Written from the semantics of Linux 5.10 to 7.2; the ways in which these differ are switches of
//! [`KernelProfile`], read where they matter, each with its source there.

mod age;
mod change;
mod change_pte;
mod collapse;
mod count;
mod debt;
pub mod design;
mod dirty;
mod harvest;
mod held;
mod host;
mod iter;
mod ledger;
mod lockless;
mod map;
mod nx;
mod populate;
mod root;
mod split;
mod walk;
mod wrprot;
mod zap;

use std::ops::Range;
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};

use tdpmmu_platform::{
    Bug, Event, MmuLock, NO_TASK, Observer, Phase, Platform, RcuConfig, RcuDomain, Role as TaskRole, Site,
    Task, TaskConfig,
};
use tdpmmu_spte::geometry::max_gfn;
use tdpmmu_spte::{Format, KernelProfile, Ownership, Passes, Role, WriteBack};
use tdpmmu_table::{PoolConfig, PoolError, TableCache, TablePool, Tally};

pub use count::Counts;
pub use debt::FlushDebt;
pub use design::{
    DESIGNS, DesignInfo, DesignOptions, Held, Obligations, OtherOwnership, QueueKind, UnknownDesign,
    WorkerReport, ZapDesign, ZapQueue,
};
pub use harvest::Harvest;
pub use host::{MmuHost, NoHost};
pub use iter::{MAX_LEVEL, TdpIter};
pub use lockless::{FastOutcome, LocklessWalk};
pub use map::{Frame, MapFault, MapOutcome};
pub use populate::{BulkError, BulkMap};
pub use root::{RootList, Which};
pub use walk::{Entry, Lost, Walk, Yield};

/// Everything that a TDP MMU is made from.
pub struct MmuConfig<P: Platform> {
    /// The kernel whose rules hold.
    pub profile: KernelProfile,
    /// EPT or NPT entries.
    pub format: Format,
    /// 4 or 5.
    pub root_level: u8,
    /// Physical address bits of the host, which bound every walk.
    pub maxphyaddr: u8,
    /// Granularities of a root zap.
    pub passes: Passes,
    /// Who owns a root's first reference.
    pub ownership: Ownership,
    /// Who zaps a dead root.
    pub design: Arc<dyn ZapDesign<P>>,
    /// Most tables that may exist.
    pub max_tables: u32,
    /// Back tables with huge pages.
    pub hugepages: bool,
    /// Poison freed tables, and use them again only when no others are left: for who looks for a use after free.
    pub quarantine: bool,
    /// Entries of a leaf table handled between two reschedule checks: 512 (a table) to measure, 1 (the kernel's) to
    /// conform.
    pub batch: u16,
    /// Write Dirty and Accessed of removed leaves back to the host (where the profile does it at zap).
    pub write_back: bool,
    /// Who listens.
    pub observer: Option<Arc<dyn Observer>>,
    /// RCU's settings.
    pub rcu: RcuConfig,
    /// Settings of the tasks that the MMU makes itself (workers).
    pub task: TaskConfig,
}

/// An MMU could not be built.
#[derive(Debug, thiserror::Error)]
pub enum MmuError {
    /// No address space for the pool.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// No thread for RCU or a worker.
    #[error("the host refused a thread: {0}")]
    Thread(#[source] std::io::Error),
}

/// The TDP MMU of one VM. See the crate text.
pub struct TdpMmu<P: Platform> {
    /// mmu_lock.
    pub lock: MmuLock<P>,
    roots: RootList<P>,
    nx: nx::NxPages,
    pool: Arc<TablePool>,
    rcu: Arc<P::Rcu>,
    host: Arc<dyn MmuHost<P>>,
    config: MmuConfig<P>,
    max_gfn: u64,
    writes_back: bool,
    leaves: [AtomicI64; 4],
    tallies: StdMutex<Vec<Arc<Tally>>>,
    tables: AtomicI64,
    flushes: AtomicU64,
    zap_end: AtomicU64,
    violations: StdMutex<Vec<String>>,
    users: AtomicU32,
}

impl<P: Platform> TdpMmu<P> {
    /// Builds an MMU without roots and starts its design's workers.
    ///
    /// # Errors
    /// [`MmuError`] when the host refuses address space for the pool, or a thread.
    pub fn new(config: MmuConfig<P>, host: Arc<dyn MmuHost<P>>) -> Result<Arc<Self>, MmuError> {
        let pool = TablePool::new(PoolConfig {
            max_tables: config.max_tables,
            hugepages: config.hugepages,
            quarantine: config.quarantine,
        })?;
        let pool = if P::BY_COUNT { pool.holding_by_count() } else { pool };
        let pool = Arc::new(pool.observed(config.observer.clone()).clocked(P::ticks));
        if let Some(uniform) = pool.by_count() {
            let (base, bytes) = pool.words();
            P::by_count(base, bytes, uniform.clone());
        }
        let (base, bytes) = pool.region();
        let named = Arc::downgrade(&pool);
        P::name_words(
            base,
            bytes,
            Arc::new(move |offset| named.upgrade().map_or_else(String::new, |pool| pool.entry_name(offset))),
        );
        let reclaim: Arc<dyn tdpmmu_platform::Reclaim> = pool.clone();
        let rcu = P::Rcu::try_new(reclaim, config.rcu.clone()).map_err(MmuError::Thread)?;
        let mut config = config;
        if P::bug(Bug::B30) {
            // 5.10-6.3: who creates a root owns it alone, and with the last vCPU it goes.
            config.ownership = Ownership::Vcpu;
            config.design = Arc::new(design::AsyncWorker::new(&DesignOptions::default()));
        }
        let design = Arc::clone(&config.design);
        let mmu = Arc::new(Self {
            lock: MmuLock::new(),
            roots: RootList::default(),
            nx: nx::NxPages::default(),
            pool,
            rcu,
            host,
            max_gfn: max_gfn(config.root_level, config.maxphyaddr),
            writes_back: config.write_back && config.profile.write_back == WriteBack::AtZap,
            leaves: Default::default(),
            tallies: StdMutex::default(),
            tables: AtomicI64::new(0),
            flushes: AtomicU64::new(0),
            zap_end: AtomicU64::new(0),
            violations: StdMutex::default(),
            users: AtomicU32::new(1),
            config,
        });
        design.attach(Arc::downgrade(&mmu)).map_err(MmuError::Thread)?;
        Ok(mmu)
    }

    /// The page-table pages.
    #[inline(always)]
    pub fn pool(&self) -> &TablePool {
        &self.pool
    }

    /// The page-table pages, for who shares them.
    pub fn shared_pool(&self) -> &Arc<TablePool> {
        &self.pool
    }

    /// The RCU domain that tables are freed through.
    #[inline(always)]
    pub fn rcu(&self) -> &Arc<P::Rcu> {
        &self.rcu
    }

    /// The switches of the kernel that is modelled.
    #[inline(always)]
    pub fn profile(&self) -> &KernelProfile {
        &self.config.profile
    }

    /// The entry format.
    #[inline(always)]
    pub fn format(&self) -> &Format {
        &self.config.format
    }

    /// Level of every root: 4 or 5.
    #[inline(always)]
    pub fn root_level(&self) -> u8 {
        self.config.root_level
    }

    /// First gfn that cannot be mapped.
    #[inline(always)]
    pub fn max_gfn(&self) -> u64 {
        self.max_gfn
    }

    /// Granularities of a root zap.
    pub fn passes(&self) -> Passes {
        self.config.passes
    }

    /// Who owns a root's first reference.
    pub fn ownership(&self) -> Ownership {
        self.config.ownership
    }

    /// The zap design.
    pub fn design(&self) -> &dyn ZapDesign<P> {
        &*self.config.design
    }

    #[inline(always)]
    pub(crate) fn observer(&self) -> Option<&dyn Observer> {
        self.config.observer.as_deref()
    }

    /// Reports an event of `task` to the MMU's observer, if there is one.
    #[inline(always)]
    pub fn tell(&self, task: &Task<P>, event: impl FnOnce() -> Event) {
        if let Some(observer) = self.observer() {
            observer.event(task.id(), &event());
        }
    }

    /// As [`TdpMmu::tell`], where no task is at hand.
    #[inline(always)]
    pub(crate) fn tell_somebody(&self, event: impl FnOnce() -> Event) {
        if let Some(observer) = self.observer() {
            observer.event(P::task_id().unwrap_or(NO_TASK), &event());
        }
    }

    #[inline(always)]
    pub(crate) fn host(&self) -> &dyn MmuHost<P> {
        &*self.host
    }

    #[inline(always)]
    pub(crate) fn batch(&self) -> u16 {
        self.config.batch
    }

    #[inline(always)]
    pub(crate) fn writes_back(&self) -> bool {
        self.writes_back
    }

    /// Address space of a root: 1 for SMM.
    #[inline]
    pub fn as_id(&self, root: u32) -> u8 {
        Role(self.pool.meta(root).role()).as_id()
    }

    /// The role of a valid direct root of this MMU.
    pub fn root_role(&self, smm: bool) -> Role {
        let ad_disabled = !self.config.format.ad_bits;
        self.config.profile.role_layout.tdp_root(self.config.root_level, smm, ad_disabled, false)
    }

    /// A task ("current") for the calling thread, with the MMU's own settings.
    pub fn task(&self, name: &str, role: TaskRole) -> Task<P> {
        Task::with_observer(&self.rcu, name, role, self.config.task.clone(), self.config.observer.clone())
    }

    /// Flushes remote TLBs now.
    pub fn flush(&self, task: &Task<P>, range: Option<Range<u64>>) {
        let _flushing = task.phase(Phase::Flush);
        self.flushes.fetch_add(1, Ordering::Relaxed);
        task.meter().count_flushes(1);
        let (start, end) = range.as_ref().map_or((0, u64::MAX), |gfns| (gfns.start, gfns.end));
        self.tell(task, || Event::FlushBegin { start, end });
        self.host.flush_remote(task, range);
        self.tell(task, || Event::FlushEnd { start, end });
    }

    /// Pays a debt, if one is open.
    pub fn pay(&self, task: &Task<P>, debt: &mut FlushDebt) {
        if let Some(range) = debt.take() {
            self.flush(task, Some(range));
        }
    }

    #[inline]
    pub(crate) fn add_leaves(&self, level: u8, delta: i64) {
        if self.config.profile.page_stats {
            self.leaves[level as usize].fetch_add(delta, Ordering::Relaxed);
        }
    }

    /// `count` leaves made by the owner of `cache`: on its own counter, without a locked instruction, where it has one.
    #[inline(always)]
    pub(crate) fn leaves_made(&self, cache: &mut TableCache, level: u8, count: i64) {
        if self.config.profile.page_stats && !cache.count_leaves(level, count) {
            self.add_leaves(level, count);
        }
    }

    /// A counter for a table cache: one whose owner is gone, or a new one. What it counted stays in the sum.
    fn new_tally(&self) -> Arc<Tally> {
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(free) = tallies.iter().find(|tally| Arc::strong_count(tally) == 1) {
            return Arc::clone(free);
        }
        tallies.push(Arc::default());
        Arc::clone(&tallies[tallies.len() - 1])
    }

    pub(crate) fn tables_linked(&self, count: u64) {
        self.tables.fetch_add(count as i64, Ordering::Relaxed);
    }

    pub(crate) fn tables_unlinked(&self, count: u64) {
        self.tables.fetch_sub(count as i64, Ordering::Relaxed);
    }

    /// pages_4k, pages_2m, pages_1g: leaves of all roots, invalid ones included. Exact at quiet points.
    pub fn leaf_pages(&self) -> [i64; 3] {
        let tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        [1u8, 2, 3].map(|level| {
            let own: i64 = tallies.iter().map(|tally| tally.get(level)).sum();
            self.leaves[level as usize].load(Ordering::Relaxed) + own
        })
    }

    /// Linked tables that are no roots.
    pub fn linked_tables(&self) -> i64 {
        self.tables.load(Ordering::Relaxed)
    }

    pub(crate) fn stamp_zap_end(&self) {
        self.zap_end.fetch_max(P::ticks(), Ordering::Relaxed);
    }

    /// When the last zap of a root that was not empty ended, in [`Platform::ticks`]; 0 before the first.
    pub fn last_zap_end(&self) -> u64 {
        self.zap_end.load(Ordering::Relaxed)
    }

    /// When the last table came back from RCU to the pool, in [`Platform::ticks`]; 0 before the first.
    pub fn last_table_free(&self) -> u64 {
        self.pool.last_reclaim()
    }

    /// Remote flushes so far.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    /// References of the VM's users (kvm->users_count): one of its file descriptors, and one of each item in a queue that is not the VM's own.
    pub fn users(&self) -> u32 {
        self.users.load(Ordering::Acquire)
    }

    /// Takes a user reference; false when none is left: the VM is dying, and nobody may begin to hold it.
    pub fn get_user(&self) -> bool {
        P::locked(Site::Users);
        let more = |users: u32| (users != 0).then_some(users + 1);
        let had = self.users.fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        if let Ok(had) = had {
            self.tell_somebody(|| Event::Users { users: had + 1 });
        }
        had.is_ok()
    }

    /// Gives a user reference back; returns how many are left.
    pub fn put_user(&self) -> u32 {
        P::locked(Site::Users);
        let less = |users: u32| users.checked_sub(1);
        match self.users.fetch_update(Ordering::AcqRel, Ordering::Acquire, less) {
            Ok(users) => {
                self.tell_somebody(|| Event::Users { users: users - 1 });
                users - 1
            }
            Err(_) => {
                self.violation("a user reference was given back that nobody held");
                0
            }
        }
    }

    /// Records that an invariant was found broken. Reported, never ignored: a result with violations is no result.
    #[cold]
    pub fn violation(&self, what: &str) {
        P::violation("engine", what);
        let mut list = self.violations.lock().unwrap_or_else(PoisonError::into_inner);
        // The count matters, a million copies of the text do not.
        if list.len() < 1000 {
            list.push(what.to_owned());
        }
    }

    /// Broken invariants so far.
    pub fn violations(&self) -> Vec<String> {
        self.violations.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// VM destruction, after the last vCPU has put its roots: drains the design, waits for every table to be freed, and
    /// says what was left behind.
    pub fn uninit(&self, task: &Task<P>) -> Leftovers {
        self.tell(task, || Event::VmEnd);
        self.design().drain(self, task);
        self.rcu.barrier();
        self.tell(task, || Event::VmGone);
        let roots = {
            let _rcu = task.rcu_read();
            self.listed_roots().count() as u64
        };
        let left = Leftovers { roots, tables: self.linked_tables(), leaves: self.leaf_pages().iter().sum() };
        if left != Leftovers::default() {
            self.violation(&format!("the VM ended with {left:?}"));
        }
        let written = self.pool.stats().overwritten + self.pool.overwritten().len() as u64;
        if written != 0 {
            self.violation(&format!("{written} table pages were written to after they were freed"));
        }
        let candidates = self.nx_splits();
        if candidates != 0 {
            self.violation(&format!("the VM ended with {candidates} tables on the NX list"));
        }
        left
    }
}

impl<P: Platform> Drop for TdpMmu<P> {
    fn drop(&mut self) {
        P::forget_words(self.pool.region().0);
        self.rcu.stop();
        if P::BY_COUNT {
            P::forget_words(self.pool.words().0);
        }
    }
}

/// What was still there at the end of a VM: all zero, or something leaked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Roots on the list.
    pub roots: u64,
    /// Tables linked, by the running count.
    pub tables: i64,
    /// Leaves present, by the running count.
    pub leaves: i64,
}
