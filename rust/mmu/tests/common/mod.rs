//! A small MMU without guests, for tests of the engine alone.
#![allow(dead_code)]

use std::sync::Arc;

use tdpmmu_mmu::{
    DesignOptions, MapFault, MapOutcome, MmuConfig, MmuError, MmuHost, NoHost, QueueKind, TdpMmu, design,
};
use tdpmmu_platform::{Observer, Owner, Platform, Preempt, RcuConfig, Real, Role, Task, TaskConfig};
use tdpmmu_spte::{Format, FormatKind, KernelProfile, Passes};
use tdpmmu_table::TableCache;

pub type Mmu = TdpMmu<Real>;

pub struct Setup {
    pub profile: &'static str,
    pub design: &'static str,
    pub passes: Option<&'static str>,
    pub root_level: u8,
    pub max_tables: u32,
    pub batch: u16,
    pub force_yield: Option<u32>,
    pub worker_cpus: Vec<usize>,
    pub queue: Option<QueueKind>,
    pub workers: usize,
    pub observer: Option<Arc<dyn Observer>>,
    /// Another format than NPT.
    pub format: Option<Format>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            profile: "6.12",
            design: "sync",
            passes: None,
            root_level: 4,
            max_tables: 4096,
            batch: 512,
            force_yield: None,
            worker_cpus: Vec::new(),
            queue: None,
            workers: 1,
            observer: None,
            format: None,
        }
    }
}

impl Setup {
    fn options(&self) -> DesignOptions {
        DesignOptions { workers: self.workers, worker_cpus: self.worker_cpus.clone(), queue: self.queue }
    }

    pub fn build(self) -> Arc<Mmu> {
        self.try_build().expect("a small pool")
    }

    pub fn try_build(self) -> Result<Arc<Mmu>, MmuError> {
        self.build_on(Arc::new(NoHost))
    }

    /// On any platform, with a host.
    pub fn build_on<P: Platform>(self, host: Arc<dyn MmuHost<P>>) -> Result<Arc<TdpMmu<P>>, MmuError> {
        let profile = KernelProfile::named(self.profile).expect("a known profile");
        let info = design::info(self.design).expect("a known design");
        let asked = self.passes.map(|p| Passes::parse(p).expect("passes"));
        let config = MmuConfig {
            profile,
            format: self.format.unwrap_or_else(|| profile.format(FormatKind::Npt)),
            root_level: self.root_level,
            maxphyaddr: 52,
            passes: design::effective_passes(asked, info, &profile),
            ownership: info.ownership,
            design: design::build(self.design, &self.options()).expect("a known design"),
            max_tables: self.max_tables,
            hugepages: false,
            quarantine: false,
            batch: self.batch,
            write_back: true,
            observer: self.observer,
            rcu: RcuConfig::default(),
            task: TaskConfig {
                preempt: Preempt::Full,
                force_yield: self.force_yield,
                ..TaskConfig::default()
            },
        };
        TdpMmu::new(config, host)
    }
}

/// One vCPU: a task, a cache, a root.
pub struct Cpu<P: Platform = Real> {
    pub mmu: Arc<TdpMmu<P>>,
    pub task: Task<P>,
    pub cache: TableCache,
    pub root: u32,
}

impl<P: Platform> Cpu<P> {
    pub fn new(mmu: &Arc<TdpMmu<P>>) -> Self {
        Self::of_space(mmu, 0)
    }

    /// In system management mode for address space 1.
    pub fn of_space(mmu: &Arc<TdpMmu<P>>, as_id: u8) -> Self {
        let task = mmu.task("vcpu", Role::Vcpu);
        let mut cache = TableCache::default();
        let role = mmu.root_role(as_id == 1);
        let root = mmu.load_root(&task, &mut cache, role).expect("room for a root");
        Self { mmu: Arc::clone(mmu), task, cache, root }
    }

    pub fn fault(&mut self, gfn: u64, level: u8) -> MapOutcome {
        self.fault_as(gfn, level, true)
    }

    pub fn fault_as(&mut self, gfn: u64, level: u8, write: bool) -> MapOutcome {
        let fault = MapFault { write, ..MapFault::page(gfn, 0x10_0000 + gfn, level) };
        self.map(&fault)
    }

    /// One fault as it is given, through stages 2 and 7 to 9 of the pipeline.
    pub fn map(&mut self, fault: &MapFault) -> MapOutcome {
        self.mmu.top_up(&self.task, &mut self.cache).expect("room for tables");
        let mut guard = self.mmu.lock.read(&self.task);
        if self.mmu.is_obsolete(self.root) {
            return MapOutcome::Retry;
        }
        self.mmu.map(&mut guard, &mut self.cache, self.root, fault)
    }

    /// Drops the root (a vCPU that unloads).
    pub fn drop_root(&mut self) {
        self.mmu.put_roots(&self.task, &[self.root]);
    }

    pub fn close(mut self) -> Arc<TdpMmu<P>> {
        self.cache.drain(self.mmu.pool());
        self.mmu
    }
}

/// A whole fast zap as rust/vm does it, without vCPUs to ask.
pub fn fast_zap<P: Platform>(mmu: &TdpMmu<P>, task: &Task<P>) {
    {
        let mut guard = mmu.lock.write(task);
        mmu.fast_zap_invalidate(&mut guard);
        mmu.fast_zap_in_lock(&mut guard);
    }
    mmu.fast_zap_finish(task);
}

/// Ends the VM and demands that nothing is left.
pub fn end<P: Platform>(mmu: &Arc<TdpMmu<P>>) {
    let task = mmu.task("end", Role::Caller);
    let left = mmu.uninit(&task);
    assert_eq!(left, tdpmmu_mmu::Leftovers::default());
    assert_eq!(mmu.violations(), Vec::<String>::new());
    let stats = mmu.pool().stats();
    assert_eq!((stats.taken, stats.double_frees), (0, 0), "every page came back once");
}

pub const _OWNER: Owner = Owner::Vcpu;
