//! A whole guest zapped by one thread: ns per entry written.
//!
//! Shared: a fast zap as a memslot update makes it, design `sync`, so that the caller tears down. Exclusive: everything
//! zapped under the lock. The guest is idle, every leaf is present, and the profile is 6.12, which writes Accessed and
//! Dirty back at the zap: to the frames of the model, contiguous here. "Untouched" leaves owe nothing. Under the exclusive
//! lock a leaf is *settled* when hardware cannot change it any more (Accessed and Dirty are set), else *volatile*: a
//! plain store would lose a bit. The time ends when the last leaf is out of reach; freeing tables after the grace
//! period is RCU's own time.

use std::time::{Duration, Instant};

use tdpmmu_platform::{RcuDomain, Real, Role, TaskConfig};
use tdpmmu_spte::{KernelProfile, Passes};
use tdpmmu_vm::{AdMix, BulkOptions, Progress, Vm, VmConfig};

use super::{Basis, Figure, Goal};
use crate::harness::BenchError;

struct Case {
    name: &'static str,
    passes: &'static str,
    exclusive: bool,
    ad: AdMix,
    write_back: bool,
    basis: Basis,
    goal: f64,
}

const CASES: [Case; 7] = [
    Case {
        name: "zap shared, 1G,root, untouched",
        passes: "1G,root",
        exclusive: false,
        ad: AdMix::Untouched,
        write_back: true,
        basis: Basis::Swap,
        goal: 1.25,
    },
    Case {
        name: "zap shared, 4K,2M,1G,root, untouched",
        passes: "4K,2M,1G,root",
        exclusive: false,
        ad: AdMix::Untouched,
        write_back: true,
        basis: Basis::CmpxchgAndSwap,
        goal: 1.25,
    },
    Case {
        name: "zap shared, 1G,root, dirty, contiguous write-back",
        passes: "1G,root",
        exclusive: false,
        ad: AdMix::Dirty,
        write_back: true,
        basis: Basis::Swap,
        goal: 1.5,
    },
    Case {
        name: "zap shared, 4K,2M,1G,root, dirty, contiguous write-back",
        passes: "4K,2M,1G,root",
        exclusive: false,
        ad: AdMix::Dirty,
        write_back: true,
        basis: Basis::Swap,
        goal: 1.5,
    },
    Case {
        name: "zap exclusive, settled",
        passes: "1G,root",
        exclusive: true,
        ad: AdMix::Dirty,
        write_back: false,
        basis: Basis::Write,
        goal: 1.5,
    },
    Case {
        name: "zap exclusive, settled, contiguous write-back",
        passes: "1G,root",
        exclusive: true,
        ad: AdMix::Dirty,
        write_back: true,
        basis: Basis::Write,
        goal: 1.5,
    },
    Case {
        name: "zap exclusive, volatile",
        passes: "1G,root",
        exclusive: true,
        ad: AdMix::Untouched,
        write_back: true,
        basis: Basis::Swap,
        goal: 1.3,
    },
];

/// The figures of a guest of `memory_bytes`.
pub(super) fn figures(memory_bytes: u64, reps: u32) -> Result<Vec<Figure>, BenchError> {
    CASES.iter().map(|case| figure(case, memory_bytes, reps)).collect()
}

fn figure(case: &Case, memory_bytes: u64, reps: u32) -> Result<Figure, BenchError> {
    let vm = idle_guest(memory_bytes, case.passes, case.write_back)?;
    let mut least = f64::INFINITY;
    let mut writes = 0;
    for _ in 0..reps {
        populate(&vm, memory_bytes >> 12, case.ad)?;
        let (took, written) = zap(&vm, case.exclusive)?;
        // Everything is written once, and what the 4K pass wrote, again by the pass that unlinks its table.
        let least_writes = (memory_bytes >> 12) * if case.passes.starts_with("4K") { 2 } else { 1 };
        if written < least_writes {
            let what = format!("{}: {written} entries written of {least_writes}", case.name);
            return Err(BenchError::Engine { what });
        }
        least = least.min(took.as_nanos() as f64 / written as f64);
        writes = written;
    }
    close(&vm)?;
    Ok(Figure::ns(case.name, least, writes).of(case.basis).goal(Goal::AtMost(case.goal)))
}

/// A VM with one vCPU and all its tables touched.
pub(super) fn idle_guest(memory_bytes: u64, passes: &str, write_back: bool) -> Result<Vm<Real>, BenchError> {
    let pages = memory_bytes >> 12;
    let mut config = VmConfig::new(KernelProfile::named("6.12").map_err(BenchError::engine)?);
    config.design = Some("sync".into());
    config.passes = Some(Passes::parse(passes).map_err(BenchError::engine)?);
    config.write_back = write_back;
    config.max_tables = u32::try_from(pages / 512 + pages / 512 / 512 + 1024).map_err(BenchError::engine)?;
    config.host_pages = pages;
    config.task = TaskConfig { measure: false, attribute: false, ..TaskConfig::default() };
    let tables = u64::from(config.max_tables);
    let vm = Vm::new(config).map_err(BenchError::engine)?;
    vm.add_memory(&vm.task("setup", Role::Caller), 0, pages, 1).map_err(BenchError::engine)?;
    vm.mmu().pool().prefault(tables).map_err(BenchError::engine)?;
    Ok(vm)
}

/// Maps every page in bulk.
pub(super) fn populate(vm: &Vm<Real>, pages: u64, ad: AdMix) -> Result<(), BenchError> {
    let mut vcpu = vm.vcpu(0).map_err(BenchError::engine)?;
    let options = BulkOptions { level: 1, ad, threads: 1 };
    let made =
        vm.populate_bulk(&mut vcpu, 0..pages, &options, &Progress::default()).map_err(BenchError::engine)?;
    if made == pages {
        return Ok(());
    }
    Err(BenchError::Engine { what: format!("{made} pages populated of {pages}") })
}

/// Zaps everything; the time and the entries written. The tables are back in the pool on return.
pub(super) fn zap(vm: &Vm<Real>, exclusive: bool) -> Result<(Duration, u64), BenchError> {
    let task = vm.task("zap", Role::Caller);
    task.meter().take();
    let start = Instant::now();
    if exclusive {
        let mut guard = vm.mmu().lock.write(&task);
        vm.mmu().zap_all(&mut guard);
    } else {
        vm.fast_zap(&task).map_err(BenchError::engine)?;
    }
    let took = start.elapsed();
    let written = task.meter().take().entry_writes;
    vm.fast_zap(&task).map_err(BenchError::engine)?;
    // The vCPU puts its root and takes a new one.
    vm.vcpu(0).and_then(|mut vcpu| vcpu.enter()).map_err(BenchError::engine)?;
    vm.mmu().rcu().barrier();
    let left: i64 = vm.mmu().leaf_pages().iter().sum();
    if left != 0 {
        return Err(BenchError::Engine { what: format!("{left} leaves left after a zap") });
    }
    Ok((took, written))
}

/// Ends a VM, which must be clean.
pub(super) fn close(vm: &Vm<Real>) -> Result<(), BenchError> {
    let report = vm.close().map_err(BenchError::engine)?;
    if report.is_clean() {
        return Ok(());
    }
    Err(BenchError::Engine { what: format!("the VM did not end clean: {report:?}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_zaps_a_guest() {
        let figures = figures(16 << 20, 1).unwrap();
        assert_eq!(figures.len(), CASES.len());
        assert!(figures.iter().all(|figure| figure.value > 0.0 && figure.count >= 4096));
    }
}
