//! One small MMU on the staged platform, vCPUs without guests, and workers that start nothing before somebody waits for them.
#![allow(dead_code)]

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tdpmmu_mmu::{
    DesignOptions, Leftovers, MapFault, MapOutcome, MmuConfig, NoHost, QueueKind, TdpMmu, design,
};
use tdpmmu_platform::{Preempt, RcuConfig, Role, Site, Task, TaskConfig};
use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{FormatKind, KernelProfile, Passes, Role as RootRole};
use tdpmmu_table::TableCache;

use super::staged::{Staged, stage, unstage};

pub type Mmu = TdpMmu<Staged>;

/// Entries of a root that have something under them.
pub const REGIONS: u64 = 3;
/// Leaves of 4 KiB: a full leaf table in each region.
pub const LEAVES: u64 = REGIONS * 512;
/// What a teardown under the shared lock writes: every entry of every table under the root, and the root's own.
pub const SHARED_WRITES: u64 = REGIONS * (1 + 3 * 512);
/// Under the exclusive lock it writes the present ones.
pub const EXCLUSIVE_WRITES: u64 = REGIONS * (1 + 1 + 1 + 512);

/// One world at a time: those whose design uses the system's queue share it, and a length of it would be that of all.
static TURN: Mutex<()> = Mutex::new(());

/// How a world differs from the plain one.
pub struct Terms {
    /// Tasks yield at every check, at every n-th, or nowhere (0).
    pub yielding: u32,
    /// The same for all designs, so that what differs is the design.
    pub passes: Passes,
    /// Whose queue; `None`: the design's own kind.
    pub queue: Option<QueueKind>,
}

impl Default for Terms {
    fn default() -> Self {
        Self { yielding: 0, passes: Passes::ROOT, queue: None }
    }
}

pub struct World {
    pub mmu: Arc<Mmu>,
    pub vcpu: Vcpu,
    /// Of who updates memslots.
    pub caller: Task<Staged>,
    _turn: MutexGuard<'static, ()>,
}

impl World {
    /// Linux 6.12 with `design`; its workers are held back.
    pub fn new(design: &str, terms: &Terms) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let info = design::info(design).expect("a known design");
        let options = DesignOptions { queue: terms.queue, ..DesignOptions::default() };
        let profile = KernelProfile::named("6.12").expect("a known profile");
        let task = TaskConfig {
            preempt: Preempt::None,
            tick_ns: 1 << 50,
            force_yield: (terms.yielding > 0).then_some(terms.yielding),
            ..TaskConfig::default()
        };
        let config = MmuConfig {
            profile,
            format: profile.format(FormatKind::Npt),
            root_level: 4,
            maxphyaddr: 52,
            passes: terms.passes,
            ownership: info.ownership,
            design: design::build(design, &options).expect("a known design"),
            max_tables: 256,
            hugepages: false,
            quarantine: false,
            batch: 512,
            write_back: true,
            observer: None,
            rcu: RcuConfig::default(),
            task,
        };
        let mmu = Mmu::new(config, Arc::new(NoHost)).expect("a small pool");
        let (vcpu, caller) = (Vcpu::new(&mmu), mmu.task("caller", Role::Caller));
        let world = Self { mmu, vcpu, caller, _turn: turn };
        world.hold_workers();
        world
    }

    /// No worker starts anything from here on before somebody waits for it.
    pub fn hold_workers(&self) {
        if let Some(queue) = self.mmu.design().queue() {
            queue.hold();
        }
    }

    /// The part of a fast zap that holds mmu_lock exclusively.
    pub fn begin_fast_zap(&self) {
        begin_fast_zap(&self.mmu, &self.caller);
    }

    /// The part after it.
    pub fn finish_fast_zap(&self) {
        finish_fast_zap(&self.mmu, &self.caller);
    }

    /// Items queued, none of them started.
    pub fn queued(&self) -> u64 {
        self.mmu.design().queue().map_or(0, |queue| queue.waiting() as u64)
    }

    /// Lets the workers run, and waits for what is queued.
    pub fn finish_work(&self) {
        release(&self.mmu);
        self.mmu.design().quiesce();
    }

    /// Lets the workers run, and returns what they have written.
    pub fn written_by_workers(&self) -> u64 {
        release(&self.mmu);
        self.mmu.design().take_worker_reports().iter().map(|report| report.meter.entry_writes).sum()
    }

    /// Roots on the list, valid or not.
    pub fn listed_roots(&self) -> u64 {
        let _rcu = self.caller.rcu_read();
        self.mmu.listed_roots().count() as u64
    }

    /// Ends the VM, whose vCPU still holds `roots`, and demands that nothing is left. Returns what was recorded as broken.
    pub fn end(mut self, roots: &[u32]) -> Vec<String> {
        release(&self.mmu);
        self.vcpu.drop_roots(roots);
        self.vcpu.leave();
        let left = self.mmu.uninit(&self.caller);
        let stats = self.mmu.pool().stats();
        assert_eq!((left, stats.taken, stats.double_frees), (Leftovers::default(), 0, 0));
        self.mmu.violations()
    }

    /// As [`World::end`], of a schedule in which nothing breaks in any design.
    pub fn end_well(self, roots: &[u32]) {
        assert_eq!(self.end(roots), Vec::<String>::new());
    }
}

