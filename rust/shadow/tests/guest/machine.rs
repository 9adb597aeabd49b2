//! A guest with page tables of its own on one shadow MMU: for tests of what faults, syncs and writes do.
//!
//! The guest's memory is a map of words; frame `gfn + PFN` of the host backs `gfn`. Hardware is a walk of the shadow tables without a TLB, so what it may still use before a flush is what the tables still say.
#![allow(dead_code)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tdpmmu_platform::{
    Exclusive, Guard, MmuLock, Platform, RcuConfig, RcuDomain, Real, Reclaim, Role as TaskRole, Site, Task,
    TaskConfig,
};
use tdpmmu_shadow::{
    BookSet, GuestFault, GuestPte, LpageInfo, PageInfo, ReclaimKind, ShadowConfig, ShadowDesign, ShadowFault,
    ShadowFrame, ShadowHost, ShadowMmu, ShadowOutcome, SlotBooks, walk_guest,
};
use tdpmmu_spte::geometry::index;
use tdpmmu_spte::{Access, FormatKind, KernelProfile, Role, RoleFields, Spte};
use tdpmmu_table::{PoolConfig, TableCache, TablePool};

/// Frame of the host that backs gfn 0.
pub const PFN: u64 = 0x10_0000;
/// Pages of the guest's only slot.
pub const PAGES: u64 = 1 << 15;
/// The guest's tables lie from here on.
pub const TABLES: u64 = 0x4000;
/// Virtual page at which the guest maps its tables, one after the other.
pub const WINDOW: u64 = 0x7_0000_0000;

pub type Hook = Box<dyn Fn(&Host) + Send + Sync>;

/// Guest memory, books, flushes.
pub struct Host {
    pub words: Mutex<HashMap<(u64, u16), u64>>,
    books: Arc<BookSet>,
    pub flushes: AtomicU64,
    pub reloads: AtomicU64,
    pub dirtied: AtomicU64,
    /// Called at the next read of a guest entry, once: the guest acts in between.
    pub before_read: Mutex<Option<(u64, Hook)>>,
    /// The host maps its pages writable.
    pub writable: AtomicBool,
    /// Called in each flush.
    pub on_flush: Mutex<Option<Hook>>,
}

impl Host {
    pub fn new() -> Arc<Self> {
        let lpage = LpageInfo::new(0, PAGES, 0).expect("a small slot");
        let books = SlotBooks::new(0, 0, PAGES, Arc::new(lpage)).expect("a small slot");
        Arc::new(Self {
            words: Mutex::default(),
            books: Arc::new(BookSet::new([Arc::new(books)])),
            flushes: AtomicU64::new(0),
            reloads: AtomicU64::new(0),
            dirtied: AtomicU64::new(0),
            before_read: Mutex::default(),
            writable: AtomicBool::new(true),
            on_flush: Mutex::default(),
        })
    }

    pub fn poke(&self, gfn: u64, index: u16, value: u64) {
        self.words.lock().expect("no panic").insert((gfn, index), value);
    }

    pub fn peek(&self, gfn: u64, index: u16) -> u64 {
        self.words.lock().expect("no panic").get(&(gfn, index)).copied().unwrap_or(0)
    }
}

impl ShadowHost<Real> for Host {
    fn flush_remote(&self, _task: &Task<Real>) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        if let Some(hook) = &*self.on_flush.lock().expect("no panic") {
            hook(self);
        }
    }
    fn request_reload(&self, _task: &Task<Real>, _wait: bool) {
        self.reloads.fetch_add(1, Ordering::Relaxed);
    }
    fn books(&self) -> Arc<BookSet> {
        Arc::clone(&self.books)
    }
    fn read_guest(&self, _as_id: u8, gfn: u64, index: u16) -> u64 {
        let hook = self.before_read.lock().expect("no panic").take_if(|(at, _)| {
            *at -= 1;
            *at == 0
        });
        if let Some((_, hook)) = hook {
            hook(self);
        }
        self.peek(gfn, index)
    }
    fn frames_dirty(&self, _pfn: u64, _count: u64) {}
    fn frames_accessed(&self, _pfn: u64, _count: u64) {}
    fn gfn_dirty(&self, _task: &Task<Real>, _as_id: u8, _gfn: u64) {
        self.dirtied.fetch_add(1, Ordering::Relaxed);
    }
}

/// The MMU, one task, and the guest.
pub struct Machine {
    pub mmu: Arc<ShadowMmu<Real>>,
    pub host: Arc<Host>,
    pub pool: Arc<TablePool>,
    pub lock: MmuLock<Real>,
    pub task: Task<Real>,
    pub cache: TableCache,
    pub rcu: Arc<<Real as Platform>::Rcu>,
    pub levels: u8,
    next_table: u64,
    /// Level that the host allows.
    pub host_level: u8,
    pub dirty_tracked: bool,
}

