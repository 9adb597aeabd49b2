//! What the hot paths of a vCPU cost, in nanoseconds: `cargo run --release -p tdpmmu-vm --example hot`.

use std::time::Instant;

use tdpmmu_platform::{Real, Role as TaskRole};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::{AdMix, BulkOptions, GuestAccess, Progress, Vm, VmConfig, VmError};

const GIG: u64 = 512 * 512;

fn main() -> Result<(), VmError> {
    let profile = KernelProfile::default();
    let mut config = VmConfig::new(profile);
    config.max_tables = 64 * 520;
    // Small enough for valgrind, whose counts of instructions are fair on a busy machine.
    config.host_pages = 72 * GIG;
    let vm = Vm::<Real>::new(config)?;
    let task = vm.task("hot", TaskRole::Caller);
    vm.mmu().pool().prefault(64 * 515)?;
    vm.add_memory(&task, 0, 64 * GIG, 1)?;
    let per = |name: &str, n: u64, began: Instant| {
        println!("{name:40} {:8.2} ns", began.elapsed().as_nanos() as f64 / n as f64);
    };
    let mut vcpu = vm.vcpu(0)?;
    // Tables hot: 8 leaf tables, zapped by a notifier, faulted again.
    let pages = 8 * 512;
    for write in [true, false] {
        let mut best = u128::MAX;
        for _ in 0..20 {
            let mut guard = vm.mmu().lock.write(&task);
            let mut debt = vm.mmu().unmap(&mut guard, 0, 0..pages, true);
            vm.mmu().pay(&task, &mut debt);
            drop(guard);
            let began = Instant::now();
            for gfn in 0..pages {
                vcpu.fault(GuestAccess { gfn, write, exec: false }, false)?;
            }
            best = best.min(began.elapsed().as_nanos());
        }
        println!("{:40} {:8.2} ns", format!("fault, tables hot, write={write}"), best as f64 / pages as f64);
    }
    vcpu.access(GuestAccess::write(5))?;
    let began = Instant::now();
    for _ in 0..10_000_000 {
        vcpu.access(GuestAccess::write(5))?;
    }
    per("TLB hit", 10_000_000, began);
    let began = Instant::now();
    for i in 0..4_000_000u64 {
        vcpu.access(GuestAccess::read(i % pages))?;
    }
    per("TLB misses and hits over 4096 pages", 4_000_000, began);
    vcpu.leave();
    let options = BulkOptions { level: 1, ad: AdMix::Dirty, threads: 1 };
    let began = Instant::now();
    let made = vm.populate_bulk(&mut vcpu, GIG..64 * GIG, &options, &Progress::default())?;
    per("bulk population, per SPTE", made, began);
    let times = vm.fast_zap(&task)?;
    println!("{:40} {:8.2} ns per SPTE; {times:?}", "fast zap", times.total_ns as f64 / made as f64);
    drop(vcpu);
    println!("{:?}", vm.close()?);
    Ok(())
}
