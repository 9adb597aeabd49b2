//! A shadow MMU without vCPUs: its host answers from maps, and notes what it was asked.
#![allow(dead_code)]

pub mod audit;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use tdpmmu_platform::{
    Exclusive, Guard, MmuLock, Observer, Platform, RcuConfig, RcuDomain, Real, Reclaim, Role as TaskRole,
    Task, TaskConfig,
};
use tdpmmu_shadow::{
    BookSet, DirectRun, LpageInfo, ReclaimKind, ShadowConfig, ShadowDesign, ShadowHost, ShadowMmu, SlotBooks,
};
use tdpmmu_spte::{FormatKind, KernelProfile, MakeLeaf, Role, RoleFields};
use tdpmmu_table::{PoolConfig, TableCache, TablePool};

pub type Mmu = ShadowMmu<Real>;
pub type Lock<'a> = Guard<'a, Real, Exclusive>;
pub type Rcu = <Real as Platform>::Rcu;

/// What a test's MMU asks and is answered.
#[derive(Default)]
pub struct Host {
    books: Mutex<Arc<BookSet>>,
    /// Guest-physical words that are not 0: (gfn, index).
    words: Mutex<BTreeMap<(u64, u16), u64>>,
    pub flushes: AtomicU64,
    /// Reloads requested, of which with a wait.
    pub reloads: AtomicU64,
    pub waits: AtomicU64,
    pub dirty: AtomicU64,
    pub accessed: AtomicU64,
    pub marked: Mutex<Vec<(u8, u64)>>,
    /// Gfns whose protection was asked of the other MMU.
    pub protected: Mutex<Vec<u64>>,
}

impl Host {
    pub fn set_word(&self, gfn: u64, index: u16, word: u64) {
        self.words.lock().expect("unpoisoned").insert((gfn, index), word);
    }

    pub fn set_books(&self, books: impl IntoIterator<Item = Arc<SlotBooks>>) {
        *self.books.lock().expect("unpoisoned") = Arc::new(BookSet::new(books));
    }

    pub fn count(cell: &AtomicU64) -> u64 {
        cell.load(Relaxed)
    }
}

impl ShadowHost<Real> for Host {
    fn flush_remote(&self, _task: &Task<Real>) {
        self.flushes.fetch_add(1, Relaxed);
    }

    fn request_reload(&self, _task: &Task<Real>, wait: bool) {
        self.reloads.fetch_add(1, Relaxed);
        self.waits.fetch_add(u64::from(wait), Relaxed);
    }

    fn write_protect_gfn(&self, _lock: &mut Lock<'_>, _as_id: u8, gfn: u64, _min_level: u8) -> bool {
        self.protected.lock().expect("unpoisoned").push(gfn);
        false
    }

    fn books(&self) -> Arc<BookSet> {
        Arc::clone(&self.books.lock().expect("unpoisoned"))
    }

    fn read_guest(&self, _as_id: u8, gfn: u64, index: u16) -> u64 {
        self.words.lock().expect("unpoisoned").get(&(gfn, index)).copied().unwrap_or(0)
    }

    fn frames_dirty(&self, _pfn: u64, count: u64) {
        self.dirty.fetch_add(count, Relaxed);
    }

    fn frames_accessed(&self, _pfn: u64, count: u64) {
        self.accessed.fetch_add(count, Relaxed);
    }

    fn gfn_dirty(&self, _task: &Task<Real>, as_id: u8, gfn: u64) {
        self.marked.lock().expect("unpoisoned").push((as_id, gfn));
    }
}

pub struct Setup {
    pub profile: &'static str,
    pub design: ShadowDesign,
    pub reclaim: ReclaimKind,
    pub quota: u32,
    pub tdp_enabled: bool,
    pub max_tables: u32,
    pub batch: u32,
    pub observer: Option<Arc<dyn Observer>>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            profile: "6.12",
            design: ShadowDesign::Gen,
            reclaim: ReclaimKind::Ipi,
            quota: u32::MAX,
            tdp_enabled: false,
            max_tables: 4096,
            batch: 10,
            observer: None,
        }
    }
}

/// An MMU, its host, its lock, and pages for it.
pub struct World {
    pub mmu: Arc<Mmu>,
    pub host: Arc<Host>,
    pub pool: Arc<TablePool>,
    pub rcu: Arc<Rcu>,
    pub lock: MmuLock<Real>,
}

