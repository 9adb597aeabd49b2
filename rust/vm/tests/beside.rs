//! Operations of several threads under way at once, their order chosen: whoever replays a recording does so.

#[path = "common/small.rs"]
mod common;

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;

use common::{assert_clean, flags, leaf, slot, small};
use tdpmmu_platform::{Pace, Real, Role as TaskRole, TaskConfig, YieldPoint};
use tdpmmu_vm::{FaultOutcome, GuestAccess, HostAnswer, Region, SlotUpdate, Vm, VmError};

/// A task that yields wherever it may, and waits at each yield until the others have had their turn.
struct Baton {
    away: Mutex<SyncSender<()>>,
    back: Mutex<Receiver<()>>,
}

impl Pace for Baton {
    fn wants_yield(&self, _task: u32, _at: YieldPoint) -> bool {
        true
    }

    fn unlocked(&self, _task: u32) {
        // Whoever is gone has no more turns to take.
        if self.away.lock().expect("no panic").send(()).is_ok() {
            let _ = self.back.lock().expect("no panic").recv();
        }
    }
}

/// Runs `operation` in a thread of its own, with `between(n)` at its n-th yield; returns how many there were.
fn interleave(
    vm: &Vm<Real>,
    operation: impl FnOnce(&tdpmmu_platform::Task<Real>) + Send,
    mut between: impl FnMut(u64),
) -> u64 {
    let ((away, gone), (turn, back)) = (sync_channel(0), sync_channel(0));
    let baton: Arc<dyn Pace> = Arc::new(Baton { away: Mutex::new(away), back: Mutex::new(back) });
    // The ends of the channels are the closure's: if it panics, the other thread goes on and can be joined.
    thread::scope(move |scope| {
        scope.spawn(move || {
            let config = TaskConfig { pace: Some(baton), ..TaskConfig::default() };
            operation(&vm.task_with("paced", TaskRole::Caller, config));
        });
        let mut yields = 0;
        while gone.recv().is_ok() {
            between(yields);
            yields += 1;
            turn.send(()).expect("it waits");
        }
        yields
    })
}

const fn page(pfn: u64) -> HostAnswer {
    HostAnswer { pfn, level: 1, host_level: 1, writable: true }
}

#[test]
fn while_an_unmap_gives_way_others_fault_age_and_unmap_and_its_own_range_is_closed() {
    for kernel in ["6.1", "6.12", "7.2"] {
        let (vm, _) = small(kernel, |config| config.vcpus = 2);
        let task = vm.task("vmm", TaskRole::Caller);
        let hva = 1 << 30;
        let region = Region { id: 0, as_id: 0, base: 0, pages: 1024, hva, flags: flags(true, false) };
        vm.set_memslot(&task, &region).expect("free");
        let (mut a, mut b) = (vm.vcpu(0).expect("free"), vm.vcpu(1).expect("free"));
        for gfn in 0..40 {
            a.map_page(GuestAccess::write(gfn), page(0x100 + gfn), false).expect("memory");
        }
        let mut faulted = 0;
        let yields = interleave(
            &vm,
            |task| vm.notifier_unmap(task, hva + 8..hva + 24).expect("open"),
            |n| {
                assert_eq!((a.reload(), b.reload()), (Ok(true), Ok(true)));
                let inside = b.map_page(GuestAccess::write(8 + n % 16), page(0x300), false);
                assert_eq!(inside, Ok(FaultOutcome::Retry), "{kernel} {n}");
                let outside = a.map_page(GuestAccess::write(100 + n), page(0x400 + n), false);
                // Invalidations that overlap share one range, and up to 6.1 that of a range zap is everything.
                if kernel == "6.1" && n > 2 {
                    assert_eq!(outside, Ok(FaultOutcome::Retry), "{kernel} {n}");
                } else {
                    assert!(matches!(outside, Ok(FaultOutcome::Fixed { .. })), "{kernel} {n}: {outside:?}");
                    faulted += 1;
                }
                let other = vm.task("ksmd", TaskRole::Caller);
                vm.notifier_age(&other, hva..hva + 1024).expect("open");
                vm.get_dirty_log(&other, 0, 0).expect("slots_lock is free");
                if n == 2 {
                    vm.notifier_unmap(&other, hva..hva + 4).expect("two at once");
                    vm.zap_gfn_range(&other, 30..32).expect("open");
                    vm.recover_nx(&other, 1).expect("open");
                }
            },
        );
        assert!(yields >= 8, "{kernel}: {yields}");
        for gfn in 0..40 {
            let gone = gfn < 4 || (8..24).contains(&gfn) || (30..32).contains(&gfn);
            assert_eq!(leaf(&a, gfn).is_none(), gone, "{kernel} {gfn}");
        }
        assert_eq!(vm.stats().pages_4k, 18 + faulted, "{kernel}");
        drop((a, b));
        assert_clean(&vm);
    }
}

