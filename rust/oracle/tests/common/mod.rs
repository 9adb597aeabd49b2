//! A small MMU with a judge, and vCPUs without guests.
#![allow(dead_code)]

use std::cell::Cell;
use std::sync::Arc;

use tdpmmu_mmu::{
    BulkError, BulkMap, DESIGNS, DesignOptions, FastOutcome, MapFault, MapOutcome, MmuConfig, NoHost,
    QueueKind, TdpMmu, ZapDesign, design,
};
use tdpmmu_oracle::{Judge, Rule, RuleSet, Rules};
use tdpmmu_platform::{Observer, Owner, Preempt, RcuConfig, Real, Role, Task, TaskConfig};
use tdpmmu_spte::{FormatKind, KernelProfile, Passes};
use tdpmmu_table::{PoolError, TableCache};

pub type Mmu = TdpMmu<Real>;

/// Profiles that differ in what matters here: role layout, splitting, write-back, lock modes, event order.
pub const PROFILES: &[&str] = &["5.15", "5.18", "6.1-async", "6.1", "6.12", "7.2"];

#[derive(Clone, Debug)]
pub struct Setup {
    pub profile: &'static str,
    pub kind: FormatKind,
    pub design: &'static str,
    pub passes: Option<&'static str>,
    pub root_level: u8,
    pub max_tables: u32,
    pub batch: u16,
    pub workers: usize,
    pub force_yield: Option<u32>,
    pub worker_cpus: Vec<usize>,
    pub queue: Option<QueueKind>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            profile: "6.12",
            kind: FormatKind::Npt,
            design: "sync",
            passes: None,
            root_level: 4,
            max_tables: 4096,
            batch: 512,
            workers: 1,
            force_yield: None,
            worker_cpus: Vec::new(),
            queue: None,
        }
    }
}

/// An MMU and who judges it.
pub struct World {
    pub mmu: Arc<Mmu>,
    pub judge: Arc<Judge>,
    pub setup: Setup,
}

thread_local! {
    static SILENCED: Cell<RuleSet> = Cell::new(RuleSet::default());
}

/// Rules that are not judged in this test at the moment.
pub fn silenced() -> RuleSet {
    SILENCED.get()
}

/// What comes out of `body` while `rule` is not judged.
pub fn silencing<R>(rule: Rule, body: impl FnOnce() -> R) -> R {
    let before = SILENCED.replace(RuleSet::default().with(rule));
    let done = body();
    SILENCED.set(before);
    done
}

impl Setup {
    fn options(&self) -> DesignOptions {
        DesignOptions { workers: self.workers, worker_cpus: self.worker_cpus.clone(), queue: self.queue }
    }

    pub fn build(&self) -> World {
        let info = design::info(self.design).expect("a known design");
        let design = design::build(self.design, &self.options()).expect("a known design");
        self.build_with(design, info.name)
    }

    /// With a design of the test's own, judged by the rules of `judged_as`.
    pub fn build_with(&self, design: Arc<dyn ZapDesign<Real>>, judged_as: &str) -> World {
        let profile = KernelProfile::named(self.profile).expect("a known profile");
        let info = design::info(self.design).expect("a known design");
        let asked = self.passes.map(|p| Passes::parse(p).expect("passes"));
        let format = profile.format(self.kind);
        let judge = Judge::new(Rules { silenced: silenced(), ..Rules::of(&profile, format, judged_as) });
        let observer: Arc<dyn Observer> = judge.clone();
        let config = MmuConfig {
            profile,
            format,
            root_level: self.root_level,
            maxphyaddr: 52,
            passes: design::effective_passes(asked, info, &profile),
            ownership: info.ownership,
            design,
            max_tables: self.max_tables,
            hugepages: false,
            quarantine: false,
            batch: self.batch,
            write_back: true,
            observer: Some(observer),
            rcu: RcuConfig::default(),
            task: TaskConfig {
                preempt: Preempt::Full,
                force_yield: self.force_yield,
                ..TaskConfig::default()
            },
        };
        World {
            mmu: TdpMmu::new(config, Arc::new(NoHost)).expect("a small pool"),
            judge,
            setup: self.clone(),
        }
    }
}

/// Every sound design under each profile, with its batches and yields.
pub fn setups() -> Vec<Setup> {
    let mut all = Vec::new();
    for design in DESIGNS.iter().filter(|d| !d.flawed) {
        for &profile in PROFILES {
            for (batch, force_yield) in [(512, None), (512, Some(1)), (1, Some(1)), (7, Some(3))] {
                all.push(Setup { profile, design: design.name, batch, force_yield, ..Setup::default() });
            }
        }
    }
    all
}

impl World {
    pub fn task(&self) -> Task<Real> {
        self.mmu.task("caller", Role::Caller)
    }

    /// Waits for queued zaps, if the design has a queue.
    pub fn settle(&self, task: &Task<Real>) {
        let _waiting = task.phase(tdpmmu_platform::Phase::QueueDelay);
        self.mmu.design().quiesce();
    }

    pub fn fast_zap(&self, task: &Task<Real>) {
        fast_zap(&self.mmu, task);
    }

    pub fn unmap(&self, task: &Task<Real>, as_id: u8, range: std::ops::Range<u64>) {
        let mut guard = self.mmu.lock.write(task);
        let mut debt = self.mmu.unmap(&mut guard, as_id, range, true);
        self.mmu.pay(task, &mut debt);
    }

