//! ns per SPTE of populate, count, shared and exclusive zap on one thread: the tuning loop for the hot paths.
//! `cargo run --release -p tdpmmu-mmu --example zapspeed [GiB]`; compare with `limits` of `tdpmmu bench`.
use std::sync::Arc;
use std::time::Instant;

use tdpmmu_mmu::{BulkMap, MmuConfig, NoHost, TdpMmu, design};
use tdpmmu_platform::{RcuConfig, RcuDomain, Real, Role, TaskConfig};
use tdpmmu_spte::{FormatKind, KernelProfile, Passes, Spte};
use tdpmmu_table::TableCache;

fn main() {
    let gib: u64 = std::env::args().nth(1).map_or(16, |a| a.parse().expect("GiB"));
    for (profile, passes, exclusive, clean) in [
        ("6.12", "1G,root", false, true),
        ("6.12", "1G,root", false, false),
        ("6.12", "4K,2M,1G,root", false, true),
        ("6.12", "4K,2M,1G,root", false, false),
        ("6.12", "1G,root", true, true),
        ("6.12", "1G,root", true, false),
    ] {
        let profile = KernelProfile::named(profile).expect("profile");
        let format = profile.format(FormatKind::Npt);
        let max_tables = (gib * 513 + 64) as u32;
        let config = MmuConfig {
            profile,
            format,
            root_level: 4,
            maxphyaddr: 52,
            passes: Passes::parse(passes).expect("passes"),
            ownership: design::info("sync").expect("sync").ownership,
            design: design::build("sync", &design::DesignOptions::default()).expect("sync"),
            max_tables,
            hugepages: true,
            quarantine: false,
            batch: 512,
            write_back: !clean,
            observer: None,
            rcu: RcuConfig::default(),
            task: TaskConfig::default(),
        };
        let mmu: Arc<TdpMmu<Real>> = TdpMmu::new(config, Arc::new(NoHost)).expect("pool");
        mmu.pool().prefault(u64::from(max_tables)).expect("memory");
        let mut best = [f64::MAX; 3];
        for _ in 0..3 {
            let task = mmu.task("bench", Role::Caller);
            let mut cache = TableCache::default();
            let root = mmu.load_root(&task, &mut cache, mmu.root_role(false)).expect("root");
            let template = if clean { Spte(0xe07) } else { Spte(0xe67) };
            let t = Instant::now();
            let mut n = 0;
            for g in 0..gib {
                let mut guard = mmu.lock.read(&task);
                let first = g << 18;
                let map = BulkMap {
                    gfns: first..first + (1 << 18),
                    first_pfn: 0x100000 + first,
                    level: 1,
                    template,
                };
                n += mmu.populate_bulk(&mut guard, &mut cache, root, &map).expect("room");
            }
            best[0] = best[0].min(t.elapsed().as_nanos() as f64 / n as f64);
            let t = Instant::now();
            assert_eq!(mmu.count(&task, root).sptes(), n);
            best[1] = best[1].min(t.elapsed().as_nanos() as f64 / n as f64);
            let t = Instant::now();
            let mut guard = mmu.lock.write(&task);
            if exclusive {
                mmu.zap_all(&mut guard);
            }
            mmu.fast_zap_invalidate(&mut guard);
            drop(guard);
            mmu.fast_zap_finish(&task);
            best[2] = best[2].min(t.elapsed().as_nanos() as f64 / n as f64);
            let s = task.meter().take();
            eprintln!("writes {} reads {} yields {}", s.entry_writes, s.entry_reads, s.yields);
            mmu.put_roots(&task, &[root]);
            cache.drain(mmu.pool());
            mmu.rcu().barrier();
        }
        println!(
            "{passes:14} exclusive {exclusive:5} clean {clean:5}: populate {:.2} count {:.2} zap {:.2} ns/SPTE",
            best[0], best[1], best[2]
        );
        let task = mmu.task("end", Role::Caller);
        println!("{:?} {:?}", mmu.uninit(&task), mmu.violations());
    }
}