/// How an access ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// Hardware translated it, after so many faults.
    Through { pfn: u64, faults: u32 },
    /// A write to a table: emulated.
    Emulated,
}

pub fn shadow_config(profile: KernelProfile, reclaim: ReclaimKind) -> ShadowConfig {
    ShadowConfig {
        profile,
        format: profile.format(FormatKind::Npt),
        design: ShadowDesign::Gen,
        reclaim,
        quota: u32::MAX,
        tdp_enabled: false,
        max_tables: 4096,
        batch: 10,
        write_back: true,
        observer: None,
    }
}

impl Machine {
    pub fn new() -> Self {
        Self::with("6.12", 4)
    }

    pub fn with(profile: &str, levels: u8) -> Self {
        Self::reclaiming(profile, levels, ReclaimKind::Ipi)
    }

    pub fn reclaiming(profile: &str, levels: u8, reclaim: ReclaimKind) -> Self {
        let profile = KernelProfile::named(profile).expect("a known profile");
        let pool = TablePool::new(PoolConfig { max_tables: 4096, hugepages: false, quarantine: true });
        let pool = Arc::new(pool.expect("a small pool"));
        let back: Arc<dyn Reclaim> = pool.clone();
        let rcu = <Real as Platform>::Rcu::try_new(back, RcuConfig::default()).expect("a thread");
        let host = Host::new();
        let config = shadow_config(profile, reclaim);
        let mmu = ShadowMmu::new(config, pool.clone(), rcu.clone(), host.clone()).expect("small books");
        let task = Task::new(&rcu, "vcpu", TaskRole::Vcpu, TaskConfig::default());
        Self {
            mmu,
            host,
            pool,
            lock: MmuLock::new(),
            task,
            cache: TableCache::default(),
            rcu,
            levels,
            next_table: TABLES,
            host_level: 3,
            dirty_tracked: false,
        }
    }

    /// An empty table of the guest's.
    pub fn new_table(&mut self) -> u64 {
        self.next_table += 1;
        self.next_table - 1
    }

    /// A process that maps the guest's tables at [`WINDOW`], and nothing else.
    pub fn process(&mut self) -> u64 {
        let cr3 = self.new_table();
        for n in 0..64 {
            self.map_raw(cr3, WINDOW + n, TABLES + n, 1, Access::ALL);
        }
        cr3
    }

    /// The guest's kernel writes its tables before anybody shadows them.
    pub fn map_raw(&mut self, cr3: u64, page: u64, gfn: u64, level: u8, access: Access) {
        let (mut table, mut at) = (cr3, self.levels);
        while at > level {
            let slot = index(page, at) as u16;
            let pte = GuestPte(self.host.peek(table, slot));
            table = if pte.is_present() {
                pte.gfn()
            } else {
                let new = self.new_table();
                self.host.poke(table, slot, GuestPte::table(new).0);
                new
            };
            at -= 1;
        }
        self.host.poke(table, index(page, level) as u16, GuestPte::leaf(gfn, level, access).0);
    }

    /// Where the guest's entry of `level` for `page` lies: table and index.
    pub fn entry_of(&self, cr3: u64, page: u64, level: u8) -> (u64, u16) {
        let (mut table, mut at) = (cr3, self.levels);
        while at > level {
            table = GuestPte(self.host.peek(table, index(page, at) as u16)).gfn();
            at -= 1;
        }
        (table, index(page, level) as u16)
    }

    pub fn role(&self, direct: bool) -> Role {
        let layout = self.mmu.profile().role_layout;
        layout.pack(&RoleFields {
            level: self.levels,
            direct,
            access: layout.access_all(),
            efer_nx: true,
            cr0_wp: true,
            ..RoleFields::default()
        })
    }