impl World {
    pub fn new(setup: Setup) -> Self {
        let config = PoolConfig { max_tables: setup.max_tables, hugepages: false, quarantine: true };
        let pool = TablePool::new(config).expect("a small reservation");
        let pool = Arc::new(pool.observed(setup.observer.clone()));
        let reclaim: Arc<dyn Reclaim> = Arc::clone(&pool) as _;
        let rcu = Rcu::try_new(reclaim, RcuConfig::default()).expect("a thread");
        let host = Arc::new(Host::default());
        let profile = KernelProfile::named(setup.profile).expect("a profile");
        let config = ShadowConfig {
            format: profile.format(FormatKind::Npt),
            profile,
            design: setup.design,
            reclaim: setup.reclaim,
            quota: setup.quota,
            tdp_enabled: setup.tdp_enabled,
            max_tables: setup.max_tables,
            batch: setup.batch,
            write_back: true,
            observer: setup.observer,
        };
        let mmu = ShadowMmu::new(config, Arc::clone(&pool), Arc::clone(&rcu), Arc::clone(&host) as _)
            .expect("a small reservation");
        Self { mmu, host, pool, rcu, lock: MmuLock::new() }
    }

    /// A world of `design` with one memslot of `pages` pages at gfn 0.
    pub fn with_slot(design: ShadowDesign, pages: u64) -> Self {
        let world = Self::new(Setup { design, ..Setup::default() });
        world.host.set_books([books(0, 0, pages)]);
        world
    }

    pub fn task(&self) -> Task<Real> {
        self.task_with(TaskConfig::default())
    }

    pub fn task_with(&self, config: TaskConfig) -> Task<Real> {
        Task::with_observer(&self.rcu, "test", TaskRole::Caller, config, self.mmu.config().observer.clone())
    }

    /// The role of a root of four levels: direct, or of the guest's tables.
    pub fn role(&self, direct: bool) -> Role {
        let layout = self.mmu.profile().role_layout;
        let fields = layout.unpack(layout.tdp_root(4, false, false, false));
        layout.pack(&RoleFields { direct, ..fields })
    }

    /// As [`World::role`], of a nested guest's tables.
    pub fn nested_role(&self, level: u8) -> Role {
        let layout = self.mmu.profile().role_layout;
        let fields = layout.unpack(layout.tdp_root(level, false, false, true));
        layout.pack(&RoleFields { direct: false, level, ..fields })
    }

    pub fn cache(&self, task: &Task<Real>) -> TableCache {
        let mut cache = TableCache::default();
        self.mmu.top_up(task, &mut cache).expect("room");
        cache
    }

    /// A direct root, referenced.
    pub fn direct_root(&self, task: &Task<Real>) -> u32 {
        let mut cache = self.cache(task);
        let mut guard = self.lock.write(task);
        let root = self.mmu.load_root(&mut guard, &mut cache, 0, 0, self.role(true)).expect("a root");
        drop(guard);
        cache.drain(&self.pool);
        root
    }

    /// Maps `count` pages of `level` from `gfn` on, frame = gfn, accessed and dirty; returns the leaves made.
    pub fn fill(&self, task: &Task<Real>, root: u32, gfn: u64, level: u8, count: u64) -> u64 {
        let mut cache = TableCache::default();
        let span = tdpmmu_spte::geometry::span(level);
        let (mut done, mut made) = (0, 0);
        while done < count {
            self.mmu.top_up(task, &mut cache).expect("room");
            let at = gfn + done * span;
            let leaf = MakeLeaf { pfn: at, level, ..MakeLeaf::default() };
            let first = self.mmu.format().make_leaf(&leaf).spte;
            let run = DirectRun { gfn: at, level, first, count: count - done };
            let guard = self.lock.write(task);
            let books = self.mmu.books();
            let (covered, new) =
                self.mmu.map_direct_run(&guard, &books, &mut cache, root, &run).expect("topped up");
            assert!(covered > 0, "nothing is shadowed in this test");
            (done, made) = (done + covered, made + new);
        }
        cache.drain(&self.pool);
        made
    }

    /// What a VM does for a fast zap: begin, request the reload, rest.
    pub fn fast_zap(&self, task: &Task<Real>, dying: Option<&Arc<SlotBooks>>) {
        let mut guard = self.lock.write(task);
        self.mmu.fast_zap_begin(&mut guard);
        if self.mmu.design().info().zaps_all {
            self.host.request_reload(task, true);
        }
        self.mmu.fast_zap_rest(&mut guard, dying);
    }

    /// Ends the MMU; everything must be gone and nothing have gone wrong.
    pub fn end(self, task: &Task<Real>, roots: &[u32]) {
        let mut guard = self.lock.write(task);
        self.mmu.zap_all(&mut guard);
        for &root in roots {
            self.mmu.put_root(&mut guard, root);
        }
        drop(guard);
        let left = self.mmu.uninit(task);
        assert!(left.is_clean(), "{left:?}");
        assert_eq!(self.mmu.violations(), Vec::<String>::new());
        let stats = self.pool.stats();
        assert_eq!((stats.taken, stats.double_frees), (0, 0));
        assert_eq!(self.pool.overwritten(), []);
    }
}

/// Empty books of a memslot that may be mapped huge.
pub fn books(as_id: u8, base: u64, pages: u64) -> Arc<SlotBooks> {
    let lpage = Arc::new(LpageInfo::new(base, pages, base).expect("small"));
    Arc::new(SlotBooks::new(as_id, base, pages, lpage).expect("small"))
}
