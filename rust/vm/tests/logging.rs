//! Dirty logging under guests that never stop writing. Bounded by work, not by time; `TDPMMU_STRESS` multiplies it.

#[path = "common/stress.rs"]
mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use common::{Random, rounds};
use tdpmmu_platform::{Real, Role as TaskRole, TaskConfig};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::{AccessOutcome, GuestAccess, Region, SlotFlags, Vm, VmConfig};

const PAGES: u64 = 3 * 512;

/// Where main is: collections that have returned (the first: logging was turned on), and collections that were called.
#[derive(Default)]
struct Clock {
    returned: AtomicU64,
    called: AtomicU64,
    writes: AtomicU64,
}

/// Writes until stopped; per gfn a bit for each collection that must report it: the write began after the one before it had returned and
/// ended before it was called.
fn writer(vm: &Vm<Real>, id: usize, clock: &Clock) -> Vec<u64> {
    let mut vcpu = vm.vcpu(id).expect("free");
    let mut random = Random(11 + id as u64);
    let mut owed = vec![0; PAGES as usize];
    loop {
        let gfn = random.below(PAGES);
        let returned = clock.returned.load(Ordering::SeqCst);
        if vcpu.access(GuestAccess::write(gfn)).expect("memory") == AccessOutcome::Stopped {
            return owed;
        }
        if clock.called.load(Ordering::SeqCst) == returned && returned != 0 {
            owed[gfn as usize] |= 1 << returned;
        }
        clock.writes.fetch_add(1, Ordering::SeqCst);
    }
}

fn log_under_fire(profile: &str, design: &str, force_yield: Option<u32>) {
    let kernel = KernelProfile::named(profile).expect("known");
    let vm = Vm::<Real>::new(VmConfig {
        design: Some(design.into()),
        vcpus: 2,
        max_tables: 2_000,
        hugepages: false,
        host_pages: 1 << 22,
        check_frames: true,
        task: TaskConfig { force_yield, ..TaskConfig::default() },
        ..VmConfig::new(kernel)
    })
    .expect("a small VM");
    let task = vm.task("vmm", TaskRole::Caller);
    let hva = vm.side().primary.region(PAGES, 0, 2, true).expect("room");
    let plain = Region { id: 0, as_id: 0, base: 0, pages: PAGES, hva, flags: SlotFlags::default() };
    vm.set_memslot(&task, &plain).expect("room");
    let clock = Clock::default();
    let mut reported = vec![0; PAGES as usize];
    let owed = thread::scope(|scope| {
        let (vm, clock) = (&vm, &clock);
        let guests: Vec<_> = (0..2).map(|id| scope.spawn(move || writer(vm, id, clock))).collect();
        let progress = |n: u64| {
            let until = clock.writes.load(Ordering::SeqCst) + n;
            while clock.writes.load(Ordering::SeqCst) < until {
                thread::yield_now();
            }
        };
        progress(50);
        let flags = SlotFlags { log_dirty: true, readonly: false };
        clock.called.store(1, Ordering::SeqCst);
        vm.set_memslot(&task, &Region { flags, ..plain }).expect("flags");
        for n in 1..=12 {
            clock.returned.store(n, Ordering::SeqCst);
            progress(20);
            clock.called.store(n + 1, Ordering::SeqCst);
            for gfn in vm.take_dirty_log(&task, 0, 0).expect("logs") {
                reported[gfn as usize] |= 1u64 << n;
            }
        }
        vm.stop_vcpus(&task);
        guests.into_iter().map(|guest| guest.join().expect("no panic")).collect::<Vec<_>>()
    });
    assert!(
        owed.iter().flatten().any(|&rounds| rounds != 0),
        "{profile}: no write fell between two collections"
    );
    for owed in owed {
        for (gfn, (owed, reported)) in owed.iter().zip(&reported).enumerate() {
            let missed = owed & !reported;
            assert_eq!(missed, 0, "{profile}: gfn {gfn} was written and not reported in these collections");
        }
    }
    vm.resume();
    let report = vm.close().expect("no handle is left");
    assert!(report.is_clean(), "{profile}: {report:?}");
}

#[test]
fn a_write_that_begins_after_logging_was_turned_on_is_never_missed() {
    for (profile, design) in
        [("5.15", "inline"), ("5.18", "async-worker"), ("6.1", "sync"), ("6.12", "sync"), ("7.2", "sync")]
    {
        for force_yield in [None, Some(1)] {
            for _ in 0..rounds(2) {
                log_under_fire(profile, design, force_yield);
            }
        }
    }
}

#[test]
fn harvesting_takes_one_flush_if_anything_was_dirty_and_none_otherwise() {
    for profile in ["5.15", "6.12"] {
        let kernel = KernelProfile::named(profile).expect("known");
        let vm = Vm::<Real>::new(VmConfig {
            design: Some("inline".into()),
            max_tables: 2_000,
            hugepages: false,
            host_pages: 1 << 22,
            ..VmConfig::new(kernel)
        })
        .expect("a small VM");
        let task = vm.task("vmm", TaskRole::Caller);
        let hva = vm.side().primary.region(PAGES, 0, 1, true).expect("room");
        let flags = SlotFlags { log_dirty: true, readonly: false };
        vm.set_memslot(&task, &Region { id: 0, as_id: 0, base: 0, pages: PAGES, hva, flags }).expect("room");
        {
            let mut vcpu = vm.vcpu(0).expect("free");
            for gfn in (0..PAGES).step_by(3) {
                vcpu.access(GuestAccess::write(gfn)).expect("memory");
            }
        }
        let before = vm.mmu().flushes();
        let writes = task.meter().entry_writes.get();
        let log = vm.take_dirty_log(&task, 0, 0).expect("logs");
        assert_eq!(log, (0..PAGES).step_by(3).collect::<Vec<_>>(), "{profile}");
        assert_eq!(vm.mmu().flushes() - before, 1, "{profile}");
        assert_eq!(task.meter().entry_writes.get() - writes, log.len() as u64, "{profile}: what was dirty");
        assert_eq!(vm.take_dirty_log(&task, 0, 0), Ok(Vec::new()));
        assert_eq!(vm.mmu().flushes() - before, 1, "{profile}: nothing dirty, nothing to flush");
        assert!(vm.close().expect("no handle").is_clean());
    }
}