    pub fn locked<R>(
        &mut self,
        body: impl FnOnce(&ShadowMmu<Real>, &mut Guard<'_, Real, Exclusive>, &mut TableCache) -> R,
    ) -> R {
        self.mmu.top_up(&self.task, &mut self.cache).expect("room");
        let mut guard = self.lock.write(&self.task);
        body(&self.mmu, &mut guard, &mut self.cache)
    }

    pub fn load(&mut self, cr3: u64) -> u32 {
        let role = self.role(false);
        self.locked(|mmu, guard, cache| mmu.load_root(guard, cache, 0, cr3, role)).expect("room")
    }

    pub fn load_direct(&mut self) -> u32 {
        let role = self.role(true);
        self.locked(|mmu, guard, cache| mmu.load_root(guard, cache, 0, 0, role)).expect("room")
    }

    /// What hardware finds for `page`: the last entry, its level, the table it lies in.
    pub fn hardware(&self, root: u32, page: u64) -> (Spte, u8, u32) {
        let (mut table, mut level) = (root, self.mmu.root_level(root));
        loop {
            let entry = Spte(Real::load(&self.pool.entries(table)[index(page, level)], Site::WalkLockless));
            if level == 1 || !entry.is_table(level) {
                return (entry, level, table);
            }
            table = entry.pfn() as u32;
            level -= 1;
        }
    }

    /// The host frame that hardware reaches, if it allows the access.
    pub fn translate(&self, root: u32, page: u64, write: bool, exec: bool) -> Option<u64> {
        let (entry, level, _) = self.hardware(root, page);
        let within = (1u64 << (9 * (u32::from(level) - 1))) - 1;
        (entry.is_leaf(level) && self.mmu.format().allows(entry, write, exec))
            .then(|| entry.pfn() + (page & within))
    }

    /// One fault on `page`.
    pub fn fault(
        &mut self,
        root: u32,
        cr3: u64,
        page: u64,
        write: bool,
        exec: bool,
    ) -> Result<ShadowOutcome, GuestFault> {
        let guest = if Role(self.pool.meta(root).role()).direct() {
            None
        } else {
            Some(walk_guest::<Real>(&*self.host, 0, cr3, self.levels, page, write, exec)?)
        };
        let gfn = guest.map_or(page, |walk| walk.gfn);
        let frame = if gfn < PAGES {
            ShadowFrame::Page { pfn: gfn + PFN, writable: self.host.writable.load(Ordering::Relaxed) }
        } else {
            ShadowFrame::Mmio { generation: 1 }
        };
        let fault = ShadowFault {
            gva: page,
            gfn,
            frame,
            goal_level: self.host_level,
            write,
            exec,
            dirty_tracked: self.dirty_tracked,
            guest,
            ..ShadowFault::page(page, 0, 1)
        };
        Ok(self.locked(|mmu, guard, cache| mmu.map(guard, cache, root, &fault)))
    }

    /// The guest makes an access until it completes.
    pub fn access(
        &mut self,
        root: u32,
        cr3: u64,
        page: u64,
        write: bool,
        exec: bool,
    ) -> Result<Done, GuestFault> {
        for faults in 0..8 {
            if let Some(pfn) = self.translate(root, page, write, exec) {
                return Ok(Done::Through { pfn, faults });
            }
            match self.fault(root, cr3, page, write, exec)? {
                ShadowOutcome::WriteProtected | ShadowOutcome::Emulate => return Ok(Done::Emulated),
                ShadowOutcome::Fixed { .. } | ShadowOutcome::Spurious | ShadowOutcome::Retry => {}
            }
        }
        panic!("page {page:#x} faults for ever");
    }

    pub fn read(&mut self, root: u32, cr3: u64, page: u64) -> Result<Done, GuestFault> {
        self.access(root, cr3, page, false, false)
    }

    pub fn write(&mut self, root: u32, cr3: u64, page: u64) -> Result<Done, GuestFault> {
        self.access(root, cr3, page, true, false)
    }

    /// The guest's kernel stores to a word of one of its tables, through its own translation; emulated if need be.
    pub fn store(&mut self, root: u32, cr3: u64, table: u64, at: u16, value: u64) -> Done {
        let done = self.write(root, cr3, WINDOW + (table - TABLES)).expect("the guest maps its tables");
        self.host.poke(table, at, value);
        if done == Done::Emulated {
            self.locked(|mmu, guard, _| mmu.page_track_write(guard, 0, table, at * 8, 8));
        }
        done
    }

    pub fn flush(&mut self, root: u32) {
        self.locked(|mmu, guard, _| mmu.sync_roots(guard, &[root]));
    }

    pub fn pages(&mut self) -> Vec<PageInfo> {
        self.locked(|mmu, guard, _| mmu.pages(guard))
    }

    /// The pages that shadow the guest's table in `gfn`.
    pub fn shadows_of(&mut self, gfn: u64) -> Vec<PageInfo> {
        self.pages()
            .into_iter()
            .filter(|page| page.gfn == gfn && !page.role.direct() && !page.invalid)
            .collect()
    }

    pub fn flushes(&self) -> u64 {
        self.host.flushes.load(Ordering::Relaxed)
    }

    /// The end: everything must be gone.
    pub fn finish(mut self, roots: &[u32]) {
        let roots = roots.to_vec();
        self.locked(|mmu, guard, _| roots.iter().for_each(|&root| mmu.put_root(guard, root)));
        self.locked(|mmu, guard, _| mmu.zap_all(guard));
        self.cache.drain(&self.pool);
        let left = self.mmu.uninit(&self.task);
        assert!(left.is_clean(), "{left:?}");
        assert_eq!(self.mmu.violations(), Vec::<String>::new());
        let stats = self.pool.stats();
        assert_eq!((stats.taken, stats.double_frees, self.pool.overwritten()), (0, 0, vec![]));
    }
}