/// A vCPU: a task and a cache. It holds what roots its user says.
pub struct Vcpu {
    pub mmu: Arc<Mmu>,
    pub task: Task<Staged>,
    cache: TableCache,
}

impl Vcpu {
    pub fn new(mmu: &Arc<Mmu>) -> Self {
        Self { mmu: Arc::clone(mmu), task: mmu.task("vcpu", Role::Vcpu), cache: TableCache::default() }
    }

    /// A root of role number `n`, as a guest in nested, SMM or CR0.WP = 0 states has several.
    pub fn load(&mut self, n: u8) -> u32 {
        let layout = self.mmu.profile().role_layout;
        let mut fields = layout.unpack(self.mmu.root_role(false));
        fields.cr0_wp ^= n & 1 != 0;
        fields.efer_nx ^= n & 2 != 0;
        let role: RootRole = layout.pack(&fields);
        self.mmu.load_root(&self.task, &mut self.cache, role).expect("room for a root")
    }

    /// Three roots without anything under them.
    pub fn three_roots(&mut self) -> [u32; 3] {
        [0, 1, 2].map(|n| self.load(n))
    }

    /// A root with [`LEAVES`] leaves.
    pub fn populated(&mut self) -> u32 {
        let root = self.load(0);
        for gfns in regions() {
            gfns.for_each(|gfn| self.fault(root, gfn));
        }
        assert_eq!(self.mmu.count(&self.task, root).sptes(), LEAVES);
        root
    }

    pub fn fault(&mut self, root: u32, gfn: u64) {
        let mmu = &self.mmu;
        mmu.top_up(&self.task, &mut self.cache).expect("room for tables");
        let mut guard = mmu.lock.read(&self.task);
        let fault = MapFault::page(gfn, 0x10_0000 + gfn, 1);
        let outcome = mmu.map(&mut guard, &mut self.cache, root, &fault);
        assert!(matches!(outcome, MapOutcome::Fixed { .. }), "gfn {gfn:#x}: {outcome:?}");
    }

    /// Drops its references, in one hold of mmu_lock (shared, in 6.12).
    pub fn drop_roots(&self, roots: &[u32]) {
        self.mmu.put_roots(&self.task, roots);
    }

    /// Ends: its cached tables go back.
    pub fn leave(&mut self) {
        self.cache.drain(self.mmu.pool());
    }
}

/// What [`Vcpu::populated`] maps.
pub fn regions() -> impl Iterator<Item = Range<u64>> {
    (0..REGIONS).map(|region| region * span(4)..region * span(4) + 512)
}

pub fn begin_fast_zap(mmu: &Mmu, task: &Task<Staged>) {
    let mut guard = mmu.lock.write(task);
    mmu.fast_zap_invalidate(&mut guard);
    mmu.fast_zap_in_lock(&mut guard);
}

/// Workers are held back until this waits for them; in a design that waits for none they still are when it returns.
pub fn finish_fast_zap(mmu: &Arc<Mmu>, task: &Task<Staged>) {
    let held = Arc::clone(mmu);
    stage(0, Site::QueueFlush, move || release(&held));
    mmu.fast_zap_finish(task);
    unstage(Site::QueueFlush);
}

pub fn release(mmu: &Mmu) {
    if let Some(queue) = mmu.design().queue() {
        queue.release();
    }
}

/// Runs `body`; what it made the task write.
pub fn written(task: &Task<Staged>, body: impl FnOnce()) -> u64 {
    let before = task.meter().entry_writes.get();
    body();
    task.meter().entry_writes.get() - before
}