#[test]
fn while_a_slot_is_zapped_a_vcpu_loads_a_new_root_and_faults_elsewhere() {
    for kernel in ["6.1", "6.12", "7.2"] {
        let (vm, _) = small(kernel, |_| {});
        let task = vm.task("vmm", TaskRole::Caller);
        slot(&vm, &task, 0, 0, 512, 1);
        slot(&vm, &task, 1, 1 << 20, 512, 1);
        let mut vcpu = vm.vcpu(0).expect("free");
        for gfn in 0..64 {
            vcpu.fault(GuestAccess::write(gfn), false).expect("memory");
            vcpu.fault(GuestAccess::write((1 << 20) + gfn), false).expect("memory");
        }
        let old = vcpu.current_root();
        let yields = interleave(
            &vm,
            |task| {
                vm.delete_memslot(task, 0, 1).expect("there");
            },
            |n| {
                assert_eq!(vcpu.reload(), Ok(true));
                assert_ne!(vcpu.current_root(), old, "{kernel}: the old one is obsolete");
                let going = vcpu.fault(GuestAccess::write((1 << 20) + n % 512), false);
                assert_eq!(going, Ok(FaultOutcome::Retry), "{kernel} {n}: the slot is INVALID");
                // A prefault waits for what becomes of the slot, up to 6.17; then it says EAGAIN.
                if !vm.mmu().profile().prefault_retries_invalid_slot {
                    let early = vcpu.pre_fault((1 << 20)..(1 << 20) + 4).expect_err("INVALID");
                    assert!(
                        matches!(early, VmError::BadRange { start: 0x10_0000, end: 0x10_0001, .. }),
                        "{early}"
                    );
                }
                let stays = vcpu.fault(GuestAccess::write(n % 512), false).expect("memory");
                assert!(
                    matches!(stays, FaultOutcome::Fixed { .. } | FaultOutcome::Spurious),
                    "{kernel} {n}: {stays:?}"
                );
            },
        );
        assert!(yields > 0, "{kernel}");
        assert_eq!(
            vm.stats().pages_4k,
            yields.min(512) as i64,
            "{kernel}: only what was faulted in meanwhile"
        );
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn while_logging_is_turned_on_or_off_a_vcpu_goes_on_and_what_it_writes_is_marked() {
    for kernel in ["6.1", "6.12", "7.2"] {
        let (vm, _) = small(kernel, |_| {});
        let task = vm.task("vmm", TaskRole::Caller);
        let plain = slot(&vm, &task, 0, 0, 4 * 512, 2);
        let mut vcpu = vm.vcpu(0).expect("free");
        for gfn in (0..4 * 512).step_by(512) {
            vcpu.fault(GuestAccess::write(gfn), false).expect("memory");
        }
        for logs in [true, false] {
            let mut wrote = Vec::new();
            let yields = interleave(
                &vm,
                |task| {
                    let region = Region { flags: flags(logs, false), ..plain };
                    assert_eq!(vm.set_memslot(task, &region), Ok(SlotUpdate::Flags));
                },
                |n| {
                    assert_eq!(vcpu.reload(), Ok(true));
                    let gfn = n * 37 % (4 * 512);
                    vcpu.fault(GuestAccess::write(gfn), true).expect("memory");
                    wrote.push(gfn);
                },
            );
            assert!(yields > 0, "{kernel} {logs}");
            if logs {
                let log = vm.take_dirty_log(&task, 0, 0).expect("logs");
                // The write came after the flags: whoever made its page writable since then has marked it.
                let format = vm.mmu().format();
                let writable = |gfn| leaf(&vcpu, gfn).is_some_and(|(spte, _)| format.is_writable(spte));
                assert!(wrote.iter().all(|&gfn| !writable(gfn)), "{kernel}: taken and protected");
                assert!(!log.is_empty(), "{kernel}");
            }
        }
        vcpu.fault(GuestAccess::write(5), false).expect("memory");
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn an_unmap_that_gives_way_in_its_second_slot_has_flushed_the_first() {
    for kernel in ["6.1", "6.12", "7.2"] {
        let (vm, _) = small(kernel, |config| config.vcpus = 2);
        let task = vm.task("vmm", TaskRole::Caller);
        let hva = 1 << 30;
        // The same host memory at two places of the guest: the walk of the first ends with its leaf, that of the second gives way.
        for (id, base) in [(0, 0), (1, 4096)] {
            let region = Region { id, as_id: 0, base, pages: 512, hva, flags: flags(false, false) };
            vm.set_memslot(&task, &region).expect("free");
        }
        let mut vcpu = vm.vcpu(0).expect("free");
        for gfn in [6, 4096 + 100] {
            vcpu.map_page(GuestAccess::write(gfn), page(0x100 + gfn % 4096), false).expect("memory");
        }
        let before = vm.stats().remote_tlb_flush_requests;
        let mut beside = 0;
        let yields = interleave(
            &vm,
            |task| vm.notifier_unmap(task, hva + 5..hva + 7).expect("open"),
            |_| {
                if leaf(&vcpu, 6).is_none() {
                    // Whoever unmaps the page now finds nothing to flush, and its host frame is free when it returns.
                    assert!(vm.stats().remote_tlb_flush_requests > before, "{kernel}");
                    vm.notifier_unmap(&vm.task("ksmd", TaskRole::Caller), hva + 6..hva + 7).expect("open");
                    beside += 1;
                }
            },
        );
        assert!(yields > 0 && beside > 0, "{kernel}: {yields} {beside}");
        assert_eq!(vm.stats().remote_tlb_flush_requests, before + 1, "{kernel}: once");
        drop(vcpu);
        assert_clean(&vm);
    }
}
