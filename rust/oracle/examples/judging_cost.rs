//! What a judge costs on the real platform: a fast zap of 64 MiB, and faults, without one and with each degree of looking. Nanoseconds by the median of some rounds; run it in release.

use std::sync::Arc;
use std::time::Instant;

use tdpmmu_oracle::{Check, Judge, Rules};
use tdpmmu_platform::{Real, Role};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::{GuestAccess, Vm, VmConfig};

const PAGES: u64 = 16 * 1024;
const ROUNDS: usize = 9;

/// Nanoseconds per page: (zap, fault).
fn measure(check: Option<Check>) -> (f64, f64) {
    let profile = KernelProfile::named("6.12").expect("known");
    let mut config =
        VmConfig { max_tables: 4096, hugepages: false, host_pages: 1 << 20, ..VmConfig::new(profile) };
    if let Some(check) = check {
        let rules = Rules::of(&profile, config.format.with_maxphyaddr(config.maxphyaddr), "sync");
        config.observer = Some(Judge::new(rules.on::<Real>().check(check)) as Arc<_>);
    }
    let vm = Vm::<Real>::new(config).expect("a small VM");
    let task = vm.task("vmm", Role::Caller);
    vm.add_memory(&task, 0, PAGES, 1).expect("memory");
    let (mut zaps, mut faults) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        {
            let mut vcpu = vm.vcpu(0).expect("free");
            for gfn in 0..PAGES {
                vcpu.access(GuestAccess::write(gfn)).expect("memory");
            }
        }
        faults.push(begin.elapsed().as_nanos() as f64 / PAGES as f64);
        let begin = Instant::now();
        vm.fast_zap(&task).expect("open");
        zaps.push(begin.elapsed().as_nanos() as f64 / PAGES as f64);
    }
    let median = |mut all: Vec<f64>| {
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    (median(zaps), median(faults))
}

fn main() {
    let none = measure(None);
    println!("{:<8} {:>12} {:>12}", "check", "zap ns/page", "access ns/page");
    println!("{:<8} {:>12.1} {:>12.1}", "none", none.0, none.1);
    for (name, check) in [("cheap", Check::Cheap), ("books", Check::Books), ("full", Check::Full)] {
        let (zap, fault) = measure(Some(check));
        println!("{name:<8} {zap:>12.1} {fault:>12.1}   x{:.1} x{:.1}", zap / none.0, fault / none.1);
    }
}
