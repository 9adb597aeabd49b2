//! ns of CPU per leaf of populating and zapping a direct tree with reverse maps, on one thread: the tuning loop for the hot paths of the shadow MMU.
//! `cargo run --release -p tdpmmu-shadow --example shadowzap [GiB] [rounds]`; compare with `zapspeed` of tdpmmu-mmu.

use std::sync::Arc;

use tdpmmu_platform::{
    Exclusive, Guard, MmuLock, Platform, RcuConfig, RcuDomain, Real, Reclaim, Role as TaskRole, Task,
    TaskConfig,
};
use tdpmmu_shadow::{
    BookSet, DirectRun, LpageInfo, ReclaimKind, ShadowConfig, ShadowDesign, ShadowHost, ShadowMmu, SlotBooks,
};
use tdpmmu_spte::{FormatKind, KernelProfile, MakeLeaf};
use tdpmmu_table::{PoolConfig, TableCache, TablePool};

struct Host(Arc<BookSet>);

impl ShadowHost<Real> for Host {
    fn flush_remote(&self, _task: &Task<Real>) {}
    fn request_reload(&self, _task: &Task<Real>, _wait: bool) {}
    fn books(&self) -> Arc<BookSet> {
        Arc::clone(&self.0)
    }
    fn read_guest(&self, _as_id: u8, _gfn: u64, _index: u16) -> u64 {
        0
    }
    fn frames_dirty(&self, _pfn: u64, _count: u64) {}
    fn frames_accessed(&self, _pfn: u64, _count: u64) {}
    fn gfn_dirty(&self, _task: &Task<Real>, _as_id: u8, _gfn: u64) {}
}

fn main() {
    let mut args = std::env::args().skip(1).map(|a| a.parse().expect("a number"));
    let (gib, rounds): (u64, u64) = (args.next().unwrap_or(4), args.next().unwrap_or(3));
    let pages = gib << 18;
    for (design, clean, write_back) in [
        (ShadowDesign::Walk, true, false),
        (ShadowDesign::Gen, true, false),
        (ShadowDesign::Gen, false, false),
        (ShadowDesign::Gen, true, true),
        (ShadowDesign::Slot, true, false),
    ] {
        let profile = KernelProfile::named("6.12").expect("a profile");
        let format = profile.format(FormatKind::Npt);
        let max_tables = (gib * 514 + 256) as u32;
        let pool =
            TablePool::new(PoolConfig { max_tables, hugepages: true, quarantine: false }).expect("room");
        pool.prefault(u64::from(max_tables)).expect("memory");
        let pool = Arc::new(pool);
        let reclaim: Arc<dyn Reclaim> = Arc::clone(&pool) as _;
        let rcu = <Real as Platform>::Rcu::try_new(reclaim, RcuConfig::default()).expect("a thread");
        let lpage = Arc::new(LpageInfo::new(0, pages, 0).expect("room"));
        let slot = Arc::new(SlotBooks::new(0, 0, pages, lpage).expect("room"));
        let books = Arc::new(BookSet::new([Arc::clone(&slot)]));
        let config = ShadowConfig {
            profile,
            format,
            design,
            reclaim: ReclaimKind::Ipi,
            quota: u32::MAX,
            tdp_enabled: false,
            max_tables,
            batch: 10,
            write_back,
            observer: None,
        };
        let host = Arc::new(Host(Arc::clone(&books)));
        let mmu = ShadowMmu::new(config, Arc::clone(&pool), Arc::clone(&rcu), host).expect("room");
        let lock: MmuLock<Real> = MmuLock::new();
        let task = Task::new(&rcu, "shadowzap", TaskRole::Caller, TaskConfig::default());
        let role = mmu.profile().role_layout.tdp_root(4, false, false, false);
        let leaf = MakeLeaf { prefetch: !clean, ..MakeLeaf::default() };
        let first = mmu.format().make_leaf(&leaf).spte;
        let (mut fill, mut zap) = (u64::MAX, u64::MAX);
        let mut cache = TableCache::default();
        for _ in 0..rounds {
            mmu.top_up(&task, &mut cache).expect("room");
            let begin = Real::thread_cpu_ns();
            let mut guard = lock.write(&task);
            let root = mmu.load_root(&mut guard, &mut cache, 0, 0, role).expect("a root");
            for gfn in (0..pages).step_by(512) {
                let first = first.with_pfn(gfn);
                if cache.len() < 5 {
                    drop(guard);
                    mmu.top_up(&task, &mut cache).expect("room");
                    guard = lock.write(&task);
                }
                let run = DirectRun { gfn, level: 1, first, count: 512 };
                mmu.map_direct_run(&guard, &books, &mut cache, root, &run).expect("topped up");
            }
            drop(guard);
            fill = fill.min(Real::thread_cpu_ns() - begin);
            let begin = Real::thread_cpu_ns();
            let mut guard: Guard<'_, Real, Exclusive> = lock.write(&task);
            mmu.fast_zap_begin(&mut guard);
            mmu.fast_zap_rest(&mut guard, Some(&slot));
            zap = zap.min(Real::thread_cpu_ns() - begin);
            mmu.put_root(&mut guard, root);
            if design == ShadowDesign::Slot {
                mmu.zap_all(&mut guard);
            }
        }
        cache.drain(&pool);
        assert!(mmu.uninit(&task).is_clean());
        println!(
            "{:<18} clean {clean:<5} write_back {write_back:<5} {gib} GiB: fill {:.2} ns, zap {:.2} ns a leaf ({:.1} ms)",
            design.info().name,
            fill as f64 / pages as f64,
            zap as f64 / pages as f64,
            zap as f64 / 1e6,
        );
    }
}