    pub fn assert_clean(&self, when: &str) {
        let found = self.judge.violations();
        assert!(
            found.is_empty(),
            "{:?}: {when}: {} violations, first:\n{}",
            self.setup,
            self.judge.count(),
            found.iter().take(8).map(ToString::to_string).collect::<Vec<_>>().join("\n")
        );
    }

    pub fn check(&self, task: &Task<Real>, when: &str) {
        self.judge.check_quiet(&self.mmu, task);
        self.assert_clean(when);
    }

    /// Ends the VM; its caches are drained, its vCPUs have put their roots.
    pub fn end(self) {
        let task = self.task();
        let left = self.mmu.uninit(&task);
        self.judge.finish(&self.mmu, &task);
        self.assert_clean("at the end");
        assert_eq!(left, tdpmmu_mmu::Leftovers::default());
        assert!(self.judge.events() > 0 || self.mmu.pool().stats().allocs == 0, "the judge heard nothing");
    }

    /// Has the judge seen `rule` broken?
    pub fn saw(&self, rule: Rule) -> bool {
        self.judge.violations().iter().any(|v| v.rule == rule)
    }
}

/// A whole fast zap as rust/vm does it, without vCPUs to ask. The caller holds its slots_lock.
pub fn fast_zap(mmu: &Mmu, task: &Task<Real>) {
    {
        let mut guard = mmu.lock.write(task);
        mmu.fast_zap_invalidate(&mut guard);
        mmu.fast_zap_in_lock(&mut guard);
    }
    mmu.fast_zap_finish(task);
}

pub fn page_fault(as_id: u8, gfn: u64, level: u8, write: bool) -> MapFault {
    MapFault { as_id, write, ..MapFault::page(gfn, frame_of(gfn), level) }
}

/// Guest memory lies in one piece of host memory, aligned to 1 GiB.
pub fn frame_of(gfn: u64) -> u64 {
    (1 << 32) + gfn
}

/// One vCPU: a task, a cache, a root in one address space.
pub struct Cpu {
    pub mmu: Arc<Mmu>,
    pub task: Task<Real>,
    pub cache: TableCache,
    pub as_id: u8,
    pub root: Option<u32>,
}

impl Cpu {
    pub fn new(world: &World, as_id: u8) -> Self {
        let task = world.mmu.task("vcpu", Role::Vcpu);
        Self { mmu: Arc::clone(&world.mmu), task, cache: TableCache::default(), as_id, root: None }
    }

    /// Loads a root if none is held; a held one is kept, stale or not.
    pub fn load(&mut self) -> Result<u32, PoolError> {
        if let Some(root) = self.root {
            return Ok(root);
        }
        let role = self.mmu.root_role(self.as_id == 1);
        let root = self.mmu.load_root(&self.task, &mut self.cache, role)?;
        self.root = Some(root);
        Ok(root)
    }

    pub fn is_stale(&self) -> bool {
        self.root.is_some_and(|root| self.mmu.is_obsolete(root))
    }

    pub fn drop_root(&mut self) {
        if let Some(root) = self.root.take() {
            self.mmu.put_roots(&self.task, &[root]);
        }
    }

    /// One attempt under the lock, with the test for staleness where it belongs.
    pub fn fault(&mut self, fault: &MapFault) -> Result<MapOutcome, PoolError> {
        let root = self.load()?;
        self.mmu.top_up(&self.task, &mut self.cache)?;
        let mut guard = self.mmu.lock.read(&self.task);
        if self.mmu.is_obsolete(root) {
            return Ok(MapOutcome::Retry);
        }
        Ok(self.mmu.map(&mut guard, &mut self.cache, root, fault))
    }

    pub fn touch(&mut self, gfn: u64, level: u8, write: bool) -> Result<MapOutcome, PoolError> {
        self.fault(&page_fault(self.as_id, gfn, level, write))
    }

    /// Until the access is allowed, reloading stale roots.
    pub fn access(&mut self, gfn: u64, level: u8, write: bool) {
        loop {
            if self.is_stale() {
                self.drop_root();
            }
            match self.touch(gfn, level, write) {
                Ok(MapOutcome::Retry) => {}
                Ok(_) => return,
                Err(PoolError::Exhausted { .. }) => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub fn bulk(&mut self, map: &BulkMap) -> Result<u64, BulkError> {
        let root = self.load()?;
        self.mmu.top_up(&self.task, &mut self.cache)?;
        let mut guard = self.mmu.lock.read(&self.task);
        if self.mmu.is_obsolete(root) {
            return Ok(0);
        }
        self.mmu.populate_bulk(&mut guard, &mut self.cache, root, map)
    }

    pub fn fast_fault(&mut self, gfn: u64, write: bool) -> FastOutcome {
        let Some(root) = self.root else { return FastOutcome::Declined };
        self.mmu.fast_page_fault(&self.task, root, self.as_id, gfn, write, false, false)
    }

    pub fn close(mut self) {
        self.drop_root();
        self.cache.drain(self.mmu.pool());
    }
}

/// A leaf for [`BulkMap::template`] as a write fault makes it; or one that only the fast page fault makes writable.
pub fn template(mmu: &Mmu, level: u8, fixable: bool) -> tdpmmu_spte::Spte {
    let made = mmu.format().make_leaf(&tdpmmu_spte::MakeLeaf {
        level,
        remake: mmu.profile().remake_dirty,
        old: mmu.format().empty(),
        ..tdpmmu_spte::MakeLeaf::default()
    });
    if fixable { mmu.format().without_write(made.spte) } else { made.spte }
}

pub const OWNERS: [Owner; 5] = [Owner::Vcpu, Owner::Mmu, Owner::Gift, Owner::Iterator, Owner::Work];
